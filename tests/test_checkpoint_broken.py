"""What is broken, missing or foreign is named on every rank before anything changes; no perturbed weights leave."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from .checkpoints import Stretch, run_stretch
from .inside import is_evaluating_again
from .ranks import run_on_ranks
from .training import Case, engine_for, master_weights, train_window, visible_weights

CASE = Case(stage=2, world=2, model="straddling", two_groups=True)
TAG = "global_step4"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    run_on_ranks(2, run_stretch, CASE, Stretch(stop=4, save={"save_dir": str(folder)}, save_at=4))
    run_on_ranks(2, run_stretch, CASE, Stretch(stop=4, save={"save_dir": str(folder), "tag": "other"}, save_at=4))
    return folder


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


RANK1 = "looksam_rank_00001.safetensors"


def _remove(tag: Path) -> None:
    (tag / RANK1).unlink()


def _remove_manifest(tag: Path) -> None:
    (tag / "looksam.json").unlink()


def _truncate(tag: Path) -> None:
    os.truncate(tag / RANK1, (tag / RANK1).stat().st_size - 5)


def _empty(tag: Path) -> None:
    (tag / RANK1).write_bytes(b"")


def _flip_element(tag: Path) -> None:
    _flip(tag / RANK1, -20)


def _flip_description(tag: Path) -> None:
    data = (tag / RANK1).read_bytes()
    _flip(tag / RANK1, data.index(b"save_id") + 12)


def _flip_manifest(tag: Path) -> None:
    _flip(tag / "looksam.json", (tag / "looksam.json").read_bytes().index(b'"updates": 4') + 11)


def _cut_manifest(tag: Path) -> None:
    os.truncate(tag / "looksam.json", 100)


def _of_another_rank(tag: Path) -> None:
    (tag / RANK1).write_bytes((tag / "looksam_rank_00000.safetensors").read_bytes())


def _rank_file_of_another_save(tag: Path) -> None:
    (tag / RANK1).write_bytes((tag.parent / "other" / RANK1).read_bytes())


def _all_of_another_save(tag: Path) -> None:
    for name in "looksam.json", "looksam_rank_00000.safetensors", RANK1:
        (tag / name).write_bytes((tag.parent / "other" / name).read_bytes())


def _newer_format(tag: Path) -> None:
    from ds_looksam.checkpoint.files import _crc_of_json

    content = json.loads((tag / "looksam.json").read_text())
    content["format"] += 1
    del content["crc32"]
    content["crc32"] = _crc_of_json(content)
    (tag / "looksam.json").write_text(json.dumps(content))


def _cut_deepspeeds_file(tag: Path) -> None:
    os.truncate(tag / "mp_rank_00_model_states.pt", 1000)


BROKEN: list[tuple[Callable[[Path], None], str, str]] = [
    (_remove, RANK1, "is missing"),
    (_remove_manifest, "looksam.json", "is missing"),
    (_truncate, RANK1, "is damaged"),
    (_empty, RANK1, "is damaged"),
    (_flip_element, RANK1, "the checksum of head.weight["),
    (_flip_description, RANK1, "is damaged"),
    (_flip_manifest, "looksam.json", "its checksum is wrong"),
    (_cut_manifest, "looksam.json", "is damaged"),
    (_of_another_rank, RANK1, "is the file of rank 0, not of rank 1"),
    (_rank_file_of_another_save, RANK1, "belongs to another save"),
    (_all_of_another_save, "looksam.json", "belongs to another save"),
    (_newer_format, "looksam.json", "has format 2"),
    (_cut_deepspeeds_file, "mp_rank_00_model_states.pt", "is damaged"),
]


@contextlib.contextmanager
def _copy(folder: Path, to: Path) -> Iterator[Path]:
    subprocess.run(["cp", "-r", str(folder), str(to)], check=True)
    yield to


@pytest.mark.parametrize(("break_it", "file", "message"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_broken_input_is_named_before_anything_changes(break_it: Callable[[Path], None], file: str, message: str,
                                                       checkpoint: Path, tmp_path: Path) -> None:
    with _copy(checkpoint, tmp_path / "copy") as folder:
        break_it(folder / TAG)
        load = Stretch(stop=1, load={"load_dir": str(folder), "tag": TAG}, expects_error=True)
        for result in run_on_ranks(2, run_stretch, CASE, load, timeout=60):
            assert result.extra.error is not None, "the load went through"
            assert result.extra.error.startswith("LookSAMCheckpointError: ")
            assert file in result.extra.error and message in result.extra.error, result.extra.error
            assert result.extra.untouched
            assert result.extra.kinds == ["sam"]  # the engine is as good as before


@pytest.mark.parametrize(("model", "message"), [("mlp", "'big.weight' is in the checkpoint but not trained"),
                                                ("renamed", "'large.weight' is trained by the model but not in the"),
                                                ("reshaped", "'big.weight' is [61, 7] in the checkpoint and [62, 7]")])
def test_another_model_is_named(model: str, message: str, checkpoint: Path) -> None:
    load = Stretch(stop=0, load={"load_dir": str(checkpoint), "tag": TAG}, expects_error=True)
    for result in run_on_ranks(2, run_stretch, replace(CASE, model=model), load):
        assert message in result.extra.error, result.extra.error
        assert result.extra.untouched


def _leak_paths(engine: Any, folder: str, x: Any, y: Any) -> dict[str, Callable[[], Any]]:
    return {
        "save_checkpoint": lambda: engine.save_checkpoint(folder),
        "load_checkpoint": lambda: engine.load_checkpoint(folder),
        "save_16bit_model": lambda: engine.save_16bit_model(folder),
        "save_fp16_model": lambda: engine.save_fp16_model(folder),
        "state_dict": lambda: engine.module.state_dict(),
        "state_dict_of_submodule": lambda: next(engine.module.children()).state_dict(),
        "state_dict_of_engine": lambda: engine.state_dict(),
        "module_state_dict": lambda: engine.module_state_dict(),
        "evaluate": lambda: engine(x, y),
        "evaluate_without_grad": lambda: torch.no_grad()(engine)(x, y),
        "step": lambda: engine.step(),
        "backward": lambda: engine.backward(torch.zeros((), requires_grad=True)),
    }


def try_from_hook(case: Case, folder: str, with_closure: bool) -> dict[str, str]:
    """On a rank: from a forward hook of the first replay, try every door; then check that training goes on."""
    found: dict[str, str] = {}
    with engine_for(case) as engine:
        train_window(engine, replace(case, updates=1), 0)
        reference = master_weights(engine)
    with engine_for(case) as engine:
        x, y = case.micro_batches(0, torch.distributed.get_rank())[0]
        x = x.float()
        calls: list[None] = []

        def hook(*_: Any) -> None:
            calls.append(None)
            if len(calls) == 2:  # the replay's
                for name, leak in _leak_paths(engine, folder, x, y).items():
                    try:
                        leak()
                        found[name] = "went through"
                    except Exception as error:
                        found[name] = f"{type(error).__name__}: {error}"

        engine.module.register_forward_hook(hook)

        def closure() -> None:
            engine.backward(engine(x, y))

        engine.backward(engine(x, y))
        engine.step(closure=closure if with_closure else None)
        assert len(calls) == 2 and engine.looksam.step_kind == "sam"
        for name, weight in master_weights(engine).items():
            assert torch.equal(weight, reference[name]), name
        assert set(engine.module.state_dict()) and visible_weights(engine)
    return found


@pytest.mark.parametrize(("stage", "with_closure", "ascent"), [
    (0, False, "global"), (2, True, "global"), (3, False, "global"), (1, True, "rank"), (2, False, "micro_batch")])
def test_every_door_is_shut_during_the_replay(stage: int, with_closure: bool, ascent: str, tmp_path: Path) -> None:
    case = replace(CASE, stage=stage, ascent=ascent, params={"torch_adam": True})
    for found in run_on_ranks(2, try_from_hook, case, str(tmp_path), with_closure):
        assert len(found) == 12
        for door, outcome in found.items():
            assert outcome.startswith("LookSAMReplayError") and "perturbed" in outcome, (door, outcome)
    assert not list(tmp_path.iterdir())


def evaluate_in_closure(case: Case) -> str:
    """On a rank: a closure that evaluates without grad at the perturbed weights."""
    with engine_for(case) as engine:
        x, y = case.micro_batches(0, torch.distributed.get_rank())[0]
        before = visible_weights(engine)

        def closure() -> None:
            with torch.no_grad():
                engine(x.float(), y)

        engine.backward(engine(x.float(), y))
        try:
            engine.step(closure=closure)
        except Exception as error:
            for name, weight in visible_weights(engine).items():
                assert torch.equal(weight, before[name]), name
            return f"{type(error).__name__}: {error}"
    return "went through"


def test_a_closure_cannot_evaluate_at_perturbed_weights() -> None:
    for told in run_on_ranks(2, evaluate_in_closure, CASE):
        assert told.startswith("LookSAMReplayError") and "perturbed" in told


def interrupted(case: Case, folder: str) -> tuple[list[str], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """On a rank: every rank is interrupted in the replay (Ctrl-C), tries to leave with the weights, then loads."""
    with engine_for(case) as engine:
        for update in range(3):
            train_window(engine, case, update)
        engine.save_checkpoint(folder)
        for update in range(3, 6):
            train_window(engine, case, update)
        reference = master_weights(engine)
    with engine_for(case) as engine:
        told = []

        def hook(*_: Any) -> None:
            if is_evaluating_again(engine):
                raise KeyboardInterrupt

        handle = engine.module.register_forward_hook(hook)
        try:
            train_window(engine, case, 0)
        except KeyboardInterrupt:
            handle.remove()
        for leak in _leak_paths(engine, folder + "-leak", *case.micro_batches(0, 0)[0]).values():
            try:
                if leak.__code__.co_names[0] != "load_checkpoint":
                    leak()
                    told.append("went through")
            except Exception as error:
                told.append(type(error).__name__)
        engine.load_checkpoint(folder)
        for update in range(3, 6):
            train_window(engine, case, update)
        return told, master_weights(engine), reference


@pytest.mark.parametrize(("stage", "ascent"), [(0, "global"), (1, "global"), (3, "global"), (1, "rank"),
                                               (0, "micro_batch"), (3, "global_micro_batch")])
def test_after_an_interruption_nothing_leaves_and_a_load_repairs(stage: int, ascent: str, tmp_path: Path) -> None:
    case = replace(CASE, stage=stage, ascent=ascent, params={"torch_adam": True})
    for told, weights, reference in run_on_ranks(2, interrupted, case, str(tmp_path / "c")):
        assert "went through" not in told
        for name in reference:
            assert torch.equal(weights[name], reference[name]), name
    assert not (tmp_path / "c-leak").exists()


def save_on_full_disk(case: Case, good: str, full: str) -> tuple[str, dict[str, torch.Tensor]]:
    """On a rank: save where the disk is full on the last rank, and go on training."""
    with engine_for(case) as engine:
        for update in range(4):
            train_window(engine, case, update)
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        try:
            engine.save_checkpoint(full if last else good)
            told = "went through"
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        train_window(engine, case, 4)
        return told, master_weights(engine)


@pytest.mark.parametrize("whose", ["LookSAM's", "DeepSpeed's"])
def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_training_goes_on(whose: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs takes root")
    full = tmp_path / "full"
    full.mkdir()
    room = "8k" if whose == "DeepSpeed's" else "4k"  # LookSAM's file here is 3 KB, DeepSpeed's is 6
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(full)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode()}")
    try:
        if whose == "LookSAM's":
            (full / "other").write_bytes(bytes(4096))
        case = replace(CASE, params={"torch_adam": True})
        good = str(tmp_path / "good")
        reference = run_on_ranks(2, run_stretch, case, Stretch(stop=5))
        for (told, weights), whole in zip(run_on_ranks(2, save_on_full_disk, case, good, str(full), timeout=60),
                                          reference, strict=True):
            assert told.startswith("LookSAMCheckpointError") and "on rank 1" in told, told
            assert "LookSAM's part" in told or whose == "DeepSpeed's"
            for name, weight in whole.weights.items():
                assert torch.equal(weights[name], weight), name
        assert not (Path(good) / "latest").exists()
        assert whose == "DeepSpeed's" or not list(full.rglob("*looksam*"))
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True)  # a failed writer may still hold its file

"""What is broken, missing or foreign is named on every rank before anything changes; no perturbed weights leave."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ds_looksam.checkpoint import files

from .checkpoints import Stretch, run_stretch, same_bits
from .inside import is_evaluating_again
from .ranks import run_on_ranks
from .training import Case, engine_for, master_weights, train_window, visible_weights

CASE = Case(stage=2, world=2, model="straddling", two_groups=True, params={"torch_adam": True})
MANIFEST, RANK0, RANK1 = "looksam.json", "looksam_rank_00000.safetensors", "looksam_rank_00001.safetensors"
STATES = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saves of a run, and one of a plain run."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save = Stretch(stop=4, save={"save_dir": str(folder)}, tags=("saved", "other"), save_at=4)
    for stretch in save, replace(save, tags=("plain", ), looksam=False):
        run_on_ranks(2, run_stretch, replace(CASE, params={}), stretch)
    return folder


Damage = Callable[[Path], Any]


def cut(name: str, to: int) -> Damage:
    return lambda tag: os.truncate(tag / name, to % (tag / name).stat().st_size)


def flip(name: str, after: bytes, offset: int) -> Damage:
    """A bit, ``offset`` bytes behind where ``after`` begins (empty: behind the file's end)."""
    def damage(tag: Path) -> None:
        data = bytearray((tag / name).read_bytes())
        data[(data.index(after) if after else len(data)) + offset] ^= 4
        (tag / name).write_bytes(data)

    return damage


def copy(*names: str, to: str | None = None) -> Damage:
    """From the other save; ``to``: a file of this one instead, under another name."""
    return lambda tag: [shutil.copy((tag if to else tag.parent / "other") / name, tag / (to or name)) for name in names]


def newer_format(tag: Path) -> None:
    manifest = files.Manifest.read(tag / MANIFEST)
    with patch.object(files, "FORMAT", 2):
        manifest.write(tag)


# What was done to the files, and words of the error.
BROKEN: list[tuple[Damage, str, str]] = [
    (lambda tag: (tag / RANK1).unlink(), RANK1, "is missing"),
    (lambda tag: (tag / MANIFEST).unlink(), MANIFEST, "is missing"),
    (cut(RANK1, -5), RANK1, "is damaged"),
    (cut(RANK1, 0), RANK1, "is damaged"),
    (flip(RANK1, b"", -20), RANK1, "the checksum of head.weight["),
    (flip(RANK1, b"save_id", 12), RANK1, "is damaged"),
    (flip(MANIFEST, b'"updates": 4', 11), MANIFEST, "its checksum is wrong"),
    (cut(MANIFEST, 100), MANIFEST, "is damaged"),
    (copy(RANK0, to=RANK1), RANK1, "is the file of rank 0, not of rank 1"),
    (copy(RANK1), RANK1, "belongs to another save"),
    (copy(MANIFEST, RANK0, RANK1), MANIFEST, "belongs to another save"),
    (newer_format, MANIFEST, "has format 2"),
    (cut(STATES, 1000), STATES, "is damaged"),
]


def test_what_is_broken_is_named_before_anything_changes(checkpoint: Path, tmp_path: Path) -> None:
    for i, (damage, _, _) in enumerate(BROKEN):
        shutil.copytree(checkpoint, tmp_path / str(i))
        damage(tmp_path / str(i) / "saved")
    loads = [{"load_dir": str(tmp_path / str(i)), "tag": "saved"} for i in range(len(BROKEN))]
    untouched = run_on_ranks(2, run_stretch, CASE, Stretch(stop=1))[0]
    for result in run_on_ranks(2, run_stretch, CASE, Stretch(stop=1, refused=loads), timeout=60):
        for told, (_, file, message) in zip(result.extra.refusals, BROKEN, strict=True):
            assert told.startswith("LookSAMCheckpointError: ") and file in told and message in told, told
        assert result.extra.kinds == ["sam"]
        same_bits(result.weights, untouched.weights)


ANOTHER_SHAPE = "with custom_load_fn=f(src, dst) where"


def copy_what_fits(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    for name, p in dst.named_parameters():
        if name in src and src[name].shape == p.shape:
            p.data.copy_(src[name])


OTHER_BASE = "base optimizer is 'AdamW', the configuration's is 'SGD'", "Set optimizer.params.base_optimizer to 'AdamW'"


@pytest.mark.parametrize(("change", "tag", "messages"), [
    ({"model": "mlp"}, "saved", ["'big.weight' is in the checkpoint but not trained", ANOTHER_SHAPE]),
    ({"model": "renamed"}, "saved", ["'large.weight' is trained by the model but not in the"]),
    ({"model": "reshaped"}, "saved", ["'big.weight' is [61, 7] in the checkpoint and [62, 7]", ANOTHER_SHAPE]),
    ({"base": "SGD"}, "saved", OTHER_BASE),
    ({"base": "SGD"}, "plain", OTHER_BASE),
])
def test_another_model_or_base_optimizer_is_named(change: Any, tag: str, messages: Any, checkpoint: Path) -> None:
    load = {"load_dir": str(checkpoint), "tag": tag}
    weights_alone = load | {"load_module_only": True}  # the way out that is named
    if "model" in change:
        weights_alone |= {"load_module_strict": False, "custom_load_fn": copy_what_fits if len(messages) > 1 else None}
    stretch = Stretch(stop=1, refused=[load], load=weights_alone)
    for result in run_on_ranks(2, run_stretch, replace(CASE, params={}, **change), stretch):
        assert all(message in result.extra.refusals[0] for message in messages), result.extra.refusals
        assert result.extra.kinds == ["sam"]


def try_doors(engine: Any, folder: str, x: Any, y: Any) -> dict[str, str]:
    """What comes of every way in which perturbed weights could leave."""
    doors: dict[str, Callable[[], Any]] = {
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
    if not is_evaluating_again(engine):
        del doors["load_checkpoint"]  # the way out
    return {name: told_by(door) for name, door in doors.items()}


def told_by(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went through"


def leave_with_perturbed_weights(case: Case, folder: str, with_closure: bool) -> dict[str, str]:
    """On a rank: try every door in the second evaluation, which must not disturb training, and after one that Ctrl-C
    has cut off, which a load repairs."""
    weights = []
    with engine_for(case) as engine:
        for update in range(6):
            if update == 3:
                engine.save_checkpoint(folder)
            train_window(engine, case, update)
            weights.append(master_weights(engine))
    with engine_for(case) as engine:
        x, y = case.micro_batches(0, torch.distributed.get_rank())[0]
        x, clean = x.float(), visible_weights(engine)
        evaluate = torch.no_grad()(lambda: engine(x, y))
        found: dict[str, str] = {}

        def knock(*_: Any) -> None:
            if is_evaluating_again(engine) and "save_checkpoint" not in found:
                found.update(try_doors(engine, folder + "-leak", x, y))

        def interrupt(*_: Any) -> None:
            if is_evaluating_again(engine):
                raise KeyboardInterrupt

        hook = engine.module.register_forward_hook(knock)
        engine.backward(engine(x, y))
        if with_closure:
            found["closure that evaluates"] = told_by(lambda: engine.step(closure=evaluate))
            same_bits(visible_weights(engine), clean)
        engine.step(closure=(lambda: engine.backward(engine(x, y))) if with_closure else None)
        hook.remove()
        assert engine.looksam.step_kind == "sam"
        same_bits(master_weights(engine), weights[0])

        train_window(engine, case, 1)
        train_window(engine, case, 2)
        hook = engine.module.register_forward_hook(interrupt)
        with suppress(KeyboardInterrupt):
            train_window(engine, case, 3)
        hook.remove()
        found |= {f"{name} after it": told for name, told in try_doors(engine, folder + "-leak", x, y).items()}
        engine.load_checkpoint(folder)
        for update in range(3, 6):
            train_window(engine, case, update)
        same_bits(master_weights(engine), weights[-1])
    return found


@pytest.mark.parametrize(("stage", "ascent", "with_closure"), [
    (0, "global", False), (2, "global", True), (3, "global", False), (1, "rank", True), (0, "micro_batch", False),
    (3, "global_micro_batch", False)])
def test_every_door_is_shut_while_weights_are_perturbed(stage: int, ascent: str, with_closure: bool,
                                                        tmp_path: Path) -> None:
    case = replace(CASE, stage=stage, ascent=ascent)
    for found in run_on_ranks(2, leave_with_perturbed_weights, case, str(tmp_path / "good"), with_closure):
        assert len(found) == 12 + with_closure + 11
        for door, told in found.items():
            assert told.startswith("LookSAMReplayError") and "perturbed" in told, (door, told)
    assert not (tmp_path / "good-leak").exists()


def save_on_full_disk(case: Case, good: str, full: str, where: list[int]) -> tuple[str, dict[str, torch.Tensor]]:
    """On a rank: save where the disk is full on some ranks, and go on training."""
    with engine_for(case) as engine:
        for update in range(4):
            train_window(engine, case, update)
        is_full = torch.distributed.get_rank() in where
        told = told_by(lambda: engine.save_checkpoint(full if is_full else good))
        train_window(engine, case, 4)
        return told, master_weights(engine)


@pytest.mark.parametrize("whose, where, room", [
    # LookSAM's file here is 3 KB, DeepSpeed's is 6; the script that DeepSpeed copies beside them on rank 0 has 30.
    ("LookSAM's", [1], 4), ("DeepSpeed's", [1], 8), ("DeepSpeed's", [0], 32), ("DeepSpeed's", [0, 1], 48)])
def test_a_full_disk_fails_the_save_on_all_ranks_and_training_goes_on(whose: str, where: list[int], room: int,
                                                                      tmp_path: Path) -> None:
    good, full = tmp_path / "good", tmp_path / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", str(full)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        if whose == "LookSAM's":
            (full / "other").write_bytes(bytes(4096))
        undisturbed = run_on_ranks(2, run_stretch, CASE, Stretch(stop=5))[0]
        for told, weights in run_on_ranks(2, save_on_full_disk, CASE, str(good), str(full), where, timeout=60):
            assert told.startswith("LookSAMCheckpointError") and f"on rank {where[0]}" in told, told
            assert "LookSAM's part" in told or whose == "DeepSpeed's"
            same_bits(weights, undisturbed.weights)
        assert not (good / "latest").exists()
        assert whose == "DeepSpeed's" or not list(full.rglob("*looksam*"))
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True)  # a failed writer may still hold its file

"""Offload to NVMe, with a directory as the NVMe. (To the CPU: test_options.py, test_shards.py.)"""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds_looksam import LookSAMCheckpointError
from ds_looksam.shards.zero3_offload import file_backed

from .inside import stored_v
from .ranks import run_on_ranks
from .test_options import OFFLOAD, check
from .training import Case, engine_for, master_weights, train, train_window


def _on_nvme(folder: Path, **fields: object) -> Case:
    """The model is wide enough for DeepSpeed's swapper, which leaves less than 1 MiB alone."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io op needs libaio (Debian: libaio-dev)")
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": str(folder)}, **fields.pop("zero", {})}
    # Most of the model's 10^6 gradients are tiny: an eps below their rounding would make Adam step by their sign.
    return Case(model="wide", stage=3, updates=5, k=2, options={"eps": 1e-4}, zero=zero, **fields)


SUB_GROUPS = {"sub_group_size": 300_000}


@pytest.mark.grid  # an operator of its own to compile
@pytest.mark.parametrize("fields", [{"clipping": 0.05, "accumulation": 2}, {"two_groups": True, "zero": SUB_GROUPS}],
                         ids=["clipping", "sub_groups"])
def test_optimizer_state_on_nvme(fields: dict[str, object], tmp_path: Path) -> None:
    check(_on_nvme(tmp_path, **fields))


@pytest.mark.grid
def test_low_precision_on_nvme_is_to_the_bit_what_offload_to_the_cpu_gives(tmp_path: Path) -> None:
    """A tolerance would say little. (With clipping the last bits differ: norms are added up otherwise.)"""
    case = _on_nvme(tmp_path, precision="bf16")
    nvme, cpu = (run_on_ranks(2, train, one)[0].weights for one in (case, replace(case, zero=OFFLOAD)))
    assert all(torch.equal(nvme[name], weight) for name, weight in cpu.items())


def where_v_lives(case: Case) -> list[tuple[str | None, int]]:
    """On a rank, after a SAM and a reuse step: the file behind each flat tensor of g_v (None: memory), its bytes."""
    with engine_for(case) as engine:
        for update in range(2):
            train_window(engine, case, update)
        return [(v.untyped_storage().filename, v.untyped_storage().nbytes()) for v in stored_v(engine)]


@pytest.mark.grid
def test_g_v_lives_on_nvme_too(tmp_path: Path) -> None:
    """All but what DeepSpeed's swapper leaves in memory, under 1 MiB. The files have no names to be left over."""
    for parts in run_on_ranks(2, where_v_lives, _on_nvme(tmp_path, zero=SUB_GROUPS, params={"v_dtype": "bf16"})):
        on_nvme = [(name, size) for name, size in parts if name is not None]
        assert on_nvme and all(name.startswith(str(tmp_path)) for name, _ in on_nvme)
        assert all(size < (1 << 20) for name, size in parts if name is None)
        assert sum(size for _, size in on_nvme) > 0.9 * sum(size for _, size in parts)
    assert not list(tmp_path.rglob("looksam*"))


def test_too_little_room_for_g_v_on_nvme_is_an_error_and_leaves_no_file(tmp_path: Path, monkeypatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_room)
    with pytest.raises(OSError, match=r"nvme_path: LookSAM's g_v needs .* bytes more on this rank"):
        file_backed(str(tmp_path), 1000, torch.float32)
    assert not list(tmp_path.iterdir())


def try_checkpoints(case: Case, folder: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """On a rank: what saving and loading say after a SAM step, and the weights."""
    with engine_for(case) as engine:
        train_window(engine, case, 0)
        engine.save_16bit_model(folder, "model.bin")
        told = []
        for call in (engine.save_checkpoint, engine.load_checkpoint):
            with pytest.raises(LookSAMCheckpointError) as error:
                call(folder)
            told.append(str(error.value))
        return told, master_weights(engine)


@pytest.mark.grid
def test_no_checkpoints_on_nvme(tmp_path: Path) -> None:
    """From one of DeepSpeed 0.19.8 alone, weights end up to 0.37 away (relative) from those of the run that went on."""
    (tmp_path / "nvme").mkdir()
    case = _on_nvme(tmp_path / "nvme", zero={"stage3_gather_16bit_weights_on_model_save": True})
    for told, weights in run_on_ranks(2, try_checkpoints, case, str(tmp_path / "saved")):
        assert all('offload_optimizer.device "nvme"' in message and 'Use "cpu"' in message for message in told), told
        saved = torch.load(tmp_path / "saved" / "model.bin", weights_only=True)
        assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["model.bin"]

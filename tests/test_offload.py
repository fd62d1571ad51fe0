"""Offload against the oracle: DeepSpeed's offload code paths, which the CPU accelerator takes as a GPU does.

The clipping norm is taken from other places there, and gradient buffers outlive the step: cases where clipping binds,
and models whose parameters come and go, are what found errors.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds_looksam import LookSAMCheckpointError
from ds_looksam.shards.zero3_offload import file_backed

from .covering import covering
from .inside import shards as shards_of
from .inside import stored_v
from .ranks import run_on_ranks
from .training import Case, check_against_oracle, engine_for, master_weights, train, train_window

CPU = {"device": "cpu"}
TOLERANCE = {"fp32": 3e-5, "bf16": 2e-2}
"""fp32 as in test_oracle_grid, times 3: DeepSpeedCPUAdam keeps 1 - beta2 as a float, a relative error of 1.3e-5. bf16:
a gradient rounds at 4e-3, and its noise is averaged over 12 updates of some 1e-2 each on weights of size 0.3."""

COMMON = {
    "world": [1, 2], "accumulation": [1, 3], "clipping": [0.0, 0.05], "alpha": [0.7, 0.0, "auto"], "k": [1, 3],
    "two_groups": [False, True], "model": ["mlp", "dead_and_frozen", "straddling", "tiny", "sometimes"],
    "precision": ["fp32", "bf16"]
}
STAGE_1_AND_2 = [
    Case(zero={"offload_optimizer": CPU}, **settings) for settings in covering({"stage": [1, 2], **COMMON}, strength=2)
]
OFFLOADS = {"optimizer": {"offload_optimizer": CPU}, "param": {"offload_param": CPU},
            "both": {"offload_optimizer": CPU, "offload_param": CPU}}
STAGE_3 = [
    Case(stage=3, zero={**OFFLOADS[settings.pop("offload")], "sub_group_size": settings.pop("sub_group_size")},
         **settings)
    for settings in covering({"offload": list(OFFLOADS), "sub_group_size": [40, 10**9], **COMMON}, strength=2)
]


def _id(case: Case) -> str:
    return "-".join([str(case.stage), *(str(getattr(case, key)) for key in COMMON), *case.zero])


@pytest.mark.parametrize("case", [*STAGE_1_AND_2, *STAGE_3], ids=_id)
def test_offload_to_cpu(case: Case) -> None:
    reference = check_against_oracle(case, TOLERANCE[case.precision])
    assert not case.clipping or reference.clipped > 0, "clipping was meant to bind"


def test_torch_optimizer_on_the_cpu() -> None:
    """zero_force_ds_cpu_optimizer false: a base that is not one of DeepSpeed's CPU optimizers."""
    check_against_oracle(Case(stage=2, base="SGD", clipping=0.05, zero={"offload_optimizer": CPU},
                              config={"zero_force_ds_cpu_optimizer": False}), TOLERANCE["fp32"])


def shares_memory(case: Case) -> list[bool]:
    """On a rank, for each gradient that LookSAM took and did not have to keep: whether it is DeepSpeed's own memory."""
    with engine_for(case) as engine:
        shards, masters = shards_of(engine), (engine.optimizer.fp32_partitioned_groups_flat if case.stage == 3 else
                                           engine.optimizer.single_partition_of_fp32_groups)
        take, shared = shards.take_gradient, []

        def take_and_see(*, survives_evaluation: bool) -> list[torch.Tensor]:
            taken = take(survives_evaluation=survives_evaluation)
            if not survives_evaluation:
                shared.extend(g.data_ptr() == master.grad.data_ptr() for g, master in zip(taken, masters, strict=True))
            return taken

        shards.take_gradient = take_and_see
        for update in range(case.updates):
            train_window(engine, case, update)
        return shared


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_copy_of_the_gradient_in_host_memory(stage: int, precision: str) -> None:
    """Fresh memory for a shard takes a CPU several times as long as the arithmetic on it. A SAM step's second gradient
    and every reuse step's are edited where the optimizer reads them."""
    case = Case(world=1, stage=stage, precision=precision, updates=4, k=2, alpha=0.7, zero={"offload_optimizer": CPU})
    assert run_on_ranks(1, shares_memory, case)[0] == [True] * 4


def perturb_elsewhere(case: Case) -> tuple[list[float], list[float]]:
    """On a rank: what perturb_weights measures, and what it does where the model's partitions lie on another device."""
    with engine_for(case) as engine:
        shards, wrapper = shards_of(engine), engine.optimizer
        gradient = [torch.ones_like(w) for w in shards.master_weights()]
        sums = []
        for device in ("cpu", "meta"):
            wrapper.fp16_partitioned_groups_flat = [w.to(device) for w in wrapper.fp16_partitioned_groups_flat]
            sums.append(shards.perturb_weights(gradient, lambda *_: torch.tensor(1e-3), None).tolist())
        return sums[0], sums[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_arithmetic_stays_on_the_host(precision: str) -> None:
    """On a GPU the master lies in host memory and, without offload_param, the model's partitions do not. The "meta"
    device has no values, but an operation that mixes it with the CPU raises as one that mixes a GPU with it does."""
    case = Case(stage=3, world=1, precision=precision, zero={"offload_optimizer": CPU})
    here, elsewhere = run_on_ranks(1, perturb_elsewhere, case)[0]
    assert here == elsewhere
    assert precision == "fp32" or min(here) > 0


@pytest.mark.grid  # an operator of its own to compile
@pytest.mark.parametrize("case", [
    Case(clipping=0.05, accumulation=2),
    Case(two_groups=True, zero={"sub_group_size": 300_000}),
    Case(precision="bf16"),
], ids=["clipping", "sub_groups", "bf16"])
def test_optimizer_state_on_nvme(case: Case, tmp_path: Path) -> None:
    """A directory as the NVMe. The model is wide enough for DeepSpeed's swapper, which leaves less than 1 MiB alone."""
    case = _on_nvme(case, tmp_path)
    if case.precision == "fp32":
        check_against_oracle(case, TOLERANCE["fp32"])
        return
    # Bits, where the tolerance says little. (With clipping the last one differs: norms are added up otherwise.)
    on_cpu = replace(case, zero={**case.zero, "offload_optimizer": CPU})
    for nvme, cpu in zip(run_on_ranks(2, train, case), run_on_ranks(2, train, on_cpu), strict=True):
        for name, weight in cpu.weights.items():
            assert torch.equal(nvme.weights[name], weight), f"{name} is not what offload to the CPU gives"


def where_v_lives(case: Case) -> list[tuple[str | None, int]]:
    """On a rank, after a SAM and a reuse step: the file behind each flat tensor of g_v (None: memory), its bytes."""
    with engine_for(case) as engine:
        for update in range(2):
            train_window(engine, case, update)
        return [(v.untyped_storage().filename, v.untyped_storage().nbytes()) for v in stored_v(engine)]


@pytest.mark.grid
def test_g_v_lives_on_nvme_too(tmp_path: Path) -> None:
    """All but what DeepSpeed's swapper leaves in memory, under 1 MiB. The files have no names to be left over."""
    case = _on_nvme(Case(zero={"sub_group_size": 300_000}, params={"v_dtype": "bf16"}), tmp_path)
    for parts in run_on_ranks(2, where_v_lives, case):
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
        for call in (lambda: engine.save_checkpoint(folder), lambda: engine.load_checkpoint(folder)):
            try:
                call()
                told.append("went through")
            except LookSAMCheckpointError as error:
                told.append(str(error))
        return told, master_weights(engine)


@pytest.mark.grid
def test_no_checkpoints_on_nvme(tmp_path: Path) -> None:
    """From one of DeepSpeed 0.19.8 alone, weights end up to 0.37 away (relative) from those of the run that went on."""
    case = _on_nvme(Case(), tmp_path / "nvme")
    (tmp_path / "nvme").mkdir()
    case.zero["stage3_gather_16bit_weights_on_model_save"] = True
    for told, weights in run_on_ranks(2, try_checkpoints, case, str(tmp_path / "saved")):
        for message in told:
            assert 'offload_optimizer.device "nvme"' in message and 'Use "cpu"' in message, told
        saved = torch.load(tmp_path / "saved" / "model.bin", weights_only=True)
        assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["model.bin"]


def _on_nvme(case: Case, folder: Path) -> Case:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io op needs libaio (Debian: libaio-dev)")
    offload = {"device": "nvme", "nvme_path": str(folder)}
    # Most of the model's 10^6 gradients are tiny: an eps below their rounding would make Adam step by their sign.
    return replace(case, model="wide", stage=3, updates=5, k=2, options={"eps": 1e-4},
                   zero={**case.zero, "offload_optimizer": offload})

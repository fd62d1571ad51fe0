"""What lies where in a wrapper's shards, on the host and on NVMe too, and which copies there are of it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_looksam import LookSAMCheckpointError
from ds_looksam.replay import between, module_state
from ds_looksam.shards.zero3 import Zero3Shards
from ds_looksam.shards.zero3_offload import file_backed

from .inside import shards as shards_of
from .inside import stored_v
from .ranks import run_on_ranks
from .test_options import OFFLOAD, check
from .training import Case, engine_for, master_weights, train, train_window


def padding(case: Case) -> float:
    """What is left of this rank's master weights without those of any parameter."""
    with engine_for(case) as engine:
        flats = shards_of(engine).master_weights()
        for flat, segments in zip(flats, shards_of(engine).layout(), strict=True):
            for segment in segments:
                flat[segment.start:segment.start + segment.numel].zero_()
        return sum(float(flat.abs().sum()) for flat in flats)


def test_padding_holds_nothing() -> None:
    """Where a nan may have been, of whatever lay in that memory before."""
    assert run_on_ranks(4, padding, Case(stage=3, world=4, precision="bf16")) == [0.0] * 4


def stored_bytes(case: Case) -> tuple[int, int]:
    """Bytes of v and of the fp32 master on this rank. Collective."""
    with engine_for(case) as engine:
        for update in range(case.k + 1):
            train_window(engine, case, update)
        v, master = stored_v(engine), shards_of(engine).master_weights()
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in v)
        return sum(part.nbytes for part in v), sum(part.nbytes for part in master)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bytes_of_v(stage: int) -> None:
    for dtype, share in (("fp32", 1), ("bf16", 2)):
        for v, master in run_on_ranks(2, stored_bytes, Case(stage=stage, params={"v_dtype": dtype})):
            assert share * v == master


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, (3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).square().mean()


def laid_out_as_weights() -> list[bool]:
    """For each update whether the base optimizer got gradients with the strides of their parameters. Collective."""
    case, seen = Case(world=1, stage=0, k=2), []
    with engine_for(case, module=Conv()) as engine:
        engine.module.to(memory_format=torch.channels_last)  # before that DeepSpeed 0.19.8 fails
        engine.basic_optimizer.register_step_pre_hook(lambda *_: seen.append(
            all(p.grad.stride() == p.stride() for p in engine.module.parameters())))
        assert not engine.module.conv.weight.is_contiguous()
        for _ in range(4):
            engine.backward(engine(torch.randn(2, 3, 5, 5)))
            engine.step()
    return seen


def test_gradients_are_laid_out_as_the_weights_on_stage_0() -> None:
    """DeepSpeed's FusedAdam on a GPU takes weights, gradient and moments element by element as they lie in memory."""
    assert run_on_ranks(1, laid_out_as_weights) == [[True] * 4]


# Offload --------------------------------------------------------------------------------------------------------------


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
    case = Case(world=1, stage=stage, precision=precision, updates=4, k=2, alpha=0.7, zero=OFFLOAD)
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


@pytest.mark.parametrize("zero", [OFFLOAD, {"offload_param": {"device": "cpu"}}], ids=["optimizer", "param"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_arithmetic_stays_where_the_master_lies(precision: str, zero: dict[str, Any]) -> None:
    """On a GPU the master lies in host memory and, without offload_param, the model's partitions do not; with that
    alone it is the other way round. The "meta" device has no values, but an operation that mixes it with the CPU raises
    as one that mixes a GPU with it does."""
    here, elsewhere = run_on_ranks(1, perturb_elsewhere, Case(stage=3, world=1, precision=precision, zero=zero))[0]
    assert here == elsewhere
    assert precision == "fp32" or min(here) > 0


# NVMe: a directory ----------------------------------------------------------------------------------------------------


MANY = {"sub_group_size": 300_000}


def _on_nvme(folder: Path, **fields: object) -> Case:
    """The model is wide enough for DeepSpeed's swapper, which leaves less than 1 MiB alone."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io op needs libaio (Debian: libaio-dev)")
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": str(folder)}, **fields.pop("zero", {})}
    # Most of the model's 10^6 gradients are tiny: an eps below their rounding would make Adam step by their sign.
    return Case(model="wide", stage=3, updates=5, k=2, options={"eps": 1e-4}, zero=zero, **fields)


@pytest.mark.grid  # an operator of its own to compile
@pytest.mark.parametrize("fields", [{"clipping": 0.05, "accumulation": 2}, {"two_groups": True, "zero": MANY},
                                    {"layer_scale": "norm", "two_groups": True, "zero": MANY}],
                         ids=["clipping", "sub_groups", "layers"])
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
    for parts in run_on_ranks(2, where_v_lives, _on_nvme(tmp_path, zero=MANY, params={"v_dtype": "bf16"})):
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


# Stage 3's gathered copies --------------------------------------------------------------------------------------------

NONE_STAYS = {"stage3_param_persistence_threshold": 0}


def gathers(case: Case) -> list[list[tuple[int, ...]]]:
    """For each evaluation, the sizes of the parameters that each of its all-gathers brought, the last window's last.
    Collective."""
    seen: list[list[tuple[int, ...]]] = []
    with engine_for(case) as engine:
        coordinator = engine.optimizer._get_param_coordinator()
        gather = coordinator._PartitionedParameterCoordinator__all_gather_params

        def noted(params: Any, forward: bool) -> None:
            seen[-1].append(tuple(sorted(p.ds_numel for p in params)))
            gather(params, forward)

        coordinator._PartitionedParameterCoordinator__all_gather_params = noted
        engine.module.register_forward_pre_hook(lambda *_: seen.append([]), prepend=True)
        for update in range(case.k + 1):
            train_window(engine, case, update)
    return seen


def test_the_second_evaluation_prefetches_as_the_first() -> None:
    """DeepSpeed gathers ahead of the module that runs once it knows their order; a replay must not lose that."""
    first, again = run_on_ranks(2, gathers, Case(stage=3, k=2, zero=NONE_STAYS))[0][-2:]
    # Each layer is a module with two parameters: more at once than one module needs was fetched ahead.
    assert max(len(params) for params in first) > 2
    assert again == first


class Stream:
    """Stands for a stream of a GPU, of which there is none here, and of two GPUs' gathers even less."""

    def __init__(self, waited: Callable[[], None] = lambda: None) -> None:
        self.wait_stream = lambda other: waited()

    def synchronize(self) -> None: ...


def gathers_too_early(case: Case) -> tuple[int, int]:
    """How often LookSAM wrote to what ZeRO-3 gathers from, and how many gathers came after that on a stream that had
    not waited for it. Collective."""
    writes = early = 0
    is_written = False

    def noting(write: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            nonlocal writes, is_written
            writes, is_written = writes + 1, True
            return write(*args, **kwargs)

        return noted

    def waited(*_: Any) -> None:
        nonlocal is_written
        is_written = False

    with engine_for(case) as engine, ExitStack() as patches:
        coordinator = engine.optimizer._get_param_coordinator()
        gather = coordinator._PartitionedParameterCoordinator__all_gather_params_

        def gathered(*args: Any, **kwargs: Any) -> None:
            nonlocal early
            early += is_written
            gather(*args, **kwargs)

        coordinator._PartitionedParameterCoordinator__all_gather_params_ = gathered
        coordinator._PartitionedParameterCoordinator__allgather_stream = Stream(waited)
        engine.optimizer.reduce_and_partition_stream = Stream()
        patches.enter_context(patch.multiple(
            type(get_accelerator()), resolves_data_dependency=lambda _: False, synchronize=waited,
            current_stream=lambda _: Stream(), stream=lambda *_: nullcontext()))
        for owner, name in [(module_state, "drop_gathered"), (between, "drop_gathered"), (Zero3Shards, "_republish")]:
            patches.enter_context(patch.object(owner, name, noting(getattr(owner, name))))
        for update in range(case.updates):
            train_window(engine, case, update)
    return writes, early


@pytest.mark.parametrize("ascent", ["global", "global_micro_batch"])
def test_the_stream_that_gathers_waits_for_what_was_written(ascent: str) -> None:
    """DeepSpeed's own step waits for the device where parameters stay gathered, and its timer in every forward. Neither
    is so here, nor in a job with ``training_data``."""
    case = Case(model="dead_and_frozen", stage=3, world=1, k=2, updates=4, accumulation=2, ascent=ascent,
                zero=NONE_STAYS, config={"timers": {"throughput": {"enabled": False}}})
    writes, early = run_on_ranks(1, gathers_too_early, case)[0]
    assert writes >= 8 and early == 0


def train_by_hand(case: Case, left_gathered: bool) -> tuple[dict[str, torch.Tensor], int]:
    """The weights, and how many parameters had a secondary partition after a forward; with one weight gathered by hand
    before each step, and left so. Collective."""
    with engine_for(case) as engine:
        for update in range(case.updates):
            (x, y), = case.micro_batches(update, torch.distributed.get_rank())
            loss = engine(x.float(), y)
            secondary = sum(getattr(p, "ds_secondary_tensor", None) is not None for p in engine.module.parameters())
            engine.backward(loss)
            if left_gathered:
                weight = engine.module.second.weight
                weight.all_gather([weight])
            engine.step()
        return master_weights(engine), secondary


def test_no_gathered_copy_survives_the_perturbation() -> None:
    """DeepSpeed leaves none but the persistent parameters' behind, user code may."""
    case = Case(stage=3, k=2, updates=4, zero=NONE_STAYS)
    (dropped, _), (left, _) = (run_on_ranks(2, train_by_hand, case, left)[0] for left in (False, True))
    assert all(torch.equal(weight, left[name]) for name, weight in dropped.items())


@pytest.mark.parametrize("size, zero_init", [(2, False), (4, True)])
def test_hpz(size: int, zero_init: bool) -> None:
    case = Case(stage=3, world=4, updates=1, zero_init=zero_init, zero={"zero_hpz_partition_size": size})
    assert all(copies for _, copies in run_on_ranks(4, train_by_hand, case, False)), "hpZ keeps a second copy"
    check(replace(case, updates=12, accumulation=2))

"""ZeRO-3's options against the oracle: what decides where parameters lie, and which gathered copies of them exist.

A copy of the old weights that survives the perturbation, or one of w + eps that survives the restore, is off by rho.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .ranks import run_on_ranks
from .test_oracle_grid import TOLERANCE
from .training import Case, check_against_oracle, engine_for, master_weights, train_window

OPTIONS: dict[str, dict[str, Any]] = {
    "persistence-none": {"stage3_param_persistence_threshold": 0},
    "persistence-all": {"stage3_param_persistence_threshold": 10**6},
    "sub-groups": {"sub_group_size": 30},
    "no-reduce-scatter": {"reduce_scatter": False},
    "not-contiguous": {"contiguous_gradients": False},
    "small-buckets": {"reduce_bucket_size": 50, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0},
    "overlap": {"overlap_comm": True},
    "gather-16bit": {"stage3_gather_16bit_weights_on_model_save": True},
}


@pytest.mark.parametrize("zero_init", [False, True], ids=["plain", "zero_init"])
@pytest.mark.parametrize("option", list(OPTIONS))
def test_options(option: str, zero_init: bool) -> None:
    check_against_oracle(Case(stage=3, zero=OPTIONS[option], zero_init=zero_init, accumulation=2, two_groups=True,
                              clipping=0.05), TOLERANCE)


@pytest.mark.parametrize("model", ["tied", "tiny", "straddling", "dead_and_frozen", "sometimes"])
def test_models_built_under_zero_init(model: str) -> None:
    """Their parameters have no shape of their own: a rank that reads ``p.shape`` sees (0,)."""
    check_against_oracle(Case(stage=3, model=model, zero_init=True, world=4 if model == "tiny" else 2), TOLERANCE)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("zero_init", [False, True], ids=["plain", "zero_init"])
def test_hpz(size: int, zero_init: bool) -> None:
    case = Case(stage=3, world=4, accumulation=2, zero_init=zero_init, zero={"zero_hpz_partition_size": size})
    assert all(run_on_ranks(4, secondary_partitions, case)), "hpZ was meant to keep a second copy of the partitions"
    check_against_oracle(case, TOLERANCE)


def secondary_partitions(case: Case) -> int:
    """How many parameters have a secondary partition after a forward."""
    with engine_for(case) as engine:
        (x, y), *_ = case.micro_batches(0, torch.distributed.get_rank())
        engine(x.float(), y)
        count = sum(getattr(p, "ds_secondary_tensor", None) is not None for p in engine.module.parameters())
        train_window(engine, case, 0)
        return count


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
    case = Case(stage=3, model="mlp", k=2, zero={"stage3_param_persistence_threshold": 0})
    first, again = run_on_ranks(2, gathers, case)[0][-2:]
    # Each layer is a module with two parameters: more at once than one module needs was fetched ahead.
    assert max(len(params) for params in first) > 2
    assert again == first


def weights_of_run(case: Case, left_gathered: bool) -> dict[str, torch.Tensor]:
    """After training on this rank; with one weight gathered by hand before each step, and left so."""
    with engine_for(case) as engine:
        for update in range(case.updates):
            (x, y), = case.micro_batches(update, torch.distributed.get_rank())
            engine.backward(engine(x.float(), y))
            if left_gathered:
                weight = engine.module.second.weight
                weight.all_gather([weight])
            engine.step()
        return master_weights(engine)


def test_no_gathered_copy_survives_the_perturbation() -> None:
    """DeepSpeed leaves none but the persistent parameters' behind, user code may."""
    case = Case(stage=3, k=2, updates=4, zero={"stage3_param_persistence_threshold": 0})
    dropped, left = (run_on_ranks(2, weights_of_run, case, left)[0] for left in (False, True))
    for name, weight in dropped.items():
        assert torch.equal(weight, left[name]), name

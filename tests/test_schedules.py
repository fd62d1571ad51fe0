"""LR schedules: the rate a scheduler sets reaches the base optimizer, once per update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ds_looksam  # noqa: F401 - registers LookSAM in the rank processes too

from . import oracle
from .models import make_model
from .ranks import run_on_ranks
from .test_oracle_grid import TOLERANCE
from .training import Case, distance, engine_for, master_weights, named, train_window

SCHEDULERS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.02, "warmup_num_steps": 5, "warmup_type": "linear"},
    "WarmupDecayLR": {"warmup_min_lr": 1e-3, "warmup_max_lr": 0.02, "warmup_num_steps": 3, "total_num_steps": 9},
    "WarmupCosineLR": {"warmup_min_ratio": 0.1, "warmup_num_steps": 3, "total_num_steps": 9},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 1.0},
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 0.02, "cycle_first_step_size": 3, "decay_lr_rate": 0.1,
                 "decay_step_size": 2, "cycle_min_mom": 0.8, "cycle_max_mom": 0.9},
    "torch": {},
}


def train_on_schedule(case: Case, scheduler: str, looksam: bool = True) -> tuple[dict[str, Tensor], list[list[dict]]]:
    """The weights, and the hyper-parameters of each group at each update; without ``looksam`` those of a plain
    DeepSpeed run. Collective."""
    def schedule(json: dict[str, Any]) -> None:
        if scheduler != "torch":
            json["scheduler"] = {"type": scheduler, "params": SCHEDULERS[scheduler]}

    def client(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.7**t)

    with engine_for(case, looksam, adapt=schedule, lr_scheduler=client if scheduler == "torch" else None) as engine:
        hyper = []
        for update in range(case.updates):
            hyper.append([{key: group[key] for key in ("lr", "betas")} for group in engine.optimizer.param_groups])
            train_window(engine, case, update)
        return master_weights(engine), hyper


@pytest.mark.parametrize("scheduler, stage", [
    pytest.param(scheduler, stage, marks=[] if (i + stage) % 4 == 0 else pytest.mark.grid)
    for i, scheduler in enumerate(SCHEDULERS) for stage in range(4)
])  # yapf: disable
def test_schedulers(scheduler: str, stage: int) -> None:
    case = Case(stage=stage, two_groups=True, updates=9, accumulation=2)
    results = run_on_ranks(case.world, train_on_schedule, case, scheduler)
    module = make_model(case.model, case.seed)
    groups = case.oracle_groups(module)
    reference = oracle.build(module, groups, base=case.base, k=case.k)
    _, schedule = results[0]
    for update, hyper in enumerate(schedule):
        for group, values in zip(groups, hyper, strict=True):
            group.lr, group.betas = values["lr"], tuple(values["betas"])
        reference.update(case.window(update))
    for weights, hyper in results:
        assert hyper == schedule
        assert distance(weights, named(reference.w, module, groups)) <= TOLERANCE
    assert len({str(hyper) for hyper in schedule}) > 3, "the schedule was meant to move"
    if scheduler != "torch":
        assert schedule == run_on_ranks(case.world, train_on_schedule, case, scheduler, False)[0][1]

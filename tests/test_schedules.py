"""The learning rate that a scheduler sets reaches the base optimizer, once per update; and what a schedule of rho is
told in the JSON (whole runs with one are in test_update.py and test_options.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_looksam.config.params import LookSAMConfig, RhoSchedule, parse_params
from ds_looksam.errors import LookSAMConfigError
from ds_looksam.step.schedule import RhoFactors

from .ranks import run_on_ranks
from .training import TOLERANCE, Case, distance, engine_for, master_weights, named, start_oracle, train_window

SCHEDULERS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.02, "warmup_num_steps": 5, "warmup_type": "linear"},
    "WarmupDecayLR": {"warmup_min_lr": 1e-3, "warmup_max_lr": 0.02, "warmup_num_steps": 3, "total_num_steps": 9},
    "WarmupCosineLR": {"warmup_min_ratio": 0.1, "warmup_num_steps": 3, "total_num_steps": 9},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 1.0},
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 0.02, "cycle_first_step_size": 3, "decay_lr_rate": 0.1,
                 "decay_step_size": 2, "cycle_min_mom": 0.8, "cycle_max_mom": 0.9},
    "torch": {},
}


def train_on_schedule(case: Case, looksam: bool = True) -> tuple[dict[str, Tensor], list[list[dict]]]:
    """The weights, and the hyper-parameters of each group at each update; without ``looksam`` those of a plain
    DeepSpeed run. Collective."""
    def client(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.7**t)

    with engine_for(case, looksam, lr_scheduler=None if "scheduler" in case.config else client) as engine:
        hyper = []
        for update in range(case.updates):
            hyper.append([{key: group[key] for key in ("lr", "betas")} for group in engine.optimizer.param_groups])
            train_window(engine, case, update)
        return master_weights(engine), hyper


@pytest.mark.parametrize("scheduler, stage", [
    pytest.param(scheduler, stage, marks=[] if (i + stage) % 4 == 0 else pytest.mark.grid)
    for i, scheduler in enumerate(SCHEDULERS) for stage in range(4)])
def test_schedulers(scheduler: str, stage: int) -> None:
    config = {} if scheduler == "torch" else {"scheduler": {"type": scheduler, "params": SCHEDULERS[scheduler]}}
    case = Case(stage=stage, two_groups=True, updates=9, accumulation=2, config=config)
    results = run_on_ranks(case.world, train_on_schedule, case)
    reference, module, groups = start_oracle(case)
    _, schedule = results[0]
    for update, hyper in enumerate(schedule):
        for group, values in zip(groups, hyper, strict=True):
            group.lr, group.betas = values["lr"], tuple(values["betas"])
        reference.update(case.window(update))
    for weights, hyper in results:
        assert hyper == schedule
        assert distance(weights, named(reference.w, module, groups)) <= TOLERANCE
    assert len({str(hyper) for hyper in schedule}) > 3, "the schedule was meant to move"
    if config:
        assert schedule == run_on_ranks(case.world, train_on_schedule, case, False)[0][1]


def test_rho_follows_the_learning_rate_from_the_one_that_is_given() -> None:
    for schedule, factor in ({"type": "lr"}, 0.25), ({"type": "lr", "lr": 0.05}, 0.5):
        assert RhoFactors(RhoSchedule(**schedule), [0.1]).of(0, 3, 0.025) == factor


@pytest.mark.parametrize("schedule, message", [
    ({"type": "linear"}, 'rho_schedule: .*needs "updates"'), ({"type": "exponential"}, r"rho_schedule\.type"),
    ({"type": "linear", "updates": 0}, r"rho_schedule\.updates"), ({"warmup": 5}, r"rho_schedule\.warmup"),
    ({"type": "cosine", "updates": 5, "end": -1.0}, r"rho_schedule\.end"),
    ({"type": "constant", "end": 0.1}, "has no use for end"), ({"off_updates": 1.5}, r"rho_schedule\.off_updates"),
], ids=str)
def test_wrong_schedules_of_rho_are_refused(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(LookSAMConfigError, match=message):
        parse_params({"rho_schedule": schedule})


def test_settings_are_plain_data() -> None:
    """They are written into checkpoints as JSON."""
    config = LookSAMConfig(rho_schedule=RhoSchedule(type="linear", updates=3))
    schedule = config.model_dump()["rho_schedule"]
    assert config.model_dump(mode="json")["rho_schedule"] == schedule

"""rho schedules: against the oracle in whole runs, and each rule at its ends."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from ds_looksam.config.params import LookSAMConfig, RhoSchedule, parse_params
from ds_looksam.errors import LookSAMConfigError
from ds_looksam.step.schedule import RhoFactors

from .training import Case, check_against_oracle, distance, run_oracle

BASE = Case(stage=2, alpha=0.7, k=2, rho=0.2)


def test_matches_oracle() -> None:
    """The weights, and how often the window is evaluated: once per update while LookSAM is off. More of them are in
    test_update.py."""
    schedule = {"type": "cosine", "start": 1.0, "end": 0.1, "updates": 8, "off_updates": 3}
    case = replace(BASE, params={"rho_schedule": schedule}, layer_scale="norm")
    check_against_oracle(case, 1e-5)
    without = run_oracle(replace(case, params={}))[1]
    assert distance(run_oracle(case)[1], without) > 1e-4, "the schedule was meant to make a difference"


def _factor(schedule: dict[str, Any], updates: int, lr: float = 0.1, configured: float = 0.1) -> float:
    return RhoFactors(RhoSchedule(**schedule), [configured]).of(0, updates, lr)


def test_factors() -> None:
    linear = {"type": "linear", "start": 2.0, "end": 1.0, "updates": 10, "off_updates": 5}
    assert [_factor(linear, t) for t in (0, 4, 5, 10, 15, 1000)] == [0.0, 0.0, 2.0, 1.5, 1.0, 1.0]
    cosine = {**linear, "type": "cosine", "off_updates": 0}
    assert [_factor(cosine, t) for t in (0, 5, 10, 11)] == pytest.approx([2.0, 1.5, 1.0, 1.0])
    assert _factor(cosine, 2) == pytest.approx(1.5 + math.cos(math.pi * 0.2) / 2)
    assert _factor({"type": "lr"}, 3, lr=0.025) == 0.25
    assert _factor({"type": "lr", "lr": 0.05}, 3, lr=0.025) == 0.5
    assert _factor({}, 0) == 1.0


@pytest.mark.parametrize("schedule, message", [
    ({"type": "linear"}, 'rho_schedule: .*needs "updates"'),
    ({"type": "exponential"}, r"rho_schedule\.type"),
    ({"type": "linear", "updates": 0}, r"rho_schedule\.updates"),
    ({"type": "cosine", "updates": 5, "end": -1.0}, r"rho_schedule\.end"),
    ({"type": "constant", "end": 0.1}, "has no use for end"),
    ({"warmup": 5}, r"rho_schedule\.warmup"),
    ({"off_updates": 1.5}, r"rho_schedule\.off_updates"),
], ids=str)
def test_wrong_schedules_are_refused(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(LookSAMConfigError, match=message):
        parse_params({"rho_schedule": schedule})


def test_learning_rate_of_zero_cannot_be_the_reference() -> None:
    with pytest.raises(LookSAMConfigError, match=r"rho_schedule\.lr"):
        RhoFactors(RhoSchedule(type="lr"), [0.1, 0.0])


def test_settings_are_plain_data() -> None:
    """They are written into checkpoints as JSON."""
    config = LookSAMConfig(rho_schedule=RhoSchedule(type="linear", updates=3))
    assert config.model_dump(mode="json")["rho_schedule"] == config.model_dump()["rho_schedule"]
    assert RhoFactors(config.rho_schedule, [0.1]).state_dict() == {
        "schedule": config.model_dump()["rho_schedule"], "reference_lrs": [0.1]}

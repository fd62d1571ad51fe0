"""What ``engine.looksam`` and DeepSpeed's monitors say, against the oracle's float64 numbers."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from . import oracle
from .models import make_model
from .ranks import run_on_ranks
from .training import Case, engine_for, train_window

CASE = Case(world=2, accumulation=2, updates=7, k=3, base="SGD")

TOLERANCE = 2e-4
"""Norms and cosines are good to 1e-6; the sharpness is a difference of two fp32 losses of about 0.3, each rounded at
6e-8 times the depth of the model, and is itself about 1e-2."""


def expected_measurements(case: Case) -> list[dict[str, float]]:
    """What there is to measure at each SAM step, written down naively."""
    module = make_model(case.model, case.seed)
    groups = case.oracle_groups(module)
    reference = oracle.build(module, groups, base=case.base, k=case.k)
    gradient, loss = reference.gradient, make_loss(case, module, groups)
    measured = []
    previous = None
    for update in range(case.updates):
        window = case.window(update)
        if update % case.k == 0:
            w = reference.w.clone()
            g = gradient(w, window)
            eps = case.rho * g / g.norm()
            g_s = gradient(w + eps, window)
            g_v = g_s - (g @ g_s) / (g @ g) * g
            measured.append({
                "gradient_norm": g.norm().item(), "perturbed_gradient_norm": g_s.norm().item(),
                "orthogonal_norm": g_v.norm().item(), "orthogonal_ratio": (g_v.norm() / g.norm()).item(),
                "gradient_cosine": (g @ g_s / (g.norm() * g_s.norm())).item(),
                "sharpness": loss(w + eps, window) - loss(w, window),
                "perturbation_ratio": 1.0, "perturbation_cosine": 1.0,
            })
            if previous is not None:
                measured[-1]["orthogonal_cosine"] = (previous @ g_v / (previous.norm() * g_v.norm())).item()
            previous = g_v
        reference.update(window)
    return measured


def make_loss(case: Case, module: Any, groups: list[oracle.Group]) -> Any:
    names = [name for group in groups for name in group.names]
    shapes = {name: p.shape for name, p in module.named_parameters()}

    def loss(w: torch.Tensor, window: list[Any]) -> float:
        weights = {name: part.view(shapes[name])
                   for name, part in zip(names, w.split([shapes[n].numel() for n in names]), strict=True)}
        return sum(torch.func.functional_call(module.double(), weights, mb).item() for mb in window) / len(window)

    return loss


def measure(case: Case) -> list[dict[str, Any]]:
    with engine_for(case) as engine:
        said = []
        for update in range(case.updates):
            train_window(engine, case, update)
            said.append(engine.looksam.as_dict())
        return said


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_measurements_are_the_oracles(stage: int) -> None:
    case = replace(CASE, stage=stage)
    expected = expected_measurements(case)
    for said in run_on_ranks(case.world, measure, case):
        json.dumps(said)
        assert [s["step_kind"] for s in said] == ["sam", "base", "base", "sam", "reuse", "reuse", "sam"]
        assert [s["evaluations"] for s in said] == [2, 3, 4, 6, 7, 8, 10]
        for s, e in zip(said[::case.k], expected, strict=True):
            for name, value in e.items():
                assert s[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE * 1e-2), name
        assert said[0]["orthogonal_cosine"] is None and said[0]["beta"] is None
        assert said[1] == {**said[0], "step_kind": "base", "updates": 2, "evaluations": 3}
        assert said[0]["rho"] == [case.rho] and said[0]["alpha"] == [None]


def test_stage_0_measures_this_ranks_sharpness_and_everything_else() -> None:
    case = replace(CASE, stage=0, world=1)
    expected = expected_measurements(case)
    for s, e in zip(run_on_ranks(1, measure, case)[0][::case.k], expected, strict=True):
        assert s["sharpness"] == pytest.approx(e["sharpness"], rel=TOLERANCE)
        assert s["gradient_norm"] == pytest.approx(e["gradient_norm"], rel=TOLERANCE)


def test_norms_are_without_the_loss_scale() -> None:
    case = replace(CASE, precision="fp16", loss_scale=256.0, stage=2)
    scaled = run_on_ranks(2, measure, case)[0]
    plain = run_on_ranks(2, measure, replace(case, loss_scale=1.0))[0]
    for name in ("gradient_norm", "perturbed_gradient_norm"):
        # Both runs round at 5e-4; the first step is not yet apart by anything else.
        assert scaled[0][name] == pytest.approx(plain[0][name], rel=5e-3)


# Monitors -------------------------------------------------------------------------------------------------------------


def train_with_monitors(case: Case) -> int:
    with engine_for(case) as engine:
        for update in range(case.updates):
            train_window(engine, case, update)
        return engine.train_batch_size()


def read_csv(folder: Path) -> dict[str, list[tuple[int, float]]]:
    written = {}
    for path in folder.rglob("*looksam_*.csv"):
        (_, name), *rows = csv.reader(path.open())
        written[name.removeprefix("looksam_")] = [(int(step), float(value)) for step, value in rows]
    return written


def test_monitors_get_every_metric_from_rank_0(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitors = {name: {"enabled": True, "output_path": str(tmp_path / name), "job_name": "run"}
                for name in ("csv_monitor", "tensorboard")}
    case = replace(CASE, config=monitors)
    batch = run_on_ranks(case.world, train_with_monitors, case)[0]
    written = read_csv(tmp_path / "csv_monitor")

    every_update = [batch * (i + 1) for i in range(case.updates)]
    for name, values in {"updates": range(1, 8), "evaluations": [2, 3, 4, 6, 7, 8, 10],
                         "step_kind": [2, 0, 0, 2, 1, 1, 2], "rho": [case.rho] * 7, "ascent": [0] * 7}.items():
        assert written.pop(name) == list(zip(every_update, values, strict=True)), name
    beta = written.pop("beta")
    assert [step for step, _ in beta] == every_update[3::3] and all(math.isfinite(value) for _, value in beta)
    assert "alpha" not in written  # "auto" is no number; beta is what is in force

    expected = expected_measurements(case)
    assert written.keys() == expected[-1].keys()
    for name, rows in written.items():
        of_steps = [(step, e[name]) for step, e in zip(every_update[::3], expected, strict=True) if name in e]
        assert [step for step, _ in rows] == [step for step, _ in of_steps]
        for (_, value), (_, wanted) in zip(rows, of_steps, strict=True):
            assert value == pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE * 1e-2), name

    board = EventAccumulator(str(next((tmp_path / "tensorboard").rglob("events*")).parent)).Reload()
    tags = {tag for tag in board.Tags()["scalars"] if "looksam_" in tag}
    assert tags == {f"Train/Samples/looksam_{name}"
                    for name in [*expected[-1], "beta", "updates", "evaluations", "step_kind", "rho", "ascent"]}
    assert [e.step for e in board.Scalars("Train/Samples/looksam_sharpness")] == every_update[::3]


def test_groups_that_differ_are_told_apart(tmp_path: Path) -> None:
    config = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}}
    case = replace(CASE, config=config, two_groups=True, alpha=0.3, updates=1, world=1)
    run_on_ranks(1, train_with_monitors, case)
    written = read_csv(tmp_path)
    assert [written[f"rho_group{i}"][0][1] for i in (0, 1)] == [case.rho, case.rho / 2]
    assert written["alpha"][0][1] == 0.3

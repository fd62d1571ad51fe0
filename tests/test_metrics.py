"""What ``engine.looksam`` and DeepSpeed's monitors say, against the oracle's float64 numbers, and where a perturbation
was rounded, against what a forward hook sees."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .ranks import run_on_ranks
from .training import Case, start_oracle, train

CASE = Case(world=2, accumulation=2, updates=7, k=3, base="SGD")

TOLERANCE = 2e-4
"""Norms and cosines are good to 1e-6; the sharpness is a difference of two fp32 losses of about 0.3, each rounded at
6e-8 times the depth of the model, and is itself about 1e-2."""


def expected_measurements(case: Case) -> list[dict[str, float]]:
    """What there is to measure at each SAM step, written down naively."""
    reference, module, _ = start_oracle(case)

    def evaluate(w: Tensor, window: list[Any]) -> tuple[Tensor, float]:
        g = reference.gradient(w, window)  # leaves w in the module
        return g, sum(module(*micro_batch).item() for micro_batch in window) / len(window)

    measured: list[dict[str, float]] = []
    previous = None
    for update in range(case.updates):
        window = case.window(update)
        if update % case.k == 0:
            g, loss = evaluate(reference.w, window)
            g_s, perturbed_loss = evaluate(reference.w + case.rho * g / g.norm(), window)
            g_v = g_s - (g @ g_s) / (g @ g) * g
            measured.append({
                "gradient_norm": g.norm().item(), "perturbed_gradient_norm": g_s.norm().item(),
                "orthogonal_norm": g_v.norm().item(), "orthogonal_ratio": (g_v.norm() / g.norm()).item(),
                "gradient_cosine": (g @ g_s / (g.norm() * g_s.norm())).item(), "sharpness": perturbed_loss - loss,
                "perturbation_ratio": 1.0, "perturbation_cosine": 1.0,
            })
            if previous is not None:
                measured[-1]["orthogonal_cosine"] = (previous @ g_v / (previous.norm() * g_v.norm())).item()
            previous = g_v
        reference.update(window)
    return measured


def same(value: float, expected: float) -> bool:
    return value == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE * 1e-2)


def said(engine: Any) -> dict[str, Any]:
    return engine.looksam.as_dict()


def measure(case: Case) -> list[list[dict[str, Any]]]:
    """What each rank says after each update."""
    return [result.history for result in run_on_ranks(case.world, train, case, after=said)]


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_measurements_are_the_oracles(stage: int, world: int) -> None:
    """One rank on stage 0, where the sharpness is this rank's."""
    case = replace(CASE, stage=stage, world=world)
    expected = expected_measurements(case)
    for on_rank in measure(case):
        json.dumps(on_rank)
        assert [s["step_kind"] for s in on_rank] == ["sam", "base", "base", "sam", "reuse", "reuse", "sam"]
        assert [s["evaluations"] for s in on_rank] == [2, 3, 4, 6, 7, 8, 10]
        for s, e in zip(on_rank[::case.k], expected, strict=True):
            assert all(same(s[name], value) for name, value in e.items()), (s, e)
        first, second = on_rank[:2]
        assert first["orthogonal_cosine"] is None and first["beta"] is None
        assert second == {**first, "step_kind": "base", "updates": 2, "evaluations": 3}
        assert first["rho"] == [case.rho] and first["alpha"] == [None]


def test_norms_are_without_the_loss_scale() -> None:
    case = replace(CASE, precision="fp16", loss_scale=256.0, stage=2, updates=1)
    scaled, plain = measure(case)[0][0], measure(replace(case, loss_scale=1.0))[0][0]
    for name in ("gradient_norm", "perturbed_gradient_norm"):
        assert scaled[name] == pytest.approx(plain[name], rel=5e-3)  # both runs round at 5e-4


# The perturbation after rounding --------------------------------------------------------------------------------------


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def seen_and_reported(engine: Any, batches: list[Any], rho: float) -> tuple[float, float, float, float] | None:
    """Of a SAM step: ratio seen, cosine seen, ratio reported, cosine reported. Collective.

    A hook copies the weights of both evaluations; g is DeepSpeed's own account of the averaged gradient before the
    step, so eps = rho g / ‖g‖ shares nothing with the package.
    """
    from deepspeed.utils import safe_get_full_grad

    seen: list[Tensor] = []
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    hook = engine.module.register_forward_pre_hook(lambda *_: seen.append(flat(parameters)))
    ((x, y), ) = batches
    engine.backward(engine(x, y))
    g = flat([p.grad if engine.zero_optimization_stage() == 0 else safe_get_full_grad(p) for p in parameters])
    engine.step()
    hook.remove()
    if engine.looksam.step_kind != "sam":
        return None
    reported = engine.looksam.perturbation_ratio, engine.looksam.perturbation_cosine
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in reported)
    moved, eps = seen[1] - seen[0], rho * g / g.norm()
    return (float(moved.norm() / rho), float(moved @ eps / (moved.norm() * eps.norm())), *map(float, reported))


@pytest.mark.parametrize("stage, precision, rho, config", [
    (0, "bf16", 0.02, {}), (1, "bf16", 0.02, {}), (2, "fp16", 0.005, {}),
    (1, "bf16", 0.02, {"data_types": {"grad_accum_dtype": "fp32"}})])
def test_reported_is_what_the_model_saw(stage: int, precision: str, rho: float, config: dict[str, Any]) -> None:
    case = Case(k=2, updates=5, stage=stage, precision=precision, model="straddling", rho=rho, loss_scale=128.0,
                config=config)
    for result in run_on_ranks(case.world, train, case, loop=partial(seen_and_reported, rho=rho)):
        # At stage 0 the model lags behind its optimizer until the first update (shards/fp16.py): nothing to compare.
        for seen_ratio, seen_cosine, ratio, cosine in result.history[2 if stage == 0 else 0::2]:
            # Sums of fp32 dot products over some 700 elements: 1e-6 leaves room. The gradient DeepSpeed shows in fp16
            # carries no further rounding.
            assert ratio == pytest.approx(seen_ratio, rel=1e-5) and cosine == pytest.approx(seen_cosine, rel=1e-5)
            assert cosine < 0.99, "rho was meant to be so small that rounding shows"


def test_no_perturbation_is_no_deviation() -> None:
    ((only, ), ) = measure(Case(world=1, rho=0.0, precision="bf16", updates=1))
    assert (only["perturbation_ratio"], only["perturbation_cosine"]) == (1.0, 1.0)


# Monitors -------------------------------------------------------------------------------------------------------------


def read_csv(folder: Path) -> dict[str, list[tuple[int, float]]]:
    written = {}
    for path in folder.rglob("*looksam_*.csv"):
        (_, name), *rows = csv.reader(path.open())
        written[name.removeprefix("looksam_")] = [(int(step), float(value)) for step, value in rows]
    return written


def test_monitors_get_every_metric_from_rank_0(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    case = replace(CASE, config={name: {"enabled": True, "output_path": str(tmp_path / name), "job_name": "run"}
                                 for name in ("csv_monitor", "tensorboard")})
    run_on_ranks(case.world, train, case)
    written = read_csv(tmp_path / "csv_monitor")

    every_update = [case.world * case.accumulation * case.micro_batch * (i + 1) for i in range(case.updates)]
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
        assert all(same(value, wanted) for (_, value), (_, wanted) in zip(rows, of_steps, strict=True)), name

    board = EventAccumulator(str(next((tmp_path / "tensorboard").rglob("events*")).parent)).Reload()
    tags = {tag for tag in board.Tags()["scalars"] if "looksam_" in tag}
    assert tags == {f"Train/Samples/looksam_{name}"
                    for name in [*expected[-1], "beta", "updates", "evaluations", "step_kind", "rho", "ascent"]}
    assert [e.step for e in board.Scalars("Train/Samples/looksam_sharpness")] == every_update[::3]


def test_groups_that_differ_are_told_apart(tmp_path: Path) -> None:
    config = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}}
    case = replace(CASE, config=config, two_groups=True, alpha=0.3, updates=1, world=1)
    run_on_ranks(1, train, case)
    written = read_csv(tmp_path)
    assert [written[f"rho_group{i}"][0][1] for i in (0, 1)] == [case.rho, case.rho / 2]
    assert written["alpha"][0][1] == 0.3

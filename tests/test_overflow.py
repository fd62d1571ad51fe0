"""Gradients that are not finite, on one rank only: skipped as DeepSpeed skips, on all ranks alike, and nothing is lost.

The loss of one rank is made infinite or NaN in the first or the second evaluation of a window. The run must then be
that of an oracle which leaves the window out: weights, the stored g_v, the phase of the SAM steps and the loss scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from .inside import is_evaluating_again, stored_v
from .ranks import run_on_ranks
from .test_low_precision import LOOSE, TIGHT, in_fp32
from .training import (
    DTYPES,
    Case,
    distance,
    engine_for,
    master_weights,
    named,
    start_oracle,
    train_window,
    visible_weights,
)


@dataclass(frozen=True)
class Fault:
    """In this window ``value`` times the loss, on the last rank only, in evaluation 1 or 2."""

    window: int
    evaluation: int
    value: float


@dataclass
class Record:
    """Of one window on one rank, after its step."""

    applied: bool
    kind: str
    forwards: int
    loss_scale: float
    next_is_sam: bool
    weights: dict[str, Tensor]
    model_weights: dict[str, Tensor]
    v: list[Tensor] | None


def train_with_faults(case: Case, faults: list[Fault], scales: dict[int, float]) -> list[Record]:
    """Train ``case.updates`` windows; before window i the loss scale is set to ``scales[i]``. Collective."""
    by_window = {fault.window: fault for fault in faults}
    records: list[Record] = []
    last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    with engine_for(case) as engine:
        forwards = 0

        def spoil(module: Any, args: Any, loss: Tensor) -> Tensor | None:
            nonlocal forwards
            evaluation = 1 + is_evaluating_again(engine)
            forwards += 1
            fault = by_window.get(len(records))
            hit = fault is not None and fault.evaluation == evaluation and last_rank
            return loss * fault.value if hit else None

        engine.module.register_forward_hook(spoil)
        for window in range(case.updates):
            if window in scales:
                _loss_scaler(engine).cur_scale = scales[window]
            forwards = 0
            train_window(engine, case, window)
            v = stored_v(engine) and [part.clone() for part in stored_v(engine)]
            records.append(Record(engine.was_step_applied(), engine.looksam.step_kind, forwards, _loss_scale(engine),
                                  engine.looksam.next_is_sam, master_weights(engine), visible_weights(engine), v))
        assert engine.skipped_steps == sum(not record.applied for record in records)
        assert engine.looksam.updates == sum(record.applied for record in records)
        assert engine.looksam.evaluations == sum(record.forwards for record in records) // case.accumulation
    return records


def _loss_scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scale_config", None) or engine.optimizer.loss_scaler


def _loss_scale(engine: Any) -> float:
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def check(case: Case, faults: list[Fault], scales: dict[int, float] | None = None,
          initial_scale: float = 1.0, growth_window: int | None = None, tolerance: float | None = None) -> None:
    reference, module, groups = start_oracle(case, DTYPES[case.precision])
    results = run_on_ranks(case.world, train_with_faults, case, faults, scales or {})
    by_window = {fault.window: fault for fault in faults}
    before, scale, iteration, last_overflow = None, initial_scale, 0, -1
    for window, record in enumerate(results[0]):
        scale = (scales or {}).get(window, scale)
        was_sam = reference.t % case.k == 0
        fault = by_window.get(window)
        if fault is not None and (was_sam or fault.evaluation == 1):
            assert not record.applied and record.kind == "skipped"
            assert record.forwards == fault.evaluation * case.accumulation, "an overflow is not replayed"
            assert record.next_is_sam == was_sam, "the phase of the SAM steps has moved"
            if case.precision == "fp16":
                scale, last_overflow = scale / 2, iteration
            if before is not None:
                assert _equal(record.weights, before.weights) and _equal(record.model_weights, before.model_weights)
                assert (record.v is None) == (before.v is None)
                assert all(torch.equal(a, b) for a, b in zip(record.v or [], before.v or [], strict=True))
        else:
            assert record.applied and record.kind == ("sam" if was_sam else "reuse")
            # At stage 0 DeepSpeed 0.19.8 divides by a loss scale that the gradient does not have (shards/fp16.py).
            reference.divisor = scale if case.stage == 0 else 1.0
            if growth_window and iteration > last_overflow + 1 and (iteration - last_overflow - 1) % growth_window == 0:
                # DeepSpeed 0.19.8 raises the loss scale before it divides the gradient by it.
                scale, reference.divisor = scale * 2, reference.divisor * 2
            reference.update(case.window(window))
            expected = named(reference.w, module, groups)
            error = distance(record.weights, expected)
            assert error <= (tolerance or TIGHT[case.base]), f"window {window}: relative error {error:.2e}"
        assert record.loss_scale == scale, f"window {window}"
        iteration += 1
        before = record
    for records in results[1:]:
        for ours, theirs in zip(results[0], records, strict=True):
            assert (ours.applied, ours.kind, ours.loss_scale) == (theirs.applied, theirs.kind, theirs.loss_scale)
            assert _equal(ours.weights, theirs.weights)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dynamic(case: Case, window: int = 1000) -> Case:
    """Dynamic loss scale from 2^7, halved at once on an overflow."""
    return replace(case, loss_scale=1.0, config={
        **case.config, "fp16": {"enabled": True, "initial_scale_power": 7, "hysteresis": 1, "loss_scale_window": window}
    })


FP16 = Case(precision="fp16", world=2, base="SGD", alpha=0.7, k=3, updates=8)
# Window 0: the first SAM step. 4: the next one (windows 1 to 3 are its retry and two reuse steps).
SECOND_SAM = [Fault(0, 2, math.inf), Fault(4, 2, math.nan)]
FIRST_SAM = [Fault(0, 1, math.nan), Fault(4, 1, math.inf)]
# 5 is a reuse step too: it has no second evaluation to be spoilt.
REUSE = [Fault(1, 1, math.inf), Fault(5, 2, math.nan)]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("faults", [FIRST_SAM, SECOND_SAM, REUSE], ids=["first", "second", "reuse"])
def test_fp16(stage: int, faults: list[Fault]) -> None:
    check(dynamic(in_fp32(replace(FP16, stage=stage))), faults, initial_scale=128.0)


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("faults", [FIRST_SAM, SECOND_SAM, REUSE], ids=["first", "second", "reuse"])
def test_fp16_stage_0(base: str, faults: list[Fault]) -> None:
    # Gradients are averaged in fp16, which the oracle does not repeat: see LOOSE.
    check(dynamic(replace(FP16, stage=0, base=base)), faults, initial_scale=128.0, tolerance=LOOSE[base] / 8)


@pytest.mark.parametrize("case", [
    in_fp32(Case(precision="bf16", stage=1, base="SGD", alpha=0.7, updates=8)),
    in_fp32(Case(precision="bf16", stage=2, base="SGD", alpha=0.7, updates=8, accumulation=2)),
    in_fp32(Case(precision="bf16", stage=3, base="SGD", alpha=0.7, updates=8)),
    Case(precision="fp32", stage=2, base="SGD", alpha=0.7, updates=8),
    Case(precision="fp32", stage=3, base="SGD", alpha=0.7, updates=8),
], ids=lambda case: f"{case.precision}-stage{case.stage}")
def test_without_loss_scale(case: Case) -> None:
    """Windows 1 and 2 are the first SAM step again, 3 and 4 its first reuse step, 6 and 7 the next SAM step."""
    check(case, [Fault(0, 2, math.nan), Fault(1, 1, math.nan), Fault(3, 1, math.inf), Fault(6, 2, math.inf)])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_loss_scale_may_change_between_sam_and_reuse(stage: int) -> None:
    case = dynamic(in_fp32(replace(FP16, stage=stage)))
    check(case, [], scales={1: 32.0, 2: 512.0, 3: 64.0, 4: 1024.0, 5: 8.0}, initial_scale=128.0)


@pytest.mark.parametrize("ascent, stage", [("rank", 0), ("rank", 1), ("rank", 2), ("micro_batch", 1),
                                           ("micro_batch", 2), ("global_micro_batch", 3)])
@pytest.mark.parametrize("faults", [FIRST_SAM, SECOND_SAM], ids=["first", "second"])
def test_ascent_groups(ascent: str, stage: int, faults: list[Fault]) -> None:
    """One rank's own gradient is not finite, and all skip. It moves its own fp16 weights, where the oracle moves the
    master's: see LOOSE."""
    case = replace(FP16, stage=stage, ascent=ascent)
    check(dynamic(in_fp32(case) if stage else case), faults, initial_scale=128.0, tolerance=LOOSE["SGD"] / 8)


def test_growing_loss_scale() -> None:
    check(dynamic(in_fp32(FP16), window=2), [Fault(3, 2, math.inf)], initial_scale=128.0, growth_window=2)

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
from .test_options import LOOSE, TIGHT, in_fp32
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

Faults = dict[int, tuple[int, float]]
"""By window: what the loss of the last rank is multiplied by, and in which evaluation."""

FAULTS: Faults = {0: (2, math.inf), 1: (1, math.nan), 3: (1, math.inf), 4: (2, math.nan), 6: (2, math.nan),
                  7: (1, math.inf)}
"""Windows 1 and 2 are the first SAM step again, 3 and 4 its first reuse step (which has no second evaluation to be
spoilt), 6 to 8 the next SAM step."""


@dataclass
class Record:
    """Of one window on one rank, after its step."""

    applied: bool
    kind: str
    forwards: int
    loss_scale: float
    next_is_sam: bool
    tensors: list[Tensor]
    weights: dict[str, Tensor]

    def same(self, other: Record) -> bool:
        return len(self.tensors) == len(other.tensors) and all(map(torch.equal, self.tensors, other.tensors))


def train_with_faults(case: Case, faults: Faults, scales: dict[int, float]) -> list[Record]:
    """Train ``case.updates`` windows; before window i the loss scale is set to ``scales[i]``. Collective."""
    records: list[Record] = []
    last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    with engine_for(case) as engine:
        forwards = 0

        def spoil(module: Any, args: Any, loss: Tensor) -> Tensor | None:
            nonlocal forwards
            forwards += 1
            evaluation, value = faults.get(len(records), (0, 1.0))
            return loss * value if evaluation == 1 + is_evaluating_again(engine) and last_rank else None

        engine.module.register_forward_hook(spoil)
        for window in range(case.updates):
            if window in scales:
                (getattr(engine.optimizer, "loss_scale_config", None) or
                 engine.optimizer.loss_scaler).cur_scale = scales[window]
            forwards = 0
            train_window(engine, case, window)
            weights = master_weights(engine)
            tensors = [*weights.values(), *visible_weights(engine).values(), *(stored_v(engine) or [])]
            records.append(Record(engine.was_step_applied(), engine.looksam.step_kind, forwards,
                                  float(getattr(engine.optimizer, "loss_scale", 1.0)), engine.looksam.next_is_sam,
                                  [t.clone() for t in tensors], weights))
        assert engine.skipped_steps == sum(not record.applied for record in records)
        assert engine.looksam.updates == sum(record.applied for record in records)
        assert engine.looksam.evaluations == sum(record.forwards for record in records) // case.accumulation
    return records


def check(case: Case, faults: Faults, scales: dict[int, float], growth_window: int | None, tolerance: float) -> None:
    reference, module, groups = start_oracle(case, DTYPES[case.precision])
    results = run_on_ranks(case.world, train_with_faults, case, faults, scales)
    before, scale, iteration, last_overflow = None, 128.0 if case.precision == "fp16" else 1.0, 0, -1
    for window, record in enumerate(results[0]):
        scale = scales.get(window, scale)
        was_sam = reference.t % case.k == 0
        evaluation, _ = faults.get(window, (0, 1.0))
        if evaluation == 1 or (evaluation and was_sam):
            assert not record.applied and record.kind == "skipped"
            assert record.forwards == evaluation * case.accumulation, "an overflow is not replayed"
            assert record.next_is_sam == was_sam, "the phase of the SAM steps has moved"
            if case.precision == "fp16":
                scale, last_overflow = scale / 2, iteration
            assert before is None or record.same(before)
        else:
            assert record.applied and record.kind == ("sam" if was_sam else "reuse")
            # At stage 0 DeepSpeed 0.19.8 divides by a loss scale that the gradient does not have (shards/fp16.py).
            reference.divisor = scale if case.stage == 0 else 1.0
            if growth_window and iteration > last_overflow + 1 and (iteration - last_overflow - 1) % growth_window == 0:
                # DeepSpeed 0.19.8 raises the loss scale before it divides the gradient by it.
                scale, reference.divisor = scale * 2, reference.divisor * 2
            reference.update(case.window(window))
            error = distance(record.weights, named(reference.w, module, groups))
            assert error <= tolerance, f"window {window}: relative error {error:.2e}"
        assert record.loss_scale == scale, f"window {window}"
        iteration += 1
        before = record
    for records in results[1:]:
        for ours, theirs in zip(results[0], records, strict=True):
            assert (ours.applied, ours.kind, ours.loss_scale) == (theirs.applied, theirs.kind, theirs.loss_scale)
            assert all(torch.equal(ours.weights[name], weight) for name, weight in theirs.weights.items())


def dynamic(case: Case, window: int = 1000) -> Case:
    """Dynamic loss scale from 2^7, halved at once on an overflow."""
    scale = {"enabled": True, "initial_scale_power": 7, "hysteresis": 1, "loss_scale_window": window}
    return replace(case, config={**case.config, "fp16": scale}) if case.precision == "fp16" else case


def _case(precision: str, stage: int, **other: Any) -> Case:
    case = Case(**{"precision": precision, "stage": stage, "base": "SGD", "alpha": 0.7, "updates": 10, **other})
    return case if precision == "fp32" or stage == 0 else in_fp32(case)


# LOOSE where the oracle does not repeat all rounding: at stage 0 gradients are averaged in fp16, and with ascent groups
# a rank moves its own fp16 weights, where the oracle moves the master's.
CASES = [
    *((_case("fp16", stage), TIGHT) for stage in (1, 2, 3)), *((_case("bf16", stage), TIGHT) for stage in (1, 3)),
    (_case("bf16", 2, accumulation=2), TIGHT), *((_case("fp32", stage), TIGHT) for stage in (2, 3)),
    *((_case("fp16", 0, base=base), LOOSE) for base in ("SGD", "AdamW")),
    *((_case("fp16", stage, ascent=ascent), LOOSE) for ascent, stage in [
        ("rank", 0), ("rank", 1), ("rank", 2), ("micro_batch", 1), ("micro_batch", 2), ("global_micro_batch", 3)]),
]  # yapf: disable


@pytest.mark.parametrize("case, tolerance", [
    pytest.param(*row, id=f"{row[0].precision}-stage{row[0].stage}-{row[0].base}-{row[0].ascent}") for row in CASES])
def test_skipped(case: Case, tolerance: dict[str, float]) -> None:
    check(dynamic(case), FAULTS, {}, None, tolerance[case.base] / (8 if tolerance is LOOSE else 1))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_loss_scale_may_change_between_sam_and_reuse(stage: int) -> None:
    check(dynamic(_case("fp16", stage)), {}, {1: 32.0, 2: 512.0, 3: 64.0, 4: 1024.0, 5: 8.0}, None, TIGHT["SGD"])


def test_growing_loss_scale() -> None:
    check(dynamic(_case("fp16", 2), window=2), {3: (2, math.inf)}, {}, 2, TIGHT["SGD"])

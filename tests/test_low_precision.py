"""bf16 and fp16 on every ZeRO stage and wrapper, against the float64 oracle.

Two kinds of comparison:

- TIGHT: the oracle computes its gradients in the run's dtype (``dtype=``), so that only fp32 arithmetic differs. It
  must then round as the run rounds, which it does at world 1 with one micro-batch, and at any world size where
  gradients are accumulated and sent in fp32 and the loss is divided by a power of two (which is exact).
- Rounded: the exact oracle, for runs that also accumulate and reduce in low precision, with the fuzz command's
  tolerance. That follows each case: rounding in g_v, a small difference of gradients, is made as long as alpha ‖g‖.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from .covering import cases
from .fuzz import rounding_tolerance
from .inside import shards
from .ranks import run_on_ranks
from .training import (
    DTYPES,
    Case,
    check_against_oracle,
    compare_with_oracle,
    distance,
    engine_for,
    error_to_nearest,
    run_oracle,
)

TIGHT = {"SGD": 2e-5, "AdamW": 5e-4}
"""fp32 rounding gives some 1e-7, and a weight that it leaves on the other side of a rounding boundary of bf16 or fp16
is found by error_to_nearest; but of a run's some 4,000 roundings several may lie that near, and not all of them be
taken as the run takes them. SGD passes on what that does to the gradient as it is; Adam divides a small element's
error by that element. A rho or alpha that is 5 % wrong moves the weights by more than 1e-3
(test_tolerance_tells_mistakes)."""

ROUNDED_NORM = 1e-3
"""FP16_UnfusedOptimizer takes its clipping norm from gradients cast to the model's dtype (the oracle from u as it is):
clipped steps of reuse differ by some 2^-9 / sqrt(200 elements) = 1.4e-4 of themselves in bf16."""

LOOSE = {"SGD": 2e-3, "AdamW": 2e-2}
"""For other files' runs that accumulate and reduce in bf16; an eighth of it in fp16, whose unit is 2^-12 where bf16's
is 2^-9. Weights, activations and gradients are rounded in each of some 8 operations (forward, backward, 3
micro-batches, up to 4 ranks), so a gradient is off by about sqrt(8) * 2^-9 = 6e-3 of a typical element. SGD moves the
weights by less than a third of themselves: 2e-3. Adam divides by the element, so that one ten times smaller than
typical is off by 6e-2 of Adam's step; 12 such steps of lr 1e-2 (3e-2
in the second group) are 7e-3 (2e-2), of weights whose root mean square is about 0.3."""


def loose(case: Case) -> float:
    return LOOSE[case.base] / (8 if case.precision == "fp16" else 1)


def has_rounded_norm(case: Case) -> bool:
    return case.stage == 0 and case.base != "AdamW" and case.clipping > 0


def tight(case: Case) -> float:
    return ROUNDED_NORM if has_rounded_norm(case) else TIGHT[case.base]


def in_fp32(case: Case) -> Case:
    """Gradients are accumulated and sent in fp32. At stage 1 in bf16 that makes the wrapper a BF16_Optimizer."""
    return replace(case, config={"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"})


def case_of(settings: dict[str, Any]) -> Case:
    # At stage 0 the gradient gets no loss scale, but is divided by it (shards/fp16.py).
    return Case(**settings, loss_scale=8.0 if settings["stage"] == 0 else 128.0)


COMMON = {"precision": ["bf16", "fp16"], "base": ["SGD", "AdamW"], "clipping": [0.0, 0.05], "alpha": [0.7, "auto"],
          "two_groups": [False, True], "model": ["mlp", "dead_and_frozen", "tied", "straddling", "tiny"]}
ALONE = {"stage": [0, 1, 2, 3], "world": [1], **COMMON}
TOGETHER = {"stage": [1, 2, 3], "world": [2, 4], "accumulation": [1, 2], **COMMON}
ROUNDED = {"stage": [0, 1, 2, 3], "world": [2, 4], "accumulation": [3], **COMMON}


@pytest.mark.parametrize("case", cases(ALONE, case_of))
def test_one_rank_tight(case: Case) -> None:
    check_against_oracle(case, tight(case), dtype=DTYPES[case.precision])


@pytest.mark.parametrize("case", cases(TOGETHER, lambda row: in_fp32(case_of(row))))
def test_fp32_accumulation_tight(case: Case) -> None:
    reference = check_against_oracle(case, tight(case), dtype=DTYPES[case.precision])
    if case.clipping:
        assert reference.clipped > 0, "clipping was meant to bind"


@pytest.mark.parametrize("case", cases(ROUNDED, case_of, strength=1))
def test_low_precision_accumulation(case: Case) -> None:
    _, error, _ = compare_with_oracle(case)
    allowed = rounding_tolerance(case) + (ROUNDED_NORM if has_rounded_norm(case) else 0)
    assert error <= allowed, f"relative error {error:.2e} > {allowed:.1e} for {case}"


def padding_of_stage_3(case: Case) -> float:
    with engine_for(case) as engine:
        flats = shards(engine).master_weights()
        for flat, segments in zip(flats, shards(engine).layout(), strict=True):
            for s in segments:
                flat[s.start:s.start + s.numel].zero_()
        return sum(float(flat.abs().sum()) for flat in flats)


def test_padding_holds_nothing() -> None:
    """Where a nan may have been, of whatever lay in that memory before."""
    assert run_on_ranks(4, padding_of_stage_3, Case(stage=3, world=4, precision="bf16")) == [0.0] * 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_tolerance_tells_mistakes(precision: str, base: str) -> None:
    case = Case(precision=precision, base=base, world=1, alpha=0.7, loss_scale=128.0)
    _, expected = run_oracle(case, DTYPES[precision])
    for mistake in ({"rho": 1.05 * case.rho}, {"alpha": 0.95 * case.alpha}):
        _, wrong = run_oracle(replace(case, **mistake), DTYPES[precision])
        assert distance(wrong, expected) > 2 * TIGHT[base]
        assert error_to_nearest(wrong, case, DTYPES[precision], seeds=4) > TIGHT[base]

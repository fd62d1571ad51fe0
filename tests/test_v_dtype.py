"""``"v_dtype": "bf16"``: half the bytes, and updates that differ by what rounding v explains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from .inside import shards as shards_of
from .inside import stored_v
from .ranks import run_on_ranks
from .training import DTYPES, Case, check_against_oracle, engine_for, train_window

BF16_V: dict[str, Any] = {"v_dtype": "bf16"}

ROUNDED = {"SGD": 1e-5, "AdamW": 1e-4}
"""Against an oracle that rounds v too. Only elements of v that fp32 and float64 leave on two sides of a rounding
boundary differ, by 2^-8 of themselves: of the some 800 roundings of a run less than one in a thousand."""

EXACT = {"SGD": 5e-4, "AdamW": 5e-3}
"""Against the exact oracle. Each element of v is off by about 2^-9 of itself, so u by alpha 2^-9 ‖g‖ = 1.4e-3 ‖g‖ at
alpha 0.7, and as an SGD run moves its weights by less than a third of themselves: 5e-4. Adam divides by the element, so
one ten times smaller than typical is off by 1.4e-2 of Adam's step; 8 such steps of lr 1e-2 (3e-2 in the second group)
are at most 3e-3, of weights whose root mean square is about 0.3."""

CASES = [
    Case(stage=0, world=1, alpha=0.7, params=BF16_V),
    Case(stage=1, world=2, alpha="auto", two_groups=True, clipping=0.05, params=BF16_V),
    Case(stage=2, world=2, alpha=0.7, base="SGD", model="straddling", params=BF16_V),
    Case(stage=2, world=4, alpha=0.7, base="SGD", model="tiny", accumulation=3, params=BF16_V),
    Case(stage=3, world=2, alpha=0.7, model="dead_and_frozen", params=BF16_V),
    Case(stage=3, world=4, alpha="auto", base="SGD", clipping=0.05, params=BF16_V),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"stage{c.stage}-world{c.world}-{c.base}-{c.model}")
def test_against_oracle(case: Case) -> None:
    check_against_oracle(case, ROUNDED[case.base], v_dtype=torch.bfloat16)
    check_against_oracle(case, EXACT[case.base])


def test_with_bf16_optimizer() -> None:
    """The wrapper that is told ‖u‖², which must be that of u with v as it was stored."""
    case = Case(stage=1, world=2, precision="bf16", base="SGD", alpha=0.7, clipping=0.05, params=BF16_V,
                config={"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"})
    check_against_oracle(case, 2e-5, dtype=DTYPES["bf16"], v_dtype=torch.bfloat16)


def stored_bytes(case: Case) -> tuple[int, int]:
    """Bytes of v and of the fp32 master on this rank. Collective."""
    with engine_for(case) as engine:
        for update in range(case.k + 1):
            train_window(engine, case, update)
        count = [sum(part.numel() * part.element_size() for part in shard)
                 for shard in (stored_v(engine), shards_of(engine).master_weights())]
        assert all(part.untyped_storage().nbytes() == part.numel() * part.element_size() for part in stored_v(engine))
        return count[0], count[1]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bytes(stage: int) -> None:
    case = Case(stage=stage, world=2)
    for v, master in run_on_ranks(2, stored_bytes, case):
        assert v == master
    for v, master in run_on_ranks(2, stored_bytes, replace(case, params=BF16_V)):
        assert 2 * v == master

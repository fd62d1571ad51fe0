"""Muon as base optimizer: what it orthogonalises is LookSAM's u, matrix by matrix, wherever the matrix lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from .checkpoints import Stretch, run_stretch
from .ranks import run_on_ranks
from .test_oracle_grid import TOLERANCE
from .training import DTYPES, Case, check_against_oracle, distance, run_oracle

CPU = {"offload_optimizer": {"device": "cpu"}}
WHOLE = {"reduce_scatter": False}  # which DeepSpeed's Muon asks for at stage 3
PLACES: list[tuple[int, dict[str, Any]]] = [
    (0, {}), (1, CPU), (2, CPU), (3, WHOLE), (3, {**WHOLE, **CPU}), (3, {**WHOLE, "sub_group_size": 60})
]
MODELS = ["straddling", "mlp", "dead_and_frozen", "tied", "sometimes"]

ROUNDED = {"bf16": 5e-3, "fp16": 7e-4}
"""Gradients are rounded by 2^-9 (2^-12) of themselves, and what is small beside the largest singular value comes out of
Newton-Schulz up to 3.4445^5 = 485 times larger, but no larger than 1.2: whole directions are rounding. 12 steps of
0.02 * sqrt(11 singular values) each move weights of norm 5 by 0.15 of themselves. Seen: 2.6e-3 and 3.6e-4."""


def _case(stage: int, zero: dict[str, Any], **other: Any) -> Case:
    """Clipping binds on the update at ZeRO's stages, on the gradient at stage 0. Group 2, all biases, has a rho of its
    own, and DeepSpeed makes Muon's groups anew. At world 3 "straddling" has a matrix on three ranks."""
    return Case(**{"stage": stage, "base": "Muon", "zero": zero, "accumulation": 2, "two_groups": True, "updates": 7,
                   "clipping": 0.5 if stage else 0.05, **other})


def _id(value: Any) -> str:
    return f"stage{value[0]}-{'-'.join(value[1])}" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("place", "model"), [
    pytest.param(place, model, marks=[] if j == i % len(MODELS) else pytest.mark.grid)
    for i, place in enumerate(PLACES) for j, model in enumerate(MODELS)
], ids=_id)
def test_fp32(place: tuple[int, dict[str, Any]], model: str) -> None:
    case = _case(*place, model=model, world=3 if model == "straddling" else 2,
                 alpha=0.7 if model == "straddling" else "auto")
    assert check_against_oracle(case, TOLERANCE).clipped > 0, "clipping was meant to bind"


@pytest.mark.parametrize(("place", "world"), [
    pytest.param(place, world, marks=[] if (place, world) == ((3, WHOLE), 2) else pytest.mark.grid)
    for place in PLACES if place[0] > 0 for world in (1, 2)
], ids=_id)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(place: tuple[int, dict[str, Any]], precision: str, world: int) -> None:
    case = _case(*place, world=world, precision=precision, loss_scale=128.0, updates=12, accumulation=1)
    check_against_oracle(case, ROUNDED[precision], dtype=DTYPES[precision])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_tolerance_tells_mistakes(precision: str) -> None:
    case = _case(3, WHOLE, precision=precision, loss_scale=128.0, updates=12, accumulation=1, alpha=0.7)
    _, expected = run_oracle(case, DTYPES[precision])
    for mistake in ({"rho": 1.05 * case.rho}, {"alpha": 0.95 * case.alpha}):
        _, wrong = run_oracle(replace(case, **mistake), DTYPES[precision])
        assert distance(wrong, expected) > 2 * ROUNDED[precision]


@pytest.mark.parametrize("place", [(2, CPU), (3, WHOLE)], ids=_id)
def test_resume_is_bit_exact(place: tuple[int, dict[str, Any]], tmp_path: Path) -> None:
    """Muon's momentum is saved, and g_v beside it, under the parameters' names in whatever group they are."""
    case = _case(*place)
    whole = run_on_ranks(case.world, run_stretch, case, Stretch(save={"save_dir": str(tmp_path)}, save_at=7))
    resumed = run_on_ranks(case.world, run_stretch, case, Stretch(start=7, load={"load_dir": str(tmp_path)}))
    for got, expected in zip(resumed, whole, strict=True):
        assert got.extra.kinds == expected.extra.kinds[7:]
        for name, weight in expected.weights.items():
            assert got.weights[name].equal(weight), name

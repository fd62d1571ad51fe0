"""Look-LayerSAM on ZeRO shards, with each base optimizer it is used with, against the float64 oracle."""

from __future__ import annotations

import pytest

from .covering import covering, product
from .training import Case, check_against_oracle

GRID = {
    "stage": [0, 1, 2, 3],
    "world": [1, 2, 4],
    "layer_scale": ["norm", "relative", "gradient"],
    "base": ["AdamW", "Lamb", "Lars"],
    "accumulation": [1, 2],
    "k": [1, 3],
    "two_groups": [False, True],
    "model": ["mlp", "dead_and_frozen", "tied", "straddling", "tiny", "random-3"],
}

TOLERANCE = 1e-5
"""As in test_oracle_grid: the norms of layers add nothing to the rounding, they are summed in float64."""

RHO = {"norm": 0.1, "relative": 0.02, "gradient": 0.05}
"""Of a size that moves the weights by a tenth or so: with "relative" rho is a fraction of each layer's norm."""


def _id(case: Case) -> str:
    return "-".join(str(getattr(case, key)) for key in GRID)


def _case(settings: dict) -> Case:
    return Case(rho=RHO[settings["layer_scale"]], **settings)


SUBSET = [_case(settings) for settings in covering(GRID, strength=2)]
WHOLE = [_case(settings) for settings in product(GRID)]


@pytest.mark.parametrize("case", SUBSET, ids=_id)
def test_matches_oracle(case: Case) -> None:
    check_against_oracle(case, TOLERANCE)


@pytest.mark.grid
@pytest.mark.parametrize("case", WHOLE, ids=_id)
def test_matches_oracle_everywhere(case: Case) -> None:
    check_against_oracle(case, TOLERANCE)

"""Look-LayerSAM on ZeRO shards, with each base optimizer it is used with, against the float64 oracle."""

from __future__ import annotations

import pytest

from .covering import cases
from .test_oracle_grid import TOLERANCE  # the norms of layers add nothing to the rounding: they are summed in float64
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

RHO = {"norm": 0.1, "relative": 0.02, "gradient": 0.05}
"""Of a size that moves the weights by a tenth or so: with "relative" rho is a fraction of each layer's norm."""


@pytest.mark.parametrize("case", cases(GRID, lambda row: Case(rho=RHO[row["layer_scale"]], **row)))
def test_matches_oracle(case: Case) -> None:
    check_against_oracle(case, TOLERANCE)

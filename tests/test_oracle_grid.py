"""LookSAM on ZeRO shards against the float64 oracle, over the grid of everything that changes the way of a gradient.

CI runs a subset in which every triple of stage, ranks, micro-batches and model occurs, and every pair of all settings;
``pytest -m grid`` runs the whole grid. What no wrapper sees of an update is combined in tests/test_update.py.
"""

from __future__ import annotations

import pytest

from .covering import cases
from .training import TOLERANCE, Case, check_against_oracle

GRID = {
    "stage": [0, 1, 2, 3],
    "world": [1, 2, 4],
    "accumulation": [1, 3],
    "clipping": [0.0, 0.05],
    "alpha": [0.7, 0.0, "auto"],
    "k": [1, 3],
    "base": ["AdamW", "SGD"],
    "model": ["mlp", "dead_and_frozen", "tied", "straddling", "tiny", "sometimes"],
}
TWO_GROUPS = {"tied", "straddling", "sometimes"}


@pytest.mark.parametrize("case", cases(GRID, lambda row: Case(**row, two_groups=row["model"] in TWO_GROUPS, updates=7),
                                       strength=3, pairs=("clipping", "alpha", "k", "base")))
def test_matches_oracle(case: Case) -> None:
    reference = check_against_oracle(case, TOLERANCE)
    if case.clipping:
        assert reference.clipped > 0, "clipping was meant to bind"

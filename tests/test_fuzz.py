"""A short run of the fuzz command; ``python -m tests.fuzz --draws 300`` is the long one."""

from __future__ import annotations

import pytest

from .fuzz import check, seeds


@pytest.mark.parametrize("seed", list(seeds(20, seed=0)))
def test_draw(seed: int) -> None:
    check(seed)

"""A short run of the fuzz command; ``python -m tests.fuzz --draws 300`` is the long one."""

from __future__ import annotations

import pytest

from .fuzz import check, draw, seeds


def _has_an_operator_to_compile(seed: int) -> bool:
    """Half a minute: tests/run.sh compiles those of Adam only."""
    case, _ = draw(seed)
    return "offload_optimizer" in case.zero and case.base in ("Adagrad", "Lion")


@pytest.mark.parametrize("seed", [seed for seed in seeds(24, seed=0) if not _has_an_operator_to_compile(seed)][:20])
def test_draw(seed: int) -> None:
    check(seed)

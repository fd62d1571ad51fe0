"""The oracle's ascent groups, by hand: two parabolas whose gradients have round norms. Layers and other groupings of it
are compared with another program, in test_reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .oracle import Base, Group, Oracle


def exactly(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


CURVATURE = {"a": exactly(1, 2), "b": exactly(3, 1)}
SLOPE = {"a": exactly(3, 4), "b": exactly(6, -8)}
"""The gradient at the start, of norms 5 and 10."""


def test_two_groups() -> None:
    """Two micro-batches "a" and one "b": eps_a = (0.3, 0.4) and s_a = (3.3, 4.8); eps_b = (0.3, -0.4) and s_b = (6.9,
    -8.4); 2/3 of a and 1/3 of b."""
    def gradient(w: Tensor, window: str) -> Tensor:
        return torch.stack([SLOPE[x] + CURVATURE[x] * w for x in window]).mean(dim=0)

    base = Base("SGD", [Group(names=["x", "y"], lr=0.1, rho=0.5, alpha=0.7)], torch.zeros(2, dtype=torch.int64))
    oracle = Oracle(w=exactly(0, 0), gradient=gradient, base=base, k=2, groups_of=lambda window: ["aa", "b"])
    oracle.update("aab")
    torch.testing.assert_close(oracle.w, -0.1 * exactly(4.5, 0.4))
    torch.testing.assert_close(oracle.v, exactly(0, 0.4))  # g = (4, 0)
    oracle.update("aab")
    g = exactly(4, 0) + (2 * CURVATURE["a"] + CURVATURE["b"]) / 3 * exactly(-0.45, -0.04)
    torch.testing.assert_close(oracle.w, exactly(-0.45, -0.04) - 0.1 * (g + 0.7 * g.norm() * exactly(0, 1)))
    assert oracle.evaluations == 3

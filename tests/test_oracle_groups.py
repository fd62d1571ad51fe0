"""The oracle's ascent groups, by hand: two parabolas whose gradients have round norms. And what a case groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .oracle import Base, Group, Oracle
from .training import Case


def exactly(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


CURVATURE = {"a": exactly(1, 2), "b": exactly(3, 1)}
SLOPE = {"a": exactly(3, 4), "b": exactly(6, -8)}
"""The gradient at the start, of norms 5 and 10."""


def updated_once(start: Tensor, layer_scale: str | None = None) -> Oracle:
    """Two micro-batches "a" and one "b", rho 0.5, SGD. Each parameter is a layer of one element."""
    def gradient(w: Tensor, window: str) -> Tensor:
        return torch.stack([SLOPE[x] + CURVATURE[x] * (w - start) for x in window]).mean(dim=0)

    group = Group(names=["x", "y"], lr=0.1, rho=0.5, alpha=0.7)
    layers = [(slice(0, 1), group), (slice(1, 2), group)]
    oracle = Oracle(w=start, gradient=gradient, base=Base("SGD", [group], torch.zeros(2, dtype=torch.int64), layers),
                    k=2, layer_scale=layer_scale, groups_of=lambda window: ["aa", "b"])
    oracle.update("aab")
    return oracle


def test_two_groups() -> None:
    """eps_a = (0.3, 0.4) and s_a = (3.3, 4.8); eps_b = (0.3, -0.4) and s_b = (6.9, -8.4); 2/3 of a and 1/3 of b."""
    oracle = updated_once(exactly(0, 0))
    torch.testing.assert_close(oracle.w, -0.1 * exactly(4.5, 0.4))
    torch.testing.assert_close(oracle.v, exactly(0, 0.4))  # g = (4, 0)
    oracle.update("aab")
    g = exactly(4, 0) + (2 * CURVATURE["a"] + CURVATURE["b"]) / 3 * exactly(-0.45, -0.04)
    torch.testing.assert_close(oracle.w, exactly(-0.45, -0.04) - 0.1 * (g + 0.7 * g.norm() * exactly(0, 1)))
    assert oracle.evaluations == 3


@pytest.mark.parametrize("rule, s", [("relative", (1, 1)), ("norm", (5**0.5, 5**0.5)), ("gradient", (5, 10))])
def test_layerwise(rule: str, s: tuple[float, float]) -> None:
    """Each layer moves by half its own norm, 1 and 2, divided by the group's own s."""
    s_a = SLOPE["a"] + CURVATURE["a"] * exactly(0.5, 1) / s[0]
    s_b = SLOPE["b"] + CURVATURE["b"] * exactly(0.5, -1) / s[1]
    torch.testing.assert_close(updated_once(exactly(1, 2), rule).w, exactly(1, 2) - 0.1 * (2 * s_a + s_b) / 3)


@pytest.mark.parametrize("ascent, groups", [
    ("global", ["00 01 02 10 11 12"]), ("rank", ["00 01 02", "10 11 12"]),
    ("micro_batch", ["00", "01", "02", "10", "11", "12"]), ("global_micro_batch", ["00 10", "01 11", "02 12"])])
def test_groups_of_a_case(ascent: str, groups: list[str]) -> None:
    """Two ranks with three micro-batches each, which a window holds one rank after the other."""
    window = [f"{rank}{i}" for rank in range(2) for i in range(3)]
    case = Case(world=2, accumulation=3, ascent=ascent)
    assert [" ".join(group) for group in case.ascent_groups(window)] == groups

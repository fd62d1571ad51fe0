"""Two engines in one process, whatever the order of their forwards, backwards and steps: each backward is the window's of
the engines whose outputs it reaches, and of no other. Weights against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ranks import run_on_ranks
from .twin import Twin, engine_of, frozen, weights_of

UPDATES = 4
Batch = tuple[Tensor, Tensor, Tensor]


def batches(accumulation: int) -> Iterator[list[Batch]]:
    """x, target and a second x, float64 [4, 3] each, of every micro-batch of each window."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(UPDATES):
        yield [tuple(torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3))  # type: ignore[misc]
               for _ in range(accumulation)]


def build_a() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def build_b() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 3))


def only_a(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """What a model learns by itself, and from the other one's output as it is."""
    return F.mse_loss(a, y) + 0.5 * F.l1_loss(torch.tanh(a), b.detach())


def together(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(a, y) + F.mse_loss(b, y) / 2 + (a * b).mean()


ORDERS = ["a b A B sA sB", "b a B A sA sB", "a b B A sB sA", "a A b B sA sB", "a A sA b B sB"]
"""a, b: forwards; A, B: backwards of a loss for each; AB, L: of one loss of both, by A's engine or by the loss."""


def train(stage: int, accumulation: int, order: str, looksam: tuple[bool, bool]) -> None:
    twins = {"A": Twin(build_a, looksam[0]), "B": Twin(build_b, looksam[1])}
    with engine_of(build_a, stage, accumulation, looksam[0]) as a, engine_of(build_b, stage, accumulation,
                                                                          looksam[1]) as b:
        engines, events = {"A": a, "B": b}, order.split()
        for window in batches(accumulation):
            old = {name: frozen(twin.module) for name, twin in twins.items()}
            for x, y, _ in window:
                x, y, out = x.float(), y.float(), {}
                for event in events:
                    if event in ("a", "b"):
                        out[event] = engines[event.upper()](x)
                    elif event in ("A", "B"):
                        mine, other = event.lower(), {"A": "b", "B": "a"}[event]
                        known = out[other] if other in out else engines[other.upper()].module(x).detach()
                        engines[event].backward(only_a(out[mine], known, y))
                    elif event in ("AB", "L"):
                        loss = together(out["a"], out["b"], y)
                        a.backward(loss) if event == "AB" else loss.backward()
                    else:
                        engines[event[1]].step()

            def losses(m: nn.Module, name: str) -> list[Tensor]:
                other = old[{"A": "B", "B": "A"}[name]]
                if "AB" in events or "L" in events:
                    return [together(*((m(x), other(x)) if name == "A" else (other(x), m(x))), y) for x, y, _ in window]
                return [only_a(m(x), other(x), y) for x, y, _ in window]

            for name, twin in twins.items():
                twin.update(lambda m, name=name: losses(m, name))
        for name, engine in engines.items():
            twins[name].check(weights_of(engine))
        assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("stage, accumulation, order, looksam", [
    *((stage, 1, order, (True, True)) for stage in (0, 2) for order in ORDERS[:4]),
    (3, 1, ORDERS[1], (True, True)), (1, 2, ORDERS[0], (True, True)), (2, 2, ORDERS[2], (True, True)),
    (2, 1, ORDERS[0], (True, False)), (0, 2, ORDERS[3], (False, True)),
    *((stage, accumulation, f"a b {how} sA sB", (True, True)) for stage, accumulation in [(1, 2), (2, 1), (3, 1)]
      for how in ("AB", "L")),
    (2, 1, "b a AB sB sA", (True, True)), (1, 1, "a b AB sA sB", (False, True)), (2, 2, "a b L sB sA", (True, False)),
])
def test_two_engines(stage: int, accumulation: int, order: str, looksam: tuple[bool, bool]) -> None:
    run_on_ranks(1, train, stage, accumulation, order, looksam)

"""LookSAM over SGD in plain float64 on one process, for loops that are more than ``loss = engine(x, y)``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .training import Case, engine_for

LR, RHO, ALPHA, K = 0.1, 0.2, 0.7, 2
TOLERANCE = 1e-5  # as in test_oracle_grid.py


class Twin:
    """``module``: the model in float64. ``build`` makes one with the weights of ``build()``."""

    def __init__(self, build: Callable[[], nn.Module], looksam: bool = True) -> None:
        self.module = build().double()
        self.looksam, self.updates, self.v = looksam, 0, torch.zeros(())
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]

    def _gradient(self, losses: Callable[[nn.Module], list[Tensor]]) -> Tensor:
        of_window = losses(self.module)
        total = torch.stack(of_window).sum() / len(of_window)
        gradients = torch.autograd.grad(total, self.parameters)
        return torch.cat([g.reshape(-1) for g in gradients])

    def _move(self, by: Tensor) -> None:
        with torch.no_grad():
            for p, part in zip(self.parameters, by.split([p.numel() for p in self.parameters]), strict=True):
                p += part.view_as(p)

    def update(self, losses: Callable[[nn.Module], list[Tensor]]) -> None:
        """One update by the losses of a window's micro-batches, as a function of the model."""
        before = self._traces()
        u = g = self._gradient(losses)
        if self.looksam and self.updates % K == 0:
            after = self._traces()
            self._retrace(before)
            self._move(RHO * g / g.norm())
            u = self._gradient(losses)
            self._move(-RHO * g / g.norm())
            self._retrace(after)
            self.v = u - (u @ g) / (g @ g) * g
        elif self.looksam:
            u = g + ALPHA * g.norm() / self.v.norm() * self.v
        self._move(-LR * u)
        self.updates += 1

    def _traces(self) -> Any:
        """What the model's forward leaves behind in it, where its class tells."""
        return copy.deepcopy(self.module.traces()) if hasattr(self.module, "traces") else None

    def _retrace(self, traces: Any) -> None:
        if hasattr(self.module, "retrace"):
            self.module.retrace(copy.deepcopy(traces))

    def check(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                error = (weights[name].double() - p).norm() / p.norm()
                assert error < TOLERANCE, f"{name} is off by {error:.1e}"


def frozen(module: nn.Module) -> nn.Module:
    """A copy whose weights stay as they are now."""
    return copy.deepcopy(module).requires_grad_(False)


@contextmanager
def engine_of(build: Callable[[], nn.Module], stage: int, accumulation: int = 1, looksam: bool = True,
              ascent: str = "global", world: int = 1) -> Iterator[Any]:
    """The engine that a :class:`Twin` is the twin of."""
    case = Case(stage=stage, accumulation=accumulation, world=world, base="SGD", k=K, rho=RHO, alpha=ALPHA,
                ascent=ascent, options={"lr": LR, "momentum": 0.0, "weight_decay": 0.0})
    with engine_for(case, looksam, module=build()) as engine:
        yield engine

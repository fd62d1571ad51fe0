"""LookSAM over SGD in plain float64 on one process, for loops that are more than ``loss = engine(x, y)``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .training import TOLERANCE, Case, engine_for, master_weights

RHO, ALPHA, K, UPDATES = 0.2, 0.7, 2, 4
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


class Net(nn.Module):
    kept: tuple[str, ...] = ()  # attributes that its forward changes

    def __init__(self, seed: int = 3, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def traces(module: nn.Module) -> Any:
    """What a forward leaves behind, where it is more than gradients."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    with whole(frozen):
        return ({place: None if buffer is None else buffer.data for _, place, buffer in buffers_of(module)},
                [p.data.clone() for p in frozen],
                {name: getattr(module, name) for name in getattr(module, "kept", ())})


def buffers_of(module: nn.Module) -> list[tuple[nn.Module, tuple[str, str], Tensor | None]]:
    """Those that are None too: of which module, and where."""
    return [(m, (path, name), buffer) for path, m in module.named_modules() for name, buffer in m._buffers.items()]


def whole(parameters: Iterable[nn.Parameter]) -> Any:
    """Inside, those that ZeRO-3 has partitioned can be read and written to."""
    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=0)


def retrace(module: nn.Module, left: Any) -> None:
    buffers, frozen, kept = left
    vars(module).update(kept)
    for m, (path, name), _ in buffers_of(module):
        m._buffers[name] = None if buffers[path, name] is None else buffers[path, name].clone()
    for p, value in zip((p for p in module.parameters() if not p.requires_grad), frozen, strict=True):
        p.data = value


def batches(micro_batches: int, tensors: int = 2) -> list[list[tuple[Tensor, ...]]]:
    """x, y and so on, float64 [4, 3] each, of every micro-batch of each window."""
    generator = torch.Generator().manual_seed(7)
    return [[tuple(torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(tensors))
             for _ in range(micro_batches)] for _ in range(UPDATES)]


class Twin:
    """``module``: what ``build`` makes, in float64. Which of its parameters require grad may change between updates,
    and the groups of ``optimizer``. ``edit``: what is done to it after each evaluation. ``apart``: every micro-batch
    has a perturbation of its own."""

    def __init__(self, build: Callable[[], nn.Module], looksam: bool = True,
                 edit: Callable[[Any], None] | None = None, apart: bool = False) -> None:
        self.module, self.looksam, self.edit, self.apart = build().double(), looksam, edit, apart
        self.optimizer = torch.optim.SGD([p for p in self.module.parameters() if p.requires_grad], **SGD)
        self.updates = 0
        self.v: dict[nn.Parameter, Tensor] = {}

    def _gradient(self, losses: Callable[[Any], list[Tensor]], part: slice = slice(None)) -> dict[nn.Parameter, Tensor]:
        self.module.zero_grad()
        of_window = losses(self.module)
        self.micro_batches = len(of_window)
        (torch.stack(of_window[part]).sum() / len(of_window)).backward()
        if self.edit is not None:
            self.edit(self)
        return {p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.module.parameters()
                if p.requires_grad}

    def update(self, losses: Callable[[Any], list[Tensor]]) -> None:
        """One update by the losses of a window's micro-batches, as a function of the model."""
        before = copy.deepcopy(traces(self.module))
        u = g = self._gradient(losses)
        if self.looksam and self.updates % K == 0:
            after, clean = copy.deepcopy(traces(self.module)), {p: p.detach().clone() for p in g}
            u = {p: torch.zeros_like(p) for p in g}
            for part in [slice(i, i + 1) for i in range(self.micro_batches)] if self.apart else [slice(None)]:
                retrace(self.module, before)
                g_j = self._gradient(losses, part) if self.apart else g
                retrace(self.module, before)
                for p in g:
                    p.data += RHO / _length(g_j).clamp(min=1e-30) * g_j[p]
                for p, gradient in self._gradient(losses, part).items():
                    u[p] += gradient
                for p in g:
                    p.data.copy_(clean[p])
            retrace(self.module, after)
            along = sum((g[p] * u[p]).sum() for p in g) / _length(g)**2
            self.v = {p: u[p] - along * g[p] for p in g}
        elif self.looksam:
            v = {p: self.v.get(p, torch.zeros_like(p)) for p in g}
            u = {p: g[p] + ALPHA * _length(g) / _length(v) * v[p] for p in g}
        for p in self.module.parameters():
            p.grad = u.get(p)
        self.optimizer.step()
        self.updates += 1

    def check(self, engine: Any) -> None:
        """The engine's weights, and what its forwards have left behind."""
        expected = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
        pairs = zip(*(tree_leaves(tree) for tree in [(master_weights(engine), traces(engine.module)),
                                                     (expected, traces(self.module))]), strict=True)
        for got, of_twin in ((_state(one), _state(other)) for one, other in pairs):
            if isinstance(got, Tensor):
                error, length = (got.double() - of_twin).norm(), of_twin.double().norm()
                assert error <= TOLERANCE * length, f"off by {error / length:.1e}: {of_twin}"
            else:
                assert got == of_twin


def _state(leaf: Any) -> Any:
    """Of a generator or a module, of which a twin has another one."""
    if isinstance(leaf, torch.Generator):
        return leaf.get_state().double()
    if isinstance(leaf, nn.Module):
        return torch.cat([values.reshape(-1).double() for values in leaf.state_dict().values()])
    return leaf.bit_generator.state if isinstance(leaf, np.random.Generator) else leaf


def _length(parts: dict[nn.Parameter, Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts.values()]).norm()


def frozen(module: nn.Module) -> nn.Module:
    """A copy whose weights stay as they are now."""
    return copy.deepcopy(module).requires_grad_(False)


@contextmanager
def engine_of(build: Callable[[], nn.Module], stage: int, accumulation: int = 1, looksam: bool = True,
              **case: Any) -> Iterator[Any]:
    """The engine that a :class:`Twin` is the twin of."""
    with engine_for(Case(**{"world": 1, **case}, stage=stage, accumulation=accumulation, base="SGD", k=K, rho=RHO,
                         alpha=ALPHA, options=SGD), looksam, module=build()) as engine:
        yield engine

"""LookSAM on one page: one process, whole tensors, one torch optimizer underneath. No DeepSpeed, and nothing is fast.

For readers, and for ``python -m ds_looksam verify``, which holds a run of several ranks to it. Source: Liu, Mai, Chen,
Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022 (arXiv 2203.02714). Ours, and not
in the paper: ``alpha`` "auto", ``rho_schedule``, param groups with a rho, alpha or layerwise of their own, and windows
of several groups (docs/algorithm.md).

    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    looksam = Reference(base, k=5, rho=0.05)
    looksam.update([[lambda: loss(model(x), y)]])       # instead of zero_grad, backward, step

A vector of the paper's is a list of tensors here, one per parameter in the optimizer's order: the paper's "layers".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[], Tensor]
"""The loss of one micro-batch at the weights as they stand. Called twice it must give the same: seed dropout inside."""
Vector = list[Tensor]


class Reference:
    """LookSAM around a torch optimizer.

    Args:
        base: takes the step. Its parameters may be of any dtype; with float64 everything is computed in float64. Keys
            ``rho``, ``alpha`` and ``layerwise`` of its param groups come before the arguments of these names.
        k: every k-th update is a SAM step.
        rho: length of the perturbation.
        alpha: strength of the reuse, a number or "auto".
        layerwise: Look-LayerSAM.
        layer_scale: its divisor s: "norm", "relative" or "gradient".
        rho_schedule: the JSON key of this name; see :func:`rho_factor`.
        clipping: largest norm of what the base gets; 0: any.
        v_dtype: what g_v is rounded to between SAM steps; None: nothing.

    Attributes:
        t: updates so far. evaluations: gradients of whole windows so far. v, beta: what reuse steps go by.
    """

    def __init__(self, base: torch.optim.Optimizer, *, k: int = 5, rho: float = 0.05, alpha: float | str = "auto",
                 layerwise: bool = False, layer_scale: str = "norm", rho_schedule: Mapping[str, Any] | None = None,
                 clipping: float = 0.0, v_dtype: torch.dtype | None = None) -> None:
        self.base, self.k, self.layer_scale, self.clipping, self.v_dtype = base, k, layer_scale, clipping, v_dtype
        self.schedule = dict(rho_schedule or {})
        for group in base.param_groups:
            group.setdefault("rho", rho)
            group.setdefault("alpha", alpha)
            group.setdefault("layerwise", layerwise)
        self.first_lrs = [float(group["lr"]) for group in base.param_groups]
        self.t, self.evaluations = 0, 0
        self.v: Vector | None = None
        self.beta: float | None = None

    def update(self, window: Sequence[Sequence[Loss]]) -> None:
        """Algorithm 1, one turn.

        Args:
            window: the micro-batches of one update, of all ranks. Those of one group share one perturbation: a single
                group is the paper's algorithm, a group per rank "m-SAM".
        """
        off = self.schedule.get("off_updates", 0)
        per_group = [self.gradient(group) for group in window]
        g = mean(per_group, window)
        self.evaluations += 1
        if self.t < off:
            u = g
        elif (self.t - off) % self.k == 0:
            u = self.sam(g, per_group, window)
        else:
            u = self.reuse(g)
        self.t += 1

        norm = length(u)
        if 0 < self.clipping < norm:
            u = [x * (self.clipping / (norm + 1e-6)) for x in u]  # the 1e-6 is DeepSpeed's and torch's
        for p, x in zip(self.parameters, u, strict=True):
            p.grad = x
        self.base.step()

    def sam(self, g: Vector, per_group: list[Vector], window: Sequence[Sequence[Loss]]) -> Vector:
        """A SAM step: u = g_s, the gradient at w + eps; and g_v, its part across g, is kept."""
        perturbed = [self.gradient(group, self.perturbation(g_j))
                     for group, g_j in zip(window, per_group, strict=True)]
        g_s = mean(perturbed, window)
        self.evaluations += 1
        # g_h = (<g, g_s> / ‖g‖²) g and g_v = g_s - g_h. With d = g_s - g the same, without cancellation at a small rho.
        d = [s - x for s, x in zip(g_s, g, strict=True)]
        along = dot(g, d) / dot(g, g) if dot(g, g) > 0 else 0.0
        g_v = [y - along * x for y, x in zip(d, g, strict=True)]

        if self.v is not None:
            lengths = length(self.v) * length(g)
            b = dot(self.v, g_v) / lengths if lengths > 0 else 0.0  # how much of g_v the old v would have given
            self.beta = b if self.beta is None else 0.8 * self.beta + 0.2 * b
        self.v = [x.to(self.v_dtype or x.dtype).to(x.dtype) for x in g_v]
        return g_s

    def reuse(self, g: Vector) -> Vector:
        """A reuse step: u = g + alpha (‖g‖ / ‖g_v‖) g_v, with max(beta, 0) for alpha "auto"."""
        if self.v is None or length(self.v) == 0:
            return g
        auto = max(self.beta or 0.0, 0.0)
        alphas = [auto if isinstance(group["alpha"], str) else group["alpha"] for group in self.groups]
        ratio = length(g) / length(self.v)
        return [x + alpha * ratio * v for x, v, alpha in zip(g, self.v, alphas, strict=True)]

    def perturbation(self, g: Vector) -> Vector:
        """eps = rho g / ‖g‖; layer by layer eps = rho d / s with d_l = (‖w_l‖ / ‖g_l‖) g_l."""
        if length(g) == 0:
            return g
        d, s = g, length(g)
        if any(group["layerwise"] for group in self.groups):
            ratios = [length([w]) / length([x]) if group["layerwise"] and length([w]) * length([x]) > 0 else 1.0
                      for w, x, group in zip(self.parameters, g, self.groups, strict=True)]
            d = [ratio * x for ratio, x in zip(ratios, g, strict=True)]
            s = {"norm": length(d), "relative": 1.0, "gradient": length(g)}[self.layer_scale]
        factors = [rho_factor(self.schedule, self.t, group["lr"], first_lr)
                   for group, first_lr in zip(self.base.param_groups, self.first_lrs, strict=True)
                   for _ in group["params"]]
        return [group["rho"] * factor / s * x
                for x, group, factor in zip(d, self.groups, factors, strict=True)]

    def gradient(self, losses: Sequence[Loss], eps: Vector | None = None) -> Vector:
        """The mean gradient of some micro-batches at w, or at w + eps; w is brought back as a copy, to the bit."""
        clean = [p.detach().clone() for p in self.parameters]
        total = [torch.zeros_like(p) for p in clean]
        with torch.no_grad():
            for p, e in zip(self.parameters, eps or [], strict=eps is not None):
                p.add_(e)
        for loss in losses:
            parts = torch.autograd.grad(loss(), self.parameters, allow_unused=True)
            total = [x if part is None else x + part / len(losses) for x, part in zip(total, parts, strict=True)]
        with torch.no_grad():
            for p, w in zip(self.parameters, clean, strict=True):
                p.copy_(w)
        return total

    @property
    def parameters(self) -> Vector:
        return [p for group in self.base.param_groups for p in group["params"]]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param group of each parameter."""
        return [group for group in self.base.param_groups for _ in group["params"]]


def rho_factor(schedule: Mapping[str, Any], t: int, lr: float, first_lr: float) -> float:
    """What rho is multiplied by at update t, when the group's learning rate is ``lr``.

    ``schedule``: the keys of the JSON's ``rho_schedule``; ``first_lr``: the group's learning rate as configured.
    """
    kind = schedule.get("type", "constant")
    if kind == "constant":
        return 1.0
    if kind == "lr":
        return float(lr) / (schedule.get("lr") or first_lr)
    progress = min((t - schedule.get("off_updates", 0)) / schedule["updates"], 1.0)
    if kind == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    start, end = schedule.get("start", 1.0), schedule.get("end", 1.0)
    return start + (end - start) * progress


def mean(vectors: Sequence[Vector], window: Sequence[Sequence[Loss]]) -> Vector:
    """Of one vector per group, each weighted by the group's number of micro-batches."""
    micro_batches = sum(len(group) for group in window)
    weighted = [[x * (len(group) / micro_batches) for x in vector]
                for vector, group in zip(vectors, window, strict=True)]
    return [torch.stack(parts).sum(dim=0) for parts in zip(*weighted, strict=True)]


def dot(a: Vector, b: Vector) -> float:
    return sum(float((x.detach().double() * y.detach().double()).sum()) for x, y in zip(a, b, strict=True))


def length(a: Vector) -> float:
    return math.sqrt(dot(a, a))

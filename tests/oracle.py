"""LookSAM written down naively: the whole model is one float64 vector on one process.

Shares nothing with the package, and knows nothing of ranks: a window is the list of every rank's micro-batches. Each
line below is a line of Algorithm 1 (Liu et al. 2022, arXiv 2203.02714), or of the definitions of alpha "auto" and of
ascent groups, parts of the window with a perturbation of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Gradient = Callable[[Tensor, Any], Tensor]
"""(weights float64 [n], window) -> gradient float64 [n] of the window's loss."""


@dataclass
class Group:
    """Hyper-parameters of one param group, and the names of its parameters."""

    names: Sequence[str]
    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    rho: float = 0.05
    alpha: float | str = "auto"
    layerwise: bool = True
    trust_ratio: bool = True
    trust_coefficient: float = 0.001
    bias_correction: bool = True
    min_coeff: float = 0.0
    max_coeff: float = math.inf
    nesterov: bool = False


class Base:
    """Optimizers on one vector with per-element hyper-parameters: AdamW, Adam with L2 regularisation, SGD with
    (heavy-ball or Nesterov) momentum, Adagrad, Lion, LAMB and LARS; Muon with AdamW for what is no matrix.

    ``layers``: where each parameter tensor lies in the vector, and its group; ``shapes``: those of the tensors.
    """

    def __init__(self, name: str, groups: Sequence[Group], group_of: Tensor,
                 layers: Sequence[tuple[slice, Group]] = (), shapes: Sequence[Sequence[int]] = ()) -> None:
        self.name, self.groups, self.group_of, self.layers, self.shapes = name, groups, group_of, layers, shapes
        self.m: Tensor | None = None
        self.s: Tensor | None = None
        self.steps = 0

    def of_group(self, value: Callable[[Group], float]) -> Tensor:
        return torch.tensor([value(g) for g in self.groups], dtype=torch.float64)[self.group_of]

    def orthogonalise(self, u: Tensor) -> Tensor:
        """Muon's part that comes before the step, and on ZeRO before clipping: momentum (Nesterov's) and Newton-Schulz,
        one matrix after the other (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""
        if self.name != "Muon":
            return u
        if self.m is None:
            self.m = torch.zeros_like(u)
        new = u.clone()
        for (at, group), shape in zip(self.layers, self.shapes, strict=True):
            if len(shape) >= 2:
                b = group.momentum
                self.m[at] = b * self.m[at] + (1 - b) * u[at]
                matrix = ((1 - b) * u[at] + b * self.m[at]).view(shape[0], -1)
                scale = math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
                new[at] = scale * newton_schulz(matrix).reshape(-1)
        return new

    def muon(self, w: Tensor, u: Tensor) -> Tensor:
        adamw, new = self.adamw.step(w, u), w.clone()
        for (at, group), shape in zip(self.layers, self.shapes, strict=True):
            new[at] = (1 - group.lr * group.weight_decay) * w[at] - group.lr * u[at] if len(shape) >= 2 else adamw[at]
        return new

    def step(self, w: Tensor, u: Tensor) -> Tensor:
        self.steps += 1
        if self.name == "Muon":
            if self.steps == 1:
                self.adamw = Base("AdamW", self.groups, self.group_of)
            return self.muon(w, u)
        lr, decay = self.of_group(lambda g: g.lr), self.of_group(lambda g: g.weight_decay)
        if self.name == "SGD":
            u = u + decay * w
            momentum = self.of_group(lambda g: g.momentum)
            self.m = u if self.m is None else momentum * self.m + u
            return w - lr * torch.where(self.of_group(lambda g: g.nesterov) > 0, u + momentum * self.m, self.m)
        if self.name == "Adagrad":
            u = u + decay * w
            self.s = u * u if self.s is None else self.s + u * u
            return w - lr * u / (self.s.sqrt() + self.of_group(lambda g: g.eps))
        b1, b2 = self.of_group(lambda g: g.betas[0]), self.of_group(lambda g: g.betas[1])
        if self.name == "Lion":  # Chen et al. 2023 (arXiv 2302.06675), Algorithm 2
            m = torch.zeros_like(w) if self.m is None else self.m
            self.m = b2 * m + (1 - b2) * u
            return w - lr * ((b1 * m + (1 - b1) * u).sign() + decay * w)
        if self.name in ("AdamW", "Adam"):
            if self.m is None or self.s is None:
                self.m, self.s = torch.zeros_like(w), torch.zeros_like(w)
            if self.name == "Adam":
                u, decay = u + decay * w, torch.zeros_like(decay)
            self.m = b1 * self.m + (1 - b1) * u
            self.s = b2 * self.s + (1 - b2) * u * u
            m_hat, s_hat = self.m / (1 - b1**self.steps), self.s / (1 - b2**self.steps)
            return w - lr * decay * w - lr * m_hat / (s_hat.sqrt() + self.of_group(lambda g: g.eps))
        if self.name == "Lamb":
            return self.lamb(w, u)
        if self.name == "Lars":
            return self.lars(w, u)
        raise ValueError(self.name)

    def lamb(self, w: Tensor, u: Tensor) -> Tensor:
        """You et al. 2020 (arXiv 1904.00962), Algorithm 2, one tensor after the other."""
        if self.m is None or self.s is None:
            self.m, self.s = torch.zeros_like(w), torch.zeros_like(w)
        new = w.clone()
        for at, group in self.layers:
            b1, b2 = group.betas
            self.m[at] = b1 * self.m[at] + (1 - b1) * u[at]
            self.s[at] = b2 * self.s[at] + (1 - b2) * u[at] ** 2
            m, s = self.m[at], self.s[at]
            if group.bias_correction:
                m, s = m / (1 - b1**self.steps), s / (1 - b2**self.steps)
            r = m / (s.sqrt() + group.eps) + group.weight_decay * w[at]
            ratio = 1.0
            if group.trust_ratio and w[at].norm() > 0 and r.norm() > 0:
                ratio = min(max(float(w[at].norm() / r.norm()), group.min_coeff), group.max_coeff)
            new[at] = w[at] - group.lr * ratio * r
        return new

    def lars(self, w: Tensor, u: Tensor) -> Tensor:
        """You et al. 2017 (arXiv 1708.03888), Algorithm 1, one tensor after the other."""
        if self.m is None:
            self.m = torch.zeros_like(w)
        for at, group in self.layers:
            ratio = 1.0
            if group.trust_ratio and w[at].norm() > 0 and u[at].norm() > 0:
                ratio = group.trust_coefficient * float(
                    w[at].norm() / (u[at].norm() + group.weight_decay * w[at].norm()))
            self.m[at] = group.momentum * self.m[at] + group.lr * ratio * (u[at] + group.weight_decay * w[at])
        return w - self.m


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five steps of the quintic iteration that takes singular values near 1, with the published coefficients."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


@dataclass
class Oracle:
    """w, and everything that Algorithm 1 carries from one update to the next."""

    w: Tensor
    gradient: Gradient
    base: Base
    k: int
    clipping: float = 0.0
    layer_scale: str | None = None
    rho_factor: Callable[[int], float] = lambda t: 1.0
    groups_of: Callable[[Any], Sequence[Any]] | None = None
    """(window) -> its ascent groups, windows themselves; weighted by their lengths. None: the window is one."""
    off: int = 0
    t: int = 0
    v: Tensor | None = None
    beta: float | None = None
    evaluations: int = 0
    clipped: int = 0
    history: list[Tensor] = field(default_factory=list)
    stale_w: Tensor | None = None
    """What the first evaluation sees instead of w, where a run's model lags behind its optimizer at the start."""
    v_dtype: torch.dtype = torch.float64
    """What g_v is rounded to when it is stored."""
    divisor: float = 1.0
    """The base gets u / divisor."""
    orthogonalises_first: bool = True
    """With Muon, whether what is clipped is its update (ZeRO) or the gradient that it gets (ZeRO stage 0)."""
    amplification: float = 1.0
    """The largest alpha ‖g‖ / ‖g_v‖ of a reuse step: how much longer than it was computed g_v was added."""

    def update(self, window: Any) -> None:
        groups = [window] if self.groups_of is None else self.groups_of(window)
        g_of = self.evaluate([self.w if self.stale_w is None else self.stale_w] * len(groups), groups)
        self.stale_w = None
        g = average(g_of, groups)
        norm = g.norm()
        if self.t < self.off:
            u = g
        elif (self.t - self.off) % self.k == 0:
            g_s = average(self.evaluate([self.w + self.eps(g_j) for g_j in g_of], groups), groups)
            u = self.sam(g, norm, g_s)
        else:
            u = self.reuse(g, norm)
        u = u / self.divisor
        if self.orthogonalises_first:
            u = self.base.orthogonalise(u)
        if self.clipping > 0 and u.norm() > self.clipping:
            u = u * (self.clipping / (u.norm() + 1e-6))  # the 1e-6 is DeepSpeed's and torch's
            self.clipped += 1
        if not self.orthogonalises_first:
            u = self.base.orthogonalise(u)
        self.w = self.base.step(self.w, u)
        self.t += 1
        self.history.append(self.w)

    def eps(self, g: Tensor) -> Tensor:
        """The perturbation of the ascent group with this gradient."""
        rho = self.base.of_group(lambda group: group.rho) * self.rho_factor(self.t)
        if g.norm() == 0:
            return torch.zeros_like(g)
        return rho * g / g.norm() if self.layer_scale is None else rho * self.layerwise_direction(g)

    def sam(self, g: Tensor, norm: Tensor, g_s: Tensor) -> Tensor:
        g_h = (g @ g_s) / norm**2 * g if norm > 0 else torch.zeros_like(g)
        g_v = g_s - g_h
        if g_v.norm() < 1e-12 * g_s.norm():
            g_v = torch.zeros_like(g)  # what is left is the rounding of this difference
        if self.v is not None:
            divisor = self.v.norm() * norm
            b = float(self.v @ g_v / divisor) if divisor > 0 else 0.0
            self.beta = b if self.beta is None else 0.8 * self.beta + 0.2 * b
        self.v = g_v.to(self.v_dtype).double()
        return g_s

    def layerwise_direction(self, g: Tensor) -> Tensor:
        """d / s of Look-LayerSAM, one tensor after the other."""
        d = g.clone()
        for at, group in self.base.layers:
            if group.layerwise and self.w[at].norm() > 0 and g[at].norm() > 0:
                d[at] = self.w[at].norm() / g[at].norm() * g[at]
        return d / {"norm": d.norm(), "relative": 1.0, "gradient": g.norm()}[self.layer_scale]

    def reuse(self, g: Tensor, norm: Tensor) -> Tensor:
        if self.v is None or self.v.norm() == 0:
            return g
        beta = max(self.beta, 0.0) if self.beta is not None else 0.0
        alpha = self.base.of_group(lambda group: beta if group.alpha == "auto" else float(group.alpha))
        self.amplification = max(self.amplification, float(alpha.max() * norm / self.v.norm()))
        return g + alpha * (norm / self.v.norm()) * self.v

    def evaluate(self, at: Sequence[Tensor], groups: Sequence[Any]) -> list[Tensor]:
        """Each group's gradient at its own weights; together one evaluation, as they are one window."""
        self.evaluations += 1
        return [self.gradient(w, group) for w, group in zip(at, groups, strict=True)]


def average(gradients: Sequence[Tensor], groups: Sequence[Any]) -> Tensor:
    """The gradient of the window from those of its groups, which count by their lengths."""
    if len(groups) == 1:
        return gradients[0]
    total = sum(len(group) for group in groups)
    return torch.stack([len(group) / total * g for g, group in zip(gradients, groups, strict=True)]).sum(dim=0)


class ModuleGradient:
    """The gradient of a torch module's loss over a window, as one float64 vector.

    Args:
        module: gives its loss when called with a micro-batch. It is converted to ``dtype``.
        names: the parameters that make up the vector, in this order.
        dtype: float64 for the exact gradient. A lower one computes as a mixed-precision run does: weights are cast to
            it, the loss is multiplied by ``loss_scale`` and each micro-batch's gradient comes out in it.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], dtype: torch.dtype = torch.float64,
                 loss_scale: float = 1.0, autocast: torch.dtype | None = None) -> None:
        self.module = module.to(dtype)
        parameters = dict(module.named_parameters())
        self.parameters = [parameters[name] for name in names]
        self.dtype, self.loss_scale, self.autocast = dtype, loss_scale, autocast

    def __call__(self, w: Tensor, window: Sequence[Sequence[Tensor]]) -> Tensor:
        offset = 0
        for p in self.parameters:
            p.data = w[offset:offset + p.numel()].view_as(p).to(self.dtype)
            offset += p.numel()
        total = torch.zeros_like(w)
        for micro_batch in window:
            inputs = [t.to(self.dtype) if t.is_floating_point() else t for t in micro_batch]
            with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                loss = self.module(*inputs) * self.loss_scale
            grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            total += torch.cat([
                torch.zeros(p.numel(), dtype=torch.float64) if g is None else g.double().reshape(-1)
                for p, g in zip(self.parameters, grads, strict=True)
            ]) / self.loss_scale
        return total / len(window)


def build(module: nn.Module, groups: Sequence[Group], *, base: str, k: int, clipping: float = 0.0,
          dtype: torch.dtype = torch.float64, loss_scale: float = 1.0, autocast: torch.dtype | None = None,
          layer_scale: str | None = None) -> Oracle:
    """An oracle for the trainable parameters of ``module`` that ``groups`` name; starts from the module's weights."""
    parameters = dict(module.named_parameters())
    names = [name for group in groups for name in group.names]
    w = torch.cat([parameters[name].detach().double().reshape(-1) for name in names])
    group_of = torch.cat([torch.full((parameters[name].numel(), ), i)
                          for i, group in enumerate(groups) for name in group.names])
    layers, offset = [], 0
    for group in groups:
        for name in group.names:
            layers.append((slice(offset, offset + parameters[name].numel()), group))
            offset += parameters[name].numel()
    return Oracle(w=w, gradient=ModuleGradient(module, names, dtype, loss_scale, autocast), k=k, clipping=clipping,
                  base=Base(base, groups, group_of, layers, [parameters[name].shape for name in names]),
                  layer_scale=layer_scale)


def rho_factor(schedule: dict[str, Any]) -> Callable[[int], float]:
    """What rho is multiplied by at update t, for schedules that do not look at the learning rate."""
    start, end = schedule.get("start", 1.0), schedule.get("end", 1.0)
    length, off = schedule.get("updates", 1), schedule.get("off_updates", 0)

    def linear(t: int) -> float:
        return end if t >= off + length else start + (end - start) * (t - off) / length

    def cosine(t: int) -> float:
        return end if t >= off + length else end + (start - end) * (1 + math.cos(math.pi * (t - off) / length)) / 2

    return {"constant": lambda t: 1.0, "linear": linear, "cosine": cosine}[schedule.get("type", "constant")]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖ over all elements; infinite where anything is not finite."""
    error = float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())
    return error if math.isfinite(error) else math.inf

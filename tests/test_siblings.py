"""Twelve more surprises between an engine's forward and its step. Weights against LookSAM in float64, or a refusal whose
way out is walked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from .ranks import RankError, run_on_ranks
from .test_loops import Net, batches
from .training import Case, engine_for, master_weights
from .twin import ALPHA, RHO, K, LR, Twin


class Knobs(Net):
    """Its forward depends on attributes that a loop may set, and counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.settings, self.calls = 1.0, {"shift": 0.0}, 0

    def forward(self, x: Tensor, fails: bool = False) -> Tensor:
        self.calls += 1
        if fails:
            raise ValueError
        return self.body(x) / self.temperature + self.settings["shift"] + 0.2 * self.calls

    def traces(self) -> Any:
        return self.temperature, self.settings, self.calls

    def retrace(self, traces: Any) -> None:
        self.temperature, self.settings, self.calls = traces


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(3, 3) for _ in range(4)]
        self.body = nn.Sequential(self.body, spectral_norm(layers[0]), nn.Tanh(), weight_norm(layers[1]), nn.Tanh(),
                                  parametrizations.spectral_norm(layers[2]), nn.Tanh(),
                                  parametrizations.weight_norm(layers[3]))

    def traces(self) -> Any:
        return {name: b.clone() for name, b in self.named_buffers()}

    def retrace(self, traces: Any) -> None:
        for name, b in self.named_buffers():
            b.data.copy_(traces[name])


class Noisy(Net):
    def forward(self, x: Tensor, torch_noise: torch.Generator, more: dict[str, Any]) -> Tensor:
        noise = torch.rand(3, generator=torch_noise, dtype=torch.float64)
        return self.body(x * (noise + torch.from_numpy(more["numpy"].random(3))).to(x.dtype))


def inside(m: Any) -> Any:
    return getattr(m, "module", m)


TARGETS: dict[Any, Tensor] = {}


def plain(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x), y)


def attributes_set(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).temperature = 1.0 + i
    return plain(m, i, x, y)


def contents_set(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).settings["shift"] = 0.5 * i
    return plain(m, i, x, y)


def evaluated_in_between(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    with torch.inference_mode():
        m(x)
    return plain(m, i, x, y)


def hook_for_one_forward(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    handle = inside(m).body[0].register_forward_hook(lambda module, args, out: out * (1 + i))
    out = m(x)
    handle.remove()
    return F.mse_loss(out, y)


def submodule_swapped(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).body[1] = nn.Sigmoid() if i else nn.Tanh()
    return plain(m, i, x, y)


def layer_frozen(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).body[0].requires_grad_(i == 0)
    out = m(x)
    inside(m).body[0].requires_grad_(True)
    return F.mse_loss(out, y)


def generator_in_loss(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(i)
    out = m(x)
    mask = torch.bernoulli(torch.full_like(out, 0.5, dtype=torch.float32) + 0 * out.detach().float(), generator=g)
    return F.mse_loss(out * mask, y)


def generators_in_inputs(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x, torch.Generator().manual_seed(i), {"numpy": np.random.default_rng(i)}), y)


def inner_loop(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    names, weights = zip(*inside(m).named_parameters())
    gradient = torch.autograd.grad(F.mse_loss(inside(m)(x), y), weights, create_graph=True)
    fast = {name: w - 0.5 * g for name, w, g in zip(names, weights, gradient)}
    return F.mse_loss(out, y) + F.mse_loss(torch.func.functional_call(inside(m), fast, (x,)), y)


def checkpointed(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return checkpoint(lambda out: F.mse_loss(out.tanh().exp(), y), m(x), use_reentrant=False)


def deep_copied(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    key = y.dtype, round(y[0, 0].item(), 5)
    if key not in TARGETS:
        TARGETS[key] = copy.deepcopy(inside(m))(2 * x).detach()
    return F.mse_loss(out, y) + F.mse_loss(out, TARGETS[key])


def compiled(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return torch.compile(lambda out, y: ((out - y) ** 2).mean() + out.abs().mean(), backend="aot_eager")(m(x), y)


def empty(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    n = 4 if i == 0 else 0
    return F.mse_loss(m(x[:n]), y[:n], reduction="sum") / 4


def fails_then_again(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    try:
        m(x, True)
    except ValueError:
        pass
    try:
        plain(m, i, x, y[:, :2])
    except RuntimeError:
        pass
    return plain(m, i, x, y)


def penalised(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    return F.mse_loss(out, y) + 0.1 * sum(p.abs().sum() + p.square().sum() for p in inside(m).parameters())


def retained(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    out.retain_grad()
    h = out.tanh()
    h.retain_grad()
    return F.mse_loss(h, y)


def averaged(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    loss = plain(m, i, x, y)
    average = [torch.zeros_like(p) for p in inside(m).parameters()]
    with torch.no_grad():
        for a, p in zip(average, inside(m).parameters()):
            a.mul_(0.9).add_(p, alpha=0.1)
    return loss


class Auxiliary(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[:2](x)
        self.auxiliary = hidden.square().mean()
        return self.body[2](hidden)


def auxiliary(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x), y) + inside(m).auxiliary


class Queued(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.queue


def buffer_set(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).queue.fill_(float(i))
    return plain(m, i, x, y)


def buffer_rebound(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).queue = torch.full((3, ), float(i))
    return plain(m, i, x, y)


def watched_by_hooks(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    weight = inside(m).body[0].weight
    handle = weight.register_hook(lambda g: 3 * g)
    HANDLES.append(handle)
    return plain(m, i, x, y)


HANDLES: list[Any] = []


def clip_value(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    mod = inside(m)
    if not hasattr(mod, "hooked"):
        mod.hooked = True
        mod.body[0].weight.register_hook(lambda g: 3 * g)
        mod.body[2].register_full_backward_hook(lambda module, gin, gout: (gin[0] * 0.5, ))
    return plain(m, i, x, y)


def node_hook(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    out.grad_fn.register_prehook(lambda g: (g[0] * (1 + i), ))
    return F.mse_loss(out, y)


def param_swapped_mean(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    """Reads the model's weights into the loss without grad."""
    out = m(x)
    return F.mse_loss(out, y) / (1 + inside(m).body[0].weight.detach().norm())


def multinomial(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    action = torch.multinomial(out.detach().float().softmax(-1).round(decimals=1) * 0 + 1, 1, generator=torch.Generator().manual_seed(3 + i))
    return -(out.log_softmax(-1).gather(1, action) * y[:, :1]).mean()


def saved_on_cpu(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return plain(m, i, x, y)


LOSSES = {"auxiliary": (auxiliary, Auxiliary), "buffer_set": (buffer_set, Queued), "buffer_rebound": (buffer_rebound, Queued)}
LOSSES |= {f.__name__: (f, Net) for f in (clip_value, node_hook, param_swapped_mean, multinomial, saved_on_cpu)}
LOSSES |= {f.__name__: (f, Knobs) for f in (attributes_set, contents_set, evaluated_in_between, fails_then_again)}
LOSSES |= {f.__name__: (f, Net) for f in (hook_for_one_forward, submodule_swapped, layer_frozen, generator_in_loss, inner_loop,
    checkpointed, deep_copied, compiled, empty, penalised, retained, averaged)}
LOSSES |= {"normed": (plain, Normed), "generators_in_inputs": (generators_in_inputs, Noisy)}


def case_of(stage: int, accumulation: int, ascent: str = "global") -> Case:
    return Case(stage=stage, accumulation=accumulation, world=1, base="SGD", k=K, rho=RHO, alpha=ALPHA, ascent=ascent,
                options={"lr": LR, "momentum": 0.0, "weight_decay": 0.0})


def train(name: str, stage: int, accumulation: int, ascent: str = "global") -> None:
    loss, build = LOSSES[name]
    twin = Twin(build)
    TARGETS.clear()
    with engine_for(case_of(stage, accumulation, ascent), module=build()) as engine:
        for window in batches(accumulation):
            for i, (x, y) in enumerate(window):
                engine.backward(loss(engine, i, x.float(), y.float()))
                engine.step()
            twin.update(lambda m, window=window: [loss(m, i, x, y) for i, (x, y) in enumerate(window)])
        twin.check(master_weights(engine))


@pytest.mark.parametrize("stage, accumulation, ascent", [(0, 2, "global"), (2, 2, "rank"), (2,1,"micro_batch")])
@pytest.mark.parametrize("name", LOSSES)
def test_siblings(name: str, stage: int, accumulation: int, ascent: str) -> None:
    run_on_ranks(1, train, name, stage, accumulation, ascent)

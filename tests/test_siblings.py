"""What loops do to the model between two forwards of a window, and other surprises before a step. Weights against
LookSAM in float64, or a refusal whose way out is walked."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from ds_looksam import LookSAMReplayError

from .ranks import run_on_ranks
from .test_loops import Net, batches
from .training import master_weights
from .twin import Twin, engine_of

TARGETS: dict[Any, Tensor] = {}


class Knobs(Net):
    """Its forward depends on what a loop may set in it, and on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.settings, self.calls = 1.0, {"shift": 0.0}, 0
        self.register_buffer("queue", torch.zeros(3))

    def forward(self, x: Tensor, fails: bool = False) -> Tensor:
        self.calls += 1
        if fails:
            raise ValueError
        return self.body(x) / self.temperature + self.settings["shift"] + 0.2 * self.calls + self.queue

    def traces(self) -> Any:
        return self.temperature, self.settings, self.calls, self.queue

    def retrace(self, traces: Any) -> None:
        self.temperature, self.settings, self.calls, self.queue = traces


class Normed(Net):
    """Weights computed from others, with buffers of a power iteration."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = (nn.Linear(3, 3) for _ in range(4))
        self.body = nn.Sequential(self.body, spectral_norm(a), nn.Tanh(), weight_norm(b), nn.Tanh(),
                                  parametrizations.spectral_norm(c), nn.Tanh(), parametrizations.weight_norm(d))

    def traces(self) -> Any:
        return dict(self.named_buffers())

    def retrace(self, traces: Any) -> None:
        for name, buffer in self.named_buffers():
            buffer.data.copy_(traces[name])


class Noisy(Net):
    def forward(self, x: Tensor, torch_noise: torch.Generator, more: dict[str, Any]) -> Tensor:
        noise = torch.rand(3, generator=torch_noise, dtype=torch.float64)
        return self.body(x * (noise + torch.from_numpy(more["numpy"].random(3))).to(x.dtype))


class Auxiliary(Net):
    """Leaves a part of its loss in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[:2](x)
        self.auxiliary = hidden.square().mean()
        return self.body[2](hidden)


def inside(m: Any) -> Any:
    return getattr(m, "module", m)


def plain(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x), y)


# What a loop sets for one micro-batch, ``i`` being its number in the window ------------------------------------------


def attributes(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).temperature = 1.0 + i
    inside(m).settings["shift"] = 0.5 * i
    return plain(m, i, x, y)


def buffer_in_place(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).queue.fill_(float(i))
    return plain(m, i, x, y)


def buffer_rebound(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).queue = torch.full((3, ), float(i))
    return plain(m, i, x, y)


def hook(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    handle = inside(m).body[0].register_forward_hook(lambda module, args, out: out * (1 + i))
    out = m(x)
    handle.remove()
    return F.mse_loss(out, y)


def submodule(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).body[1] = nn.Sigmoid() if i else nn.Tanh()
    return plain(m, i, x, y)


def frozen_layer(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    """As Lightning's toggle_optimizer does."""
    inside(m).body[0].requires_grad_(i == 0)
    out = m(x)
    inside(m).body[0].requires_grad_(True)
    return F.mse_loss(out, y)


def thawed_layer(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    inside(m).body[0].requires_grad_(i > 0)
    return plain(m, i, x, y)


# Forwards in between --------------------------------------------------------------------------------------------------


def inference(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    with torch.inference_mode():
        m(x)
    return plain(m, i, x, y)


def failures(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    """In the model, then in the loss; then the same micro-batch again."""
    with contextlib.suppress(ValueError):
        m(x, True)
    with contextlib.suppress(RuntimeError):
        plain(m, i, x, y[:, :2])
    return plain(m, i, x, y)


def two_in_one_loss(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    first = attributes(m, i, x, y)
    inside(m).queue = torch.full((3, ), 1.0 + i)
    return first + attributes(m, i + 1, 2 * x, y)


# Random numbers -------------------------------------------------------------------------------------------------------


def generator_in_loss(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    out, generator = m(x), torch.Generator().manual_seed(i)
    likely = 0.5 + 0 * out.detach().float()  # depends on the output, so that it is drawn in the second evaluation too
    return F.mse_loss(out * torch.bernoulli(likely, generator=generator), y)


def generators_in_inputs(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x, torch.Generator().manual_seed(i), {"numpy": np.random.default_rng(i)}), y)


# Gradients ------------------------------------------------------------------------------------------------------------


def hooks_on_gradients(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    """On a parameter and on a layer, for good."""
    if not hasattr(inside(m), "hooked"):
        inside(m).hooked = [
            inside(m).body[0].weight.register_hook(lambda g: 3 * g),
            inside(m).body[2].register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 0.5, ))]
    return plain(m, i, x, y)


def inner_loop(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    """MAML."""
    out, weights = m(x), dict(inside(m).named_parameters())
    gradients = torch.autograd.grad(F.mse_loss(inside(m)(x), y), list(weights.values()), create_graph=True)
    fast = {name: w - 0.5 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    return F.mse_loss(out, y) + F.mse_loss(torch.func.functional_call(inside(m), fast, (x, )), y)


# The loss -------------------------------------------------------------------------------------------------------------


def checkpointed(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return checkpoint(lambda out: F.mse_loss(out.tanh().exp(), y), m(x), use_reentrant=False)


def copy_as_teacher(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    """A copy of the weights as they are in the first evaluation: a model of its own."""
    out, key = m(x), (y.dtype, round(y[0, 0].item(), 5))
    if key not in TARGETS:
        TARGETS[key] = copy.deepcopy(inside(m))(2 * x).detach()
    return F.mse_loss(out, y) + F.mse_loss(out, TARGETS[key])


def empty(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    n = 4 if i == 0 else 0
    return F.mse_loss(m(x[:n]), y[:n], reduction="sum") / 4


def compiled(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return torch.compile(lambda out, y: ((out - y)**2).mean() + out.abs().mean(), backend="aot_eager")(m(x), y)


def auxiliary(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x), y) + inside(m).auxiliary


SITUATIONS: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module]]] = {
    **{f.__name__: (f, Knobs) for f in (attributes, buffer_in_place, buffer_rebound, inference, failures,
                                        two_in_one_loss)},
    **{f.__name__: (f, Net) for f in (hook, submodule, frozen_layer, thawed_layer, generator_in_loss,
                                      hooks_on_gradients, inner_loop, checkpointed, copy_as_teacher, empty)},
    "normed": (plain, Normed), "generators_in_inputs": (generators_in_inputs, Noisy),
}
# loss, model, and loss_fn with the module and the targets
WAYS_OUT: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module], Callable[[Any, Tensor, Tensor], Tensor]]] = {
    "compiled": (compiled, Net, lambda module, out, y: F.mse_loss(out, y) + out.abs().mean()),
    "auxiliary": (auxiliary, Auxiliary, lambda module, out, y: F.mse_loss(out, y) + module.auxiliary),
}


def train(name: str, stage: int, accumulation: int, ascent: str, world: int) -> None:
    loss, build = SITUATIONS[name]
    twin, rank = Twin(build), torch.distributed.get_rank()
    TARGETS.clear()
    with engine_of(build, stage, accumulation, ascent=ascent, world=world) as engine:
        for window in batches(world * accumulation):
            for i, (x, y) in enumerate(window[rank * accumulation:(rank + 1) * accumulation]):
                engine.backward(loss(engine, i, x.float(), y.float()))
                engine.step()
            twin.update(lambda m, window=window: [loss(m, n % accumulation, x, y) for n, (x, y) in enumerate(window)])
        twin.check(master_weights(engine))


@pytest.mark.parametrize("name, stage, accumulation, ascent, world", [
    *((name, *run, 1) for name in SITUATIONS for run in [(0, 2, "global"), (2, 2, "rank")]),
    # A perturbation for each micro-batch is the window's where that is one micro-batch.
    *((name, 2, 1, "micro_batch", 1) for name in ("inference", "failures", "hook", "generators_in_inputs", "normed",
                                                  "hooks_on_gradients", "inner_loop")),
    *((name, 2, 2, "global", 2) for name in ("hook", "frozen_layer", "generator_in_loss", "submodule")),
    *((name, 3, 2, "global", 1) for name in ("attributes", "buffer_in_place", "hook")),
    *((name, 0, 2, "rank", 1) for name in ("frozen_layer", "thawed_layer", "hook")),
])
def test_siblings(name: str, stage: int, accumulation: int, ascent: str, world: int) -> None:
    run_on_ranks(world, train, name, stage, accumulation, ascent, world)


def refused_then_trained(name: str, stage: int) -> str:
    """What the first step says. The loop goes on from that window, with a loss_fn that is given the targets too."""
    loss, build, loss_fn = WAYS_OUT[name]
    twin, message = Twin(build), ""
    with engine_of(build, stage, 1) as engine:
        for (x, y), in batches(1):
            x, y = x.float(), y.float()
            engine.backward(loss(engine, 0, x, y))
            try:
                engine.step()
            except LookSAMReplayError as error:
                message = str(error)
                engine.loss_fn = lambda out, x: loss_fn(engine.module, out, y)  # noqa: B023 - called in step()
                engine.step()
            twin.update(lambda m, x=x, y=y: [loss(m, 0, x.double(), y.double())])
        twin.check(master_weights(engine))
    return message


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name, reason", [("compiled", "CompiledFunctionBackward"),
                                          ("auxiliary", "kept by the model or a hook")])
def test_a_loss_fn_is_the_way_out(name: str, reason: str, stage: int) -> None:
    message, = run_on_ranks(1, refused_then_trained, name, stage)
    assert reason in message and "engine.loss_fn" in message


def accumulation_changes(ascent: str) -> None:
    """set_train_batch_size between two windows."""
    twin = Twin(Net)
    with engine_of(Net, 2, 2, ascent=ascent) as engine:
        for n, window in enumerate(batches(2)):
            window = window[:1 + n // 2] if ascent == "global" else window[:1]
            engine.set_train_batch_size(4 * len(window))
            for x, y in window:
                engine.backward(plain(engine, 0, x.float(), y.float()))
                engine.step()
            twin.update(lambda m, window=window: [plain(m, 0, x, y) for x, y in window])
        twin.check(master_weights(engine))


@pytest.mark.parametrize("ascent", ["global", "micro_batch"])
def test_the_accumulation_changes(ascent: str) -> None:
    run_on_ranks(1, accumulation_changes, ascent)


def steps_in_inference_mode(stage: int) -> None:
    twin = Twin(Net)
    with engine_of(Net, stage) as engine:
        for (x, y), in batches(1):
            engine.backward(plain(engine, 0, x.float(), y.float()))
            with torch.inference_mode():
                engine.step()
            twin.update(lambda m, x=x, y=y: [plain(m, 0, x, y)])
        twin.check(master_weights(engine))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_in_inference_mode(stage: int) -> None:
    run_on_ranks(1, steps_in_inference_mode, stage)


def autograd_backward() -> None:
    twin = Twin(Net)
    with engine_of(Net, 2, 1) as engine:  # DeepSpeed has no direct backward on stage 0
        for window in batches(1):
            for x, y in window:
                torch.autograd.backward([plain(engine, 0, x.float(), y.float())])
                engine.step()
            twin.update(lambda m, window=window: [plain(m, 0, x, y) for x, y in window])
        twin.check(master_weights(engine))


def test_autograd_backward() -> None:
    run_on_ranks(1, autograd_backward)

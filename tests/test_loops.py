"""What loops do to the model and between its forward and its step, and models in their forwards: each is a situation of
a public report, or its sibling. Weights against LookSAM in float64, or a refusal whose way out is walked."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.utils import cpp_extension
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from ds_looksam import LookSAMConfigError, LookSAMReplayError
from ds_looksam.engines.compile_lock import stale_locks, warn_of_stale_locks
from ds_looksam.engines.looksam import LookSAMEngine

from .inside import ascent as ascent_of
from .ranks import run_on_ranks
from .training import Case, engine_for
from .twin import SGD, UPDATES, K, Net, Twin, batches, engine_of, whole

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
TEACHERS: dict[Any, Tensor] = {}


def plain(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x), y)


def inside(m: Any) -> Any:
    return getattr(m, "module", m)


@dataclass
class Situation:
    """``loss(m, i, x, y)`` is of a window's micro-batch ``i``, ``m`` being the engine or the twin's module."""

    loss: Callable[..., Tensor] = plain
    build: Callable[[], Net] = Net
    sets: Callable[..., Any] | None = None  # f(module, i): what the loop sets in its model before that
    loop: Callable[..., Any] | None = None  # f(engine, i, x, y): instead of engine.backward(loss(engine, i, x, y))
    expected: Callable[..., Tensor] | None = None  # the twin's loss, where it is not ``loss``
    before: Callable[..., Any] | None = None  # f(side, update): what is done to engine and twin before a window
    way_out: Callable[..., Any] | None = None  # f(engine, now): instead of a step that was refused; now: latest x, y
    edit: Callable[..., Any] | None = None  # f(twin): what becomes of its gradients

    def loss_of(self, m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
        if self.sets is not None:
            self.sets(inside(m), i)
        return self.loss(m, i, x, y) if self.expected is None else self.expected(m, i, x, y)


def train(name: str, stage: int = 2, accumulation: int = 1, ascent: str = "global", world: int = 1,
          **case: Any) -> list[str]:
    """On a rank: what was refused. Without a way out the run ends there."""
    this, rank, told, now = SITUATIONS[name], torch.distributed.get_rank(), [], {}
    TEACHERS.clear()
    twin = Twin(this.build, edit=this.edit, apart=world == 1 and "micro_batch" in ascent)
    with engine_of(this.build, stage, accumulation, ascent=ascent, world=world, **case) as engine:
        for update, window in enumerate(batches(world * accumulation)):
            for side in (engine, twin) if this.before is not None else ():
                this.before(side, update)
            n = engine.gradient_accumulation_steps()
            window = window[:world * n]
            for i, (x, y) in enumerate((x.float(), y.float()) for x, y in window[rank * n:(rank + 1) * n]):
                now.update(x=x, y=y)
                if this.loop is None:
                    engine.backward(this.loss_of(engine, i, x, y))
                else:
                    this.loop(engine, i, x, y)
                torch.rand(5)  # since the forward, and not again in step()
                random = torch.get_rng_state()
                try:
                    engine.step()
                    assert torch.equal(random, torch.get_rng_state()), "what is drawn later is another number"
                except LookSAMReplayError as error:
                    told.append(str(error))
                    if this.way_out is None:
                        return told
                    this.way_out(engine, now)
            twin.update(lambda m, window=window, n=n: [this.loss_of(m, j % n, *xy) for j, xy in enumerate(window)])
        twin.check(engine)
        assert torch._C._len_torch_function_stack() == 0
    return told


# Models ---------------------------------------------------------------------------------------------------------------


class Knobs(Net):
    """Its forward depends on what a loop may set in it, and on how often it was called, and leaves a part of the loss.
    """

    kept = ("temperature", "settings", "calls", "training")

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.settings, self.calls = 1.0, {"shift": 0.0}, 0
        self.register_buffer("queue", torch.zeros(3))

    def forward(self, x: Tensor, fails: bool = False) -> Tensor:
        self.calls += 1
        if fails:
            raise ValueError
        out = self.body(x) / self.temperature + self.settings["shift"] + 0.2 * self.calls + self.queue
        self.auxiliary = out.square().mean()
        return out + 0.3 * self.training


class Caching(Net):
    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        z = self.body[:2](x)
        if cache is not None:
            cache.append(z)
        return self.body[2](sum(cache or [z]))


class Taught(Net):
    """Adds what a teacher says, which starts as a part of it."""

    def __init__(self, follows: bool = False) -> None:
        super().__init__()
        self.teacher, self.follows = copy.deepcopy(self.body[0]).requires_grad_(False), follows
        self.first = [p.detach().clone() for p in self.teacher.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        if self.follows:  # at first for nothing
            with torch.no_grad(), whole([*self.teacher.parameters(), *self.body[0].parameters()]):
                for p, student in zip(self.teacher.parameters(), self.body[0].parameters(), strict=True):
                    p.data.mul_(0.5).add_(student.data, alpha=0.5)
        return self.body(x) + self.teacher(x)[:, :3]


def teaches(how: str) -> Situation:
    """The loop changes the teacher between micro-batches."""
    def sets(module: Any, i: int) -> None:
        with torch.no_grad(), whole(module.teacher.parameters()):
            for p, first in zip(module.teacher.parameters(), module.first, strict=True):
                value = first.to(p.dtype) * (1 - 0.3 * i)
                if how == "in place":
                    p.copy_(value)
                elif how == "assigned":
                    p.data = value
                else:
                    p.data.copy_(value)

    return Situation(build=Taught, sets=sets)


class Deep(Net):
    """Its forward depends on what lies deep in its attributes, and in tensors and arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.parts = SimpleNamespace(inner={"shift": {"by": 0.0}}), (SimpleNamespace(shift=0.0), )
        self.scale, self.array = torch.ones(()), np.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.settings.inner["shift"]["by"] + self.parts[0].shift + torch.from_numpy(self.array).to(x.dtype)
        return self.body(x) * self.scale.to(x.dtype) + shift


def set_deeply(module: Any, i: int) -> None:
    module.settings.inner["shift"]["by"] = module.parts[0].shift = 0.3 * i
    module.scale.fill_(1.0 + i)
    module.array[:] = [i, 0.0, -i]


class Tiled(Net):
    """The backward of its loss runs inside its forward, and DeepSpeed does not divide the last layer's gradient."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return TiledFusedLogitsLoss.apply(lambda module, a, b: F.mse_loss(module.body[2](a), b), self,
                                          self.body[:2](x).unsqueeze(0), y.unsqueeze(0), None, 2,
                                          list(self.body[2].parameters()), "mean")


def undivided(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    weight, bias = (2 * p - p.detach() for p in m.body[2].parameters())
    return F.mse_loss(F.linear(m.body[:2](x), weight, bias), y)


class Noisy(Net):
    """Dropout by the global generator or by given ones, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, torch_noise: torch.Generator | None = None, more: Any = None) -> Tensor:
        noise = torch.rand(3, generator=torch_noise, dtype=torch.float64)
        if more is not None:
            noise += torch.from_numpy(more["numpy"].random(3))
        return self.norm(self.body(x * noise.to(x.dtype)))


class Checkpointed(Net):
    """Its activations are computed again in backward, with another dropout mask."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.body(x * torch.rand(3, dtype=torch.float64).to(x.dtype)), x,
                          use_reentrant=False, preserve_rng_state=False)


def draws(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    loss = plain(m, i, x, y)
    torch.rand(7)
    return loss


class Tracked(Net):
    """Dropout by a generator that DeepSpeed keeps by name."""

    def forward(self, x: Tensor) -> Tensor:
        with deepspeed.checkpointing.get_cuda_rng_tracker().fork("noise"):
            return self.body(x * torch.rand(3, dtype=torch.float64).to(x.dtype))


def seeds_tracked(module: Any, i: int) -> None:
    tracker = deepspeed.checkpointing.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("noise", i + 1)


class Quantized(Net):
    """Frozen weights in dtypes of which torch has no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.eight, self.none = (nn.Parameter(value, requires_grad=False) for value in [
            torch.arange(9, dtype=torch.uint8).view(3, 3), torch.randn(3, 3).to(torch.float8_e4m3fn),
            torch.empty(0, dtype=torch.int8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x @ self.whole.to(x.dtype) / 9) @ self.eight.to(x.dtype)


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.mul_(2))


class Normed(Net):
    """Weights computed from others, with buffers of a power iteration."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = (nn.Linear(3, 3) for _ in range(4))
        self.body = nn.Sequential(self.body, spectral_norm(a), nn.Tanh(), weight_norm(b), nn.Tanh(),
                                  parametrizations.spectral_norm(c), nn.Tanh(), parametrizations.weight_norm(d))


class Returning(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        out = self.body(x)
        return {"logits": out, "losses": (SimpleNamespace(loss=F.mse_loss(out, y)), )}


class Attributes:
    def __init__(self, x: Any, y: Any) -> None:
        self.tensors = {"x": x, "y": y}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attributes) and self.tensors == other.tensors


class Stateful(Net):
    """Everything that a forward may leave in its module beside gradients; the loss depends on all of it."""

    kept = ("hidden", "calls", "cache", "seen", "torch_noise", "numpy_noise", "helper")

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.slow = copy.deepcopy(self.body).requires_grad_(False), nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(3))
        self.hidden: Tensor | None = None
        self.calls, self.cache, self.seen = 0, {}, [1.0]
        self.torch_noise, self.numpy_noise = torch.Generator().manual_seed(1), np.random.default_rng(2)
        self.helper = Attributes(0, 0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            for t, p in zip(self.teacher.parameters(), self.body.parameters(), strict=True):
                t.data.mul_(0.9).add_(0.1 * p)  # unseen by its version counter
            self.slow.weight.data = 0.5 * self.slow.weight.data + 0.1 * self.body[0].weight.data[:3]
        self.calls += 1
        self.cache["scale"] = 0.5 * self.cache.get("scale", 1.0) + 0.1 * self.calls
        self.seen.append(self.cache["scale"])
        self.helper.tensors["x"] += 1
        noise = torch.rand(3, generator=self.torch_noise, dtype=torch.float64)
        noise += torch.from_numpy(self.numpy_noise.random(3))
        hidden = torch.zeros_like(x) if self.hidden is None else self.hidden
        out = self.body(x * noise.to(x.dtype)) + 0.1 * hidden + 0.1 * self.queue + 0.1 * self.slow(x)
        self.hidden = out.detach()
        self.queue.copy_(out.detach().mean(0))
        return F.mse_loss(out, y) * (self.cache["scale"] + 0.01 * self.helper.tensors["x"] + 0.01 * len(self.seen)) + (
            F.mse_loss(out, self.teacher(x)))


class Counter:
    """What a model may call: an augmentation, a schedule."""

    calls = 0
    __module__ = "antigravity"  # a user's package, named as one of Python's

    def __call__(self) -> float:
        self.calls += 1
        return 0.1 * self.calls

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counter) and self.calls == other.calls


sys.modules["antigravity"] = sys.modules[__name__]


class History(dict[str, float]):
    total = 0.0


class Hoarding(Net):
    """State in places where one may not look for it, and things that cannot be written to, or looked at, as they are.
    """

    kept = ("counter", "args", "deep", "apart", "history", "raw", "near", "turns", "ds_count", "trainer")

    def __init__(self) -> None:
        super().__init__()
        self.counter, self.args, self.deep = Counter(), argparse.Namespace(t=0), {"a": [{"b": {"c": {"t": 0}}}]}
        self.apart = [nn.BatchNorm1d(3, affine=False), copy.deepcopy(self.body)]  # no parts of it
        self.history, self.raw, self.turns = History(), bytearray(1), collections.OrderedDict(a=0.1, b=0.3)
        self.far = {"a": [[[[SimpleNamespace(t=0)]]]]}
        self.near = self.far["a"][0][0][0][0]
        self.ds_count, self.trainer = 0, SimpleNamespace(count=0)  # as DeepSpeed's and Lightning's
        self.odd = [weakref.proxy(self), {torch.ones(2): 1, torch.zeros(2): 2}, torch.eye(3).to_sparse(),
                    nn.LazyLinear(3)]
        self.center = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("mean", None)
        self.register_buffer("expanded", torch.ones(1, 3).expand(4, 3))
        self.register_buffer("grows", torch.ones(1))
        with torch.inference_mode():
            self.register_buffer("inferred", torch.ones(3))
        self.scripted = torch.jit.script(nn.Hardtanh())
        self.read_only, self.words = np.ones(3), {str(i): [i] for i in range(2000)}
        self.read_only.flags.writeable = False

    def forward(self, x: Tensor) -> Tensor:
        norm, teacher = (part.to(x.dtype) for part in self.apart)
        out = self.body(self.scripted(x) * self.expanded.to(x.dtype) + torch.tensor(self.read_only).to(x.dtype))
        with torch.no_grad():
            for p, student in zip(teacher.parameters(), self.body.parameters(), strict=True):
                p.mul_(0.5).add_(student, alpha=0.5)
            self.grows.resize_(3).fill_(1.0)
            self.mean = out.mean(0) if self.mean is None else 0.5 * self.mean + 0.5 * out.mean(0)
            self.center = nn.Parameter(0.5 * self.center + 0.5 * out.mean(0), requires_grad=False)
            norm(out)
            taught = teacher(x)
        self.args.t += 1
        self.deep["a"][0]["b"]["c"]["t"] += 1
        self.history.total += 0.1
        self.near.t += 1
        self.raw[0] += 1
        self.ds_count, self.trainer.count = self.ds_count + 1, self.trainer.count + 1
        self.turns.move_to_end(next(iter(self.turns)))
        self.last = BaseModelOutput(last_hidden_state=out.detach())
        shift = self.counter() + 0.1 * self.args.t + 0.1 * self.deep["a"][0]["b"]["c"]["t"] + self.history.total
        shift += 0.1 * self.near.t + 0.1 * self.raw[0] + next(iter(self.turns.values()))
        shift += 0.1 * self.ds_count + 0.1 * self.trainer.count
        return out * (1 + self.mean + self.center + norm.running_mean) + shift * taught + self.inferred


class Resettable(Net):
    """A hidden state that a loop resets, and generators that it seeds and makes anew."""

    kept = ("noise", "more")

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", None)
        self.register_buffer("scale", torch.ones(1, 3).expand(4, 3))
        self.register_buffer("shift", torch.zeros(3))
        self.noise, self.more = torch.Generator().manual_seed(1), {}

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(3, generator=self.noise, dtype=torch.float64) + torch.from_numpy(self.more["new"].random(3))
        out = self.body(x * noise.to(x.dtype))
        self.hidden = out.detach().mean(0) if self.hidden is None else 0.5 * self.hidden + out.detach().mean(0)
        return out * self.hidden * self.scale.to(x.dtype) + self.shift.to(x.dtype)


def resets(module: Any, i: int) -> None:
    module.hidden, module.more = None, {"new": np.random.default_rng(i)}
    module.scale, module.shift.data = torch.full((1, 3), 1.0 + i).expand(4, 3), torch.full((3, ), 0.1 * i)
    module.noise.manual_seed(i)


class Large(Net):
    """A state that is larger than what is copied of attributes, beside one that is not."""

    kept = ("small", )

    def __init__(self, as_buffer: bool, writes: bool = True) -> None:
        super().__init__()
        large, self.small = torch.zeros(65 << 18), torch.zeros(3)
        if as_buffer:
            self.register_buffer("large", large, persistent=False)
        else:
            self.large = large
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x) * (1 + self.small.to(x.dtype) + self.large[:3].to(x.dtype))
        self.small.mul_(0.5).add_(out.detach().mean(0))
        if self.writes:
            self.large[:3].add_(1.0)
        return out


class Conditioned(Net):
    """It takes what it has said, and keeps its last input."""

    def forward(self, x: Tensor, said: Tensor | None = None) -> Tensor:
        self.last = x
        return self.body(x) + (0 if said is None else torch.tanh(said))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x), y)


def carried(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    """Truncated backpropagation through time: a window is a sequence. What it says is logged."""
    TEACHERS["said"] = m(x, TEACHERS["said"].detach() if i else None)
    loss = F.mse_loss(TEACHERS["said"], y)
    assert loss.item() > 0
    return loss


class Remembering(Net):
    """It takes a cache and returns one, an object of objects."""

    def forward(self, x: Tensor, cache: Any = None) -> Any:
        out = self.body(x) + (0 if cache is None else torch.tanh(cache.layers[0].keys))
        return {"logits": out, "cache": SimpleNamespace(layers=[SimpleNamespace(keys=out.detach())])}


def remembers(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    TEACHERS["cache"] = (out := m(x, TEACHERS["cache"] if i else None))["cache"]
    return F.mse_loss(out["logits"], y)


def saves(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    """As a signal handler may, before the loss is formed."""
    out = engine(x)
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder)
        engine.save_16bit_model(folder)
    torch.save(engine.module.state_dict(), io.BytesIO())
    engine.backward(F.mse_loss(out, y))


def carried_with_loss_fn(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    engine.loss_fn = lambda out, x, said: F.mse_loss(out, 2 * x)
    engine.backward(carried(engine, i, x, 2 * x))


def double_buffered(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    """The next batch is read, into the memory of the last one, while this one is trained."""
    count = TEACHERS.setdefault("count", torch.zeros(()))
    this, other = (TEACHERS.setdefault(int(n % 2), torch.zeros(4, 3)) for n in (count, count + 1))
    assert (this == count).all(), "the loop's own data was written over"
    this.copy_(x)
    engine.backward(F.mse_loss(engine(this), y))
    count += 1
    other.fill_(count)


def labels_in_one_array(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    labels = TEACHERS.setdefault("labels", torch.from_numpy(np.zeros((4, 3), np.float32)))
    labels.numpy()[:] = y
    engine.backward(F.mse_loss(engine(x), labels))


# Losses and loops -----------------------------------------------------------------------------------------------------


class Losses:
    """Functions, called as ``f(m, i, x, y)``."""

    def skips_nan(m, i, x, y):
        assert torch.isnan(plain(m, i, x * float("nan"), y))
        return plain(m, i, x, y)

    def validates(m, i, x, y):
        m.eval()
        seen = plain(m, i, x[:2], y[:2])
        m.train()
        loss = plain(m, i, x, y)
        assert seen.item() != loss.item()
        return loss

    def measures_by_autograd(m, i, x, y):
        seen = x.clone().requires_grad_()
        out = m(x)
        # Not through the engine: DeepSpeed's hooks on its output take it for a backward, and fail.
        gradient, = torch.autograd.grad(inside(m)(seen).sum(), seen)
        loss = F.mse_loss(out, y)
        assert gradient.abs().sum().item() > 0
        return loss

    def another_models_backward(m, i, x, y):
        out, other = m(x), Net().to(x.dtype)
        other(x).mean().backward()
        loss = F.mse_loss(out, y)
        other(x).mean().backward()
        return loss

    def penalty(m, i, x, y):  # of the gradient, as in WGAN-GP
        out, seen = m(x), x.clone().requires_grad_()
        gradient, = torch.autograd.grad(inside(m)(seen).square().sum(), seen, create_graph=True)
        return F.mse_loss(out, y) + 0.1 * gradient.square().mean()

    def inner_loop(m, i, x, y):  # MAML
        out, weights = m(x), dict(inside(m).named_parameters())
        gradients = torch.autograd.grad(F.mse_loss(inside(m)(x), y), list(weights.values()), create_graph=True)
        fast = {name: w - 0.5 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
        return F.mse_loss(out, y) + F.mse_loss(torch.func.functional_call(inside(m), fast, (x, )), y)

    def hook(m, i, x, y):
        handle = inside(m).body[0].register_forward_hook(lambda module, args, out: out * (1 + i))
        out = m(x)
        handle.remove()
        return F.mse_loss(out, y)

    def hooks_on_gradients(m, i, x, y):  # of a parameter and of a layer, for good
        if not hasattr(inside(m), "hooked"):
            inside(m).hooked = [
                inside(m).body[0].weight.register_hook(lambda g: 3 * g),
                inside(m).body[2].register_full_backward_hook(lambda layer, grad_in, grad_out: (grad_in[0] * 0.5, ))]
        return plain(m, i, x, y)

    def frozen_layer(m, i, x, y):  # as Lightning's toggle_optimizer does
        inside(m).body[0].requires_grad_(i == 0)
        out = m(x)
        inside(m).body[0].requires_grad_(True)
        return F.mse_loss(out, y)

    def read_out(m, i, x, y):
        loss = plain(m, i, x, y)
        return torch.tanh(loss) if loss.item() > 0 else loss

    def elsewhere(m, i, x, y):
        m(x)
        return sum((p**4).sum() for p in inside(m).parameters())

    def generator_in_loss(m, i, x, y):
        out, generator = m(x), torch.Generator().manual_seed(i)
        likely = 0.5 + 0 * out.detach().float()  # depends on the output: drawn in the second evaluation too
        return F.mse_loss(out * torch.bernoulli(likely, generator=generator), y)

    def copy_as_teacher(m, i, x, y):  # of the weights as they are in the first evaluation: a model of its own
        out, key = m(x), (y.dtype, round(y[0, 0].item(), 5))
        if key not in TEACHERS:
            TEACHERS[key] = copy.deepcopy(inside(m))(2 * x).detach()
        return F.mse_loss(out, y) + F.mse_loss(out, TEACHERS[key])

    def own_target(m, i, x, y):  # of a forward without grad: as it was in the first evaluation
        out, key = m(x), (y.dtype, round(y[0, 0].item(), 5))
        with torch.no_grad():
            target = TEACHERS.setdefault(key, m(2 * x))
        return F.mse_loss(out, y) + F.mse_loss(out, target)

    def target_past_the_engine(m, i, x, y):
        out, key = m(x), (y.dtype, round(y[0, 0].item(), 5))
        with torch.no_grad():
            target = TEACHERS.setdefault(key, inside(m)(2 * x) + inside(m).body[0].weight.mean())
        return F.mse_loss(out, y) + F.mse_loss(out, target)

    def inference(m, i, x, y):
        with torch.inference_mode():
            m(x)
        return plain(m, i, x, y)

    def failures(m, i, x, y):  # in the model, then in the loss; then the same micro-batch again
        with contextlib.suppress(ValueError):
            m(x, True)
        with contextlib.suppress(RuntimeError):
            plain(m, i, x, y[:, :2])
        return plain(m, i, x, y)

    def two_in_one_loss(m, i, x, y):
        set_attributes(inside(m), i)
        first = plain(m, i, x, y)
        inside(m).queue = torch.full((3, ), 1.0 + i)
        set_attributes(inside(m), i + 1)
        return first + plain(m, i, 2 * x, y)


def measures_by_functorch(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    out = engine(x)
    torch.func.vmap(torch.func.grad(lambda xi: engine(xi).sum()))(x)
    engine.backward(F.mse_loss(out, y))
    torch.func.vmap(torch.func.grad(lambda xi: engine(xi).sum()))(x)


def freezes_before_step(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    """A layer that has a gradient in this window, and is trained again in the next one."""
    engine.module.body[0].requires_grad_(True)
    engine.backward(plain(engine, i, x, y))
    engine.module.body[0].requires_grad_(engine.looksam.updates == UPDATES - 1)


def steps_the_optimizer(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    torch.optim.lr_scheduler.StepLR(engine.basic_optimizer, 10)  # wraps step(), and must still find a method
    engine.backward(plain(engine, i, x, y))
    with pytest.raises(LookSAMReplayError, match=r"call engine.step\(\)"):
        engine.optimizer.step()


def accumulates_less_before_step(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    """A schedule of the batch size that is advanced when the window's gradient is complete."""
    engine.backward(plain(engine, i, x, y))
    if engine.is_gradient_accumulation_boundary():
        engine.set_train_batch_size(4)


def reads_gradients(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    """As a loop that logs them does."""
    from deepspeed.utils import safe_get_full_grad

    engine.backward(plain(engine, i, x, y))
    if engine.is_gradient_accumulation_boundary():
        for p in engine.module.parameters():
            gradient = safe_get_full_grad(p) if engine.zero_optimization() else p.grad
            assert gradient.norm() > 0


def changes_default_device(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    torch.set_default_device("cpu")
    loss = plain(engine, i, x, y)
    torch.set_default_device("cpu")
    engine.backward(loss)
    torch.set_default_device(None)


def fails_in_backward(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    """Before it reaches a parameter, and the micro-batch is tried again: out of memory, say, or Ctrl-C."""
    for backward, error in (engine.backward, ZeroDivisionError), (Tensor.backward, ZeroDivisionError), (
            engine.backward, KeyboardInterrupt):
        out = engine(x)
        out.register_hook(mock.Mock(side_effect=error))
        # DeepSpeed has no direct backward on stage 0, and "micro_batch", here on stage 2, refuses it.
        if backward == engine.backward or engine.zero_optimization_stage() in (1, 3):
            with pytest.raises(error):
                backward(2 * F.mse_loss(out, y))
    engine.backward(plain(engine, i, x, y))


def two_backwards(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
    out = engine(x)
    engine.backward(F.mse_loss(out, y), retain_graph=True)
    engine.backward(0.5 * out.square().mean())


def set_attributes(module: Any, i: int) -> None:
    module.temperature, module.settings["shift"] = 1.0 + i, 0.5 * i


def loss_fn(form: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[..., None]:
    """The way out by ``engine.loss_fn``, which needs the targets too."""
    def way_out(engine: Any, now: dict[str, Tensor]) -> None:
        engine.loss_fn = lambda out, x: form(engine.module, out, now["y"])
        engine.step()

    return way_out


def cached(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    cache: list[Tensor] = []
    return F.mse_loss(m(x, cache), y) + F.mse_loss(m(y, cache), x)


def through_itself(m: Any, i: int, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(inside(m).body(x)), y)


def closure(loss: Callable[..., Tensor]) -> Callable[..., None]:
    return lambda engine, now: engine.step(closure=lambda: engine.backward(loss(engine, 0, now["x"], now["y"])))


def gives_up(how: str, accumulation: int) -> Situation:
    """A window is given up by zero_grad(); with accumulation in its midst, where DeepSpeed drops the gradient there."""
    def loop(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
        if i < accumulation - 1 or accumulation == 1:
            engine.backward(plain(engine, i, 3 * x, y))
        if i == accumulation - 1:
            {"engine": engine, "optimizer": engine.optimizer, "module": engine.module}[how].zero_grad()
            engine.backward(plain(engine, i, x, y))

    return Situation(loop=loop, expected=lambda m, i, x, y: plain(m, i, x, y) * (i == accumulation - 1))


# Batches that change --------------------------------------------------------------------------------------------------


@dataclass
class Record:
    x: Any
    y: Any


class CalledRecord(Record):
    def __call__(self) -> None:
        pass


CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda x, y: {"x": x, "y": y}, "user dict": lambda x, y: collections.UserDict(x=x, y=y),
    "list": lambda x, y: [x, y], "record": Record, "attributes": Attributes,
    "deque": lambda x, y: collections.deque([x, y], maxlen=2),
    "callable": lambda x, y: SimpleNamespace(of=CalledRecord(x, y)),
    "objects": lambda x, y: SimpleNamespace(inner=SimpleNamespace(of=Record(x, y)))}


def held_by(batch: Any) -> Any:
    if isinstance(batch, SimpleNamespace):
        batch = getattr(batch, "inner", batch).of
    return getattr(batch, "tensors", vars(batch) if isinstance(batch, Record) else batch)


class OfBatch(Net):
    """Takes one argument that holds x and y; pops y from it if it can."""

    def forward(self, batch: Any) -> Tensor:
        held = held_by(batch)
        x, y = held if isinstance(held, (list, collections.deque)) else (held["x"], held["y"])
        if isinstance(batch, dict):
            batch.pop("y")
        return F.mse_loss(self.body(torch.as_tensor(x)), torch.as_tensor(y))


def of_batch(feed: Callable[[Tensor, Tensor], Any]) -> Situation:
    return Situation(build=OfBatch, loop=lambda engine, i, x, y: engine.backward(engine(feed(x, y))),
                     expected=lambda m, i, x, y: m([x, y]))


def refilled(kind: str) -> Situation:
    """One container is refilled for each micro-batch."""
    one = CONTAINERS[kind](None, None)

    def refill(x: Tensor, y: Tensor) -> Any:
        if kind in ("list", "deque"):
            one.clear()
            one.extend([x, y])
        else:
            held_by(one).update(x=x, y=y)
        return one

    return of_batch(refill)


def overwritten(kind: str) -> Situation:
    """One memory is written over for each micro-batch."""
    container, what = kind.split(" of ")
    arrays = [np.zeros((4, 3), np.float32) for _ in "xy"]
    tensors = [torch.from_numpy(array) for array in arrays]
    kept = CONTAINERS[container](*(arrays if what == "arrays" else tensors))

    def fill(*values: Tensor) -> Any:
        for memory, value in zip(tensors if what == "versions" else arrays, values, strict=True):
            memory[:] = value
        return kept

    return of_batch(fill)


# Between backward and step, and between updates -----------------------------------------------------------------------


def mask(side: Any) -> None:
    """The first rows of a layer's gradient are set to 0."""
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    weight, sharded = side.module.body[0].weight, not isinstance(side, Twin) and side.zero_optimization()
    gradient = safe_get_full_grad(weight) if sharded else weight.grad
    gradient[:3] = 0
    if sharded:
        safe_set_full_grad(weight, gradient)


def clip(side: Any) -> None:
    nn.utils.clip_grad_norm_(side.module.parameters(), 0.01)


def clip_data(side: Any) -> None:
    for p in side.module.parameters():
        p.grad.data.clamp_(-0.01, 0.01)


def scale_data(side: Any) -> None:
    """To length 1: what "rank" perturbs by, the gradient as it was before, points the same way."""
    gradients = [p.grad.data for p in side.module.parameters()]
    torch._foreach_div_(gradients, nn.utils.get_total_norm(gradients))


def coalesces(engine: Any, loss: Tensor) -> None:
    with engine.coalesce_grad_reduction():
        engine.backward(loss)


def edited(edit: Callable[[Any], None], backward: Callable[[Any, Tensor], Any] = lambda engine, loss: (
        engine.backward(loss)), when: str = "at last", again: bool = False) -> Situation:
    """By hand after the window's backward, which is refused; then by a hook too, which finds it done once. ``when``:
    or between two micro-batches, before or after the second one's forward. ``again``: the way out runs the window
    again."""
    def loop(engine: Any, i: int, x: Tensor, y: Tensor) -> None:
        loss = plain(engine, i, x, y)
        if i == 1 and when == "late in between":
            edit(engine)
        backward(engine, loss)
        is_due = {"at last": engine.is_gradient_accumulation_boundary(), "in between": i == 0}
        if is_due.get(when) and engine.edit_gradients is None:
            edit(engine)

    def way_out(engine: Any, now: dict[str, Tensor]) -> None:
        engine.edit_gradients = lambda: edit(engine)
        if again:
            with pytest.raises(LookSAMReplayError):
                engine.step()
            engine.zero_grad()
            loop(engine, 0, now["x"], now["y"])
        engine.step()

    return Situation(loop=loop, edit=edit, way_out=way_out if when == "at last" else None)


def swaps(side: Any, update: int) -> None:
    """Another layer is trained in each cycle."""
    for i, layer in ((0, side.module.body[0]), (1, side.module.body[2])):
        layer.requires_grad_(update // K % 2 == i)


def first_frozen() -> Net:
    net = Net()
    net.body[0].requires_grad_(False)
    return net


def adds(side: Any, update: int) -> None:
    side.module.body[0].requires_grad_(update >= 1)
    if update == 1:
        side.optimizer.add_param_group({"params": list(side.module.body[0].parameters()), "lr": 0.02})


def accumulates(micro_batches: Callable[[int], int]) -> Situation:
    return Situation(before=lambda side, update: isinstance(side, Twin) or side.set_train_batch_size(
        4 * micro_batches(update)))


# The tables -----------------------------------------------------------------------------------------------------------


REFILLED = [f"{kind}, refilled" for kind in CONTAINERS]
OVERWRITTEN = ["list of versions", "record of versions", "user dict of versions", "attributes of versions",
               "list of memory", "record of arrays"]
SITUATIONS: dict[str, Situation] = {
    **{name: Situation(loss, Knobs if name in ("inference", "failures", "two_in_one_loss") else Net)
       for name, loss in vars(Losses).items() if not name.startswith("_")},
    "measures_by_functorch": Situation(loop=measures_by_functorch),
    "steps_the_optimizer": Situation(loop=steps_the_optimizer),
    "autograd_backward": Situation(loop=lambda engine, i, x, y: torch.autograd.backward([plain(engine, i, x, y)])),
    "fails_in_backward": Situation(loop=fails_in_backward),
    "twice": Situation(lambda m, i, x, y: F.mse_loss(m(m(x)), y)),
    "two_views": Situation(lambda m, i, x, y: F.mse_loss(m(x), m(y).detach()) + F.l1_loss(m(2 * x), y)),
    "two_backwards": Situation(
        loop=two_backwards, expected=lambda m, i, x, y: plain(m, i, x, y) + 0.5 * m(x).square().mean()),
    "empty": Situation(lambda m, i, x, y: F.mse_loss(m(x[4 * i:]), y[4 * i:], reduction="sum") / 4),
    "checkpointed": Situation(lambda m, i, x, y: checkpoint(
        lambda out: F.mse_loss(out.tanh().exp(), y), m(x), use_reentrant=False)),
    "attributes": Situation(build=Knobs, sets=set_attributes),
    "mode": Situation(build=Knobs, sets=lambda module, i: module.train(i == 0)),
    "buffer_in_place": Situation(build=Knobs, sets=lambda module, i: module.queue.fill_(float(i))),
    "buffer_rebound": Situation(build=Knobs, sets=lambda module, i: setattr(
        module, "queue", torch.full((3, ), float(i)))),
    "submodule": Situation(sets=lambda module, i: setattr(module.body, "1", nn.Sigmoid() if i else nn.Tanh())),
    "thawed_layer": Situation(sets=lambda module, i: module.body[0].requires_grad_(i > 0)),
    "normed": Situation(build=Normed),
    "dropout": Situation(build=Noisy, sets=lambda module, i: torch.manual_seed(i)),
    "tracked": Situation(build=Tracked, sets=seeds_tracked), "in_place": Situation(build=InPlace),
    "freezes_before_step": Situation(loop=freezes_before_step),
    "generators_in_inputs": Situation(lambda m, i, x, y: F.mse_loss(
        m(x, torch.Generator().manual_seed(i), {"numpy": np.random.default_rng(i)}), y), Noisy),
    "stateful": Situation(lambda m, i, x, y: m(x, y), Stateful),
    "returned": Situation(lambda m, i, x, y: -((m(x, y)["losses"][0].loss / 3).mean().float() * torch.tensor(-0.5)),
                          Returning),
    **{f"zero_grad of {how}, {n}": gives_up(how, n) for how in ("engine", "optimizer", "module") for n in (1, 2)},
    **{name: refilled(name.partition(",")[0]) for name in REFILLED},
    **{name: overwritten(name) for name in OVERWRITTEN},
    "compiled": Situation(
        lambda m, i, x, y: torch.compile(lambda out, y: ((out - y)**2).mean() + out.abs().mean(),
                                         backend="aot_eager")(m(x), y),
        way_out=loss_fn(lambda module, out, y: F.mse_loss(out, y) + out.abs().mean())),
    "auxiliary": Situation(lambda m, i, x, y: F.mse_loss(m(x), y) + inside(m).auxiliary, Knobs,
                           way_out=loss_fn(lambda module, out, y: F.mse_loss(out, y) + module.auxiliary)),
    "read_out": Situation(Losses.read_out, way_out=loss_fn(lambda module, out, y: torch.tanh(F.mse_loss(out, y)))),
    "elsewhere": Situation(Losses.elsewhere, way_out=closure(Losses.elsewhere)),
    "taught inside": Situation(build=lambda: Taught(follows=True)),
    **{f"taught {how}": teaches(how) for how in ("in place", "assigned", "silently")},
    "deep": Situation(build=Deep, sets=set_deeply),
    "hoarding": Situation(build=Hoarding), "reset": Situation(build=Resettable, sets=resets),
    "large": Situation(build=lambda: Large(as_buffer=False)),
    "large, read": Situation(build=lambda: Large(as_buffer=False, writes=False)),
    "large buffer": Situation(build=lambda: Large(as_buffer=True)),
    "conditioned": Situation(lambda m, i, x, y: F.mse_loss(m(x, m(y).detach()), y), Conditioned),
    "carried": Situation(carried, Conditioned),
    "carried, loss_fn": Situation(loop=carried_with_loss_fn, build=Conditioned,
                                  expected=lambda m, i, x, y: carried(m, i, x, 2 * x)),
    "remembers": Situation(remembers, Remembering), "saves": Situation(loop=saves),
    "double_buffered": Situation(loop=double_buffered, build=Conditioned),
    "labels_in_one_array": Situation(loop=labels_in_one_array),
    "module_method": Situation(lambda m, i, x, y: inside(m).loss(x, y), Conditioned, way_out=closure(
        lambda m, i, x, y: inside(m).loss(x, y))),
    "tiled": Situation(loop=lambda engine, i, x, y: engine.backward(engine(x, y)), build=Tiled, expected=undivided),
    "through_itself": Situation(through_itself, way_out=closure(through_itself)),
    "cached": Situation(cached, Caching, way_out=closure(cached)),
    "masked": edited(mask), "clipped": edited(clip), "clipped .data": edited(clip_data),
    "scaled .data": edited(scale_data),
    "masked, direct": edited(mask, lambda engine, loss: loss.backward()), "masked, coalesced": edited(mask, coalesces),
    "masked, again": edited(mask, again=True),
    **{f"{name} {when}": edited(edit, when=when) for name, edit in (("masked", mask), ("clipped", clip))
       for when in ("in between", "late in between")},
    "draws_in_backward": Situation(draws, Checkpointed, sets=lambda module, i: torch.manual_seed(i)),
    "reads_gradients": Situation(loop=reads_gradients),
    "default_device": Situation(loop=changes_default_device),
    "normalized": Situation(lambda m, i, x, y: (loss := plain(m, i, x, y)) / loss.item()),
    "frozen": Situation(before=lambda side, update: side.module.body[0].requires_grad_(update < 1)),
    "unfrozen": Situation(before=lambda side, update: side.module.body[0].requires_grad_(update >= 1)),
    "swapped": Situation(before=swaps),
    "added": Situation(build=first_frozen, before=adds),
    "quantized": Situation(build=Quantized),
    "accumulates_less_before_step": Situation(loop=accumulates_less_before_step,
                                              before=accumulates(lambda update: 2).before),
    "accumulates_more": accumulates(lambda update: 1 + update // 2), "accumulates_less": accumulates(lambda update: 1),
}
SET = ["attributes", "buffer_in_place", "buffer_rebound", "inference", "failures", "two_in_one_loss", "hook",
       "submodule", "frozen_layer", "thawed_layer", "generator_in_loss", "hooks_on_gradients", "inner_loop",
       "checkpointed", "copy_as_teacher", "own_target", "target_past_the_engine", "empty", "normed",
       "generators_in_inputs"]
OWN = ["rank", "micro_batch", "global_micro_batch"]
ENGINE, OPTIMIZER, MODULE = "zero_grad of engine", "zero_grad of optimizer", "zero_grad of module"


@pytest.mark.parametrize("name, stage, accumulation, ascent, world", [
    (name, *run, *["global", 1][len(run) - 2:]) for names, runs in [
        (["skips_nan", "validates", "measures_by_functorch", "measures_by_autograd", "another_models_backward"],
         [(0, 2), (2, 1)]),
        (["skips_nan", "validates"], [(3, 1)]),
        (["fails_in_backward"], [(0, 2), (1, 2), (2, 1, "rank"), (3, 2), (2, 1, "micro_batch")]),
        # On ZeRO stages 2 and 3 DeepSpeed itself fails where a parameter's gradient comes twice.
        (["penalty", "two_views"], [(0, 1), (1, 2)]), (["twice"], [(0, 2), (1, 1)]), (["two_backwards"], [(0, 1)]),
        (SET, [(0, 2), (2, 2, "rank")]),
        # A perturbation for each micro-batch is the window's where that is one micro-batch.
        (["inference", "failures", "hook", "generators_in_inputs", "normed", "hooks_on_gradients", "inner_loop"],
         [(2, 1, "micro_batch")]),
        (["hook", "frozen_layer", "generator_in_loss", "submodule"], [(2, 2, "global", 2)]),
        (["attributes", "buffer_in_place", "hook"], [(3, 2)]), (["tracked"], [(2, 2)]),
        (["frozen_layer", "thawed_layer"], [(0, 2, "rank")]), (["thawed_layer"], [(0, 2, "micro_batch")]),
        (["freezes_before_step"], [*((stage, 2) for stage in range(4)), (0, 2, "rank"), (0, 2, "micro_batch")]),
        (["dropout", "mode"], [(stage, 2) for stage in range(4)]), (["draws_in_backward"], [(0, 1), (3, 1)]),
        (["default_device"], [(0, 2), (2, 1, "micro_batch")]),
        (["reads_gradients"], [(0, 2), (0, 1, "micro_batch"), (1, 1, "micro_batch"), (2, 1, "micro_batch"),
                               (3, 1, "global_micro_batch")]),
        # Stage 3 with accumulation: DeepSpeed itself fails in the GatheredParameters of a second forward.
        (["taught inside"], [(0, 2), (2, 1, "rank"), (3, 1)]),
        (["taught in place"], [(0, 2), (2, 2, "rank"), (3, 2), (3, 2, "global", 2), (2, 2, "micro_batch")]),
        (["taught assigned"], [(0, 2), (2, 2)]), (["taught silently"], [(2, 1), (2, 2, "micro_batch")]),
        (["deep"], [(0, 2), (2, 2, "rank"), (3, 2)]), (["hoarding"], [(0, 1), (0, 2), (2, 2, "rank")]),
        (["reset"], [(0, 2), (2, 2), (2, 2, "micro_batch")]), (["large, read", "large buffer"], [(2, 1)]),
        (["conditioned"], [(0, 2), (1, 1)]), (["carried"], [(0, 2), (2, 2), (3, 2)]),
        (["carried, loss_fn", "remembers"], [(0, 2), (2, 2)]), (["saves"], [(0, 1), (2, 2), (3, 1)]),
        (["double_buffered"], [(0, 1), (2, 1)]),
        (["tiled"], [(0, 2), (2, 2), (3, 2)]),
        (["stateful"], [(0, 1), (1, 2), (2, 1)]),
        (["returned", *REFILLED], [(2, 2)]),
        (["frozen", "unfrozen", "swapped", "added"], [(0, 2, "global", 2), (0, 2, "rank"), (0, 1, "micro_batch")]),
        (["quantized"], [(0, 1), (2, 1, "rank"), (3, 1)]),
        (["accumulates_less_before_step"], [(0, 2), (2, 2, "rank"), (3, 2), (2, 2, "micro_batch")]),
        (["accumulates_more"], [(2, 2)]), (["accumulates_less"], [(2, 2, "micro_batch")]),
        (["autograd_backward"], [(2, 1)]),  # DeepSpeed has no direct backward on stage 0
        (["steps_the_optimizer"], [(0, 1), (1, 1), (2, 1), (3, 1)]),
        ([f"{ENGINE}, 1"], [*((stage, 1) for stage in range(4)), *((2, 1, ascent) for ascent in OWN)]),
        ([f"{OPTIMIZER}, 1"], [*((stage, 1) for stage in range(4)), *((0, 1, ascent) for ascent in OWN)]),
        ([f"{ENGINE}, 2"], [(stage, 2, ascent) for stage in (0, 1) for ascent in ["global", *OWN]]),
        ([f"{OPTIMIZER}, 2"], [(3, 2)]),
        # In the other ascent modes the gradient is not in p.grad any more, so that module.zero_grad() shows nothing.
        ([f"{MODULE}, 1"], [(0, 1)]), ([f"{MODULE}, 2"], [(1, 2), (0, 2, "rank"), (1, 2, "rank")]),
    ] for name in names for run in runs])
def test_trained(name: str, stage: int, accumulation: int, ascent: str, world: int) -> None:
    assert run_on_ranks(world, train, name, stage, accumulation, ascent, world) == [[]] * world


@pytest.mark.parametrize("stage, accumulation, device", [(0, 1, "none"), (1, 2, "none"), (0, 1, "cpu")])
def test_a_window_is_given_up_where_nothing_is_offloaded_that_could_be(stage: int, accumulation: int,
                                                                       device: str) -> None:
    """DeepSpeed ignores the block at stage 0."""
    zero = {"offload_optimizer": {"device": device}}
    for how in (ENGINE, OPTIMIZER, MODULE) if stage == 0 and device == "none" else (ENGINE, ):
        assert run_on_ranks(1, partial(train, f"{how}, {accumulation}", stage, accumulation, zero=zero)) == [[]]


@pytest.mark.parametrize("name, words, case", [
    *((name, "was changed in place after its forward", {"accumulation": 2}) for name in OVERWRITTEN),
    *((name, words, {"stage": stage}) for stage in (0, 2) for name, words in [
        ("compiled", "CompiledFunctionBackward"), ("auxiliary", "kept by the model or a hook"),
        ("read_out", "read out to Python"), ("elsewhere", "does not depend on the output")]),
    # Stage 3 on one rank: DeepSpeed 0.19.8's safe_set_full_grad fails there where a tensor does not divide evenly.
    *(("masked", "was changed between", {"stage": stage, "accumulation": 2, "world": world})
      for stage, world in [(0, 2), (1, 2), (2, 2), (3, 1)]),
    *(("masked", "was changed between", {"stage": stage, "accumulation": 2, "world": world, "zero": OFFLOAD,
                                         "config": {"zero_force_ds_cpu_optimizer": False}})
      for stage, world in [(2, 2), (3, 1)]),
    ("clipped", "was changed between", {"stage": 0}), ("clipped .data", "was changed between", {"stage": 0}),
    ("scaled .data", "was changed between", {"stage": 0, "ascent": "rank"}),
    *((name, "was changed between", {"stage": stage}) for name in ("masked, direct", "masked, coalesced")
      for stage in (1, 2, 3)),
    *((f"{name} in between", "was changed between", {"stage": stage, "accumulation": 2})
      for name, stage in [("masked", 0), ("clipped", 0), ("masked", 1), ("clipped", 1), ("masked", 3),
                          ("masked late", 0), ("clipped late", 0)]),
    *(("masked, again", "call engine.zero_grad() and run this window again",
       {"stage": stage, "ascent": "global_micro_batch"}) for stage in range(4)),
    *(("through_itself", "reaches the model's own parameters", {"stage": stage}) for stage in range(4)),
    ("cached", "reaches the model's own parameters", {}),
    *(("taught silently", "changed through .data between two", {"stage": stage, "accumulation": 2})
      for stage in (0, 2)),
    ("large", "too large to be copied", {}), ("labels_in_one_array", "after the loss was formed", {"accumulation": 2}),
    *(("module_method", "no forward of the engine was seen", {"stage": stage, "ascent": ascent})
      for stage in (0, 2) for ascent in ("global", "rank")),
    ("normalized", "read out to Python", {}), ("in_place", "by the model's own forward", {}),
])
def test_refused(name: str, words: str, case: dict[str, Any]) -> None:
    way_out = {"was changed in place after its forward": "Give each forward its own tensors",
               "was changed between": "engine.edit_gradients",
               "call engine.zero_grad() and run this window again": "engine.edit_gradients",
               "by the model's own forward": "x = x.clone()", "too large to be copied": "Make it a buffer",
               "after the loss was formed": "Give each micro-batch its own tensors",
               "changed through .data between two": "in place under torch.no_grad()",
               "reaches the model's own parameters": "forward make it, or call engine.step(closure=...)"}
    for told in run_on_ranks(case.get("world", 1), partial(train, name, **case)):
        assert told and all(words in message and way_out.get(words, "engine.loss_fn") in message for message in told)


def refused_by_one(stage: int, ascent: str, what: str) -> str:
    """What a SAM step says on this rank where rank 1's loop alone does what is refused, in the first window. That is
    given up and run again."""
    rank, accumulation, said = torch.distributed.get_rank(), 1 if what == "reads" else 2, ""
    twin = Twin(Net, apart=ascent in ("rank", "micro_batch"))
    with engine_of(Net, stage, accumulation, ascent=ascent, world=2) as engine:
        for update, window in enumerate(batches(2 * accumulation)):
            own = [(x.float(), y.float()) for x, y in window[rank * accumulation:(rank + 1) * accumulation]]
            if update == 0:
                with pytest.raises(LookSAMReplayError) as refusal:
                    for i, xy in enumerate(own):
                        loss = plain(engine, i, *xy)
                        engine.backward(loss / loss.item() if what == "reads" and rank == 1 else loss)
                        if what != "reads" and i == (ascent != "global") and rank == 1:
                            {"clipped": clip, "clipped .data": clip_data}[what](engine)
                        engine.step()
                said = str(refusal.value)
                engine.zero_grad()
            for i, xy in enumerate(own):
                engine.backward(plain(engine, i, *xy))
                engine.step()
            twin.update(lambda m, window=window: [plain(m, 0, *xy) for xy in window])
        twin.check(engine)
    return said


@pytest.mark.parametrize("what, stage, ascent", [
    *((what, stage, "global") for what in ("clipped", "clipped .data") for stage in (0, 1)),
    ("clipped", 0, "micro_batch"), ("clipped .data", 0, "micro_batch"),
    *(("reads", stage, "global") for stage in (0, 2, 3)), ("reads", 2, "rank"), ("reads", 3, "global_micro_batch")])
def test_what_one_rank_refuses_all_refuse(what: str, stage: int, ascent: str) -> None:
    """One that raised alone would leave the others waiting for it in the next collective. DeepSpeed 0.19.8 keeps
    gradients between micro-batches where each rank can change its own on stages 0 and 1."""
    others, own = run_on_ranks(2, refused_by_one, stage, ascent, what)
    assert ("read out to Python" if what == "reads" else "was changed between") in own
    assert others == f"on rank 1: {own}"


def weight_normed() -> Net:
    net = Net()
    parametrizations.weight_norm(net.body[0])
    return net


def steps_within(stage: int, cached: bool) -> None:
    """A region of torch's: parametrized weights that are computed once in it, or inference mode."""
    build = weight_normed if cached else Net
    twin = Twin(build)
    with engine_of(build, stage) as engine:
        for (x, y), in batches(1):
            with parametrize.cached() if cached else contextlib.nullcontext():
                engine.backward(plain(engine, 0, x.float(), y.float()))
                with torch.inference_mode(not cached):
                    engine.step()
            twin.update(lambda m, x=x, y=y: [plain(m, 0, x, y)])
        twin.check(engine)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_within_a_region(stage: int, cached: bool) -> None:
    run_on_ranks(1, steps_within, stage, cached)


def taught(stage: int, ascent: str, looksam: bool) -> list[Tensor]:
    """The teacher, after updates whose second evaluations change nothing else."""
    with engine_for(Case(world=1, stage=stage, accumulation=2, base="SGD", options=SGD, k=K, rho=0.0, alpha=0.0,
                         ascent=ascent), looksam, module=Taught(follows=True)) as engine:
        for window in batches(2):
            for x, y in window:
                engine.backward(plain(engine, 0, x.float(), y.float()))
                engine.step()
        return [p.detach().clone() for p in engine.module.teacher.parameters()]


@pytest.mark.parametrize("stage, ascent", [(0, "global"), (2, "micro_batch"), (2, "global_micro_batch")])
def test_a_teacher_follows_once(stage: int, ascent: str) -> None:
    ours, of_base = (run_on_ranks(1, taught, stage, ascent, looksam)[0] for looksam in (True, False))
    assert all(map(torch.equal, ours, of_base))


# Where DeepSpeed has its say, and before the first step ---------------------------------------------------------------


def warned_of_freezing() -> list[str]:
    with mock.patch("ds_looksam.engines.looksam.log_dist") as log, engine_of(Net, 2) as engine:
        for update in range(6):
            SITUATIONS["frozen"].before(engine, update)
            engine.backward(plain(engine, 0, torch.ones(4, 3), torch.zeros(4, 3)))
            engine.step()
        return [call.args[0] for call in log.call_args_list if "requires_grad" in call.args[0]]


def test_other_stages_say_once_that_deepspeed_ignores_freezing() -> None:
    assert len(run_on_ranks(1, warned_of_freezing)[0]) == 1


def with_unused() -> Net:
    net = Net()
    net.unused = nn.Linear(5, 3)
    return net


def train_with_unused(ignored: bool) -> None:
    with engine_of(with_unused, 2, zero={**OFFLOAD, "ignore_unused_parameters": ignored}) as engine:
        engine.backward(plain(engine, 0, torch.ones(4, 3), torch.zeros(4, 3)))
        with contextlib.nullcontext() if ignored else pytest.raises(LookSAMConfigError, match="ignore_unused_param"):
            engine.step()


@pytest.mark.parametrize("ignored", [True, False])
def test_deepspeeds_check_for_unused_parameters_is_not_silenced(ignored: bool) -> None:
    run_on_ranks(1, train_with_unused, ignored)


def test_a_lock_that_a_killed_compilation_left_is_named(tmp_path: Path) -> None:
    build = tmp_path / "py311_cpu" / "fused_adam"
    build.mkdir(parents=True)
    for file in (build / "main.cpp", build / "lock"):
        file.touch()
        os.utime(file, (time.time() - 300, ) * 2)
    assert stale_locks(tmp_path) == [build / "lock"]
    (build / "fused_adam.o").touch()  # somebody is at work
    assert stale_locks(tmp_path) == []


def test_a_compilation_under_way_does_not_break_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files vanish while they are looked at."""
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)  # as in torch before 2.14
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "fused_adam" / "lock").mkdir(parents=True)  # the only entry, and no file any more
    warn_of_stale_locks()
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([Gone(folder)]))
    warn_of_stale_locks()


class Gone(type(Path())):  # type: ignore[misc]
    def is_file(self) -> bool:
        return True

    def stat(self, **_: Any) -> os.stat_result:
        raise FileNotFoundError(self)


class Own(Net):
    def loss_fn(self, out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y)


def trains_by_the_models_loss_fn() -> None:
    twin = Twin(Own)
    with engine_of(Own, 2) as engine:
        for (x, y), in batches(1):
            engine.backward(engine.loss_fn(engine(x.float()), y.float()))
            engine.step()
            twin.update(lambda m, x=x, y=y: [plain(m, 0, x, y)])
        twin.check(engine)


def test_the_models_own_loss_fn_is_found_on_the_engine() -> None:
    """As with DeepSpeed's; it is not taken for the one that a user sets."""
    run_on_ranks(1, trains_by_the_models_loss_fn)


def closure_with_a_target() -> str:
    """What is said where it makes its target itself; with that of the loop the run is the twin's."""
    twin, told = Twin(Net), ""
    with engine_of(Net, 2) as engine:
        for update, ((x, y), ) in enumerate(batches(1)):
            x, y = x.float(), y.float()

            def target(m: Any = engine, x: Tensor = x) -> Tensor:
                with torch.no_grad():
                    return m(2 * x)

            def loss(target: Tensor, m: Any = engine, x: Tensor = x, y: Tensor = y) -> Tensor:
                return F.mse_loss(m(x), y) + F.mse_loss(m(x), target)

            constant, of_twin = target(), target(twin.module, x.double())
            engine.backward(loss(constant))
            if update == 0:
                with pytest.raises(LookSAMReplayError) as error:
                    engine.step(closure=lambda: engine.backward(loss(target())))
                told = str(error.value)
            engine.step(closure=lambda c=constant: engine.backward(loss(c)))
            twin.update(lambda m, x=x, y=y, c=of_twin: [loss(c, m, x.double(), y.double())])
        twin.check(engine)
    return told


def test_a_closure_that_makes_a_constant_of_the_loss_is_told_to_take_the_first() -> None:
    (told, ) = run_on_ranks(1, closure_with_a_target)
    assert "under torch.no_grad()" in told and "take the value that your loop has computed before" in told


def goes_past_the_engine(stage: int) -> list[str]:
    """Forward and backward, in the first window; then only the forward, as the message says."""
    twin, told = Twin(Conditioned), []
    with engine_of(Conditioned, stage, ascent="rank") as engine:
        for update, ((x, y), ) in enumerate(batches(1)):
            loss = partial(engine.module.loss, x.float(), y.float())
            if update == 0:
                loss().backward()
                with pytest.raises(LookSAMReplayError) as error:
                    engine.step(closure=lambda loss=loss: engine.backward(loss()))
                told.append(str(error.value))
                engine.zero_grad()
            engine.backward(loss())
            engine.step(closure=lambda loss=loss: engine.backward(loss()))
            twin.update(lambda m, x=x, y=y: [m.loss(x, y)])
        twin.check(engine)
    return told


def test_a_rank_whose_gradient_was_not_heard_is_told_so() -> None:
    (told, ) = run_on_ranks(1, goes_past_the_engine, 0)[0]
    assert "neither engine(...) nor engine.backward(...) was called" in told and "\"global\"" in told


def listens_after_destroy(stage: int) -> bool:
    with engine_of(Net, stage, ascent="rank") as engine:
        engine(torch.ones(4, 3))
        assert ascent_of(engine)._own.is_listening
        engine.destroy()
        return ascent_of(engine)._own.is_listening


@pytest.mark.parametrize("stage", [0, 2])
def test_nothing_listens_to_the_model_of_an_engine_that_was_destroyed(stage: int) -> None:
    assert run_on_ranks(1, listens_after_destroy, stage) == [False]


def test_an_engine_that_could_not_be_built_is_cleaned_up_by_deepspeed() -> None:
    engine = LookSAMEngine.__new__(LookSAMEngine)
    nn.Module.__init__(engine)
    with mock.patch("deepspeed.runtime.engine.DeepSpeedEngine.destroy") as destroy:
        engine.destroy()
    assert destroy.called

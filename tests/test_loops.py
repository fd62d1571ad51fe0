"""What loops do between an engine's forward and its step, and models in their forwards. Weights against float64."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ranks import RankError, run_on_ranks
from .training import master_weights
from .twin import Twin, engine_of

UPDATES = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class WithLoss(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x), y)


def batches(accumulation: int) -> list[list[tuple[Tensor, Tensor]]]:
    """x, y float64 [4, 3] each, of every micro-batch of each window."""
    generator = torch.Generator().manual_seed(7)
    return [[(torch.randn(4, 3, generator=generator, dtype=torch.float64),
              torch.randn(4, 3, generator=generator, dtype=torch.float64)) for _ in range(accumulation)]
            for _ in range(UPDATES)]


def plain(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x), y)


# Forwards that are not trained, losses of several forwards, several backwards -----------------------------------------


def skips_nan(engine: Any, x: Tensor, y: Tensor) -> None:
    loss = plain(engine, x * float("nan"), y)
    if not torch.isnan(loss):
        engine.backward(loss)
    trains_plainly(engine, x, y)


def validates(engine: Any, x: Tensor, y: Tensor) -> None:
    engine.eval()
    seen = plain(engine, x[:2], y[:2])
    engine.train()
    loss = plain(engine, x, y)
    assert seen.item() != loss.item()
    engine.backward(loss)


def measures_by_functorch(engine: Any, x: Tensor, y: Tensor) -> None:
    out = engine(x)
    torch.func.vmap(torch.func.grad(lambda xi: engine(xi).sum()))(x)
    engine.backward(F.mse_loss(out, y))
    torch.func.vmap(torch.func.grad(lambda xi: engine(xi).sum()))(x)


def measures_by_autograd(engine: Any, x: Tensor, y: Tensor) -> None:
    seen = x.clone().requires_grad_()
    out = engine(x)
    # Through engine.module: DeepSpeed's hooks on an engine's output take it for a backward, and fail.
    gradient, = torch.autograd.grad(engine.module(seen).sum(), seen)
    engine.backward(F.mse_loss(out, y))
    assert gradient.abs().sum().item() > 0


def trains_plainly(engine: Any, x: Tensor, y: Tensor) -> None:
    engine.backward(plain(engine, x, y))


def another_models_backward(engine: Any, x: Tensor, y: Tensor) -> None:
    other = Net()
    out = engine(x)
    other(x).mean().backward()
    loss = F.mse_loss(out, y)
    other(x).mean().backward()
    engine.backward(loss)


def penalty(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """A gradient penalty, as in WGAN-GP."""
    out, seen = m(x), x.clone().requires_grad_()
    gradient, = torch.autograd.grad(getattr(m, "module", m)(seen).square().sum(), seen, create_graph=True)
    return F.mse_loss(out, y) + 0.1 * gradient.square().mean()


def twice(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(m(x)), y)


def two_views(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x), m(y).detach()) + F.l1_loss(m(2 * x), y)


def own_gradient(engine: Any, x: Tensor, y: Tensor) -> None:
    """Two backwards over one forward."""
    out = engine(x)
    engine.backward(F.mse_loss(out, y), retain_graph=True)
    engine.backward(0.5 * out.square().mean())


LOOPS: dict[str, tuple[Callable[..., None], Callable[..., Tensor]]] = {
    **{loop.__name__: (loop, plain) for loop in (skips_nan, validates, measures_by_functorch, measures_by_autograd,
                                                 another_models_backward)},
    **{loss.__name__: (lambda engine, x, y, loss=loss: engine.backward(loss(engine, x, y)), loss)
       for loss in (penalty, twice, two_views)},
    "own_gradient": (own_gradient, lambda m, x, y: plain(m, x, y) + 0.5 * m(x).square().mean()),
}


def run_loop(name: str, stage: int, accumulation: int) -> None:
    loop, loss = LOOPS[name]
    twin = Twin(Net)
    with engine_of(Net, stage, accumulation) as engine:
        for window in batches(accumulation):
            for x, y in window:
                loop(engine, x.float(), y.float())
                engine.step()
            twin.update(lambda m, window=window: [loss(m, x, y) for x, y in window])
        twin.check(master_weights(engine))
        assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("name, stage, accumulation", [
    *((name, stage, accumulation) for name in list(LOOPS)[:5] for stage, accumulation in [(0, 2), (2, 1)]),
    ("skips_nan", 3, 1), ("validates", 3, 1), ("penalty", 0, 1), ("penalty", 1, 2), ("twice", 0, 2), ("twice", 1, 1),
    ("two_views", 0, 1), ("two_views", 1, 2), ("own_gradient", 0, 1),
])
def test_loops(name: str, stage: int, accumulation: int) -> None:
    run_on_ranks(1, run_loop, name, stage, accumulation)


def zero_grad_instead_of_step(stage: int, accumulation: int, how: str, ascent: str = "global") -> None:
    """A window is given up by zero_grad(); with accumulation in its midst, where DeepSpeed drops the gradient there."""
    twin = Twin(Net)
    with engine_of(Net, stage, accumulation, ascent=ascent) as engine:
        for window in batches(1):
            (x, y), = window
            x, y = x.float(), y.float()
            trains_plainly(engine, 3 * x, y)
            if accumulation == 2:
                engine.step()
            {"engine": engine, "optimizer": engine.optimizer, "module": engine.module}[how].zero_grad()
            trains_plainly(engine, x, y)
            engine.step()
            twin.update(lambda m, window=window: [plain(m, x, y) / accumulation for x, y in window])
        twin.check(master_weights(engine))


@pytest.mark.parametrize("stage, accumulation, how", [
    *((stage, 1, how) for stage in (0, 1, 2, 3) for how in ("engine", "optimizer")), (0, 1, "module"),
    (0, 2, "engine"), (1, 2, "engine"), (1, 2, "module"), (3, 2, "optimizer"),
])
def test_gradients_that_are_thrown_away_are_not_replayed(stage: int, accumulation: int, how: str) -> None:
    run_on_ranks(1, zero_grad_instead_of_step, stage, accumulation, how)


@pytest.mark.parametrize("ascent", ["rank", "micro_batch", "global_micro_batch"])
@pytest.mark.parametrize("stage, accumulation, how", [(0, 2, "engine"), (1, 2, "engine"), (1, 2, "module"),
                                                      (0, 1, "optimizer"), (2, 1, "engine")])
def test_nor_in_any_ascent_mode(stage: int, accumulation: int, how: str, ascent: str) -> None:
    if how == "module" and ascent != "rank":
        pytest.skip("the gradient is not in p.grad any more, so that module.zero_grad() shows nothing")
    run_on_ranks(1, zero_grad_instead_of_step, stage, accumulation, how, ascent)


# Batches that change --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    x: Any
    y: Any


class Attributes:
    def __init__(self, x: Any, y: Any) -> None:
        self.tensors = {"x": x, "y": y}


def x_and_y(batch: Any) -> tuple[Tensor, Tensor]:
    batch = getattr(batch, "tensors", batch)
    if isinstance(batch, Record):
        return batch.x, batch.y
    return (batch["x"], batch["y"]) if hasattr(batch, "keys") else (batch[0], batch[1])


class OfBatch(Net):
    """Takes one argument that holds x and y; pops y from it if it can."""

    def forward(self, batch: Any) -> Tensor:
        x, y = x_and_y(batch)
        if isinstance(batch, dict) and "kept" not in batch:
            batch.pop("y")
        return F.mse_loss(self.body(torch.as_tensor(x)), torch.as_tensor(y))


def refilled(kind: str) -> Callable[[Tensor, Tensor], Any]:
    """Hands out one container, refilled for each micro-batch."""
    one: Any = {"dict": {"kept": True}, "list": [None, None], "user dict": collections.UserDict(),
                "record": Record(None, None), "attributes": Attributes(None, None)}.get(kind)

    def refill(x: Tensor, y: Tensor) -> Any:
        if kind == "popped":
            return {"x": x, "y": y}
        if kind == "list":
            one[:] = [x, y]
        elif kind == "record":
            one.x, one.y = x, y
        else:
            (one.tensors if kind == "attributes" else one).update(x=x, y=y)
        return one

    return refill


def overwritten(kind: str) -> Callable[[Tensor, Tensor], Any]:
    """Hands out one memory, written over for each micro-batch."""
    buffers = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32)
    x_buffer, y_buffer = (torch.from_numpy(b) for b in buffers)
    wrap = {"record": Record, "list": lambda x, y: [x, y], "attributes": Attributes,
            "user dict": lambda x, y: collections.UserDict(x=x, y=y)}.get(kind.split(" of ")[0])
    kept = wrap(*buffers) if kind.endswith("arrays") else wrap(x_buffer, y_buffer)

    def fill(x: Tensor, y: Tensor) -> Any:
        for buffer, tensor in zip(buffers, (x, y), strict=True):
            if kind.endswith("versions"):
                (x_buffer if buffer is buffers[0] else y_buffer).copy_(tensor)
            else:
                buffer[:] = tensor.numpy()
        return kept

    return fill


def run_batches(kind: str, change: Callable[[str], Callable[[Tensor, Tensor], Any]]) -> None:
    feed, twin = change(kind), Twin(Net)
    with engine_of(OfBatch, stage=2, accumulation=2) as engine:
        for window in batches(2):
            for x, y in window:
                engine.backward(engine(feed(x.float(), y.float())))
                engine.step()
            twin.update(lambda m, window=window: [plain(m, x, y) for x, y in window])
        twin.check(master_weights(engine))


@pytest.mark.parametrize("kind", ["popped", "dict", "list", "user dict", "record", "attributes"])
def test_containers_are_copied(kind: str) -> None:
    run_on_ranks(1, run_batches, kind, refilled)


@pytest.mark.parametrize("kind", ["list of versions", "record of versions", "user dict of versions",
                                  "attributes of versions", "list of memory", "record of arrays"])
def test_memory_that_is_written_over_is_noticed(kind: str) -> None:
    with pytest.raises(RankError, match="was changed in place after its forward"):
        run_on_ranks(1, run_batches, kind, overwritten)


# State in the module --------------------------------------------------------------------------------------------------


class Stateful(Net):
    """Everything that a forward may leave in its module beside gradients; the loss depends on all of it."""

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

    def traces(self) -> Any:
        return ([p.data for p in (*self.teacher.parameters(), *self.slow.parameters())], self.queue, self.hidden,
                self.calls, self.cache, self.seen, self.torch_noise.get_state(),
                self.numpy_noise.bit_generator.state, self.helper.tensors)

    def retrace(self, traces: Any) -> None:
        (frozen, self.queue, self.hidden, self.calls, self.cache, self.seen, torch_state,
         self.numpy_noise.bit_generator.state, self.helper.tensors) = traces
        self.torch_noise.set_state(torch_state)
        for p, value in zip((*self.teacher.parameters(), *self.slow.parameters()), frozen, strict=True):
            p.data = value


def run_stateful(stage: int, accumulation: int) -> None:
    twin = Twin(Stateful)
    with engine_of(Stateful, stage, accumulation) as engine:
        for window in batches(accumulation):
            for x, y in window:
                engine.backward(engine(x.float(), y.float()))
                engine.step()
            twin.update(lambda m, window=window: [m(x, y) for x, y in window])
        twin.check(master_weights(engine))
        frozen, queue, hidden, calls, cache, seen, *others = engine.module.traces()
        frozen64, queue64, hidden64, *exact = twin.module.traces()
        assert [calls, cache, seen, others[1:]] == [*exact[:3], exact[4:]] and torch.equal(others[0], exact[3])
        for got, expected in zip([*frozen, queue, hidden], [*frozen64, queue64, hidden64], strict=True):
            assert (got - expected).norm() < 1e-5 * expected.norm()  # as the weights


@pytest.mark.parametrize("stage, accumulation", [(0, 1), (1, 2), (2, 1)])
def test_state_in_the_module_is_that_of_one_evaluation(stage: int, accumulation: int) -> None:
    run_on_ranks(1, run_stateful, stage, accumulation)

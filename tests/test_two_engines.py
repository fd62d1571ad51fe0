"""Two engines in one process, whatever the order of their forwards, backwards and steps: a backward is of those engines
whose outputs it reaches, and of no other. Weights against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ds_looksam import LookSAMReplayError

from .ranks import run_on_ranks
from .twin import Net, Twin, batches, engine_of, frozen

BUILD = {"a": partial(Net, 1, 5), "b": partial(Net, 2, 7)}
OTHER = {"a": "b", "b": "a"}
BOTH = (True, True)


@contextmanager
def two_engines(stage: int, accumulation: int = 1, looksam: tuple[bool, bool] = BOTH) -> Iterator[Any]:
    with engine_of(BUILD["a"], stage, accumulation, looksam[0]) as a:
        with engine_of(BUILD["b"], stage, accumulation, looksam[1]) as b:
            yield a, b


def only_a(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """What a model learns by itself, and from the other one's output as it is."""
    return F.mse_loss(a, y) + 0.5 * F.l1_loss(torch.tanh(a), b.detach())


def together(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(a, y) + F.mse_loss(b, y) / 2 + (a * b).mean()


def loss_of(order: str, name: str, mine: Tensor, other: Tensor, y: Tensor) -> Tensor:
    if "AB" in order or "L" in order:
        return together(mine, other, y) if name == "a" else together(other, mine, y)
    return only_a(mine, other, y)


def train(stage: int, accumulation: int, order: str, looksam: tuple[bool, bool]) -> None:
    twins = {name: Twin(build, on) for (name, build), on in zip(BUILD.items(), looksam, strict=True)}
    with two_engines(stage, accumulation, looksam) as (a, b):
        engines = {"a": a, "b": b}
        for window in batches(accumulation):
            old = {name: frozen(twins[OTHER[name]].module) for name in twins}
            for x, y in window:
                x, y, out = x.float(), y.float(), {}
                for event in order.split():
                    mine, other = event[-1].lower(), OTHER.get(event[-1].lower())
                    if event in engines:
                        out[event] = engines[event](x)
                    elif event in ("AB", "L"):
                        loss = together(out["a"], out["b"], y)
                        a.backward(loss) if event == "AB" else loss.backward()
                    elif event.startswith("s"):
                        engines[mine].step()
                    else:
                        known = out[other] if other in out else engines[other].module(x).detach()
                        engines[mine].backward(only_a(out[mine], known, y))
            for name, twin in twins.items():
                twin.update(lambda m, name=name, other=old[name], window=window: [
                    loss_of(order, name, m(x), other(x), y) for x, y in window])
        for name, engine in engines.items():
            twins[name].check(engine)
        assert torch._C._len_torch_function_stack() == 0


ORDERS = ["a b A B sA sB", "b a B A sA sB", "a b B A sB sA", "a A b B sA sB", "a A sA b B sB"]
"""a, b: forwards; A, B: backwards of a loss for each; AB, L: of one loss of both, by A's engine or by the loss."""


@pytest.mark.parametrize("stage, accumulation, order, looksam", [
    *((stage, 1, order, BOTH) for stage in (0, 2) for order in ORDERS[:4]),
    (3, 1, ORDERS[1], BOTH), (1, 2, ORDERS[0], BOTH), (2, 2, ORDERS[2], BOTH), (1, 1, ORDERS[4], BOTH),
    (2, 1, ORDERS[0], (True, False)), (0, 2, ORDERS[3], (False, True)),
    *((stage, accumulation, f"a b {how} sA sB", BOTH) for stage, accumulation in [(1, 2), (2, 1), (3, 1)]
      for how in ("AB", "L")),
    (2, 1, "b a AB sB sA", BOTH), (1, 1, "a b AB sA sB", (False, True)), (2, 2, "a b L sB sA", (True, False)),
])
def test_two_engines(stage: int, accumulation: int, order: str, looksam: tuple[bool, bool]) -> None:
    run_on_ranks(1, train, stage, accumulation, order, looksam)


# Generator and discriminator ------------------------------------------------------------------------------------------

BCE = F.binary_cross_entropy_with_logits


def real_or_not(d: Any, real: Tensor, fake: Tensor, forwards: int = 1) -> Tensor:
    ones, zeros = torch.ones_like(real[:, :1]), torch.zeros_like(real[:, :1])
    if forwards == 2:
        return BCE(d(real)[:, :1], ones) + BCE(d(fake)[:, 1:2], zeros)
    out = d(torch.cat([real, fake]))
    return BCE(out[:4, :1], ones) + BCE(out[4:, 1:2], zeros)


def fooled(d: Any, fake: Tensor) -> Tensor:
    return BCE(d(fake)[:, :1], torch.ones_like(fake[:, :1]))


def critic_of(d: Any) -> Any:
    """DeepSpeed's stage 0 has no backward from another engine."""
    return d.module if d.zero_optimization_stage() == 0 else d


def drop_gradients(d: Any) -> None:
    """What the generator's backward has left there."""
    getattr(critic_of(d), "optimizer", d.module).zero_grad()


# DeepSpeed's stages 2 and 3 by themselves fail where one engine's output comes twice into one loss.
def train_gan(stage: int, accumulation: int, forwards: int, ways: str, looksam: tuple[bool, bool]) -> str:
    """On a rank: what was refused, if anything."""
    twin_g, twin_d = (Twin(build, on) for build, on in zip(BUILD.values(), looksam, strict=True))
    with two_engines(stage, accumulation, looksam) as (g, d):
        if "loss_fn" in ways:
            g.loss_fn = lambda fake, z: fooled(critic_of(d), fake)
            d.loss_fn = lambda out, x: real_or_not(lambda _: out, x[:4], x[4:])

        def d_backward(part: list[Any]) -> None:
            for real, z in part:
                with torch.no_grad():
                    fake = g(z)
                d.backward(real_or_not(d, real, fake, forwards))

        def g_backward(part: list[Any]) -> None:
            for _, z in part:
                g.backward(fooled(critic_of(d), g(z)))

        for window in batches(accumulation):
            window32 = [(real.float(), z.float()) for real, z in window]
            for engine, backward, name in ((d, d_backward, "d_closure"), (g, g_backward, "g_closure")):
                for batch in window32:
                    backward([batch])
                    try:
                        engine.step(**{"closure": partial(backward, window32)} if name in ways else {})
                    except LookSAMReplayError as error:
                        return str(error)
            drop_gradients(d)
            twin_d.update(lambda m, window=window: [real_or_not(m, real, twin_g.module(z).detach())
                                                    for real, z in window])
            critic_then = frozen(twin_d.module)
            twin_g.update(lambda m, window=window, d=critic_then: [fooled(d, m(z)) for _, z in window])
        twin_g.check(g)
        twin_d.check(d)
    return ""


@pytest.mark.parametrize("stage, accumulation, forwards, ways, looksam", [
    (0, 1, 1, "", BOTH), (0, 2, 2, "", BOTH), (1, 1, 1, "", BOTH), (1, 1, 2, "", BOTH), (1, 2, 2, "", BOTH),
    (2, 1, 1, "", (True, False)), (2, 1, 1, "", (False, True)), (2, 1, 1, "loss_fn", BOTH),
    (1, 1, 2, "g_closure d_closure", BOTH), (3, 1, 1, "g_closure", BOTH), (3, 1, 1, "loss_fn", BOTH),
    (3, 1, 1, "", (False, True)),
])
def test_generator_and_discriminator(stage: int, accumulation: int, forwards: int, ways: str,
                                     looksam: tuple[bool, bool]) -> None:
    assert run_on_ranks(1, train_gan, stage, accumulation, forwards, ways, looksam) == [""]


def test_a_discriminator_that_cannot_be_called_again_is_named() -> None:
    message, = run_on_ranks(1, train_gan, 3, 1, 1, "", BOTH)
    assert "another model under ZeRO stage 3" in message and "closure" in message


def discriminator_steps_first(stage: int) -> str:
    """What is said where the loss went through a model that has changed since; then the order that works."""
    with two_engines(stage) as (g, d):
        z = torch.ones(4, 3)
        g.backward(fooled(critic_of(d), g(z)))
        drop_gradients(d)
        d.backward(fooled(d, z))
        d.step()
        with pytest.raises(LookSAMReplayError) as raised:
            g.step()
        g.step(closure=lambda: g.backward(fooled(critic_of(d), g(z))))
        return str(raised.value)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_model_that_was_stepped_in_between_is_noticed(stage: int) -> None:
    assert "by another optimizer's step" in run_on_ranks(1, discriminator_steps_first, stage)[0]

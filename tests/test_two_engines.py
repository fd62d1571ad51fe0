"""Two engines in one process, whatever the order of their forwards, backwards and steps: a backward is of those engines
whose outputs it reaches, and of no other. Weights against float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ranks import RankError, run_on_ranks
from .training import master_weights
from .twin import Twin, engine_of, frozen

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

            def losses(m: nn.Module, name: str, old: Any = old, window: list[Batch] = window) -> list[Tensor]:
                other = old[{"A": "B", "B": "A"}[name]]
                if "AB" in events or "L" in events:
                    return [together(*((m(x), other(x)) if name == "A" else (other(x), m(x))), y) for x, y, _ in window]
                return [only_a(m(x), other(x), y) for x, y, _ in window]

            for name, twin in twins.items():
                twin.update(lambda m, name=name: losses(m, name))
        for name, engine in engines.items():
            twins[name].check(master_weights(engine))
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


# Generator and discriminator ------------------------------------------------------------------------------------------

BCE = F.binary_cross_entropy_with_logits


def real_or_not(d: Any, real: Tensor, fake: Tensor, forwards: int) -> Tensor:
    if forwards == 2:
        return BCE(d(real)[:, :1], torch.ones_like(real[:, :1])) + BCE(d(fake)[:, 1:2], torch.zeros_like(real[:, :1]))
    out = d(torch.cat([real, fake]))
    return BCE(out[:4, :1], torch.ones_like(out[:4, :1])) + BCE(out[4:, 1:2], torch.zeros_like(out[:4, :1]))


def fooled(d: Any, fake: Tensor) -> Tensor:
    return BCE(d(fake)[:, :1], torch.ones_like(fake[:, :1]))


# DeepSpeed's stages 2 and 3 by themselves fail where one engine's output comes twice into one loss.
def train_gan(stage: int, accumulation: int, forwards: int, ways: str, looksam: tuple[bool, bool]) -> None:
    twin_g, twin_d = Twin(build_a, looksam[0]), Twin(build_b, looksam[1])
    with engine_of(build_a, stage, accumulation, looksam[0]) as g, engine_of(build_b, stage, accumulation,
                                                                          looksam[1]) as d:
        critic = d.module if stage == 0 else d  # DeepSpeed's stage 0 has no backward from another engine
        if "g_loss_fn" in ways:
            g.loss_fn = lambda fake, z: fooled(critic, fake)
        if "d_loss_fn" in ways:
            d.loss_fn = lambda out, x: real_or_not(lambda _: out, x[:4], x[4:], 1)
        for window in batches(accumulation):
            window32 = [tuple(t.float() for t in batch) for batch in window]

            def d_backward(part: list[Any]) -> None:
                for real, z, _ in part:
                    with torch.no_grad():
                        fake = g(z)
                    d.backward(real_or_not(d, real, fake, forwards))

            def g_backward(part: list[Any]) -> None:
                for _, _, z in part:
                    g.backward(fooled(critic, g(z)))

            for engine, backward, name in ((d, d_backward, "d_closure"), (g, g_backward, "g_closure")):
                for batch in window32:
                    backward([batch])
                    engine.step(**{"closure": partial(backward, window32)} if name in ways else {})
            (d.module if stage == 0 else d.optimizer).zero_grad()  # what the generator's step has left there
            twin_d.update(lambda m, window=window: [real_or_not(m, real, twin_g.module(z).detach(), 1)
                                                    for real, z, _ in window])
            critic_then = frozen(twin_d.module)
            twin_g.update(lambda m, window=window, d=critic_then: [fooled(d, m(z)) for _, _, z in window])
        twin_g.check(master_weights(g))
        twin_d.check(master_weights(d))


@pytest.mark.parametrize("stage, accumulation, forwards, ways, looksam", [
    (0, 1, 1, "", (True, True)), (0, 2, 2, "", (True, True)), (1, 1, 1, "", (True, True)), (1, 1, 2, "", (True, True)),
    (1, 2, 2, "", (True, True)), (2, 1, 1, "", (True, False)), (2, 1, 1, "", (False, True)),
    (2, 1, 1, "g_loss_fn d_loss_fn", (True, True)), (1, 1, 2, "g_closure d_closure", (True, True)),
    (3, 1, 1, "g_closure", (True, True)), (3, 1, 1, "g_loss_fn", (True, True)), (3, 1, 1, "", (False, True)),
])
def test_generator_and_discriminator(stage: int, accumulation: int, forwards: int, ways: str,
                                     looksam: tuple[bool, bool]) -> None:
    run_on_ranks(1, train_gan, stage, accumulation, forwards, ways, looksam)


def test_a_discriminator_that_cannot_be_called_again_is_named() -> None:
    with pytest.raises(RankError, match=r"another model under ZeRO stage 3(?s:.*)closure"):
        run_on_ranks(1, train_gan, 3, 1, 1, "", (True, True))


def discriminator_steps_first(stage: int) -> str:
    """What is said where the loss went through a model that has changed since; then the order that works."""
    from ds_looksam import LookSAMReplayError

    with engine_of(build_a, stage) as g, engine_of(build_b, stage) as d:
        z, critic = torch.ones(4, 3), d.module if stage == 0 else d
        g.backward(fooled(critic, g(z)))
        (d.module if stage == 0 else d.optimizer).zero_grad()
        d.backward(fooled(d, z))
        d.step()
        try:
            g.step()
        except LookSAMReplayError as error:
            g.step(closure=lambda: g.backward(fooled(critic, g(z))))
            return str(error)
    return "nothing was said"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_model_that_was_stepped_in_between_is_noticed(stage: int) -> None:
    assert "by another optimizer's step" in run_on_ranks(1, discriminator_steps_first, stage)[0]

"""Autocast, activation checkpointing and torch.compile: the second evaluation must compute as the first one did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .models import CLASSES, Mlp, make_model
from .ranks import run_on_ranks
from .training import TOLERANCE, Case, batches_for, distance, engine_for, master_weights, run_oracle, train_window

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
CPU = {"offload_optimizer": {"device": "cpu"}}


class Checkpointed(Mlp):
    """The same function as "mlp", and the same parameters; its second half is computed again in the backward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def body(self, x: Tensor) -> Tensor:
        import deepspeed

        hidden, part = torch.tanh(self.first(x)) * self.scale, lambda h: torch.tanh(self.second(h))
        if self.how == "deepspeed":
            deepspeed.checkpointing.configure(None, partition_activations=False)
            return self.head(deepspeed.checkpointing.checkpoint(part, hidden))
        return self.head(checkpoint(part, hidden, use_reentrant=self.how == "reentrant"))


def train(case: Case, checkpoints: str, backend: str) -> tuple[dict[str, Tensor], int, list[Any]]:
    """On a rank: the weights, the evaluations, and the state of autocast in each forward."""
    torch.manual_seed(case.seed)
    module, autocast = Checkpointed(checkpoints) if checkpoints else make_model(case.model, case.seed), []
    module.register_forward_pre_hook(
        lambda *_: autocast.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))))
    with engine_for(case, module=module) as engine:
        if backend:
            engine.compile(backend=backend)
        for update in range(case.updates):
            train_window(engine, case, update)
        torch._dynamo.reset()
        return master_weights(engine), engine.looksam.evaluations, autocast


def check(case: Case, tolerance: float, checkpoints: str = "", backend: str = "",
          autocast: torch.dtype | None = None) -> None:
    reference, expected = run_oracle(case, autocast=autocast)
    for weights, evaluations, seen in run_on_ranks(case.world, train, case, checkpoints, backend):
        assert distance(weights, expected) <= tolerance
        assert evaluations == reference.evaluations
        assert not case.config or seen == [(True, torch.bfloat16)] * evaluations * case.accumulation


@pytest.mark.parametrize("stage, zero", [(0, {}), (1, {}), (2, {}), (3, {}), (1, CPU), (2, CPU), (3, CPU)])
def test_autocast(stage: int, zero: dict[str, Any]) -> None:
    # Activations and the reduction of gradients round at 4e-3; without the replay in autocast, or without the
    # correction, it is the two other checks that fail.
    check(Case(stage=stage, accumulation=2, clipping=0.05, config=AUTOCAST, zero=zero), 1e-2)


@pytest.mark.parametrize("stage, ascent, accumulation", [
    (0, "global", 1), (2, "global", 1), (3, "global", 1),
    (2, "rank", 2), (0, "micro_batch", 2), (1, "micro_batch", 2), (3, "global_micro_batch", 2),
])
def test_autocast_tightly(stage: int, ascent: str, accumulation: int) -> None:
    """On one rank, against an oracle whose gradients are those of bf16 autocast too."""
    # Where the two round a value differently, one bf16 unit of one activation in some thousand.
    check(Case(stage=stage, world=1, config=AUTOCAST, updates=7, ascent=ascent, accumulation=accumulation), 1e-3,
          autocast=torch.bfloat16)


class Headless(Mlp):
    """The same function as "mlp" once its loop has called the head."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x)) * self.scale))


def train_in_a_region(case: Case, ends: str) -> dict[str, Tensor]:
    """On a rank, by a loop with an autocast region of its own, in which autocast keeps the casts of weights."""
    torch.manual_seed(case.seed)
    with engine_for(case, module=Headless()) as engine:
        for update in range(case.updates):
            for x, y in batches_for(engine, case, update):
                with torch.autocast("cpu", torch.bfloat16):
                    out = engine.module.head(engine(x))
                    loss = F.mse_loss(out, F.one_hot(y, CLASSES).to(out.dtype))
                    if ends == "after step()":
                        engine.backward(loss)
                        engine.step()
                if ends == "before backward()":
                    engine.backward(loss)
                    engine.step()
        return master_weights(engine)


@pytest.mark.parametrize("ends", ["after step()", "before backward()"])
@pytest.mark.parametrize("stage, ascent", [(0, "global"), (1, "micro_batch"), (2, "rank")])
def test_an_autocast_region_of_the_loop(stage: int, ascent: str, ends: str) -> None:
    """The second evaluation computes with w + eps, and what follows it with w."""
    case = Case(stage=stage, world=1, updates=7, ascent=ascent)
    _, expected = run_oracle(case, autocast=torch.bfloat16)
    assert distance(run_on_ranks(1, train_in_a_region, case, ends)[0], expected) <= 1e-3


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "deepspeed"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_activation_checkpointing(stage: int, how: str) -> None:
    check(Case(stage=stage, accumulation=2, updates=4), TOLERANCE, checkpoints=how)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.grid)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_compiled(stage: int, backend: str) -> None:
    check(Case(stage=stage, accumulation=2, updates=4), TOLERANCE, backend=backend)

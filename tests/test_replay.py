"""The second evaluation: the same window, the same randomness, no trace but the update, however the loss is formed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from .models import CLASSES, make_model
from .ranks import run_on_ranks
from .training import TOLERANCE, Case, distance, engine_for, master_weights, run_oracle

STAGES = [0, 1, 2, 3]
CASE = Case(world=2, accumulation=2, updates=5, k=2, alpha=0.7)


def micro_batches(case: Case, update: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's, in fp32."""
    return [(x.float(), y) for x, y in case.micro_batches(update, torch.distributed.get_rank())]


# Ways of forming the loss ---------------------------------------------------------------------------------------------


def outside_loss(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(logits, nn.functional.one_hot(y, CLASSES).to(x.dtype))


def without_loss(case: Case) -> nn.Module:
    """The case's model, which returns what :func:`outside_loss` takes."""
    module = make_model(case.model, case.seed)
    module.forward = lambda x, y: module.body(x)
    return module


def train_outside(case: Case, how: str) -> dict[str, Tensor]:
    with engine_for(case, module=without_loss(case)) as engine:
        if how == "loss_fn":
            engine.loss_fn = outside_loss
        for update in range(case.updates):
            batches = micro_batches(case, update)

            def whole_window(batches: list[tuple[Tensor, Tensor]] = batches) -> None:
                for x, y in batches:
                    engine.backward(outside_loss(engine(x, y), x, y))

            for x, y in batches:
                engine.backward(outside_loss(engine(x, y), x, y))
                engine.step(closure=whole_window) if how == "closure" else engine.step()
        return master_weights(engine)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["loss_fn", "closure"])
def test_a_loss_formed_outside_the_model(stage: int, how: str) -> None:
    case = replace(CASE, stage=stage)
    assert distance(run_on_ranks(2, train_outside, case, how)[0], run_oracle(case)[1]) <= TOLERANCE

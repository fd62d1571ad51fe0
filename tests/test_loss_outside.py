"""The ordinary loop with a criterion, ``engine.backward(criterion(engine(x), y))``, against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from .models import CLASSES, make_model
from .ranks import RankError, run_on_ranks
from .test_oracle_grid import TOLERANCE
from .training import Case, distance, engine_for, master_weights, run_oracle


def train_with_criterion(case: Case):
    module = make_model(case.model, case.seed)
    module.forward = module.body  # returns what the criterion takes
    running_loss = 0.0
    with engine_for(case, module=module) as engine:
        for update in range(case.updates):
            for x, y in case.micro_batches(update, torch.distributed.get_rank()):
                outputs = engine(x.float())
                loss = F.mse_loss(outputs, F.one_hot(y, CLASSES).float())
                running_loss += loss.item()
                engine.backward(loss)
                engine.step()
        assert torch._C._len_torch_function_stack() == 0
        return master_weights(engine), engine.looksam.evaluations


@pytest.mark.parametrize("case", [
    Case(stage=stage, world=world, accumulation=accumulation, model=model)
    for stage, world, accumulation, model in [(0, 2, 2, "mlp"), (1, 1, 1, "tied"), (2, 2, 2, "straddling"),
                                              (3, 2, 1, "dead_and_frozen")]
], ids=lambda case: f"stage{case.stage}-world{case.world}-{case.model}")
def test_matches_oracle(case):
    reference, expected = run_oracle(case)
    for weights, evaluations in run_on_ranks(case.world, train_with_criterion, case):
        assert distance(weights, expected) <= TOLERANCE
        assert evaluations == reference.evaluations


def train_with_branch(case: Case):
    module = make_model(case.model, case.seed)
    module.forward = module.body
    with engine_for(case, module=module) as engine:
        x, y = case.micro_batches(0, torch.distributed.get_rank())[0]
        outputs = engine(x.float())
        weight = 2.0 if outputs.mean() > 0 else 1.0
        engine.backward(weight * F.mse_loss(outputs, F.one_hot(y, CLASSES).float()))
        engine.step()


def test_the_refusal_says_what_was_seen_and_what_to_do():
    with pytest.raises(RankError, match=r"read out to Python \(torch.Tensor.__bool__\)(?s:.*)engine.loss_fn"):
        run_on_ranks(1, train_with_branch, Case(world=1))

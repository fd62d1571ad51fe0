"""The second evaluation: the same window, the same randomness, no trace but the update, however the loss is formed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import oracle
from .models import CLASSES, FEATURES, Classifier, make_model
from .ranks import run_on_ranks
from .training import (
    Case,
    distance,
    engine_for,
    master_weights,
    named,
    run_oracle,
    train_window,
    visible_weights,
)

STAGES = [0, 1, 2, 3]
CASE = Case(world=2, accumulation=2, updates=5, k=2, alpha=0.7)
TOLERANCE = 1e-5  # as in test_oracle_grid.py


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
    """``how``: "criterion" is the ordinary loop."""
    running_loss = 0.0
    with engine_for(case, module=without_loss(case)) as engine:
        if how == "loss_fn":
            engine.loss_fn = outside_loss
        for update in range(case.updates):
            batches = micro_batches(case, update)

            def whole_window(batches: list[tuple[Tensor, Tensor]] = batches) -> None:
                for x, y in batches:
                    engine.backward(outside_loss(engine(x, y), x, y))

            for x, y in batches:
                loss = outside_loss(engine(x, y), x, y)
                running_loss += loss.item()
                engine.backward(loss)
                engine.step(closure=whole_window) if how == "closure" else engine.step()
        assert torch._C._len_torch_function_stack() == 0
        return master_weights(engine)


@pytest.mark.parametrize("stage, model", [(0, "mlp"), (1, "tied"), (2, "straddling"), (3, "dead_and_frozen")])
@pytest.mark.parametrize("how", ["criterion", "loss_fn", "closure"])
def test_a_loss_formed_outside_the_model(stage: int, model: str, how: str) -> None:
    case = replace(CASE, stage=stage, model=model)
    _, expected = run_oracle(case)
    assert distance(run_on_ranks(2, train_outside, case, how)[0], expected) <= TOLERANCE


# Randomness and statistics --------------------------------------------------------------------------------------------


class Noisy(Classifier):
    """Dropout from the global generator, and BatchNorm. The mask depends on no dtype, so that float64 sees the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, 13, bias=False)  # BatchNorm would make its bias a flat direction
        self.norm = nn.BatchNorm1d(13)
        self.head = nn.Linear(13, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        return self.head(hidden * (torch.rand(hidden.shape) > 0.3).to(x.dtype))


def _seed(update: int, rank: int, i: int) -> int:
    return 31 * update + 7 * rank + i


def train_noisy(case: Case, looksam: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    with engine_for(case, looksam, module=Noisy()) as engine:
        for update in range(case.updates):
            for i, (x, y) in enumerate(micro_batches(case, update)):
                torch.manual_seed(_seed(update, torch.distributed.get_rank(), i))
                engine.backward(engine(x, y))
                torch.rand(5)  # drawn since the forward, and not drawn again after step()
                engine.step()
        return master_weights(engine), dict(engine.module.named_buffers()), torch.rand(3)


@pytest.mark.parametrize("stage", STAGES)
def test_dropout_masks_are_those_of_the_first_evaluation(stage: int) -> None:
    case = replace(CASE, stage=stage)
    module = Noisy()
    groups = case.oracle_groups(module)
    reference = oracle.build(module, groups, base=case.base, k=case.k)
    plain = reference.gradient

    def seeded(w: Tensor, update: int) -> Tensor:
        total = torch.zeros_like(w)
        for rank in range(case.world):
            for i, micro_batch in enumerate(case.micro_batches(update, rank)):
                torch.manual_seed(_seed(update, rank, i))
                total += plain(w, [micro_batch])
        return total / (case.world * case.accumulation)

    reference.gradient = seeded
    for update in range(case.updates):
        reference.update(update)
    got = run_on_ranks(2, train_noisy, case)[0][0]
    assert distance(got, named(reference.w, module, groups)) <= TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_statistics_and_later_randomness_are_those_of_a_run_without_replay(stage: int) -> None:
    # One update: then both runs computed with the same weights, and the buffers must agree to the bit.
    case = replace(CASE, stage=stage, updates=1)
    with_replay, without = run_on_ranks(2, train_noisy, case), run_on_ranks(2, train_noisy, case, False)
    for (_, buffers, random), (_, expected, expected_random) in zip(with_replay, without, strict=True):
        assert buffers.keys() == expected.keys()
        for name in expected:
            assert torch.equal(buffers[name], expected[name]), name
        assert torch.equal(random, expected_random)
    assert without[0][1]["norm.num_batches_tracked"] == case.accumulation


# No trace -------------------------------------------------------------------------------------------------------------


class ReplayBroke(Exception):
    pass


def fails_in_the_replay(case: Case, failing_rank: int | None, where: str) -> dict[str, Any]:
    """Train; in the third update (a SAM step) the replay raises on ``failing_rank`` (None: on all); step again."""
    forwards = -1

    def explode(*_: Any) -> None:
        nonlocal forwards
        if forwards >= 0:
            forwards += 1
            # The first ones are the user's, the next ones the replay's; the last one breaks.
            if forwards == 2 * case.accumulation and failing_rank in (None, torch.distributed.get_rank()):
                raise ReplayBroke(where)

    with engine_for(case) as engine:
        module, untouched = engine.module.head, False
        module.register_forward_hook(explode) if where == "forward" else module.register_full_backward_hook(explode)
        for update in range(case.updates):
            forwards = 0 if update == 2 else -1
            for i, (x, y) in enumerate(micro_batches(case, update)):
                engine.backward(engine(x, y))
                if update == 2 and i == case.accumulation - 1:
                    before, random, updates = master_weights(engine), torch.get_rng_state(), engine.looksam.updates
                    with pytest.raises(ReplayBroke):
                        engine.step()
                    forwards = -1
                    untouched = torch.equal(random, torch.get_rng_state()) and engine.looksam.updates == updates
                    untouched &= all(torch.equal(before[n], w) for n, w in visible_weights(engine).items())
                engine.step()
        return {"untouched": untouched, "weights": master_weights(engine)}


def train_plainly(case: Case) -> dict[str, Tensor]:
    with engine_for(case) as engine:
        for update in range(case.updates):
            train_window(engine, case, update)
        return master_weights(engine)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_replay_that_raises_leaves_everything_as_it_was(stage: int, where: str) -> None:
    case = replace(CASE, stage=stage, updates=4)
    results = run_on_ranks(2, fails_in_the_replay, case, None, where)
    for result, expected in zip(results, run_on_ranks(2, train_plainly, case), strict=True):
        assert result["untouched"]
        for name in expected:  # step() was called again after the exception: to the bit what would have been
            assert torch.equal(result["weights"][name], expected[name]), name


def watches(case: Case) -> None:
    """On a rank: what a user's hook sees during training, and what it is refused."""
    from ds_looksam import LookSAMError

    calls = []
    with engine_for(case) as engine:
        engine.module.second.eval()
        clean = visible_weights(engine)

        def hook(module: nn.Module, *_: Any) -> None:
            calls.append((module.training, module.second.training))
            if len(calls) == 2 * case.accumulation:  # the last forward of the replay
                for door in (engine.step, lambda: engine.save_checkpoint("nowhere")):
                    with pytest.raises(LookSAMError, match="perturbed"):
                        door()

        engine.module.register_forward_hook(hook)
        train_window(engine, case, 0)
        assert calls == [(True, False)] * 2 * case.accumulation
        assert (engine.module.training, engine.module.second.training) == (True, False) and torch.is_grad_enabled()
        assert any(not torch.equal(w, clean[n]) for n, w in visible_weights(engine).items())


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_users_hook_sees(stage: int) -> None:
    run_on_ranks(2, watches, replace(CASE, stage=stage))

"""The second evaluation: the same window, the same randomness, no trace but the update, however the loss is formed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import oracle
from .models import CLASSES, FEATURES, Classifier, Mlp
from .ranks import RankError, run_on_ranks
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


# Ways of forming the loss ---------------------------------------------------------------------------------------------


class Returning(nn.Module):
    """Wraps a model that gives its loss, and returns it in one of the ways users do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.way = Mlp(), way

    def forward(self, x: Tensor, y: Tensor) -> Any:
        logits = self.model.body(x)
        loss = nn.functional.mse_loss(logits, nn.functional.one_hot(y, CLASSES).to(x.dtype))
        return {
            "tensor": loss,
            "mapping": {"logits": logits, "loss": loss},
            "object": SimpleNamespace(loss=loss, logits=logits),
            "tuple": (loss, logits),
            "logits": logits,
        }[self.way]


def outside_loss(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(logits, nn.functional.one_hot(y, CLASSES).to(x.dtype))


LOSS_OF: dict[str, Callable[[Any], Tensor]] = {
    "tensor": lambda out: out,
    "mapping": lambda out: out["loss"],
    "object": lambda out: out.loss,
    "tuple": lambda out: out[0],
}
SCALED: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda loss: loss,
    "halved": lambda loss: loss / 2,
    "tensor constant": lambda loss: -(loss * torch.tensor(-0.5)),
    "mean of one": lambda loss: (0.5 * loss).mean().float(),
}


def train_returning(case: Case, way: str, scaled: str) -> dict[str, Tensor]:
    with engine_for(case, module=Returning(way)) as engine:
        for update in range(case.updates):
            for x, y in case.micro_batches(update, torch.distributed.get_rank()):
                loss = SCALED[scaled](LOSS_OF[way](engine(x.float(), y)))
                engine.backward(loss)
                engine.step()
        return _unwrapped(master_weights(engine))


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


@pytest.mark.parametrize("way, scaled", [*((way, "halved") for way in LOSS_OF), *(("object", s) for s in SCALED)])
def test_the_models_own_loss_is_replayed(way: str, scaled: str) -> None:
    # SGD sees the factor, where Adam would hide it.
    case = replace(CASE, base="SGD", stage=2)
    module = Mlp()
    torch.manual_seed(0)
    reference = _oracle(case, 1.0 if scaled == "as it is" else 0.5)
    got = run_on_ranks(2, train_returning, case, way, scaled)[0]
    assert distance(got, named(reference.w, module, case.oracle_groups(module))) <= TOLERANCE


def _oracle(case: Case, factor: float) -> oracle.Oracle:
    """The oracle's run with its loss multiplied by ``factor``."""
    from .models import make_model

    module = make_model(case.model, case.seed)
    reference = oracle.build(module, case.oracle_groups(module), base=case.base, k=case.k)
    gradient = reference.gradient
    reference.gradient = lambda w, window: factor * gradient(w, window)
    for update in range(case.updates):
        reference.update(case.window(update))
    return reference


def train_outside(case: Case, how: str) -> dict[str, Tensor]:
    with engine_for(case, module=Returning("logits")) as engine:
        if how == "loss_fn":
            engine.loss_fn = outside_loss
        for update in range(case.updates):
            batches = [(x.float(), y) for x, y in case.micro_batches(update, torch.distributed.get_rank())]

            def whole_window(batches: list[tuple[Tensor, Tensor]] = batches) -> None:
                for x, y in batches:
                    engine.backward(outside_loss(engine(x, y), x, y))

            for x, y in batches:
                engine.backward(outside_loss(engine(x, y), x, y))
                engine.step(closure=whole_window) if how == "closure" else engine.step()
        return _unwrapped(master_weights(engine))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["loss_fn", "closure"])
def test_a_loss_formed_outside_the_model(stage: int, how: str) -> None:
    case = replace(CASE, stage=stage)
    _, expected = run_oracle(case)
    assert distance(run_on_ranks(2, train_outside, case, how)[0], expected) <= TOLERANCE


def refused_losses(case: Case) -> list[tuple[str, bool]]:
    """(message, weights untouched) for losses that cannot be formed again, each in a window of its own."""
    from ds_looksam import LookSAMReplayError

    (x, y), *_ = case.micro_batches(0, torch.distributed.get_rank())
    x = x.float()

    def read_out(engine: Any) -> Tensor:
        loss = engine(x, y)
        return torch.tanh(loss) if loss.item() > 0 else loss

    def elsewhere(engine: Any) -> Tensor:
        engine(x, y)
        return next(engine.module.parameters()).sum()

    def changed_input(engine: Any) -> Tensor:
        mine = x.clone()
        loss = engine(mine, y)
        engine.backward(loss)
        mine.mul_(2)
        return loss

    outcomes = []
    for form in (read_out, elsewhere, changed_input):
        with engine_for(case, module=Returning("tensor")) as engine:
            before = master_weights(engine)
            loss = form(engine)
            if form is not changed_input:
                engine.backward(loss)
            try:
                engine.step()
                message = "nothing was raised"
            except LookSAMReplayError as error:
                message = str(error)
            after = visible_weights(engine)
            outcomes.append((message, all(torch.equal(before[name], after[name]) for name in before)))
    return outcomes


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_cannot_be_replayed_is_refused(stage: int) -> None:
    outcomes = run_on_ranks(2, refused_losses, replace(CASE, stage=stage, accumulation=1))[0]
    said = ["read out to Python", "does not depend on the output", "changed in place"]
    for (message, untouched), words in zip(outcomes, said, strict=True):
        assert words in message
        assert words == "changed in place" or ("engine.loss_fn" in message and "closure" in message)
        assert untouched


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
    rank = torch.distributed.get_rank()
    with engine_for(case, looksam, module=Noisy()) as engine:
        for update in range(case.updates):
            for i, (x, y) in enumerate(case.micro_batches(update, rank)):
                torch.manual_seed(_seed(update, rank, i))
                engine.backward(engine(x.float(), y))
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

    def seeded(w: Tensor, window: tuple[int, list[Any]]) -> Tensor:
        update, ranks = window
        total = torch.zeros_like(w)
        for rank, micro_batches in enumerate(ranks):
            for i, micro_batch in enumerate(micro_batches):
                torch.manual_seed(_seed(update, rank, i))
                total += plain(w, [micro_batch])
        return total / (case.world * case.accumulation)

    reference.gradient = seeded
    for update in range(case.updates):
        reference.update((update, [case.micro_batches(update, rank) for rank in range(case.world)]))
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
    rank = torch.distributed.get_rank()
    armed = {"forwards": -1}

    def explode(*_: Any) -> None:
        if armed["forwards"] >= 0:
            armed["forwards"] += 1
            # Forwards 0 .. accumulation - 1 are the user's, the next ones the replay's; the last one breaks.
            if armed["forwards"] == 2 * case.accumulation and failing_rank in (None, rank):
                raise ReplayBroke(where)

    with engine_for(case) as engine:
        module = engine.module.head
        module.register_forward_hook(explode) if where == "forward" else module.register_full_backward_hook(explode)
        result: dict[str, Any] = {}
        for update in range(case.updates):
            fails = update == 2
            armed["forwards"] = 0 if fails else -1
            batches = case.micro_batches(update, rank)
            for i, (x, y) in enumerate(batches):
                engine.backward(engine(x.float(), y))
                if fails and i == len(batches) - 1:
                    before = (master_weights(engine), torch.get_rng_state(), engine.looksam.updates)
                    try:
                        engine.step()
                    except ReplayBroke:
                        result["raised"] = True
                    armed["forwards"] = -1
                    result["untouched"] = all(torch.equal(before[0][n], w) for n, w in visible_weights(engine).items())
                    result["rng"] = torch.equal(before[1], torch.get_rng_state())
                    result["updates"] = engine.looksam.updates == before[2]
                engine.step()
        return {**result, "weights": master_weights(engine)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_replay_that_raises_leaves_everything_as_it_was(stage: int, where: str) -> None:
    case = replace(CASE, stage=stage, updates=4)
    results = run_on_ranks(2, fails_in_the_replay, case, None, where)
    undisturbed = run_on_ranks(2, train_plainly, case)
    for result, expected in zip(results, undisturbed, strict=True):
        assert result["raised"] and result["untouched"] and result["rng"] and result["updates"]
        for name in expected:  # step() was called again after the exception: to the bit what would have been
            assert torch.equal(result["weights"][name], expected[name]), name


def train_plainly(case: Case) -> dict[str, Tensor]:
    with engine_for(case) as engine:
        for update in range(case.updates):
            train_window(engine, case, update)
        return master_weights(engine)


def watches(case: Case) -> dict[str, Any]:
    """What a user's hook sees during training, and what it is refused."""
    from ds_looksam import LookSAMError

    refused, flags, calls = [], [], []
    with engine_for(case) as engine:
        engine.module.second.eval()
        clean = visible_weights(engine)
        seen: list[bool] = []

        def hook(module: nn.Module, *_: Any) -> None:
            calls.append(module.training)
            flags.append(engine.module.second.training)
            if len(calls) == 2 * case.accumulation:  # the last forward of the replay
                for door in (engine.step, lambda: engine.save_checkpoint("nowhere")):
                    try:
                        door()
                    except LookSAMError as error:
                        refused.append(str(error))

        engine.module.register_forward_hook(hook)
        train_window(engine, case, 0)
        seen = [torch.equal(w, clean[n]) for n, w in visible_weights(engine).items()]
        return {"refused": refused, "calls": len(calls), "training": all(calls), "second": any(flags),
                "moved": not all(seen), "flags_after": (engine.module.training, engine.module.second.training),
                "grad_enabled": torch.is_grad_enabled()}


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_users_hook_sees(stage: int) -> None:
    case = replace(CASE, stage=stage)
    for result in run_on_ranks(2, watches, case):
        assert result["calls"] == 2 * case.accumulation
        assert result["training"] and not result["second"]
        assert result["flags_after"] == (True, False)
        assert result["moved"] and result["grad_enabled"]
        assert len(result["refused"]) == 2 and all("perturbed" in message for message in result["refused"])


def test_a_failing_rank_shows_its_traceback() -> None:
    with pytest.raises(RankError, match="ReplayBroke: on purpose"):
        run_on_ranks(2, _raise)


def _raise() -> None:
    raise ReplayBroke("on purpose")

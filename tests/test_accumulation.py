"""Every way in which DeepSpeed lets a user accumulate gradients, against the oracle.

The oracle knows no ways: a window is the set of its samples. So each way must end at the same weights, which are also
those of one micro-batch with all the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from .ranks import run_on_ranks
from .training import TOLERANCE, Case, distance, engine_for, managed, run_oracle, train


def boundary_set_by_hand(engine: Any, batches: list[Any]) -> None:
    for i, (x, y) in enumerate(batches):
        engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
        engine.backward(engine(x, y))
    engine.step()


def unmanaged(engine: Any, batches: list[Any]) -> None:
    for x, y in batches:
        engine.backward(engine(x, y))
    engine.step()


def direct_backward(engine: Any, batches: list[Any]) -> None:
    for x, y in batches:
        engine.scale(2 * engine(x, y) / 2).backward()
        engine.step()


def direct_backward_of_a_loss_outside(engine: Any, batches: list[Any]) -> None:
    for x, y in batches:
        torch.square(engine(x, y).sqrt()).backward()
        engine.step()


def no_sync(engine: Any, batches: list[Any]) -> None:
    for i, (x, y) in enumerate(batches):
        with nullcontext() if i == len(batches) - 1 else engine.no_sync():
            engine.backward(engine(x, y) / len(batches), scale_wrt_gas=False)
    engine.step()


def coalesced(engine: Any, batches: list[Any]) -> None:
    with engine.coalesce_grad_reduction():
        for x, y in batches:
            engine.backward(engine(x, y) / len(batches), scale_wrt_gas=False)
    engine.step()


Way = Callable[[Any, list[Any]], None]
CONFIG: dict[Way, dict[str, Any]] = {
    unmanaged: {"managed_gradient_accumulation": False},
    no_sync: {"gradient_accumulation_steps": 1}, coalesced: {"gradient_accumulation_steps": 1},
}
# DeepSpeed itself refuses the others: loss.backward() and coalescing on stage 0, no_sync on stages 2 and 3.
STAGES: dict[Way, list[int]] = {
    boundary_set_by_hand: [0, 1, 2, 3], unmanaged: [0, 1, 2, 3], direct_backward: [1, 2, 3],
    direct_backward_of_a_loss_outside: [1, 2, 3], no_sync: [0, 1], coalesced: [1, 2, 3],
}
OWN = {"micro_batch": (0, 2), "global_micro_batch": (3, )}
CASES = [
    *((way, stage, {}) for way in STAGES for stage in STAGES[way]),
    *((way, stage, {"zero": {"offload_optimizer": {"device": "cpu"}}}) for way in (unmanaged, coalesced)
      for stage in (1, 2, 3)),
    *((way, 1, {"ascent": "rank"}) for way in (managed, *STAGES)),
    *((way, stage, {"ascent": "rank"}) for way, stage in ((unmanaged, 0), (unmanaged, 2), (coalesced, 2))),
    *((way, stage, {"ascent": ascent}) for way in (boundary_set_by_hand, unmanaged) for ascent in OWN
      for stage in OWN[ascent]),
]


@pytest.mark.parametrize(("way", "stage", "settings"), CASES, ids=lambda x: getattr(
    x, "__name__", "-".join(str(value) for value in x.values()) if isinstance(x, dict) else str(x)))
def test_ways_to_accumulate(way: Way, stage: int, settings: dict[str, Any]) -> None:
    case = Case(stage=stage, accumulation=3, clipping=0.05, updates=5, config=CONFIG.get(way, {}), **settings)
    reference, expected = run_oracle(case)
    for result in run_on_ranks(case.world, train, case, loop=way):
        # Three times for DeepSpeedCPUAdam: see test_options.
        assert distance(result.weights, expected) <= TOLERANCE * (3 if case.zero else 1)
        assert (result.updates, result.evaluations) == (case.updates, reference.evaluations)
        assert result.forwards == reference.evaluations * case.accumulation, "replays are whole windows"


REFUSED = {
    "gradient": lambda loss: loss.backward(gradient=torch.tensor(2.0)),
    "autograd": lambda loss: torch.autograd.backward([loss], [torch.tensor(2.0)]),
}


def refused_on_rank(how: str) -> str:
    from ds_looksam import LookSAMReplayError

    case = Case(stage=2)
    (x, y), = case.micro_batches(0, 0)
    with engine_for(case) as engine:
        REFUSED[how](engine(x.float(), y))
        with pytest.raises(LookSAMReplayError) as error:
            engine.step()
        return str(error.value)


@pytest.mark.parametrize("how", list(REFUSED))
def test_backwards_that_cannot_be_replayed_are_refused(how: str) -> None:
    for message in run_on_ranks(2, refused_on_rank, how):
        assert "engine.step(closure=...)" in message

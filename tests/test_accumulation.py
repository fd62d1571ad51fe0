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
from .test_oracle_grid import TOLERANCE
from .training import DTYPES, Case, Result, distance, engine_for, master_weights, run_oracle

MICRO_BATCHES = 3


def managed(engine: Any, batches: list[Any]) -> None:
    for x, y in batches:
        engine.backward(engine(x, y))
        engine.step()


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
        out = engine(x, y)
        torch.square(out.sqrt()).backward()
        engine.step()


def no_sync(engine: Any, batches: list[Any]) -> None:
    for i, (x, y) in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else engine.no_sync():
            engine.backward(engine(x, y) / len(batches), scale_wrt_gas=False)
    engine.step()


def coalesced(engine: Any, batches: list[Any]) -> None:
    with engine.coalesce_grad_reduction():
        for x, y in batches:
            engine.backward(engine(x, y) / len(batches), scale_wrt_gas=False)
    engine.step()


WAYS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "managed": (managed, {}),
    "boundary_set_by_hand": (boundary_set_by_hand, {}),
    "unmanaged": (unmanaged, {"managed_gradient_accumulation": False}),
    "direct_backward": (direct_backward, {}),
    "direct_backward_of_a_loss_outside": (direct_backward_of_a_loss_outside, {}),
    "no_sync": (no_sync, {"gradient_accumulation_steps": 1}),
    "coalesced": (coalesced, {"gradient_accumulation_steps": 1}),
}

# DeepSpeed itself refuses the others: loss.backward() and coalescing on stage 0, no_sync on stages 2 and 3.
STAGES = {"no_sync": [0, 1], "coalesced": [1, 2, 3], "direct_backward": [1, 2, 3],
          "direct_backward_of_a_loss_outside": [1, 2, 3]}


def accumulate(case: Case, way: str) -> Result:
    """Run a case on this rank with one of WAYS. Collective."""
    loop, config = WAYS[way]
    with engine_for(case, adapt=lambda json: json.update(config)) as engine:
        calls: list[None] = []
        engine.module.register_forward_hook(lambda *_: calls.append(None))
        for update in range(case.updates):
            batches = case.micro_batches(update, torch.distributed.get_rank())
            loop(engine, [(x.to(DTYPES[case.precision]), y) for x, y in batches])
        return Result(weights=master_weights(engine), model_weights={}, history=[], forwards=len(calls),
                      evaluations=engine.looksam.evaluations, updates=engine.looksam.updates)


@pytest.mark.parametrize(("way", "stage"), [(way, stage) for way in WAYS for stage in STAGES.get(way, [0, 1, 2, 3])])
def test_ways_to_accumulate(way: str, stage: int) -> None:
    case = Case(stage=stage, accumulation=MICRO_BATCHES, clipping=0.05, updates=5)
    reference, expected = run_oracle(case)
    for result in run_on_ranks(case.world, accumulate, case, way):
        assert distance(result.weights, expected) <= TOLERANCE
        assert (result.updates, result.evaluations) == (case.updates, reference.evaluations)
        assert result.forwards == reference.evaluations * MICRO_BATCHES, "replays are whole windows"


@pytest.mark.parametrize("way", ["unmanaged", "coalesced"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ways_to_accumulate_with_offload(way: str, stage: int) -> None:
    case = Case(stage=stage, accumulation=MICRO_BATCHES, clipping=0.05, updates=5,
                zero={"offload_optimizer": {"device": "cpu"}})
    _, expected = run_oracle(case)
    for result in run_on_ranks(case.world, accumulate, case, way):
        assert distance(result.weights, expected) <= 3 * TOLERANCE  # DeepSpeedCPUAdam: see test_options


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
        try:
            engine.step()
        except LookSAMReplayError as error:
            return str(error)
    raise AssertionError("not refused")


@pytest.mark.parametrize("how", list(REFUSED))
def test_backwards_that_cannot_be_replayed_are_refused(how: str) -> None:
    for message in run_on_ranks(2, refused_on_rank, how):
        assert "engine.step(closure=...)" in message

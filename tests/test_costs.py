"""What LookSAM adds to a step: evaluations, collectives, host synchronisations, bytes."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from .collectives import Collective, Recorder
from .models import CLASSES, FEATURES, Classifier
from .ranks import run_on_ranks
from .training import DTYPES, Case, as_plain, engine_for, train, train_window

STAGES = [0, 1, 2, 3]
SMALL = 256
"""Bytes: what counts as an all-reduce of scalars."""


class Wide(Classifier):
    """Large enough for scalars and shards not to be confused; no parameter stays gathered on stage 3 (see CASE)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, 701)
        self.second = nn.Linear(701, 97)
        self.head = nn.Linear(97, CLASSES)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


CASE = Case(world=2, accumulation=2, k=3, alpha=0.7, updates=6)
NUMEL = sum(p.numel() for p in Wide().parameters())


def _case(stage: int, **changes: Any) -> Case:
    # Stage 3: nothing stays gathered, so there is nothing to publish but by the forward; and no 2 GB bucket.
    zero = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000} if stage == 3 else {}
    return replace(CASE, stage=stage, zero=zero, **changes)


@dataclass
class Step:
    """One window: what forward and backward sent, what step() sent, and the host's reads inside step()."""

    evaluation: list[Collective]
    update: list[Collective]
    host_reads: int


def record_steps(case: Case, looksam: bool) -> list[Step]:
    with engine_for(case, looksam, module=Wide()) as engine:
        steps = []
        for update in range(case.updates):
            evaluation, last = Recorder(), Recorder()
            for x, y in case.micro_batches(update, torch.distributed.get_rank()):
                with evaluation:
                    engine.backward(engine(x.to(DTYPES[case.precision]), y))
                with last:
                    engine.step()
            steps.append(Step(evaluation.collectives, last.collectives, last.host_reads))
        return steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_collectives_and_synchronisations(stage: int, precision: str) -> None:
    if precision == "bf16" and stage == 0:
        pytest.skip("bf16 on stage 0 has no ZeRO shards: nothing is sent beside the gradients")
    case = _case(stage, precision=precision)
    steps = run_on_ranks(2, record_steps, case, True)[0]
    plain = run_on_ranks(2, record_steps, case, False)[0]
    # Windows 0 .. 2 include what happens once (stage 3 records its trace); 3 is a SAM step, 4 and 5 reuse.
    base, sam, reuse = plain[4], steps[3], steps[4:6]

    assert _count(sam.evaluation) == _count(base.evaluation)
    for step in reuse:
        assert _count(step.evaluation) == _count(base.evaluation)
        extra = _difference(step.update, base.update)
        assert sum(extra.values()) <= 1 and all(c.kind == "allreduce" and c.nbytes <= SMALL for c in extra)
        assert step.host_reads == base.host_reads

    extra = _difference(sam.update, base.update + base.evaluation)
    scalars = Counter({c: n for c, n in extra.items() if c.kind == "allreduce" and c.nbytes <= SMALL})
    assert sum(scalars.values()) <= 2
    publications = extra - scalars
    if stage in (1, 2):
        # One all-gather of the whole model in its own dtype, and none to take it back.
        assert sum(publications.values()) == 1
        (publication, ) = publications
        assert "allgather" in publication.kind
        width = 2 if precision == "bf16" else 4
        assert NUMEL * width <= publication.nbytes <= NUMEL * width * 1.01
    else:
        assert not publications


def _count(collectives: list[Collective]) -> Counter[Collective]:
    return Counter(collectives)


def _difference(more: list[Collective], less: list[Collective]) -> Counter[Collective]:
    """What ``more`` has beside everything in ``less``."""
    assert not _count(less) - _count(more), "LookSAM left out a collective of the base step"
    return _count(more) - _count(less)


@pytest.mark.parametrize("k, updates", [(1, 3), (2, 5), (5, 7)])
def test_evaluations(k: int, updates: int) -> None:
    case = Case(world=2, accumulation=3, k=k, updates=updates)
    result = run_on_ranks(2, train, case)[0]
    assert result.forwards == 3 * (updates + -(-updates // k))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("base", ["AdamW", "SGD"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_rho_0_with_alpha_0_is_the_base_optimizer_to_the_bit(stage: int, world: int, base: str, precision: str) -> None:
    if precision == "bf16" and stage == 0:
        pytest.skip("covered with the stage 0 wrappers")
    case = as_plain(Case(stage=stage, world=world, base=base, precision=precision, accumulation=2, clipping=0.05,
                         two_groups=True, updates=7))
    with_looksam, without = run_on_ranks(world, train, case), run_on_ranks(world, train, case, False)
    assert with_looksam[0].evaluations == 7 + 3
    for got, expected in zip(with_looksam, without, strict=True):
        for name, weight in expected.weights.items():
            assert torch.equal(got.weights[name], weight), name


# Bytes ----------------------------------------------------------------------------------------------------------------


def tensor_bytes() -> int:
    """Bytes of all storages that some Python object reaches."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclass
class Memory:
    """Bytes after an update, and while the model's last forward before that update runs; beside what was there before
    the engine (DeepSpeed's stage 3 leaves a part of each engine behind)."""

    after: int
    during: int


def measure_memory(case: Case, looksam: bool) -> Memory:
    before = tensor_bytes()
    with engine_for(case, looksam, module=Wide()) as engine:
        train_window(engine, case, 0)
        for update in range(1, case.k):
            train_window(engine, case, update)
        during: list[int] = []
        handle = engine.module.head.register_forward_pre_hook(lambda *_: during.append(tensor_bytes()))
        train_window(engine, case, case.k)  # a SAM step, when LookSAM is on: the last forward is the replay's
        handle.remove()
        return Memory(after=tensor_bytes() - before, during=during[-1] - before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_state_is_one_fp32_shard_and_a_sam_step_holds_one_more(stage: int, precision: str) -> None:
    if precision == "bf16" and stage == 0:
        pytest.skip("covered with the stage 0 wrappers")
    case = _case(stage, precision=precision, accumulation=1, k=2)
    ours = run_on_ranks(2, measure_memory, case, True)[0]
    plain = run_on_ranks(2, measure_memory, case, False)[0]
    shard = 4 * NUMEL // (1 if stage == 0 else 2)
    slack = 0.01 * shard + 15_000  # padding, scalars; of the window its input and two RNG states of 5 kB

    assert abs(ours.after - plain.after - shard) <= slack
    # In the replay: g beside g_v. On stage 0 the fp32 weights exist only once, and a clean copy of them comes on top.
    weights = shard if stage == 0 else 0
    assert abs(ours.during - plain.during - 2 * shard - weights) <= slack

"""What LookSAM adds to a step: evaluations, collectives, host synchronisations, bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from .collectives import Collective
from .costs import Wide, measure_memory, nothing_stays_gathered, record_steps
from .covering import cases
from .ranks import run_on_ranks
from .training import Case, as_plain, engine_for, train, train_window

STAGES = [0, 1, 2, 3]
SMALL = 256
"""Bytes: what counts as an all-reduce of scalars."""


CASE = Case(world=2, accumulation=2, k=3, alpha=0.7, updates=6)
NUMEL = sum(p.numel() for p in Wide().parameters())


def _case(stage: int, **changes: Any) -> Case:
    return replace(CASE, stage=stage, zero=nothing_stays_gathered(stage), **changes)


CASES = [_case(stage, precision=precision) for stage in STAGES for precision in ("fp32", "bf16")] + [
    _case(0, precision="bf16", base="SGD"),  # FP16_UnfusedOptimizer
    _case(1, precision="bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}),  # BF16_Optimizer
]


def _id(case: Case) -> str:
    return "-".join([f"stage{case.stage}", case.precision, case.base, *case.config])


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_collectives_and_synchronisations(case: Case) -> None:
    stage, precision = case.stage, case.precision
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


PLAIN_GRID = {"stage": STAGES, "world": [1, 2], "base": ["AdamW", "SGD"], "precision": ["fp32", "bf16"]}


@pytest.mark.parametrize("case", cases(PLAIN_GRID, lambda row: as_plain(
    Case(**row, accumulation=2, clipping=0.05, two_groups=True, updates=7))))
def test_rho_0_with_alpha_0_is_the_base_optimizer_to_the_bit(case: Case) -> None:
    with_looksam, without = run_on_ranks(case.world, train, case), run_on_ranks(case.world, train, case, False)
    assert with_looksam[0].evaluations == 7 + 3
    for got, expected in zip(with_looksam, without, strict=True):
        for name, weight in expected.weights.items():
            assert torch.equal(got.weights[name], weight), name


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_state_is_one_fp32_shard_and_a_sam_step_holds_one_more(case: Case) -> None:
    stage, precision = case.stage, case.precision
    case = replace(case, accumulation=1, k=2)
    ours = run_on_ranks(2, measure_memory, case, True)[0]
    plain = run_on_ranks(2, measure_memory, case, False)[0]
    shard = 4 * NUMEL // (1 if stage == 0 else 2)
    slack = 0.01 * shard + 15_000  # padding, scalars; of the window its input and two RNG states of 5 kB

    assert abs(ours.after - plain.after - shard) <= slack
    # In the replay: g beside g_v. On stage 0 the model's weights are kept, as nothing else has their bits then.
    weights = (shard if precision == "fp32" else shard // 2) if stage == 0 else 0
    assert abs(ours.during - plain.during - 2 * shard - weights) <= slack


class NotedWork:
    def __init__(self, work: Any, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def publication(case: Case) -> list[str]:
    """What the first window, a SAM step, does to form w + eps and publish it, in this order. Collective."""
    from deepspeed import comm

    from ds_looksam.shards.base import GradientShards

    events: list[str] = []
    form, gather = GradientShards._perturb_flat, comm.all_gather_into_tensor

    def noted_form(*args: Any) -> Any:
        events.append("form")
        return form(*args)

    def noted_gather(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        work = gather(*args, async_op=async_op, **kwargs)
        if not async_op:  # DeepSpeed's own update
            return work
        events.append("send")
        return NotedWork(work, events)

    with engine_for(case) as engine, patch.object(GradientShards, "_perturb_flat", noted_form), \
            patch.object(comm, "all_gather_into_tensor", noted_gather):
        train_window(engine, case, 0)
    return events


@pytest.mark.parametrize("stage, changes", [
    (1, {}), (2, {}), (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    (1, {"precision": "bf16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}}),
], ids=["stage1", "stage2", "offload", "BF16_Optimizer"])
def test_a_param_group_is_published_while_the_next_one_is_formed(stage: int, changes: dict[str, Any]) -> None:
    case = Case(world=2, stage=stage, two_groups=True, **changes)
    assert run_on_ranks(2, publication, case) == 2 * [["form", "send", "form", "send", "wait", "wait"]]

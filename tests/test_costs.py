"""What LookSAM adds to a step: evaluations, collectives, host synchronisations, bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from .collectives import Collective
from .costs import Wide, measure_memory, nothing_stays_gathered, record_steps
from .covering import cases
from .models import Stack
from .ranks import run_on_ranks
from .training import Case, as_plain, engine_for, train, train_window

STAGES = [0, 1, 2, 3]
SMALL = 256
"""Bytes: what counts as an all-reduce of scalars."""
NUMEL = sum(p.numel() for p in Wide().parameters())
GRAD_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = [
    Case(world=2, accumulation=2, k=3, alpha=0.7, updates=6, stage=stage, zero=nothing_stays_gathered(stage),
         precision=precision, **changes)
    for stage, precision, changes in [
        *((stage, precision, {}) for stage in STAGES for precision in ("fp32", "bf16")),
        (0, "bf16", {"base": "SGD"}),  # FP16_UnfusedOptimizer
        (1, "bf16", {"config": GRAD_FP32}),  # BF16_Optimizer
    ]
]


def _id(case: Case) -> str:
    return "-".join([f"stage{case.stage}", case.precision, case.base, case.ascent, *case.config])


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_collectives_and_synchronisations(case: Case) -> None:
    steps, plain = run_on_ranks(2, record_steps, case, True)[0], run_on_ranks(2, record_steps, case, False)[0]
    # Windows 0 .. 2 include what happens once (stage 3 records its trace); 3 is a SAM step, 4 and 5 reuse.
    base, sam, reuse = plain[4], steps[3], steps[4:6]

    assert Counter(sam.evaluation) == Counter(base.evaluation)
    assert sam.looked_at == 0, "the model forms the loss: only torch functions outside of it are recorded"
    for step in reuse:
        assert Counter(step.evaluation) == Counter(base.evaluation)
        extra = _extra(step.update, base.update)
        assert sum(extra.values()) <= 1 and all(c.kind == "allreduce" and c.nbytes <= SMALL for c in extra)
        assert step.host_reads == base.host_reads
    # A norm may be summed in blocks, or tensor by tensor as DeepSpeed does; a shard in float64 may not fit.
    assert all(step.largest_fp64 <= max(base.largest_fp64, NUMEL // 8) for step in (sam, *reuse))

    extra = _extra(sam.update, base.update + base.evaluation)
    scalars = Counter({c: n for c, n in extra.items() if c.kind == "allreduce" and c.nbytes <= SMALL})
    assert sum(scalars.values()) <= 3
    added = sam.host_reads - base.host_reads - sam.evaluation_reads
    assert added <= 3, "can all ranks evaluate the window again, is g finite, and is g_v"
    publications = extra - scalars
    # Stages 1 and 2: one all-gather of the whole model in its own dtype, and none to take it back.
    assert sum(publications.values()) == (1 if case.stage in (1, 2) else 0)
    for publication in publications:
        assert "allgather" in publication.kind
        nbytes = NUMEL * (2 if case.precision == "bf16" else 4)
        assert nbytes <= publication.nbytes <= nbytes * 1.01


class Adapted(Stack):
    """Mostly frozen, like a model with LoRA: ``frozen`` layers, whose values a SAM step has to look at."""

    def __init__(self, frozen: int) -> None:
        torch.manual_seed(0)
        super().__init__(8, 8)
        self.frozen = nn.ModuleList(nn.Linear(7, 7).requires_grad_(False) for _ in range(frozen))


def test_host_reads_with_a_frozen_model() -> None:
    """Two SAM steps learn by comparison what the forward changes; later ones wait for the device once."""
    case = Case(world=1, k=1, updates=4, stage=2)
    few, many = (run_on_ranks(1, record_steps, case, True, partial(Adapted, frozen))[0][-1] for frozen in (1, 20))
    assert few.host_reads == many.host_reads


def waits_of_timer(case: Case) -> list[int]:
    """How often DeepSpeed's throughput timer has waited for the device in each update. Collective."""
    waits = []
    with engine_for(case) as engine, patch("deepspeed.utils.timer.get_accelerator") as accelerator:
        for update in range(case.updates):
            accelerator.return_value.synchronize.reset_mock()
            train_window(engine, case, update)
            waits.append(accelerator.return_value.synchronize.call_count)
        assert engine.tput_timer.config.enabled and engine.tput_timer.global_step_count == case.updates
    return waits


def test_the_second_evaluation_starts_no_timer() -> None:
    *_, reuse, sam, _ = run_on_ranks(1, waits_of_timer, Case(world=1, k=3, updates=8))[0]
    assert sam == reuse > 0


def _extra(more: list[Collective], less: list[Collective]) -> Counter[Collective]:
    """What ``more`` has beside everything in ``less``."""
    assert not Counter(less) - Counter(more), "LookSAM left out a collective of the base step"
    return Counter(more) - Counter(less)


PLAIN_GRID = {"stage": STAGES, "world": [1, 2], "base": ["AdamW", "SGD"], "precision": ["fp32", "bf16"]}


@pytest.mark.parametrize("case", cases(PLAIN_GRID, lambda row: as_plain(
    Case(**row, accumulation=2, clipping=0.05, two_groups=True, updates=7))))
def test_rho_0_with_alpha_0_is_the_base_optimizer_to_the_bit(case: Case) -> None:
    with_looksam, without = run_on_ranks(case.world, train, case), run_on_ranks(case.world, train, case, False)
    assert with_looksam[0].evaluations == 7 + 3
    for got, expected in zip(with_looksam, without, strict=True):
        for name, weight in expected.weights.items():
            assert torch.equal(got.weights[name], weight), name


@pytest.mark.parametrize("case", [
    *CASES, *(Case(world=2, alpha=0.7, stage=2, precision="bf16", ascent=ascent) for ascent in ("rank", "micro_batch"))
], ids=_id)
def test_state_is_one_fp32_shard_and_a_sam_step_holds_one_more(case: Case) -> None:
    case = replace(case, accumulation=1, k=2)
    ours, plain = (run_on_ranks(2, measure_memory, case, looksam)[0] for looksam in (True, False))
    shard = 4 * NUMEL // (1 if case.stage == 0 else 2)
    slack = 0.01 * shard + 15_000  # padding, scalars; of the window its input and two RNG states of 5 kB

    assert abs(ours.after - plain.after - shard) <= slack
    # In the replay: g beside g_v. On stage 0 the model's weights are kept, as nothing else has their bits then.
    weights = (shard if case.precision == "fp32" else shard // 2) if case.stage == 0 else 0
    # The rank's own gradient of the whole model, and of its weights a clean copy, in bf16.
    weights += {"global": 0, "rank": 2, "micro_batch": 4}[case.ascent] * NUMEL
    assert abs(ours.during - plain.during - 2 * shard - weights) <= slack


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
        return SimpleNamespace(wait=lambda: (events.append("wait"), work.wait()))

    with engine_for(case) as engine, patch.object(GradientShards, "_perturb_flat", noted_form), \
            patch.object(comm, "all_gather_into_tensor", noted_gather):
        train_window(engine, case, 0)
    return events


@pytest.mark.parametrize("stage, changes", [
    (1, {}), (2, {}), (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    (1, {"precision": "bf16", "config": GRAD_FP32}),
], ids=["stage1", "stage2", "offload", "BF16_Optimizer"])
def test_a_param_group_is_published_while_the_next_one_is_formed(stage: int, changes: dict[str, Any]) -> None:
    case = Case(world=2, stage=stage, two_groups=True, **changes)
    assert run_on_ranks(2, publication, case) == 2 * [["form", "send", "form", "send", "wait", "wait"]]

"""Ulysses sequence parallelism: two sequences at a time on four ranks, each sequence on two of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import oracle
from .models import FEATURES
from .ranks import run_on_ranks
from .test_oracle_grid import TOLERANCE
from .training import Case, distance, engine_for, master_weights, named

CPU = {"offload_optimizer": {"device": "cpu"}}
WORLD, SEQUENCE_RANKS = 4, 2
LENGTH, HEADS, WIDTH = 6, 2, 8
# SGD, which does not hide how long the gradient is.
CASE = Case(world=WORLD, accumulation=2, alpha=0.7, updates=7, micro_batch=3, base="SGD")
TIMES = {3: 1 / SEQUENCE_RANKS}
"""What DeepSpeed 0.19.8 makes of the gradient, by ZeRO stage: it adds up over the ranks of a sequence, but where stage
3 scatters the gradient it averages over them too."""


def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """[batch, length, heads, width of a head] each."""
    scores = torch.einsum("bihc,bjhc->bhij", q, k) / (WIDTH // HEADS)**0.5
    return torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v)


class Attention(nn.Module):
    """One layer of self-attention, and this rank's part of the mean squared error over the whole sequence: DeepSpeed
    adds gradients up over the ranks of a sequence, and averages over sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(FEATURES, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, FEATURES)
        self.attend: Any = attend
        self.times = 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
        error = self.out(self.attend(q, k, v, 0).flatten(2)) - y
        return self.times * error.square().sum() / (len(x) * LENGTH * FEATURES)


def sequences(update: int, replica: int, i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * update + 10 * replica + i)
    x = torch.randn(CASE.micro_batch, LENGTH, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.roll(x, 1, dims=1).tanh()


@contextmanager
def engine_on_parts(case: Case) -> Iterator[tuple[Any, int, slice]]:
    """The engine, which sequences this rank works on, and which part of each."""
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as mpu
    from deepspeed.sequence.layer import DistributedAttention
    from deepspeed.utils import groups

    if mpu._SEQUENCE_PARALLEL_GROUP is None:  # it lives as long as the process
        mpu.initialize_sequence_parallel(SEQUENCE_RANKS)
    replica, part = divmod(torch.distributed.get_rank(), SEQUENCE_RANKS)
    module = Attention()
    module.attend = DistributedAttention(attend, mpu.get_sequence_parallel_group(), scatter_idx=2, gather_idx=1)
    try:
        with engine_for(case, module=module, mpu=mpu) as engine:
            yield engine, replica, slice(part * LENGTH // SEQUENCE_RANKS, (part + 1) * LENGTH // SEQUENCE_RANKS)
    finally:
        groups.mpu = None


def train_window(engine: Any, case: Case, update: int, replica: int, here: slice) -> None:
    for i in range(case.accumulation):
        x, y = (t[:, here].float() for t in sequences(update, replica, i))
        engine.backward(engine(x, y))
        engine.step()


def train(case: Case) -> dict[str, Tensor]:
    with engine_on_parts(case) as (engine, *place):
        for update in range(case.updates):
            train_window(engine, case, update, *place)
        return master_weights(engine)


def by_oracle(case: Case, times: float) -> dict[str, Tensor]:
    module = Attention()
    module.times = times
    parameters = case.oracle_groups(module)
    reference = oracle.build(module, parameters, base=case.base, k=case.k, clipping=case.clipping)
    for update in range(case.updates):
        reference.update([sequences(update, replica, i) for replica in range(WORLD // SEQUENCE_RANKS)
                          for i in range(case.accumulation)])
    assert 0 < reference.clipped < case.updates, "clipping was meant to bind now and then"
    return named(reference.w, module, parameters)


@pytest.mark.parametrize(("stage", "zero"), [
    (0, {}), pytest.param(1, {}, marks=pytest.mark.grid), (2, {}), (3, {}),
    (2, CPU), pytest.param(3, CPU, marks=pytest.mark.grid)
])
def test_ulysses(stage: int, zero: dict[str, Any]) -> None:
    times = TIMES.get(stage, 1.0)
    case = replace(CASE, stage=stage, zero=zero, clipping=0.2 * times)
    expected = by_oracle(case, times)
    for got in run_on_ranks(WORLD, train, case):
        assert distance(got, expected) <= (3 if zero else 1) * TOLERANCE  # DeepSpeedCPUAdam: see test_offload


def train_on_whole_loss(case: Case, loss_fn: bool) -> dict[str, Tensor] | str:
    """The loss of the whole sequence is formed on each rank, by a collective outside the model, as in DeepSpeed's
    tutorial (with all_gather there, whose backward torch does not have for gloo's groups)."""
    import torch.distributed.nn.functional as differentiable

    from ds_looksam import LookSAMReplayError

    def whole(part_of_loss: Tensor, *inputs: Tensor) -> Tensor:
        return differentiable.all_reduce(part_of_loss, group=engine.get_sequence_parallel_group())

    with engine_on_parts(case) as (engine, replica, here):
        engine.loss_fn = whole if loss_fn else None
        for update in range(case.updates):
            for i in range(case.accumulation):
                x, y = (t[:, here].float() for t in sequences(update, replica, i))
                engine.backward(whole(engine(x, y)))
                try:
                    engine.step()
                except LookSAMReplayError as error:
                    return str(error)
        return master_weights(engine)


def test_loss_added_up_outside_the_model() -> None:
    """The backward of that collective adds up as well, so the gradient is that of the loss times SEQUENCE_RANKS."""
    case = replace(CASE, clipping=0.2 * SEQUENCE_RANKS)
    expected = by_oracle(case, times=SEQUENCE_RANKS)
    for got in run_on_ranks(WORLD, train_on_whole_loss, case, True):
        assert distance(got, expected) <= TOLERANCE
    for message in run_on_ranks(WORLD, train_on_whole_loss, CASE, False):
        assert "engine.loss_fn" in message and "_AllReduceBackward" in message


def train_with_a_stop(case: Case, folder: str) -> dict[str, Tensor]:
    with engine_on_parts(case) as (engine, *place):
        for update in range(4):
            train_window(engine, case, update, *place)
        engine.save_checkpoint(folder)
    with engine_on_parts(case) as (engine, *place):
        engine.load_checkpoint(folder)
        for update in range(4, case.updates):
            train_window(engine, case, update, *place)
        return master_weights(engine)


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    case = replace(CASE, stage=2)
    stopped = run_on_ranks(WORLD, train_with_a_stop, case, str(tmp_path))
    for got, expected in zip(stopped, run_on_ranks(WORLD, train, case), strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)

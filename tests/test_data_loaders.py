"""Training from the loader that ``deepspeed.initialize(training_data=...)`` returns, against the oracle."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from .models import CLASSES, FEATURES
from .ranks import run_on_ranks
from .training import TOLERANCE, Case, distance, engine_for, master_weights, named, start_oracle

SAMPLES = 53
"""27 for each of 2 ranks, one of them twice: 6 whole micro-batches of 4 and a shorter one, so that windows of 3 cross
the ends of epochs."""
CASE = Case(accumulation=3, clipping=0.05, updates=7)


def samples() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(FEATURES, generator=generator), torch.randint(0, CLASSES, (), generator=generator))
            for _ in range(SAMPLES)]


def micro_batches(rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of one epoch after the other, in the order that torch documents for DistributedSampler: a permutation drawn from
    seed 0, filled up from its start to a multiple of the world size, every world-th sample for each rank."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).tolist()
    order += order[:-SAMPLES % world]
    mine = [samples()[i] for i in order[rank::world]]
    while True:
        for i in range(0, len(mine), CASE.micro_batch):
            xs, ys = zip(*mine[i:i + CASE.micro_batch], strict=True)
            yield torch.stack(xs), torch.stack(ys)


def train_from_loader(case: Case, workers: int) -> dict[str, Tensor]:
    from deepspeed.runtime.dataloader import RepeatingLoader

    process = multiprocessing.current_process()
    process._config["daemon"] = False  # or Python lets it have no DataLoader workers
    multiprocessing.set_start_method("fork", force=True)  # a forkserver would import DeepSpeed anew
    with engine_for(case, training_data=samples()) as engine:
        assert len(engine.training_dataloader) == 7
        engine.training_dataloader.num_local_io_workers = workers
        batches = RepeatingLoader(engine.training_dataloader)
        for _ in range(case.updates * engine.gradient_accumulation_steps()):
            engine.backward(engine(*next(batches)))
            engine.step()
        process._config["daemon"] = True
        multiprocessing.set_start_method("forkserver", force=True)
        return master_weights(engine)


@pytest.mark.parametrize(("stage", "workers"), [(0, 0), (2, 2), pytest.param(1, 0, marks=pytest.mark.grid),
                                                pytest.param(3, 0, marks=pytest.mark.grid)])
def test_training_data(stage: int, workers: int) -> None:
    case = replace(CASE, stage=stage)
    reference, module, groups = start_oracle(case)
    streams = [micro_batches(rank, case.world) for rank in range(case.world)]
    for _ in range(case.updates):
        reference.update([next(stream) for stream in streams for _ in range(case.accumulation)])
    expected = named(reference.w, module, groups)
    for got in run_on_ranks(case.world, train_from_loader, case, workers):
        assert distance(got, expected) <= TOLERANCE

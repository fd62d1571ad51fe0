"""What one accumulation window sends and holds, measured: shared by test_costs.py and benchmarks/."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses import FakeTensor

from ds_looksam.replay.tape import LossTape

from .collectives import Collective, Recorder
from .models import Stack
from .training import Case, batches_for, engine_for, train_window


class Wide(Stack):
    """Large enough for scalars and shards not to be confused; no parameter stays gathered on stage 3 (see
    :func:`nothing_stays_gathered`)."""

    def __init__(self, width: int = 701) -> None:
        torch.manual_seed(0)
        super().__init__(width, 97)


def nothing_stays_gathered(stage: int) -> dict[str, int]:
    """Keys of "zero_optimization". Stage 3: so that nothing is published but by the forward; and no 2 GB bucket."""
    return {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000} if stage == 3 else {}


@dataclass
class Step:
    """One window: what forward and backward sent, what step() sent, the host's reads inside of either, step()'s largest
    float64 tensor in elements, and how many torch functions were looked at to record how the loss is formed."""

    evaluation: list[Collective]
    update: list[Collective]
    evaluation_reads: int
    host_reads: int
    largest_fp64: int
    looked_at: int


def record_steps(case: Case, looksam: bool, make: Callable[[], nn.Module] = Wide) -> list[Step]:
    """Run ``case.updates`` windows on this rank. Collective."""
    with engine_for(case, looksam, module=make()) as engine:
        steps = []
        for update in range(case.updates):
            evaluation, last = Recorder(), Recorder()
            with patch.object(LossTape, "__torch_function__", autospec=True,
                              side_effect=LossTape.__torch_function__) as looked_at:
                for x, y in batches_for(engine, case, update):
                    with evaluation:
                        engine.backward(engine(x, y))
                    with last:
                        engine.step()
            steps.append(Step(evaluation.collectives, last.collectives, evaluation.host_reads, last.host_reads,
                              last.largest_fp64, looked_at.call_count))
        return steps


def tensor_bytes() -> int:
    """Bytes of all storages that some Python object reaches. Fake tensors, which compilers leave behind, have none.

    The least of three looks: gloo's threads hold what they have reduced for some milliseconds longer.
    """
    return min(_tensor_bytes() for _ in range(3))


def _tensor_bytes() -> int:
    time.sleep(0.03)
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclass
class Memory:
    """Bytes after an update, and while the model's last forward before that update runs; beside what was there before
    the engine (DeepSpeed's stage 3 leaves a part of each engine behind)."""

    after: int
    during: int


def measure_memory(case: Case, looksam: bool, make: Callable[[], nn.Module] = Wide) -> Memory:
    """Of a SAM step that is not the first, on this rank, where LookSAM is on. Collective."""
    before = tensor_bytes()
    with engine_for(case, looksam, module=make()) as engine:
        for update in range(case.k):
            train_window(engine, case, update)
        during: list[int] = []
        handle = engine.module.head.register_forward_pre_hook(lambda *_: during.append(tensor_bytes()))
        train_window(engine, case, case.k)  # a SAM step, when LookSAM is on: the last forward is the replay's
        handle.remove()
        return Memory(after=tensor_bytes() - before, during=during[-1] - before)

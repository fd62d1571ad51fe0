"""One process as rank 0 of thousands: torch's fake process group, with collectives that leave sensible numbers behind.

The fake group sends nothing and writes nothing: an all-gather leaves its output as it was allocated, and a model made
of that has NaN for a loss, on which LookSAM rightly makes no SAM step. Here every other rank answers as if it held what
rank 0 holds: a sum over n ranks is n times the own part, an all-gather n copies of it. So numbers stay finite and of
the right size, and control flow is that of training. They are not the numbers of any real run.

The collectives are replaced below every wrapper of torch.distributed, in torch's dispatcher, so that what is written
down is what a real backend would have been asked for; unlike with a dispatch mode nothing else gets slower.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed

from tests.collectives import Collective

SUM = int(distributed.ReduceOp.SUM.value)


@dataclass
class Wire:
    """What a stretch of the program asked the process group for, and the CPU seconds spent here on answering."""

    collectives: list[Collective] = field(default_factory=list)
    seconds: float = 0.0


class OneOfMany:
    """Make this process rank 0 of ``world`` ranks, for the rest of its life.

    Use one process per world size: DeepSpeed keeps its groups in globals.
    """

    def __init__(self, world: int, ranks_per_node: int = 8) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        # Sums through shared memory among a host's CPU ranks, compiled at first use: there are no others here.
        # (By its name: the attribute ``torch`` of deepspeed.comm is torch.)
        comm: Any = import_module("deepspeed.comm.torch")
        comm.build_shm_op = lambda: None
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world),
                          LOCAL_WORLD_SIZE=str(min(world, ranks_per_node)))
        distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        self._wire = Wire()
        self._library = torch.library.Library("c10d", "IMPL")
        kernels = {"allreduce_": self._all_reduce, "broadcast_": self._broadcast,
                   "_allgather_base_": self._all_gather, "_reduce_scatter_base_": self._reduce_scatter}
        with warnings.catch_warnings():  # that an operator's kernel is replaced is the point
            warnings.simplefilter("ignore")
            for name, kernel in kernels.items():
                self._library.impl(name, kernel, "CPU")

    @contextmanager
    def listen(self) -> Iterator[Wire]:
        """What is sent inside the block."""
        outer, self._wire = self._wire, Wire()
        try:
            yield self._wire
        finally:
            outer.collectives += self._wire.collectives
            outer.seconds += self._wire.seconds
            self._wire = outer

    # The kernels: the arguments are those of torch.ops.c10d, the last ones left out where they have their defaults.

    def _all_reduce(self, tensors: list[Tensor], group: Any, op: Any, *_: Any) -> Any:
        with self._record("allreduce", sum(t.nbytes for t in tensors), group) as (ranks, work):
            if int(op.op()) == SUM:
                for t in tensors:
                    t.mul_(ranks)
        return tensors, work

    def _broadcast(self, tensors: list[Tensor], group: Any, *_: Any) -> Any:
        with self._record("broadcast", sum(t.nbytes for t in tensors), group) as (_ranks, work):
            pass
        return tensors, work

    def _all_gather(self, output: Tensor, part: Tensor, group: Any, *_: Any) -> Any:
        with self._record("allgather_base", output.nbytes, group) as (ranks, work):
            # The own part may be a view of the output.
            output.view(ranks, -1).copy_(part.clone().view(1, -1).expand(ranks, -1))
        return output, work

    def _reduce_scatter(self, output: Tensor, whole: Tensor, group: Any, op: Any, *_: Any) -> Any:
        with self._record("reduce_scatter_base", whole.nbytes, group) as (ranks, work):
            output.copy_(whole.view(-1)[:output.numel()].view_as(output))  # rank 0's part
            if int(op.op()) == SUM:
                output.mul_(ranks)
        return output, work

    @contextmanager
    def _record(self, kind: str, nbytes: int, boxed_group: Any) -> Iterator[tuple[int, Any]]:
        group = distributed.ProcessGroup.unbox(boxed_group)
        backend: Any = group._get_backend(torch.device("cpu"))
        work = backend.barrier().boxed()  # the fake group's answer to anything
        start = time.process_time()
        with torch.no_grad():
            yield group.size(), work
        self._wire.seconds += time.process_time() - start
        self._wire.collectives.append(Collective(kind, nbytes, group.size()))

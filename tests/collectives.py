"""What a stretch of code sends and reads back, seen by torch's dispatcher below every wrapper of torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default


@dataclass(frozen=True)
class Collective:
    """``kind`` is c10d's name of the operation; ``nbytes`` the size of its largest argument on this rank (of an
    all-gather what comes out, of a reduce-scatter what goes in, however many tensors it is cut into); ``ranks`` the
    size of its process group."""

    kind: str
    nbytes: int
    ranks: int


class Recorder(TorchDispatchMode):
    """Records collectives, the host's reads of device values (``.item()``, ``bool(tensor)``, ``torch.equal``), and how
    many elements the largest float64 tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.host_reads = self.largest_fp64 = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname not in ("monitored_barrier_", "barrier"):
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor)) for arg in args]
            self.collectives.append(Collective(func._opname.strip("_"), max(sizes), _ranks(args)))
        if func in _READS:
            self.host_reads += 1
        made = func(*args, **(kwargs or {}))
        self.largest_fp64 = max([self.largest_fp64, *(
            t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.dtype == torch.float64)])
        return made


def _ranks(args: Any) -> int:
    """The size of the process group among a c10d operation's arguments."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and str(arg._type()).endswith("c10d.ProcessGroup"):
            return torch.distributed.ProcessGroup.unbox(arg).size()
    raise AssertionError("a c10d operation without a process group")

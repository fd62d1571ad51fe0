"""What a stretch of code sends and reads back, seen by torch's dispatcher below every wrapper of torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Collective:
    """``kind`` is c10d's name of the operation; ``nbytes`` the size of the largest tensor handed to it on this rank."""

    kind: str
    nbytes: int


class Recorder(TorchDispatchMode):
    """Records collectives, and the reads of a device value by the host (``.item()``, ``bool(tensor)``)."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.host_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname not in ("monitored_barrier_", "barrier"):
            sizes = [t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.collectives.append(Collective(func._opname.rstrip("_"), max(sizes, default=0)))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.host_reads += 1
        return func(*args, **(kwargs or {}))

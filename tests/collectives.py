"""What goes over the wire, seen below torch.distributed: whoever sends it, by whatever name it was imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Call(NamedTuple):
    """One collective: c10d's name (``allreduce_``, ``_allgather_base_``, ...) and the elements of all its tensors."""

    name: str
    numel: int


class _Counting(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.calls.append(Call(func._schema.name.split("::")[1], sum(t.numel() for t in tensors)))
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[list[Call]]:
    """The collectives of this process inside the ``with``, in order."""
    calls: list[Call] = []
    with _Counting(calls):
        yield calls

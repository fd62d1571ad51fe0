"""What a forward was called with, kept so that it can be called again.

Containers and generators are copied, since loops refill them and models pop and draw from them; tensors and arrays are
not, but watched.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LookSAMReplayError
from .recording import Apart, Made, version_of

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (dict, list, tuple, set, frozenset, Mapping)


def rebuilt(value: Any, of_leaf: Callable[[Any], Any], known: dict[int, Any] | None = None) -> Any:
    """``value`` with the containers and generators in it copied and ``of_leaf(x)`` for each tensor (or what stands for
    one), array and iterator, in an order that is the same every time.

    Containers are dicts, lists, tuples and what derives from them, dataclasses, and objects that hold tensors or
    containers in their attributes (``UserDict``, a batch class). Modules, classes and functions are left alone.
    """
    known = {} if known is None else known
    if isinstance(value, (Tensor, np.ndarray, Iterator, Made, Apart)):
        return of_leaf(value)
    if id(value) in known:  # shared, or a circle
        return known[id(value)]
    if isinstance(value, _GENERATORS) and not isinstance(value, random.SystemRandom):
        known[id(value)] = (torch.Generator(value.device).set_state(value.get_state())
                            if isinstance(value, torch.Generator) else copy.deepcopy(value))
        return known[id(value)]

    def inner(item: Any) -> Any:
        return rebuilt(item, of_leaf, known)

    if type(value) is tuple:
        return tuple(inner(item) for item in value)
    if isinstance(value, tuple):
        return type(value)(*(inner(item) for item in value)) if hasattr(value, "_fields") else value
    if isinstance(value, (nn.Module, type)) or callable(value) or not _is_container(value):
        return value
    new = known[id(value)] = copy.copy(value)
    known[id(new)] = value  # keeps it alive: another object at its address would be taken for it
    if isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(new, key, inner(item))
    elif isinstance(value, list):
        list.__setitem__(new, slice(None), [inner(item) for item in value])
    for name, item in attributes(value).items():
        object.__setattr__(new, name, inner(item))  # also where the class is frozen
    return new


def attributes(value: Any) -> dict[str, Any]:
    """An object's own attributes, in its ``__dict__`` or a dataclass's slots."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    slots = {f.name: getattr(value, f.name) for f in fields if hasattr(value, f.name)}
    return {**slots, **getattr(value, "__dict__", {})}


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list)) or dataclasses.is_dataclass(value) or any(
        isinstance(item, (Tensor, np.ndarray, *_CONTAINERS)) for item in attributes(value).values())


class Watched:
    """The tensors and arrays in ``value``, and whether they have been changed.

    A tensor has a version counter. What is written to the memory of a NumPy array does not count there: the bytes of
    arrays, and of tensors on memory that torch has not allocated, are summed up (CRC-32, some GB/s). Nothing tells of
    what is written through ``tensor.data``, or by another program.
    """

    def __init__(self, value: Any) -> None:
        self.iterator: Iterator[Any] | None = None  # one that the forward has used up
        self._marks: list[tuple[Any, Callable[[Any], int | None], int | None]] = []
        self._changed_by_forward: Any = None
        rebuilt(value, self._watch)

    def _watch(self, leaf: Any) -> Any:
        if isinstance(leaf, Iterator):
            self.iterator = leaf
        elif isinstance(leaf, Tensor):
            self._marks.append((leaf, version_of, version_of(leaf)))
        is_foreign = isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided and (
            not leaf.untyped_storage().resizable())
        if is_foreign or isinstance(leaf, np.ndarray):
            self._marks.append((leaf, crc, crc(leaf)))
        return leaf

    def forward_is_over(self) -> None:
        """Tensors that are changed now were changed by the forward itself."""
        self._changed_by_forward = next((x for x, look, then in self._marks if look is version_of and look(x) != then),
                                        None)

    def check(self) -> None:
        """Raise LookSAMReplayError if one of them was changed."""
        changed = self._changed_by_forward
        if changed is not None:
            raise LookSAMReplayError(
                f"an input of the model (shape {tuple(changed.shape)}, {changed.dtype}) is changed in place by the "
                "model's own forward, so the second evaluation would start from what the first one has left. Let the "
                "forward change a copy: x = x.clone().")
        changed = next((x for x, look, then in self._marks if look(x) != then), None)
        if changed is not None:
            raise LookSAMReplayError(
                f"an input of the model (shape {tuple(changed.shape)}, {changed.dtype}) was changed in place after its "
                "forward, so the second evaluation would see another micro-batch. Give each forward its own tensors.")
        if self.iterator is not None:
            raise LookSAMReplayError(
                f"an input of the model is an iterator ({type(self.iterator).__name__}), which its forward has used "
                "up. Give it a list.")


def crc(value: Any) -> int:
    """Of the bytes of a tensor in host memory, or of an array."""
    if isinstance(value, Tensor):
        value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else np.zeros(0)
    return 0 if value.dtype.hasobject else zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

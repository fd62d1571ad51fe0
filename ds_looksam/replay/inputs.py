"""What a forward was called with, kept so that it can be called again.

Containers and generators are copied, since loops refill them and models pop and draw from them; tensors and arrays are
not, but watched.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LookSAMReplayError
from .marks import Mark, is_changed, marks_of, version_of
from .recording import Apart, Made

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque, Mapping)
_LEFT_ALONE = (nn.Module, type, FunctionType, MethodType)
_DEPTH = 4


def state_of(generator: Any) -> Any:
    """Of one of :data:`GENERATORS`; None where it has none (``random.SystemRandom``)."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return None if isinstance(generator, random.SystemRandom) else generator.getstate()
    return generator.get_state()


def set_state_of(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        if state is not None:
            generator.setstate(state)
    else:
        generator.set_state(state)


def rebuilt(value: Any, of_leaf: Callable[[Any], Any], known: dict[int, Any] | None = None) -> Any:
    """``value`` with the containers and generators in it copied and ``of_leaf(x)`` for each tensor (or what stands for
    one), array and iterator, in an order that is the same every time.

    Containers are dicts, lists, tuples, sets, deques and what derives from them, dataclasses, and objects that hold
    tensors or containers in their attributes (``UserDict``, a batch class). Modules, classes and functions are left
    alone.
    """
    known = {} if known is None else known
    if isinstance(value, (Tensor, np.ndarray, Iterator, Made, Apart)):
        return of_leaf(value)
    if id(value) in known:  # shared, or a circle
        return known[id(value)]
    if isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom):
        known[id(value)] = (torch.Generator(value.device).set_state(value.get_state())
                            if isinstance(value, torch.Generator) else copy.deepcopy(value))
        return known[id(value)]

    def inner(item: Any) -> Any:
        return rebuilt(item, of_leaf, known)

    if type(value) is tuple:
        return tuple(inner(item) for item in value)
    if isinstance(value, tuple):
        return type(value)(*(inner(item) for item in value)) if hasattr(value, "_fields") else value
    if isinstance(value, _LEFT_ALONE) or not _is_container(value):
        return value
    new = known[id(value)] = copy.copy(value)
    known[id(new)] = value  # keeps it alive: another object at its address would be taken for it
    if isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(new, key, inner(item))
    elif isinstance(value, list):
        list.__setitem__(new, slice(None), [inner(item) for item in value])
    elif isinstance(value, deque):
        new.clear()
        new.extend(inner(item) for item in value)
    elif isinstance(value, set):
        new.clear()
        new.update(inner(item) for item in value)
    for name, item in attributes(value).items():
        object.__setattr__(new, name, inner(item))  # also where the class is frozen
    return new


def attributes(value: Any) -> dict[str, Any]:
    """An object's own attributes, in its ``__dict__`` or a dataclass's slots."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    slots = {f.name: getattr(value, f.name) for f in fields if hasattr(value, f.name)}
    return {**slots, **getattr(value, "__dict__", {})}


def _is_container(value: Any, depth: int = _DEPTH) -> bool:
    if isinstance(value, (dict, list, set, deque)) or dataclasses.is_dataclass(value):
        return True
    return depth > 0 and any(
        isinstance(item, (Tensor, np.ndarray, *_CONTAINERS))
        or (hasattr(item, "__dict__") and not isinstance(item, _LEFT_ALONE) and _is_container(item, depth - 1))
        for item in attributes(value).values())


class Watched:
    """The tensors and arrays in ``value``, and whether they have been changed."""

    def __init__(self, value: Any) -> None:
        self.iterator: Iterator[Any] | None = None  # one that the forward has used up
        self._marks: list[Mark] = []
        self._changed_by_forward: Any = None
        rebuilt(value, self._watch)

    def _watch(self, leaf: Any) -> Any:
        if isinstance(leaf, Iterator):
            self.iterator = leaf
        elif isinstance(leaf, (Tensor, np.ndarray)):
            self._marks += marks_of(leaf)
        return leaf

    def forward_is_over(self) -> None:
        """Tensors that are changed now were changed by the forward itself."""
        self._changed_by_forward = next((mark[0] for mark in self._marks if mark[1] is version_of and is_changed(mark)),
                                        None)

    def check(self) -> None:
        """Raise LookSAMReplayError if one of them was changed."""
        changed = self._changed_by_forward
        if changed is not None:
            raise LookSAMReplayError(
                f"an input of the model (shape {tuple(changed.shape)}, {changed.dtype}) is changed in place by the "
                "model's own forward, so the second evaluation would start from what the first one has left. Let the "
                "forward change a copy: x = x.clone().")
        changed = next((mark[0] for mark in self._marks if is_changed(mark)), None)
        if changed is not None:
            raise LookSAMReplayError(
                f"an input of the model (shape {tuple(changed.shape)}, {changed.dtype}) was changed in place after its "
                "forward, so the second evaluation would see another micro-batch. Give each forward its own tensors.")
        if self.iterator is not None:
            raise LookSAMReplayError(
                f"an input of the model is an iterator ({type(self.iterator).__name__}), which its forward has used "
                "up. Give it a list.")

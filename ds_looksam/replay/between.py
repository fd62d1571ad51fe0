"""What a loop changes in its model between two forwards of a window."""

from __future__ import annotations

import pickle
import weakref
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..arithmetic.eager import are_same, read_flags
from ..errors import LookSAMReplayError
from ..shards.untrained import drop_gathered, norms_of, values_of
from .contents import PLAIN, TOO_MANY, Restore, attributes_of, copy_of, is_entered, items_of, refill
from .inputs import GENERATORS, state_of
from .marks import crc, version_of
from .snapshot import submodules

_DEPTH, _MANY = 4, 64  # how deep, and in containers of how many entries, changes are looked for
_SMALL = 1 << 20  # bytes of an array that are summed up at every forward


class Attributes:
    """A module's attributes, buffers and ``frozen`` parameters at one moment, and what is in attributes that are
    containers or objects: for what a loop, or a forward that is not evaluated again, sets between two forwards that
    are.

    Tensors are held weakly (some models keep attention maps there), but for attributes set ``since`` another moment;
    what was written to tensors and small arrays since is copied. Nothing tells of writes to a tensor's ``.data``.
    """

    def __init__(self, module: nn.Module, since: Attributes | None = None, frozen: Iterable[nn.Parameter] = ()) -> None:
        modules = submodules(module)
        known: dict[int, _Held] = {}  # many modules hold one configuration
        self._of = {m: {name: known.get(id(value)) or known.setdefault(id(value), _Held(value))
                        for name, value in attributes_of(m).items()} for m in modules}
        self._buffers = {(m, name): (_weak(buffer), _mark_of_buffer(buffer)) for m in modules
                         for name, buffer in m._buffers.items()}
        self._frozen = {p: (values_of(p).data_ptr(), version_of(values_of(p))) for p in frozen}
        self._norms = dict(zip(self._frozen, norms_of(self._frozen), strict=True))
        self._kept: list[Any] = []
        self._copies: dict[tuple[nn.Module, str], tuple[Tensor | None, Restore]] = {}
        self._copies_of_frozen: dict[nn.Parameter, Tensor] = {}
        if since is not None:
            self._kept = [held.keep(other) for _, _, held, other in self._changes(since)]
            for m, name in self._written(since):
                buffer = m._buffers[name]
                self._copies[m, name] = buffer, _nothing if buffer is None or buffer.is_inference() else copy_of(buffer)
            self._copies_of_frozen = {p: values_of(p).detach().clone() for p, mark in self._frozen.items()
                                      if mark != since._frozen.get(p)}

    def set_changes_since(self, before: Attributes) -> None:
        """Give the module the attributes, buffers and frozen parameters that it has here and had not ``before``."""
        for m, name, held, _ in self._changes(before):
            if not held.is_gone():
                vars(m)[name] = held.put_back()
        for m, name in self._written(before):
            if (m, name) in self._copies:
                m._buffers[name], write = self._copies[m, name]
                write()
        for p, value in self._copies_of_frozen.items():
            values_of(p).data.copy_(value)
        drop_gathered(self._frozen)

    def check_frozen(self, before: Attributes) -> None:
        """Raise LookSAMReplayError if a frozen parameter has other values than ``before`` and nothing told of it. Reads
        from the device where there are any."""
        same = [are_same(self._norms[p], before._norms[p])
                for p, mark in self._frozen.items() if mark == before._frozen.get(p)]
        if not all(read_flags(same)):
            raise LookSAMReplayError(
                "a parameter that is not trained (a momentum teacher's, say) was changed through .data between two "
                "micro-batches of a window, of which nothing tells: the second evaluation would run with one state of "
                "it. Change it once per update, if engine.is_gradient_accumulation_boundary() is true before "
                "engine.step(), or in place under torch.no_grad() without .data")

    def _written(self, before: Attributes) -> list[tuple[nn.Module, str]]:
        nothing = _Held, None  # like no buffer
        return [key for key, (buffer, version) in self._buffers.items()
                if version != before._buffers.get(key, nothing)[1]
                or not _is_same(buffer, before._buffers.get(key, nothing)[0])]

    def _changes(self, before: Attributes) -> Iterator[tuple[nn.Module, str, _Held, _Held]]:
        """The attributes that are not the same, and what they were before."""
        nothing = _Held(_Held)  # like no attribute
        same: set[tuple[int, int]] = set()
        for m, attributes in self._of.items():
            for name, held in attributes.items():
                other = before._of.get(m, {}).get(name, nothing)
                if (id(held), id(other)) in same or held.is_same(other):
                    same.add((id(held), id(other)))
                else:
                    yield m, name, held, other


def _nothing() -> None:
    pass


class _Weak(weakref.ref[Tensor]):
    """Not one of the user's own weak references."""


class _Held:
    """A value, and what is in it (by key or place) if it is a container or an object, with weak references to tensors
    and the numbers of their versions."""

    def __init__(self, value: Any, depth: int = _DEPTH) -> None:
        self._value = _weak(value)
        self._mark = _mark_of(value)
        self._copy: Restore | None = None
        items = _items_in(value) if depth else []
        deeper = depth - 1 if len(items) <= _MANY else 0
        self._contents = {key: item if type(item) in PLAIN else _Held(item, deeper) for key, item in items}

    def keep(self, before: Any) -> Any:
        """The value, None also where it is gone. Tensors and arrays written since ``before`` are copied, and the states
        of generators."""
        value = _strong(self._value)
        known = isinstance(before, _Held)
        was_written = known and _is_same(self._value, before._value) and self._mark != before._mark
        if was_written or isinstance(value, GENERATORS):
            self._copy = copy_of(value)
        for key, item in self._contents.items():
            if isinstance(item, _Held):
                item.keep(before._contents.get(key) if known else None)
        return value

    def is_same(self, other: Any) -> bool:
        return (isinstance(other, _Held) and _is_same(self._value, other._value) and self._mark == other._mark
                and len(self._contents) == len(other._contents)
                and all(a is b or (type(a) in PLAIN and a == b)
                        for a, b in zip(self._contents, other._contents, strict=True))
                and all(a.is_same(b) if isinstance(a, _Held) else a is b
                        for a, b in zip(self._contents.values(), other._contents.values(), strict=True)))

    def is_gone(self) -> bool:
        return (isinstance(self._value, _Weak) and self._value() is None) or any(
            isinstance(item, _Held) and item.is_gone() for item in self._contents.values())

    def put_back(self) -> Any:
        """The value, with what was in it."""
        value = _strong(self._value)
        if self._copy is not None:
            self._copy()
        items = {key: item.put_back() if isinstance(item, _Held) else item for key, item in self._contents.items()}
        inner = _inside(value) if items else None
        if inner is not None and not isinstance(inner, tuple):
            refill(inner, items if isinstance(inner, dict) else list(items.values()))
        return value


def _mark_of_buffer(buffer: Tensor | None) -> tuple[int | None, int] | None:
    """Another one once it has been written to, or given other memory."""
    if buffer is None or is_lazy(buffer):
        return None
    return version_of(buffer), buffer.data_ptr() if buffer.layout == torch.strided else 0


def _mark_of(value: Any) -> int | None:
    """Another number once a tensor or an array has been written to, or a generator was drawn from. Of weights none:
    LookSAM and ZeRO write to them."""
    if type(value) in PLAIN:
        return None
    if isinstance(value, GENERATORS):
        return zlib.crc32(pickle.dumps(state_of(value)))
    if isinstance(value, Tensor):
        return None if value.requires_grad or isinstance(value, nn.Parameter) else version_of(value)
    return crc(value) if isinstance(value, np.ndarray) and value.nbytes <= _SMALL else None


def _items_in(value: Any) -> list[tuple[Any, Any]]:
    """By key or place; nothing where there are too many."""
    inner = _inside(value)
    if inner is not None and len(inner) > TOO_MANY:
        return []
    return list(items_of(inner) if isinstance(inner, dict) else enumerate(() if inner is None else inner))


def _inside(value: Any) -> Any:
    """The container that ``value`` is, or that holds its attributes; None if there is none."""
    if type(value) in PLAIN:
        return None
    if isinstance(value, (dict, set, list, deque, tuple)):
        return value
    is_plain = hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, Tensor))
    return vars(value) if is_plain and is_entered(type(value).__module__) else None


def _weak(value: Any) -> Any:
    return _Weak(value) if issubclass(type(value), Tensor) else value


def _strong(value: Any) -> Any:
    return value() if isinstance(value, _Weak) else value


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, _Weak) and isinstance(b, _Weak) and a() is not None and a() is b())

"""What a forward changes in its module: buffers, frozen parameters (a momentum teacher), and Python attributes.

The second evaluation starts from the state that the first one started from, so that both see the same hidden state,
counter, queue or teacher; afterwards the module is left as the first one left it.
"""

from __future__ import annotations

import copy
import io
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from deepspeed.utils import logger
from torch import Tensor, nn

from ..errors import LookSAMReplayError
from ..shards.untrained import are_in_memory, drop_gathered, is_partitioned, values_of, whole_nbytes
from .inputs import crc
from .recording import version_of
from .snapshot import submodules

Restore = Callable[[], Any]

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward", "trainer", "_trainer", "_fabric"}
_OF_DEEPSPEED = ("ds_", "_ds", "_external_params", "_original_parameters", "applied_pre_backward", "pre_bwd_fn",
                 "post_bwd_fn")
_NOT_ENTERED = {"torch", "deepspeed", "lightning", "lightning_fabric", "pytorch_lightning"}
_PLAIN = {type(None), bool, int, float, str, bytes}  # nothing is in them; looked up first, for there are many
_LIMIT = 64 << 20  # bytes of tensors and arrays in attributes that are copied: some models keep attention maps there
_DEPTH = 4
_MANY = 64  # entries: what is in them is looked at in no larger container (a vocabulary, a data set)
_SMALL = 1 << 20  # bytes of an array that are summed up at every forward
_PIECE = 1 << 24


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    """Without torch's own, and DeepSpeed's counters on modules."""
    return {name: value for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE and not name.startswith(_OF_DEEPSPEED)}


class ModuleState:
    """One module's state at one moment. ``frozen``: parameters that nobody optimizes and that are to be copied."""

    def __init__(self, module: nn.Module, frozen: Iterable[nn.Parameter] = ()) -> None:
        modules = submodules(module)
        self._buffers = [(m, name, buffer, buffer.detach().clone()) for m in modules
                         for name, buffer in m._buffers.items() if buffer is not None]
        self.frozen = [(p, values_of(p).detach().clone()) for p in frozen]
        self._attributes = [(m, _attributes_of(m)) for m in modules]
        self._opaque: list[tuple[str, Any, str]] = []
        self._bytes_left, self._known = _LIMIT, set[int]()
        self._metric_states = {id(vars(m).get(name)) for m in _instances(modules, "Metric", "torchmetrics")
                               for name in m._defaults}  # type: ignore[union-attr]
        self._contents = [restore for m, attributes in self._attributes for name, value in attributes.items()
                          if type(value) not in _PLAIN
                          for restore in self._contents_of(value, f"{type(m).__name__}.{name}", _DEPTH)]

    def restore(self) -> list[str]:
        """Put it back. Returns the names of what was changed since and cannot be."""
        with torch.no_grad():
            for owner, name, buffer, saved in self._buffers:
                buffer.copy_(saved)
                owner._buffers[name] = buffer
            for p, saved in self.frozen:
                values_of(p).data.copy_(saved)
        drop_gathered(p for p, _ in self.frozen)
        for m, saved_attributes in self._attributes:
            for name in _attributes_of(m).keys() - saved_attributes.keys():
                del vars(m)[name]
            vars(m).update(saved_attributes)
        for restore in self._contents:
            restore()
        return [name for name, value, look in self._opaque if _look_of(value) != look]

    def _contents_of(self, value: Any, name: str, depth: int) -> Iterator[Restore]:
        """What puts back the contents of ``value`` and of all that is in it."""
        if not depth or id(value) in self._known:
            return
        if isinstance(value, (int, float, str, bytes, type, nn.Module, nn.Parameter)):
            return
        self._known.add(id(value))
        inner: Iterable[Any] = ()
        if isinstance(value, (Tensor, np.ndarray)):
            yield from self._copy_of(value)
        elif isinstance(value, (torch.Generator, np.random.RandomState)):
            state: Any = value.get_state()
            yield partial(value.set_state, state)
        elif isinstance(value, np.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif isinstance(value, (tuple, frozenset)):
            inner = value
        elif isinstance(value, (dict, set, list, deque)):
            inner = list(value.values() if isinstance(value, dict) else value)
            yield partial(_refill, value, copy.copy(value))
        elif isinstance(value, (Iterator, io.IOBase)):
            self._opaque.append((name, value, _look_of(value)))
        elif hasattr(value, "__dict__") and not callable(value) and _is_entered(type(value).__module__):
            inner = list(vars(value).values())
            yield partial(_refill, vars(value), dict(vars(value)))
        for item in inner:
            if type(item) not in _PLAIN:
                yield from self._contents_of(item, name, depth - 1)

    def _copy_of(self, value: Any) -> Iterator[Restore]:
        if id(value) not in self._metric_states:  # those are copied whatever their size: they are counted up in place
            self._bytes_left -= value.nbytes
            if self._bytes_left < 0:
                return
        if isinstance(value, np.ndarray):
            yield partial(np.copyto, value, value.copy())
        elif not value.is_inference() and value.layout == torch.strided:
            yield partial(value.data.copy_, value.detach().clone())


def _is_entered(module: str) -> bool:
    """Whether the attributes of an object are looked at whose class is from there."""
    package = module.partition(".")[0]
    return package in ("types", "collections") or package not in {*_NOT_ENTERED, *sys.stdlib_module_names}


def _instances(modules: list[nn.Module], name: str, *packages: str) -> list[nn.Module]:
    """Those of the class of that name in a package that the user has imported."""
    classes = tuple(getattr(sys.modules[package], name) for package in packages if package in sys.modules)
    return [m for m in modules if isinstance(m, classes)]


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _refill(container: Any, items: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(items)


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
                        for name, value in _attributes_of(m).items()} for m in modules}
        self._buffers = {(m, name): (_Weak(buffer), version_of(buffer)) for m in modules
                         for name, buffer in m._buffers.items() if buffer is not None}
        self._frozen = {p: (values_of(p).data_ptr(), version_of(values_of(p))) for p in frozen}
        self._norms = dict(zip(self._frozen, _norms(self._frozen), strict=True))
        self._kept: list[Any] = []
        self._copies: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
        self._copies_of_frozen: dict[nn.Parameter, Tensor] = {}
        if since is not None:
            self._kept = [held.keep(other) for _, _, held, other in self._changes(since)]
            for m, name in self._written(since):
                buffer = m._buffers[name]
                assert buffer is not None
                self._copies[m, name] = buffer, buffer.detach().clone()
            self._copies_of_frozen = {p: values_of(p).detach().clone() for p, mark in self._frozen.items()
                                      if mark != since._frozen.get(p)}

    def set_changes_since(self, before: Attributes) -> None:
        """Give the module the attributes, buffers and frozen parameters that it has here and had not ``before``."""
        for m, name, held, _ in self._changes(before):
            if not held.is_gone():
                vars(m)[name] = held.put_back()
        for m, name in self._written(before):
            if (m, name) in self._copies:
                buffer, value = self._copies[m, name]
                with torch.no_grad():
                    buffer.copy_(value)
                m._buffers[name] = buffer
        for p, value in self._copies_of_frozen.items():
            values_of(p).data.copy_(value)
        drop_gathered(self._frozen)

    def check_frozen(self, before: Attributes) -> None:
        """Raise LookSAMReplayError if a frozen parameter has other values than ``before`` and nothing told of it. Reads
        from the device where there are any."""
        same = [torch.isclose(self._norms[p], before._norms[p], rtol=0, atol=0, equal_nan=True)
                for p, mark in self._frozen.items() if mark == before._frozen.get(p)]
        if same and not torch.stack([flag.to(same[0].device) for flag in same]).all().item():
            raise LookSAMReplayError(
                "a parameter that is not trained (a momentum teacher's, say) was changed through .data between two "
                "micro-batches of a window, of which nothing tells: the second evaluation would run with one state of "
                "it. Change it once for each update, where engine.is_gradient_accumulation_boundary() before "
                "engine.step(), or in place under torch.no_grad() without .data")

    def _written(self, before: Attributes) -> list[tuple[nn.Module, str]]:
        nothing = None, None
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


class _Weak(weakref.ref[Tensor]):
    """Not one of the user's own weak references."""


class _Held:
    """A value, and what is in it (by key or place) if it is a container or an object, with weak references to tensors
    and the numbers of their versions."""

    def __init__(self, value: Any, depth: int = _DEPTH) -> None:
        self._value = _weak(value)
        self._mark = _mark_of(value)
        self._copy: Any = None
        items = _items_in(value) if depth else []
        deeper = depth - 1 if len(items) <= _MANY else 0
        self._contents = {key: item if type(item) in _PLAIN else _Held(item, deeper) for key, item in items}

    def keep(self, before: _Held) -> Any:
        """The value, None also where it is gone. Tensors and arrays written since ``before`` are copied."""
        value, contents = _strong(self._value), before._contents
        if _is_same(self._value, before._value) and self._mark != before._mark:
            self._copy = value.detach().clone() if isinstance(value, Tensor) else value.copy()
        for key, item in self._contents.items():
            if isinstance(item, _Held) and isinstance(other := contents.get(key), _Held):
                item.keep(other)
        return value

    def is_same(self, other: Any) -> bool:
        return (isinstance(other, _Held) and _is_same(self._value, other._value) and self._mark == other._mark
                and list(self._contents) == list(other._contents)
                and all(a.is_same(b) if isinstance(a, _Held) else a is b
                        for a, b in zip(self._contents.values(), other._contents.values(), strict=True)))

    def is_gone(self) -> bool:
        return (isinstance(self._value, _Weak) and self._value() is None) or any(
            isinstance(item, _Held) and item.is_gone() for item in self._contents.values())

    def put_back(self) -> Any:
        """The value, with what was in it."""
        value = _strong(self._value)
        if self._copy is not None and isinstance(value, Tensor):
            value.data.copy_(self._copy)
        elif self._copy is not None:
            np.copyto(value, self._copy)
        items = {key: item.put_back() if isinstance(item, _Held) else item for key, item in self._contents.items()}
        inner = _inside(value) if items else None
        if inner is not None and not isinstance(inner, tuple):
            _refill(inner, items if isinstance(inner, dict) else items.values())
        return value


def _mark_of(value: Any) -> int | None:
    """Another number once a tensor or an array has been written to. Of weights none: LookSAM and ZeRO write to them."""
    if isinstance(value, Tensor):
        return None if value.requires_grad or isinstance(value, nn.Parameter) else version_of(value)
    return crc(value) if isinstance(value, np.ndarray) and value.nbytes <= _SMALL else None


def _items_in(value: Any) -> list[tuple[Any, Any]]:
    """By key or place."""
    inner = _inside(value)
    return list(inner.items() if isinstance(inner, dict) else enumerate(inner or ()))


def _inside(value: Any) -> Any:
    """The container that ``value`` is, or that holds its attributes; None if there is none."""
    if isinstance(value, (dict, set, list, deque, tuple)):
        return value
    is_plain = hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, Tensor)) and not callable(value)
    return vars(value) if is_plain and _is_entered(type(value).__module__) else None


def _weak(value: Any) -> Any:
    return _Weak(value) if isinstance(value, Tensor) else value


def _strong(value: Any) -> Any:
    return value() if isinstance(value, _Weak) else value


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, _Weak) and isinstance(b, _Weak) and a() is not None and a() is b())


@dataclass
class Before:
    """A module before a forward: its state, and the frozen parameters that were not copied, with their norms."""

    state: ModuleState
    watched: list[nn.Parameter]
    norms: list[Tensor]

    @property
    def copied(self) -> list[nn.Parameter]:
        """The frozen parameters that were."""
        return [p for p, _ in self.state.frozen]


class Isolation:
    """Keeps the second evaluation's traces out of a module, and learns which frozen parameters its forward changes.

    A forward may change them without a trace in their version counters (``p.data.mul_``), and copies of a large frozen
    model would not fit. So they are copied at first if they are no more than twice what is trained; after two updates
    with a second evaluation (in the first one a teacher may still equal its student) only those are that were seen to
    change, by comparison or by their norms in fp64. Under ZeRO stage 3 they are copied always or never: the ranks, each
    of which sees its part of them, have to agree."""

    def __init__(self) -> None:
        self._changing: set[nn.Parameter] = set()
        self._updates, self._has_learned = 0, False
        self._said: set[str] = set()

    def before(self, module: nn.Module) -> Before:
        """To be called before the first forward that is trained, see :meth:`second_evaluation`."""
        parameters = list(module.parameters())
        frozen = [p for p in parameters if not p.requires_grad and are_in_memory(p)]
        limit = max(_LIMIT, 2 * sum(whole_nbytes(p) for p in parameters if p.requires_grad))
        is_small = sum(map(whole_nbytes, frozen)) <= limit
        copied = {p for p in frozen
                  if p in self._changing or (is_small and (self._updates < 2 or is_partitioned(p)))}
        watched = [p for p in frozen if p not in copied and not is_partitioned(p)]
        return Before(ModuleState(module, copied), watched, _norms(watched))

    @contextmanager
    def second_evaluation(self, module: nn.Module, before: Before | None) -> Iterator[None]:
        """Inside, the module goes on from ``before``, as the first evaluation did; afterwards it is as that left it.

        Lightning's ``self.log``, which a ``training_step`` calls, does nothing inside: it would count every sample of a
        SAM step twice, the second time with the loss of the perturbed weights.
        """
        if before is not None:
            self._learn(before)
        after = ModuleState(module, {*self._changing, *(before.copied if before is not None else ())})
        if before is not None:
            before.state.restore()
        for m in _instances(submodules(module), "LightningModule", "lightning.pytorch", "pytorch_lightning"):
            vars(m)["log"] = vars(m)["log_dict"] = _ignore
        try:
            yield
        finally:
            for name in after.restore():
                self._say(f"{name} was advanced by the second evaluation of a SAM step too, and cannot be put back")

    def update_is_over(self) -> None:
        self._updates += self._has_learned
        self._has_learned = False

    def _learn(self, before: Before) -> None:
        self._has_learned = True
        changed = {p for p, saved in before.state.frozen
                   if not is_partitioned(p) and not torch.equal(p.detach(), saved)}
        late = {p for p, a, b in zip(before.watched, before.norms, _norms(before.watched), strict=True)
                if not torch.equal(a, b)}
        if late:
            self._say("the model's forward has changed parameters that are not trained. In this SAM step the second "
                      "evaluation goes on from the changed ones, from the next step on from those before")
        self._changing |= changed | late

    def _say(self, message: str) -> None:
        """Once."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(f"LookSAM: {message}")


def _norms(frozen: Iterable[nn.Parameter]) -> list[Tensor]:
    """In fp64; the sum of the bytes where torch has no such norm: weights that were quantized (uint8, int8, fp8)."""
    values = [values_of(p) for p in frozen]
    floats = [i for i, x in enumerate(values) if x.is_floating_point() and x.element_size() > 1]
    norms = torch._foreach_norm([values[i].detach() for i in floats], 2, torch.float64) if floats else ()
    of = dict(zip(floats, norms, strict=True))
    return [of[i] if i in of else _sum_of_bytes(x) for i, x in enumerate(values)]


def _sum_of_bytes(values: Tensor) -> Tensor:
    """In pieces: torch makes a copy in int64 of what it adds up."""
    pieces = values.detach().reshape(-1).view(torch.uint8).split(_PIECE)
    return torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum()


def _look_of(value: Any) -> str:
    try:
        return f"{value!r} {value.tell() if isinstance(value, io.IOBase) and not value.closed else ''}"
    except OSError:  # a pipe has no position
        return repr(value)

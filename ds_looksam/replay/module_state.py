"""What a forward changes in its module: buffers, frozen parameters (a momentum teacher), and Python attributes.

The second evaluation starts from the state that the first one started from, so that both see the same hidden state,
counter, queue or teacher; afterwards the module is left as the first one left it.
"""

from __future__ import annotations

import io
import pickle
import sys
import weakref
import zlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from deepspeed.utils import logger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import LookSAMReplayError
from ..shards.untrained import are_in_memory, drop_gathered, is_partitioned, values_of, whole_nbytes
from .inputs import GENERATORS, set_state_of, state_of
from .marks import crc, version_of
from .snapshot import submodules

Restore = Callable[[], Any]

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward", "trainer", "_trainer", "_fabric"}
_OF_DEEPSPEED = ("ds_", "_ds", "_external_params", "_original_parameters", "applied_pre_backward", "pre_bwd_fn",
                 "post_bwd_fn")
_NOT_ENTERED = {"torch", "triton", "deepspeed", "ds_looksam", "lightning", "lightning_fabric", "pytorch_lightning"}
_PLAIN_OBJECTS = {"types", "collections", "argparse"}  # of the standard library
# Nothing is in them; looked up first, for there are many. (Proxies say that they are what they stand for.)
_PLAIN = {type(None), bool, int, float, str, bytes, weakref.ProxyType, weakref.CallableProxyType}
_LIMIT = 64 << 20  # bytes of tensors and arrays in attributes that are copied: some models keep attention maps there
# How deep, and in containers of how many entries (no vocabulary, no data set), state is looked for: at every forward,
# and where the second evaluation begins and ends; there in so many objects, the ones that are nearest.
_DEPTH_AT_EACH, _MANY = 4, 64
_DEPTH, _TOO_MANY, _OBJECTS = 6, 1024, 20_000
_SMALL = 1 << 20  # bytes of an array that are summed up at every forward
_PIECE = 1 << 24


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    """Without torch's own, and DeepSpeed's counters on modules."""
    return {name: value for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE and not name.startswith(_OF_DEEPSPEED)}


class ModuleState:
    """One module's state at one moment. ``frozen``: parameters that nobody optimizes and that are to be copied."""

    def __init__(self, module: nn.Module, frozen: Iterable[nn.Parameter] = ()) -> None:
        self.frozen = [(p, values_of(p).detach().clone()) for p in frozen]
        self._entries: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        self._objects: list[Any] = []  # whose contents are copied
        self._values: list[tuple[str, Tensor | np.ndarray]] = []  # in attributes
        self._opaque: list[tuple[str, Any, str]] = []
        self._known = set[int]()
        modules = submodules(module)
        self._metric_states = {id(vars(m).get(name)) for m in _instances(modules, "Metric", "torchmetrics")
                               for name in m._defaults}  # type: ignore[union-attr]
        self._queue: deque[tuple[Any, str, int]] = deque()
        self._enter(modules)
        while self._queue:
            self._take_in(*self._queue.popleft())
        self._large = list(self._take_small_ones_first())
        self._restores = [_copy_of(value) for value in self._objects]

    def restore(self) -> list[str]:
        """Put it back. Returns the names of what was changed since and cannot be."""
        for entries, saved in self._entries:
            _put_entries(entries, saved)
        for p, values in self.frozen:
            values_of(p).data.copy_(values)
        drop_gathered(p for p, _ in self.frozen)
        for m, attributes in self._attributes:
            for name in _attributes_of(m).keys() - attributes.keys():
                del vars(m)[name]
            vars(m).update(attributes)
        for restore in self._restores:
            restore()
        return [name for name, value, look in self._opaque if _look_of(value) != look]

    def contents_now(self, but_for: ModuleState) -> list[Restore]:
        """What puts back what :meth:`restore` is going to write over and ``but_for`` does not have: the model does not
        hold it any more, but the loop may (an input that a forward had kept, refilled with the next batch)."""
        other = set(map(id, but_for._objects))
        return [_copy_of(value) for value in self._objects if id(value) not in other]

    def check_large(self) -> None:
        """Raise LookSAMReplayError if a tensor that was too large to be copied has been written to since."""
        changed = next(((name, value) for name, value, version in self._large if version_of(value) != version), None)
        if changed is not None:
            raise LookSAMReplayError(
                f"{changed[0]} of the model (shape {tuple(changed[1].shape)}) was written to in this window. It is an "
                "attribute, and too large to be copied, so the second evaluation would start from what the first one "
                "has left. Make it a buffer, register_buffer(name, tensor, persistent=False), or, if it belongs to a "
                "module in a list, make that a part of the model")

    def _enter(self, modules: list[nn.Module]) -> None:
        """Take in modules; what is in their attributes is to be looked at."""
        self._known.update(map(id, modules))
        for m in modules:
            if not isinstance(m, torch.jit.ScriptModule):  # whose dicts make new tensors each time
                self._entries += [(entries, dict(entries.items())) for entries in (m._buffers, m._parameters)]
            self._objects += [buffer for buffer in m._buffers.values()
                              if buffer is not None and not is_lazy(buffer) and not buffer.is_inference()]
            self._attributes.append((m, _attributes_of(m)))
            self._look_into(self._attributes[-1][1].items(), type(m).__name__, _DEPTH)

    def _look_into(self, items: Iterable[tuple[Any, Any]], name: str, depth: int) -> None:
        self._queue.extend((value, f"{name}.{key}" if depth == _DEPTH else name, depth) for key, value in items
                           if type(value) not in _PLAIN)

    def _take_in(self, value: Any, name: str, depth: int) -> None:
        """What can be changed of ``value``, and what is in it."""
        if id(value) in self._known or len(self._known) > _OBJECTS:
            return
        self._known.add(id(value))
        kind = type(value)  # some objects lie about their class
        if issubclass(kind, (int, float, str, bytes, type, nn.Parameter)):
            return
        inner: Collection[Any] = ()
        if issubclass(kind, nn.Module):  # no part of the model: a teacher in a list
            if kind.__module__.partition(".")[0] not in _NOT_ENTERED - {"torch"}:
                parts = [m for m in submodules(value) if m is value or id(m) not in self._known]
                self._values += [(name, p) for m in parts for p in m._parameters.values()
                                 if p is not None and not is_lazy(p) and not is_partitioned(p)]
                self._enter(parts)
            return
        if issubclass(kind, (Tensor, np.ndarray)):
            self._values.append((name, value))
        elif issubclass(kind, GENERATORS) or kind in (bytearray, array):
            self._objects.append(value)
        elif issubclass(kind, (Iterator, io.IOBase)):
            self._opaque.append((name, value, _look_of(value)))
        else:
            if issubclass(kind, (tuple, frozenset)):
                inner = value
            elif issubclass(kind, (dict, set, list, deque)):
                inner = list(dict.values(value) if issubclass(kind, dict) else value)
                self._objects.append(value)
            attributes = vars(value) if hasattr(value, "__dict__") and _is_entered(kind.__module__) else None
            if attributes is not None:
                inner = [*inner, *attributes.values()]
                self._objects.append(attributes)
        if depth > 1 and len(inner) <= _TOO_MANY:
            self._look_into(enumerate(inner), name, depth - 1)

    def _take_small_ones_first(self) -> Iterator[tuple[str, Tensor, int | None]]:
        """Of the tensors and arrays in attributes, as many as the limit allows. Metrics' states are taken whatever
        their size: they are counted up in place. The tensors that are left out, and their versions; no weights, which
        another optimizer may step."""
        left = _LIMIT
        copied = [(name, value) for name, value in self._values if _can_be_written(value)]
        for name, value in sorted(copied, key=lambda item: item[1].nbytes):
            if id(value) not in self._metric_states:
                left -= value.nbytes
            if left >= 0 or id(value) in self._metric_states:
                self._objects.append(value)
            elif isinstance(value, Tensor) and not value.requires_grad:
                yield name, value, version_of(value)


def _can_be_written(value: Tensor | np.ndarray) -> bool:
    if isinstance(value, np.ndarray):
        return bool(value.flags.writeable)
    return value.layout == torch.strided and not value.is_nested and not value.is_inference()


def _copy_of(value: Any) -> Restore:
    """What puts back the contents of ``value``."""
    if isinstance(value, Tensor):
        return _Copy(value).write
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy())
    if isinstance(value, GENERATORS):
        return partial(set_state_of, value, state_of(value))
    if isinstance(value, (bytearray, array)):
        return partial(value.__setitem__, slice(None), value[:])
    return partial(_refill, value, dict(_items_of(value)) if isinstance(value, dict) else list(value))


class _Copy:
    """A tensor's values, to be written back in place, without a trace in its version counter: also where it has been
    resized since, or where many of its elements are one (``expand``)."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._shape, self._values = tensor, tensor.shape, _each_once(tensor).clone()

    def write(self) -> None:
        with torch.no_grad():
            if self._tensor.shape != self._shape:
                self._tensor.resize_(self._shape)
            _each_once(self._tensor).copy_(self._values)


def _each_once(tensor: Tensor) -> Tensor:
    """A view of the elements of ``tensor`` that have memory of their own."""
    if tensor.layout != torch.strided or 0 not in tensor.stride():
        return tensor.data
    return tensor.data[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _put_entries(entries: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in entries.keys() - saved.keys():
        del entries[name]
    for name, value in saved.items():
        if name not in entries or entries[name] is not value:
            entries[name] = value


def _is_entered(module: str) -> bool:
    """Whether the attributes of an object are looked at whose class is from there."""
    package = module.partition(".")[0]
    return package in _PLAIN_OBJECTS or package not in {*_NOT_ENTERED, *sys.stdlib_module_names}


def _instances(modules: list[nn.Module], name: str, *packages: str) -> list[nn.Module]:
    """Those of the class of that name in a package that the user has imported."""
    classes = tuple(getattr(sys.modules[package], name) for package in packages if package in sys.modules)
    return [m for m in modules if isinstance(m, classes)]


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _items_of(value: dict[Any, Any]) -> Any:
    """In order, whatever the class makes of ``items``."""
    return (OrderedDict if isinstance(value, OrderedDict) else dict).items(value)


def _refill(container: Any, items: Any) -> None:
    """Unless nothing has changed; by the methods of the built-in type: a class may do more in its own, or refuse."""
    kind: Any
    if isinstance(container, dict):
        if [*map(id, chain(*_items_of(container)))] != [*map(id, chain(*_items_of(items)))]:
            kind = OrderedDict if isinstance(container, OrderedDict) else dict
            kind.clear(container)
            for key, item in items.items():
                kind.__setitem__(container, key, item)
    elif [*map(id, container)] != [*map(id, items)]:
        kind = next(kind for kind in (list, set, deque) if isinstance(container, kind))
        kind.clear(container)
        (kind.update if kind is set else kind.extend)(container, items)


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
        self._buffers = {(m, name): (_weak(buffer), _mark_of_buffer(buffer)) for m in modules
                         for name, buffer in m._buffers.items()}
        self._frozen = {p: (values_of(p).data_ptr(), version_of(values_of(p))) for p in frozen}
        self._norms = dict(zip(self._frozen, _norms(self._frozen), strict=True))
        self._kept: list[Any] = []
        self._copies: dict[tuple[nn.Module, str], tuple[Tensor | None, Restore]] = {}
        self._copies_of_frozen: dict[nn.Parameter, Tensor] = {}
        if since is not None:
            self._kept = [held.keep(other) for _, _, held, other in self._changes(since)]
            for m, name in self._written(since):
                buffer = m._buffers[name]
                self._copies[m, name] = buffer, _ignore if buffer is None or buffer.is_inference() else _copy_of(buffer)
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
        same = [torch.isclose(self._norms[p], before._norms[p], rtol=0, atol=0, equal_nan=True)
                for p, mark in self._frozen.items() if mark == before._frozen.get(p)]
        if same and not torch.stack([flag.to(same[0].device) for flag in same]).all().item():
            raise LookSAMReplayError(
                "a parameter that is not trained (a momentum teacher's, say) was changed through .data between two "
                "micro-batches of a window, of which nothing tells: the second evaluation would run with one state of "
                "it. Change it once for each update, where engine.is_gradient_accumulation_boundary() before "
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


class _Weak(weakref.ref[Tensor]):
    """Not one of the user's own weak references."""


class _Held:
    """A value, and what is in it (by key or place) if it is a container or an object, with weak references to tensors
    and the numbers of their versions."""

    def __init__(self, value: Any, depth: int = _DEPTH_AT_EACH) -> None:
        self._value = _weak(value)
        self._mark = _mark_of(value)
        self._copy: Restore | None = None
        items = _items_in(value) if depth and type(value) not in _PLAIN else []
        deeper = depth - 1 if len(items) <= _MANY else 0
        self._contents = {key: item if type(item) in _PLAIN else _Held(item, deeper) for key, item in items}

    def keep(self, before: Any) -> Any:
        """The value, None also where it is gone. Tensors and arrays written since ``before`` are copied, and the states
        of generators."""
        value = _strong(self._value)
        known = isinstance(before, _Held)
        was_written = known and _is_same(self._value, before._value) and self._mark != before._mark
        if was_written or isinstance(value, GENERATORS):
            self._copy = _copy_of(value)
        for key, item in self._contents.items():
            if isinstance(item, _Held):
                item.keep(before._contents.get(key) if known else None)
        return value

    def is_same(self, other: Any) -> bool:
        return (isinstance(other, _Held) and _is_same(self._value, other._value) and self._mark == other._mark
                and len(self._contents) == len(other._contents)
                and all(a is b or (type(a) in _PLAIN and a == b)
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
            _refill(inner, items if isinstance(inner, dict) else list(items.values()))
        return value


def _mark_of_buffer(buffer: Tensor | None) -> tuple[int | None, int] | None:
    """Another one once it has been written to, or given other memory."""
    if buffer is None or is_lazy(buffer):
        return None
    return version_of(buffer), buffer.data_ptr() if buffer.layout == torch.strided else 0


def _mark_of(value: Any) -> int | None:
    """Another number once a tensor or an array has been written to, or a generator was drawn from. Of weights none:
    LookSAM and ZeRO write to them."""
    if type(value) in _PLAIN:
        return None
    if isinstance(value, GENERATORS):
        return zlib.crc32(pickle.dumps(state_of(value)))
    if isinstance(value, Tensor):
        return None if value.requires_grad or isinstance(value, nn.Parameter) else version_of(value)
    return crc(value) if isinstance(value, np.ndarray) and value.nbytes <= _SMALL else None


def _items_in(value: Any) -> list[tuple[Any, Any]]:
    """By key or place; nothing where there are too many."""
    inner = _inside(value)
    if inner is not None and len(inner) > _TOO_MANY:
        return []
    return list(_items_of(inner) if isinstance(inner, dict) else enumerate(() if inner is None else inner))


def _inside(value: Any) -> Any:
    """The container that ``value`` is, or that holds its attributes; None if there is none."""
    if isinstance(value, (dict, set, list, deque, tuple)):
        return value
    is_plain = hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, Tensor))
    return vars(value) if is_plain and _is_entered(type(value).__module__) else None


def _weak(value: Any) -> Any:
    return _Weak(value) if issubclass(type(value), Tensor) else value


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
    """Keeps the second evaluation's traces out of a module, and learns which frozen parameters its forward changes:
    those that require no grad, or are not ``optimized``.

    A forward may change them without a trace in their version counters (``p.data.mul_``), and copies of a large frozen
    model would not fit. So they are copied at first if they are no more than twice what is trained; after two updates
    with a second evaluation (in the first one a teacher may still equal its student) only those are that were seen to
    change, by comparison or by their norms in fp64. Under ZeRO stage 3 they are copied always or never: the ranks, each
    of which sees its part of them, have to agree."""

    def __init__(self, optimized: Callable[[], Iterable[nn.Parameter]]) -> None:
        self._optimized = optimized
        self._changing: set[nn.Parameter] = set()
        self._updates, self._has_learned = 0, False
        self._said: set[str] = set()

    def before(self, module: nn.Module) -> Before:
        """To be called before the first forward that is trained, see :meth:`second_evaluation`."""
        parameters, optimized = [p for p in module.parameters() if not is_lazy(p)], set(self._optimized())
        frozen = [p for p in parameters if not (p.requires_grad and p in optimized) and are_in_memory(p)]
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
            before.state.check_large()
            self._learn(before)
        after = ModuleState(module, {*self._changing, *(before.copied if before is not None else ())})
        overwritten: list[Restore] = []
        if before is not None:
            overwritten = before.state.contents_now(but_for=after)
            before.state.restore()
        for m in _instances(submodules(module), "LightningModule", "lightning.pytorch", "pytorch_lightning"):
            vars(m)["log"] = vars(m)["log_dict"] = _ignore
        try:
            yield
        finally:
            for restore in overwritten:
                restore()
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

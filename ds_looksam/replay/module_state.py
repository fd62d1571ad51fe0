"""What a forward changes in its module: buffers, frozen parameters (a momentum teacher), and Python attributes.

The second evaluation starts from the state that the first one started from, so that both see the same hidden state,
counter, queue or teacher; afterwards the module is left as the first one left it.
"""

from __future__ import annotations

import io
import sys
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed.utils import logger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..arithmetic.eager import are_same, read_flags
from ..errors import LookSAMReplayError
from ..shards.untrained import are_in_memory, drop_gathered, is_partitioned, norms_of, values_of, whole_nbytes
from .contents import NOT_ENTERED, PLAIN, TOO_MANY, Restore, attributes_of, copy_of, is_entered
from .inputs import GENERATORS
from .marks import version_of
from .snapshot import submodules

_LIMIT = 64 << 20  # bytes of tensors and arrays in attributes that are copied: some models keep attention maps there
_DEPTH, _OBJECTS = 6, 20_000  # how deep state is looked for, and in how many objects: the ones that are nearest


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
        self._large = self._take_small_ones_first()
        self._restores = [copy_of(value) for value in self._objects]

    def restore(self) -> list[str]:
        """Put it back. Returns the names of what was changed since and cannot be."""
        for entries, saved in self._entries:
            _put_entries(entries, saved)
        for p, values in self.frozen:
            values_of(p).data.copy_(values)
        drop_gathered(p for p, _ in self.frozen)
        for m, attributes in self._attributes:
            for name in attributes_of(m).keys() - attributes.keys():
                del vars(m)[name]
            vars(m).update(attributes)
        for restore in self._restores:
            restore()
        return [name for name, value, look in self._opaque if _look_of(value) != look]

    def contents_now(self, but_for: ModuleState) -> list[Restore]:
        """What puts back what :meth:`restore` is going to write over and ``but_for`` does not have: the model does not
        hold it any more, but the loop may (an input that a forward had kept, refilled with the next batch)."""
        other = set(map(id, but_for._objects))
        return [copy_of(value) for value in self._objects if id(value) not in other]

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
            attributes = attributes_of(m)
            self._attributes.append((m, attributes))
            self._queue.extend((value, f"{type(m).__name__}.{name}", _DEPTH) for name, value in attributes.items()
                               if type(value) not in PLAIN)

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
            if kind.__module__.partition(".")[0] not in NOT_ENTERED - {"torch"}:
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
            attributes = vars(value) if hasattr(value, "__dict__") and is_entered(kind.__module__) else None
            if attributes is not None:
                inner = [*inner, *attributes.values()]
                self._objects.append(attributes)
        if depth > 1 and len(inner) <= TOO_MANY:
            self._queue.extend((item, name, depth - 1) for item in inner if type(item) not in PLAIN)

    def _take_small_ones_first(self) -> list[tuple[str, Tensor, int | None]]:
        """Of the tensors and arrays in attributes, as many as the limit allows. Metrics' states are taken whatever
        their size: they are counted up in place. The tensors that are left out, and their versions; no weights, which
        another optimizer may step."""
        left, large = _LIMIT, []
        copied = [(name, value) for name, value in self._values if _can_be_written(value)]
        for name, value in sorted(copied, key=lambda item: item[1].nbytes):
            if id(value) not in self._metric_states:
                left -= value.nbytes
            if left >= 0 or id(value) in self._metric_states:
                self._objects.append(value)
            elif isinstance(value, Tensor) and not value.requires_grad:
                large.append((name, value, version_of(value)))
        return large


def _can_be_written(value: Tensor | np.ndarray) -> bool:
    if isinstance(value, np.ndarray):
        return bool(value.flags.writeable)
    return value.layout == torch.strided and not value.is_nested and not value.is_inference()


def _put_entries(entries: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in entries.keys() - saved.keys():
        del entries[name]
    for name, value in saved.items():
        if name not in entries or entries[name] is not value:
            entries[name] = value


def _instances(modules: list[nn.Module], name: str, *packages: str) -> list[nn.Module]:
    """Those of the class of that name in a package that the user has imported."""
    classes = tuple(getattr(sys.modules[package], name) for package in packages if package in sys.modules)
    return [m for m in modules if isinstance(m, classes)]


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


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
        return Before(ModuleState(module, copied), watched, norms_of(watched))

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
        changed = {p for p, saved in before.state.frozen  # the first two times only: each waits for the device
                   if not (p in self._changing or is_partitioned(p) or torch.equal(p.detach(), saved))}
        same = read_flags([are_same(*norms) for norms in zip(before.norms, norms_of(before.watched), strict=True)])
        late = {p for p, is_same in zip(before.watched, same, strict=True) if not is_same}
        if late:
            self._say("the model's forward has changed parameters that are not trained. In this SAM step the second "
                      "evaluation uses the changed values; from the next step on it uses the old ones")
        self._changing |= changed | late

    def _say(self, message: str) -> None:
        """Once."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(f"LookSAM: {message}")


def _look_of(value: Any) -> str:
    try:
        return f"{value!r} {value.tell() if isinstance(value, io.IOBase) and not value.closed else ''}"
    except OSError:  # a pipe has no position
        return repr(value)

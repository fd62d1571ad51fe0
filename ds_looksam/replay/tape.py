"""A loss formed outside the model, formed again from another output: the calls between the two are recorded.

The ordinary loop is ``outputs = engine(x); loss = criterion(outputs, y); engine.backward(loss)``: what turns the output
into the loss is the user's code, and LookSAM needs its value at w + eps too. Between the engine's forward and backward
a :class:`LossTape` sees every torch function, and keeps those whose arguments depend on the model's output or on its
parameters, with all other arguments as they were. :meth:`~ds_looksam.replay.recording.Recording.loss`
calls them again.

That is the user's loss at w + eps if every dependence on the output went through a recorded call. What can break this
is noticed, and makes the recording unusable (:class:`~ds_looksam.replay.loss_path.UnknownLoss`) instead of wrong:

- values read out to Python (``.item()``, ``if loss > 3``) before the loss was complete, but for constant factors;
- tensors whose graph was made elsewhere: a custom ``autograd.Function`` (its backward is its own), another model;
- tensors changed by something that is not a torch function, or that were there before the forward;
- shapes that depend on values, and any other difference between the two autograd graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .loss_path import UnknownLoss
from .recording import (
    OUTPUT,
    GraphId,
    RecordedCall,
    Recording,
    Slot,
    graph_id,
    graph_of,
    output_tensors,
    storage_of,
    version_of,
)
from .snapshot import AutocastState, TorchRandomState


@dataclass
class _Known:
    """A live tensor that depends on the model: its slot, and what it looked like when a recorded call last made it."""

    slot: int
    version: int | None
    made_by: GraphId


# Functions that change running statistics without telling autograd's version counters.
_UPDATE_STATISTICS = {"batch_norm", "instance_norm"}

_HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}

# Functions that return no tensor and tell nothing of a tensor's values.
_ABOUT_NO_VALUES = {
    "__get__", "__format__", "__hash__", "__len__", "__repr__", "backward", "data_ptr", "dim", "element_size",
    "get_device", "has_names", "is_contiguous", "is_complex", "is_floating_point", "is_inference", "is_pinned",
    "is_same_size", "is_shared", "ndimension", "nelement", "numel", "requires_grad_", "retain_grad",
    "size", "storage_offset", "stride", "type", "untyped_storage"
}


class LossTape(TorchFunctionMode):
    """Records while it is on; made by :meth:`start`, ended by :meth:`finish` or :meth:`discard`.

    It lies at the bottom of torch's stack of function modes, so that the user's own modes may be entered and left
    around it in any order.
    """

    def __init__(self, module: nn.Module, output: Any, on_backward: Callable[..., None] | None = None) -> None:
        super().__init__()
        self._module = module
        self._on_backward = on_backward
        self._own_parameters: set[int] | None = None
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._calls: list[RecordedCall] = []
        self._read_out: tuple[int, str] | None = None  # (number of calls before it, function)
        self._numbers = itertools.count()
        self._roots = output_tensors(output)
        self._root_nodes = {graph_id(t) for t in self._roots} - {None}
        self._root_slots = [self._learn(t).slot for t in self._roots]
        self._roots = []  # a forward whose output is dropped must be freed with it

    @classmethod
    def start(cls, module: nn.Module, output: Any, on_backward: Callable[..., None] | None = None) -> LossTape:
        """A tape that records from here on what is made of ``output``, an output of ``module``.

        ``on_backward`` is called with the arguments of ``loss.backward()``, before it, for a loss that depends on it.
        """
        tape = cls(module, output, on_backward)
        _push_at_bottom(tape)
        return tape

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is recorded inside."""
        was_on = _remove(self)
        try:
            yield
        finally:
            if was_on:
                _push_at_bottom(self)

    def discard(self) -> None:
        _remove(self)

    def finish(self, loss: Tensor) -> Recording:
        """Stop recording. Must be called before the backward of ``loss``.

        Raises:
            UnknownLoss: ``loss`` cannot be formed again; the message says why.
        """
        self.discard()
        known = self._known.get(loss)
        if known is None:
            raise UnknownLoss("the loss given to backward() does not come from the model's output by torch functions")
        self._check_known(loss, known, "the loss given to backward()")
        calls = self._needed_for(known.slot, storage_of(loss))
        for call in calls:
            if call.problem is not None:
                raise UnknownLoss(call.problem)
        if self._read_out is not None:
            position, name = self._read_out
            after = set(self._calls[position:])
            late = next((call for call in calls if call in after and not call.is_scaling), None)
            if late is not None:
                raise UnknownLoss(
                    f"a value that depends on the model's output was read out to Python ({name}) before the loss was "
                    f"complete ({late.name} came later): what your code did with it cannot be seen. Read it after "
                    "the loss is formed")
        graph = graph_of(loss, self._root_nodes)
        if OUTPUT not in graph:
            raise UnknownLoss("the loss given to backward() does not depend on the output of the model")
        return Recording(calls, self._root_slots, known.slot, graph)

    # Recording ------------------------------------------------------------------------------------------------------

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        in_slices = [part for s in tree_leaves(args) if isinstance(s, slice) for part in (s.start, s.stop, s.step)]
        if any(isinstance(part, Tensor) and part in self._known for part in in_slices):
            self._note_read_out("slice")
        if not any(self._depends_on_model(t) for t in tensors):
            return function(*args, **kwargs)
        if function is Tensor.backward:
            if self._on_backward is not None:
                self._on_backward(*args, **kwargs)
            return function(*args, **kwargs)

        call = self._describe(function, args, kwargs, tensors)
        versions = [version_of(t) for t in tensors]
        random = TorchRandomState.capture()
        result = function(*args, **kwargs)
        if not random.is_current():
            call.random = random

        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        changed = [t for t, version in zip(tensors, versions, strict=True) if version_of(t) != version]
        if not made and not changed:
            name = getattr(function, "__name__", "")
            if name in _HOOKS:
                call.problem = f"a hook on the gradient was registered outside of the model ({call.name})"
                call.results = call.reads
                self._calls.append(call)
            elif name not in _ABOUT_NO_VALUES:
                self._note_read_out(call.name)
            return result
        self._take_in(call, made, changed)
        return result

    def _depends_on_model(self, tensor: Tensor) -> bool:
        return tensor in self._known or (tensor.requires_grad and (torch.is_grad_enabled() or self._is_own(tensor)))

    def _is_own(self, tensor: Tensor) -> bool:
        if self._own_parameters is None:
            self._own_parameters = {id(p) for p in self._module.parameters()}
        return id(tensor) in self._own_parameters

    def _describe(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
                  tensors: list[Tensor]) -> RecordedCall:
        constants = [(t, version_of(t)) for t in tensors if t not in self._known and not self._is_own(t)]
        call = RecordedCall(function, args, kwargs, constants, AutocastState.capture(), torch.is_grad_enabled(),
                            random=None)

        def stand_in(leaf: Any) -> Any:
            known = self._known.get(leaf) if isinstance(leaf, Tensor) else None
            return leaf if known is None else Slot(known.slot)

        call.args, call.kwargs = tree_map(stand_in, (args, kwargs))
        for t in tensors:
            known = self._known.get(t)
            if known is not None:
                call.reads.append(known.slot)
                call.storages_read.add(storage_of(t))
                try:
                    self._check_known(t, known, f"an argument of {call.name}")
                except UnknownLoss as reason:
                    call.problem = str(reason)
            elif t.grad_fn is not None:
                call.problem = (f"an argument of {call.name} has an autograd graph that comes neither from the model's "
                                f"output nor from torch functions called since ({t.grad_fn.name()})")
        return call

    def _take_in(self, call: RecordedCall, made: list[Tensor], changed: list[Tensor]) -> None:
        if getattr(call.function, "__name__", "") in _UPDATE_STATISTICS and any(
                not t.requires_grad and t.dim() == 1 for t, _ in call.constants):
            call.problem = f"{call.name} may update running statistics in place, which must happen once"
        for t in changed:
            if t not in self._known:
                call.problem = (f"{call.name} changes a tensor in place that was there before the model's forward "
                                f"(shape {tuple(t.shape)})")
            call.storages_written.add(storage_of(t))
        if changed:  # their views and bases look different now too
            for t, known in self._known.items():
                if storage_of(t) in call.storages_written:
                    known.version, known.made_by = version_of(t), graph_id(t)
        for t in made:
            call.results.append(self._learn(t).slot)
            call.shapes.append(t.shape)
        for t in changed:
            if t not in self._known:
                call.results.append(self._learn(t).slot)
                call.shapes.append(t.shape)
        self._calls.append(call)

    def _learn(self, tensor: Tensor) -> _Known:
        known = self._known.get(tensor)
        if known is None:
            known = self._known[tensor] = _Known(next(self._numbers), None, None)
        known.version, known.made_by = version_of(tensor), graph_id(tensor)
        return known

    def _check_known(self, tensor: Tensor, known: _Known, what: str) -> None:
        if graph_id(tensor) != known.made_by:
            by = "nothing" if tensor.grad_fn is None else tensor.grad_fn.name()
            raise UnknownLoss(f"{what} was made by an autograd node that no torch function made ({by}), such as a "
                              "custom autograd.Function")
        if version_of(tensor) != known.version:
            raise UnknownLoss(f"{what} was changed in place by something that is not a torch function")

    def _note_read_out(self, name: str) -> None:
        self._read_out = len(self._calls), name

    def _needed_for(self, slot: int, storage: int) -> list[RecordedCall]:
        """The calls that decide the value in ``slot``, in their order."""
        slots, storages, needed = {slot}, {storage}, []
        for call in reversed(self._calls):
            if not (slots.isdisjoint(call.results) and storages.isdisjoint(call.storages_written)):
                needed.append(call)
                slots.update(call.reads)
                storages.update(call.storages_read)
        return needed[::-1]


def _push_at_bottom(mode: TorchFunctionMode) -> None:
    above = _pop_all()
    for m in [mode, *above]:
        torch._C._push_on_torch_function_stack(m)


def _remove(mode: TorchFunctionMode) -> bool:
    """Take ``mode`` off torch's stack, wherever it lies. False if it was not on it."""
    modes = _pop_all()
    for m in modes:
        if m is not mode:
            torch._C._push_on_torch_function_stack(m)
    return any(m is mode for m in modes)


def _pop_all() -> list[Any]:
    """Everything on torch's stack of function modes, from the bottom."""
    return [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())][::-1]

"""Sees what a loop makes of the model's outputs, from the first forward of an accumulation window to its update.

The ordinary loop is ``outputs = engine(x); loss = criterion(outputs, y); engine.backward(loss)``: what turns the output
into the loss is the user's code, and LookSAM needs its value at w + eps too. A :class:`LossTape` sees every torch
function, and keeps those whose arguments depend on the outputs or on the model's parameters, with all other arguments
as they were (recording.py). It also sees every backward and tells which of them are this model's: those whose graph
reaches an output of a forward of the window, or a parameter of the model.

The recorded calls make the user's loss at w + eps if every dependence on the output went through one of them. What can
break this is noticed, and makes the loss one that cannot be formed again, instead of a wrong one:

- values read out to Python (``.item()``, ``if loss > 3``) before the loss was complete, but for constant factors
  and the sum or mean of all elements;
- tensors whose graph reaches the model by other ways: a custom ``autograd.Function`` (its backward is its own);
- tensors changed by something that is not a torch function, or that were there before the forward;
- shapes that depend on values, and any other difference between the two autograd graphs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .marks import marks_of, version_of
from .recording import Apart, GraphId, Made, RecordedCall, Step, graph_id, node_id, storage_of, with_predecessors
from .snapshot import AutocastState, TorchRandomState


@dataclass
class _Known:
    """A live tensor that depends on a step, and what it looked like when a step last made or changed it."""

    made: Made
    version: int | None
    made_by: GraphId
    changed_by: Step | None = None
    is_input: bool = False  # its value does not depend on the model
    in_engine: bool = False  # an engine's backward begins with it


@dataclass
class _ReadOut:
    """A value was read out to Python. It may decide what is done with the ``forwards`` it depends on from then on."""

    number: int
    name: str
    forwards: weakref.WeakSet[Step]


OnBackward = Callable[[Tensor, bool, str | None], AbstractContextManager[None]]
_GRADIENT_OF: Any = vars(torch._C.TensorBase)["grad"].__get__

# Functions that change running statistics without telling autograd's version counters.
_UPDATE_STATISTICS = {"batch_norm", "instance_norm"}

_HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}

# Functions that return no tensor and tell nothing of a tensor's values.
_ABOUT_NO_VALUES = {
    "__get__", "__format__", "__hash__", "__len__", "__repr__", "backward", "data_ptr", "dim", "element_size",
    "get_device", "has_names", "is_contiguous", "is_complex", "is_floating_point", "is_inference", "is_pinned",
    "is_same_size", "is_shared", "ndimension", "nelement", "numel", "requires_grad_", "retain_grad",
    "size", "storage_offset", "stride", "type"
}


def in_functorch() -> bool:
    """Whether torch.func.grad, vmap or the like is running: its tensors stand for others."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class LossTape(TorchFunctionMode):
    """Records while it is on. It lies at the bottom of torch's stack of function modes, with only the default device
    below it, so that the user's own modes may be entered and left around it in any order. Each backward of this model
    that ``engine.backward`` did not begin runs inside ``on_backward``, which gets the loss, whether another engine's
    ``backward`` began it, and what cannot be repeated of it."""

    def __init__(self, module: nn.Module, on_backward: OnBackward) -> None:
        super().__init__()
        self._on_backward = on_backward
        self._own_parameters = {id(p) for p in module.parameters()}
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._apart: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._roots: dict[GraphId, weakref.ref[Step]] = {}
        self._read_outs: list[_ReadOut] = []
        self._written: list[StorageWeakRef] = []  # memory from before the forward, into which something of it came
        self._newest: weakref.ref[Step] | None = None
        self._numbers = itertools.count(1)
        self._ended = False
        self.in_backward = self.in_grad = False  # one that it has told of; torch.autograd.grad
        _push_at_bottom(self)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is recorded inside."""
        was_on = self._take_off()
        try:
            yield
        finally:
            if was_on and not self._ended:
                _push_at_bottom(self)

    def discard(self) -> None:
        self._ended = True
        self._take_off()

    def _take_off(self) -> bool:
        """Off torch's stack, wherever it lies there. False if it was not on it."""
        modes = _pop_all()
        for m in modes:
            if m is not self:
                torch._C._push_on_torch_function_stack(m)
        return any(m is self for m in modes)

    def number(self) -> int:
        return next(self._numbers)

    def known(self, tensor: Tensor) -> Made | None:
        """What made a tensor that depends on the model, or None."""
        known = self._known.get(tensor)
        return None if known is None or known.is_input else known.made

    def changed_unseen(self, tensor: Tensor, what: str) -> str | None:
        """Why what made a tensor is not all that happened to it, if so."""
        return self._unlike(tensor, self._known[tensor], what)

    def needs_of(self, tensor: Tensor) -> list[Step]:
        known = self._known[tensor]
        return [known.made.by] + ([known.changed_by] if known.changed_by is not None else [])

    def add_forward(self, step: Step, inputs: list[Tensor], outputs: list[Tensor]) -> list[GraphId]:
        """Record from here on what is made of ``outputs``. ``inputs`` are those that require grad. Returns the nodes of
        the outputs."""
        own_nodes = {graph_id(t) for t in inputs} | {None}
        for i, t in enumerate([*inputs, *outputs]):
            if i >= len(inputs) or t not in self._known:
                self._known[t] = _Known(Made(step, i), version_of(t), graph_id(t), is_input=i < len(inputs))
        nodes = [node for node in map(graph_id, outputs) if node not in own_nodes]
        self._roots = {node: ref for node, ref in self._roots.items() if ref() is not None}
        self._newest = weakref.ref(step)
        self._roots.update(dict.fromkeys(nodes, self._newest))
        return nodes

    def reached(self, tensor: Tensor) -> tuple[set[Step], bool]:
        """The forwards whose outputs the graph of ``tensor`` reaches, and whether it reaches a parameter of the model
        past them."""
        forwards: set[Step] = set()
        own, seen, stack = id(tensor) in self._own_parameters, set(), [tensor.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            root = self._roots.get(node_id(node))
            forward = None if root is None else root()
            if forward is not None:
                forwards.add(forward)
                continue
            own = own or id(getattr(node, "variable", None)) in self._own_parameters
            stack += [upstream for upstream, _ in node.next_functions]
        return forwards, own

    def trace(self, loss: Tensor) -> tuple[Made | None, list[Step], str | None]:
        """What made ``loss``, the steps that it needs, and why it cannot be formed again. Before its backward."""
        known = self._known.get(loss)
        if known is None:
            return None, [], "the loss given to backward() does not come from the model's output by torch functions"
        problem = self._unlike(loss, known, "the loss given to backward()")
        steps = with_predecessors(*self.needs_of(loss))
        problem = problem or next((step.problem for step in steps if step.problem is not None), None)
        # A hidden state that is carried on detached, or a first guess, does not make a logged loss a part of this one.
        own = with_predecessors(*self.needs_of(loss), values_too=False) if self._read_outs else []
        for read_out in self._read_outs:
            if problem is None and any(step in read_out.forwards for step in own):
                late = next((step for step in own if step.number > read_out.number
                             and not getattr(step, "is_scaling", False)), None)
                if late is not None:
                    name = getattr(late, "name", "a forward")
                    problem = (f"a value that depends on the model's output was read out to Python ({read_out.name}) "
                               f"before the loss was complete ({name} came later): what your code did with it cannot "
                               "be seen. Read it after the loss is formed")
        return known.made, steps, problem

    # Recording ------------------------------------------------------------------------------------------------------

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == _GRADIENT_OF or in_functorch():  # a gradient is a constant in a loss
            return function(*args, **kwargs)
        if function is Tensor.backward or function is torch.autograd.backward:
            return self._backward(function, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        in_slices = [part for s in tree_leaves(args) if isinstance(s, slice) for part in (s.start, s.stop, s.step)]
        for part in in_slices:
            if isinstance(part, Tensor) and part in self._known:
                self._note_read_out("slice", [part])
        if not any(self._depends_on_model(t) for t in tensors):
            return function(*args, **kwargs)

        name = getattr(function, "__name__", "")
        call = self._describe(function, args, kwargs, tensors)
        versions = [version_of(t) for t in tensors]
        random = TorchRandomState.capture()
        if function is torch.autograd.grad:
            with self._noting("in_grad"):
                result = function(*args, **kwargs)
        else:
            result = function(*args, **kwargs)
        if not random.is_current():
            call.random = random

        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        changed = [t for t, version in zip(tensors, versions, strict=True) if version_of(t) != version]
        if made or changed:
            self._take_in(call, made, changed)
        elif name in _HOOKS:
            self._take_in_hook(call, *args, **kwargs)
        elif name not in _ABOUT_NO_VALUES:
            self._note_read_out(call.name, tensors)
        return result

    def _backward(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A backward that ``engine.backward`` did not begin: is it this model's?"""
        losses = [t for t in tree_leaves(args[:1]) if isinstance(t, Tensor)]
        ours = [t for t in losses if any(self.reached(t))]
        if not ours:
            return function(*args, **kwargs)
        problem = None
        given = [*args[1:2], *(kwargs.get(key) for key in ("gradient", "grad_tensors", "inputs"))]
        if len(losses) > 1 or kwargs.get("create_graph") or any(x is not None for x in given):
            problem = f"{function.__qualname__}() was called with several losses, gradient, create_graph or inputs"
        known = self._known.get(ours[0])
        by_engine = known is not None and known.in_engine
        if known is not None and not by_engine and any(getattr(step, "through_engine", False)
                                                       for step in with_predecessors(known.made.by)):
            problem = problem or ("loss.backward() went through the output of another DeepSpeed engine, which divides "
                                  "the gradient there by its accumulation steps: call engine.backward(loss)")
        with self._on_backward(ours[0], by_engine, problem), self._noting("in_backward"):
            return function(*args, **kwargs)

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        setattr(self, name, True)
        try:
            yield
        finally:
            setattr(self, name, False)

    def _depends_on_model(self, tensor: Tensor) -> bool:
        """What is made of parameters under ``no_grad`` is a constant, as what ``engine(x)`` returns there."""
        known = self._known.get(tensor)
        if known is None:
            return id(tensor) in self._own_parameters and torch.is_grad_enabled()
        return not known.is_input

    def _describe(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
                  tensors: list[Tensor]) -> RecordedCall:
        call = RecordedCall(function, args, kwargs, AutocastState.capture(), torch.is_grad_enabled(),
                            number=self.number())

        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or id(leaf) in self._own_parameters:
                return leaf
            known = self._known.get(leaf)
            if known is not None:
                return known.made
            if not leaf.requires_grad:
                if self._is_written(leaf):
                    call.problem = (f"an argument of {call.name} (shape {tuple(leaf.shape)}) lies in memory that the "
                                    "model did not make, into which a value that depends on its output was written")
                call.constants += marks_of(leaf)
                return leaf
            apart = self._apart.get(leaf)
            if apart is None:
                apart = self._apart[leaf] = Apart.of(leaf)
            call.apart.append(apart)
            call.constants += marks_of(apart.tensor)
            return apart

        call.args, call.kwargs = tree_map(stand_in, (args, kwargs))
        call.generators = [(leaf, leaf.get_state()) for leaf in tree_leaves((args, kwargs))
                           if isinstance(leaf, torch.Generator)]
        for t in tensors:
            known = self._known.get(t)
            if known is not None:
                call.needs += self.needs_of(t)
                call.problem = call.problem or self._unlike(t, known, f"an argument of {call.name}")
            elif t.grad_fn is not None and any(self.reached(t)):
                call.problem = (f"an argument of {call.name} has an autograd graph that reaches the model, but was not "
                                f"made by torch functions called on its output ({t.grad_fn.name()}): kept by the "
                                "model or a hook, or made by a custom autograd.Function or torch.func, say")
        return call

    def _take_in(self, call: RecordedCall, made: list[Tensor], changed: list[Tensor]) -> None:
        if getattr(call.function, "__name__", "") in _UPDATE_STATISTICS and any(
                not t.requires_grad and t.dim() == 1 for t, *_ in call.constants):
            call.problem = f"{call.name} may update running statistics in place, which must happen once"
        for t in changed:
            if t not in self._known:
                call.problem = (f"{call.name} changes a tensor in place that was there before the model's forward "
                                f"(shape {tuple(t.shape)})")
                self._known[t] = _Known(Made(call, -1), None, None)
                self._note_written(t)
        if call.problem is not None:  # it is not called again, and what it was called with can go
            call.args, call.kwargs, call.needs, call.constants, call.apart = (), {}, [], [], []
        call.shapes = [t.shape for t in made]
        for i, t in enumerate(made):
            self._known[t] = _Known(Made(call, i), version_of(t), graph_id(t))
        if changed:  # their views and bases look different now too
            written = {storage_of(t) for t in changed}
            for t, known in self._known.items():
                if storage_of(t) in written:
                    known.version, known.made_by, known.changed_by = version_of(t), graph_id(t), call

    def _note_written(self, tensor: Tensor) -> None:
        """It may be a view of what the loss is formed with."""
        self._written = [memory for memory in self._written if not memory.expired()]
        if tensor.layout == torch.strided:
            self._written.append(StorageWeakRef(tensor.untyped_storage()))

    def _is_written(self, tensor: Tensor) -> bool:
        if not self._written or tensor.layout != torch.strided:
            return False
        memory = storage_of(tensor)
        return any(written.cdata == memory and not written.expired() for written in self._written)

    def _take_in_hook(self, call: RecordedCall, tensor: Tensor, hook: Callable[..., Any], *args: Any) -> None:
        """DeepSpeed's own hooks tell an engine that a backward has begun; another one may change the gradient."""
        known = self._known.get(tensor)
        source = getattr(hook, "__module__", "")
        if source == "deepspeed.runtime.engine":
            if known is not None:
                known.in_engine = True
            return
        if source.startswith("deepspeed."):
            call.through_engine = True
        else:
            call.problem = f"a hook on the gradient was registered outside of the model ({call.name})"
            call.needs = []
        for t, other in self._known.items():
            if t is tensor:
                other.changed_by = call

    def _unlike(self, tensor: Tensor, known: _Known, what: str) -> str | None:
        if graph_id(tensor) != known.made_by:
            by = "nothing" if tensor.grad_fn is None else tensor.grad_fn.name()
            return (f"{what} was made by an autograd node that no torch function made ({by}), such as a custom "
                    "autograd.Function or a layer of another model under ZeRO stage 3")
        if version_of(tensor) != known.version:
            return f"{what} was changed in place by something that is not a torch function"
        return None

    def _note_read_out(self, name: str, tensors: list[Tensor]) -> None:
        """What comes of parameters alone is taken for a value of the newest forward, unless it is saved."""
        steps = with_predecessors(*(step for t in tensors if t in self._known for step in self.needs_of(t)))
        forwards = weakref.WeakSet(step for step in steps if not isinstance(step, RecordedCall))
        if not forwards and name.endswith(".untyped_storage"):  # torch.save(model.state_dict())
            return
        newest = None if self._newest is None else self._newest()
        if not forwards and newest is not None:
            forwards.add(newest)
        self._read_outs = [r for r in self._read_outs if r.forwards]
        self._read_outs.append(_ReadOut(self.number(), name, forwards))


def _push_at_bottom(mode: TorchFunctionMode) -> None:
    above = _pop_all()
    default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    lowest = [m for m in above[:1] if m is default]  # where torch.set_default_device looks for it
    for m in [*lowest, mode, *above[len(lowest):]]:
        torch._C._push_on_torch_function_stack(m)


def _pop_all() -> list[Any]:
    """Everything on torch's stack of function modes, from the bottom."""
    return [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())][::-1]

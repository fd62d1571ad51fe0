"""What ran in an accumulation window, as steps that can be run once more: forwards, and torch functions called on what
they returned.

Each step knows the steps before it that made or changed what it takes, and nothing knows the steps after it. So what
no tensor of the user depends on any more (a validation batch, the loss that was skipped as NaN) is freed with that
tensor, and a backward keeps what its loss was made of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import LookSAMReplayError
from .marks import Mark, is_changed
from .snapshot import AutocastState, TorchRandomState

GraphId = tuple[str, int] | None
"""What tells an autograd node from every other one without keeping it alive: its name and sequence number."""

OUTPUT = "output"  # stands for the nodes of a forward's output in a described graph
_LEAF = "torch::autograd::AccumulateGrad"

_SCALINGS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "div", "div_", "divide", "true_divide",
             "__truediv__", "__itruediv__", "neg", "neg_", "negative", "__neg__"}
_TOTALS = {"sum", "mean"}  # which differ by a factor


@dataclass(eq=False, kw_only=True)
class Step:
    """Something that made tensors. ``number``: its place in the window; ``needs``: the steps that it depends on through
    the graph; ``needs_values``: those of which it takes values only, in detached inputs of a forward."""

    number: int = 0
    needs: list[Step] = field(default_factory=list)
    needs_values: list[Step] = field(default_factory=list)
    apart: list[Apart] = field(default_factory=list)  # what stands for inputs that are not the model's
    problem: str | None = None  # why it cannot be run again

    def check(self) -> None:
        """Raise LookSAMReplayError if what it was run with has been changed since."""


@dataclass(frozen=True)
class Made:
    """Stands for a tensor that a step made, in the arguments of a later one."""

    by: Step
    index: int


@dataclass(eq=False)
class Apart:
    """Stands for a tensor that requires grad and does not come from the model: another model's output or parameter. Its
    gradient was counted in the first evaluation; in the second one a detached tensor is in its place. ``norm`` is kept
    of parameters, which ZeRO changes without telling their version counters."""

    tensor: Tensor
    made_by: GraphId
    norm: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> Apart:
        apart = tensor.detach()
        return cls(apart, graph_id(tensor), _norm(apart) if isinstance(tensor, nn.Parameter) else None)


class Values:
    """The tensors of a second evaluation, by what made them in the first one."""

    def __init__(self) -> None:
        self.made: dict[Step, list[Tensor]] = {}
        self.outputs: dict[Step, Any] = {}
        self.nodes: set[GraphId] = set()  # of the forwards' outputs
        self._apart: dict[Any, Tensor] = {}

    def of(self, leaf: Any) -> Any:
        if isinstance(leaf, Made):
            return self.made[leaf.by][leaf.index]
        if isinstance(leaf, Apart):
            if leaf not in self._apart:
                self._apart[leaf] = leaf.tensor.detach().requires_grad_()
            return self._apart[leaf]
        return leaf


@dataclass(eq=False)
class RecordedCall(Step):
    """One torch function call. ``args`` and ``kwargs`` hold :class:`Made` and :class:`Apart` in place of tensors."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: AutocastState
    grad_enabled: bool
    constants: list[Mark] = field(default_factory=list)
    random: TorchRandomState | None = None  # set if the call drew random numbers
    generators: list[tuple[torch.Generator, Tensor]] = field(default_factory=list)  # given to it, and their states
    shapes: list[torch.Size] = field(default_factory=list)
    through_engine: bool = False  # it registered the hooks of another engine's forward

    @property
    def name(self) -> str:
        return resolve_name(self.function) or getattr(self.function, "__name__", repr(self.function))

    @property
    def is_scaling(self) -> bool:
        """Multiplies or divides one dependent one-element tensor by a constant, or is the sum or mean of all elements
        of one: preference losses log their metrics before they take the mean. A number or a tensor is taken for a
        constant if it is whole or the reciprocal of a whole one: others may come from what was read out. (Whoever asks
        has seen such a read, after which reading a constant from the device waits for nothing.)"""
        leaves, name = tree_leaves((self.args, self.kwargs)), getattr(self.function, "__name__", "")
        constants = [leaf.tensor if isinstance(leaf, Apart) else leaf for leaf in leaves if not isinstance(leaf, Made)]
        return ((name in _SCALINGS or (name in _TOTALS and not constants)) and len(leaves) - len(constants) == 1
                and all(shape.numel() == 1 for shape in self.shapes) and all(map(_is_whole_or_reciprocal, constants)))

    def check(self) -> None:
        for apart in self.apart:
            if apart.norm is not None and not torch.equal(apart.norm, _norm(apart.tensor)):
                raise LookSAMReplayError(
                    f"a parameter that the loss was formed with (shape {tuple(apart.tensor.shape)}, in {self.name}) "
                    "was changed after it, by another optimizer's step, say: the second evaluation would form another "
                    "loss. Step this engine first, or call engine.step(closure=...), which takes it as it is now.")
        for mark in self.constants:
            if is_changed(mark):
                tensor = mark[0]
                raise LookSAMReplayError(
                    f"an argument of {self.name} (shape {tuple(tensor.shape)}, {tensor.dtype}) was changed in place "
                    "after the loss was formed with it, so the second evaluation would form another loss. Give each "
                    "micro-batch its own tensors, or call engine.step(closure=...).")

    def run(self, values: Values) -> None:
        args, kwargs = tree_map(values.of, (self.args, self.kwargs))
        autocast = AutocastState.capture()
        self.autocast.apply()
        if self.random is not None:
            self.random.restore()
        generators = [(generator, generator.get_state()) for generator, _ in self.generators]
        for generator, state in self.generators:
            generator.set_state(state)
        try:
            with torch.set_grad_enabled(self.grad_enabled):
                result = self.function(*args, **kwargs)
        finally:
            autocast.apply()
            for generator, state in generators:
                generator.set_state(state)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if [t.shape for t in made] != self.shapes:
            raise LookSAMReplayError(
                f"{self.name} returned shapes {[tuple(s) for s in self.shapes]} in the first evaluation and "
                f"{[tuple(t.shape) for t in made]} in the second: they depend on the model's output. Set "
                "engine.loss_fn, or call engine.step(closure=...).")
        values.made[self] = made


def with_predecessors(*steps: Step, values_too: bool = True) -> list[Step]:
    """``steps`` and all that they need, in the order in which they ran."""
    found: set[Step] = set()
    stack = list(steps)
    while stack:
        step = stack.pop()
        if step not in found:
            found.add(step)
            stack += step.needs + step.needs_values if values_too else step.needs
    return sorted(found, key=lambda step: step.number)


def output_tensors(output: Any, depth: int = 4) -> list[Tensor]:
    """The tensors in a model's output, in an order that is the same for every output of one structure: containers,
    dataclasses, and attributes of other objects (caches)."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif not depth:
            continue
        elif isinstance(leaf, Mapping):
            found += [t for value in leaf.values() for t in output_tensors(value, depth - 1)]
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += [t for f in dataclasses.fields(leaf) for t in output_tensors(getattr(leaf, f.name), depth - 1)]
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and not callable(leaf):
            found += [t for value in vars(leaf).values() for t in output_tensors(value, depth - 1)]
    return found


def storage_of(tensor: Tensor) -> int:
    """The same for live tensors that share memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(tensor)


def graph_id(tensor: Tensor) -> GraphId:
    return node_id(tensor.grad_fn)


def node_id(node: Any) -> GraphId:
    return None if node is None else (node.name(), node._sequence_nr())


def graph_of(loss: Tensor, outputs: Iterable[GraphId], apart: Iterable[GraphId]) -> list[Any]:
    """The autograd graph of ``loss`` down to the nodes ``outputs``, as something that can be compared. ``apart``: where
    a leaf is in the second evaluation."""
    outputs, apart = set(outputs), set(apart)
    numbers: dict[Any, int] = {}
    described: list[Any] = []
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in numbers:
            continue
        numbers[node] = len(numbers)
        this = node_id(node)
        described.append(_LEAF if this in apart else OUTPUT if this in outputs else node.name())
        if described[-1] not in (_LEAF, OUTPUT):
            described.append([(numbers.get(upstream), number) for upstream, number in node.next_functions])
            stack.extend(upstream for upstream, _ in node.next_functions)
    return described


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)


def _is_whole_or_reciprocal(constant: Any) -> bool:
    """Of what a tensor was multiplied with or divided by; within what its precision leaves of a reciprocal."""
    try:
        number, off = float(constant), 1e-9 if isinstance(constant, float) else 1e-6
    except (TypeError, ValueError):  # a rounding mode, say
        return False
    return number != 0 and any(abs(x - round(x)) <= off * abs(x) for x in (number, 1 / number) if math.isfinite(x))

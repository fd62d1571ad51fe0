"""A recorded loss: the calls that made it out of a model's output, and how they are called again (see loss_tape.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import LookSAMReplayError
from .snapshot import AutocastState, TorchRandomState

GraphId = tuple[str, int] | None
"""What tells an autograd node from every other one without keeping it alive: its name and sequence number."""

OUTPUT = "output"  # stands for the nodes of the model's output in a described graph

_SCALINGS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "div", "div_", "divide", "true_divide",
             "__truediv__", "__itruediv__", "neg", "neg_", "negative", "__neg__"}


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor that depends on the model, in the arguments of a recorded call."""

    number: int


@dataclass(eq=False)
class RecordedCall:
    """One torch function call. ``args`` and ``kwargs`` hold :class:`Slot` in place of dependent tensors."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    constants: list[tuple[Tensor, int | None]]
    autocast: AutocastState
    grad_enabled: bool
    random: TorchRandomState | None  # set if the call drew random numbers
    reads: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    storages_read: set[int] = field(default_factory=set)
    storages_written: set[int] = field(default_factory=set)
    problem: str | None = None  # why it cannot be called again

    @property
    def name(self) -> str:
        return resolve_name(self.function) or getattr(self.function, "__name__", repr(self.function))

    @property
    def is_scaling(self) -> bool:
        """Multiplies or divides one dependent one-element tensor by a constant."""
        return (getattr(self.function, "__name__", "") in _SCALINGS and len(self.reads) == 1
                and all(shape.numel() == 1 for shape in self.shapes))


@dataclass(frozen=True)
class Recording:
    """The calls that made a loss out of a model's output."""

    calls: list[RecordedCall]
    root_slots: list[int]
    loss_slot: int
    graph: list[Any]

    def check(self) -> None:
        """Raise LookSAMReplayError if a tensor that the loss was formed with has been changed in place since."""
        for call in self.calls:
            for tensor, version in call.constants:
                if version_of(tensor) != version:
                    raise LookSAMReplayError(
                        f"an argument of {call.name} (shape {tuple(tensor.shape)}, {tensor.dtype}) was changed in "
                        "place after the loss was formed with it, so the second evaluation would form another loss. "
                        "Give each micro-batch its own tensors, or call engine.step(closure=...).")

    def loss(self, output: Any) -> Tensor:
        """The loss that the recorded calls make of ``output``.

        Raises:
            LookSAMReplayError: it is not the same function of the output; or as :meth:`check`.
        """
        self.check()
        roots = output_tensors(output)
        if len(roots) != len(self.root_slots):
            raise LookSAMReplayError(f"the model returned {len(self.root_slots)} tensors in the first evaluation and "
                                     f"{len(roots)} in the second")
        root_nodes = {graph_id(t) for t in roots} - {None}
        values = dict(zip(self.root_slots, roots, strict=True))
        random, autocast, grad_enabled = TorchRandomState.capture(), AutocastState.capture(), torch.is_grad_enabled()
        try:
            for call in self.calls:
                self._call_again(call, values)
        finally:
            random.restore()
            autocast.apply()
            torch.set_grad_enabled(grad_enabled)
        loss = values[self.loss_slot]
        if graph_of(loss, root_nodes) != self.graph:
            raise LookSAMReplayError("the second evaluation formed the loss by other operations than the first one: "
                                     "set engine.loss_fn, or call engine.step(closure=...)")
        return loss

    def _call_again(self, call: RecordedCall, values: dict[int, Tensor]) -> None:
        outside = {id(t) for t, _ in call.constants if t.requires_grad}

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Slot):
                return values[leaf.number]
            # Not the model's: another optimizer's parameter, say. Its gradient was counted in the first evaluation.
            return leaf.detach().requires_grad_() if id(leaf) in outside else leaf

        args, kwargs = tree_map(value, (call.args, call.kwargs))
        call.autocast.apply()
        torch.set_grad_enabled(call.grad_enabled)
        if call.random is not None:
            call.random.restore()
        result = call.function(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if [t.shape for t in made] != call.shapes:
            raise LookSAMReplayError(
                f"{call.name} returned shapes {[tuple(s) for s in call.shapes]} in the first evaluation and "
                f"{[tuple(t.shape) for t in made]} in the second: they depend on the model's output. Set "
                "engine.loss_fn, or call engine.step(closure=...).")
        values.update(zip(call.results, made, strict=True))


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output, in an order that is the same for every output of one structure: containers,
    dataclasses, and attributes of other objects."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += [t for value in leaf.values() for t in output_tensors(value)]
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += [t for f in dataclasses.fields(leaf) for t in output_tensors(getattr(leaf, f.name))]
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and not callable(leaf):
            found += [value for value in vars(leaf).values() if isinstance(value, Tensor)]
    return found


def version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def storage_of(tensor: Tensor) -> int:
    """The same for tensors that share memory. The address may be reused after it was freed: then calls are kept that
    are not needed."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(tensor)


def graph_id(tensor: Tensor) -> GraphId:
    node = tensor.grad_fn
    return None if node is None else (node.name(), node._sequence_nr())


def graph_of(loss: Tensor, until: set[GraphId]) -> list[Any]:
    """The autograd graph of ``loss`` down to the nodes ``until``, as something that can be compared."""
    numbers: dict[Any, int] = {}
    described: list[Any] = []
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in numbers:
            continue
        numbers[node] = len(numbers)
        is_root = (node.name(), node._sequence_nr()) in until
        described.append(OUTPUT if is_root else node.name())
        if not is_root:
            described.append([(numbers.get(upstream), number) for upstream, number in node.next_functions])
            stack.extend(upstream for upstream, _ in node.next_functions)
    return described

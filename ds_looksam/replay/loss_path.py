"""How the loss that the user hands to ``engine.backward`` came out of the model's output.

A replay can form the same loss from a new output only if the first one was the model's own loss times constants. That
is read off the autograd graph, so a loss that also depends on the logits, or on the model twice, is told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

Node = Any
LossPath = list[Callable[[Tensor], Tensor]]

_RECORD = "ds_looksam.record"

# Backward nodes of operations that leave a one-element tensor's value alone.
_IDENTITY = {
    "AliasBackward0", "CloneBackward0", "ExpandBackward0", "MeanBackward0", "ReshapeAliasBackward0", "SqueezeBackward0",
    "SumBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0"
}


class UnknownLoss(Exception):
    """The reason why a loss cannot be formed again; part of the message users see."""


def model_loss(output: Any) -> Tensor | None:
    """The loss in a model's output: a tensor; a mapping or object with ``loss``; a tuple whose first element is it.

    Returns:
        A one-element tensor with a graph, or None if there is none.
    """
    if isinstance(output, Mapping):
        candidate = output.get("loss")
    elif isinstance(output, Tensor):
        candidate = output
    elif isinstance(output, (tuple, list)) and not hasattr(output, "loss"):
        candidate = output[0] if output else None
    else:
        candidate = getattr(output, "loss", None)
    if isinstance(candidate, Tensor) and candidate.numel() == 1 and candidate.requires_grad:
        return candidate
    return None


def mark(output: Any, record: Any) -> None:
    """Attach ``record`` to the graph of the loss in ``output``, for :func:`trace` to find. Freed with the graph."""
    loss = model_loss(output)
    if loss is not None and loss.grad_fn is not None:
        _metadata(loss.grad_fn)[_RECORD, loss.output_nr] = record


def trace(loss: Tensor) -> tuple[Any, LossPath]:
    """The record of the forward that ``loss`` comes from, and the operations that lie between, in forward order.

    Must be called before the backward frees the graph.

    Raises:
        UnknownLoss: anything but multiplication or division by a constant, negation or a cast lies between.
    """
    path: LossPath = []
    node, output = loss.grad_fn, loss.output_nr
    while node is not None:
        record = _metadata(node).get((_RECORD, output))
        if record is not None:
            return record, path[::-1]
        path.append(_operation(node, output))
        node, output = next((upstream, nr) for upstream, nr in node.next_functions if upstream is not None)
    raise UnknownLoss("the loss given to backward() does not come from the output of the model")


def follow(path: LossPath, loss: Tensor) -> Tensor:
    """Apply a traced path to the model's loss of another evaluation."""
    for operation in path:
        loss = operation(loss)
    return loss


def _metadata(node: Node) -> dict[Any, Any]:
    """The dict that autograd keeps with a node (torch's stubs call it a method; it is a property)."""
    return node.metadata


def _operation(node: Node, output: int) -> Callable[[Tensor], Tensor]:
    """The operation whose backward is ``node``, if it takes one one-element tensor to a multiple of itself."""
    name, result = node.name(), node._input_metadata[output]
    arguments = [i for i, (upstream, _) in enumerate(node.next_functions) if upstream is not None]
    if len(arguments) == 1 and prod(result.shape) == 1:
        if name in _IDENTITY:
            return lambda x: x
        if name == "NegBackward0":
            return torch.neg
        if name == "ToCopyBackward0":
            return lambda x: x.to(result.dtype)
        if name == "MulBackward0":
            factor = _constant(node._saved_other if arguments == [0] else node._saved_self, result.dtype)
            return lambda x: x * factor
        if name == "DivBackward0" and arguments == [0]:
            divisor = _constant(node._saved_other, result.dtype)
            return lambda x: x / divisor
    raise UnknownLoss(f"the loss given to backward() is not the model's own loss times constants (found {name})")


def _constant(value: Tensor, dtype: torch.dtype) -> Tensor | float:
    # A Python number was saved as a 0-dim CPU tensor of another dtype; as a tensor it would promote the product.
    if value.dim() == 0 and value.device.type == "cpu" and value.dtype != dtype:
        return value.item()
    return value.detach()

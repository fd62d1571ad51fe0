"""What PyTorch Lightning and torchmetrics let a model do besides computing its loss, kept out of the second evaluation.

A Lightning module's forward is its ``training_step``, with ``self.log`` and metrics in it: run again at w + eps, they
would count every sample of a SAM step twice, the second time with the loss of the perturbed weights. Neither package
is imported from here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def without_side_effects(module: nn.Module) -> Iterator[None]:
    """Inside, ``self.log`` of Lightning modules does nothing; afterwards torchmetrics' states are as they were."""
    lightning = _classes("LightningModule", "lightning.pytorch", "pytorch_lightning")
    metrics = _classes("Metric", "torchmetrics")
    with ExitStack() as stack:
        if lightning or metrics:
            for m in module.modules():
                if isinstance(m, lightning):
                    stack.enter_context(_silent(m))
                elif isinstance(m, metrics):
                    stack.enter_context(_unchanged(m))
        yield


def _classes(name: str, *packages: str) -> tuple[type, ...]:
    """The class of that name in each of the packages that the user has imported."""
    return tuple(getattr(sys.modules[package], name) for package in packages if package in sys.modules)


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    attributes = vars(module)
    before: dict[str, Any] = {name: attributes[name] for name in ("log", "log_dict") if name in attributes}
    attributes["log"] = attributes["log_dict"] = _ignore
    try:
        yield
    finally:
        del attributes["log"], attributes["log_dict"]
        attributes.update(before)


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def _unchanged(metric: Any) -> Iterator[None]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    before = {name: _copy(vars(metric)[name]) for name in names if name in vars(metric)}
    try:
        yield
    finally:
        vars(metric).update(before)


def _copy(state: Any) -> Any:
    """A metric's states are tensors that are updated in place, or lists that are appended to."""
    if isinstance(state, Tensor):
        return state.clone()
    return list(state) if isinstance(state, list) else state

"""Shuts doors: those through which perturbed weights could leave, for as long as they are perturbed, and the one past
LookSAM."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from ..errors import LookSAMReplayError
from .snapshot import submodules

_WHEN = ("was called while the weights are perturbed: from inside the second evaluation of a SAM step (a forward hook, "
         "say), or after it was interrupted. Call it after step(); load a checkpoint after an interruption.")


class PerturbedWeights:
    """Whether a model's weights are perturbed. Meanwhile ``state_dict()`` of it and of any submodule raises.

    That covers ``torch.save(model.state_dict())`` from a forward hook, and from an exit or signal handler after a SAM
    step was cut off. Assigning parameters to one's own tensors cannot be intercepted.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._hooks: list[Any] = []

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def begin(self) -> None:
        if not self._hooks:
            self._hooks = [m.register_state_dict_pre_hook(_refuse_state_dict) for m in submodules(self._module)]

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def refuse(self, what: str) -> None:
        """Raise LookSAMReplayError if the weights are perturbed."""
        if self:
            raise LookSAMReplayError(f"{what} {_WHEN}")


def guard_optimizer(optimizer: Any, in_step: Callable[[], bool], forget: Callable[[], None]) -> None:
    """Watch what the user calls on ``engine.optimizer``, a torch optimizer or DeepSpeed's wrapper around one.

    Args:
        in_step: whether ``engine.step()`` is running; outside, ``optimizer.step()`` raises: it would be the base alone.
        forget: called when the gradients are thrown away, by ``optimizer.zero_grad()`` outside of a step.
    """
    base_step, zero_grad = optimizer.step, optimizer.zero_grad

    @functools.wraps(base_step)  # LR schedulers look for a mark on it
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not in_step():
            raise LookSAMReplayError(
                "optimizer.step() was called: it would be the base optimizer alone, without LookSAM and without "
                "DeepSpeed's accumulation. Call engine.step() instead; optimizer.zero_grad() after it is not needed.")
        return base_step(*args, **kwargs)

    @functools.wraps(zero_grad)
    def forgetting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not in_step():
            forget()
        return zero_grad(*args, **kwargs)

    optimizer.step, optimizer.zero_grad = MethodType(step, optimizer), MethodType(forgetting, optimizer)


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise LookSAMReplayError(f"{type(module).__name__}.state_dict() {_WHEN}")

"""Shuts the doors through which perturbed weights could leave, for as long as they are perturbed."""

from __future__ import annotations

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


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise LookSAMReplayError(f"{type(module).__name__}.state_dict() {_WHEN}")

"""Shuts the door through which perturbed weights could leave: ``state_dict()`` of the model and of any submodule.

That covers ``torch.save(model.state_dict())`` from a forward hook, and from an exit or signal handler after a SAM step
was cut off. Assigning parameters to one's own tensors cannot be intercepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .snapshot import submodules


def refuse_state_dicts(module: nn.Module, refuse: Callable[[nn.Module], None]) -> list[Any]:
    """From now on ``refuse`` is called with the module whose ``state_dict()`` somebody asks for.

    Returns:
        Handles with ``remove()``.
    """
    def before(m: nn.Module, prefix: str, keep_vars: bool) -> None:
        refuse(m)

    return [m.register_state_dict_pre_hook(before) for m in submodules(module)]

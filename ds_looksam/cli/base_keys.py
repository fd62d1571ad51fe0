"""Which keys a base optimizer knows, from its signature: it cannot be built without the model's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from .. import optimizers
from ..config.params import explain_unknown_key
from ..config.support import deepspeed_name
from ..optimizers import LAYERWISE_OPTIMIZERS

OF_DEEPSPEED = {"torch_adam", "adam_w_mode"}
"""Keys that DeepSpeed's engine takes out of an Adam's params before it builds one."""


def refuse_unknown_keys(base_optimizer: str, base_params: dict[str, Any]) -> None:
    """Check keys of ``optimizer.params`` that are not LookSAM's.

    Raises:
        LookSAMConfigError: in the words of ``deepspeed.initialize``, for the first key that the base does not know.
            Bases that only DeepSpeed can describe (the 1-bit family) are left to it.
    """
    known = _known(base_optimizer)
    for key in base_params:
        if known is not None and key not in known:
            error = TypeError(f"got an unexpected keyword argument '{key}'")
            raise explain_unknown_key(error, base_params, base_optimizer)


def _known(base_optimizer: str) -> set[str] | None:
    name = deepspeed_name(base_optimizer)
    if name in LAYERWISE_OPTIMIZERS:
        return _signature([getattr(optimizers, name.removeprefix("Zero"))])
    if name in ("adam", "adamw"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
        return _signature([torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam]) | OF_DEEPSPEED
    if hasattr(torch.optim, name):
        return _signature([getattr(torch.optim, name)])
    return None


def _signature(classes: Iterable[type]) -> set[str]:
    """Names that one of the classes takes beside the parameters; DeepSpeed chooses the class by the machine."""
    return {name for cls in classes for name in inspect.signature(cls).parameters} - {
        "params", "model_params", "args", "kwargs"}

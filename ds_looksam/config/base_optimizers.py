"""The base optimizer: which class DeepSpeed 0.19.8 builds for a name, and which keys that takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from ..optimizers import LAYERWISE_OPTIMIZERS

TESTED_WITH_ZERO = (torch.optim.SGD, )
"""Bases that DeepSpeed calls untested with ZeRO, and that this package's tests compare with the oracle on ZeRO."""
TAKEN_OUT = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
"""Keys that DeepSpeed's engine takes out of an Adam's params before it builds one."""
_MUON = {"lr", "momentum", "weight_decay", "ns_method", "betas", "eps", "muon_lr", "adam_lr", "per_head_muon"}
"""Keys that DeepSpeed picks for the two halves of Muon; it ignores all others."""


def deepspeed_name(optimizer: str) -> str:
    """The spelling DeepSpeed's engine compares with: its own optimizers in lower case, torch.optim's as they are.

    "Lamb" and "Lars" are ours: DeepSpeed's FusedLamb would take one trust ratio for a whole flat shard.
    """
    ours = {name.lower().removeprefix(prefix): name for name in LAYERWISE_OPTIMIZERS for prefix in ("", "zero")}
    lower = optimizer.lower()
    return ours.get(lower, lower if lower in DEEPSPEED_OPTIMIZERS else optimizer)


def torch_optimizers() -> list[str]:
    """Names of the optimizers in torch.optim, which has submodules and helpers beside them."""
    return [name for name, value in vars(torch.optim).items()
            if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"]


def base_class(name: str, params: dict[str, Any], offloaded: bool) -> type[torch.optim.Optimizer] | None:
    """The class that is built for a base of this :func:`deepspeed_name`; None for Muon, whose import compiles kernels,
    and for what is not known. ``params``: the base's keys of ``optimizer.params``. ``offloaded``: whether
    ``offload_optimizer`` is in force."""
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    if name in ("adam", "adamw") and params.get("torch_adam"):
        return torch.optim.AdamW if name == "adamw" or params.get("adam_w_mode", True) else torch.optim.Adam
    on_cpu = {"adam": DeepSpeedCPUAdam, "adamw": DeepSpeedCPUAdam, "adagrad": DeepSpeedCPUAdagrad,
              "lion": DeepSpeedCPULion}
    elsewhere = {"adam": FusedAdam, "adamw": FusedAdam, "adagrad": torch.optim.Adagrad, "lion": FusedLion}
    by_torch = {known: getattr(torch.optim, known) for known in torch_optimizers()}
    return (LAYERWISE_OPTIMIZERS | by_torch | (on_cpu if offloaded else elsewhere)).get(name)


def known_keys(name: str, params: dict[str, Any], offloaded: bool) -> set[str] | None:
    """Keys of ``optimizer.params`` that the base takes, LookSAM's own not among them; None if it cannot be known.
    Arguments as :func:`base_class`."""
    if name == "muon":
        return _MUON | TAKEN_OUT
    cls = base_class(name, params, offloaded)
    arguments = inspect.signature(cls).parameters if cls is not None else {}
    if cls is None or any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        return None
    keys = set(arguments) - {"params", "model_params", "adamw_mode"}  # adamw_mode: DeepSpeed gives it, by adam_w_mode
    return keys | TAKEN_OUT if name in ("adam", "adamw") else keys


def is_tested_with_zero(name: str, params: dict[str, Any], offloaded: bool) -> bool:
    """Whether DeepSpeed or LookSAM's engine builds ZeRO around the base without "zero_allow_untested_optimizer"."""
    return name == "muon" or base_class(name, params, offloaded) in (
        *ZERO_SUPPORTED_OPTIMIZERS, *TESTED_WITH_ZERO, *LAYERWISE_OPTIMIZERS.values())

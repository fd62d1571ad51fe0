"""Whether a perturbation survives being rounded to the dtype that the model computes with."""

from __future__ import annotations

import math
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPICAL_WEIGHT = 0.02
"""The standard deviation that transformers are initialised with (GPT-2, BERT, ViT)."""
HALF_STEP = {"bf16": 2.0**-9, "fp16": 2.0**-12}
"""Half the distance of neighbouring numbers, relative to the number: by less, a rounded weight does not move."""


def precision_of(config: Any) -> str:
    """Of the model's weights, by a ``DeepSpeedConfig``: "fp32", "bf16" or "fp16"."""
    return "bf16" if config.bfloat16_config.enabled else "fp16" if config.float16_config.enabled else "fp32"


def computes_in(config: Any) -> str:
    """What the model's products see its weights in: ``torch_autocast`` rounds fp32 weights at each use."""
    autocast = config.torch_autocast_enabled and config.torch_autocast_dtype == torch.bfloat16
    return "bf16" if autocast else precision_of(config)


def rounding_warning(rho: float, precision: str, n_parameters: int) -> str | None:
    """What to say where rounding swallows most of a perturbation of length rho over the whole model.

    With n parameters a weight is moved by rho/√n, in the root mean square. Where that is less than a step between
    neighbouring numbers, few weights move, by a whole step: right on average, with a cosine of about √(move/half a
    step) between what was meant and what was done (within 0.1 of what docs/low-precision.md measured).

    Args:
        rho: of ``"layer_scale": "norm"`` or the plain rule; with the other rules it is no length.
        precision: what the model computes in, see :func:`computes_in`.
        n_parameters: how many are trained.
    """
    moved, half = rho / math.sqrt(n_parameters), HALF_STEP.get(precision, 0.0) * TYPICAL_WEIGHT
    if rho <= 0 or moved >= half:
        return None
    enough = half * math.sqrt(n_parameters)
    way_out = f"Use rho {enough:.2g} or more" if enough <= 1 else \
        f"rho {enough:.2g} would be enough, but is more than was seen to train well: compute in fp32, or train fewer " \
        "parameters"
    return (f"rho {rho:g} is small for {precision}: a weight is moved by rho/√n = {moved:.1e} on average (n = "
            f"{n_parameters:.3g} trained parameters), less than half a {precision} step of a weight of "
            f"{TYPICAL_WEIGHT:g} ({half:.1e}). Rounding makes that right on average but noisy: a cosine of about "
            f"{math.sqrt(moved / half):.1g} between the perturbation meant and the one made. {way_out}, and watch "
            "engine.looksam.perturbation_cosine (docs/low-precision.md)")

"""Settings that are legal and likely to be regretted. Each warning says what happens and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..config.params import AUTO, LookSAMConfig
from .costs import precision_of

MODEST_ALPHA, PUBLISHED_RHO = 0.2, 1.0
"""docs/choosing.md has the measurement: 0.2 did no harm at any rho tried; 0.7 was published together with rho 1."""
TYPICAL_WEIGHT = 0.02
"""The standard deviation that transformers are initialised with (GPT-2, BERT, ViT)."""
HALF_STEP = {"bf16": 2.0**-9, "fp16": 2.0**-12}
"""Half the distance of neighbouring numbers, relative to the number: by less, a rounded weight does not move."""


def warnings(config: Any, settings: LookSAMConfig | None, parameters: int | None, by_trainer: bool) -> Iterator[str]:
    """What to print for a configuration that is accepted. ``by_trainer``: it has placeholders that Hugging Face fills
    in."""
    if settings is None:
        yield f'"optimizer.type": "{config.optimizer_name}" trains without LookSAM'
        return
    rho, alpha, k = settings.rho, settings.alpha, settings.k
    fixed = None if isinstance(alpha, str) else alpha
    if rho == 0:
        yield "rho 0: every SAM step pays a second evaluation for nothing, unless param groups bring their own rho"
    elif fixed is not None and fixed > MODEST_ALPHA and k > 1 and settings.layer_scale == "norm" \
            and rho < PUBLISHED_RHO:
        yield (f"alpha {fixed:g} and rho {rho:g} fight: reuse steps add {fixed:g}‖g‖ however small rho made the "
               f"correction. Use \"alpha\": \"auto\", an alpha up to {MODEST_ALPHA:g}, or the published pair alpha "
               "0.7 and rho 1 (docs/choosing.md)")
    if k == 1 and fixed is not None and fixed > 0:
        yield "k 1: every update is a SAM step, alpha is never used"
    precision = precision_of(config)
    if rho > 0 and precision in HALF_STEP and settings.layer_scale == "norm":
        if parameters is None:
            yield f"{precision}: whether rho {rho:g} moves the rounded weights depends on the model: give --params"
        else:
            moved, step = rho / math.sqrt(parameters), HALF_STEP[precision] * TYPICAL_WEIGHT
            if moved < step:
                yield (f"{precision} with a tiny rho: a weight is moved by rho/√parameters = {moved:.1e} on average, "
                       f"less than half a {precision} step of a weight of {TYPICAL_WEIGHT:g} ({step:.1e}), so that "
                       f"rounding decides where w + eps lies. Use rho {step * math.sqrt(parameters):.2g} or more, and "
                       "watch engine.looksam.perturbation_cosine (docs/low-precision.md)")
    clip = config.gradient_clipping
    if clip > 0 and fixed is not None and fixed > MODEST_ALPHA and k > 1:
        factor = math.sqrt(1 + fixed**2)
        yield (f"gradient_clipping {clip:g} will bind earlier: with alpha {fixed:g} the update of a reuse step is "
               f"about √(1 + alpha²) = {factor:.2f} times as long as g, so it is clipped from ‖g‖ = {clip / factor:.3g}"
               " on. Clipping comes after the correction; raise it, or lower alpha")
    if by_trainer and alpha == AUTO and "alpha" in (settings.model_fields_set):
        yield ('alpha "auto" beside placeholders: Hugging Face\'s Trainer and Accelerate refuse an "auto" they do not '
               'know; leave alpha out, or write "calibrated", which means the same')

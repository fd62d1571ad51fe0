"""Settings that are legal and likely to be regretted. Each warning says what happens and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..config.params import AUTO
from ..config.rounding import computes_in, rounding_warning
from .costs import default_of

if TYPE_CHECKING:
    from .check import Checked

MODEST_ALPHA, PUBLISHED_RHO = 0.2, 1.0
"""docs/choosing.md has the measurement: 0.2 did no harm at any rho tried; 0.7 was published together with rho 1."""


def warnings(checked: Checked, parameters: int | None) -> Iterator[str]:
    """What to print for a configuration that is accepted."""
    config, settings, run = checked.config, checked.settings, checked.run
    if settings is None or run is None:
        yield f'"optimizer.type": "{config.optimizer_name}" trains without LookSAM'
        return
    rho, k = settings.rho, settings.k
    alpha = 0.0 if isinstance(settings.alpha, str) else settings.alpha
    rho_is_a_length = settings.layer_scale == "norm" or not settings.layerwise
    fights = alpha > MODEST_ALPHA and k > 1 and rho < PUBLISHED_RHO
    if "lr" not in run.base_params and "optimizer.params.lr" not in checked.placeholders \
            and config.scheduler_name is None:
        default = default_of(run, "lr")
        yield (f"optimizer.params.lr is missing: {settings.base_optimizer} takes its own default"
               f"{'' if default is None else f', {default:g}'}")
    if rho == 0:
        yield "rho 0: every SAM step pays a second evaluation for nothing, unless param groups bring their own rho"
    elif fights and rho_is_a_length:
        yield (f"alpha {alpha:g} and rho {rho:g} fight: reuse steps add {alpha:g}‖g‖ however small rho made the "
               f"correction. Use \"alpha\": \"auto\", an alpha up to {MODEST_ALPHA:g}, or the published pair alpha "
               "0.7 and rho 1 (docs/choosing.md)")
    if k == 1 and alpha > 0:
        yield "k 1: every update is a SAM step, alpha is never used"
    if settings.layer_scale != "norm" and not settings.layerwise:
        yield (f'layer_scale "{settings.layer_scale}" without "layerwise": true changes nothing, unless param groups '
               "set layerwise")
    if config.float16_config.enabled and run.stage == 0:
        yield ("fp16 at stage 0: DeepSpeed 0.19.8 divides the gradients by a loss scale that it did not multiply the "
               "loss by; use ZeRO stage 1")
    by_trainer = next((name for name in ("bf16", "fp16") if f"{name}.enabled" in checked.placeholders), None)
    precision = by_trainer or computes_in(config)
    if rho > 0 and precision != "fp32" and rho_is_a_length:
        warning = rounding_warning(rho, precision, parameters) if parameters is not None else \
            f"{precision}: whether rho {rho:g} moves the rounded weights depends on the model: give --params"
        if warning is not None:
            yield f"if the Trainer says {precision}: {warning}" if by_trainer else warning
    clip = config.gradient_clipping
    if clip > 0 and fights:
        factor = math.sqrt(1 + alpha**2)
        yield (f"gradient_clipping {clip:g} will bind earlier: with alpha {alpha:g} the update of a reuse step is "
               f"about √(1 + alpha²) = {factor:.2f} times as long as g, so it is clipped from ‖g‖ = {clip / factor:.3g}"
               " on. Clipping comes after the correction; raise it, or lower alpha")
    if checked.placeholders and checked.given["optimizer"].get("params", {}).get("alpha") == AUTO:
        yield ('alpha "auto" beside placeholders: Hugging Face\'s Trainer and Accelerate refuse an "auto" they do not '
               'know; leave alpha out, or write "calibrated", which means the same')

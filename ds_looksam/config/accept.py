"""The check of a configuration before an engine is built from it, and of the model once it is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

from ..errors import LookSAMConfigError
from ..optimizers import LAYERWISE_OPTIMIZERS
from .base_optimizers import deepspeed_name, known_keys, torch_optimizers
from .deepspeed_keys import misspelt
from .params import OPTIMIZER_TYPES, LookSAMConfig, closest, did_you_mean, read_params, wrong_base_params
from .support import DEMANDED, REFUSED, Run

_BASE = "optimizer.params.base_optimizer"


def examine(config: Any, client_optimizer: Any = None) -> tuple[Run, list[str]]:
    """Of a parsed DeepSpeedConfig whose optimizer type is one of ours: the run, with the default for each of LookSAM's
    values that is wrong; and all that would fail or be wrong, each with its JSON key and the way out."""
    name = config.optimizer_name
    if name in LAYERWISE_OPTIMIZERS:
        params = dict(config.optimizer_params or {})
        run = Run(config, None, name, params, client_optimizer)
        problems, base = wrong_base_params(params), name
    else:
        settings, params, problems = read_params(config.optimizer_params, name)
        base = next((value for key, value in params.items() if isinstance(value, str)
                     and closest(key, LookSAMConfig.model_fields) == "base_optimizer"), settings.base_optimizer)
        run = Run(config, settings, deepspeed_name(base), params, client_optimizer)
        problems += _wrong_base(base)
    problems += _unknown_keys(run, base)
    problems += [row.message for row in (*REFUSED, *DEMANDED)
                 if row.json is not None and (row.alone or run.settings is not None) and row.json(run)]
    return run, problems


def accept(config: Any, given: dict[str, Any], client_optimizer: Any = None) -> Run:
    """Check a ``DeepSpeedConfig`` before an engine is built from it, and the JSON itself, ``given``, for misspelt keys
    that DeepSpeed has ignored. Raises LookSAMConfigError, listing everything that is wrong, or not supported."""
    run, problems = examine(config, client_optimizer)
    refuse(f"{config.optimizer_name} cannot train with this configuration",
           [*(problem for _, problem in misspelt(given)), *problems])
    return run


def refuse(heading: str, problems: list[str]) -> None:
    """Raise one LookSAMConfigError for all problems, if there are any."""
    if problems:
        raise LookSAMConfigError(f"{heading}:\n  - " + "\n  - ".join(dict.fromkeys(problems)))


def refuse_model(engine: Any) -> None:
    """Check what only shows once the engine knows its model and process groups. Raises LookSAMConfigError, listing what
    is not supported of the model, or of the way it is parallel."""
    refuse("LookSAM, LAMB and LARS cannot train this model",
           [row.message for row in REFUSED if row.model is not None and row.model(engine)])


def _wrong_base(base: str) -> Iterator[str]:
    name = deepspeed_name(base)
    if base in OPTIMIZER_TYPES:
        yield f"{_BASE}: {base!r} cannot be its own base; use \"AdamW\""
    elif name not in (*LAYERWISE_OPTIMIZERS, *DEEPSPEED_OPTIMIZERS, *torch_optimizers()):
        known = (*DEEPSPEED_OPTIMIZERS, *torch_optimizers(), "Lamb", "Lars")
        yield (f"{_BASE}: {base!r} is known neither to DeepSpeed ({', '.join(DEEPSPEED_OPTIMIZERS)}) nor to "
               f"torch.optim, and is neither \"Lamb\" nor \"Lars\".{did_you_mean(base, known)}")


def _unknown_keys(run: Run, base: str) -> Iterator[str]:
    known = known_keys(run.base, run.base_params, run.offloaded)
    own = list(LookSAMConfig.model_fields) if run.settings is not None else []
    whose = "neither a key of LookSAM nor one that the base optimizer" if own else "not a key that the optimizer"
    for key in run.base_params:
        if known is not None and key not in known:
            hint = did_you_mean(key, [*own, *known]) or f" These are {', '.join([*own, *sorted(known)])}"
            if key == "max_grad_norm":
                hint = " Use gradient_clipping, outside of the block optimizer"
            yield f"optimizer.params.{key}: {whose} {base!r} knows.{hint}"


def explain_unknown_key(error: TypeError, base_optimizer: str) -> LookSAMConfigError:
    """For what a base optimizer raises that could not be foreseen: its signature takes any key, or a value's type."""
    return LookSAMConfigError(f"optimizer.params: the base optimizer {base_optimizer!r} refused its parameters: "
                              f"{error}")

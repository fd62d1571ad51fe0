"""Validate a DeepSpeed JSON without starting a process or building a model.

What deepspeed.initialize would refuse is an error here, in the same words, and the exit code is 1. Otherwise tells the
batch, gradient evaluations, and what LookSAM adds in bytes sent and memory; and warns of settings that are legal and
likely to be regretted.

LookSAM's extra per SAM step is one evaluation of the window and one publication of w + eps; a reuse step adds nothing
but two scalars. Bytes are what one rank sends in a ring, (N - 1)/N of a payload, twice that for an all-reduce:
  stage 0     all-reduce of the gradient, once a window
  stage 1     the same, and an all-gather of the weights
  stage 2     an all-reduce a micro-batch ("use_multi_rank_bucket_allreduce" false: half of that), and the all-gather
  stage 3     a reduce-scatter and two all-gathers of the weights a micro-batch; weights that stay gathered are not sent
Memory is counted in shards: all P parameters on stage 0, P/N of them on stages 1 to 3. Not counted: the inputs of the
window that ends in a SAM step, which are kept until its end.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hjson
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig

from ..config.params import AUTO, OPTIMIZER_TYPES, LookSAMConfig, parse_base_params, parse_params
from ..config.support import refuse_layerwise_optimizer, refuse_unsupported
from ..errors import LookSAMConfigError
from ..optimizers import LAYERWISE_OPTIMIZERS
from . import advice, costs
from .base_keys import refuse_unknown_keys
from .output import print_table


@dataclass(frozen=True)
class Checked:
    """A configuration that deepspeed.initialize would take, as far as can be told without the model.

    Attributes:
        config: DeepSpeed's own view of it, a ``DeepSpeedConfig``.
        settings: LookSAM's part; None for a run without LookSAM.
        placeholders: the keys that say "auto" for Hugging Face's Trainer or Accelerate to fill in. They were left out.
    """

    config: Any
    settings: LookSAMConfig | None
    placeholders: tuple[str, ...]


def run(path: Path, world_size: int, parameters: int | None) -> int:
    try:
        checked = check(path, world_size)
    except LookSAMConfigError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 1
    config, settings = checked.config, checked.settings
    print_table(str(path), [
        ("optimizer", config.optimizer_name if settings is None else f"LookSAM around {settings.base_optimizer}"),
        ("ZeRO stage, precision", f"{int(config.zero_config.stage)}, {costs.precision_of(config)}"),
        ("batch of one update", f"{config.train_batch_size} = {config.train_micro_batch_size_per_gpu} a rank x "
         f"{config.gradient_accumulation_steps} micro-batches x {world_size} ranks"),
        *([] if settings is None else costs.rows(config, settings, world_size, parameters)),
    ])
    for key in checked.placeholders:
        print(f'note: {key} is "auto": for Hugging Face\'s Trainer or Accelerate to fill in, not checked')
    for warning in advice.warnings(config, settings, parameters, bool(checked.placeholders)):
        print(f"warning: {warning}")
    return 0


def check(path: Path, world_size: int = 1) -> Checked:
    """Read and validate a configuration as ``deepspeed.initialize`` does before it builds anything.

    Raises:
        LookSAMConfigError: the file is no JSON object, or DeepSpeed or LookSAM refuses what it says.
    """
    given = _read(path)
    placeholders: list[str] = []
    values = _filled_in(given, "", placeholders)
    if any(key.startswith("train_") for key in placeholders) and not any(key.startswith("train_") for key in values):
        values["train_micro_batch_size_per_gpu"] = 1

    class Offline(DeepSpeedConfig):
        """A DeepSpeedConfig for ranks that are not there: DeepSpeed asks the process group, and assigns 1 without."""

        world_size = property(lambda self: ranks, lambda self, value: None)

    ranks = world_size
    try:
        config = Offline(values)
    except (AssertionError, KeyError, TypeError, ValueError) as error:  # what DeepSpeed's own checks raise
        raise LookSAMConfigError(f"DeepSpeed refuses it at world size {world_size}: {error}") from error
    return Checked(config, _check_optimizer(config), tuple(placeholders))


def _check_optimizer(config: Any) -> LookSAMConfig | None:
    name = config.optimizer_name
    if name is None:
        raise LookSAMConfigError('optimizer.type is missing: "optimizer": {"type": "LookSAM", "params": {...}}')
    if name in (*OPTIMIZER_TYPES, *LAYERWISE_OPTIMIZERS) and config.hybrid_engine.enabled:
        raise LookSAMConfigError(f"hybrid_engine.enabled: not supported by optimizer.type {name!r}; leave it off")
    if name in LAYERWISE_OPTIMIZERS:
        parse_base_params(config.optimizer_params)
        refuse_layerwise_optimizer(config, client_optimizer=None)
        return None
    if name in OPTIMIZER_TYPES:
        settings, base_params = parse_params(config.optimizer_params, name)
        refuse_unsupported(config, settings, client_optimizer=None)
        refuse_unknown_keys(settings.base_optimizer, base_params)
        return settings
    if name.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, name):
        ours = (*OPTIMIZER_TYPES, *LAYERWISE_OPTIMIZERS)
        close = next((type_ for type_ in ours if type_.lower() == name.lower()), None) \
            or next(iter(difflib.get_close_matches(name, ours, n=1)), None)
        raise LookSAMConfigError(f"optimizer.type: {name!r} is known neither to DeepSpeed, nor to torch.optim, nor to "
                                 f"ds_looksam ({', '.join(ours)})." + (f" Did you mean {close!r}?" if close else ""))
    return None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, read as DeepSpeed reads it (Hjson: comments are allowed)."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])]
        if twice:
            raise LookSAMConfigError(f"{', '.join(twice)} appears twice in one object")
        return dict(pairs)

    try:
        values = hjson.loads(path.read_text(), object_pairs_hook=no_duplicates)
    except (hjson.HjsonDecodeError, UnicodeDecodeError) as error:
        raise LookSAMConfigError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise LookSAMConfigError("not a JSON object")
    return values


def _filled_in(values: dict[str, Any], prefix: str, placeholders: list[str]) -> dict[str, Any]:
    """A copy without the keys that say "auto", which are added to ``placeholders``; alpha's "auto" is a value."""
    result = {}
    for key, value in values.items():
        name = prefix + key
        if value == AUTO and name != "optimizer.params.alpha":
            placeholders.append(name)
        else:
            result[key] = _filled_in(value, name + ".", placeholders) if isinstance(value, dict) else value
    return result

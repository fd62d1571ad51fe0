"""Validate a DeepSpeed JSON without starting a process or building a model.

What deepspeed.initialize would refuse is an error here, all of it at once, and the exit code is 1. Otherwise tells the
batch, gradient evaluations, and what LookSAM adds in bytes sent and memory; and warns of settings that are legal and
likely to be regretted.

LookSAM's extra per SAM step is one evaluation of the window and one publication of w + eps; a reuse step adds nothing
but two scalars. Bytes are what one rank sends in a ring, (N - 1)/N of a payload, twice that for an all-reduce:
  stage 0     all-reduce of the gradient, once a window
  stage 1     the same, and an all-gather of the weights
  stage 2     an all-reduce a micro-batch ("use_multi_rank_bucket_allreduce" false: half of that), and the all-gather
  stage 3     a reduce-scatter and two all-gathers of the weights a micro-batch; weights that stay gathered are not sent
That is of "ascent": "global". "rank" and "micro_batch" gather nothing, "global_micro_batch" w + eps and w again a
micro-batch, and both micro-batch modes reduce two gradients of each (docs/costs.md).
Memory is counted in shards: all P parameters on stage 0, P/N of them on stages 1 to 3. Not counted: the inputs of the
window that ends in a SAM step, which are kept until its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hjson
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
from pydantic import ValidationError

from ..config.accept import examine, refuse
from ..config.base_optimizers import TAKEN_OUT, torch_optimizers
from ..config.deepspeed_keys import MODELS, ignored, misspelt
from ..config.params import AUTO, FILLED_IN, OPTIMIZER_TYPES, LookSAMConfig, did_you_mean
from ..config.support import Run
from ..errors import LookSAMConfigError
from ..optimizers import LAYERWISE_OPTIMIZERS
from . import advice, costs
from .output import print_table

OURS = (*OPTIMIZER_TYPES, *LAYERWISE_OPTIMIZERS)


@dataclass(frozen=True)
class Checked:
    """A configuration that deepspeed.initialize would take, as far as can be told without the model.

    Attributes:
        config: DeepSpeed's own view of it, a ``DeepSpeedConfig``.
        run: what is trained; None where neither LookSAM nor its LAMB and LARS do it.
        placeholders: the keys that say "auto" for Hugging Face's Trainer or Accelerate to fill in. They were left out.
        given: the JSON without them.
    """

    config: Any
    run: Run | None
    placeholders: list[str]
    given: dict[str, Any]

    @property
    def settings(self) -> LookSAMConfig | None:
        """LookSAM's part; None for a run without LookSAM."""
        return self.run.settings if self.run is not None else None


def run(config: Path, world_size: int, params: int | None) -> int:
    checked = check(config, world_size)
    print_table(str(config), list(costs.rows(checked, world_size, params)))
    for key in checked.placeholders:
        print(f'note: {key} is "auto": for Hugging Face\'s Trainer or Accelerate to fill in, not checked')
    for key in ignored(checked.given):
        print(f"note: {key}: DeepSpeed knows no such key and ignores it")
    for warning in advice.warnings(checked, params):
        print(f"warning: {warning}")
    return 0


def check(path: Path, world_size: int = 1) -> Checked:
    """Read and validate a configuration as ``deepspeed.initialize`` does before it trains. Raises LookSAMConfigError:
    the file is no JSON object, or DeepSpeed or LookSAM refuses what it says; with all of it."""
    given, problems = read_json(path)
    values, placeholders = without_placeholders(given, FILLED_IN.__contains__)
    if any(key.startswith("train_") for key in placeholders) and not any(key.startswith("train_") for key in values):
        values["train_micro_batch_size_per_gpu"] = 1
    for key, problem in list(misspelt(values)):
        problems.append(problem)
        values = _without(values, key.split("."))
    config, run = _parsed(values, world_size, problems), None
    if config is not None and config.optimizer_name in OURS:
        run, more = examine(config)
        problems += more or _fails_later(run, any(key.startswith("scheduler.") for key in placeholders))
    elif config is not None:
        problems += _wrong_type(config.optimizer_name)
    refuse(f"{path}: {config.optimizer_name if run else 'DeepSpeed'} cannot train with this configuration", problems)
    return Checked(config, run, placeholders, values)


def _parsed(values: dict[str, Any], world_size: int, problems: list[str]) -> Any:
    """DeepSpeed's view of a JSON. What it refuses is added to ``problems`` and left out; None if that does not help."""

    class Offline(DeepSpeedConfig):
        """A DeepSpeedConfig for ranks that are not there: DeepSpeed asks the process group, and assigns 1 without."""

        world_size = property(lambda self: world_size, lambda self, value: None)

    try:
        return Offline(values)
    except Exception as error:  # whatever deepspeed.initialize would raise
        block = next((name for name, model in MODELS.items() if isinstance(error, ValidationError)
                      and model.__name__ == error.title), None)
        if isinstance(error, ValidationError) and block is not None:
            smaller = values
            for detail in error.errors():
                where = [*block.split("."), *map(str, detail["loc"])]
                problems.append(f"{'.'.join(where)}: {detail['msg']}, got {detail['input']!r}")
                smaller = _without(smaller, where)
            return _parsed(smaller, world_size, problems)
        hint = "; give --world-size, if it is for more" if world_size == 1 and "atch" in str(error) else ""
        problems.append(f"DeepSpeed refuses it at world size {world_size}{hint}: {error}")
        # The rest is told too, if the batch or one other key is to blame.
        others = {key: value for key, value in values.items() if "batch" not in key and "accumulation_steps" not in key}
        for smaller in ({**others, "train_micro_batch_size_per_gpu": 1}, *(_without(values, [key]) for key in values)):
            try:
                return Offline(smaller)
            except Exception:
                continue
        return None


def _wrong_type(name: str | None) -> Iterator[str]:
    if name is None:
        yield 'optimizer.type is missing: "optimizer": {"type": "LookSAM", "params": {...}}'
    elif name.lower() not in DEEPSPEED_OPTIMIZERS and name not in torch_optimizers():
        yield (f"optimizer.type: {name!r} is known neither to DeepSpeed, nor to torch.optim, nor to ds_looksam "
               f"({', '.join(OURS)}).{did_you_mean(name, (*OURS, *DEEPSPEED_OPTIMIZERS, *torch_optimizers()))}")


def _fails_later(run: Run, open_scheduler: bool) -> Iterator[str]:
    """What DeepSpeed or the optimizers themselves only notice while the engine is being built. ``open_scheduler``:
    keys of the scheduler are missing because others will fill them in."""
    if run.settings is not None and run.settings.rho_schedule.type == "lr" and run.settings.rho_schedule.lr is None \
            and run.base_params.get("lr") == 0:
        yield 'optimizer.params.rho_schedule.lr: must be given with "type": "lr" where optimizer.params.lr is 0'
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW([weight], lr=run.base_params.get("lr", 1e-3))
    cls = run.base_class
    if cls is not None and not cls.__module__.startswith("deepspeed"):  # those compile their kernels
        try:
            optimizer = cls([weight], **{key: x for key, x in run.base_params.items() if key not in TAKEN_OUT})
        except (RuntimeError, TypeError, ValueError) as error:
            yield f"optimizer.params: {cls.__name__} refuses its values: {error}"
    elif run.base in ("adam", "adamw") and run.base_params.get("amsgrad"):
        yield 'optimizer.params.amsgrad: not supported by DeepSpeed\'s Adam; use "torch_adam": true'
    name, params = run.config.scheduler_name, run.config.scheduler_params
    if name is None:
        return
    scheduler = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if scheduler is None:
        known = (*lr_schedules.VALID_LR_SCHEDULES, *torch.optim.lr_scheduler.__all__)
        yield f"scheduler.type: {name!r} is known neither to DeepSpeed nor to torch.{did_you_mean(name, known)}"
    elif params is None:
        yield "scheduler.params is missing: {} takes the scheduler's defaults"
    elif scheduler.__module__ == "torch.optim.lr_scheduler" and (run.stage > 0 or run.dtype != torch.float32):
        yield (f"scheduler.type: torch's {name} cannot be made around DeepSpeed's wrapper; use deepspeed.initialize("
               f"lr_scheduler=lambda optimizer: {name}(optimizer, ...)), or one of DeepSpeed's")
    elif not open_scheduler:
        try:
            scheduler(optimizer, **params)
        except Exception as error:  # a scheduler's constructor raises what it likes
            yield f"scheduler.params: {name} refuses them: {error}"


def read_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A JSON object, read as DeepSpeed reads it (Hjson: comments are allowed); and which keys it has twice. Raises
    LookSAMConfigError: it is no JSON, or no object."""
    problems: list[str] = []

    def note_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        problems.extend(f"{key} appears twice in one object" for key in dict(pairs) if keys.count(key) > 1)
        return dict(pairs)

    try:
        values = hjson.loads(path.read_text(), object_pairs_hook=note_duplicates)
    except (hjson.HjsonDecodeError, UnicodeDecodeError) as error:
        raise LookSAMConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise LookSAMConfigError(f"{path}: not a JSON object")
    return values, problems


def without_placeholders(values: dict[str, Any], is_filled_in: Callable[[str], bool],
                         prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """A copy without each "auto" that somebody else is to fill in, by its key with its blocks; and those keys."""
    result, placeholders = {}, []
    for key, value in values.items():
        if value == AUTO and is_filled_in(prefix + key):
            placeholders.append(prefix + key)
        elif isinstance(value, dict):
            result[key], inner = without_placeholders(value, is_filled_in, f"{prefix}{key}.")
            placeholders += inner
        else:
            result[key] = value
    return result, placeholders


def _without(values: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """A copy without one key, ``path`` being the blocks that lead to it and the key."""
    key, *inner = path
    if key not in values:
        return values
    if inner and isinstance(values[key], dict):
        return {**values, key: _without(values[key], inner)}
    return {name: value for name, value in values.items() if name != key}

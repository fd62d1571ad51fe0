"""The JSON ``optimizer.params`` block as a validated model.

The block is flat: the keys of :class:`LookSAMConfig` are LookSAM's, every other key belongs to the base optimizer
and is handed to DeepSpeed's own code under the name DeepSpeed or torch.optim knows.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictBool, ValidationError, model_validator

from ..arithmetic.layerwise import LayerScale
from ..errors import LookSAMConfigError

AUTO, CALIBRATED = "auto", "calibrated"
LAYERWISE_TYPE = "LookLayerSAM"
OPTIMIZER_TYPES = ("LookSAM", LAYERWISE_TYPE)
"""Values of the JSON key ``optimizer.type`` that make a LookSAM engine."""
FILLED_IN = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    *(f"optimizer.params.{key}" for key in ("lr", "betas", "eps", "weight_decay")),
    *(f"scheduler.params.{key}" for key in ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")),
    "fp16.enabled", "bf16.enabled",
    *(f"zero_optimization.{key}" for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size",
                                             "stage3_param_persistence_threshold",
                                             "stage3_gather_16bit_weights_on_model_save")),
})  # yapf: disable
"""Keys whose "auto" Hugging Face's Trainer (5.x) or Accelerate (1.x) fills in before deepspeed.initialize sees it."""


def _alpha(value: Any) -> str | float:
    # Accelerate takes every "auto" in a DeepSpeed configuration for a placeholder that it must fill: hence a synonym.
    if value in (AUTO, CALIBRATED):
        return AUTO
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f'should be a number from 0 on, "{AUTO}" or "{CALIBRATED}" (which means the same)')
    return float(value)


NonNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Alpha = Annotated[Literal["auto"] | float, PlainValidator(_alpha)]
Ascent = Literal["global", "rank", "micro_batch", "global_micro_batch"]
ASCENTS: tuple[Ascent, ...] = get_args(Ascent)
OWN = ("rank", "micro_batch")
"""The modes of ``ascent`` in which each rank has a perturbation of its own."""
PER_MICRO_BATCH = ("micro_batch", "global_micro_batch")
"""Those in which each micro-batch has one, so that it is evaluated again by itself."""
_Beta = Annotated[float, Field(ge=0, lt=1, strict=True)]


class RhoSchedule(BaseModel):
    """The JSON key ``rho_schedule``: what rho is multiplied by, over the course of a run.

    Attributes:
        type: ``"constant"`` (1), ``"lr"`` (in proportion to the group's learning rate), ``"linear"`` or ``"cosine"``
            (from ``start`` to ``end`` over ``updates`` updates, then ``end``; cosine is half a wave).
        start, end: factors, not radii: with ``rho`` 0.1, ``"end": 0.2`` ends at 0.02. With ``rho`` 1 they are radii.
        updates: length of ``"linear"`` and ``"cosine"``, counted from the end of ``off_updates``.
        lr: the learning rate at which the factor of ``"lr"`` is 1; the group's configured one if left out.
        off_updates: for that many updates at the start LookSAM is off: the base optimizer runs alone, nothing is
            evaluated twice. The first update after them is a SAM step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["constant", "lr", "linear", "cosine"] = "constant"
    start: NonNegative = 1.0
    end: NonNegative = 1.0
    updates: Annotated[int, Field(ge=1, strict=True)] | None = None
    lr: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | None = None
    off_updates: Annotated[int, Field(ge=0, strict=True)] = 0

    @model_validator(mode="after")
    def _keys_of_type(self) -> RhoSchedule:
        ranged = self.type in ("linear", "cosine")
        if ranged and self.updates is None:
            raise ValueError(f'"type": "{self.type}" needs "updates", how many updates it takes from "start" to "end"')
        own = {"start", "end", "updates"} if ranged else {"lr"} if self.type == "lr" else set()
        extra = sorted(self.model_fields_set - own - {"type", "off_updates"})
        if extra:
            raise ValueError(f'"type": "{self.type}" has no use for {", ".join(extra)}')
        return self


class LookSAMConfig(BaseModel):
    """LookSAM's own keys of ``optimizer.params``.

    Attributes:
        k: a SAM step (two gradient evaluations) is taken on every k-th update; k = 1 is SAM.
        rho: Euclidean length of the perturbation over all trained weights: an absolute distance, no share of ‖w‖.
        alpha: strength of the reuse, a number (Liu et al. 2022, Algorithm 1) or ``"auto"`` (calibrated at every
            SAM step, not in the paper). In a configuration that Hugging Face's Trainer or Accelerate reads, leave it
            out or write ``"calibrated"``, which means the same: they refuse an "auto" they do not know.
        base_optimizer: name of the optimizer that takes the step: DeepSpeed's, torch.optim's, "Lamb" or "Lars".
        layerwise: scale each layer's (parameter tensor's) part of the perturbation by its trust ratio ‖w_l‖/‖g_l‖:
            Look-LayerSAM. ``"type": "LookLayerSAM"`` is ``"type": "LookSAM"`` with this set.
        layer_scale: what divides the layer-wise direction, and so what ``rho`` means: ``"norm"``, ``"relative"`` or
            ``"gradient"``, see :func:`ds_looksam.arithmetic.layerwise.perturbation_scales`.
        rho_schedule: what rho is multiplied by over the course of the run, see :class:`RhoSchedule`.
        rounding: how w + eps is rounded where the model computes in bf16 or fp16: ``"stochastic"``, so that the weights
            move by eps on average however small it is, or ``"nearest"``.
        v_dtype: how the stored g_v is kept between SAM steps: ``"fp32"``, or ``"bf16"``, which halves it
            (docs/low-precision.md has the measured effect).
        compile: fuse LookSAM's own arithmetic on the shards, by Triton on a GPU and by ``torch.compile`` on a CPU,
            which takes a C++ compiler, and some seconds at the start (docs/costs.md has the measured effects). Left
            out, it is done on a GPU where Triton works, and not on a CPU.
        ascent: who shares one perturbation (docs/algorithm.md): ``"global"``, the window of all ranks; ``"rank"``, one
            rank's micro-batches of it; ``"micro_batch"``, one rank's one micro-batch; ``"global_micro_batch"``, one
            micro-batch of every rank. ZeRO-3 has the first and the last.

    ``rho``, ``alpha`` and ``layerwise`` are defaults of the param groups: a group may bring its own, and they may be
    changed during training through ``engine.optimizer.param_groups``. A group with ``"layerwise": false`` keeps trust
    ratio 1, as biases and norms do in LAMB recipes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: Annotated[int, Field(ge=1, strict=True)] = 5
    rho: NonNegative = 0.05
    alpha: Alpha = "auto"
    base_optimizer: Annotated[str, Field(min_length=1)] = "AdamW"
    layerwise: StrictBool = False
    layer_scale: LayerScale = "norm"
    rho_schedule: RhoSchedule = RhoSchedule()
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    v_dtype: Literal["fp32", "bf16"] = "fp32"
    compile: StrictBool | None = None
    ascent: Ascent = "global"


class _CommonBaseParams(BaseModel):
    """Range checks of the hyper-parameters most base optimizers share; FusedAdam itself checks none of them."""

    model_config = ConfigDict(extra="allow")

    lr: NonNegative | None = None
    betas: tuple[_Beta, _Beta] | None = None
    eps: NonNegative | None = None
    weight_decay: NonNegative | None = None
    momentum: NonNegative | None = None


class _GroupKeys(BaseModel):
    """LookSAM's keys of one entry of ``param_groups``."""

    rho: NonNegative
    alpha: Alpha
    layerwise: StrictBool


class GroupSettings(NamedTuple):
    """What is in force for one param group. ``alpha`` is None where it is ``"auto"``."""

    rho: float
    alpha: float | None
    layerwise: bool


def read_params(params: dict[str, Any] | None,
                optimizer_type: str = OPTIMIZER_TYPES[0]) -> tuple[LookSAMConfig, dict[str, Any], list[str]]:
    """Split a flat ``optimizer.params`` block: LookSAM's settings, with the default for each value that is wrong; a new
    dict with every other key, unchanged; and what is of the wrong type or out of range, each beginning with its key."""
    base_params = dict(params or {})
    own = {key: base_params.pop(key) for key in LookSAMConfig.model_fields if key in base_params}
    problems = []
    if optimizer_type == LAYERWISE_TYPE and own.setdefault("layerwise", True) is False:
        problems.append(f'optimizer.params.layerwise: false contradicts "type": "{LAYERWISE_TYPE}"; leave it out, or '
                        'use "type": "LookSAM"')
    try:
        settings = LookSAMConfig(**own)
    except ValidationError as error:
        problems += _wrong_values(error, "optimizer.params")
        wrong = {detail["loc"][0] for detail in error.errors()}
        settings = LookSAMConfig(**{key: value for key, value in own.items() if key not in wrong})
    return settings, base_params, problems + wrong_base_params(base_params)


def parse_params(params: dict[str, Any] | None,
                 optimizer_type: str = OPTIMIZER_TYPES[0]) -> tuple[LookSAMConfig, dict[str, Any]]:
    """As :func:`read_params`; raises LookSAMConfigError for what is wrong."""
    settings, base_params, problems = read_params(params, optimizer_type)
    if problems:
        raise LookSAMConfigError("; ".join(problems))
    return settings, base_params


def keys_of_params() -> set[str]:
    """LookSAM's, and those that most base optimizers share."""
    return {*LookSAMConfig.model_fields, *_CommonBaseParams.model_fields}


def wrong_base_params(params: dict[str, Any]) -> list[str]:
    """What is of the wrong type or out of range among the hyper-parameters that most base optimizers share."""
    try:
        _CommonBaseParams(**params)
    except ValidationError as error:
        return _wrong_values(error, "optimizer.params")
    return []


def set_group_defaults(group: dict[str, Any], settings: LookSAMConfig) -> None:
    """Fill in what a param group does not say itself from the JSON's block."""
    for key in _GroupKeys.model_fields:
        group.setdefault(key, getattr(settings, key))


def parse_group(group: dict[str, Any], index: int) -> GroupSettings:
    """LookSAM's settings in force for one param group; LookSAMConfigError for what ``param_groups`` has wrong."""
    try:
        keys = _GroupKeys(**group_settings(group))
    except ValidationError as error:
        raise LookSAMConfigError("; ".join(_wrong_values(error, f"param_groups[{index}]"))) from None
    return GroupSettings(keys.rho, None if isinstance(keys.alpha, str) else keys.alpha, keys.layerwise)


def group_settings(group: dict[str, Any]) -> dict[str, Any]:
    """LookSAM's keys of one entry of ``param_groups``, as they stand there."""
    return {key: group[key] for key in _GroupKeys.model_fields if key in group}


def closest(key: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known key that was probably meant. Case does not count."""
    spelling = {name.lower(): name for name in known}
    return next((spelling[name] for name in difflib.get_close_matches(key.lower(), spelling, n=1, cutoff=cutoff)), None)


def did_you_mean(key: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """" Did you mean ...?", or nothing where no known key is close."""
    close = closest(key, known, cutoff)
    return f" Did you mean {close!r}?" if close else ""


def _wrong_values(error: ValidationError, prefix: str) -> list[str]:
    """pydantic's errors, each naming the JSON key."""
    lines = []
    for detail in error.errors():
        where = detail["loc"][:2 if detail["loc"][:1] == ("rho_schedule", ) else 1]  # beyond: a union's members
        key, hint = ".".join([prefix, *map(str, where)]), ""
        if detail["type"] == "extra_forbidden":
            hint = did_you_mean(str(where[-1]), RhoSchedule.model_fields)
        elif detail["input"] == AUTO:
            hint = (' ("auto" is a placeholder that Hugging Face integrations fill in for lr, betas, eps and '
                    'weight_decay only; give a number)')
        elif where == ("base_optimizer", ) and isinstance(detail["input"], dict):
            hint = " (give its name alone; its parameters stand beside it in optimizer.params)"
        lines.append(f"{key}: {detail['msg'].removeprefix('Value error, ')}, got {detail['input']!r}{hint}")
    return list(dict.fromkeys(lines))

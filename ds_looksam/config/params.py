"""The JSON ``optimizer.params`` block as a validated model.

The block is flat: the keys of :class:`LookSAMConfig` are LookSAM's, every other key belongs to the base optimizer
and is handed to DeepSpeed's own code under the name DeepSpeed or torch.optim knows.
"""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from ..arithmetic.layerwise import LayerScale
from ..errors import LookSAMConfigError

AUTO, CALIBRATED = "auto", "calibrated"
LAYERWISE_TYPE = "LookLayerSAM"
OPTIMIZER_TYPES = ("LookSAM", LAYERWISE_TYPE)
"""Values of the JSON key ``optimizer.type`` that make a LookSAM engine."""


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


NonNegative = Annotated[float, Field(ge=0, strict=True), AfterValidator(_finite)]
# Accelerate takes every "auto" in a DeepSpeed configuration for a placeholder that it must fill in, hence the synonym.
Alpha = Annotated[Literal["auto"] | NonNegative, BeforeValidator(lambda value: AUTO if value == CALIBRATED else value)]
_BetaPair = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


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
    lr: Annotated[float, Field(gt=0, strict=True), AfterValidator(_finite)] | None = None
    off_updates: Annotated[int, Field(ge=0, strict=True)] = 0

    @model_validator(mode="after")
    def _keys_of_type(self) -> RhoSchedule:
        ranged = self.type in ("linear", "cosine")
        if ranged and self.updates is None:
            raise ValueError(f'"type": "{self.type}" needs "updates", how many updates it takes from "start" to "end"')
        allowed = {"type", "off_updates", *(("start", "end", "updates") if ranged else ()),
                   *(("lr", ) if self.type == "lr" else ())}
        extra = sorted(self.model_fields_set - allowed)
        if extra:
            raise ValueError(f'"type": "{self.type}" has no use for {", ".join(extra)}')
        return self


class LookSAMConfig(BaseModel):
    """LookSAM's own keys of ``optimizer.params``.

    Attributes:
        k: a SAM step (two gradient evaluations) is taken on every k-th update; k = 1 is SAM.
        rho: radius of the perturbation, in units of the weights' Euclidean norm over the whole model.
        alpha: strength of the reuse, a number (Liu et al. 2022, Algorithm 1) or ``"auto"`` (calibrated at every
            SAM step, not in the paper). In a configuration that Hugging Face's Trainer or Accelerate reads, leave it
            out or write ``"calibrated"``, which means the same: they refuse an "auto" they do not know.
        base_optimizer: name of the optimizer that takes the step, any that DeepSpeed's config accepts.
        layerwise: scale each layer's (parameter tensor's) part of the perturbation by its trust ratio ‖w_l‖/‖g_l‖:
            Look-LayerSAM. ``"type": "LookLayerSAM"`` is ``"type": "LookSAM"`` with this set.
        layer_scale: what divides the layer-wise direction, and so what ``rho`` means: ``"norm"``, ``"relative"`` or
            ``"gradient"``, see :func:`ds_looksam.arithmetic.layout.perturbation_scales`.
        rho_schedule: what rho is multiplied by over the course of the run, see :class:`RhoSchedule`.
        rounding: how w + eps is rounded where the model computes in bf16 or fp16: ``"stochastic"``, so that the weights
            move by eps on average however small it is, or ``"nearest"``.
        v_dtype: how the stored g_v is kept between SAM steps: ``"fp32"``, or ``"bf16"``, which halves it
            (docs/low-precision.md has the measured effect).
        compile: fuse LookSAM's own arithmetic on the shards, by Triton on a GPU and by ``torch.compile`` on a CPU,
            which takes a C++ compiler, and some seconds at the start (docs/costs.md has the measured effects). Left
            out, it is done on a GPU where Triton works, and not on a CPU.

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
    ascent: Literal["global", "rank", "micro_batch", "global_micro_batch"] = "global"
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    v_dtype: Literal["fp32", "bf16"] = "fp32"
    compile: StrictBool | None = None


class _CommonBaseParams(BaseModel):
    """Range checks of the hyper-parameters most base optimizers share; FusedAdam itself checks none of them."""

    model_config = ConfigDict(extra="allow")

    lr: NonNegative | None = None
    betas: _BetaPair | None = None
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


def parse_params(params: dict[str, Any] | None,
                 optimizer_type: str = OPTIMIZER_TYPES[0]) -> tuple[LookSAMConfig, dict[str, Any]]:
    """Split a flat ``optimizer.params`` block into LookSAM's part and the base optimizer's.

    Returns:
        The validated settings, and a new dict with every other key, unchanged.

    Raises:
        LookSAMConfigError: a value has the wrong type or is out of range. The message names the JSON key.
    """
    params = dict(params or {})
    own = {key: params.pop(key) for key in LookSAMConfig.model_fields if key in params}
    if optimizer_type == LAYERWISE_TYPE and own.setdefault("layerwise", True) is False:
        raise LookSAMConfigError(f'optimizer.params.layerwise: false contradicts "type": "{LAYERWISE_TYPE}"; leave it '
                                 'out, or use "type": "LookSAM"')
    with _naming("optimizer.params"):
        config = LookSAMConfig(**own)
        _CommonBaseParams(**params)
    return config, params


def parse_base_params(params: dict[str, Any] | None) -> dict[str, Any]:
    """The ``optimizer.params`` block of a run without LookSAM, checked; a copy.

    Raises:
        LookSAMConfigError: a value has the wrong type or is out of range.
    """
    with _naming("optimizer.params"):
        _CommonBaseParams(**(params or {}))
    return dict(params or {})


def set_group_defaults(group: dict[str, Any], settings: LookSAMConfig) -> None:
    """Fill in what a param group does not say itself from the JSON's block."""
    group.setdefault("rho", settings.rho)
    group.setdefault("alpha", settings.alpha)
    group.setdefault("layerwise", settings.layerwise)


def parse_group(group: dict[str, Any], index: int) -> GroupSettings:
    """LookSAM's settings in force for one param group.

    Raises:
        LookSAMConfigError: a value set through ``param_groups`` has the wrong type or is out of range.
    """
    with _naming(f"param_groups[{index}]"):
        keys = _GroupKeys(rho=group["rho"], alpha=group["alpha"], layerwise=group["layerwise"])
    return GroupSettings(keys.rho, None if isinstance(keys.alpha, str) else keys.alpha, keys.layerwise)


def group_settings(group: dict[str, Any]) -> dict[str, Any]:
    """LookSAM's keys of one entry of ``param_groups``, as they stand there."""
    return {key: group[key] for key in _GroupKeys.model_fields if key in group}


def explain_unknown_key(error: TypeError, base_params: dict[str, Any], base_optimizer: str,
                        looksam: bool = True) -> LookSAMConfigError:
    """Turn a base optimizer's ``unexpected keyword argument`` into an error that names the JSON key.

    ``looksam``: whether LookSAM's own keys would have been right there.
    """
    unknown = next((key for key in base_params if f"'{key}'" in str(error)), None)
    if unknown is None:
        return LookSAMConfigError(f"optimizer.params: the base optimizer {base_optimizer!r} refused its parameters: "
                                  f"{error}")
    if not looksam:
        return LookSAMConfigError(f"optimizer.params.{unknown}: not a key that the optimizer {base_optimizer!r} knows")
    close = difflib.get_close_matches(unknown, LookSAMConfig.model_fields, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return LookSAMConfigError(
        f"optimizer.params.{unknown}: neither a key of LookSAM ({', '.join(LookSAMConfig.model_fields)}) nor one that "
        f"the base optimizer {base_optimizer!r} knows.{hint}")


class _naming:
    """Reraise pydantic's errors as LookSAMConfigError, each line naming the JSON key."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __enter__(self) -> None:
        return None

    def __exit__(self, exc_type: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, ValidationError):
            lines = []
            for detail in error.errors():
                where = detail["loc"][:2 if detail["loc"][:1] == ("rho_schedule", ) else 1]  # beyond: a union's members
                key = ".".join([self.prefix, *(str(part) for part in where)])
                hint = ""
                if detail["input"] == AUTO:
                    hint = ' ("auto" here is a placeholder that Hugging Face integrations fill in; give a number)'
                lines.append(f"{key}: {detail['msg']}, got {detail['input']!r}{hint}")
            raise LookSAMConfigError("; ".join(dict.fromkeys(lines))) from None

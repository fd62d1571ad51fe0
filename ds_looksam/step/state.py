"""What LookSAM carries from one update to the next. All of it is in every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..arithmetic import eager as arithmetic
from ..arithmetic.eager import Shard
from ..shards import GradientShards
from .status import LookSAMStatus


@dataclass(frozen=True)
class Fresh:
    """What a SAM step brings, to be kept if its update is applied. ``g_v`` lies in the memory that held g.

    Attributes:
        loss_scale: of ``g_squared`` and ``scalars``; the update may change the wrapper's.
        is_finite: whether g_v is; the same on every rank.
        sharpness: float64 0-dim, see :class:`LookSAMStatus`.
    """

    g_v: Shard
    g_squared: Tensor
    v_squared: Tensor
    scalars: arithmetic.ReplayScalars
    sharpness: Tensor
    loss_scale: float
    is_finite: bool


class LookSAMState:
    """v, counters and measurements.

    Attributes:
        status: counters, beta and measurements: what users see as ``engine.looksam``.
        v: the stored g_v, a list of flat tensors ([numel_local] each) in ``v_dtype``; None until the first SAM step.
        v_squared: this rank's part of ‖v‖², of v as stored, so that the reuse adds the length it says; None with v.
    """

    def __init__(self, status: LookSAMStatus, shards: GradientShards, v_dtype: torch.dtype) -> None:
        self.status = status
        self.v: Shard | None = None
        self.v_squared: Tensor | None = None
        self._shards, self._v_dtype = shards, v_dtype
        shards.reserve_v(v_dtype)

    def keep(self, fresh: Fresh) -> None:
        """The update was applied: the fresh g_v replaces v, beta and the measurements follow. A g_v that is not finite
        (in a wrapper that applies such updates) is dropped."""
        scalars, g_squared, status = fresh.scalars, fresh.g_squared, self.status
        if not fresh.is_finite:
            return
        if self.v is not None:
            status.beta = arithmetic.update_beta(status.beta, scalars.v_dot_g_v, fresh.v_squared, g_squared)
            status.orthogonal_cosine = arithmetic.cosine(scalars.v_dot_g_v, fresh.v_squared, scalars.g_v_squared)
        self._store(fresh.g_v)
        status.gradient_norm = g_squared.sqrt() / fresh.loss_scale
        status.perturbed_gradient_norm = scalars.g_s_squared.sqrt() / fresh.loss_scale
        status.orthogonal_norm = scalars.g_v_squared.sqrt() / fresh.loss_scale
        status.perturbation_ratio, status.perturbation_cosine = scalars.moved_ratio, scalars.moved_cosine
        status.gradient_cosine = arithmetic.cosine(scalars.g_dot_g_s, g_squared, scalars.g_s_squared)
        status.sharpness = fresh.sharpness

    def _store(self, v: Shard) -> None:
        self.v = self._shards.keep_v(v, self._v_dtype)
        self.v_squared = self._shards.passes.squared_norm(self.v, self._shards.device)

    def follow_changes(self, within_window: bool = False) -> Callable[[Shard], Shard] | None:
        """Parameters may have been frozen, unfrozen or added since the last update, or ``within_window``. What lays
        out anew what was taken before, if anything changed."""
        lay_out = self._shards.follow_changes(within_window)
        if lay_out is not None and self.v is not None:
            self._store(lay_out(self.v))
        return lay_out

    def to_json(self) -> dict[str, Any]:
        """Counters and measurements as JSON has them. Waits for the device."""
        values = {field.name: getattr(self.status, field.name) for field in fields(self.status)}
        return {name: {"float64": value.item()} if isinstance(value, Tensor) else value
                for name, value in values.items()}

    def restore(self, values: dict[str, Any], v: Shard | None) -> None:
        """Put back what :meth:`to_json` gave, and v. An empty ``values`` starts anew. k is the configuration's."""
        defaults = LookSAMStatus(k=self.status.k)
        for field in fields(self.status):
            value = values.get(field.name, getattr(defaults, field.name))
            if isinstance(value, dict):
                value = torch.tensor(value["float64"], dtype=torch.float64, device=self._shards.device)
            if field.name not in ("k", "first_sam_update", "ascent"):
                setattr(self.status, field.name, value)
        self.v = self.v_squared = None
        if v is not None:
            self._store(v)

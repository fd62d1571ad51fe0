"""The only place where tests look inside an engine."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor

from ds_looksam.shards import GradientShards

shards: Callable[[Any], GradientShards] = attrgetter("gradient_shards")
stored_v: Callable[[Any], list[Tensor] | None] = attrgetter("_state.v")
"""The stored g_v of this rank, as it is kept; None before the first SAM step."""
is_evaluating_again: Callable[[Any], bool] = attrgetter("_replay.is_evaluating")
ascent, replay, state = map(attrgetter, ("_update._ascent", "_replay", "_state"))

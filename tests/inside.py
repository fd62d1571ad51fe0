"""The only place where tests look inside an engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ds_looksam.shards import GradientShards


def shards(engine: Any) -> GradientShards:
    return engine.gradient_shards


def stored_v(engine: Any) -> list[Tensor] | None:
    """The stored g_v of this rank, as it is kept; None before the first SAM step."""
    return engine._state.v


def is_evaluating_again(engine: Any) -> bool:
    return engine._replay.is_evaluating


def update(engine: Any) -> Any:
    return engine._update


def ascent(engine: Any) -> Any:
    return engine._update._ascent


def replay(engine: Any) -> Any:
    return engine._replay


def state(engine: Any) -> Any:
    return engine._state


def checkpointer(engine: Any) -> Any:
    return engine._checkpointer

"""What the tests of checkpoints do on a rank: train a stretch of a case's updates, from a checkpoint or into one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.utils import logger
from torch import Tensor

from ds_looksam.checkpoint.reading import NamedLayout

from .inside import shards, stored_v
from .models import make_model
from .training import Case, Result, engine_for, master_weights, train_window, visible_weights


@dataclass(frozen=True)
class Stretch:
    """Updates ``start`` to ``stop`` of a case, between loads and a save.

    Attributes:
        refused: arguments of engine.load_checkpoint, one call after the other, each of which must raise.
        load: arguments of engine.load_checkpoint.
        weights: a file that the model begins with.
        save: arguments of engine.save_checkpoint before update ``save_at``; the model goes to ``model.bin``.
        tags: of checkpoints that are saved one after the other.
        in_engine: called with the engine before all else.
    """

    start: int = 0
    stop: int = 12
    refused: list[dict[str, Any]] = field(default_factory=list)
    load: dict[str, Any] | None = None
    weights: str | None = None
    save: dict[str, Any] | None = None
    tags: tuple[str | None, ...] = (None, )
    save_at: int = 7
    looksam: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    in_engine: Callable[[Any], None] | None = None


def run_stretch(case: Case, stretch: Stretch) -> Result:
    """Collective. The result's ``extra`` has ``log``, ``kinds`` of the steps, ``client_state``, ``refusals`` (what the
    loads raised that must), ``v`` (:func:`v_by_name` after the load, or when it saved), and, as they were at the end,
    ``status`` of LookSAM and the param ``groups``."""
    module, outcome = make_model(case.model, case.seed), SimpleNamespace(log=[], kinds=[], client_state=None, v={})
    if stretch.weights is not None:
        module.load_state_dict(torch.load(stretch.weights, weights_only=True))
    handler, level = logging.Handler(logging.INFO), logger.level
    handler.emit = lambda record: outcome.log.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with engine_for(replace(case, config={**case.config, **stretch.config}), stretch.looksam, module) as engine:
            return _run(case, stretch, engine, outcome)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _run(case: Case, stretch: Stretch, engine: Any, outcome: Any) -> Result:
    if stretch.in_engine is not None:
        stretch.in_engine(engine)
    outcome.refusals = [_refusal(engine, load) for load in stretch.refused]
    if stretch.load is not None:
        path, outcome.client_state = engine.load_checkpoint(**stretch.load)
        assert path is not None
        outcome.v = v_by_name(engine)
    for update in range(stretch.start, stretch.stop + 1):
        if update == stretch.save_at and stretch.save is not None:
            for tag in stretch.tags:
                engine.save_checkpoint(**{"tag": tag, **stretch.save})
            engine.save_16bit_model(stretch.save["save_dir"], "model.bin")
            outcome.v = v_by_name(engine)
        if update < stretch.stop:
            train_window(engine, case, update)
            outcome.kinds.append(engine.looksam.step_kind if stretch.looksam else "plain")
    outcome.groups = [{key: value for key, value in group.items() if key != "params"}
                      for group in engine.optimizer.param_groups]
    status = getattr(engine, "looksam", None)
    values = {f.name: getattr(status, f.name) for f in fields(status)} if status else {}
    outcome.status = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
    return Result(weights=master_weights(engine), model_weights=visible_weights(engine), history=[], forwards=0,
                  evaluations=status.evaluations if status else 0,
                  updates=status.updates if status else engine.global_steps, extra=outcome)


def _refusal(engine: Any, load: dict[str, Any]) -> str:
    """What a load raises. It must leave all as it was: weights, optimizer state, counters, LookSAM's own."""
    before = _everything(engine)
    try:
        engine.load_checkpoint(**load)
    except Exception as raised:
        same_bits(_everything(engine), before)
        return f"{type(raised).__name__}: {raised}"
    return "went through"


def _everything(engine: Any) -> dict[str, Tensor]:
    state = {f"weight {k}": v for k, v in master_weights(engine).items()}
    state |= {f"model {k}": v for k, v in visible_weights(engine).items()}
    for i, p in enumerate(p for group in engine.optimizer.param_groups for p in group["params"]):
        for key, value in engine.basic_optimizer.state.get(p, {}).items():
            state[f"optimizer {i} {key}"] = torch.as_tensor(value).clone()
    steps = [engine.global_steps, engine.skipped_steps, engine.looksam.updates, engine.looksam.evaluations]
    state |= {f"g_v {i}": v.clone() for i, v in enumerate(stored_v(engine) or [])}
    return state | {"steps": torch.tensor(steps)}


def v_by_name(engine: Any) -> dict[str, Tensor]:
    """This rank's elements of g_v, as they are in force, by parameter; NaN for those that lie on other ranks."""
    v = stored_v(engine) if hasattr(engine, "looksam") else None
    if v is None:
        return {}
    here = NamedLayout.of(engine.module, shards(engine))
    found = {name: torch.full((math.prod(shape), ), math.nan) for name, shape in here.shapes.items()}
    for flat, segments in zip(v, here.layout, strict=True):
        for start, part in segments:
            found[part.name][part.lo:part.hi] = flat[start:start + part.hi - part.lo]
    return found


def same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name

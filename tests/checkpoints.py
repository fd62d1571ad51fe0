"""What the tests of checkpoints do on a rank: train a stretch of a case's updates, from a checkpoint or into one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .inside import stored_v
from .training import Case, Result, engine_for, master_weights, train_window, visible_weights


@dataclass(frozen=True)
class Stretch:
    """Updates ``start`` to ``stop`` of a case, between a load and a save.

    Attributes:
        load: arguments of engine.load_checkpoint.
        save: arguments of engine.save_checkpoint after update number ``save_at``.
        in_engine: called with the engine before the load.
        expects_error: the load is meant to raise; the result's ``extra`` then holds the message, and whether the
            engine was left as it was.
    """

    start: int = 0
    stop: int = 12
    load: dict[str, Any] | None = None
    save: dict[str, Any] | None = None
    save_at: int = 7
    looksam: bool = True
    config: dict[str, Any] | None = None
    in_engine: Callable[[Any], None] | None = None
    expects_error: bool = False


@dataclass
class Outcome:
    client_state: Any
    status: dict[str, Any]
    groups: list[dict[str, Any]]
    kinds: list[str]
    log: list[str]
    error: str | None = None
    untouched: bool | None = None
    g_v: list[torch.Tensor] | None = None


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_stretch(case: Case, stretch: Stretch) -> Result:
    """Collective. The result's ``extra`` is an :class:`Outcome`."""
    from deepspeed.utils import logger

    log, level = _Log(), logger.level
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    try:
        return _run(case, stretch, log.lines)
    finally:
        logger.removeHandler(log)
        logger.setLevel(level)


def _run(case: Case, stretch: Stretch, log: list[str]) -> Result:
    case = replace(case, config={**case.config, **(stretch.config or {})})
    with engine_for(case, stretch.looksam) as engine:
        if stretch.in_engine is not None:
            stretch.in_engine(engine)
        client_state, error, untouched = None, None, None
        if stretch.load is not None:
            before = _everything(engine)
            try:
                path, client_state = engine.load_checkpoint(**stretch.load)
                assert path is not None
            except Exception as raised:
                if not stretch.expects_error:
                    raise
                error = f"{type(raised).__name__}: {raised}"
                after = _everything(engine)
                untouched = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
        calls: list[None] = []
        engine.module.register_forward_hook(lambda *_: calls.append(None))
        kinds = []
        for update in range(stretch.start, stretch.stop):
            if stretch.save is not None and update == stretch.save_at:
                engine.save_checkpoint(**stretch.save)
            train_window(engine, case, update)
            kinds.append(engine.looksam.step_kind if stretch.looksam else "plain")
        if stretch.save is not None and stretch.save_at >= stretch.stop:
            engine.save_checkpoint(**stretch.save)
        status = getattr(engine, "looksam", None)
        groups = [{key: value for key, value in group.items() if key != "params"}
                  for group in engine.optimizer.param_groups]
        values = {f.name: getattr(status, f.name) for f in fields(status)} if status else {}
        values = {name: v.item() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
        g_v = stored_v(engine) if stretch.looksam else None
        return Result(weights=master_weights(engine), model_weights=visible_weights(engine), history=[],
                      forwards=len(calls), evaluations=status.evaluations if status else 0,
                      updates=status.updates if status else engine.global_steps,
                      extra=Outcome(client_state, values, groups, kinds, log, error, untouched,
                                    [v.clone() for v in g_v] if g_v else None))


def _everything(engine: Any) -> dict[str, torch.Tensor]:
    """All that a failed load must leave alone: weights, optimizer state, counters, LookSAM's own."""
    state = {f"weight {k}": v for k, v in master_weights(engine).items()}
    state |= {f"model {k}": v for k, v in visible_weights(engine).items()}
    for i, p in enumerate(p for group in engine.optimizer.param_groups for p in group["params"]):
        for key, value in engine.basic_optimizer.state.get(p, {}).items():
            state[f"optimizer {i} {key}"] = torch.as_tensor(value).clone()
    state["steps"] = torch.tensor([engine.global_steps, engine.skipped_steps])
    if hasattr(engine, "looksam"):
        state["updates"] = torch.tensor([engine.looksam.updates, engine.looksam.evaluations])
        state |= {f"g_v {i}": v.clone() for i, v in enumerate(stored_v(engine) or [])}
    return state

"""Saving and resuming. DeepSpeed's checkpoint holds weights, optimizer, LR schedule and the update count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "checkpoints"


def path(run_dir: Path, update: int) -> Path:
    return run_dir / FOLDER / f"update-{update:07d}"


def save(engine: Any, run_dir: Path, facts: dict[str, Any]) -> None:
    """Write a checkpoint of this update, with ``facts`` about the run beside it. Collective."""
    folder = path(run_dir, engine.global_steps)
    engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=facts)


def resume(engine: Any, run_dir: Path, must_agree: dict[str, Any]) -> dict[str, Any]:
    """Load the newest checkpoint of a run; the position of the run is then ``engine.global_steps``. Collective.

    Args:
        must_agree: facts without which the rest of the run would not be the rest of that run.

    Returns:
        The facts that were saved with it; empty if there is no checkpoint yet.

    Raises:
        ValueError: a fact in ``must_agree`` was another one when the checkpoint was written.
    """
    loaded, facts = engine.load_checkpoint(str(run_dir / FOLDER))
    if loaded is None:
        return {}
    for name, value in must_agree.items():
        if facts.get(name) != value:
            raise ValueError(f"--resume: {name} is {value!r}, but {loaded} was written with {facts.get(name)!r}")
    return facts

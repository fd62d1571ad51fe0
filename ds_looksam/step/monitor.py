"""What DeepSpeed's monitors (tensorboard, csv, wandb, comet) are told: ``Train/Samples/looksam_*``, on rank 0.

Counters and settings are written at every update; they are host values. What was measured on the device is written at
SAM steps only, in one transfer, when the host has just waited for the device anyway: reuse steps stay free of it.
"""

from __future__ import annotations

from ..config.params import ASCENTS
from .status import LookSAMStatus, StepKind

Event = tuple[str, float, int]
"""(name, value, number of samples seen): what DeepSpeed's ``monitor.write_events`` takes."""

PREFIX = "Train/Samples/looksam_"

STEP_KINDS: dict[StepKind, int] = {"skipped": -1, "base": 0, "reuse": 1, "sam": 2}
"""The numbers that stand for step kinds in a monitor, which takes nothing else."""

ASCENT_NUMBERS: dict[str, int] = {name: number for number, name in enumerate(ASCENTS)}
"""The numbers that stand for who shares one perturbation."""


def events(status: LookSAMStatus, samples: int, measured: bool) -> list[Event]:
    """What to write after an update. ``samples``: the x axis, DeepSpeed's ``engine.global_samples``. ``measured``: it
    was a SAM step, so there are fresh measurements; reading them waits for the device."""
    values: dict[str, float] = {"updates": status.updates, "evaluations": status.evaluations,
                                "step_kind": STEP_KINDS[status.step_kind], "ascent": ASCENT_NUMBERS[status.ascent]}
    # One number if the param groups agree, otherwise one per group. Alpha "auto" (None) has none: see beta.
    for name, of_groups in (("rho", status.rho), ("alpha", status.alpha)):
        agree = len(set(of_groups)) == 1
        values |= {name if agree else f"{name}_group{i}": value for i, value in enumerate(of_groups)
                   if value is not None}
    if measured:
        values |= status.measurements()
    return [(PREFIX + name, value, samples) for name, value in values.items()]

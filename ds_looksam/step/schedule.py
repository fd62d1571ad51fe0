"""rho over the course of a run: the JSON key ``rho_schedule``.

A schedule is a factor. The radius in force is ``rho`` of the param group, as it stands there, times the factor of this
update; so groups keep their ratios, and rho can still be changed by hand at any time. A factor is a function of the
configuration, of the number of updates applied so far, which is in every checkpoint, and of the group's learning rate:
a resumed run goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config.params import RhoSchedule
from ..errors import LookSAMConfigError


class RhoFactors:
    """The factors of a run's param groups.

    Args:
        lrs: each group's learning rate as configured, before any LR scheduler has touched it.

    Raises:
        LookSAMConfigError: ``"type": "lr"`` has nothing to measure learning rates by.
    """

    def __init__(self, schedule: RhoSchedule, lrs: Sequence[float]) -> None:
        self.schedule = schedule
        self.reference_lrs = [float(lr) if schedule.lr is None else schedule.lr for lr in lrs]
        if schedule.type == "lr" and not all(lr > 0 for lr in self.reference_lrs):
            raise LookSAMConfigError('optimizer.params.rho_schedule.lr: with "type": "lr" the learning rate at which '
                                     "the factor is 1 must be given where optimizer.params.lr is 0")

    def of(self, group: int, updates: int, lr: float) -> float:
        """The factor for one group, after ``updates`` applied ones, at the group's learning rate."""
        schedule = self.schedule
        if updates < schedule.off_updates:
            return 0.0
        if schedule.type == "constant":
            return 1.0
        if schedule.type == "lr":
            while group >= len(self.reference_lrs):  # a group that was added: its learning rate when it was first seen
                self.reference_lrs.append(float(lr) if schedule.lr is None else schedule.lr)
            return float(lr) / self.reference_lrs[group]
        assert schedule.updates is not None
        progress = min((updates - schedule.off_updates) / schedule.updates, 1.0)
        if schedule.type == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return schedule.start + (schedule.end - schedule.start) * progress

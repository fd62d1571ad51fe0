"""SIGTERM and SIGUSR1 (a scheduler that pre-empts): all ranks stop after the same update, and save."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout

SAVED_TO_GO_ON = 75
"""Exit code of a run that was told to stop and has saved a checkpoint (EX_TEMPFAIL)."""


class Stopped(Exception):
    """The run was told to stop, and its checkpoint is written."""


class StopSignals:
    """Tells whether a signal has reached any rank. Made on every rank; collective.

    Each update asks about the one before, on the CPU and without waiting for the answer, so that asking costs neither a
    device synchronisation nor the time of a message.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self.stopping = False
        group = dist.new_group(backend="gloo", timeout=default_pg_timeout)
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        self._group = group
        self._answer: tuple[Any, torch.Tensor] | None = None
        for number in signal.SIGTERM, signal.SIGUSR1:
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame: Any) -> None:
        self.caught = signal.Signals(number).name

    def ask(self) -> bool:
        """Whether to stop after this update: the same on all ranks. Once per update. Collective."""
        if self._answer is not None:
            work, flag = self._answer
            work.wait()
            self.stopping = self.stopping or bool(flag.item())
        flag = torch.tensor([int(self.caught is not None)])
        self._answer = dist.all_reduce(flag, group=self._group, async_op=True), flag
        return self.stopping

    def close(self) -> None:
        """Take the last answer. Collective."""
        if self._answer is not None:
            self._answer[0].wait()
            self._answer = None

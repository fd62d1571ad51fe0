"""Jobs of processes that end by themselves, are killed or are told to stop. They are forked from the server of
``ranks.py``, which has imported what takes seconds, and are otherwise what a launcher starts."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .ranks import PRELOADED

START = 240.0
"""Seconds for a job to start on a busy machine, and to do its few updates."""


class Job:
    """``function(*args)`` in ``world`` processes with a launcher's variables; one alone is not told that it is a rank.
    ``folder``: for what they print."""

    def __init__(self, folder: Path, world: int, function: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._logs = [folder / f"{time.monotonic_ns()}-{rank}.log" for rank in range(world)]
        self.processes = [context.Process(target=_run, args=(log, rank, world, port, function, args))
                          for rank, log in enumerate(self._logs)]
        for process in self.processes:
            process.start()
        atexit.register(lambda: None in self.codes and self._kill())  # of a test that failed

    @property
    def codes(self) -> list[int | None]:
        """Exit codes: None of a process that runs, -N of one that signal N has ended."""
        return [process.exitcode for process in self.processes]

    @property
    def outputs(self) -> list[str]:
        return [log.read_text(errors="replace") if log.exists() else "" for log in self._logs]

    def finish(self, after_the_first: float = START) -> None:
        """Wait for all, the others for no more than ``after_the_first`` seconds longer than the first. They are gone
        then, and whatever they have started."""
        deadline, all_run = time.monotonic() + START, True
        try:
            while None in self.codes:
                if all_run and self.codes != [None] * len(self.processes):
                    deadline, all_run = time.monotonic() + after_the_first, False
                assert time.monotonic() < deadline, f"hangs: {self.codes}\n" + "\n".join(self.outputs)[-9000:]
                time.sleep(0.02)
        finally:
            self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _run(log: Path, rank: int, world: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    gc.freeze()  # as in ranks.py
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # what is killed must have told
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      CROSS_RANK="0", CROSS_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world == 1:
        del os.environ["RANK"]
    function(*args)

"""Runs side by side: on one GPU (or CPU) a process for each, all fed from one board; or one after the other."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence_plan import Board
from benchmarks.evidence_run import Job, train

GRACE = 10.0
"""Seconds after the deadline in which a process may still hand over what it has; then it is ended."""


def run_in_turn(board: Board | None, folder: Path, deadline: float) -> int:
    """In this process, or in these: every rank calls it, rank 0 with the board. The number of runs made."""
    import torch.distributed as dist

    made = 0
    while True:
        due: list[Any] = [board.next() if board is not None and time.time() < deadline else None]
        dist.broadcast_object_list(due, 0)
        if due[0] is None:
            return made
        record = train(due[0], folder, deadline)
        if record is None:
            return made
        made += 1
        if board is not None:
            board.finish(record | {"side_by_side": 1})
            print(describe(record), flush=True)


Serve = Callable[[Connection, Path, str], None]


class _Worker:
    """A process with a group of one rank, and what it was sent."""

    def __init__(self, serve: Serve, folder: Path, rendezvous: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, folder, rendezvous), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.idle = False

    def receive(self) -> tuple[str, Any]:
        """What it says: "ready", "done" with a record or None, or "error", after which it is gone."""
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            self.process.join()
            kind, value = "error", f"its process ended with exit code {self.process.exitcode}"
        self.idle = kind != "error"
        return kind, value

    def give(self, job: Job, deadline: float) -> None:
        self.pipe.send((job, deadline))
        self.job, self.idle = job, False

    def end(self, patience: float) -> None:
        """It ends by itself when its pipe is closed, unless it is still training."""
        self.pipe.close()
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def run_side_by_side(board: Board, folder: Path, deadline: float, processes: int, serve: Serve) -> int:
    """With so many processes. The number of runs that failed: each is told, and its process replaced."""
    failed = made = 0
    with tempfile.TemporaryDirectory(prefix="evidence-") as rendezvous:
        workers = {}
        started = -1
        for started in range(min(processes, len(board.waiting))):
            worker = _Worker(serve, folder, f"{rendezvous}/{started}")
            workers[worker.pipe] = worker
        # All are idle when all is done, or when what is left waits for a tuning run that has failed.
        while not all(worker.idle for worker in workers.values()):
            busy = [pipe for pipe, worker in workers.items() if not worker.idle]
            left = max(0.0, deadline + GRACE - time.time())
            ready = wait(busy, timeout=left if math.isfinite(left) else None)
            if not ready:
                break
            for pipe in ready:
                worker = workers[pipe]  # type: ignore[index]
                kind, value = worker.receive()
                if kind == "error":
                    failed += 1
                    print(f"FAILED {worker.job}: {value}", flush=True)
                    worker.end(GRACE)
                    del workers[worker.pipe]
                    if time.time() < deadline and failed <= processes:
                        started += 1
                        worker = _Worker(serve, folder, f"{rendezvous}/{started}")
                        workers[worker.pipe] = worker
                elif value is not None:
                    made += 1
                    board.finish(value | {"side_by_side": processes})
                    print(f"{made:4d} {describe(value)}", flush=True)
            for worker in workers.values():
                job = board.next() if worker.idle and time.time() < deadline else None
                if job is not None:
                    worker.give(job, deadline)
        for worker in workers.values():
            worker.pipe.close()
        patience = time.time() + GRACE
        for worker in workers.values():
            worker.end(max(0.0, patience - time.time()) if worker.idle else 0.0)
    return failed


def serve(pipe: Connection, folder: Path, rendezvous: str) -> None:
    """A process of :func:`run_side_by_side`: a group of one rank, that trains what it is sent."""
    join_alone(rendezvous)
    pipe.send(("ready", None))
    while True:
        try:
            job, deadline = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(("done", train(job, folder, deadline)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))
            break
    from distributed import leave

    leave()


def join_alone(rendezvous: str) -> None:
    """A group of one, over a file: no port that two processes might find free at once."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    import ds_looksam  # noqa: F401 - registers LookSAM

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", init_method=f"file://{rendezvous}",
                               rank=0, world_size=1, auto_mpi_discovery=False, verbose=False)
    get_accelerator().set_device(0)


def describe(record: dict[str, Any]) -> str:
    tuning = " (tuning)" if record["tuning"] else ""
    return (f"{record['task']} {record['method']} seed {record['seed']} lr {record['lr']} rho {record['rho']}{tuning}: "
            f"{record['score']:.3f} after {record['evaluations']} evaluations in {record['seconds']:.1f} s")

"""Persistent rank processes: real processes, a real gloo group, started once per world size and used by many tests.
(With ``DS_ACCELERATOR=cuda`` an NCCL group, a GPU for each rank.)

``run_on_ranks(world_size, function, *args, **kwargs)`` calls a module-level function on every rank and returns the list
of their results. A rank that raises fails the call with that rank's traceback; a rank that hangs is shown where it
hangs. Either way the processes are replaced before the next test. What ranks print is kept in a file, and shown of
those that died.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

MAX_POOLS = 4
"""World sizes kept alive at once: a rank process costs about 100 MB beside what it shares with the fork server."""
PRELOADED = ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage3", "ds_looksam",
             "torch._dynamo", "tests.ranks", "tests.training", "transformers.models.vit.modeling_vit"]
"""What the fork server imports once, so that not every rank and job (``jobs.py``) does: 6 seconds each."""
GRACE_AFTER_ERROR = 10.0
"""Seconds that ranks have to end after one of them raised: the others may be waiting for it in a collective."""


class RankError(AssertionError):
    """What went wrong on the ranks, with their tracebacks."""


class RankPool:
    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver" if os.environ["DS_ACCELERATOR"] == "cpu" else "spawn")
        context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self.folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, call: Callable[[], Any], timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps(call))
        replies: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(replies) < len(self.pipes) and time.monotonic() < deadline:
            for rank, pipe in enumerate(self.pipes):
                if rank not in replies and pipe.poll(0.002):
                    try:
                        replies[rank] = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        self.processes[rank].join(GRACE_AFTER_ERROR)
                        replies[rank] = ("error", f"the process died, exit code {self.processes[rank].exitcode}; "
                                                  f"the end of its output:\n{self._output(rank)}")
                    if replies[rank][0] == "error":
                        deadline = min(deadline, time.monotonic() + GRACE_AFTER_ERROR)
        problems = [f"--- rank {rank}:\n{value}" for rank, (kind, value) in sorted(replies.items()) if kind == "error"]
        problems += [f"--- rank {rank} hangs:\n{self._where(rank)}" for rank in range(len(self.pipes))
                     if rank not in replies]
        if problems:
            self.close()
            raise RankError("\n".join(problems))
        return [replies[rank][1] for rank in range(len(self.pipes))]

    def _where(self, rank: int) -> str:
        """The output of a rank that does not answer, with its Python stacks."""
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self._output(rank)

    def _output(self, rank: int) -> str:
        with open(_output_file(self.folder.name, rank), errors="replace") as file:
            return file.read()[-5000:]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


_pools: OrderedDict[int, RankPool] = OrderedDict()


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0, **kwargs: Any
                 ) -> list[Any]:
    """``function(*args, **kwargs)`` of every rank of a process group of ``world_size``; the results, by rank.

    ``function`` must be importable, and must leave no engine behind: ``engine.destroy()``.
    The timeout covers the first use of DeepSpeed's compiled ops too, about a minute.
    """
    if world_size not in _pools:
        while len(_pools) >= MAX_POOLS:
            _pools.popitem(last=False)[1].close()
        _pools[world_size] = RankPool(world_size)
    _pools.move_to_end(world_size)
    try:
        return _pools[world_size].run(functools.partial(function, *args, **kwargs), timeout)
    except BaseException:
        _pools.pop(world_size).close()
        raise


@atexit.register
def close_pools() -> None:
    while _pools:
        _pools.popitem()[1].close()


def _output_file(folder: str, rank: int) -> str:
    return os.path.join(folder, f"output-{rank}")


def _serve(rank: int, world_size: int, folder: str, pipe: Any) -> None:
    import cpuinfo
    import deepspeed
    import torch

    # DeepSpeed's CPU optimizers ask at each construction what CPU this is, which takes seconds on a busy machine.
    cpuinfo.get_cpu_info = functools.lru_cache(cpuinfo.get_cpu_info)
    output = os.open(_output_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR1, file=2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), world_size)
    accelerator = deepspeed.get_accelerator()
    accelerator.set_device(rank)
    backend = "gloo" if accelerator.device_name() == "cpu" else accelerator.communication_backend_name()
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    deepspeed.init_distributed(backend, verbose=False)
    imported = 0
    while True:
        try:
            call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if len(sys.modules) != imported:
            # What was imported is left out of collections, which then take 5 ms instead of 200, four fifths of what an
            # engine's whole life costs here. ZeRO-3 collects in its constructor, too.
            imported = len(sys.modules)
            gc.collect()
            gc.freeze()
        try:
            reply = ("result", call())
        except BaseException:
            reply = ("error", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))
        del reply
        gc.collect()

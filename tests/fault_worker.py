"""One rank of a job that trains, saves every two updates and goes on from the newest checkpoint; and what befalls it.

    python -m tests.fault_worker RANK WORLD FOLDER STAGE [FAULT FAULT_RANK]

Faults strike at update 4, a SAM step, two updates of which are saved; FAULT_RANK -1 stands for every rank.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import ds_looksam.checkpoint.files as files
from launch import distributed

from .inside import is_evaluating_again
from .training import Case, engine_for, master_weights, train_window

UPDATES, SAVE_EVERY, STRIKE = 8, 2, 4
TIMEOUT = 45.0
"""Seconds, of the process group. Generous: the machine that runs the tests may be busy."""


def case_for(world: int, stage: int) -> Case:
    return Case(model="straddling", world=world, stage=stage, k=2, updates=UPDATES, accumulation=2, two_groups=True,
                ascent=os.environ.get("ASCENT", "global"), params={"torch_adam": True},
                config=json.loads(os.environ.get("CONFIG", "{}")))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class ModelBroke(Exception):
    pass


class Fault:
    def __init__(self, kind: str, engine: Any, folder: Path) -> None:
        self.kind, self.engine, self.folder = kind, engine, folder
        self.raised_at: float | None = None
        engine.module.register_forward_hook(self.in_forward)
        if kind == "kill-update":
            self._before(engine.basic_optimizer, "step", die)
        elif kind == "kill-save-deepspeed":
            self._after(torch, "save", die)
        elif kind == "kill-save-looksam":
            self._after(files, "save_file", die)  # written, not yet renamed
        elif kind.startswith("save-on-term"):
            signal.signal(signal.SIGTERM, self.save_and_exit)

    @property
    def strikes(self) -> bool:
        return self.engine.global_steps == STRIKE

    def in_forward(self, module: Any, args: Any, output: Any) -> Any:
        if not self.strikes:
            return None
        in_replay = is_evaluating_again(self.engine)
        if self.kind == ("kill-replay" if in_replay else "kill-first"):
            die()
        if self.kind == "kill-writer" and not in_replay:
            os.kill(self.engine.checkpoint_engine.ckpt_process.pid, signal.SIGKILL)
            self.engine.checkpoint_engine.ckpt_process.join()
            self.kind = "none"
        if in_replay and self.kind in ("term-replay", "save-on-term-replay"):
            os.kill(os.getpid(), signal.SIGTERM)
        if in_replay and self.kind == "raise-replay":
            self.raised_at = time.monotonic()
            raise ModelBroke("the model broke in the replay")
        if self.kind == ("inf-replay" if in_replay else "inf-first"):
            return output * float("inf")
        return None

    def save_and_exit(self, *_: Any) -> None:
        """What many training scripts do on SIGTERM."""
        self.engine.save_checkpoint(str(self.folder), tag="emergency")
        sys.exit(0)

    def save_and_raise(self, error: Exception) -> None:
        """What other training scripts do on an exception."""
        if self.raised_at is not None:
            print(f"told after {time.monotonic() - self.raised_at:.1f} s", flush=True)
        for what, save in (("checkpoint", lambda: self.engine.save_checkpoint(str(self.folder), tag="emergency",
                                                                             save_latest=False)),
                           ("state", lambda: torch.save(self.engine.module.state_dict(),
                                                        self.folder / "emergency.pt"))):
            try:
                save()
            except Exception as refused:
                print(f"emergency {what}: {type(refused).__name__}: {refused}", flush=True)
        raise error

    def before_save(self) -> None:
        if self.strikes and self.kind == "full-disk":
            with open(self.folder / "filler", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    def after_step(self) -> None:
        if self.kind.startswith("inf") and self.engine.global_steps == STRIKE + 1:
            finite = all(w.isfinite().all() for w in master_weights(self.engine).values())
            print(f"decided {self.engine.looksam.step_kind} {self.engine.skipped_steps} {finite}", flush=True)
            sys.exit(3)

    def _before(self, owner: Any, name: str, strike: Any) -> None:
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            if self.strikes:
                strike()
            return original(*args, **kwargs)

        setattr(owner, name, replacement)

    def _after(self, owner: Any, name: str, strike: Any) -> None:
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.strikes:
                strike()
            return result

        setattr(owner, name, replacement)


def open_store(rank: int, world: int) -> torch.distributed.Store:
    """As launchers have it: on a port, kept by rank 0 and gone with it. The file only tells the port."""
    told = torch.distributed.FileStore(os.environ["STORE"], world)
    store = torch.distributed.TCPStore("127.0.0.1", int(told.get("port")) if rank else 0, world, rank == 0,
                                       wait_for_workers=False)
    if rank == 0:
        told.set("port", str(store.port))
    return store


def main() -> None:
    rank, world, folder, stage = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    kind, fault_rank = (sys.argv[5], int(sys.argv[6])) if len(sys.argv) > 5 else ("none", -1)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      CROSS_RANK="0", CROSS_SIZE="1")  # the last two for checkpoint.writer
    store = open_store(rank, world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world,
                                         timeout=datetime.timedelta(seconds=TIMEOUT))
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False, timeout=datetime.timedelta(seconds=TIMEOUT))
    case = case_for(world, stage)
    with engine_for(case) as engine:
        fault = Fault(kind if fault_rank in (-1, rank) else "none", engine, folder)
        if (folder / "latest").exists():
            engine.load_checkpoint(str(folder))
            print(f"resumed at {engine.global_steps}", flush=True)
        while engine.global_steps < UPDATES:
            if engine.global_steps % SAVE_EVERY == 0:
                fault.before_save()
                engine.save_checkpoint(str(folder))
            try:
                train_window(engine, case, engine.global_steps)
            except Exception as error:
                if "replay" in kind:  # elsewhere the collectives of a save would meet those of the other ranks
                    fault.save_and_raise(error)
                raise
            if kind.startswith("inf"):
                Fault.after_step(Fault(kind, engine, folder))
        torch.save(master_weights(engine), folder / f"weights-{rank}.pt")
    distributed.leave()


if __name__ == "__main__":
    main()

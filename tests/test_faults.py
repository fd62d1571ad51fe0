"""What befalls a job: it ends in time, and started again from its newest checkpoint it ends where it would have ended.

CI runs two of them, ``pytest -m faults`` the others.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ds_looksam.checkpoint import files
from ds_looksam.ranks.agree import GRACE
from launch import distributed

from .checkpoints import same_bits
from .inside import is_evaluating_again
from .jobs import Job
from .training import Case, engine_for, master_weights, train_window

pytestmark = pytest.mark.timeout(600)
UPDATES, SAVE_EVERY, STRIKE = 8, 2, 4
"""It strikes at update 4, a SAM step, when updates 2 and 4 are saved."""
TIMEOUT = 45.0
"""Seconds, of the process group. Generous: the machine that runs the tests may be busy."""


class ModelBroke(Exception):
    def __init__(self) -> None:
        super().__init__("the model broke")
        self.at = time.monotonic()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def let_happen(kind: str, engine: Any, folder: Path) -> None:
    def dying(save: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> None:
            save(*args, **kwargs)
            if engine.global_steps == STRIKE:
                die()

        return replacement

    def in_forward(*_: Any) -> None:
        now = kind if engine.global_steps == STRIKE else None
        again = is_evaluating_again(engine)
        if now == ("kill-replay" if again else "kill-first"):
            die()
        if now == "kill-writer" and not again and engine.checkpoint_engine.ckpt_process.is_alive():
            engine.checkpoint_engine.ckpt_process.kill()
            engine.checkpoint_engine.ckpt_process.join()
        if now == "raise-replay" and again:
            raise ModelBroke

    def in_update(*_: Any) -> None:
        if engine.global_steps == STRIKE:
            raise ModelBroke

    engine.module.register_forward_hook(in_forward)
    if kind == "kill-save-deepspeed":
        torch.save = dying(torch.save)
    if kind == "kill-save-looksam":
        files.save_file = dying(files.save_file)  # written, not yet renamed
    if kind == "raise-update":
        engine.basic_optimizer.register_step_pre_hook(in_update)


def work(folder: Path, stage: int, ascent: str, config: dict[str, Any], kind: str, struck: int) -> None:
    """A rank of a job that trains, saves every two updates and goes on from the newest checkpoint."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed("gloo", verbose=False, timeout=datetime.timedelta(seconds=TIMEOUT),
                               distributed_port=int(os.environ["MASTER_PORT"]))
    rank = torch.distributed.get_rank()
    case = Case(model="straddling", stage=stage, k=2, updates=UPDATES, accumulation=2, two_groups=True, ascent=ascent,
                params={"torch_adam": True}, config=config)
    with engine_for(case) as engine:
        let_happen(kind if struck in (-1, rank) else "none", engine, folder)
        if (folder / "latest").exists():
            engine.load_checkpoint(str(folder))
            print(f"resumed at {engine.global_steps}")
        while engine.global_steps < UPDATES:
            if engine.global_steps % SAVE_EVERY == 0:
                engine.save_checkpoint(str(folder))
            try:
                train_window(engine, case, engine.global_steps)
            except Exception as error:
                if "replay" in kind or "update" in kind:  # else a save's collectives would meet those of the others
                    save_what_can_be_saved(engine, folder, error)
                raise
        torch.save(master_weights(engine), folder / f"weights-{rank}.pt")
    distributed.leave()


def save_what_can_be_saved(engine: Any, folder: Path, error: Exception) -> None:
    """What some training scripts do on an exception."""
    if isinstance(error, ModelBroke):
        print(f"told after {time.monotonic() - error.at:.1f} s")
    for what, save in {
        "checkpoint": lambda: engine.save_checkpoint(str(folder), tag="emergency", save_latest=False),
        "state": lambda: torch.save(engine.module.state_dict(), folder / "emergency.pt"),
    }.items():
        try:
            save()
        except Exception as refused:
            print(f"emergency {what}: {type(refused).__name__}: {refused}")


def start(folder: Path, stage: int, ascent: str, config: dict[str, Any], kind: str = "none", rank: int = -1) -> Job:
    """Run the job to its end. Fails if a rank goes on for longer than the process group's timeout allows."""
    folder.mkdir(exist_ok=True)
    job = Job(folder.parent, 2, work, folder, stage, ascent, config, kind, rank)
    # The timeout runs per collective; the slack is for a busy machine. An exception is told far sooner.
    job.finish(TIMEOUT if kind == "raise-replay" else TIMEOUT + 30)
    assert all(code != 0 for code in job.codes) if kind != "none" else job.codes == [0, 0], (job.codes, job.outputs)
    return job


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], dict[str, Tensor]]:
    """The weights with which a job of a stage and an ascent ends."""

    @cache
    def run(stage: int, ascent: str) -> dict[str, Tensor]:
        folder = tmp_path_factory.mktemp("undisturbed") / "checkpoints"
        start(folder, stage, ascent, {})
        return torch.load(folder / "weights-0.pt")

    return run


def _check_exceptions(job: Job, rank: int) -> None:
    """Nothing has been saved. A rank that raised gets its own exception; one that did not gets to know of it."""
    for r, output in enumerate(job.outputs):
        last = output[output.rindex("Traceback"):]
        if rank in (-1, r):
            assert "ModelBroke: the model broke" in last and "LookSAMReplayError" not in last, output
            waited = float(re.search(r"told after ([\d.]+) s", output)[1])
            assert waited < GRACE + 15, output  # 15 for a busy machine
        else:
            assert "LookSAMReplayError: In the second evaluation" in last, output
            # The store goes with rank 0, and then nobody is left to tell which rank it was.
            assert f"rank {rank} raised ModelBroke" in last or (rank == 0 and "other ranks were lost" in last), last
        if rank != -1:  # where all raised together, all is as before the step, and may be saved
            for what in "checkpoint", "state":
                assert f"emergency {what}: LookSAMReplayError" in output, output


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All that is in DeepSpeed's files: weights and optimizer state."""
    return {f"{path.name} {i}": leaf for path in folder.glob("*.pt")
            for i, leaf in enumerate(tree_leaves(torch.load(path, weights_only=False))) if isinstance(leaf, Tensor)}


def _disturb(kind: str, rank: int, stage: int, ascent: str, folder: Path, expected: dict[str, Tensor],
             config: dict[str, Any] | None = None) -> None:
    config = config or {}
    job = start(folder, stage, ascent, config, kind, rank)
    if kind == "raise-replay":
        _check_exceptions(job, rank)
    elif kind == "kill-writer":
        assert "checkpoint process is not running" in job.outputs[rank]
    elif kind == "raise-update":
        told = job.outputs if stage else [job.outputs[rank]]  # on stage 0 the others have their update
        for output in told:
            assert "In the update of a SAM step rank 1 raised ModelBroke" in output, output
            assert "emergency checkpoint: LookSAMReplayError" in output, output
    else:
        assert job.codes[rank] == -signal.SIGKILL
    if rank == -1:  # all raised together
        assert _tensors(folder / "emergency")
        same_bits(_tensors(folder / "emergency"), _tensors(folder / f"global_step{STRIKE}"))
    else:
        assert not (folder / "emergency").exists()
        assert kind == "raise-update" or not (folder / "emergency.pt").exists()
    # What strikes while update 4 is being saved leaves the checkpoint of update 2 as the newest.
    # So does what strikes while a decoupled writer is still writing it: until the first evaluation has ended.
    being_written = config and kind in ("kill-first", "kill-writer")
    saved = STRIKE - 2 if kind.startswith("kill-save") or being_written else STRIKE
    assert (folder / "latest").read_text() == f"global_step{saved}"
    again = start(folder, stage, ascent, config)
    assert all(f"resumed at {saved}" in output for output in again.outputs)
    for r in range(2):
        same_bits(torch.load(folder / f"weights-{r}.pt"), expected)


IN_CI = [("kill-replay", 1, 2, "global"), ("raise-replay", 1, 2, "global")]
# What happens, to which rank (-1: to each), at which stages
FAULTS: list[tuple[str, int, tuple[int, ...]]] = [
    ("kill-first", 1, (0, 1, 3)),
    ("kill-replay", 0, (0, 3)),
    ("kill-replay", 1, (2, )),
    ("kill-save-deepspeed", 0, (0, 2)),
    ("kill-save-deepspeed", 1, (2, 3)),
    ("kill-save-looksam", 0, (0, 2)),
    ("kill-save-looksam", 1, (3, )),
    ("raise-replay", -1, (0, 2, 3)),
    ("raise-replay", 1, (0, 1, 2, 3)),
    ("raise-replay", 0, (2, 3)),
    ("raise-update", 1, (0, 2, 3)),
]
OF_ASCENTS = [("kill-first", 1), ("kill-replay", 1), ("raise-replay", 1), ("raise-replay", -1)]
ASCENTS = [(0, "rank"), (2, "rank"), (1, "micro_batch"), (3, "global_micro_batch")]
EACH = [(kind, rank, stage, "global") for kind, rank, stages in FAULTS for stage in stages]
EACH += [(kind, rank, stage, ascent) for kind, rank in OF_ASCENTS for stage, ascent in ASCENTS]


@pytest.mark.parametrize(("kind", "rank", "stage", "ascent"), [
    pytest.param(*fault, marks=[] if fault in IN_CI else pytest.mark.faults) for fault in EACH])
def test_a_job_started_again_ends_as_if_nothing_had_happened(kind: str, rank: int, stage: int, ascent: str,
                                                             tmp_path: Path, undisturbed: Any) -> None:
    _disturb(kind, rank, stage, ascent, tmp_path / "checkpoints", undisturbed(stage, ascent))


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "decoupled"), [("kill-first", True), ("kill-replay", True), ("kill-writer", True),
                                                 ("kill-replay", False)])
def test_deepspeeds_own_writers(kind: str, decoupled: bool, tmp_path: Path, undisturbed: Any) -> None:
    """Resumed with the same JSON, and to the bit the run without ``checkpoint.writer``."""
    config = {"checkpoint": {"writer": {"type": "python", "decoupled": decoupled}}}
    _disturb(kind, 1, 3, "global", tmp_path / "checkpoints", undisturbed(3, "global"), config)

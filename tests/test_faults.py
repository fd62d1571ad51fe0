"""What befalls a job: it ends in time, and started again from its newest checkpoint it ends where it would have ended.

CI runs three of them, ``pytest -m faults`` the others.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ds_looksam.ranks.agree import GRACE

from .fault_worker import STRIKE, TIMEOUT

WORLD = 2
START = 240.0
"""Seconds for a job to start on a busy machine, and to do its few updates."""


@dataclass
class Job:
    codes: list[int]
    outputs: list[str]
    seconds_after_first_end: float


def run_job(folder: Path, stage: int, fault: str = "none", fault_rank: int = -1,
            config: dict[str, Any] | None = None, ascent: str = "global") -> Job:
    """Run the ranks to their ends. Fails if a rank goes on for longer than the process group's timeout allows."""
    folder.mkdir(exist_ok=True)
    name = f"{fault}-{time.monotonic_ns()}"
    logs = [folder.parent / f"{name}-{rank}.log" for rank in range(WORLD)]
    environment = os.environ | {"STORE": str(folder.parent / f"{name}.store"), "PYTHONUNBUFFERED": "1",
                                "CONFIG": json.dumps(config or {}), "ASCENT": ascent,
                                "PYTHONPATH": str(Path(__file__).parent.parent)}
    processes = [subprocess.Popen(
        [sys.executable, "-m", "tests.fault_worker", str(rank), str(WORLD), str(folder), str(stage), fault,
         str(fault_rank)], env=environment, stdout=logs[rank].open("w"), stderr=subprocess.STDOUT,
        start_new_session=True)
        for rank in range(WORLD)]
    deadline, first_end = time.monotonic() + START, None
    try:
        while any(p.poll() is None for p in processes):
            if first_end is None and any(p.poll() is not None for p in processes):
                first_end = time.monotonic()
                # The timeout runs per collective; the slack is for a busy machine.
                deadline = first_end + TIMEOUT + 30
            assert time.monotonic() < deadline, "a rank hangs:\n" + "\n".join(log.read_text()[-3000:] for log in logs)
            time.sleep(0.05)
    finally:
        for p in processes:
            with suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)  # a decoupled writer outlives its rank
            p.wait()
    return Job([p.returncode for p in processes], [log.read_text() for log in logs],
               0.0 if first_end is None else time.monotonic() - first_end)


@pytest.fixture(scope="module")
def undisturbed() -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    return {}


def _reference(undisturbed: dict[tuple[int, str], dict[str, torch.Tensor]], stage: int,
               factory: pytest.TempPathFactory, ascent: str = "global") -> dict[str, torch.Tensor]:
    if (stage, ascent) not in undisturbed:
        folder = factory.mktemp("undisturbed") / "checkpoints"
        job = run_job(folder, stage, ascent=ascent)
        assert job.codes == [0] * WORLD, job.outputs
        undisturbed[stage, ascent] = torch.load(folder / "weights-0.pt")
    return undisturbed[stage, ascent]


def _check(job: Job, kind: str, rank: int) -> None:
    assert all(code != 0 for code in job.codes), (job.codes, job.outputs)
    if kind == "kill-writer":
        assert "checkpoint process is not running" in job.outputs[rank]
    elif kind.startswith("kill"):
        assert job.codes[rank] == -signal.SIGKILL
    elif kind == "term-replay":
        assert job.codes[rank] == -signal.SIGTERM
    elif kind == "save-on-term-replay":
        assert "perturbed" in job.outputs[rank] and "LookSAMReplayError" in job.outputs[rank]
    elif kind == "raise-replay":
        _check_exceptions(job, rank)
    elif kind == "full-disk":
        assert all("LookSAMCheckpointError" in output for output in job.outputs)
    elif kind.startswith("inf"):
        decisions = {next(line for line in output.splitlines() if line.startswith("decided")) for output in job.outputs}
        assert len(decisions) == 1, decisions


def _check_exceptions(job: Job, rank: int) -> None:
    """Nothing has been saved. A rank that raised gets its own exception; one that did not gets to know of it."""
    for r, output in enumerate(job.outputs):
        last = output[output.rindex("Traceback"):]
        if rank in (-1, r):
            assert "ModelBroke: the model broke in the replay" in last and "LookSAMReplayError" not in last, output
            waited = float(re.search(r"told after ([\d.]+) s", output)[1])
            assert waited < GRACE + 15, output  # 15 for a busy machine
        else:
            assert "LookSAMReplayError: In the second evaluation" in last, output
            # The store goes with rank 0, and then nobody is left to tell which rank it was.
            assert f"rank {rank} raised ModelBroke" in last or (rank == 0 and "other ranks were lost" in last), last
        if rank != -1:  # where all raised together, all is as before the step, and may be saved
            for what in "checkpoint", "state":
                assert f"emergency {what}: LookSAMReplayError" in output, output
    # Far from the timeout of DeepSpeed's process groups, which is torch's: half an hour.
    assert job.seconds_after_first_end < TIMEOUT


def _check_same(folder: Path, reference: Path) -> None:
    """DeepSpeed's files hold the same tensors: weights and optimizer state."""
    names = sorted(path.name for path in reference.glob("*.pt"))
    assert names and names == sorted(path.name for path in folder.glob("*.pt"))
    for name in names:
        got, expected = ([leaf for leaf in tree_leaves(torch.load(at / name, weights_only=False))
                          if isinstance(leaf, torch.Tensor)] for at in (folder, reference))
        assert expected and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name


# (fault, the rank it strikes, stages)
FAULTS: list[tuple[str, int, tuple[int, ...]]] = [
    ("kill-replay", 1, (2, )),
    ("save-on-term-replay", 0, (3, )),
    ("raise-replay", 1, (2, )),
]
MORE_FAULTS: list[tuple[str, int, tuple[int, ...]]] = [
    ("kill-first", 1, (0, 1, 3)),
    ("kill-replay", 0, (0, 3)),
    ("kill-update", 1, (0, 2, 3)),
    ("kill-save-deepspeed", 0, (0, 2)),
    ("kill-save-deepspeed", 1, (2, 3)),
    ("kill-save-looksam", 0, (0, 2)),
    ("kill-save-looksam", 1, (3, )),
    ("term-replay", 1, (2, )),
    ("term-replay", -1, (3, )),
    ("save-on-term-replay", -1, (0, 2)),
    ("raise-replay", -1, (0, 2, 3)),
    ("raise-replay", 1, (0, 1, 3)),
    ("raise-replay", 0, (2, 3)),
    ("inf-first", 1, (0, 2, 3)),
    ("inf-replay", 0, (0, 2, 3)),
]


def _each(faults: list[tuple[str, int, tuple[int, ...]]]) -> list[tuple[str, int, int]]:
    return [(kind, rank, stage) for kind, rank, stages in faults for stage in stages]


def _disturb(kind: str, rank: int, stage: int, folder: Path, reference: dict[str, torch.Tensor],
             config: dict[str, Any] | None = None, ascent: str = "global") -> None:
    job = run_job(folder, stage, kind, rank, config, ascent)
    _check(job, kind, rank)
    emergency = folder / "emergency"
    if kind == "raise-replay" and rank == -1:
        _check_same(emergency, folder / f"global_step{STRIKE}")
    else:
        assert not emergency.exists() and not emergency.with_suffix(".pt").exists()
    # What strikes while update 4 is being saved leaves the checkpoint of update 2 as the newest.
    # So does what strikes while a decoupled writer is still writing it: until the first evaluation has ended.
    being_saved = ("save-" in kind and "term" not in kind) or kind == "full-disk"
    being_written = bool(config) and kind in ("kill-first", "kill-writer")
    saved = STRIKE - 2 if being_saved or being_written else STRIKE
    assert (folder / "latest").read_text() == f"global_step{saved}"
    (folder / "filler").unlink(missing_ok=True)
    again = run_job(folder, stage, config=config, ascent=ascent)
    assert again.codes == [0] * WORLD, again.outputs
    assert all(f"resumed at {saved}" in output for output in again.outputs)
    for r in range(WORLD):
        weights = torch.load(folder / f"weights-{r}.pt")
        for name, weight in reference.items():
            assert torch.equal(weights[name], weight), (r, name)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "rank", "stage"), _each(FAULTS))
def test_a_job_started_again_ends_as_if_nothing_had_happened(
        kind: str, rank: int, stage: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
        undisturbed: dict[tuple[int, str], dict[str, torch.Tensor]]) -> None:
    _disturb(kind, rank, stage, tmp_path / "checkpoints", _reference(undisturbed, stage, tmp_path_factory))


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "rank", "stage"), _each(MORE_FAULTS))
def test_every_fault(kind: str, rank: int, stage: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
                     undisturbed: dict[tuple[int, str], dict[str, torch.Tensor]]) -> None:
    _disturb(kind, rank, stage, tmp_path / "checkpoints", _reference(undisturbed, stage, tmp_path_factory))


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("ascent", "stage"), [("rank", 0), ("rank", 2), ("micro_batch", 1), ("global_micro_batch", 3)])
@pytest.mark.parametrize(("kind", "rank"), [("kill-first", 1), ("kill-replay", 1), ("raise-replay", 1),
                                            ("raise-replay", -1), ("save-on-term-replay", 0), ("inf-first", 1),
                                            ("inf-replay", 0)])
def test_ascent_groups(kind: str, rank: int, ascent: str, stage: int, tmp_path: Path,
                       tmp_path_factory: pytest.TempPathFactory,
                       undisturbed: dict[tuple[int, str], dict[str, torch.Tensor]]) -> None:
    reference = _reference(undisturbed, stage, tmp_path_factory, ascent)
    _disturb(kind, rank, stage, tmp_path / "checkpoints", reference, ascent=ascent)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "decoupled"), [("kill-first", True), ("kill-replay", True), ("kill-writer", True),
                                                 ("kill-replay", False)])
def test_deepspeeds_own_writers(kind: str, decoupled: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
                                undisturbed: dict[tuple[int, str], dict[str, torch.Tensor]]) -> None:
    """Resumed with the same JSON, and to the bit the run without ``checkpoint.writer``."""
    config = {"checkpoint": {"writer": {"type": "python", "decoupled": decoupled}}}
    _disturb(kind, 1, 3, tmp_path / "checkpoints", _reference(undisturbed, 3, tmp_path_factory), config)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_full_disk(stage: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
                     undisturbed: dict[tuple[int, str], dict[str, torch.Tensor]]) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        _disturb("full-disk", 0, stage, folder, _reference(undisturbed, stage, tmp_path_factory))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)

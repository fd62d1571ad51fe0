"""Does it help? Tasks x methods x seeds through the product's own engine, and what came out.

    python -m benchmarks.evidence run --plan tune 5k                      # one process; goes on where it was ended
    python -m benchmarks.evidence run --plan tune 5k batch text 60k --processes 14 --seconds 300  # on one GPU
    torchrun --nproc-per-node 2 -m benchmarks.evidence run --plan tune 5k --methods SAM/rank SAM-5/rank LookSAM-5/rank
    python -m benchmarks.evidence list                                    # plans, tasks and methods
    python -m benchmarks.evidence table [--write]                         # from the records, into docs/evidence.md
    python -m benchmarks.evidence compare LookSAM-5 LookSAM-5-mean        # the first minus the others, task by task
    python -m benchmarks.evidence draw                                    # from the records, docs/evidence.png and the
                                                                          # README's picture, docs/evidence-in-short.png

Records lie in --results, by default where the committed ones are (benchmarks/results/evidence/*.jsonl): one line a run.
ZeRO stage 0 and fp32 throughout: the tests show that the other stages compute the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks import evidence_report as report
from benchmarks.evidence_methods import METHODS
from benchmarks.evidence_plan import PLANS, UNTUNED_RHO, Board, Part, jobs, read
from benchmarks.evidence_pool import join_alone, run_in_turn, run_side_by_side, serve
from benchmarks.evidence_tasks import FASHION_MNIST, TASKS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are not there yet")
    run.add_argument("--plan", nargs="+", choices=list(PLANS), default=["tune", "5k"], help="in this order")
    run.add_argument("--tasks", nargs="+", choices=list(TASKS), help="only these of the plan's")
    run.add_argument("--methods", nargs="+", choices=list(METHODS), help="these instead of the plan's")
    run.add_argument("--seeds", type=int, nargs="+", help="these instead of the plan's; 0 is the tuning runs'")
    run.add_argument("--lr", type=float, help="instead of the tuned one")
    run.add_argument("--rho", type=float, default=UNTUNED_RHO, help="with --lr")
    run.add_argument("--updates", type=int, help="instead of the tasks' own: to try the program")
    run.add_argument("--processes", type=int, default=1, help="runs side by side, on one GPU or CPU")
    run.add_argument("--seconds", type=float, default=float("inf"),
                     help="runs that have not ended so long after the start are given up")
    run.add_argument("--data-dir", type=Path, default=FASHION_MNIST)
    run.add_argument("--file", default="runs.jsonl", help="in the folder of the results")
    commands.add_parser("list", help="plans, tasks and methods")
    table = commands.add_parser("table", help="Markdown")
    table.add_argument("--write", action="store_true", help="into --page, between its markers")
    table.add_argument("--page", type=Path, default=ROOT / "docs" / "evidence.md")
    compare = commands.add_parser("compare", help="a method minus others, seed by seed, in every task")
    compare.add_argument("methods", nargs="+", choices=list(METHODS), metavar="METHOD")
    compare.add_argument("--seeds", type=int, nargs="+", help="only these")
    draw = commands.add_parser("draw", help="two PNGs: all tasks, and those of the README")
    draw.add_argument("--to", type=Path, default=ROOT / "docs", help="a folder")
    for command in run, table, compare, draw:
        command.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.command == "run" and 0 in (args.seeds or []):
        run.error("--seeds: 0 is the tuning runs' and not used again")
    return args


def plan(args: argparse.Namespace) -> list[Part]:
    parts = []
    for part in (part for name in args.plan for part in PLANS[name]):
        tasks = [task for task in part.tasks if task in (args.tasks or part.tasks)]
        parts.append(replace(part, tasks=tasks, methods=args.methods or part.methods,
                             seeds=tuple(args.seeds or part.seeds)))
    return parts


def run(args: argparse.Namespace) -> int:
    """How many runs failed."""
    start = psutil.Process().create_time()  # before the imports, which take their time
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and args.processes > 1:
        raise SystemExit("--processes: each of them is one rank; under torchrun leave it out")
    first = int(os.environ.get("RANK", 0)) == 0
    board = Board(args.results, args.file, jobs(plan(args), world, args.updates, args.lr, args.rho)) if first else None
    if board is not None:
        print(f"{len(board.records)} records in {args.results}, {len(board.waiting)} runs in the plan", flush=True)
    if args.processes > 1:
        assert board is not None
        failed = run_side_by_side(board, args.data_dir, start + args.seconds, args.processes, serve)
    else:
        failed = 0
        with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
            join_alone(f"{folder}/rendezvous") if world == 1 else join()
            run_in_turn(board, args.data_dir, start + args.seconds)
            from distributed import leave

            leave()
    if board is not None:
        print(f"{board.skipped} were there already, {len(board.waiting)} are left, {time.time() - start:.0f} s")
        if board.waiting and time.time() - start < args.seconds:
            print("Those left wait for the tuning runs of their method: put them into the plan (tune), or give --lr")
    return failed


def join() -> None:
    import logging

    from distributed import join as join_group

    import ds_looksam  # noqa: F401 - registers LookSAM

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    join_group()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "run":
        return min(1, run(args))
    if args.command == "list":
        print("\n".join([*(f"plan {name}: {len(jobs(parts, 1))} runs" for name, parts in PLANS.items()), "",
                         *(f"task {task.name}: {task.about}" for task in TASKS.values()), "",
                         *(f"method {name}" for name in METHODS)]))
        return 0
    records = read(args.results)
    if not records:
        raise SystemExit(f"{args.results}: no records in it; `python -m benchmarks.evidence run` makes them")
    if args.command == "compare":
        wanted = [r for r in records if r["seed"] in (args.seeds or [r["seed"]])]
        print(report.comparison(wanted, *args.methods))
    elif args.command == "draw":
        for name, tasks in ("evidence", list(TASKS)), ("evidence-in-short", report.IN_SHORT):
            report.draw(records, args.to / f"{name}.png", tasks)
            print(args.to / f"{name}.png")
    elif args.write:
        report.write(args.page, report.tables(records))
        print(args.page)
    else:
        print(report.tables(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which runs benchmarks/evidence.py makes, in which order, and with which lr and rho; where their records lie."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.evidence_methods import METHODS, REUSE_RULES, Method, refusal
from benchmarks.evidence_run import Job
from benchmarks.evidence_tasks import TASKS

Record = dict[str, Any]
TUNING_SEED = 0
"""Of the tuning runs alone."""
UNTUNED_RHO = 0.12
"""Where the lr is given by hand, and rho is not."""

CORE = ["base", "MSAM", "SAM", "SAM-5", "LookSAM-5", "LookSAM-5-alpha0.7", "LookSAM-5-alpha0.2", "Look-LayerSAM-5"]
SMALL_GROUPS = ["SAM/micro_batch", "SAM-5/micro_batch", "LookSAM-5/micro_batch", "LookSAM-5-alpha0.2/micro_batch",
                "LookSAM-5-alpha0.7/micro_batch", "Look-LayerSAM-5/micro_batch"]
TUNED = CORE + SMALL_GROUPS
ALL = [*TUNED, "base-x1.2", "base-x2", "SAM-10", "LookSAM-10", "SAM-10/micro_batch", "LookSAM-10/micro_batch"]
LARGE_BATCH = ["base", "SAM-5", "LookSAM-5", "Look-LayerSAM-5"]
REUSE = [f"LookSAM-5-{rule}{end}" for end in ("/micro_batch", "") for rule in REUSE_RULES]
FEW = ["base", "MSAM", "SAM-5", "LookSAM-5"]
WHOLE = [*FEW, "SAM", "Look-LayerSAM-5"]
WHOLE_SMALL_GROUPS = ["LookSAM-5/micro_batch", "SAM-5/micro_batch"]


@dataclass(frozen=True)
class Part:
    """Some tasks x methods x seeds of a plan, all methods of a seed before the next one's."""

    tasks: list[str]
    methods: list[str]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    tune: bool = False


_WHOLE = ["5k-wrong-whole", "5k-clean-whole"]
_BATCHES = [f"batch-{base}-{batch}" for batch in (8192, 4096, 1024) for base in ("AdamW", "Lamb")]
AGAIN = tuple(range(11, 21))
"""Seeds that were not looked at before what they are to confirm had been written down."""


def _tuned_and_run(tasks: list[str], methods: list[str]) -> list[Part]:
    return [Part(tasks, methods, tune=True), Part(tasks, methods)]


PLANS = {
    "tune": [Part(["5k-wrong"], TUNED, tune=True)],
    "whole": _tuned_and_run(_WHOLE, WHOLE),
    "whole-small-groups": _tuned_and_run(_WHOLE, WHOLE_SMALL_GROUPS),
    "confirm": [Part(["5k-wrong-whole"], ["base", "LookSAM-5", *WHOLE_SMALL_GROUPS], seeds=AGAIN)],
    "5k": [Part(["5k-wrong"], ALL), Part(["5k-clean"], ALL)],
    "reuse": [Part(["5k-wrong", "5k-clean"], ["LookSAM-5/micro_batch", "LookSAM-5", *REUSE])],
    "60k": _tuned_and_run(["60k-wrong", "60k-clean"], FEW),
    "60k-small-groups": _tuned_and_run(["60k-wrong", "60k-clean"], ["LookSAM-5/micro_batch"]),
    "batch": _tuned_and_run(_BATCHES, LARGE_BATCH),
    "batch-small-groups": _tuned_and_run(["batch-AdamW-8192", "batch-Lamb-8192"],
                                         ["LookSAM-5/micro_batch", "Look-LayerSAM-5/micro_batch"]),
    "batch-256": [Part(["batch-AdamW-256", "batch-Lamb-256"], LARGE_BATCH, seeds=(1, 2, 3))],
    "text": _tuned_and_run(["gpt2", "lora"], [*FEW, "SAM"]),
    "text-small-groups": [Part(["gpt2", "lora"], ["LookSAM-5/micro_batch"], tune=True),
                          Part(["gpt2-cpu", "lora-cpu"], [*FEW, "LookSAM-5/micro_batch"])],
}


def jobs(parts: Iterable[Part], world: int, updates: int | None = None, lr: float | None = None,
         rho: float = UNTUNED_RHO) -> list[Job]:
    """The runs of a plan, with a line on the standard output for all methods that cannot run for the same reason.

    ``updates``: instead of the tasks' own, for a trial of the program. ``lr``, ``rho``: instead of tuned ones, so that
    nothing is tuned.
    """
    made: list[Job] = []
    left_out: dict[str, set[str]] = {}
    for part in (part for part in parts if lr is None or not part.tune):
        for seed in [TUNING_SEED] if part.tune else part.seeds:
            for task_name in part.tasks:
                for name in part.methods:
                    task, method = TASKS[task_name], METHODS[name]
                    reason = refusal(method, task, world)
                    if reason is not None:
                        left_out.setdefault(reason, set()).add(name)
                        continue
                    job = Job(task_name, name, seed, round((updates or task.updates) * method.more), world=world)
                    if part.tune:
                        made += grid(replace(job, updates=max(1, int(job.updates * task.tuning)), tuning=True), method)
                    elif lr is None:
                        made.append(job)
                    else:
                        made.append(replace(job, lr=lr, rho=rho if method.has_rho else None))
    for reason, names in left_out.items():
        print(f"left out: {reason}: {', '.join(sorted(names))}", flush=True)
    return list(dict.fromkeys(made))


def grid(job: Job, method: Method) -> Iterator[Job]:
    for lr in TASKS[job.task].lrs:
        for rho in TASKS[job.task].rhos if method.has_rho else (None, ):
            yield replace(job, lr=lr, rho=rho)


class Board:
    """The runs still to be made, and the records of those that are, in a folder of JSON lines.

    Every record is appended as one line, at once, by a single write; what is there already is not run again.
    """

    def __init__(self, folder: Path, file: str, planned: Iterable[Job]) -> None:
        self.path = folder / file
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as unfinished:
                unfinished.write("\n")
        self.records = read(folder)
        self.waiting = list(planned)
        self.skipped = 0

    def next(self) -> Job | None:
        """The first run that can start, with its lr and rho. None: the rest waits for tuning runs in progress, or
        there is none."""
        for job in list(self.waiting):
            resolved = job if job.lr is not None else self._resolve(job)
            if resolved is None:
                continue
            self.waiting.remove(job)
            if any(_is(record, resolved) for record in self.records):
                self.skipped += 1
                continue
            return resolved
        return None

    def finish(self, record: Record) -> None:
        self.records.append(record)
        line = json.dumps(record) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def _resolve(self, job: Job) -> Job | None:
        best = tuned(self.records, job.task, job.method, job.world)
        if best is None:
            return None
        growth = TASKS[job.task].batch / TASKS[best["task"]].batch
        return replace(job, lr=best["lr"] * growth**0.5, rho=best["rho"])


def tuned(records: list[Record], task: str, method: str, world: int = 1) -> Record | None:
    """The best of a method's tuning runs, once all of its grid are there."""
    of, chosen_on = METHODS[METHODS[method].tuned_as or method], TASKS[task].tuned_on
    runs = {(r["lr"], r["rho"]): r for r in records
            if r["tuning"] and r["task"] == chosen_on and r["method"] == of.name and r["world"] == world}
    wanted = {(job.lr, job.rho) for job in grid(Job(chosen_on, of.name, TUNING_SEED, 1), of)}
    if not wanted <= runs.keys():
        return None
    better = max if TASKS[task].more_is_better else min
    return better((runs[point] for point in sorted(wanted, key=str)), key=lambda r: r["score"])


def read(folder: Path) -> list[Record]:
    """The records in all of a folder's files. The last line of a program that was killed may be half of one."""
    records: dict[str, Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                print(f"{path}:{number}: half a line of a program that was ended, left out")
                continue
            records[str([record[key] for key in _IDENTITY])] = record
    return list(records.values())


_IDENTITY = list(asdict(Job("", "", 0, 0)))


def _is(record: Record, job: Job) -> bool:
    return all(record[key] == value for key, value in asdict(job).items())

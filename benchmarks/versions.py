"""Whether a change of the package costs time: several versions of it in one process, turn by turn with the base.

    python -m benchmarks.versions 463debb c2d2a85 HEAD --stage 0 1 2 3 --model mini/7 --micro-batch 8 --rounds 400

One rank. Revisions first, then benchmarks/step_time.py's arguments. Each revision's ds_looksam is copied under another
name; one that refuses the installed torch as untested has that limit taken out. Everything else is step_time's: rounds
of k turns, an update of each contender in a turn, in alternating order. Printed is the median over rounds of a LookSAM
of each revision over the base, and over that of the first revision, with a 95 % interval (bootstrap).
"""

from __future__ import annotations

import importlib
import io
import logging
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks import step_time

ROOT = Path(__file__).parent.parent


def unpack(revision: str, name: str, folder: Path) -> None:
    """That revision's package as ``folder/name``."""
    archive = subprocess.run(["git", "archive", revision, "ds_looksam"], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    (folder / "ds_looksam").rename(folder / name)
    for path in (folder / name).rglob("*.py"):
        path.write_text(re.sub(r'("torch": ">=[\d.]+),<[\d.]+"', r'\1"', path.read_text()).replace("ds_looksam", name))


def build(args: Any, stage: int, name: str, package: Any) -> step_time.Contender:
    """A LookSAM of this package, which is not registered: another one of the process would be taken."""
    import deepspeed

    plain = deepspeed.initialize

    def initialize(**arguments: Any) -> Any:
        params = arguments["config"]["optimizer"]["params"]
        if args.ascent == "global":
            params.pop("ascent")  # which older ones do not know
        with patch("deepspeed.initialize", plain):
            return package.initialize(**arguments)

    with patch("deepspeed.initialize", initialize):
        return step_time.build(args, stage, args.precision[0], name)


def ratio(ours: list[float], theirs: list[float]) -> str:
    ratios = [x / y for x, y in zip(ours, theirs, strict=True)]
    medians = sorted(median(random.choices(ratios, k=len(ratios))) for _ in range(2_000))
    return f"{median(ratios):.4f} [{medians[50]:.4f}, {medians[1949]:.4f}]"


def main() -> None:
    step_time.launch("benchmarks.versions", 1)
    first = next(i for i, word in enumerate([*sys.argv[1:], "--"]) if word.startswith("--"))
    revisions, args = sys.argv[1:first + 1], step_time.parse(sys.argv[first + 1:])
    import deepspeed
    from distributed import leave

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed()
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        packages = {}
        for i, revision in enumerate(revisions):
            unpack(revision, f"version_{i}", Path(folder))
            packages[revision] = importlib.import_module(f"version_{i}")
            packages[revision].unregister()
        for stage in args.stage:
            made = {"base": step_time.build(args, stage, args.precision[0], "base")}
            made |= {revision: build(args, stage, "LookSAM", package) for revision, package in packages.items()}
            args.only = list(made)
            with patch.object(step_time, "build", lambda *arguments, made=made: made[arguments[-1]]):
                step_time.measure(args, stage, args.precision[0], 60 * args.minutes / len(args.stage))
            seconds = {name: [step_time.total(of) for of in contender.rounds] for name, contender in made.items()}
            print(f"\nZeRO stage {stage}, {len(seconds['base'])} rounds\n\n| | over base | over {revisions[0]} |\n"
                  "|---|---|---|")
            for revision in revisions:
                print(f"| {revision} | {ratio(seconds[revision], seconds['base'])} | "
                      f"{ratio(seconds[revision], seconds[revisions[0]])} |", flush=True)
    leave()


if __name__ == "__main__":
    main()

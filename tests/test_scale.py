"""As rank 0 of 4,096, LookSAM does what it does as rank 0 of 8: benchmarks/scale.py on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.scale import Measured, Row, Step, lines_of_package

from .collectives import Collective
from .inside import shards as shards_of
from .models import CLASSES, FEATURES
from .ranks import run_on_ranks
from .training import Case, engine_for

pytestmark = pytest.mark.timeout(900)  # 20 seconds of computing, which a busy machine stretches

ROOT = Path(__file__).parent.parent
STAGES = (2, 3)  # 1 is 2 with another order of the same reductions; 0 sends nothing, see test_costs.py


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Row]:
    """What the program measured, by stage and world size. It fails by itself where its formulas do not hold."""
    file = tmp_path_factory.mktemp("scale") / "rows.json"
    command = [sys.executable, "-m", "benchmarks.scale", "--model", "tiny", "--stage", *map(str, STAGES),
               "--world", "8", "4096", "--json", str(file)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                            text=True, timeout=850)
    assert result.returncode == 0, result.stdout + result.stderr
    return {(row["stage"], row["world"]): Row(**row | {key: measured(row[key]) for key in ("base", "ours")})
            for row in json.loads(file.read_text())}


def measured(values: dict[str, Any]) -> Measured:
    def collectives(of: dict[str, Any], *keys: str) -> dict[str, Any]:
        return of | {key: [Collective(**c) for c in of[key]] for key in keys}

    steps = {kind: Step(**collectives(step, "evaluation", "update")) for kind, step in values["steps"].items()}
    return Measured(**collectives(values, "startup") | {"steps": steps})


def test_collectives_by_hand(rows):
    """The model: 15 tensors of together 16,380 elements and the embedding, 108,036, used twice."""
    assert sum(rows[2, 8].base.sizes[0]) == 124_416 and len(rows[2, 8].base.sizes[0]) == 16
    scalars = [Collective("allreduce", 16, 4096), Collective("allreduce", 64, 4096)]
    row = rows[2, 4096]
    # 124,416 elements in 4,096 parts of an even size: 32 each.
    assert row.extra("sam") == Counter([Collective("allgather_base", 2 * 4096 * 32, 4096), *scalars])
    assert row.extra("reuse") == Counter(scalars[:1])
    assert row.base.steps["base"].evaluation == [Collective("allreduce", 2 * 124_416, 4096)]
    row = rows[3, 4096]
    # The embedding, 27 elements each, for both uses in forward and backward; every other tensor has 1 or 2 each.
    gathers = Counter(c for c in row.base.steps["base"].evaluation if c.kind == "allgather_base")
    assert gathers == Counter({Collective("allgather_base", 2 * 4096 * 27, 4096): 4})
    published = row.extra("sam") - Counter(scalars)
    assert published == Counter([Collective("allgather_base", 13 * 8192 + 2 * 16384, 4096)])


def test_nothing_grows_with_the_world_size(rows):
    for stage in STAGES:
        few, many = rows[stage, 8], rows[stage, 4096]
        for kind in ("sam", "reuse"):
            assert 0 < many.ours.steps[kind].lines <= few.ours.steps[kind].lines, (stage, kind)
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


def test_the_program_notices_what_a_formula_does_not_explain(rows):
    row = rows[2, 4096]
    assert row.problems() == []
    for kind, message in (("reuse", "a reuse step adds"), ("sam", "a SAM step adds")):
        step = row.ours.steps[kind]
        step.update.append(Collective("allreduce", 8, 4096))
        assert [problem for problem in row.problems() if message in problem] == row.problems() != []
        step.update.pop()
    row.ours.after += 100_000
    assert "bytes kept" in row.problems()[0]
    row.ours.after -= 100_000

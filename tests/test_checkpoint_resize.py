"""A checkpoint loads at another world size, ZeRO stage and precision, and what follows is the oracle continued."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal

from ds_looksam.universal import convert

from .checkpoints import Stretch, run_stretch
from .inside import checkpointer
from .inside import shards as shards_of
from .ranks import run_on_ranks
from .training import Case, distance, run_oracle

WINDOW = 4
"""Micro-batches per update over all ranks, so that every world size sees the same windows."""


@dataclass(frozen=True)
class Place:
    world: int
    stage: int
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.world}x-stage{self.stage}-{self.precision}"

    def settle(self, case: Case) -> Case:
        return replace(case, world=self.world, stage=self.stage, precision=self.precision,
                       accumulation=WINDOW // self.world)


@dataclass(frozen=True)
class Move:
    source: Place
    target: Place
    model: str = "mlp"
    two_groups: bool = False
    alpha: float | str = "auto"

    @property
    def world(self) -> int:  # for the order of tests
        return self.target.world

    def __str__(self) -> str:
        return f"{self.source}-to-{self.target}-{self.model}"


MOVES = [
    Move(Place(4, 2), Place(2, 2), model="tied", two_groups=True),
    Move(Place(2, 2), Place(2, 3), model="straddling", alpha=0.7),
]
MORE_MOVES = [
    Move(Place(1, 1), Place(4, 1)),
    Move(Place(2, 3), Place(4, 2), model="random-3"),
    Move(Place(2, 3), Place(1, 3), two_groups=True),
    Move(Place(2, 3), Place(4, 3), model="dead_and_frozen"),
    Move(Place(4, 3), Place(2, 3), model="tied", two_groups=True),
    Move(Place(1, 2), Place(4, 3), model="random-5"),
    Move(Place(4, 3), Place(1, 1), model="straddling"),
    Move(Place(2, 1), Place(4, 2), model="random-7", two_groups=True),
    Move(Place(2, 2), Place(2, 2, "bf16")),
    Move(Place(2, 1, "bf16"), Place(2, 3, "bf16")),
    Move(Place(2, 2, "bf16"), Place(4, 2)),
]

TOLERANCE = {
    "fp32": 1e-5,  # as in test_oracle_grid.py: fp32 rounds at 6e-8, and a run is thousands of operations
    # The oracle's gradients are exact, bf16 rounds weights, activations and gradients at 4e-3 each. One update moves a
    # weight of some 0.3 by at most lr = 1e-2, and Adam makes 1% of a gradient some 3% of that move:
    # 12 updates x 1e-2 / 0.3 x 3e-2. A lost g_v may be no larger than that, so g_v's own bits are compared too.
    "bf16": 1e-2,
}


def _by_name(place: Place, case: Case, folder: Path, tag: str) -> dict[str, torch.Tensor]:
    """g_v out of a checkpoint, whole, put together from what each rank of ``place`` loads."""
    whole: dict[str, torch.Tensor] = {}
    for parts in run_on_ranks(place.world, g_v_of, place.settle(case), str(folder), tag):
        for name, numel, lo, elements in parts:
            whole.setdefault(name, torch.full((numel, ), float("nan")))[lo:lo + elements.numel()] = elements
    return whole


def g_v_of(case: Case, folder: str, tag: str) -> list[tuple[str, int, int, torch.Tensor]]:
    """On a rank: the parts of g_v that it would load."""
    import math

    from ds_looksam.checkpoint.reading import NamedLayout

    from .training import engine_for

    with engine_for(case) as engine:
        saved = checkpointer(engine).read(Path(folder) / tag, universal=False)
        assert saved is not None and saved.v is not None
        here = NamedLayout.of(engine.module, shards_of(engine))
        return [(part.name, math.prod(here.shapes[part.name]), part.lo, flat[at:at + part.hi - part.lo].clone())
                for flat, segments in zip(saved.v, here.layout, strict=True) for at, part in segments]


def _move(move: Move, tmp_path: Path) -> None:
    case = Case(model=move.model, two_groups=move.two_groups, micro_batch=2, alpha=move.alpha)
    source, target = move.source.settle(case), move.target.settle(case)
    run_on_ranks(source.world, run_stretch, source, Stretch(stop=7, save={"save_dir": str(tmp_path)}, save_at=7))
    convert(tmp_path / "global_step7", tmp_path / "global_step7_universal")
    results = run_on_ranks(target.world, run_stretch, target,
                           Stretch(start=7, load={"load_dir": str(tmp_path)},
                                   config={"checkpoint": {"load_universal": True}}))
    _, expected = run_oracle(source)
    low = "bf16" in (move.source.precision, move.target.precision)
    for result in results:
        error = distance(result.weights, expected)
        assert error <= TOLERANCE["bf16" if low else "fp32"], f"{error:.2e}"
        assert result.extra.kinds == ["reuse", "reuse", "sam", "reuse", "reuse"]
        assert result.evaluations == 12 + 4
    here = _by_name(move.source, case, tmp_path, "global_step7")
    there = _by_name(move.target, case, tmp_path, "global_step7")
    assert here.keys() == there.keys()
    for name in here:
        assert torch.equal(here[name], there[name]), name


@pytest.mark.parametrize("move", MOVES, ids=str)
def test_moves(move: Move, tmp_path: Path) -> None:
    _move(move, tmp_path)


@pytest.mark.grid
@pytest.mark.parametrize("move", MORE_MOVES, ids=str)
def test_more_moves(move: Move, tmp_path: Path) -> None:
    _move(move, tmp_path)


def test_universal_checkpoint_by_deepspeeds_converter_finds_the_files_beside_it(tmp_path: Path) -> None:
    case = Place(2, 2).settle(Case(micro_batch=2))
    load = Stretch(start=4, load={"load_dir": str(tmp_path)}, config={"checkpoint": {"load_universal": True}})
    run_on_ranks(2, run_stretch, case, Stretch(stop=4, save={"save_dir": str(tmp_path)}, save_at=4))
    other = Stretch(stop=5, save={"save_dir": str(tmp_path), "tag": "another"}, save_at=5)
    run_on_ranks(2, run_stretch, case, other)  # a second save in the same folder must not be taken for it
    ds_to_universal.main(Namespace(input_folder=str(tmp_path / "global_step4"),
                                   output_folder=str(tmp_path / "universal"), num_extract_workers=1,
                                   num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True))
    results = run_on_ranks(2, run_stretch, case, load)
    assert distance(results[0].weights, run_oracle(case)[1]) <= TOLERANCE["fp32"]

    (tmp_path / "global_step4" / "looksam.json").unlink()
    failed = run_on_ranks(2, run_stretch, case, replace(load, stop=4, expects_error=True))
    for result in failed:
        assert result.extra.untouched
        assert "looksam.json is missing" in result.extra.error and "Copy looksam*" in result.extra.error


def test_stage_0_moves_without_conversion(tmp_path: Path) -> None:
    case = Case(micro_batch=2)
    for world in 1, 2:
        save = Stretch(stop=7, save={"save_dir": str(tmp_path / str(world))}, save_at=7)
        run_on_ranks(world, run_stretch, Place(world, 0).settle(case), save)
        other = 3 - world
        load = Stretch(start=7, load={"load_dir": str(tmp_path / str(world))})
        result = run_on_ranks(other, run_stretch, Place(other, 0).settle(case), load)[0]
        assert distance(result.weights, run_oracle(Place(world, 0).settle(case))[1]) <= TOLERANCE["fp32"]

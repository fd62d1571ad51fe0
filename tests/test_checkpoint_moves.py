"""A checkpoint goes on at another world size, stage and precision, with LookSAM and without, whole or in part: what
follows is the oracle's. What the outside world reads from it is clean."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
from torch import Tensor

from ds_looksam.errors import LookSAMCheckpointError
from ds_looksam.universal import convert

from .checkpoints import Stretch, run_stretch, same_bits
from .ranks import run_on_ranks
from .training import DTYPES, Case, Result, distance, named, start_oracle

WINDOW = 4
"""Micro-batches per update over all ranks, so that every world size sees the same windows."""
SAVED_AT, END = 4, 9
"""k = 3: update 3 was a SAM step, whose perturbed weights nobody may see; 4 and 5 reuse its g_v."""
TOLERANCE = {
    "fp32": 1e-5,  # as in test_oracle_grid.py: fp32 rounds at 6e-8, and a run is thousands of operations
    # The oracle's gradients are exact, bf16 rounds weights, activations and gradients at 4e-3 each. One update moves a
    # weight of some 0.3 by at most lr = 1e-2, and Adam makes 1% of a gradient some 3% of that move:
    # 9 updates x 1e-2 / 0.3 x 3e-2. A lost g_v may be no larger than that, so g_v's own bits are compared too.
    "bf16": 1e-2,
}


UNIVERSAL = {"checkpoint": {"load_universal": True}}
WHOLE = ("as_it_is", "universal", "ds_to_universal")


@dataclass(frozen=True)
class Place:
    world: int
    stage: int
    precision: str = "fp32"


ONE, TWO, FOUR = ([Place(world, stage) for stage in range(4)] for world in (1, 2, 4))
BF16 = [replace(place, precision="bf16") for place in TWO]


@dataclass(frozen=True)
class Move:
    how: str
    source: Place
    target: Place
    model: str = "mlp"
    two_groups: bool = True
    alpha: float | str = "auto"
    torch_adam: bool = False

    def __str__(self) -> str:
        places = "-to-".join(f"{p.world}x-stage{p.stage}-{p.precision}" for p in (self.source, self.target))
        return f"{self.how}-{places}-{self.model}" + "-torch_adam" * self.torch_adam

    def case(self, place: Place) -> Case:
        zero = {"stage3_gather_16bit_weights_on_model_save": True} if place.stage == 3 else {}
        return Case(self.model, place.world, place.stage, WINDOW // place.world, alpha=self.alpha, micro_batch=2,
                    two_groups=self.two_groups, precision=place.precision, updates=END, zero=zero,
                    params={"torch_adam": True} if self.torch_adam else {})

    def stretch(self, folder: Path) -> Stretch:
        load: dict[str, Any] = {"load_dir": str(folder), "tag": "saved"}
        how: dict[str, dict[str, Any]] = {
            "as_it_is": {"load": load},
            "from_plain": {"load": load},
            "to_plain": {"load": load, "looksam": False},
            "universal": {"load": load | {"tag": "universal"}, "config": UNIVERSAL},
            "ds_to_universal": {"load": load | {"tag": "by_deepspeed"}, "config": UNIVERSAL},
            "zero_to_fp32": {"weights": str(folder / "fp32" / "pytorch_model.bin")},
            "save_16bit_model": {"weights": str(folder / "model.bin")},
            "load_module_only": {"load": load | {"load_module_only": True}},
            "load_optimizer_states": {"load": load | {"load_optimizer_states": False}},
            "load_looksam_states": {"load": load | {"load_looksam_states": False}},
        }
        return Stretch(start=SAVED_AT, stop=END, **how[self.how])

    @property
    def outcome(self) -> tuple[list[str], int]:
        """The kinds of the steps after SAVED_AT, and evaluations at the end."""
        if self.how == "to_plain":
            return ["plain"] * 5, 0
        if self.how in WHOLE:
            return ["reuse", "reuse", "sam", "reuse", "reuse"], END + 3
        first = "base" if self.alpha == "auto" else "reuse"  # "auto" has nothing measured yet
        return ["sam", first, first, "sam", "reuse"], END - SAVED_AT + 2

    def oracle(self, saved: Result) -> dict[str, Tensor]:
        source, target = self.case(self.source), self.case(self.target)
        if self.how in ("zero_to_fp32", "save_16bit_model", "load_module_only", "load_optimizer_states"):
            reference, module, groups = start_oracle(target)
            weights = saved.model_weights if self.how == "save_16bit_model" else saved.weights
            w = torch.cat([weights[name].double().reshape(-1) for group in groups for name in group.names])
            reference.w = w.to(DTYPES[target.precision]).double()
        else:
            reference, module, groups = start_oracle(source)
            reference.off = SAVED_AT if self.how == "from_plain" else 0
            for update in range(SAVED_AT):
                reference.update(source.window(update))
            if self.how == "to_plain":
                reference.off = END
            if self.how == "load_looksam_states":
                reference.t, reference.v, reference.beta = 0, None, None
        for update in range(SAVED_AT, END):
            reference.update(target.window(update))
        return named(reference.w, module, groups)


MOVES = [
    Move("universal", FOUR[2], TWO[2], "tied"),
    Move("universal", TWO[2], TWO[3], "straddling", False, 0.7),
    Move("universal", BF16[1], BF16[3]),
    Move("universal", TWO[2], TWO[3], torch_adam=True),
    Move("ds_to_universal", TWO[2], TWO[2]),
    Move("as_it_is", ONE[0], TWO[0]),
    Move("as_it_is", TWO[0], ONE[0]),
    *(Move("from_plain", TWO[stage], TWO[stage], "tied", alpha=0.7) for stage in (0, 2, 3)),
    *(Move("to_plain", TWO[stage], TWO[stage]) for stage in (0, 2, 3)),
    Move("zero_to_fp32", TWO[2], TWO[3], "straddling", False),
    Move("save_16bit_model", BF16[3], TWO[2], "straddling", False),
    Move("load_module_only", TWO[2], TWO[1]),
    Move("zero_to_fp32", TWO[2], TWO[0], "straddling", False),
    Move("load_module_only", TWO[0], TWO[0]),
    Move("load_module_only", TWO[0], TWO[2]),
    Move("load_optimizer_states", TWO[3], TWO[3]),
    Move("load_looksam_states", TWO[2], TWO[2]),
]
MORE_MOVES = [
    Move("universal", ONE[1], FOUR[1], two_groups=False),
    Move("universal", TWO[3], FOUR[2], "random-3", False),
    Move("universal", TWO[3], ONE[3]),
    Move("universal", TWO[3], FOUR[3], "dead_and_frozen", False),
    Move("universal", FOUR[3], TWO[3], "tied"),
    Move("universal", ONE[2], FOUR[3], "random-5", False),
    Move("universal", FOUR[3], ONE[1], "straddling", False),
    Move("universal", TWO[1], FOUR[2], "random-7"),
    Move("universal", BF16[2], FOUR[2], two_groups=False),
    *(Move(how, source, target, model, False) for how in ("zero_to_fp32", "save_16bit_model")
      for source, target, model in [(FOUR[3], TWO[2], "straddling"), (ONE[1], FOUR[3], "mlp"), (TWO[2], BF16[2], "mlp"),
                                    (TWO[2], TWO[1], "tied")]),
    Move("load_module_only", ONE[1], FOUR[2], two_groups=False),
    Move("load_module_only", TWO[0], FOUR[0], two_groups=False),
    Move("load_module_only", TWO[3], TWO[3], "tied", False),
    Move("load_optimizer_states", TWO[2], TWO[2], "straddling", False),
    Move("load_optimizer_states", FOUR[1], FOUR[1], two_groups=False),
]

Saved = Callable[[Move], tuple[Path, list[Result]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of a move's source, trained and saved in every way, and what its ranks had then."""

    @cache
    def save(move: Move) -> tuple[Path, list[Result]]:
        case, folder = move.case(move.source), tmp_path_factory.mktemp("saved")
        stretch = Stretch(stop=SAVED_AT, save={"save_dir": str(folder)}, tags=("another", "saved"), save_at=SAVED_AT,
                          looksam=move.how != "from_plain")
        results = run_on_ranks(case.world, run_stretch, case, stretch)
        weights, model_weights = results[0].weights, results[0].model_weights
        same_bits({name: w.to(DTYPES[case.precision]) for name, w in weights.items()}, model_weights)
        # Beside what is trained, what is frozen is in there, and tied weights under both names.
        model = torch.load(folder / "model.bin", weights_only=True)
        same_bits({name: model[name] for name in model_weights}, model_weights)
        if case.stage > 0:
            convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(folder / "fp32"), tag="saved")
            model = torch.load(folder / "fp32" / "pytorch_model.bin", weights_only=True)
            same_bits({name: model[name] for name in weights}, weights)
            assert os.access(folder / "zero_to_fp32.py", os.X_OK)
        return folder, results

    # Moves from one place share it.
    return lambda move: save(replace(move, how="from_plain" if move.how == "from_plain" else "", target=move.source))


def convert_by_deepspeed(source: Path, target: Path) -> None:
    ds_to_universal.main(Namespace(input_folder=str(source), output_folder=str(target), num_extract_workers=1,
                                   num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True))


def whole_v(results: list[Result]) -> dict[str, Tensor]:
    """g_v as all ranks together have it."""
    return {name: torch.stack([result.extra.v[name] for result in results]).nanmean(0) for name in results[0].extra.v}


@pytest.mark.parametrize("move", [*MOVES, *(pytest.param(m, marks=pytest.mark.grid) for m in MORE_MOVES)], ids=str)
def test_moves(move: Move, saved: Saved) -> None:
    folder, source = saved(move)
    if move.how == "universal" and not (folder / "universal").exists():
        convert(folder / "saved", folder / "universal")
    if move.how == "ds_to_universal":  # LookSAM's files lie beside it then, and so do those of another save
        convert_by_deepspeed(folder / "saved", folder / "by_deepspeed")
    results = run_on_ranks(move.target.world, run_stretch, move.case(move.target), move.stretch(folder))
    expected = move.oracle(source[0])
    low = "bf16" in (move.source.precision, move.target.precision)
    for result in results:
        error = distance(result.weights, expected)
        assert error <= TOLERANCE["bf16" if low else "fp32"], f"{error:.2e}"
        assert (result.extra.kinds, result.evaluations) == move.outcome
    same_bits(whole_v(results), whole_v(source) if move.how in WHOLE else {})
    anew = move.how in ("from_plain", "load_module_only", "load_optimizer_states", "load_looksam_states")
    assert any("starts anew" in line for line in results[0].extra.log) == anew


def test_a_universal_checkpoint_without_looksams_files(saved: Saved, tmp_path: Path) -> None:
    move = Move("ds_to_universal", TWO[2], TWO[2])
    convert_by_deepspeed(saved(move)[0] / "saved", tmp_path / "by_deepspeed")
    stretch = move.stretch(tmp_path)
    stretch = replace(stretch, refused=[stretch.load], load=stretch.load | {"load_looksam_states": False})
    for result in run_on_ranks(2, run_stretch, move.case(move.target), stretch):
        assert "looksam.json is missing" in result.extra.refusals[0] and "Copy looksam*" in result.extra.refusals[0]
        assert result.extra.kinds == ["sam", "base", "base", "sam", "reuse"]


def test_a_conversion_that_fails_leaves_nothing(saved: Saved, tmp_path: Path) -> None:
    """DeepSpeed's converter names its result before ours is done with it."""
    source = saved(Move("ds_to_universal", TWO[2], TWO[2]))[0] / "saved"
    with mock.patch("ds_looksam.universal._serve_every_stage", side_effect=OSError), pytest.raises(OSError):
        convert(source, tmp_path / "universal")
    assert not list(tmp_path.iterdir())
    convert(source, tmp_path / "universal")
    assert (tmp_path / "latest_universal").read_text() == "universal"


def test_universal_checkpoints_know_no_stage_0(saved: Saved, tmp_path: Path) -> None:
    """The ways out are moves: zero_to_fp32 to stage 0, load_module_only from there."""
    with pytest.raises(LookSAMCheckpointError, match=r"load_module_only=True\) takes its weights"):
        convert(saved(Move("", TWO[0], TWO[0]))[0] / "saved", tmp_path / "universal")
    move = Move("universal", TWO[2], TWO[0])
    stretch = move.stretch(tmp_path)
    for result in run_on_ranks(2, run_stretch, move.case(move.target), replace(
            stretch, stop=SAVED_AT, refused=[stretch.load], load=None)):
        assert "stage 1 to 3 only" in result.extra.refusals[0] and "zero_to_fp32.py" in result.extra.refusals[0]

"""What is loaded without LookSAM's state, or without any optimizer's: what follows is the oracle started anew from the
saved weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

from .checkpoints import Stretch, run_stretch
from .models import make_model
from .ranks import run_on_ranks
from .test_checkpoint_resize import TOLERANCE, WINDOW, Place
from .training import Case, distance, engine_for, master_weights, named, start_oracle, train_window

SAVED_AT, END = 4, 9


@dataclass(frozen=True)
class Restart:
    how: str
    source: Place
    target: Place
    model: str = "mlp"

    @property
    def world(self) -> int:  # for the order of tests
        return self.target.world

    def __str__(self) -> str:
        return f"{self.how}-{self.source}-to-{self.target}-{self.model}"


RESTARTS = [
    Restart("zero_to_fp32", Place(2, 2), Place(2, 3), "straddling"),
    Restart("load_module_only", Place(2, 2), Place(2, 1)),
    Restart("load_optimizer_states", Place(2, 3), Place(2, 3)),
]
MORE_RESTARTS = [
    Restart("zero_to_fp32", Place(4, 3), Place(2, 2), "random-3"),
    Restart("zero_to_fp32", Place(1, 1), Place(4, 3)),
    Restart("zero_to_fp32", Place(2, 2), Place(2, 2, "bf16")),
    Restart("save_16bit_model", Place(2, 2), Place(2, 3), "tied"),
    Restart("save_16bit_model", Place(1, 1), Place(4, 2)),
    Restart("save_16bit_model", Place(4, 3), Place(2, 1), "straddling"),
    Restart("save_16bit_model", Place(2, 0), Place(2, 2, "bf16")),
    Restart("load_module_only", Place(1, 1), Place(4, 2)),
    Restart("load_module_only", Place(4, 2), Place(2, 2), "straddling"),
    Restart("load_module_only", Place(2, 0), Place(4, 0)),
    Restart("load_module_only", Place(2, 3), Place(2, 3), "tied"),
    Restart("load_optimizer_states", Place(2, 2), Place(2, 2), "straddling"),
    Restart("load_optimizer_states", Place(4, 1), Place(4, 1)),
]


def save(case: Case, folder: str) -> dict[str, torch.Tensor]:
    """On a rank: train, save in every way, and tell the weights."""
    with engine_for(case) as engine:
        for update in range(SAVED_AT):
            train_window(engine, case, update)
        engine.save_checkpoint(folder, tag="saved")
        engine.save_16bit_model(folder, "model.bin")
        return master_weights(engine)


def train_on_from(case: Case, weights: str) -> dict[str, torch.Tensor]:
    """On a rank: another run, whose model begins with these weights."""
    module = make_model(case.model, case.seed)
    module.load_state_dict(torch.load(weights, weights_only=True))
    with engine_for(case, module=module) as engine:
        for update in range(SAVED_AT, END):
            train_window(engine, case, update)
        return master_weights(engine)


def _restart(restart: Restart, tmp_path: Path) -> None:
    case = Case(model=restart.model, micro_batch=2, updates=END)
    source, target = restart.source.settle(case), restart.target.settle(case)
    if source.stage == 3:
        source = Case(**{**vars(source), "zero": {"stage3_gather_16bit_weights_on_model_save": True}})
    folder = str(tmp_path)
    saved = run_on_ranks(source.world, save, source, folder)[0]
    got: list[Any]
    if restart.how == "zero_to_fp32":
        convert_zero_checkpoint_to_fp32_state_dict(folder, str(tmp_path / "fp32"), tag="saved")
        got = run_on_ranks(target.world, train_on_from, target, str(tmp_path / "fp32" / "pytorch_model.bin"))
    elif restart.how == "save_16bit_model":
        got = run_on_ranks(target.world, train_on_from, target, str(tmp_path / "model.bin"))
    else:
        load = {"load_dir": folder, "tag": "saved", restart.how: restart.how == "load_module_only"}
        results = run_on_ranks(target.world, run_stretch, target, Stretch(start=SAVED_AT, stop=END, load=load))
        assert results[0].extra.kinds == ["sam", "base", "base", "sam", "reuse"]
        got = [result.weights for result in results]

    reference, module, groups = start_oracle(target)
    whole = torch.cat([saved[name].double().reshape(-1) for group in groups for name in group.names])
    reference.w = whole.to(torch.bfloat16).double() if target.precision == "bf16" else whole
    assert WINDOW == target.world * target.accumulation == source.world * source.accumulation
    for update in range(SAVED_AT, END):
        reference.update(target.window(update))
    expected = named(reference.w, module, groups)
    for weights in got:
        error = distance(weights, expected)
        assert error <= TOLERANCE[target.precision], f"{error:.2e}"


@pytest.mark.parametrize("restart", RESTARTS, ids=str)
def test_restarts(restart: Restart, tmp_path: Path) -> None:
    _restart(restart, tmp_path)


@pytest.mark.grid
@pytest.mark.parametrize("restart", MORE_RESTARTS, ids=str)
def test_more_restarts(restart: Restart, tmp_path: Path) -> None:
    _restart(restart, tmp_path)

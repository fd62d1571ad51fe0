"""A run that stops and goes on is the run that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .checkpoints import Outcome, Stretch, run_stretch
from .ranks import run_on_ranks
from .training import Case, Result


def same_bits(got: Result, expected: Result) -> None:
    assert got.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(got.weights[name], weight), name
        assert torch.equal(got.model_weights[name], expected.model_weights[name]), name


TORCH_ADAM = {"torch_adam": True}
"""On a CPU the last bit of DeepSpeed's FusedAdam depends on what the process computed before: it keeps beta^t in a
static variable, multiplied from step to step, but taken from pow() where a step does not follow the last one."""

CASES = [
    Case(stage=0, world=1, model="mlp", params=TORCH_ADAM),
    Case(stage=2, world=1, model="tied", accumulation=3, base="SGD"),
    Case(stage=0, world=2, model="tied", two_groups=True, params=TORCH_ADAM),
    Case(stage=1, world=2, model="straddling", two_groups=True, clipping=0.05, params=TORCH_ADAM),
    Case(stage=2, world=2, model="random-3", base="SGD", alpha=0.7),
    Case(stage=3, world=2, model="dead_and_frozen", two_groups=True, params=TORCH_ADAM),
    Case(stage=3, world=4, model="mlp", zero={"stage3_param_persistence_threshold": 0}, params=TORCH_ADAM),
    Case(stage=2, world=4, model="tiny", params=TORCH_ADAM),
    Case(stage=1, world=2, model="mlp", precision="bf16", params=TORCH_ADAM),
    Case(stage=3, world=2, model="straddling", precision="bf16", accumulation=3, params=TORCH_ADAM),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"stage{c.stage}-world{c.world}-{c.model}-{c.precision}")
def test_resume_in_the_middle_of_a_cycle_is_bit_exact(case: Case, tmp_path: Path) -> None:
    save = Stretch(save={"save_dir": str(tmp_path)}, save_at=7)  # k = 3: one reuse step of the cycle is done
    whole = run_on_ranks(case.world, run_stretch, case, save)
    resumed = run_on_ranks(case.world, run_stretch, case, Stretch(start=7, load={"load_dir": str(tmp_path)}))
    for got, expected in zip(resumed, whole, strict=True):
        same_bits(got, expected)
        outcome: Outcome = got.extra
        assert outcome.kinds == expected.extra.kinds[7:]
        assert outcome.status == expected.extra.status
        assert outcome.client_state is not None and "ds_looksam" not in outcome.client_state
    files = {path.name for path in (tmp_path / "global_step7").glob("looksam*")}
    files_of_g_v = 1 if case.stage == 0 else case.world
    assert files == {"looksam.json", *(f"looksam_rank_{r:05d}.safetensors" for r in range(files_of_g_v))}

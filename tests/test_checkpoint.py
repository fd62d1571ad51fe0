"""A run that stops and goes on is the run that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .checkpoints import Outcome, Stretch, run_stretch
from .ranks import run_on_ranks
from .training import Case, Result, distance


def same_bits(got: Result, expected: Result) -> None:
    assert got.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(got.weights[name], weight), name
        assert torch.equal(got.model_weights[name], expected.model_weights[name]), name


def _id(case: Case) -> str:
    offload = "-offload" if case.zero else ""
    return f"stage{case.stage}-world{case.world}-{case.model}-{case.precision}{offload}-{case.ascent}"


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = [
    Case(stage=0, world=1, model="mlp"),
    Case(stage=2, world=1, model="tied", accumulation=3, base="SGD"),
    Case(stage=0, world=2, model="tied", two_groups=True),
    Case(stage=1, world=2, model="straddling", two_groups=True, clipping=0.05),
    Case(stage=2, world=2, model="random-3", alpha=0.7),
    Case(stage=3, world=2, model="dead_and_frozen", two_groups=True),
    Case(stage=3, world=4, model="mlp", zero={"stage3_param_persistence_threshold": 0}),
    Case(stage=2, world=4, model="tiny"),
    Case(stage=3, world=2, model="straddling", precision="bf16", accumulation=3),
    Case(stage=1, world=2, model="mlp", precision="bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}),
    Case(stage=0, world=2, model="mlp", precision="bf16"),
    Case(stage=2, world=2, model="mlp", precision="fp16", config={"fp16": {"enabled": True, "loss_scale_window": 4}}),
    Case(stage=2, world=2, model="mlp", zero=OFFLOAD, params={"v_dtype": "bf16"}),
    Case(stage=3, world=2, model="tied", precision="bf16", zero=OFFLOAD),
    # Rounded at random, alike before and after
    Case(stage=2, world=2, model="straddling", precision="bf16", rounding="stochastic"),
    Case(stage=0, world=2, model="tied", precision="bf16", rounding="stochastic", ascent="rank", accumulation=2),
    Case(stage=1, world=2, model="straddling", precision="bf16", rounding="stochastic", ascent="rank"),
    Case(stage=2, world=2, model="mlp", precision="fp16", rounding="stochastic", ascent="micro_batch", accumulation=2),
    Case(stage=3, world=2, model="mlp", precision="bf16", rounding="stochastic", ascent="global_micro_batch",
         accumulation=2),
]


@pytest.mark.parametrize("case", CASES, ids=_id)
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


@pytest.mark.parametrize("case", [Case(stage=2, model="tiny", updates=40), Case(stage=1, zero=OFFLOAD, updates=40)],
                         ids=["FusedAdam", "DeepSpeedCPUAdam"])
def test_late_resume_on_a_cpu_adam_is_bit_exact(case: Case, tmp_path: Path) -> None:
    """Their beta^t comes from another formula after a load, which shows in the last bits of late steps."""
    whole = run_on_ranks(2, run_stretch, case, Stretch(stop=40, save={"save_dir": str(tmp_path)}, save_at=31))
    run_on_ranks(2, run_stretch, case, Stretch(stop=1))  # what another process would not have computed before
    resumed = run_on_ranks(2, run_stretch, case, Stretch(start=31, stop=40, load={"load_dir": str(tmp_path)}))
    for got, expected in zip(resumed, whole, strict=True):
        same_bits(got, expected)


OLD = Path(__file__).parent / "data" / "checkpoint-0.1"
"""Written by version 0.1.0, in mid-cycle at update 7 of 12; beside it the weights with which that run ended."""


def test_a_checkpoint_of_0_1_goes_on() -> None:
    case = Case(base="SGD")
    load = {"load_dir": str(OLD), "tag": "of-0.1"}
    results = run_on_ranks(case.world, run_stretch, case, Stretch(start=7, load=load))
    expected = load_file(OLD / "weights_at_12.safetensors")
    for result in results:
        assert result.extra.kinds == ["reuse", "reuse", "sam", "reuse", "reuse"] and result.updates == 12
        # The same bits on the release of torch that wrote it; another may add up in another order, at 6e-8 an update.
        assert distance(result.weights, expected) <= 1e-6

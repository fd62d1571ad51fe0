"""Into LookSAM, out of it, with other settings, and what the outside world reads from a checkpoint."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from .checkpoints import Stretch, run_stretch
from .ranks import run_on_ranks
from .training import DTYPES, Case, Result, distance, engine_for, master_weights, named, train_window, visible_weights

STAGES = [0, 2, 3]


def _same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def _first(case: Case, stretch: Stretch) -> Result:
    return run_on_ranks(case.world, run_stretch, case, stretch)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_plain_run_goes_on_with_looksam(stage: int, tmp_path: Path) -> None:
    """The reference: the oracle, whose first 5 updates have rho 0 and alpha 0, so that they are plain."""
    from . import oracle

    case = Case(stage=stage, two_groups=True, model="tied", alpha=0.7, updates=12)
    _first(case, Stretch(stop=5, looksam=False, save={"save_dir": str(tmp_path)}, save_at=5))
    result = _first(case, Stretch(start=5, load={"load_dir": str(tmp_path)}))

    from .models import make_model

    module = make_model(case.model, case.seed)
    groups = case.oracle_groups(module)
    reference = oracle.build(module, groups, base=case.base, k=case.k)
    radii = [group.rho for group in groups]
    for group in groups:
        group.rho, group.alpha = 0.0, 0.0
    for update in range(5):
        reference.update(case.window(update))
    reference.t, reference.v, reference.beta = 0, None, None
    for group, rho in zip(groups, radii, strict=True):
        group.rho, group.alpha = rho, 0.7
    for update in range(5, 12):
        reference.update(case.window(update))
    # As in test_oracle_grid.py: fp32 rounds at 6e-8, and a run is thousands of operations.
    assert distance(result.weights, named(reference.w, module, groups)) <= 1e-5
    assert result.extra.kinds == ["sam", "reuse", "reuse", "sam", "reuse", "reuse", "sam"]
    assert any("starts anew" in line for line in result.extra.log)
    assert [group["rho"] for group in result.extra.groups] == radii


@pytest.mark.parametrize("stage", STAGES)
def test_a_looksam_run_goes_on_plain(stage: int, tmp_path: Path) -> None:
    """The reference: LookSAM going on with rho 0 and alpha 0, which is the base optimizer bit for bit.

    SGD, because on a CPU the last bit of DeepSpeed's FusedAdam depends on what the process computed before.
    """
    case = Case(stage=stage, two_groups=True, model="mlp", base="SGD")
    load = {"load_dir": str(tmp_path)}
    _first(case, Stretch(stop=5, save={"save_dir": str(tmp_path)}, save_at=5))
    plain = _first(case, Stretch(start=5, stop=9, load=load, looksam=False))
    reference = _first(replace(case, rho=0.0, alpha=0.0), Stretch(start=5, stop=9, load=load))
    _same_bits(plain.weights, reference.weights)


def _change_rho(engine: Any) -> None:
    for group in engine.optimizer.param_groups:
        group["rho"] = group["rho"] / 4


def test_the_configuration_wins_and_the_log_says_so(tmp_path: Path) -> None:
    case = Case(k=3, rho=0.1, alpha=0.7)
    load = {"load_dir": str(tmp_path)}
    # A schedule has changed rho since initialize: it goes on where the configuration is the same.
    _first(case, Stretch(stop=5, save={"save_dir": str(tmp_path)}, save_at=5, in_engine=_change_rho))
    same = _first(case, Stretch(start=5, stop=6, load=load))
    assert same.extra.groups[0]["rho"] == 0.1 / 4
    assert not any("the configuration wins" in line for line in same.extra.log)

    other = _first(replace(case, k=2, rho=0.3, alpha="auto"), Stretch(start=5, stop=7, load=load))
    assert (other.extra.groups[0]["rho"], other.extra.groups[0]["alpha"]) == (0.3, "auto")
    assert other.extra.kinds == ["reuse", "sam"]  # updates 5 and 6 of k = 2
    told = next(line for line in other.extra.log if "the configuration wins" in line)
    for change in "k: 3 -> 2", "rho: 0.1 -> 0.3", "alpha: 0.7 -> 'auto'", "param_groups[0].rho: 0.025 -> 0.3":
        assert change in told


def test_another_base_optimizer_is_refused(tmp_path: Path) -> None:
    case = Case(base="AdamW")
    for looksam in True, False:
        folder = tmp_path / str(looksam)
        _first(case, Stretch(stop=2, save={"save_dir": str(folder)}, save_at=2, looksam=looksam))
        other = replace(case, base="SGD")
        for result in run_on_ranks(2, run_stretch, other,
                                   Stretch(stop=0, load={"load_dir": str(folder)}, expects_error=True)):
            assert result.extra.untouched
            assert "'AdamW'" in result.extra.error and "'SGD'" in result.extra.error
            assert "optimizer.params.base_optimizer" in result.extra.error
    # The weights alone are no problem.
    alone = {"load_dir": str(folder), "load_module_only": True}
    _first(replace(case, base="SGD"), Stretch(start=2, stop=3, load=alone))


@pytest.mark.parametrize(("stage", "partly"), [(0, "load_module_only"), (3, "load_module_only"),
                                               (2, "load_optimizer_states"), (3, "load_optimizer_states"),
                                               (2, "load_looksam_states")])
def test_loading_a_part_starts_with_a_sam_step(stage: int, partly: str, tmp_path: Path) -> None:
    case = Case(stage=stage)
    saved = _first(case, Stretch(stop=4, save={"save_dir": str(tmp_path)}, save_at=4))
    load = {"load_dir": str(tmp_path), partly: partly == "load_module_only"}
    result = _first(case, Stretch(start=4, stop=4, load=load))
    _same_bits(result.weights, saved.weights)
    _same_bits(result.model_weights, saved.model_weights)
    assert (result.extra.status["updates"], result.extra.g_v, result.extra.status["beta"]) == (0, None, None)
    result = _first(case, Stretch(start=4, stop=6, load=load))
    assert result.extra.kinds == ["sam", "base"]


def consolidate(case: Case, folder: str) -> dict[str, Any]:
    """On a rank: train until the last step was a SAM step, save in every way, and say what the weights are."""
    config = {"stage3_gather_16bit_weights_on_model_save": True} if case.stage == 3 else {}
    with engine_for(replace(case, zero={**case.zero, **config})) as engine:
        for update in range(4):  # k = 3: update 3 is a SAM step
            train_window(engine, case, update)
        assert engine.looksam.step_kind == "sam"
        engine.save_checkpoint(folder)
        engine.save_16bit_model(folder, "model.bin")
        return {"master": master_weights(engine), "model": visible_weights(engine)}


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_the_outside_world_reads_clean_weights_after_a_sam_step(stage: int, precision: str, tmp_path: Path) -> None:
    case = Case(stage=stage, precision=precision, model="straddling", rho=1.0)
    weights = run_on_ranks(2, consolidate, case, str(tmp_path))[0]
    model = torch.load(tmp_path / "model.bin", weights_only=True)
    _same_bits(model, weights["model"])
    if stage > 0:
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        convert_zero_checkpoint_to_fp32_state_dict(str(tmp_path), str(tmp_path / "fp32"))
        _same_bits(torch.load(tmp_path / "fp32" / "pytorch_model.bin", weights_only=True), weights["master"])
        assert os.access(tmp_path / "zero_to_fp32.py", os.X_OK)
    _same_bits({name: w.to(DTYPES[precision]) for name, w in weights["master"].items()}, weights["model"])

"""A run that stops and goes on is the run that never stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoints import Stretch, run_stretch, same_bits
from .models import make_model
from .ranks import run_on_ranks
from .training import Case, Result, batches_for, distance, engine_for, master_weights, train_window
from .twin import Net, batches, engine_of

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = [
    Case(stage=0, world=1, model="mlp"),
    Case(stage=2, world=1, model="tied", accumulation=3, base="SGD"),
    Case(stage=0, world=2, model="tied", two_groups=True),
    Case(stage=1, world=2, model="straddling", two_groups=True, clipping=0.05),
    Case(stage=3, world=2, model="dead_and_frozen", two_groups=True),
    Case(stage=3, world=4, model="mlp", zero={"stage3_param_persistence_threshold": 0}),
    Case(stage=2, world=4, model="tiny", alpha=0.7),
    Case(stage=3, world=2, model="straddling", precision="bf16", accumulation=3),
    Case(stage=1, world=2, model="mlp", precision="bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}),
    Case(stage=2, world=2, model="mlp", precision="fp16", config={"fp16": {"enabled": True, "loss_scale_window": 4}}),
    Case(stage=2, world=2, model="mlp", zero=OFFLOAD, params={"v_dtype": "bf16"}),
    Case(stage=3, world=2, model="tied", precision="bf16", zero=OFFLOAD),
    # Rounded at random, alike before and after
    Case(stage=2, world=2, model="straddling", precision="bf16", rounding="stochastic"),
    Case(stage=0, world=2, model="tied", precision="bf16", rounding="stochastic", ascent="rank", accumulation=2),
    Case(stage=2, world=2, model="mlp", precision="fp16", rounding="stochastic", ascent="micro_batch", accumulation=2),
    Case(stage=3, world=2, model="mlp", precision="bf16", rounding="stochastic", ascent="global_micro_batch",
         accumulation=2),
]
# CPU Adams (FusedAdam's, DeepSpeedCPUAdam): their beta^t comes from another formula after a load, which shows in the
# last bits of late steps.
LATE = [Case(stage=2, model="tiny", updates=40), Case(stage=1, zero=OFFLOAD, updates=40)]


def _id(case: Case) -> str:
    offload = "-offload" if case.zero else ""
    return f"stage{case.stage}-world{case.world}-{case.model}-{case.precision}{offload}-{case.ascent}"


def _resume(case: Case, save_at: int, tmp_path: Path, tag: str | None = None) -> None:
    save = Stretch(stop=case.updates, save={"save_dir": str(tmp_path)}, tags=(tag, ), save_at=save_at)
    whole = run_on_ranks(case.world, run_stretch, case, save)
    if case in LATE:
        run_on_ranks(case.world, run_stretch, case, Stretch(stop=1))  # what another process would not have computed
    load = Stretch(start=save_at, stop=case.updates, load={"load_dir": str(tmp_path)})
    for got, expected in zip(run_on_ranks(case.world, run_stretch, case, load), whole, strict=True):
        same_bits(got.weights, expected.weights)
        same_bits(got.model_weights, expected.model_weights)
        assert got.extra.kinds == expected.extra.kinds[save_at:]
        assert got.extra.status == expected.extra.status
        assert got.extra.client_state is not None and "ds_looksam" not in got.extra.client_state
    folder = tmp_path / (tag or f"global_step{save_at}")
    assert (tmp_path / "latest").read_text() == str(folder.relative_to(tmp_path))
    files = {path.name for path in folder.glob("looksam*")}
    files_of_g_v = 1 if case.stage == 0 else case.world
    assert files == {"looksam.json", *(f"looksam_rank_{r:05d}.safetensors" for r in range(files_of_g_v))}


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_resume_in_the_middle_of_a_cycle_is_bit_exact(case: Case, tmp_path: Path) -> None:
    _resume(replace(case, updates=8), 5, tmp_path)  # k = 3: one reuse step of the cycle is done


@pytest.mark.parametrize("case", LATE, ids=_id)
def test_late_resume_on_a_cpu_adam_is_bit_exact(case: Case, tmp_path: Path) -> None:
    _resume(case, 31, tmp_path)


def train_with_an_empty_group(case: Case, folder: str, with_it: bool) -> dict[str, Tensor]:
    """On a rank: as code that splits parameters by weight decay makes one, where nothing of a kind is trained."""
    module = make_model(case.model, case.seed)
    groups = case.model_parameters(module)
    empty = {"params": [], "lr": 1.0, "rho": 1.0, "alpha": 0.7}
    with mock.patch.object(Case, "model_parameters", lambda *_: [empty] * with_it + groups), engine_for(
            case, module=module) as engine:
        for update in range(2):
            train_window(engine, case, update)
        engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)
        for update in range(2, case.updates):
            train_window(engine, case, update)
        return master_weights(engine)


def test_an_empty_param_group_changes_nothing(tmp_path: Path) -> None:
    case = Case(stage=2, world=1, two_groups=True, updates=5, k=2, params={"rho_schedule": {"type": "lr"}})
    expected, got = (run_on_ranks(1, train_with_an_empty_group, case, str(tmp_path / str(with_it)), with_it)[0]
                     for with_it in (False, True))
    same_bits(got, expected)


@pytest.mark.parametrize(("older", "stage", "looksam"), [(2, 3, False), (0, 3, True), (3, 1, True)])
def test_an_older_run_at_another_stage_has_saved_there(older: int, stage: int, looksam: bool, tmp_path: Path) -> None:
    """DeepSpeed's tags are alike, and the files of one stage have other names than those of another."""
    case = Case(stage=older, world=2, model="mlp", updates=8)
    save = Stretch(stop=5, save={"save_dir": str(tmp_path)}, save_at=5, looksam=looksam)
    run_on_ranks(2, run_stretch, case, save)
    _resume(replace(case, stage=stage), 5, tmp_path)


def test_a_tag_may_be_several_folders_deep(tmp_path: Path) -> None:
    _resume(Case(world=1, updates=6), 4, tmp_path, "epoch-1/last")
    assert not (tmp_path / "last").exists()


THAWING, FREEZING, BOTH = [0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1]
"""Whether a layer is trained in each update."""


def resume_while_layers_are_frozen(trained: list[int], ascent: str, folder: str, before: bool) -> None:
    """``before``: the layer's flag is set before the load, to what it was at the save."""
    def run(updates: range) -> dict[str, Tensor]:
        for update in updates:
            engine.module.body[0].requires_grad_(bool(trained[update]))
            for x, y in batches(1)[update % 4]:
                engine.backward(nn.functional.mse_loss(engine(x.float()), y.float()))
                engine.step()
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}

    with engine_of(Net, 0, ascent=ascent) as engine:
        run(range(3))
        engine.save_checkpoint(folder)
        expected = run(range(3, 6))
    with engine_of(Net, 0, ascent=ascent) as engine:
        if before:
            engine.module.body[0].requires_grad_(bool(trained[2]))
        engine.load_checkpoint(folder)
        same_bits(run(range(3, 6)), expected)
        engine.load_checkpoint(folder)  # into an engine that has trained
        same_bits(run(range(3, 6)), expected)


@pytest.mark.parametrize(("trained", "ascent"), [(THAWING, "global"), (THAWING, "rank"), (FREEZING, "global"),
                                                 (FREEZING, "micro_batch"), (BOTH, "global")])
@pytest.mark.parametrize("before", [False, True])
def test_resume_while_layers_are_frozen(trained: list[int], ascent: str, before: bool, tmp_path: Path) -> None:
    run_on_ranks(1, resume_while_layers_are_frozen, trained, ascent, str(tmp_path), before)


def load_in_mid_window(case: Case, begins: bool, folder: str) -> Result:
    """``begins``: half a window of other data runs before the load."""
    def run(update: int, micro_batches: slice) -> None:
        for i, (x, y) in list(enumerate(batches_for(engine, case, update)))[micro_batches]:
            engine.set_gradient_accumulation_boundary(i == 1)
            engine.backward(engine(x, y))
            engine.step()

    with engine_for(case) as engine:
        for update in range(2):
            run(update, slice(None))
        engine.save_checkpoint(folder)
        run(2, slice(None))
        if begins:
            run(5, slice(1))
        engine.load_checkpoint(folder)
        for update in range(2, 5):
            run(update, slice(None))
        return Result(weights=master_weights(engine), updates=engine.looksam.updates)


@pytest.mark.parametrize("case", [
    Case(stage=stage, world=1, accumulation=2, k=2, base="SGD", precision=precision, **case)
    for stage, precision, case in [
        (0, "fp32", {}), (0, "bf16", {}), (1, "fp32", {}),
        (1, "bf16", {"config": {"data_types": {"grad_accum_dtype": "fp32"}}}),
        (2, "fp32", {}), (2, "fp32", {"ascent": "micro_batch"}), (2, "fp16", {"ascent": "rank"}),
        (2, "fp32", {"zero": OFFLOAD}), (3, "fp32", {}), (3, "bf16", {"zero": OFFLOAD})]], ids=_id)
def test_a_window_that_had_begun_before_a_load_is_forgotten(case: Case, tmp_path: Path) -> None:
    expected, got = (run_on_ranks(1, load_in_mid_window, case, begins, str(tmp_path / str(begins)))[0]
                     for begins in (False, True))
    same_bits(got.weights, expected.weights)
    assert got.updates == expected.updates == 5


OLD = Path(__file__).parent / "data" / "checkpoint-0.1"
"""Written by version 0.1.0, in mid-cycle at update 7 of 12; beside it the weights with which that run ended."""


def test_a_checkpoint_of_0_1_goes_on() -> None:
    case = Case(base="SGD")
    load = {"load_dir": str(OLD), "tag": "of-0.1"}
    expected = load_file(OLD / "weights_at_12.safetensors")
    for result in run_on_ranks(case.world, run_stretch, case, Stretch(start=7, load=load)):
        assert result.extra.kinds == ["reuse", "reuse", "sam", "reuse", "reuse"] and result.updates == 12
        # The same bits on the release of torch that wrote it; another may add up in another order, at 6e-8 an update.
        assert distance(result.weights, expected) <= 1e-6


def _change_rho(engine: Any) -> None:
    for group in engine.optimizer.param_groups:
        group["rho"] = group["rho"] / 4


def test_the_configuration_wins_and_the_log_says_so(tmp_path: Path) -> None:
    case = Case(k=3, rho=0.1, alpha=0.7)
    load = {"load_dir": str(tmp_path)}
    # A schedule has changed rho since initialize: it goes on where the configuration is the same.
    save = Stretch(stop=5, save={"save_dir": str(tmp_path)}, save_at=5, in_engine=_change_rho)
    run_on_ranks(2, run_stretch, case, save)
    same = run_on_ranks(2, run_stretch, case, Stretch(start=5, stop=6, load=load))[0].extra
    assert same.groups[0]["rho"] == 0.1 / 4
    assert not any("the configuration wins" in line for line in same.log)

    case = replace(case, k=2, rho=0.3, alpha="auto")
    other = run_on_ranks(2, run_stretch, case, Stretch(start=5, stop=7, load=load))[0].extra
    assert (other.groups[0]["rho"], other.groups[0]["alpha"]) == (0.3, "auto")
    assert other.kinds == ["reuse", "sam"]  # updates 5 and 6 of k = 2
    told = next(line for line in other.log if "the configuration wins" in line)
    for change in "k: 3 -> 2", "rho: 0.1 -> 0.3", "alpha: 0.7 -> 'auto'", "param_groups[0].rho: 0.025 -> 0.3":
        assert change in told

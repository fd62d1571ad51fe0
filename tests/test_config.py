"""The JSON block: what it accepts, what it refuses with which words, and that it changes nothing for anybody else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ds_looksam import LookSAMConfigError
from ds_looksam.config.params import parse_params

from .ranks import run_on_ranks
from .training import Case, distance, engine_for, make_model, master_weights, run_oracle, train_window


def test_defaults() -> None:
    config, rest = parse_params(None)
    assert (config.k, config.rho, config.alpha, config.base_optimizer) == (5, 0.05, "auto", "AdamW")
    assert rest == {}


def test_other_keys_go_to_the_base_optimizer_unchanged() -> None:
    betas = [0.9, 0.95]
    config, rest = parse_params({"k": 2, "lr": 1e-3, "betas": betas, "torch_adam": True})
    assert config.k == 2
    assert rest == {"lr": 1e-3, "betas": betas, "torch_adam": True}


@pytest.mark.parametrize("params, key", [
    ({"k": 0}, "k"), ({"k": 2.0}, "k"), ({"k": "5"}, "k"), ({"k": True}, "k"),
    ({"rho": -0.1}, "rho"), ({"rho": float("nan")}, "rho"), ({"rho": float("inf")}, "rho"), ({"rho": "auto"}, "rho"),
    ({"alpha": -1}, "alpha"), ({"alpha": "Auto"}, "alpha"), ({"alpha": None}, "alpha"),
    ({"base_optimizer": ""}, "base_optimizer"), ({"base_optimizer": 3}, "base_optimizer"),
    ({"lr": -1.0}, "lr"), ({"lr": "auto"}, "lr"), ({"betas": [0.9, 1.0]}, "betas"), ({"betas": [0.9]}, "betas"),
    ({"eps": -1e-8}, "eps"), ({"weight_decay": "0.1"}, "weight_decay"), ({"momentum": float("inf")}, "momentum"),
])  # yapf: disable
def test_wrong_values_name_the_key(params: dict[str, Any], key: str) -> None:
    with pytest.raises(LookSAMConfigError, match=rf"optimizer\.params\.{key}: ") as error:
        parse_params(params)
    if params[key] == "auto":
        assert "Hugging Face" in str(error.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(LookSAMConfigError) as error:
        parse_params({"k": 0, "rho": -1, "alpha": "atuo", "betas": [0.9, 1.0], "rho_schedule": {"typ": "lr"}})
    for words in ("params.k: ", "params.rho: ", '"calibrated"', "params.betas: ", "Did you mean 'type'?"):
        assert words in str(error.value)


def sgd_without_the_flag(case: Case) -> tuple[dict[str, torch.Tensor], bool]:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    with engine_for(case, adapt=lambda config: config.pop("zero_allow_untested_optimizer")) as engine:
        for update in range(case.updates):
            train_window(engine, case, update)
        return master_weights(engine), torch.optim.SGD in ZERO_SUPPORTED_OPTIMIZERS


@pytest.mark.parametrize("stage", [1, 3])
def test_bases_tested_with_zero_need_no_flag(stage: int) -> None:
    """DeepSpeed asks for "zero_allow_untested_optimizer" with SGD; its own list is as it was afterwards."""
    case = Case(world=1, stage=stage, base="SGD", updates=4)
    weights, listed = run_on_ranks(1, sgd_without_the_flag, case)[0]
    assert distance(weights, run_oracle(case)[1]) <= 1e-5 and not listed  # fp32 against float64


# Nobody else notices --------------------------------------------------------------------------------------------------


def engines_with_and_without(case: Case) -> dict[str, Any]:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    import ds_looksam

    seen: dict[str, Any] = {"registered": ds_looksam.is_registered()}
    with engine_for(case, looksam=False) as engine:
        seen["plain"] = type(engine) is DeepSpeedEngine
    ds_looksam.unregister()
    try:
        # DeepSpeed itself does not know the name, and says so in its own way.
        with pytest.raises(AssertionError, match="LookSAM is not a supported DeepSpeed Optimizer"), engine_for(case):
            pass
        module = make_model(case.model)
        engine, *_ = ds_looksam.initialize(model=module, config=case.json(),
                                           model_parameters=case.model_parameters(module))
        seen["initialize"] = isinstance(engine, ds_looksam.LookSAMEngine)
        seen["not registered by it"] = not ds_looksam.is_registered()
        for update in range(case.updates):  # an engine goes on without the registration
            train_window(engine, case, update)
        seen["weights"] = master_weights(engine)
        engine.destroy()
        assert deepspeed.DeepSpeedEngine is DeepSpeedEngine
    finally:
        ds_looksam.register()
    return seen


def test_registration_touches_only_configurations_that_name_looksam() -> None:
    case = Case(world=1, updates=4)
    seen = run_on_ranks(1, engines_with_and_without, case)[0]
    assert distance(seen.pop("weights"), run_oracle(case)[1]) <= 1e-5
    assert all(seen.values()), seen


def group_changes(case: Case) -> tuple[dict[str, torch.Tensor], str]:
    """Change rho, alpha and lr of the groups between updates, as a scheduler would; then write a wrong value."""
    with engine_for(case) as engine:
        for update in range(case.updates):
            if update == 3:
                for group in engine.optimizer.param_groups:
                    group.update(rho=group["rho"] * 2, alpha=0.3, lr=group["lr"] / 2)
            train_window(engine, case, update)
        weights = master_weights(engine)
        engine.optimizer.param_groups[1]["rho"] = -1.0
        try:
            train_window(engine, case, case.updates)
        except LookSAMConfigError as error:
            unchanged = all(torch.equal(w, weights[n]) for n, w in master_weights(engine).items())
            return weights, str(error) if unchanged else "weights changed"
        return weights, "nothing was raised"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_param_groups_can_be_changed_during_training(stage: int) -> None:
    from . import oracle

    case = Case(world=2, stage=stage, two_groups=True, alpha=0.7, updates=7)
    module = make_model(case.model, case.seed)
    groups = case.oracle_groups(module)
    reference = oracle.build(module, groups, base=case.base, k=case.k)
    for update in range(case.updates):
        if update == 3:
            for group in groups:
                group.rho, group.alpha, group.lr = group.rho * 2, 0.3, group.lr / 2
        reference.update(case.window(update))
    from .training import named

    expected = named(reference.w, module, groups)
    for weights, message in run_on_ranks(2, group_changes, case):
        assert distance(weights, expected) <= 1e-5
        assert "param_groups[1].rho" in message


def with_scheduler(case: Case) -> tuple[dict[str, torch.Tensor], list[float]]:
    with engine_for(case) as engine:
        lrs = []
        for update in range(case.updates):
            lrs.append(engine.get_lr()[0])
            train_window(engine, case, update)
        return master_weights(engine), lrs


@pytest.mark.parametrize("stage", [0, 2])
def test_a_deepspeed_scheduler_reaches_the_base_optimizer(stage: int) -> None:
    from . import oracle
    from .training import named

    case = Case(world=2, stage=stage, updates=6, config={"scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 1e-3, "warmup_max_lr": 1e-2, "warmup_num_steps": 3, "total_num_steps": 8,
                   "warmup_type": "linear"}}})  # yapf: disable
    results = run_on_ranks(2, with_scheduler, case)
    module = make_model(case.model, case.seed)
    groups = case.oracle_groups(module)
    reference = oracle.build(module, groups, base=case.base, k=case.k)
    for update, lr in enumerate(results[0][1]):
        groups[0].lr = lr
        reference.update(case.window(update))
    assert len(set(results[0][1])) > 3, "the schedule was meant to move"
    assert distance(results[0][0], named(reference.w, module, groups)) <= 1e-5


def test_a_plain_run_is_untouched_to_the_bit() -> None:
    """Same JSON without LookSAM: with the package imported, unregistered, and registered again."""
    case = replace(Case(world=2, updates=5), stage=2)
    for results in zip(*run_on_ranks(2, plain_runs, case), strict=True):
        first = results[0]
        assert all(torch.equal(first[name], other[name]) for other in results for name in first)


def plain_runs(case: Case) -> list[dict[str, torch.Tensor]]:
    import ds_looksam

    runs = []
    for registered in (False, True):
        (ds_looksam.register if registered else ds_looksam.unregister)()
        with engine_for(case, looksam=False) as engine:
            for update in range(case.updates):
                train_window(engine, case, update)
            runs.append(master_weights(engine))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    return runs

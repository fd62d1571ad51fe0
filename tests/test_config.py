"""The JSON block: what it accepts, what it refuses with which words, and that it changes nothing for anybody else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_looksam import LookSAMConfigError
from ds_looksam.config.params import parse_params

from .models import make_model
from .ranks import run_on_ranks
from .training import Case, distance, engine_for, master_weights, named, run_oracle, start_oracle, train_window


def test_defaults_and_keys_of_the_base_optimizer() -> None:
    config, rest = parse_params(None)
    assert (config.k, config.rho, config.alpha, config.base_optimizer) == (5, 0.05, "auto", "AdamW") and rest == {}
    others = {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}
    config, rest = parse_params({"k": 2, **others})
    assert config.k == 2 and rest == others


@pytest.mark.parametrize("params, key", [
    ({"k": 0}, "k"), ({"k": 2.0}, "k"), ({"k": "5"}, "k"), ({"k": True}, "k"),
    ({"rho": -0.1}, "rho"), ({"rho": float("nan")}, "rho"), ({"rho": float("inf")}, "rho"), ({"rho": "auto"}, "rho"),
    ({"alpha": -1}, "alpha"), ({"alpha": "Auto"}, "alpha"), ({"alpha": None}, "alpha"),
    ({"base_optimizer": ""}, "base_optimizer"), ({"base_optimizer": 3}, "base_optimizer"),
    ({"layer_scale": "global"}, "layer_scale"), ({"layerwise": 1}, "layerwise"), ({"v_dtype": "fp16"}, "v_dtype"),
    ({"lr": -1.0}, "lr"), ({"lr": "auto"}, "lr"), ({"betas": [0.9, 1.0]}, "betas"), ({"betas": [0.9]}, "betas"),
    ({"eps": -1e-8}, "eps"), ({"weight_decay": "0.1"}, "weight_decay"), ({"momentum": float("inf")}, "momentum"),
])  # yapf: disable
def test_wrong_values_name_the_key(params: dict[str, Any], key: str) -> None:
    """All of several at once: tests/configurations.py."""
    with pytest.raises(LookSAMConfigError, match=rf"optimizer\.params\.{key}: ") as error:
        parse_params(params)
    if params[key] == "auto":
        assert "Hugging Face" in str(error.value)


# Nobody else notices --------------------------------------------------------------------------------------------------


def engines_with_and_without(case: Case) -> dict[str, Any]:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    import ds_looksam

    def plain_run() -> dict[str, Tensor]:
        with engine_for(case, looksam=False) as engine:
            assert type(engine) is DeepSpeedEngine
            for update in range(case.updates):
                train_window(engine, case, update)
            return master_weights(engine)

    seen: dict[str, Any] = {"registered": ds_looksam.is_registered()}
    plain = plain_run()
    ds_looksam.unregister()
    try:
        seen["same bits"] = all(torch.equal(plain[name], other) for name, other in plain_run().items())
        # DeepSpeed itself does not know the name, and says so in its own way.
        with pytest.raises(AssertionError, match="LookSAM is not a supported DeepSpeed Optimizer"), engine_for(case):
            pass
        module, config = make_model(case.model), case.json()
        config.pop("zero_allow_untested_optimizer")  # which DeepSpeed asks for with SGD
        engine, *_ = ds_looksam.initialize(model=module, config=config, model_parameters=case.model_parameters(module))
        seen["initialize"] = isinstance(engine, ds_looksam.LookSAMEngine)
        seen["not registered by it"] = not ds_looksam.is_registered()
        seen["DeepSpeed's list is as it was"] = torch.optim.SGD not in ZERO_SUPPORTED_OPTIMIZERS
        for update in range(case.updates):  # an engine goes on without the registration
            train_window(engine, case, update)
        seen["weights"] = master_weights(engine)
        engine.destroy()
    finally:
        ds_looksam.register()
    return seen


def test_registration_touches_only_configurations_that_name_looksam() -> None:
    case = Case(world=1, base="SGD", updates=4)
    seen = run_on_ranks(1, engines_with_and_without, case)[0]
    assert distance(seen.pop("weights"), run_oracle(case)[1]) <= 1e-5  # fp32 against float64
    assert all(seen.values()), seen


# During training ------------------------------------------------------------------------------------------------------


def group_changes(case: Case) -> tuple[dict[str, Tensor], str]:
    """Change rho, alpha and lr of the groups between updates, as a scheduler would; then write a wrong value."""
    with engine_for(case) as engine:
        for update in range(case.updates):
            if update == 3:
                for group in engine.optimizer.param_groups:
                    group.update(rho=group["rho"] * 2, alpha=0.3, lr=group["lr"] / 2)
            train_window(engine, case, update)
        weights = master_weights(engine)
        engine.optimizer.param_groups[1]["rho"] = -1.0
        with pytest.raises(LookSAMConfigError) as error:
            train_window(engine, case, case.updates)
        assert all(torch.equal(w, weights[n]) for n, w in master_weights(engine).items()), "weights changed"
        return weights, str(error.value)


@pytest.mark.parametrize("stage", [0, 3])
def test_param_groups_can_be_changed_during_training(stage: int) -> None:
    """A scheduler of lr on the other stages: test_schedules.py."""
    case = Case(stage=stage, two_groups=True, alpha=0.7, updates=7)
    reference, module, groups = start_oracle(case)
    for update in range(case.updates):
        if update == 3:
            for group in groups:
                group.rho, group.alpha, group.lr = group.rho * 2, 0.3, group.lr / 2
        reference.update(case.window(update))
    for weights, message in run_on_ranks(2, group_changes, case):
        assert distance(weights, named(reference.w, module, groups)) <= 1e-5
        assert "param_groups[1].rho" in message

"""LAMB and LARS alone on ZeRO shards ("ZeroLamb", "ZeroLars") against the float64 oracle, and as torch optimizers.

Under LookSAM they are in test_options.py, without ZeRO and with all their options in test_update.py.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_looksam
from ds_looksam.universal import convert

from .checkpoints import Stretch, run_stretch
from .covering import cases
from .ranks import run_on_ranks
from .test_options import FP32_SUMS, OFFLOAD, WHOLE
from .training import Case, distance, engine_for, master_weights, run_oracle, train


def reference(case: Case) -> dict[str, torch.Tensor]:
    """The base optimizer alone, by the oracle: SAM steps that perturb by nothing."""
    oracle, weights = run_oracle(replace(case, rho=0.0, k=1))
    assert not case.clipping or oracle.clipped > 0, "clipping was meant to bind"
    return weights


@pytest.mark.parametrize("base", ["Lamb", "Lars"])
def test_copies_and_state_dicts_go_on_as_the_original(base: str) -> None:
    def steps(optimizer: torch.optim.Optimizer) -> torch.Tensor:
        p = optimizer.param_groups[0]["params"][0]
        for i in range(3):
            p.grad = torch.arange(6.0).view(2, 3) - i
            optimizer.step()
        return p.detach().clone()

    optimizer = getattr(ds_looksam, base)([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)
    again = torch.nn.Parameter(steps(optimizer))
    copied, loaded = copy.deepcopy(optimizer), getattr(ds_looksam, base)([again], lr=0.7)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the moments
    expected = steps(optimizer)
    assert torch.equal(steps(copied), expected) and torch.equal(steps(loaded), expected)


SUB_GROUPS = {"sub_group_size": 40, "stage3_param_persistence_threshold": 0}
"""Elements: the models have some hundred, so every layer or two is a sub-group of its own."""
GRID = {
    "stage": [0, 1, 2, 3], "world": [1, 2, 4], "base": ["Lamb", "Lars"], "clipping": [0.0, 0.05],
    "accumulation": [1, 2], "two_groups": [False, True], "model": ["mlp", "dead_and_frozen", "straddling", "tiny"],
}  # yapf: disable


@pytest.mark.parametrize("case", cases(GRID, lambda row: Case(
    **row, updates=9, zero=SUB_GROUPS if row["stage"] == 3 and row["two_groups"] else {})))
def test_alone_matches_oracle(case: Case) -> None:
    expected = reference(case)
    results = run_on_ranks(case.world, train, case, False)
    for rank, result in enumerate(results):
        error = distance(result.weights, expected)
        # As in test_oracle_grid. One trust ratio for a flat shard, as FusedLamb would take it, is at 1e-1.
        assert error <= 1e-5, f"rank {rank}: relative error {error:.2e} for {case}"
        for name, weight in result.weights.items():
            assert torch.equal(weight, results[0].weights[name]), f"rank {rank} differs from rank 0 in {name}"
            assert torch.equal(result.model_weights[name], weight), f"rank {rank}: the model's {name} is an old one"


def test_flat_shards_without_binding_are_refused() -> None:
    """A ZeRO wrapper around a Lamb that the user built himself would give it one trust ratio per flat shard."""
    optimizer = ds_looksam.Lamb([torch.nn.Parameter(torch.ones(3, 2))])
    flat = torch.nn.Parameter(torch.ones(6))
    flat.grad = torch.ones(6)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match='"type": "ZeroLamb"'):
        optimizer.step()
    assert torch.equal(flat, torch.ones(6))


@pytest.mark.parametrize("base, arguments", [
    ("Lamb", {"lr": -1.0}), ("Lamb", {"eps": 0.0}), ("Lamb", {"betas": (0.9, 1.0)}), ("Lamb", {"weight_decay": -0.1}),
    ("Lamb", {"min_coeff": 2.0, "max_coeff": 1.0}), ("Lars", {"momentum": 1.0}), ("Lars", {"trust_coefficient": -1.0})
])
def test_values_out_of_range_are_refused(base: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        getattr(ds_looksam, base)([torch.nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize("case, looksam", [
    (Case(base="Lamb", stage=1, two_groups=True), False), (Case(base="Lamb", stage=3, zero=SUB_GROUPS), True),
    (Case(base="Lars", stage=2, two_groups=True, precision="bf16"), True), (Case(base="Lars", stage=0), False),
    (Case(base="Lamb", stage=1, precision="bf16", config=FP32_SUMS), False),
    (Case(base="Muon", stage=2, two_groups=True, zero=OFFLOAD), True), (Case(base="Muon", stage=3, zero=WHOLE), True),
], ids=lambda value: f"{value.base}-{value.stage}-{value.precision}" if isinstance(value, Case) else str(value))
def test_resumed_run_is_the_run_that_never_stopped(case: Case, looksam: bool, tmp_path: Path) -> None:
    """Bit for bit: moments, their bias correction's step, the param groups' keys and g_v come back."""
    whole, resumed = (run_on_ranks(2, run_stretch, case, Stretch(stop=7, looksam=looksam, **stretch)) for stretch in (
        {"save": {"save_dir": str(tmp_path)}, "save_at": 4}, {"start": 4, "load": {"load_dir": str(tmp_path)}}))
    for got, expected in zip(resumed, whole, strict=True):
        assert got.extra.kinds == expected.extra.kinds[4:]
        assert all(torch.equal(got.weights[name], weight) for name, weight in expected.weights.items())


def _run(case: Case, samples: Case, folder: str, first: int, last: int) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """With the windows of ``samples``, shared out among the ranks that are there: the weights, the groups' flags."""
    with engine_for(case, looksam=False) as engine:
        if first:
            engine.load_checkpoint(folder, tag="universal")
        flags = [group["trust_ratio"] for group in engine.optimizer.param_groups]
        for update in range(first, last):
            for x, y in samples.window(update)[engine.global_rank::case.world]:
                engine.backward(engine(x.float(), y))
                engine.step()
        engine.save_checkpoint(folder, tag=f"at{last}")
        return master_weights(engine), flags


def test_lamb_goes_on_at_another_world_size_and_stage(tmp_path: Path) -> None:
    """Two ranks on stage 2, then one on stage 3 with the same samples: the run that never stopped, by the oracle. A
    group without trust ratios stays without. (What else a group has of its own, DeepSpeed 0.19.8 loses.)"""
    case = Case(base="Lamb", stage=2, updates=8, two_groups=True, options={"weight_decay": 0.0})
    run_on_ranks(2, _run, case, case, str(tmp_path), 0, 4)
    convert(tmp_path / "at4", tmp_path / "universal")
    after = replace(case, world=1, accumulation=2, stage=3, config={"checkpoint": {"load_universal": True}})
    [(weights, flags)] = run_on_ranks(1, _run, after, case, str(tmp_path), 4, 8)
    assert flags == [True, False]
    assert distance(weights, reference(case)) <= 1e-5

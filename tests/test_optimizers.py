"""LAMB and LARS alone on ZeRO shards ("ZeroLamb", "ZeroLars") against the float64 oracle, and as torch optimizers.

Under Look-LayerSAM they are in test_layerwise_oracle.py, without ZeRO and with all their options in test_update.py.
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

from . import oracle
from .collectives import Collective, Recorder
from .covering import cases
from .models import make_model
from .ranks import run_on_ranks
from .training import Case, check_against_oracle, distance, engine_for, master_weights, named, train, train_window


def reference(case: Case) -> dict[str, torch.Tensor]:
    """The base optimizer alone, by the oracle: SAM steps that perturb by nothing."""
    module = make_model(case.model, case.seed)
    groups = [g for g in case.oracle_groups(module) if g.names]
    naive = oracle.build(module, [replace(g, rho=0.0) for g in groups], base=case.base, k=1, clipping=case.clipping)
    for update in range(case.updates):
        naive.update(case.window(update))
    if case.clipping:
        assert naive.clipped > 0, "clipping was meant to bind"
    return named(naive.w, module, groups)


@pytest.mark.parametrize("base", ["Lamb", "Lars"])
def test_copies_and_state_dicts_go_on_as_the_original(base: str) -> None:
    def steps(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter) -> torch.Tensor:
        for i in range(3):
            p.grad = torch.arange(6.0).view(2, 3) - i
            optimizer.step()
        return p.detach().clone()

    start = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = getattr(ds_looksam, base)([start], lr=0.1)
    steps(optimizer, start)
    copied = copy.deepcopy(optimizer)
    again = torch.nn.Parameter(start.detach().clone())
    loaded = getattr(ds_looksam, base)([again], lr=0.7)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the moments
    expected = steps(optimizer, start)
    assert torch.equal(steps(copied, copied.param_groups[0]["params"][0]), expected)
    assert torch.equal(steps(loaded, again), expected)


GRID = {
    "stage": [0, 1, 2, 3],
    "world": [1, 2, 4],
    "base": ["Lamb", "Lars"],
    "clipping": [0.0, 0.05],
    "accumulation": [1, 2],
    "two_groups": [False, True],
    "model": ["mlp", "dead_and_frozen", "straddling", "tiny"],
}


def _check_alone(case: Case) -> None:
    expected = reference(case)
    results = run_on_ranks(case.world, train, case, False)
    for rank, result in enumerate(results):
        error = distance(result.weights, expected)
        # As in test_oracle_grid. One trust ratio for a flat shard, as FusedLamb would take it, is at 1e-1.
        assert error <= 1e-5, f"rank {rank}: relative error {error:.2e} for {case}"
        for name, weight in result.weights.items():
            assert torch.equal(weight, results[0].weights[name]), f"rank {rank} differs from rank 0 in {name}"
            assert torch.equal(result.model_weights[name], weight), f"rank {rank}: the model's {name} is an old one"


@pytest.mark.parametrize("case", cases(GRID, lambda row: Case(**row)))
def test_alone_matches_oracle(case: Case) -> None:
    _check_alone(case)


SUB_GROUPS = {"sub_group_size": 40, "stage3_param_persistence_threshold": 0}
"""Elements: the models above have some hundred, so every layer or two is a sub-group of its own."""


@pytest.mark.parametrize("case", [Case(stage=3, base="Lamb", two_groups=True, zero=SUB_GROUPS),
                                  Case(stage=3, base="Lars", two_groups=True, model="straddling", zero=SUB_GROUPS)],
                         ids=lambda case: case.base)
def test_sub_groups_match_oracle(case: Case) -> None:
    _check_alone(case)


CPU = {"offload_optimizer": {"device": "cpu"}}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
UNDER_LOOKSAM = [
    Case(base="Lamb", stage=1, two_groups=True, clipping=0.05, zero=CPU),
    Case(base="Lars", stage=2, two_groups=True, model="sometimes", zero=CPU),
    Case(base="Lars", stage=3, two_groups=True, clipping=0.05, zero={**CPU, "sub_group_size": 40}),
    Case(base="Lamb", stage=3, model="sometimes", zero={**CPU, "offload_param": {"device": "cpu"}}),
    Case(base="Lamb", stage=2, two_groups=True, precision="bf16"),
    Case(base="Lars", stage=1, two_groups=True, precision="bf16", zero=CPU),
    Case(base="Lamb", stage=3, two_groups=True, precision="bf16", zero={**CPU, "sub_group_size": 40}),
    Case(base="Lars", stage=3, two_groups=True, precision="bf16", zero=SUB_GROUPS),
    Case(base="Lamb", stage=1, two_groups=True, precision="bf16", config=FP32_ACCUMULATION),  # BF16_Optimizer
    Case(base="Lars", stage=2, two_groups=True, precision="bf16", config=FP32_ACCUMULATION),
    Case(base="Lamb", stage=0, two_groups=True, precision="bf16"),  # FP16_UnfusedOptimizer
    Case(base="Lars", stage=2, two_groups=True, precision="fp16", loss_scale=128.0),
]


@pytest.mark.parametrize("case", UNDER_LOOKSAM,
                         ids=lambda c: "-".join([c.base, str(c.stage), c.precision, *c.zero, *c.config]))
def test_offload_and_bf16_under_look_layer_sam(case: Case) -> None:
    """The tolerances of test_offload; fp16 rounds at an eighth of bf16's. What is exact in low precision too: the
    model's weights are the rounded master's, also of shards that were copied before their update was known."""
    check_against_oracle(replace(case, layer_scale="norm"), {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}[case.precision])


def _collectives(case: Case) -> tuple[int, list[Collective], list[Collective]]:
    """Flat tensors a step walks through, and what is sent in one update: by the optimizer, and by AdamW."""
    sent = []
    for other in (case, replace(case, base="AdamW")):
        with engine_for(other, looksam=False) as engine:
            train_window(engine, other, 0)
            with Recorder() as recorder:
                train_window(engine, other, 1)
            sent.append(recorder.collectives)
            flats = len(getattr(engine.optimizer, "fp16_groups", engine.optimizer.param_groups))
    return flats, sent[0], sent[1]


@pytest.mark.parametrize("case", [Case(stage=2, base="Lamb", two_groups=True),
                                  Case(stage=3, base="Lars", two_groups=True, zero=SUB_GROUPS)],
                         ids=lambda case: f"stage{case.stage}")
def test_one_small_all_reduce_per_update(case: Case) -> None:
    """However many flat tensors the wrapper steps through: beside what AdamW sends, one vector of two per layer."""
    layers = sum(1 for _ in make_model(case.model).parameters())
    for flats, sent, plain in run_on_ranks(2, _collectives, case):
        assert flats >= 2
        extra = list(sent)
        for call in plain:
            extra.remove(call)
        assert extra == [Collective("allreduce", 8 * (2 * layers + 2), ranks=2)]


def test_flat_shards_without_binding_are_refused() -> None:
    """A ZeRO wrapper around a Lamb that the user built himself would give it one trust ratio per flat shard."""
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = ds_looksam.Lamb([weight])
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


def _initialize_error(case: Case) -> str:
    with pytest.raises(ds_looksam.LookSAMConfigError) as error, engine_for(case, looksam=False):
        pass
    return str(error.value)


@pytest.mark.parametrize("case, message", [
    (Case(base="Lamb", options={"trust_coefficient": 1.0}), "optimizer.params.trust_coefficient"),
    (Case(base="Lamb", options={"lr": -1.0}), "optimizer.params.lr"),
    (Case(base="Lars", zero={"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}, stage=3),
     "offload_optimizer.device"),
], ids=["key", "value", "nvme"])
def test_refused_at_initialize(case: Case, message: str) -> None:
    assert message in run_on_ranks(1, _initialize_error, replace(case, world=1))[0]


def _resumed(case: Case, looksam: bool, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a run, and of one that is saved in the middle and goes on in a new engine."""
    with engine_for(case, looksam) as engine:
        for update in range(case.updates):
            train_window(engine, case, update)
        whole = master_weights(engine)
    with engine_for(case, looksam) as engine:
        for update in range(case.updates // 2):
            train_window(engine, case, update)
        engine.save_checkpoint(folder)
    with engine_for(case, looksam, module=make_model(case.model, seed=99)) as engine:
        engine.load_checkpoint(folder)
        for update in range(case.updates // 2, case.updates):
            train_window(engine, case, update)
        return whole, master_weights(engine)


@pytest.mark.parametrize("case, looksam", [
    (Case(base="Lamb", stage=1, two_groups=True, updates=6, k=2), False),
    (Case(base="Lamb", stage=3, two_groups=True, updates=6, k=2, zero=SUB_GROUPS), True),
    (Case(base="Lars", stage=2, two_groups=True, updates=6, k=2, precision="bf16"), True),
    (Case(base="Lars", stage=0, updates=6, k=2), False),
    (Case(base="Lamb", stage=1, updates=6, k=2, precision="bf16", config=FP32_ACCUMULATION), False),
], ids=lambda value: f"{value.base}-{value.stage}-{value.precision}" if isinstance(value, Case) else str(value))
def test_resumed_run_is_the_run_that_never_stopped(case: Case, looksam: bool, tmp_path: Path) -> None:
    """Bit for bit: moments, their bias correction's step and the param groups' keys come back."""
    for whole, resumed in run_on_ranks(2, _resumed, case, looksam, str(tmp_path)):
        for name, weight in whole.items():
            assert torch.equal(resumed[name], weight), name


def _run(case: Case, samples: Case, folder: str, first: int, last: int) -> dict[str, torch.Tensor]:
    """With the windows of ``samples``, shared out among the ranks that are there."""
    with engine_for(case, looksam=False) as engine:
        if first:
            engine.load_checkpoint(folder, tag="universal")
        for update in range(first, last):
            for x, y in samples.window(update)[engine.global_rank::case.world]:
                engine.backward(engine(x.float(), y))
                engine.step()
        engine.save_checkpoint(folder, tag=f"at{last}")
        return master_weights(engine)


def _loaded_trust_ratios(case: Case, folder: str) -> list[bool]:
    with engine_for(case, looksam=False) as engine:
        engine.load_checkpoint(folder, tag="universal")
        return [group["trust_ratio"] for group in engine.optimizer.param_groups]


def test_groups_left_out_stay_left_out_after_a_universal_checkpoint(tmp_path: Path) -> None:
    case = Case(base="Lamb", stage=2, two_groups=True)
    run_on_ranks(2, _run, case, case, str(tmp_path), 0, 2)
    convert(tmp_path / "at2", tmp_path / "universal")
    after = replace(case, stage=3, config={"checkpoint": {"load_universal": True}})
    assert run_on_ranks(2, _loaded_trust_ratios, after, str(tmp_path)) == [[True, False]] * 2


def test_lamb_goes_on_at_another_world_size_and_stage(tmp_path: Path) -> None:
    """Two ranks on stage 2, then one on stage 3 with the same samples: the run that never stopped, by the oracle."""
    case = Case(base="Lamb", stage=2, updates=8)
    run_on_ranks(2, _run, case, case, str(tmp_path), 0, 4)
    convert(tmp_path / "at4", tmp_path / "universal")
    after = replace(case, world=1, accumulation=2, stage=3, config={"checkpoint": {"load_universal": True}})
    weights = run_on_ranks(1, _run, after, case, str(tmp_path), 4, 8)[0]
    assert distance(weights, reference(case)) <= 1e-5

"""What users do between backward and step, and around the engine: gradients edited, layers frozen and unfrozen, groups
added, the wrong step() called. Weights against LookSAM in float64, or a refusal whose way out is walked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_looksam import LookSAMReplayError
from ds_looksam.engines.compile_lock import stale_locks

from .models import Mlp
from .ranks import run_on_ranks
from .training import Case, distance, engine_for, master_weights

CASE = Case(world=2, accumulation=2, updates=7, k=3, alpha=0.7, base="SGD")
TOLERANCE = 1e-5  # as in test_oracle_grid.py
MASKED = 4  # the first rows of this layer's gradient are set to 0


class Twin:
    """LookSAM around SGD on a float64 module, whose trained parameters may change between updates."""

    def __init__(self, case: Case, edit: Callable[[nn.Module], None] | None = None) -> None:
        torch.manual_seed(case.seed)
        self.case, self.module, self.edit = case, Mlp().double(), edit
        self.groups = [{"params": list(self.module.parameters()), **case.base_params}]
        self.base = torch.optim.SGD(self.groups)
        self.v: dict[Any, Tensor] = {}

    def gradient(self, window: list[Any]) -> dict[Any, Tensor]:
        self.module.zero_grad()
        for x, y in window:
            (self.module(x, y) / len(window)).backward()
        if self.edit is not None:
            self.edit(self.module)
        return {p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.module.parameters()
                if p.requires_grad}

    def update(self, t: int) -> None:
        case, window = self.case, self.case.window(t)
        g = self.gradient(window)
        norm = torch.cat([part.reshape(-1) for part in g.values()]).norm()
        if t % case.k == 0:
            clean = {p: p.detach().clone() for p in g}
            for p, part in g.items():
                p.data += case.rho * part / norm
            u = self.gradient(window)
            for p, w in clean.items():
                p.data.copy_(w)
            along = sum((g[p] * u[p]).sum() for p in g) / norm**2
            self.v = {p: u[p] - along * g[p] for p in g}
        else:
            v = {p: self.v.get(p, torch.zeros_like(p)) for p in g}
            factor = case.alpha * norm / torch.cat([part.reshape(-1) for part in v.values()]).norm()
            u = {p: g[p] + factor * v[p] for p in g}
        for p in self.module.parameters():
            p.grad = u.get(p)
        self.base.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}


def mask(module: nn.Module) -> None:
    module.second.weight.grad[:MASKED] = 0


# Gradients edited between backward and step --------------------------------------------------------------------------


def train_masked(case: Case, by_hook: bool) -> tuple[str, dict[str, Tensor]]:
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    with engine_for(case) as engine:
        weight = engine.module.second.weight

        def edit() -> None:
            if case.stage == 0:
                weight.grad[:MASKED] = 0
            else:
                gradient = safe_get_full_grad(weight)
                gradient[:MASKED] = 0
                safe_set_full_grad(weight, gradient)

        if by_hook:
            engine.edit_gradients = edit
        before = master_weights(engine)
        for update in range(case.updates):
            for x, y in case.micro_batches(update, torch.distributed.get_rank()):
                engine.backward(engine(x.float(), y))
                if not by_hook and engine.is_gradient_accumulation_boundary():
                    edit()
                try:
                    engine.step()
                except LookSAMReplayError as error:
                    assert all(torch.equal(w, before[n]) for n, w in master_weights(engine).items())
                    return str(error), {}
        return "", master_weights(engine)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# Stage 3 on one rank: DeepSpeed 0.19.8's safe_set_full_grad fails there where a tensor does not divide evenly.
EDITED = [replace(CASE, stage=stage, world=1 if stage == 3 else 2) for stage in (0, 1, 2, 3)]
EDITED += [replace(case, zero=OFFLOAD, config={"zero_force_ds_cpu_optimizer": False}) for case in EDITED[2:]]


@pytest.mark.parametrize("case", EDITED, ids=lambda case: f"stage{case.stage}{'-offload' if case.zero else ''}")
def test_gradients_are_edited_by_a_hook(case: Case) -> None:
    twin = Twin(case, mask)
    for update in range(case.updates):
        twin.update(update)
    message, weights = run_on_ranks(case.world, train_masked, case, True)[0]
    assert not message and distance(weights, twin.weights()) <= TOLERANCE
    message, _ = run_on_ranks(case.world, train_masked, case, False)[0]
    assert "engine.edit_gradients" in message


def clip_by_hand(case: Case) -> str:
    with engine_for(case) as engine:
        (x, y), *_ = case.micro_batches(0, 0)
        engine.backward(engine(x.float(), y))
        nn.utils.clip_grad_norm_(engine.module.parameters(), 0.01)
        with pytest.raises(LookSAMReplayError) as raised:
            engine.step()
        return str(raised.value)


def test_clipping_by_hand_is_noticed() -> None:
    assert "was changed between" in run_on_ranks(1, clip_by_hand, replace(CASE, world=1, stage=0, accumulation=1))[0]


# Layers frozen, unfrozen, added ---------------------------------------------------------------------------------------


def train_changing(case: Case, what: str) -> dict[str, Tensor]:
    module = _start(case, what)
    parameters = [p for p in module.parameters() if what != "added" or p.requires_grad]
    with _engine(case, module, parameters) as engine:
        for update in range(case.updates):
            if update == 4:
                _change(engine.module, engine.optimizer, what)
            for x, y in case.micro_batches(update, torch.distributed.get_rank()):
                engine.backward(engine(x.float(), y))
                engine.step()
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def _engine(case: Case, module: nn.Module, parameters: list[Any]) -> Any:
    class Given(Case):
        def model_parameters(self, module: nn.Module) -> Any:
            return parameters

    return engine_for(Given(**vars(case)), module=module)


def _start(case: Case, what: str) -> Mlp:
    torch.manual_seed(case.seed)
    module = Mlp()
    if what in ("unfrozen", "added"):
        module.first.requires_grad_(False)
    return module


def _change(module: nn.Module, optimizer: Any, what: str) -> None:
    module.first.requires_grad_(what != "frozen")
    if what == "added":
        optimizer.add_param_group({"params": list(module.first.parameters()), "lr": 0.02})


@pytest.mark.parametrize("what", ["frozen", "unfrozen", "added"])
@pytest.mark.parametrize("case", [
    replace(CASE, stage=0), replace(CASE, stage=0, world=1, ascent="rank"),
    replace(CASE, stage=0, world=1, accumulation=1, ascent="micro_batch")], ids=lambda case: case.ascent)
def test_stage_0_follows_what_is_trained(case: Case, what: str) -> None:
    twin = Twin(case)
    if what in ("unfrozen", "added"):
        twin.module.first.requires_grad_(False)
    if what == "added":
        twin.base = torch.optim.SGD([p for p in twin.module.parameters() if p.requires_grad], **case.base_params)
    for update in range(case.updates):
        if update == 4:
            _change(twin.module, twin.base, what)
        twin.update(update)
    assert distance(run_on_ranks(case.world, train_changing, case, what)[0], twin.weights()) <= TOLERANCE


def warned_of_freezing(case: Case) -> list[str]:
    from unittest import mock

    with mock.patch("ds_looksam.engines.looksam.log_dist") as log:
        train_changing(case, "frozen")
        return [call.args[0] for call in log.call_args_list if "requires_grad" in call.args[0]]


def test_other_stages_say_once_that_deepspeed_ignores_it() -> None:
    assert len(run_on_ranks(2, warned_of_freezing, replace(CASE, stage=2, updates=10))[0]) == 1


# The wrong call, the unused parameter, the stale lock -----------------------------------------------------------------


def step_of_optimizer(case: Case) -> tuple[str, int]:
    with engine_for(case) as engine:
        torch.optim.lr_scheduler.StepLR(engine.basic_optimizer, 10)  # wraps step(), and must still find a method
        (x, y), *_ = case.micro_batches(0, 0)
        engine.backward(engine(x.float(), y))
        with pytest.raises(LookSAMReplayError) as raised:
            engine.optimizer.step()
        engine.step()
        return str(raised.value), engine.looksam.updates


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizers_own_step_is_refused(stage: int) -> None:
    message, updates = run_on_ranks(1, step_of_optimizer, replace(CASE, world=1, stage=stage, accumulation=1))[0]
    assert "call engine.step()" in message and updates == 1


def train_with_unused(case: Case) -> str:
    with engine_for(case) as engine:
        (x, y), *_ = case.micro_batches(0, 0)
        engine.backward(engine(x.float(), y))
        try:
            engine.step()
        except AssertionError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("ignored", [True, False])
def test_deepspeeds_check_for_unused_parameters_is_not_silenced(ignored: bool) -> None:
    case = Case(world=1, stage=2, model="dead_and_frozen",
                zero={**OFFLOAD, "ignore_unused_parameters": ignored})
    assert bool(run_on_ranks(1, train_with_unused, case)[0]) is not ignored


def test_a_lock_that_a_killed_compilation_left_is_named(tmp_path: Path) -> None:
    build = tmp_path / "py311_cpu" / "fused_adam"
    build.mkdir(parents=True)
    for file in (build / "main.cpp", build / "lock"):
        file.touch()
        os.utime(file, (time.time() - 300, ) * 2)
    assert stale_locks(tmp_path) == [build / "lock"]
    (build / "fused_adam.o").touch()  # somebody is at work
    assert stale_locks(tmp_path) == []

"""Autocast, activation checkpointing and torch.compile: the second evaluation must compute as the first one did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .models import Mlp, make_model
from .ranks import run_on_ranks
from .test_oracle_grid import TOLERANCE
from .training import Case, Result, distance, engine_for, master_weights, run_oracle, train_window


def train_prepared(case: Case, module: nn.Module, compile_backend: str | None = None) -> Result:
    """Run a case with another module than ``case.model``. ``extra`` is the state of autocast in each forward."""
    autocast: list[tuple[bool, torch.dtype]] = []
    module.register_forward_pre_hook(
        lambda *_: autocast.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))))
    with engine_for(case, module=module) as engine:
        if compile_backend is not None:
            engine.compile(backend=compile_backend)
        for update in range(case.updates):
            train_window(engine, case, update)
        torch._dynamo.reset()
        return Result(weights=master_weights(engine), model_weights={}, history=[], forwards=0, extra=autocast,
                      evaluations=engine.looksam.evaluations, updates=engine.looksam.updates)


# Autocast -------------------------------------------------------------------------------------------------------------

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def train_with_autocast(case: Case) -> Result:
    return train_prepared(case, make_model(case.model, case.seed))


@pytest.mark.parametrize("zero", [{}, {"offload_optimizer": {"device": "cpu"}}], ids=["", "offload"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autocast(stage: int, zero: dict[str, Any]) -> None:
    if stage == 0 and zero:
        pytest.skip("DeepSpeed offloads from stage 1 on")
    case = Case(stage=stage, accumulation=2, clipping=0.05, config=AUTOCAST, zero=zero)
    reference, expected = run_oracle(case)
    for result in run_on_ranks(case.world, train_with_autocast, case):
        # Activations and the reduction of gradients round at 4e-3; without the replay in autocast, or without the
        # correction, it is the two checks below that fail.
        assert distance(result.weights, expected) <= 1e-2
        assert result.extra == [(True, torch.bfloat16)] * reference.evaluations * case.accumulation
        assert result.evaluations == reference.evaluations


@pytest.mark.parametrize("stage, ascent, accumulation", [
    (0, "global", 1), (2, "global", 1), (3, "global", 1),
    (2, "rank", 2), (0, "micro_batch", 2), (1, "micro_batch", 2), (3, "global_micro_batch", 2),
])
def test_autocast_tightly(stage: int, ascent: str, accumulation: int) -> None:
    """On one rank, against an oracle whose gradients are those of bf16 autocast too."""
    case = Case(stage=stage, world=1, config=AUTOCAST, updates=7, ascent=ascent, accumulation=accumulation)
    _, expected = run_oracle(case, autocast=torch.bfloat16)
    (result, ) = run_on_ranks(1, train_with_autocast, case)
    # Where the two round a value differently, one bf16 unit of one activation in some thousand.
    assert distance(result.weights, expected) <= 1e-3


# Activation checkpointing ---------------------------------------------------------------------------------------------


class Checkpointed(Mlp):
    """The same function as "mlp", and the same parameters; its second half is computed again in the backward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def body(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) * self.scale
        return self.head(self.again(lambda h: torch.tanh(self.second(h)), hidden))

    def again(self, function: Any, hidden: Tensor) -> Tensor:
        if self.how == "deepspeed":
            import deepspeed

            return deepspeed.checkpointing.checkpoint(function, hidden)
        return checkpoint(function, hidden, use_reentrant=self.how == "reentrant")


def train_checkpointed(case: Case, how: str) -> Result:
    import deepspeed

    if how == "deepspeed":
        deepspeed.checkpointing.configure(None, partition_activations=False)
    torch.manual_seed(case.seed)
    return train_prepared(case, Checkpointed(how))


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "deepspeed"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_activation_checkpointing(stage: int, how: str) -> None:
    case = Case(stage=stage, accumulation=2, updates=7)
    _, expected = run_oracle(case)
    for result in run_on_ranks(case.world, train_checkpointed, case, how):
        assert distance(result.weights, expected) <= TOLERANCE


# Compilation ----------------------------------------------------------------------------------------------------------


def train_compiled(case: Case, backend: str) -> Result:
    return train_prepared(case, make_model(case.model, case.seed), compile_backend=backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.grid)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_compiled(stage: int, backend: str) -> None:
    case = Case(stage=stage, accumulation=2, updates=4)
    _, expected = run_oracle(case)
    for result in run_on_ranks(case.world, train_compiled, case, backend):
        assert distance(result.weights, expected) <= TOLERANCE



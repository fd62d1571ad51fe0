"""The table of what is supported cannot lie: its tests exist, its refusals happen, the docs show it as it is.

The refusals that a JSON shows are tested in test_agreement.py; here are those that take a model or a call.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ds_looksam import LookSAMConfigError
from ds_looksam.config.support import REFUSED, Refused
from ds_looksam.config.support_table import SUPPORTED, render

from .models import make_model
from .ranks import run_on_ranks
from .training import Case, engine_for, master_weights, train_window

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- support table: begin -->\n", "\n<!-- support table: end -->"


def test_the_page_shows_the_table() -> None:
    text = PAGE.read_text()
    shown = text[text.index(BEGIN) + len(BEGIN):text.index(END)]
    assert shown == render(), "run: python -m tests.test_support_table"


def test_tests_exist() -> None:
    named = {test for row in SUPPORTED for test in row.tests}
    there = {f"{file}::{node.name}" for file in {test.partition("::")[0] for test in named}
             for node in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert named - there == set()


# Refusals -------------------------------------------------------------------------------------------------------------


def initialize(module: nn.Module | None = None, config: dict[str, Any] | None = None, world: int = 1, stage: int = 2,
               **kwargs: Any) -> None:
    """deepspeed.initialize on this rank, with ``config`` merged into a working one."""
    import deepspeed
    from deepspeed.utils import groups

    case = Case(world=world, stage=stage)
    module = make_model(case.model) if module is None else module
    try:
        engine, *_ = deepspeed.initialize(model=module, config={**case.json(), **(config or {})},
                                          **{"model_parameters": module.parameters(), **kwargs})
        engine.destroy()
    finally:  # DeepSpeed keeps them for the life of the process
        groups.mpu = groups.mesh_device = None


def pipeline() -> nn.Module:
    from deepspeed.pipe import PipelineModule
    return PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1)


def moe() -> nn.Module:
    from deepspeed.moe.layer import MoE
    return nn.ModuleList([MoE(hidden_size=8, expert=nn.Linear(8, 8), num_experts=2, ep_size=1)])


def expert() -> nn.Module:
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(1)
    module = make_model("mlp")
    module.second.weight.allreduce, module.second.weight.group_name = False, "ep_size_1"
    return module


def with_ulysses_and_own_perturbations() -> None:
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as mpu

    if mpu._SEQUENCE_PARALLEL_GROUP is None:
        mpu.initialize_sequence_parallel(2)
    initialize(config={"optimizer": Case(ascent="rank").json()["optimizer"]}, world=2, mpu=mpu)


def two_way_model_parallel() -> SimpleNamespace:
    """What LookSAM reads of a Megatron-like mpu."""
    rank = torch.distributed.get_rank()
    own = [torch.distributed.new_group([n]) for n in range(2)]
    return SimpleNamespace(
        get_model_parallel_rank=lambda: rank, get_model_parallel_world_size=lambda: 2, get_data_parallel_rank=lambda: 0,
        get_data_parallel_world_size=lambda: 1, get_model_parallel_group=lambda: torch.distributed.group.WORLD,
        get_data_parallel_group=lambda: own[rank])


def with_client_optimizer() -> None:
    module = make_model("mlp")
    initialize(module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))


def with_a_parameter_of_the_loss() -> None:
    module = make_model("mlp")
    initialize(module, stage=0, model_parameters=[*module.parameters(), nn.Parameter(torch.zeros(1))])


def with_mixed_weights_at_stage_3() -> None:
    module = make_model("mlp")
    module.first.bfloat16()
    initialize(module, stage=3)


CALLS: dict[str, tuple[int, Callable[[], None]]] = {
    "PipelineModule": (1, lambda: initialize(pipeline())),
    "MoE layers": (1, lambda: initialize(moe())),
    "allreduce = False": (1, lambda: initialize(expert())),
    "sequence_parallel_size": (
        2, lambda: initialize(config={"sequence_parallel_size": 2, "data_parallel_size": 1}, world=2)),
    "with Ulysses": (2, with_ulysses_and_own_perturbations),
    "tensor parallelism": (2, lambda: initialize(mpu=two_way_model_parallel())),
    "sparse gradients": (1, lambda: initialize(nn.Sequential(nn.Embedding(4, 4, sparse=True)))),
    "that are not the model's": (1, with_a_parameter_of_the_loss),
    "deepspeed.initialize(optimizer=...)": (1, with_client_optimizer),
    "that are complex": (1, lambda: initialize(nn.ParameterList([torch.zeros(4, dtype=torch.cfloat)]))),
    "that are not fp32": (1, lambda: initialize(make_model("mlp").bfloat16(), stage=0)),
    "of several dtypes": (1, with_mixed_weights_at_stage_3),
}
"""By words of the refusal: how many ranks, and what is refused on them."""


def refusal(words: str) -> str | None:
    try:
        CALLS[words][1]()
    except LookSAMConfigError as error:
        return str(error)
    return None


class Attention(nn.Linear):
    sparse = True


def test_what_only_looks_like_a_refused_model_trains() -> None:
    run_on_ranks(1, initialize, nn.Sequential(Attention(4, 4)))


@pytest.mark.parametrize("row", [row for row in REFUSED if row.config is None], ids=lambda row: row.feature)
def test_refused_at_initialize(row: Refused) -> None:
    calls = [words for words in CALLS if words in row.message]
    assert calls, "nothing tests this refusal"
    for words in calls:
        for message in run_on_ranks(CALLS[words][0], refusal, words):
            assert message is not None, "initialize went through"
            # registration.py has its own words for another engine of DeepSpeed's
            assert (row.message if row.model or row.json else row.key) in message


def train_other_dtypes() -> dict[str, dict[str, torch.Tensor]]:
    """Runs of a model that was loaded in bf16: the ways out of its refusals at stages 0 and 3, and ZeRO without a block
    ``bf16``."""
    runs = {}
    for stage, kind in [(0, "float"), (3, "float"), *((stage, "bf16") for stage in range(4)),
                        *((stage, "as it is") for stage in (1, 2, 3))]:
        case = Case(world=1, stage=stage, precision="fp32" if kind == "float" else "bf16", k=2, updates=5,
                    config={"data_types": {}, "bf16": {"enabled": kind == "bf16"}})
        module = make_model(case.model, case.seed).bfloat16()
        with engine_for(case, module=module.float() if kind == "float" else module) as engine:
            for update in range(case.updates):
                train_window(engine, case, update)
            runs[f"{kind}, stage {stage}"] = master_weights(engine)
    return runs


def test_models_in_bf16() -> None:
    """What is not refused is right: DeepSpeed's ZeRO keeps fp32 masters of a bf16 model, block or no block."""
    [runs] = run_on_ranks(1, train_other_dtypes)
    for stage in (1, 2, 3):
        one, other = runs[f"as it is, stage {stage}"], runs[f"bf16, stage {stage}"]
        assert all(torch.equal(one[name], other[name]) for name in one)
    for name, weights in runs["float, stage 0"].items():  # from the same weights, rounded or not on the way: 2^-9
        assert (weights - runs["bf16, stage 0"][name]).norm() < 0.05 * weights.norm()
        torch.testing.assert_close(weights, runs["float, stage 3"][name], rtol=1e-4, atol=1e-5)  # fp32 sums


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text[:text.index(BEGIN) + len(BEGIN)] + render() + text[text.index(END):])

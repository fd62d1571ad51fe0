"""The table of what is supported cannot lie: its tests exist, its refusals happen, docs/support.md shows it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_looksam import LookSAMConfigError
from ds_looksam.config.support_table import REFUSED, SUPPORTED, Refused, render

from .models import make_model
from .ranks import run_on_ranks
from .training import Case

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- support table: begin -->\n", "\n<!-- support table: end -->"


def test_the_docs_show_the_table() -> None:
    page = PAGE.read_text()
    shown = page[page.index(BEGIN) + len(BEGIN):page.index(END)]
    assert shown == render(), "run: python -m tests.test_support_table"


@pytest.mark.parametrize("test", sorted({test for row in SUPPORTED for test in row.tests}))
def test_tests_exist(test: str) -> None:
    file, _, function = test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


# Refusals -------------------------------------------------------------------------------------------------------------


def initialize(config: dict[str, Any] | None = None, module: nn.Module | None = None, world: int = 1,
               **kwargs: Any) -> Any:
    """deepspeed.initialize on this rank, with ``config`` merged into a working one."""
    import deepspeed

    case = Case(world=world)
    json, extra = case.json(), dict(config or {})
    optimizer = dict(extra.pop("optimizer", {}))  # a row of the table, which must keep its own
    json["optimizer"]["params"].update(optimizer.pop("params", {}))
    json["optimizer"].update(optimizer)
    json.update(extra)
    module = make_model(case.model) if module is None else module
    return deepspeed.initialize(model=module, config=json, model_parameters=module.parameters(), **kwargs)


def with_pipeline() -> None:
    from deepspeed.pipe import PipelineModule

    initialize(module=PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1))


def with_moe() -> None:
    from deepspeed.moe.layer import MoE

    class Experts(nn.Module):

        def __init__(self) -> None:
            super().__init__()
            self.moe = MoE(hidden_size=8, expert=nn.Linear(8, 8), num_experts=2, ep_size=1)

    initialize(module=Experts())


def with_ulysses() -> None:
    from deepspeed.utils import groups

    try:
        initialize({"sequence_parallel_size": 2, "data_parallel_size": 1}, world=2)
    finally:
        groups.mesh_device = None  # DeepSpeed keeps it for the life of the process


def with_expert() -> None:
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(1)
    module = make_model("mlp")
    module.second.weight.allreduce, module.second.weight.group_name = False, "ep_size_1"
    initialize(module=module)


class TwoWayModelParallel:
    """What LookSAM reads of a Megatron-like mpu."""

    def get_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_group(self) -> Any:
        return torch.distributed.group.WORLD

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        self.own = [torch.distributed.new_group([rank]) for rank in range(2)]
        return self.own[torch.distributed.get_rank()]


def with_mpu() -> None:
    from deepspeed.utils import groups

    try:
        initialize(mpu=TwoWayModelParallel())
    finally:
        groups.mpu = None  # likewise


def with_sparse_embedding() -> None:
    initialize(module=nn.Sequential(nn.Embedding(4, 4, sparse=True)))


def with_client_optimizer() -> None:
    module = make_model("mlp")
    initialize(module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))


CALLS: dict[str, tuple[int, Callable[[], None]]] = {
    "`PipelineModule`": (1, with_pipeline),
    "MoE layers (`deepspeed.moe`)": (1, with_moe),
    "parameters with `allreduce = False` (experts outside `deepspeed.moe`)": (1, with_expert),
    "Ulysses through `sequence_parallel_size` in the JSON": (2, with_ulysses),
    "tensor parallelism (`mpu` with a model parallel size above 1)": (2, with_mpu),
    "sparse gradients (`nn.Embedding(sparse=True)`)": (1, with_sparse_embedding),
    "`deepspeed.initialize(optimizer=...)`": (1, with_client_optimizer),
}
NEEDS_TWO_RANKS = ("AutoTP", )


def refusal(call: Callable[..., None], *args: Any) -> str | None:
    try:
        call(*args)
    except LookSAMConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.feature)
def test_refused_at_initialize(row: Refused) -> None:
    """The message names the key and says what to do."""
    if row.config is None:
        world, call = CALLS[row.feature]
        messages = run_on_ranks(world, refusal, call)
    else:
        world = 2 if row.feature.startswith(NEEDS_TWO_RANKS) else 1
        messages = run_on_ranks(world, refusal, initialize, row.config)
    for message in messages:
        assert message is not None, "initialize went through"
        keys = re.findall(r"`([^`]+)`", row.feature) if row.config is not None else []
        for key in keys:
            assert key.split(".")[-1] in message, f"{key} is not named: {message}"
        assert re.search(r"\b(use|leave|build|name) ", message), f"no way out: {message}"


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text[:text.index(BEGIN) + len(BEGIN)] + render() + text[text.index(END):])

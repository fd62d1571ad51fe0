"""Every file directly under configs/ runs as it is: a k-cycle of a small ViT and one update more, on two real ranks.
Those under large-batch/: the schedule's arithmetic; and at their full world size, on torch's fake process group."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vits import build_vit

from benchmarks.scale import in_fresh_process

from .inside import shards as shards_of
from .ranks import run_on_ranks
from .training import visible_weights

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.json"))
LARGE = {path: int(path.stem.rsplit("-", 1)[1].removesuffix("gpus"))
         for path in sorted((ROOT / "configs" / "large-batch").glob("*.json"))}
"""The world size in the name."""


def vit() -> Any:
    torch.manual_seed(0)
    return build_vit("nano/14", image_size=28, channels=1, classes=10)


def run(engine: Any, updates: int, size: int) -> list[str]:
    """Updates with micro-batches of random pictures; their kinds."""
    generator = torch.Generator().manual_seed(engine.global_rank)
    dtype, kinds = next(engine.module.parameters()).dtype, []
    for _ in range(updates * engine.gradient_accumulation_steps()):
        pixels = torch.randn(size, 1, 28, 28, generator=generator)
        labels = torch.randint(10, (size, ), generator=generator)
        engine.backward(engine(pixel_values=pixels.to(dtype), labels=labels).loss)
        engine.step()
        if engine.global_steps > len(kinds):
            kinds.append(engine.looksam.step_kind if hasattr(engine, "looksam") else "base")
    return kinds


def train(path: str) -> tuple[list[str], int, dict[str, torch.Tensor]]:
    import deepspeed

    import ds_looksam  # noqa: F401

    model = vit()
    engine, *_ = deepspeed.initialize(model=model, config=path, model_parameters=model.parameters())
    kinds = run(engine, 6, engine.train_micro_batch_size_per_gpu())
    evaluations = engine.looksam.evaluations if hasattr(engine, "looksam") else len(kinds)
    weights = visible_weights(engine)
    engine.destroy()
    return kinds, evaluations, weights


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains(path):
    (kinds, evaluations, first), (_, _, second) = run_on_ranks(2, train, str(path))
    if "looksam" in path.stem:
        # Nothing to reuse with until a second SAM step has measured beta of alpha "auto".
        assert kinds == ["sam", "base", "base", "base", "base", "sam"] and evaluations == 8
    else:
        assert kinds == ["base"] * 6
    at_start = dict(vit().named_parameters())
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), f"the ranks have different {name}"
        assert weight.isfinite().all()
        if "bf16" not in path.stem and "key.bias" not in name:  # an update of 1e-3 is lost in some bf16 weights
            assert not torch.equal(weight, at_start[name])


def test_there_is_one_for_every_stage_and_the_docs_have_a_line_for_each():
    optimizers = {(c["zero_optimization"]["stage"], c["optimizer"]["type"])
                  for c in (json.loads(path.read_text()) for path in CONFIGS)}
    assert {(stage, "LookSAM") for stage in range(4)} < optimizers and (2, "AdamW") in optimizers
    page = (ROOT / "docs" / "training.md").read_text()
    assert [path.name for path in CONFIGS if f"`{path.name}`" not in page] == []


def test_arithmetic_of_large_batches() -> None:
    """300 epochs of ImageNet-1k's 1,281,167 images, 30 of them warm-up."""
    assert len(LARGE) == 4 * 3
    for path, world in LARGE.items():
        config = json.loads(path.read_text())
        size = int(path.stem.split("-")[3].removesuffix("k")) * 1024
        per_rank = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
        assert config["train_batch_size"] == size == per_rank * world, path.name
        schedule = config["scheduler"]["params"]
        assert schedule["total_num_steps"] == 300 * (1_281_167 // size), path.name
        assert schedule["warmup_num_steps"] == 30 * (1_281_167 // size), path.name


def train_on_fake_ranks(rank: int, world: int) -> None:
    """One rank of many: two updates with every other configuration for that many; half of them as the first rank, half
    as the last. Values mean nothing there; that it is built, partitioned as test_layerwise says, and steps, does."""
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import ds_looksam
    from tests.test_layerwise import partition_zero12

    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world))
    torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    for path in [path for path in LARGE if LARGE[path] == world][rank > 0::2]:
        config = json.loads(path.read_text())
        model = vit()
        groups = ds_looksam.parameter_groups(model, no_layer_scaling=["bias", "norm"])
        sizes = [[p.numel() for p in group["params"]] for group in groups]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=str(path),
                                          dist_init_required=False)
        assert engine.dp_world_size == world and engine.train_batch_size() == config["train_batch_size"]
        assert type(engine.optimizer).__name__ == "BF16_Optimizer"
        for flat, of_group in zip(shards_of(engine).layout(), sizes, strict=True):
            expected, _ = partition_zero12(of_group, world, rank, alignment=2)
            assert [replace(s, parameter=None) for s in flat] == [replace(s, parameter=None) for s in expected]
        kinds = run(engine, 2, 2)
        assert kinds == ["sam", "reuse"] and engine.looksam.evaluations == 3, kinds
        engine.destroy()


@pytest.mark.grid
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", sorted(set(LARGE.values())))
def test_large_batches_train_at_their_full_world_size(world: int) -> None:
    """DeepSpeed remembers its process groups for good, so each rank is a process. About 30 s of one core, all."""
    for rank in (0, world - 1):
        in_fresh_process(train_on_fake_ranks, rank, world)

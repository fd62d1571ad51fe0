"""configs/large-batch at their full world size, on torch's fake process group: batch arithmetic, schedule, layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .inside import shards as shards_of

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "large-batch").glob("*.json"))
IMAGES, EPOCHS, WARM_UP = 1_281_167, 300, 30
"""ImageNet-1k's training images; epochs of the run, and of its warm-up."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_arithmetic(path: Path) -> None:
    _, _, _, batch, *_, gpus = path.stem.split("-")
    config = json.loads(path.read_text())
    size = int(batch.removesuffix("k")) * 1024
    assert config["train_batch_size"] == size
    assert size == (config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] *
                    int(gpus.removesuffix("gpus")))
    schedule = config["scheduler"]["params"]
    assert schedule["total_num_steps"] == round(EPOCHS * IMAGES / size)
    assert schedule["warmup_num_steps"] == round(WARM_UP * IMAGES / size)


def test_there_is_one_for_each_batch_and_number_of_gpus() -> None:
    assert len(CONFIGS) == 4 * 3


def _world(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1].removesuffix("gpus"))


def _train_on_fake_ranks(rank: int, world: int) -> None:
    """One rank of many: two updates with every other configuration for that many."""
    import deepspeed
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import ViTConfig, ViTForImageClassification

    import ds_looksam
    from tests.test_layerwise import partition_zero12

    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world))
    torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    # Half of them as the first rank, half as the last.
    for path in [path for path in CONFIGS if _world(path) == world][rank > 0::2]:
        config = json.loads(path.read_text())
        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
                      patch_size=4, num_channels=1))
        groups = ds_looksam.parameter_groups(model, no_layer_scaling=["bias", "norm"])
        sizes = [[p.numel() for p in group["params"]] for group in groups]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=str(path),
                                          dist_init_required=False)
        assert engine.dp_world_size == world and engine.train_batch_size() == config["train_batch_size"]
        assert type(engine.optimizer).__name__ == "BF16_Optimizer"
        for flat, of_group in zip(shards_of(engine).layout(), sizes, strict=True):
            expected, _ = partition_zero12(of_group, world, rank, alignment=2)
            assert [(s.start, s.param_offset, s.numel, s.param_numel) for s in flat] == [
                (s.start, s.param_offset, s.numel, s.param_numel) for s in expected]
        x, y = torch.randn(2, 1, 8, 8, dtype=torch.bfloat16), torch.tensor([0, 1])
        kinds = []
        for micro_step in range(2 * engine.gradient_accumulation_steps()):
            engine.backward(engine(pixel_values=x, labels=y).loss)
            engine.step()
            if (micro_step + 1) % engine.gradient_accumulation_steps() == 0:
                kinds.append(engine.looksam.step_kind)
        assert kinds == ["sam", "reuse"] and engine.looksam.evaluations == 3, kinds
        engine.destroy()
        print("trained", rank, path.name, flush=True)


@pytest.mark.grid
@pytest.mark.timeout(900)
def test_each_trains_at_its_full_world_size() -> None:
    """As the first or as the last of all its ranks. Values mean nothing there; that it is built, partitioned as
    test_layerwise says, and steps, does. About 30 s of one core."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    run = subprocess.run([sys.executable, "-m", "tests.test_large_batch_configs"], env=environment, cwd=ROOT,
                         capture_output=True, text=True, timeout=850)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    assert run.stdout.count("trained") == len(CONFIGS)


if __name__ == "__main__":
    import multiprocessing

    # DeepSpeed remembers its process groups for good, so each (rank, world) is a process; forked, for the imports cost
    # more than the rest.
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    for world in sorted({_world(path) for path in CONFIGS}):
        for rank in (0, world - 1):
            process = multiprocessing.get_context("fork").Process(target=_train_on_fake_ranks, args=(rank, world))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(process.exitcode)

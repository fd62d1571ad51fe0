"""The programs in examples/, as they are but short."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from .ranks import run_on_ranks
from .training import distance, master_weights
from .twin import Twin, engine_of

RANKS, UPDATES = 2, 12


def accelerate_loop() -> dict[str, Any]:
    from examples import accelerate_loop

    from .test_huggingface import forget_accelerate

    forget_accelerate()
    return accelerate_loop.main(["--epochs", "2", "--pictures", "512"])


def test_accelerate() -> None:
    pytest.importorskip("accelerate")
    updates = 2 * 512 // (RANKS * 32)
    for result in run_on_ranks(RANKS, accelerate_loop):
        looksam, losses = result["looksam"], result["losses"]
        assert (looksam["updates"], looksam["evaluations"]) == (updates, updates + -(-updates // 5))
        assert sum(losses[-5:]) < sum(losses[:5])


def lightning_vit() -> dict[str, Any]:
    from examples import lightning_vit

    from .test_lightning import on_cpu

    return lightning_vit.main(["--epochs", "2", "--pictures", "320"], strategy=on_cpu(dict(lightning_vit.CONFIG)),
                              accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False)


def test_lightning() -> None:
    pytest.importorskip("lightning")
    [result] = run_on_ranks(1, lightning_vit)
    assert (result["looksam"]["updates"], result["looksam"]["evaluations"]) == (20, 24)
    assert result["loss"] < 1.4  # chance is ln 4 = 1.386; its mean over the last epoch


def language_model(folder: str) -> dict[str, Any]:
    from examples import gpt2_lora

    from .test_huggingface import forget_accelerate

    forget_accelerate()
    return gpt2_lora.main(["--steps", "12", "--lora-steps", "7", "--batch-size", "4", "--held-out", "4",
                           "--accumulation", "2", "--output-dir", folder])


def test_the_language_model(tmp_path: Path) -> None:
    """LookSAM is on in both halves, and what is saved of LoRA has been trained."""
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    for result in run_on_ranks(RANKS, language_model, str(tmp_path)):
        for half, updates, sam_steps in (("scratch", 12, 3), ("lora", 7, 2)):
            looksam = result[half]["looksam"]
            assert (looksam["updates"], looksam["evaluations"]) == (updates, updates + sam_steps)
            assert looksam["sharpness"] > 0
            logged = [entry for entry in result[half]["log"] if "looksam_gradient_norm" in entry]
            assert [entry["step"] for entry in logged] == [1 + 5 * i for i in range(sam_steps)]
        assert result["scratch"]["held_out_losses"][-1] < result["scratch"]["held_out_losses"][0]
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert adapter and all("lora_" in name and bool((w != 0).any()) for name, w in adapter.items())


def gan(as_it_is: bool) -> tuple[list[dict[str, Tensor]], list[int]]:
    from examples import gan

    with ExitStack() as stack:
        if not as_it_is:
            stack.enter_context(patch.object(gan, "engine_for", lambda module: stack.enter_context(
                engine_of(lambda: module, stage=2, world=RANKS))))
        engines = gan.train(UPDATES)
        result = [master_weights(engine) for engine in engines], [engine.looksam.evaluations for engine in engines]
        for engine in engines if as_it_is else ():
            engine.destroy()
    return result


def test_gan() -> None:
    """And its loop with the engines that twins are for, against those."""
    from examples import gan as program

    assert [evaluations for _, evaluations in run_on_ranks(RANKS, gan, True)] == [[UPDATES + 3] * 2] * RANKS
    generator = Twin(lambda: program.network(program.NOISE, 2, 0))
    discriminator = Twin(lambda: program.network(2, 1, 1))
    for update in range(UPDATES):
        batches = [[t.double() for t in program.batch(update, rank)] for rank in range(RANKS)]
        points = [torch.cat([real, generator.module(noise).detach()]) for real, noise, _ in batches]
        discriminator.update(lambda d, points=points: [program.discriminator_loss(d(both)) for both in points])
        generator.update(lambda g, batches=batches: [program.generator_loss(discriminator.module(g(noise)))
                                                     for _, _, noise in batches])
    for weights, evaluations in run_on_ranks(RANKS, gan, False):
        assert evaluations == [UPDATES + UPDATES // 2] * 2
        for got, twin in zip(weights, (generator, discriminator), strict=True):
            # fp32 against float64, as in the oracle grid
            assert distance(got, dict(twin.module.named_parameters())) < 1e-5

"""The programs in examples/, as they are but short. gpt2_lora.py has a file of its own, test_lm_example.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import oracle
from .ranks import run_on_ranks
from .training import distance, master_weights, named

RANKS, UPDATES = 2, 12


def accelerate_loop() -> dict[str, Any]:
    from examples import accelerate_loop

    from .test_huggingface import forget_accelerate

    forget_accelerate()
    return accelerate_loop.main(["--epochs", "3", "--pictures", "512"])


def test_accelerate() -> None:
    pytest.importorskip("accelerate")
    updates = 3 * 512 // (RANKS * 32)
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


# The GAN: two engines, held against two oracles -----------------------------------------------------------------------


def gan() -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    from examples import gan

    engines = gan.train(UPDATES)
    weights = [master_weights(engine) for engine in engines]
    evaluations = [engine.looksam.evaluations for engine in engines]
    for engine in engines:
        engine.destroy()
    return *weights, evaluations


class Loss(nn.Module):
    """``networks``: those that the loss goes through, the first of them trained."""

    def __init__(self, networks: list[nn.Module], loss: Any) -> None:
        super().__init__()
        self.trained, self.others, self.loss = networks[0], networks[1:], loss

    def forward(self, x: Tensor) -> Tensor:
        for network in (self.trained, *self.others):
            x = network(x)
        return self.loss(x)


def oracles() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from examples import gan

    params = dict(gan.CONFIG["optimizer"]["params"])
    hyper = {key: params[key] for key in ("lr", "betas", "weight_decay", "rho")}
    generator, discriminator = gan.network(gan.NOISE, 2, 0).double(), gan.network(2, 1, 1).double()
    losses = Loss([generator, discriminator], gan.generator_loss), Loss([discriminator], gan.discriminator_loss)
    references, groups = [], []
    for loss in losses:
        names = [name for name, _ in loss.named_parameters() if name.startswith("trained.")]
        groups.append([oracle.Group(names=names, **hyper)])
        references.append(oracle.build(loss, groups[-1], base="AdamW", k=params["k"]))
    for update in range(UPDATES):
        batches = [[t.double() for t in gan.batch(update, rank)] for rank in range(RANKS)]
        put(generator, references[0].w)
        fakes = [generator(noise).detach() for _, noise, _ in batches]
        references[1].update([(torch.cat([real, fake]), ) for (real, _, _), fake in zip(batches, fakes, strict=True)])
        put(discriminator, references[1].w)
        references[0].update([(noise, ) for _, _, noise in batches])
    return tuple({name.removeprefix("trained."): w for name, w in named(reference.w, loss, group).items()}
                 for reference, loss, group in zip(references, losses, groups, strict=True))


def put(module: nn.Module, w: Tensor) -> None:
    """The oracle's vector into the network."""
    torch.nn.utils.vector_to_parameters(w, module.parameters())


def test_gan() -> None:
    expected = oracles()
    for *weights, evaluations in run_on_ranks(RANKS, gan):
        assert evaluations == [UPDATES + 3, UPDATES + 3]
        for got, want in zip(weights, expected, strict=True):
            assert distance(got, want) < 1e-5  # fp32 against float64 over 12 updates, as in the oracle grid

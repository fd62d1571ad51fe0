"""A GAN with LookSAM on both networks: two engines in an ordinary loop.

    deepspeed examples/gan.py                                                                  # on GPUs
    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 examples/gan.py                # in two processes

The generator learns eight points on a circle. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import ds_looksam  # noqa: F401 - registers LookSAM with DeepSpeed

BATCH, NOISE = 64, 4
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 2},
    "optimizer": {
        "type": "LookSAM",
        "params": {"k": 5, "rho": 0.02, "base_optimizer": "AdamW", "torch_adam": True, "lr": 2e-3, "betas": [0.5, 0.99],
                   "weight_decay": 0.0},
    },
}


def network(inputs: int, outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def batch(update: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real points [BATCH, 2], and noise [BATCH, NOISE] for the discriminator's step and for the generator's."""
    generator = torch.Generator().manual_seed(10_007 * update + rank)
    angle = torch.randint(8, (BATCH, ), generator=generator) * (2 * math.pi / 8)
    real = torch.stack([angle.cos(), angle.sin()], dim=1) + 0.02 * torch.randn(BATCH, 2, generator=generator)
    return real, *torch.randn(2, BATCH, NOISE, generator=generator)


def discriminator_loss(scores: Tensor) -> Tensor:
    """Of the scores of a batch of real points and one of made-up points, [2 BATCH, 1]."""
    real, fake = scores.chunk(2)
    return bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))


def generator_loss(scores: Tensor) -> Tensor:
    return bce(scores, torch.ones_like(scores))


def engine_for(module: nn.Module) -> Any:
    return deepspeed.initialize(model=module, config=CONFIG, model_parameters=module.parameters())[0]


def train(updates: int) -> tuple[Any, Any]:
    """The two engines, trained."""
    generator, discriminator = engine_for(network(NOISE, 2, seed=0)), engine_for(network(2, 1, seed=1))
    rank, device = torch.distributed.get_rank(), generator.device
    for update in range(updates):
        real, noise, other_noise = (t.to(device) for t in batch(update, rank))

        with torch.no_grad():
            fake = generator(noise)
        discriminator.backward(discriminator_loss(discriminator(torch.cat([real, fake]))))
        discriminator.step()

        generator.backward(generator_loss(discriminator(generator(other_noise))))
        generator.step()
        discriminator.optimizer.zero_grad()  # what the generator's loss left there
    return generator, discriminator


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    args = parser.parse_args(argv)
    deepspeed.init_distributed()
    generator, discriminator = train(args.updates)
    with torch.no_grad():
        points = generator(torch.randn(1000, NOISE, device=generator.device))
    if torch.distributed.get_rank() == 0:
        print(f"mean distance from the circle {(points.norm(dim=1) - 1).abs().mean():.3f}, evaluations: generator "
              f"{generator.looksam.evaluations}, discriminator {discriminator.looksam.evaluations}")


if __name__ == "__main__":
    main()

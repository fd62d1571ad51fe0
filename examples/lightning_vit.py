"""A Vision Transformer with PyTorch Lightning and LookSAM: one import, and an optimizer block in the strategy's config.

    python examples/lightning_vit.py     # on GPUs: Lightning's DeepSpeed strategy asks for CUDA

It learns which quarter of a picture is bright. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

import ds_looksam  # noqa: F401 - registers LookSAM with DeepSpeed

CONFIG = {
    "optimizer": {
        "type": "LookSAM",
        "params": {"k": 5, "rho": 0.05, "base_optimizer": "AdamW", "torch_adam": True, "lr": 1e-3, "weight_decay": 0.1},
    },
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": 32,  # what the loader gives; Lightning sets clipping and accumulation
}


class ViT(lightning.LightningModule):
    """As without LookSAM. On SAM steps ``training_step`` runs twice; what it logs counts once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = ViTForImageClassification(ViTConfig(
            image_size=28, patch_size=7, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, num_labels=4))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        pictures, labels = batch
        loss = cross_entropy(self.vit(pictures).logits, labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> None:
        """The optimizer is the config's."""


def pictures(count: int) -> torch.utils.data.TensorDataset:
    """Noise with one bright quarter, [count, 1, 28, 28], and which one it is."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 28, 28, generator=generator)
    labels = torch.randint(4, (count, ), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 14 * (label // 2):14 * (label // 2) + 14, 14 * (label % 2):14 * (label % 2) + 14] += 0.5
    return torch.utils.data.TensorDataset(images, labels)


def main(argv: list[str] | None = None, **trainer_arguments: Any) -> dict[str, Any]:
    """``trainer_arguments`` go to the Trainer, in place of the strategy for GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=2048)
    args = parser.parse_args(argv)
    arguments = trainer_arguments or {"strategy": DeepSpeedStrategy(config=CONFIG), "accelerator": "gpu"}
    trainer = lightning.Trainer(max_epochs=args.epochs, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
                                **arguments)
    loader = torch.utils.data.DataLoader(pictures(args.pictures), batch_size=32, shuffle=True)
    status: dict[str, Any] = {}

    class KeepStatus(lightning.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            status.update(trainer.model.looksam.as_dict())  # trainer.model is the engine

    trainer.callbacks.append(KeepStatus())
    trainer.fit(ViT(), loader)
    loss = trainer.callback_metrics["loss"].item()
    print(f"loss {loss:.3f}, {status['updates']} updates, {status['evaluations']} evaluations")
    return {"loss": loss, "looksam": status}


if __name__ == "__main__":
    main()

"""Accelerate's own loop with LookSAM: one import, and the optimizer block of its DeepSpeed configuration.

    torchrun --standalone --nproc-per-node 8 examples/accelerate_loop.py                           # on GPUs
    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 examples/accelerate_loop.py        # in two processes

A small network learns which quarter of a picture is the brightest. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DummyOptim, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ds_looksam  # noqa: F401 - registers LookSAM with DeepSpeed

SIDE, BATCH = 8, 32
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "optimizer": {
        "type": "LookSAM",  # alpha is left out: Accelerate takes LookSAM's "auto" for one of its own
        "params": {"k": 5, "rho": 0.05, "base_optimizer": "AdamW", "torch_adam": True, "lr": "auto",
                   "weight_decay": "auto"},
    },
}


def pictures(count: int, seed: int) -> torch.utils.data.TensorDataset:
    """Noise [count, 1, SIDE, SIDE], and the number of the quarter with the largest mean."""
    noise = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    quarters = nn.functional.avg_pool2d(noise, SIDE // 2).flatten(1)
    return torch.utils.data.TensorDataset(noise, quarters.argmax(dim=1))


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(),
                         nn.Linear(64, 4))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=2048)
    args = parser.parse_args(argv)

    # Not Accelerator(cpu=True): that trains without DeepSpeed, whatever the plugin says.
    backend = InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=CONFIG), kwargs_handlers=[backend])
    loader = torch.utils.data.DataLoader(pictures(args.pictures, 0), batch_size=BATCH, shuffle=True)
    model = build_model()
    # Accelerate fills in "auto" from here.
    model, _, loader = accelerator.prepare(model, DummyOptim(model.parameters(), lr=3e-3, weight_decay=0.1), loader)
    losses: list[Tensor] = []
    for epoch in range(args.epochs):
        for inputs, labels in loader:
            loss = cross_entropy(model(inputs), labels)
            accelerator.backward(loss)  # with DeepSpeed this takes the step too
            losses.append(loss.detach())
        looksam = model.looksam
        accelerator.print(f"epoch {epoch}: loss {torch.stack(losses[-len(loader):]).mean():.3f}, sharpness "
                          f"{looksam.sharpness:.4f}, {looksam.updates} updates, {looksam.evaluations} evaluations")
    return {"losses": torch.stack(losses).tolist(), "looksam": model.looksam.as_dict()}


if __name__ == "__main__":
    main()

"""Measures what low precision does to LookSAM: the tables in docs/low-precision.md.

    python benchmarks/low_precision.py perturbation        # how far a ViT's rounded weights really move, by rho, dtype
    python benchmarks/low_precision.py rounding            # how far, in a run from bf16 weights, by "rounding" and lr
    python benchmarks/low_precision.py v --data-dir DIR    # training with g_v kept in bf16 beside fp32 (Fashion-MNIST)

One process on the CPU; minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "launch")]

from distributed import leave  # noqa: E402
from images import Images, open_images  # noqa: E402
from vits import build_vit  # noqa: E402

from ds_looksam.arithmetic.eager import add_perturbation, perturbation_scale, squared_norm  # noqa: E402
from tests.inside import stored_v  # noqa: E402

RHOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")


def weights_and_gradient(name: str, batch: int) -> tuple[Tensor, Tensor]:
    """fp32 [n] each: a ViT's weights at initialisation (ImageNet sizes), and a gradient of it on random images."""
    torch.manual_seed(0)
    model = build_vit(name, image_size=224, channels=3, classes=1000)
    model(pixel_values=torch.randn(batch, 3, 224, 224), labels=torch.randint(1000, (batch, ))).loss.backward()
    parameters = list(model.parameters())
    return (torch.cat([p.detach().reshape(-1) for p in parameters]),
            torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]))


def _same(scale: Tensor, lo: int, hi: int) -> Tensor:
    return scale


def perturbation_table(models: list[str], batch: int) -> None:
    print("| model | parameters | dtype | " + " | ".join(f"rho {rho}" for rho in RHOS) + " |")
    print("|---|---|---|" + "---|" * len(RHOS))
    for name in models:
        w, g = weights_and_gradient(name, batch)
        g_squared = squared_norm([g], CPU)
        for (dtype_name, dtype), (how, rounding) in product(DTYPES.items(), {"": None, ", stochastic": 0}.items()):
            out, cells = torch.empty(w.numel(), dtype=dtype), []
            for rho in RHOS:
                scale = perturbation_scale(rho, g_squared)
                moved, dot, eps = add_perturbation(w, g, partial(_same, scale), out, rounding).tolist()
                changed = (out != w.to(dtype)).float().mean().item()
                cells.append(f"{(moved / eps)**0.5:.2f}, {dot / (moved * eps)**0.5:.2f}, {changed:.0%}")
            row = [f"ViT-{name}", f"{w.numel() / 1e6:.1f} M", dtype_name + how, *cells]
            print("| " + " | ".join(row) + " |", flush=True)


def moved_along_eps(rho: float, lr: float, rounding: str, steps: int = 30) -> list[float]:
    """ratio * cosine of each SAM step of a run that starts from bf16 weights, as every bf16 run of DeepSpeed does."""
    import deepspeed
    from torch import nn

    import ds_looksam  # noqa: F401 - the import is what a user writes

    torch.manual_seed(0)
    x, y = torch.randn(64, 256).bfloat16(), torch.randint(10, (64, ))
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 10))
    params = {"k": 1, "rho": rho, "rounding": rounding, "torch_adam": True, "lr": lr}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
        "train_batch_size": 64, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "LookSAM", "params": params}})
    found = []
    for _ in range(steps):
        engine.backward(nn.functional.cross_entropy(engine(x).float(), y))
        engine.step()
        found.append(float(engine.looksam.perturbation_ratio * engine.looksam.perturbation_cosine))
    engine.destroy()
    return found


def rounding_table() -> None:
    print("| rho | lr | `\"nearest\"` | `\"stochastic\"` |\n|---|---|---|---|")
    for rho, lr in product((0.01, 0.046), (1e-6, 1e-5, 1e-3)):
        cells = []
        for rounding in ("nearest", "stochastic"):
            found = torch.tensor(moved_along_eps(rho, lr, rounding))
            cells.append(f"{found.mean():.3f} ± {found.std() / len(found)**0.5:.3f}")
        print("| " + " | ".join([f"{rho:g}", f"{lr:g}", *cells]) + " |", flush=True)


def train(v_dtype: str, seed: int, data_dir: Path, updates: int) -> dict[str, float]:
    """A small ViT in bf16 with ZeRO stage 1; test loss and accuracy, and how v was kept."""
    import deepspeed

    import ds_looksam  # noqa: F401 - the import is what a user writes

    torch.manual_seed(seed)
    training, test = open_images(data_dir)
    model = build_vit("nano/7", image_size=28, channels=1, classes=10)
    config = {
        "train_micro_batch_size_per_gpu": 100, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "LookSAM", "params": {"k": 5, "rho": 0.1, "alpha": 0.2, "lr": 1e-3, "weight_decay": 0.1,
                                                    "v_dtype": v_dtype}}
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
    for update in range(updates):
        images, labels = _batch(training, order[100 * update:100 * update + 100])
        loss = engine(pixel_values=images, labels=labels).loss
        engine.backward(loss)
        engine.step()
    stored = sum(part.numel() * part.element_size() for part in stored_v(engine) or ())
    ratio, cosine = engine.looksam.perturbation_ratio.item(), engine.looksam.perturbation_cosine.item()
    engine.eval()
    losses, hits = 0.0, 0
    with torch.no_grad():
        for start in range(0, 2000, 500):
            images, labels = _batch(test, torch.arange(start, start + 500))
            output = engine(pixel_values=images, labels=labels)
            losses += output.loss.item() / 4
            hits += int((output.logits.argmax(-1) == labels).sum())
    engine.destroy()
    return {"loss": losses, "accuracy": hits / 2000, "bytes": stored, "ratio": ratio, "cosine": cosine}


def _batch(images: Images, indices: Tensor) -> tuple[Tensor, Tensor]:
    pixels, labels = images.__getitems__(indices.tolist())
    return ((pixels / 255 - images.mean[0]) / images.std[0]).bfloat16(), labels


def v_table(data_dir: Path, updates: int, seeds: int) -> None:
    print("| seed | v_dtype | bytes of v | test loss | test accuracy | perturbation ratio, cosine |")
    print("|---|---|---|---|---|---|")
    for seed in range(seeds):
        for v_dtype in ("fp32", "bf16"):
            row = train(v_dtype, seed, data_dir, updates)
            print(f"| {seed} | {v_dtype} | {row['bytes']:.0f} | {row['loss']:.4f} | {row['accuracy']:.4f} | "
                  f"{row['ratio']:.2f}, {row['cosine']:.2f} |", flush=True)


@contextmanager
def one_rank() -> Iterator[None]:
    import os

    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["perturbation", "rounding", "v"])
    parser.add_argument("--models", nargs="+", default=["S/32", "B/16"], help="ViT sizes (default: S/32 B/16)")
    parser.add_argument("--batch", type=int, default=8, help="random images for the gradient")
    parser.add_argument("--data-dir", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if args.what == "perturbation":
        perturbation_table(args.models, args.batch)
        return
    with one_rank():
        if args.what == "rounding":
            rounding_table()
        else:
            v_table(args.data_dir, args.updates, args.seeds)


if __name__ == "__main__":
    main()

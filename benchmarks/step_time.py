"""How long an update takes: the base optimizer, SAM, SAM every k-th step, LookSAM and Look-LayerSAM. Prints Markdown.

    python -m benchmarks.step_time --ranks 2 --stage 1 2      # on a CPU: a ViT of 5.4M parameters
    python -m benchmarks.step_time --model B/16 --image 224 --classes 1000 --precision bf16 --micro-batch 256 # GPU

All of them train in the same processes, in turns: every round gives each a cycle of k updates, on the same data, and
the order is reversed from round to round, so that a machine that slows down slows all of them down. A ratio is taken
within its round; the table has the median over rounds and, in brackets, the quartiles.

The *ideal* is arithmetic: if an evaluation (forward, backward and the reduction of the gradient) takes E and an update
U, as measured on the base optimizer here, then T updates that need N evaluations take N E + T U, and nothing else. The
overhead is what is measured over that.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))

CONTENDERS: dict[str, dict[str, Any]] = {
    "base": {"type": "AdamW"},
    "SAM": {"type": "LookSAM", "k": 1},
    "SAM-k": {"type": "LookSAM", "alpha": 0.0},
    "LookSAM": {"type": "LookSAM"},
    "Look-LayerSAM": {"type": "LookLayerSAM"},
}


@dataclass
class Contender:
    """An engine and what its updates took: ``seconds`` by kind of step, and ``cycles``, seconds of k updates each."""

    engine: Any
    evaluations: float  # per update
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cycles: list[float] = field(default_factory=list)

    def kind(self) -> str:
        return self.engine.looksam.step_kind if hasattr(self.engine, "looksam") else "base"


def build(args: argparse.Namespace, stage: int, name: str) -> Contender:
    import deepspeed
    from vits import build_vit

    torch.manual_seed(0)
    own = dict(CONTENDERS[name])
    kind = own.pop("type")
    params = {"lr": 1e-4, "weight_decay": 0.05, "torch_adam": True}
    if name != "base":
        params |= {"k": args.k, "rho": args.rho, "alpha": args.alpha, **own}
    zero: dict[str, Any] = {"stage": stage}
    if args.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    model = build_vit(args.model, args.image, args.channels, args.classes)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_accumulation_steps": args.accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": kind, "params": params},
    })
    return Contender(engine, 1.0 if name == "base" else 1 + 1 / params["k"])


def batch(args: argparse.Namespace, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (args.micro_batch, args.channels, args.image, args.image)
    pixels = torch.randn(shape, generator=generator)
    labels = torch.randint(args.classes, (args.micro_batch, ), generator=generator)
    return pixels.to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32), labels.to(device)


def update(contender: Contender, data: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """One accumulation window. Seconds in forward and backward, and in step(), the device waited for after each."""
    from deepspeed.accelerator import get_accelerator

    engine, evaluation, step = contender.engine, 0.0, 0.0
    for pixels, labels in data:
        start = time.perf_counter()
        engine.backward(engine(pixel_values=pixels, labels=labels).loss)
        get_accelerator().synchronize()
        middle = time.perf_counter()
        engine.step()
        get_accelerator().synchronize()
        evaluation += middle - start
        step += time.perf_counter() - middle
    return evaluation, step


def measure(args: argparse.Namespace, stage: int) -> dict[str, Contender]:
    import deepspeed

    contenders = {name: build(args, stage, name) for name in args.only}
    device = contenders["base"].engine.device
    data = [batch(args, device, seed) for seed in range(args.accumulation)]
    for contender in contenders.values():
        for _ in range(args.k + 1):  # the first g_v, the first reuse, stage 3's trace, caches; the last was a SAM step
            update(contender, data)
    parts: dict[str, list[float]] = {"evaluation": [], "update": []}
    for number in range(args.rounds):
        order = list(contenders.items())
        for name, contender in order[::-1] if number % 2 else order:
            total = 0.0
            deepspeed.comm.barrier()
            for _ in range(args.k):
                evaluation, step = update(contender, data)
                contender.seconds.setdefault(contender.kind(), []).append(evaluation + step)
                total += evaluation + step
                if name == "base":
                    parts["evaluation"].append(evaluation)
                    parts["update"].append(step)
            contender.cycles.append(total)
    contenders["base"].seconds |= parts
    for contender in contenders.values():
        contender.engine.destroy()
    return contenders


def report(contenders: dict[str, Contender], k: int) -> str:
    base = contenders["base"]
    evaluation, step = median(base.seconds["evaluation"]), median(base.seconds["update"])
    share = evaluation / (evaluation + step)
    lines = ["| | evaluations an update | ms an update | ratio to base | ideal | overhead over the ideal |",
             "|---|---|---|---|---|---|"]
    for name, contender in contenders.items():
        ratios = [cycle / of_base for cycle, of_base in zip(contender.cycles, base.cycles, strict=True)]
        ideal = contender.evaluations * share + 1 - share
        milliseconds = spread([1e3 * cycle / k for cycle in contender.cycles], ".1f")
        overhead = spread([100 * (ratio / ideal - 1) for ratio in ratios], "+.1f")
        lines.append(f"| {name} | {contender.evaluations:.2f} | {milliseconds} | {spread(ratios, '.3f')} | "
                     f"{ideal:.3f} | {overhead} % |")
    of_base = median(base.seconds["base"])
    lines.append(f"\nAn evaluation is {share:.1%} of a base step.")
    for name, contender in contenders.items():
        for kind, evaluations in (("sam", 2), ("reuse", 1), ("base", 1)):
            if kind in contender.seconds and name != "base":
                ideal = (evaluations * share + 1 - share) * of_base
                lines.append(f"- {name}, {kind} step: {spread([s / of_base for s in contender.seconds[kind]], '.3f')} "
                             f"of a base step; the ideal is {ideal / of_base:.3f}")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """The median, and the quartiles in brackets."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return f"{median(values):{form}} [{low:{form}}, {high:{form}}]"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine, one GPU each where there are")
    parser.add_argument("--stage", type=int, nargs="+", default=[2], choices=[0, 1, 2, 3])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--offload", action="store_true", help="the optimizer's state on the CPU (stages 1 to 3)")
    parser.add_argument("--model", default="Ti/4", help="a ViT's SIZE/PATCH, as of launch/train.py")
    parser.add_argument("--image", type=int, default=28)
    parser.add_argument("--channels", type=int, help="default: 1 for images under 32 pixels, else 3")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--alpha", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=9, help="cycles of k updates measured of each")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS),
                        help="leave some out, to save memory; base always runs")
    args = parser.parse_args(argv)
    args.channels = args.channels or (1 if args.image < 32 else 3)
    args.only = [name for name in CONTENDERS if name == "base" or name in args.only]
    return args


def main() -> None:
    args = parse()
    if "RANK" not in os.environ:  # not under a launcher: start one
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  f"--nproc-per-node={args.ranks}", "-m", "benchmarks.step_time", *sys.argv[1:]])
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    import ds_looksam  # noqa: F401 - registers LookSAM

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed()
    for stage in args.stage:
        contenders = measure(args, stage)
        if torch.distributed.get_rank() == 0:
            numel = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel
                        for p in contenders["base"].engine.module.parameters())
            device = "CPU" if get_accelerator().device_name() == "cpu" else torch.cuda.get_device_name()
            print(f"\nZeRO stage {stage}{' with offload' if args.offload else ''}, {args.precision}, "
                  f"{torch.distributed.get_world_size()} ranks on {device}, ViT-{args.model} ({numel / 1e6:.1f}M "
                  f"parameters, {args.image}x{args.image}), micro-batch {args.micro_batch}, accumulation "
                  f"{args.accumulation}, k {args.k}, {args.rounds} rounds\n\n{report(contenders, args.k)}", flush=True)
        del contenders
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""How long an update takes: the base optimizer, SAM, SAM every k-th step, LookSAM and Look-LayerSAM. Prints Markdown.

    python -m benchmarks.step_time --ranks 2 --stage 0 1 2 3  # on a CPU: a ViT of 5.4M parameters
    python -m benchmarks.step_time --model nano/7 --micro-batch 1 --k 2 --rounds 200  # what Python costs
    python -m benchmarks.step_time --model B/16 --image 224 --classes 1000 --precision bf16 --micro-batch 256  # one GPU
    python -m benchmarks.step_time --model gpt-1.3b --stage 3 --offload --precision bf16 --micro-batch 4 \
        --only LookSAM  # one GPU, and, by arithmetic, 60 GB of host memory

All of them train in the same processes and take turns, one update each, on the same data; the order is reversed from
one turn to the next. So every update has one of the base optimizer right beside it, and what is reported is made of
such pairs: a machine that slows down slows both. A round is k turns. The tables have the median over rounds (over
updates, in the second one) and, in brackets, the quartiles.

The *ideal* is arithmetic: if an evaluation (forward, backward and the reduction of the gradient) takes E and an update
U, as the base optimizer's updates beside it took, then T updates that need N evaluations take N E + T U, and nothing
else. The overhead is what is measured over that.

There are two clocks. *Wall* is what a user waits: on a GPU the time that passes there, between events in its queue, so
that the host runs ahead of it as it does in training; it waits only where an update ends. *CPU* is the processor time
of this process and its threads: it does not count other programs, nor waiting for other ranks, but neither does it show
a wait that LookSAM causes. A process that waits for its GPU spins, so there it says little.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from itertools import chain, product
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from benchmarks.scale_models import GPTS, Batch

CONTENDERS: dict[str, dict[str, Any]] = {
    "base": {"type": "AdamW"},
    "SAM": {"type": "LookSAM", "k": 1},
    "SAM-k": {"type": "LookSAM", "alpha": 0.0},
    "LookSAM": {"type": "LookSAM"},
    "Look-LayerSAM": {"type": "LookLayerSAM"},
}


Seconds = tuple[float, float]
"""By the wall clock, and of this process's own CPU time."""

WALL, CPU = 0, 1


@dataclass
class Update:
    """What one update took: forward and backward, and ``step()``."""

    kind: str
    evaluation: Seconds
    step: Seconds

    def seconds(self, clock: int, evaluations: float = 1) -> float:
        """As the base optimizer's, what an update of so many evaluations would take."""
        return evaluations * self.evaluation[clock] + self.step[clock]


@dataclass
class Contender:
    """An engine, how many evaluations an update of it takes, and its updates round by round."""

    engine: Any
    evaluations: float
    rounds: list[list[Update]] = field(default_factory=list)

    def kind(self) -> str:
        return self.engine.looksam.step_kind if hasattr(self.engine, "looksam") else "base"


def build(args: argparse.Namespace, stage: int, precision: str, name: str) -> Contender:
    import deepspeed

    own = dict(CONTENDERS[name])
    kind = own.pop("type")
    # DeepSpeed's own Adam where it is on the CPU, as users have it; elsewhere torch's, which needs no compiler.
    params = {"lr": 1e-4, "weight_decay": 0.05, "torch_adam": not args.offload}
    if name != "base":
        params |= {"k": args.k, "rho": args.rho, "alpha": args.alpha, "compile": args.compile,
                   "ascent": args.ascent, **own}
    zero: dict[str, Any] = {"stage": stage}
    if args.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    model = build_model(args, precision)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_accumulation_steps": args.accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": kind, "params": params},
    })
    return Contender(engine, 1.0 if name == "base" else 1 + 1 / params["k"])


def build_model(args: argparse.Namespace, precision: str) -> nn.Module:
    from vits import build_vit

    torch.manual_seed(0)
    if args.model not in GPTS:
        return build_vit(args.model, args.image, args.channels, args.classes)
    model = GPTS[args.model]().build()
    return model if precision == "bf16" else model.float()


def batch(args: argparse.Namespace, device: torch.device, precision: str, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    if args.model in GPTS:
        tokens = torch.randint(1000, (args.micro_batch, GPTS[args.model]().tokens), generator=generator).to(device)
        return {"input_ids": tokens, "labels": tokens}
    shape = (args.micro_batch, args.channels, args.image, args.image)
    pixels = torch.randn(shape, generator=generator)
    labels = torch.randint(args.classes, (args.micro_batch, ), generator=generator)
    return {"pixel_values": pixels.to(device, torch.bfloat16 if precision == "bf16" else torch.float32),
            "labels": labels.to(device)}


@dataclass(frozen=True)
class Mark:
    """A place in the device's queue of work, and this process's clocks when it was put there."""

    event: Any  # None on a CPU
    wall: float
    cpu: float

    @classmethod
    def put(cls) -> Mark:
        from deepspeed.accelerator import get_accelerator

        event = None
        if get_accelerator().Event is not None:
            event = get_accelerator().Event(enable_timing=True)
            event.record()
        return cls(event, time.perf_counter(), time.process_time())

    def since(self, earlier: Mark) -> Seconds:
        """After the device has been waited for."""
        wall = self.wall - earlier.wall if self.event is None else earlier.event.elapsed_time(self.event) / 1e3
        return wall, self.cpu - earlier.cpu


def update(contender: Contender, data: list[Batch]) -> Update:
    """One accumulation window. The device is waited for at its end."""
    from deepspeed.accelerator import get_accelerator

    engine, marks = contender.engine, []
    for inputs in data:
        start = Mark.put()
        engine.backward(engine(**inputs).loss)
        middle = Mark.put()
        engine.step()
        marks.append((start, middle, Mark.put()))
    get_accelerator().synchronize()
    evaluations = [middle.since(start) for start, middle, _ in marks]
    steps = [end.since(middle) for _, middle, end in marks]
    return Update(contender.kind(), add_up(evaluations), add_up(steps))


def add_up(times: list[Seconds]) -> Seconds:
    return sum(wall for wall, _ in times), sum(cpu for _, cpu in times)


def measure(args: argparse.Namespace, stage: int, precision: str, seconds: float) -> dict[str, Contender]:
    """At most ``args.rounds`` rounds, and no more than fit into ``seconds`` (but three)."""
    import deepspeed

    begin = time.perf_counter()
    contenders = {name: build(args, stage, precision, name) for name in args.only}
    device = contenders["base"].engine.device
    data = [batch(args, device, precision, seed) for seed in range(args.accumulation)]
    for contender in contenders.values():
        for _ in range(3):  # the first g_v, the first reuse, stage 3's trace, caches
            update(contender, data)
    for number in range(args.rounds):
        start = time.perf_counter()
        for contender in contenders.values():
            contender.rounds.append([])
        for turn in range(args.k):
            order = list(contenders.values())
            for contender in order[::-1] if (number + turn) % 2 else order:
                deepspeed.comm.barrier()
                contender.rounds[-1].append(update(contender, data))
        end = time.perf_counter()
        full = torch.tensor([float(number >= 2 and end - begin + (end - start) > seconds)], device=device)
        deepspeed.comm.broadcast(full, 0)  # the ranks' clocks differ, and all have to stop together
        if full.item():
            break
    for contender in contenders.values():
        contender.engine.destroy()
    return contenders


def report(contenders: dict[str, Contender]) -> str:
    base = contenders["base"]
    lines = ["| | evaluations an update | ms an update | ratio to base | ideal | overhead | in CPU time |",
             "|---|---|---|---|---|---|---|"]
    for name, contender in contenders.items():
        pairs = list(zip(contender.rounds, base.rounds, strict=True))
        milliseconds = [1e3 * total(ours) / len(ours) for ours, _ in pairs]
        ratios = [total(ours) / total(theirs) for ours, theirs in pairs]
        ideal = median(total(theirs, evaluations=contender.evaluations) / total(theirs) for _, theirs in pairs)
        wall, cpu = ([100 * (total(ours, clock) / total(theirs, clock, contender.evaluations) - 1)
                      for ours, theirs in pairs] for clock in (WALL, CPU))
        lines.append(f"| {name} | {contender.evaluations:.2f} | {spread(milliseconds, '.1f')} | "
                     f"{spread(ratios, '.3f')} | {ideal:.3f} | {spread(wall, '+.1f')} % | {spread(cpu, '+.1f')} % |")
    lines += ["", "| step | of a base step | ideal | ms over the ideal | in CPU time | CPU time of a base step |",
              "|---|---|---|---|---|---|"]
    for name, contender in contenders.items():
        updates = list(zip(chain(*contender.rounds), chain(*base.rounds), strict=True))
        for kind, evaluations in (("sam", 2), ("reuse", 1), ("base", 1)):
            beside = [(ours, theirs) for ours, theirs in updates if ours.kind == kind]
            if not beside or contender is base:
                continue
            ratios = [ours.seconds(WALL) / theirs.seconds(WALL) for ours, theirs in beside]
            ideal = median(theirs.seconds(WALL, evaluations) / theirs.seconds(WALL) for _, theirs in beside)
            wall, cpu = ([1e3 * (ours.seconds(clock) - theirs.seconds(clock, evaluations)) for ours, theirs in beside]
                         for clock in (WALL, CPU))
            of_base = 1e3 * median(theirs.seconds(CPU) for _, theirs in beside)
            lines.append(f"| {name}, {kind} | {spread(ratios, '.3f')} | {ideal:.3f} | {spread(wall, '+.2f')} | "
                         f"{spread(cpu, '+.2f')} | {of_base:.2f} |")
    return "\n".join(lines)


def total(updates: list[Update], clock: int = WALL, evaluations: float = 1) -> float:
    """Seconds of a round; ``evaluations`` as in :meth:`Update.seconds`."""
    return sum(u.seconds(clock, evaluations) for u in updates)


def spread(values: list[float], form: str) -> str:
    """The median, and the quartiles in brackets."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return f"{median(values):{form}} [{low:{form}}, {high:{form}}]"


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained, and LookSAM's settings: benchmarks/compare.py has the same."""
    parser.add_argument("--model", default="Ti/4", help="a ViT's SIZE/PATCH, as of launch/train.py, or a GPT "
                        f"({', '.join(GPTS)}), over its whole context")
    parser.add_argument("--image", type=int, default=28)
    parser.add_argument("--channels", type=int, help="default: 1 for images under 32 pixels, else 3")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--alpha", type=float, default=0.7)
    parser.add_argument("--ascent", default="global", choices=["global", "rank", "micro_batch", "global_micro_batch"],
                        help="of step_time and parts: LookSAM's")


def default_channels(image: int) -> int:
    return 1 if image < 32 else 3


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine, one GPU each where there are")
    parser.add_argument("--stage", type=int, nargs="+", default=[2], choices=[0, 1, 2, 3])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--offload", action="store_true", help="the optimizer's state on the CPU (stages 1 to 3)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help='"compile": true or false, for all but the base; left out if neither is given')
    add_training_arguments(parser)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="k updates of each are one; at most so many")
    parser.add_argument("--minutes", type=float, default=11.0,
                        help="for everything together: fewer rounds where it would take longer, but at least three")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS),
                        help="leave some out, to save memory; base always runs")
    args = parser.parse_args(argv)
    args.channels = args.channels or default_channels(args.image)
    args.only = [name for name in CONTENDERS if name == "base" or name in args.only]
    return args


def launch(module: str, ranks: int) -> None:
    """If this process was not started by a launcher: be one, which starts ``module`` with the same arguments."""
    if "RANK" not in os.environ:
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  f"--nproc-per-node={ranks}", "-m", module, *sys.argv[1:]])


def main() -> None:
    args = parse()
    launch("benchmarks.step_time", args.ranks)
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from distributed import leave

    import ds_looksam  # noqa: F401 - registers LookSAM

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed()
    seconds = 60 * args.minutes / (len(args.stage) * len(args.precision))
    for stage, precision in product(args.stage, args.precision):
        contenders = measure(args, stage, precision, seconds)
        if torch.distributed.get_rank() == 0:
            numel = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel
                        for p in contenders["base"].engine.module.parameters())
            compiled = "" if args.compile is None else f", compile {args.compile}"
            device = "CPU" if get_accelerator().device_name() == "cpu" else torch.cuda.get_device_name()
            print(f"\nZeRO stage {stage}{' with offload' if args.offload else ''}, {precision}, "
                  f"{torch.distributed.get_world_size()} ranks on {device}, {args.model} ({numel / 1e6:.1f}M "
                  f"parameters){compiled}, micro-batch {args.micro_batch}, accumulation {args.accumulation}, "
                  f"k {args.k}, ascent {args.ascent}, {len(contenders['base'].rounds)} rounds\n\n"
                  f"{report(contenders)}", flush=True)
        del contenders
    leave()


if __name__ == "__main__":
    main()

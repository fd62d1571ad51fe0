"""LookSAM here beside what people use now, on one process, same ViT, data and k. Prints Markdown.

    pip install pytorch_optimizer
    python -m benchmarks.compare                      # CPU: ViT-Ti/4 of 5.4M parameters
    python -m benchmarks.compare --model B/16 --image 224 --classes 1000 --micro-batch 64    # a GPU, where there is one
    python -m benchmarks.compare --check              # pytorch_optimizer's LookSAM against the tests' float64 oracle

Every contender trains in a process of its own, so that its peak memory is its own; the processes take turns, once each
in every round, in an order that is reversed from round to round. Images a second are the median over rounds of
micro-batch x updates / seconds; beside them the same of the process's own CPU time, which other programs on the machine
hardly change. Peak memory is what the process grew by from before the model was built (on a GPU torch's own peak).
Evaluations are counted by a hook on the model's forward.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step_time import add_training_arguments, batch, build_model, default_channels

ADAMW: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.05}
Loss = Callable[[], Tensor]
"""Runs one forward."""


class TwoStepSAM:
    """SAM as it is usually written for a bare model: the loop evaluates, calls first_step(), evaluates again at w + eps
    and calls second_step()."""

    def __init__(self, parameters: list[Tensor], rho: float) -> None:
        self.parameters, self.rho = parameters, rho
        self.base = torch.optim.AdamW(parameters, **ADAMW)
        self.clean: list[Tensor] = []

    @torch.no_grad()
    def first_step(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        self.clean = [p.clone() for p in self.parameters]
        torch._foreach_add_(self.parameters, list(torch._foreach_mul(gradients, self.rho / norm)))
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.parameters, self.clean)
        self.clean = []
        self.base.step()
        self.base.zero_grad()


def ddp(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, Callable[[Loss], None]]:
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def update(loss: Loss) -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return nn.parallel.DistributedDataParallel(model), update


def two_step_sam(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, Callable[[Loss], None]]:
    optimizer = TwoStepSAM(list(model.parameters()), args.rho)

    def update(loss: Loss) -> None:
        loss().backward()
        optimizer.first_step()
        loss().backward()
        optimizer.second_step()

    return nn.parallel.DistributedDataParallel(model), update


def pytorch_optimizer_looksam(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, Callable[[Loss], None]]:
    from pytorch_optimizer import LookSAM

    optimizer = LookSAM(model.parameters(), torch.optim.AdamW, rho=args.rho, k=args.k, alpha=args.alpha, **ADAMW)
    return nn.parallel.DistributedDataParallel(model), closure_updates(optimizer)


def closure_updates(optimizer: Any) -> Callable[[Loss], None]:
    """As in the documentation of pytorch_optimizer's LookSAM: the closure is handed over at every update."""

    def update(loss: Loss) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        closure()
        optimizer.step(closure)

    return update


def deepspeed_engine(own: dict[str, Any], stage: int) -> Callable[..., tuple[nn.Module, Callable[[Loss], None]]]:
    def build(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, Callable[[Loss], None]]:
        import deepspeed

        import ds_looksam  # noqa: F401 - registers LookSAM

        params = {**ADAMW, "torch_adam": True}
        kind = "AdamW"
        if own:
            kind, params = "LookSAM", {**params, "rho": args.rho, "alpha": args.alpha, "k": args.k, **own}
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
            "train_micro_batch_size_per_gpu": args.micro_batch, "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "optimizer": {"type": kind, "params": params}})

        def update(loss: Loss) -> None:
            engine.backward(loss())
            engine.step()

        return engine, update

    return build


CONTENDERS: dict[str, Callable[..., tuple[nn.Module, Callable[[Loss], None]]]] = {
    "AdamW, DDP": ddp,
    "SAM in two steps, DDP": two_step_sam,
    "LookSAM of pytorch_optimizer, DDP": pytorch_optimizer_looksam,
    "AdamW, DeepSpeed ZeRO 1": deepspeed_engine({}, 1),
    "LookSAM here with k = 1 (SAM), ZeRO 1": deepspeed_engine({"k": 1}, 1),
    "LookSAM here, ZeRO 0": deepspeed_engine({"v_dtype": "fp32"}, 0),
    "LookSAM here, ZeRO 1": deepspeed_engine({"v_dtype": "fp32"}, 1),
}


def train(name: str, args: argparse.Namespace) -> dict[str, float]:
    """In this process: warm up for k updates, time ``args.updates``."""
    on_gpu = torch.cuda.is_available()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if "DeepSpeed" in name or "here" in name:
        import deepspeed

        deepspeed.init_distributed("nccl" if on_gpu else "gloo", init_method=f"file://{args.rendezvous}", rank=0,
                                   world_size=1, auto_mpi_discovery=False)
    else:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", init_method=f"file://{args.rendezvous}",
                                             rank=0, world_size=1)
    device = torch.device("cuda" if on_gpu else "cpu")
    inputs = batch(args, device, "fp32", seed=0)
    before = resident()
    model = build_model(args, "fp32").to(device)
    evaluations = 0

    def count(*_: Any) -> None:
        nonlocal evaluations
        evaluations += 1

    model.register_forward_pre_hook(count)
    module, update = CONTENDERS[name](model, args)

    def loss() -> Tensor:
        return module(**inputs).loss

    for _ in range(args.k):
        update(loss)
    evaluations = 0
    start = time.perf_counter(), time.process_time()
    for _ in range(args.updates):
        update(loss)
    if on_gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    images = args.micro_batch * args.updates
    peak = torch.cuda.max_memory_allocated() if on_gpu else (
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    from distributed import leave  # here, because it imports DeepSpeed, which not every contender has in its memory

    leave()
    return {"images a second": images / wall, "images a second of CPU time": images / cpu,
            "evaluations": evaluations / args.updates, "peak": peak}


def resident() -> int:
    """Bytes of memory this process occupies now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_own_process(name: str, argv: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.compare", *argv, "--run", name,
                   "--rendezvous", f"{folder}/rendezvous"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def check() -> None:
    """Weights after each update of SGD with momentum, float64, as relative error to the oracle of the tests."""
    from copy import deepcopy

    from pytorch_optimizer import LookSAM

    from tests.oracle import relative_error
    from tests.training import Case, start_oracle

    case = Case(world=1, base="SGD", k=3, rho=0.1, alpha=0.7, updates=7)
    reference, module, groups = start_oracle(case)
    names = [name for group in groups for name in group.names]
    model = deepcopy(module).double()
    options = case.base_params
    optimizer = LookSAM(model.parameters(), torch.optim.SGD, rho=case.rho, k=case.k, alpha=0.7, **options)
    update = closure_updates(optimizer)
    print("| update | kind | relative error of the weights |\n|---|---|---|")
    for t in range(case.updates):
        window = case.window(t)
        reference.update(window)
        (x, y), = window
        update(lambda x=x, y=y: model(x.double(), y))  # type: ignore[misc]
        weights = dict(model.named_parameters())
        got = torch.cat([weights[name].detach().reshape(-1) for name in names])
        print(f"| {t} | {'reuse' if t % case.k else 'sam'} | {relative_error(got, reference.w):.1e} |")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    parser.add_argument("--updates", type=int, default=10, help="timed in each process, a multiple of k")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--check", action="store_true", help="compare pytorch_optimizer's weights with the oracle's")
    parser.add_argument("--run", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.channels = args.channels or default_channels(args.image)
    if args.updates % args.k:
        parser.error("--updates must be a multiple of --k, or the evaluations are not those of whole periods")
    return args


def main() -> None:
    args = parse()
    if args.run:
        print(json.dumps(train(args.run, args)))
        return
    if args.check:
        return check()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    for number in range(args.rounds):
        for name in args.only[::-1] if number % 2 else args.only:
            results[name].append(in_own_process(name, sys.argv[1:]))
    print("| | evaluations per update | images a second | of CPU time | peak memory, MB |\n|---|---|---|---|---|")
    for name, runs in results.items():
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        print(f"| {name} | {middle['evaluations']:.2f} | {middle['images a second']:.1f} | "
              f"{middle['images a second of CPU time']:.1f} | {middle['peak'] / 1e6:.0f} |")


if __name__ == "__main__":
    main()

"""The arithmetic on shards: bytes it must move, and how fast it moves them beside a plain copy. Prints Markdown.

    python -m benchmarks.algebra                    # 22 million elements (a ViT-S), one thread
    python -m benchmarks.algebra --device cuda --numel 86000000
    python -m benchmarks.algebra --compile          # with "compile": true

*Bytes* are the fewest an element that the operation can do with: every operand read once, every result written once.
The sums over ranks force the cuts between passes: u = g + c v needs ‖g‖ of the whole model, g_v needs <g, g_s>. *Of a
copy* is the bandwidth these bytes come to, as a share of what ``Tensor.copy_`` of the same number of elements reaches
in the same turn (it reads and writes 4 bytes an element); 77 % is 1.3 times the time that the bytes alone would take.
Times are CPU time on a CPU, medians over turns in which each operation runs once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ds_looksam.arithmetic.eager import EAGER, Passes
from ds_looksam.engines.passes import choose_passes


@dataclass
class Operation:
    """``step``: reuse or SAM. ``nbytes``: the fewest for one element."""

    step: str
    name: str
    nbytes: int
    run: Callable[[], object]


def operations(numel: int, device: torch.device, passes: Passes) -> list[Operation]:
    def flat(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(numel, device=device).to(dtype)

    g, g_s, v, w, out = (flat() for _ in range(5))
    low, v_low = flat(torch.bfloat16), flat(torch.bfloat16)
    small = torch.tensor(1e-6, dtype=torch.float64, device=device)
    scale = small.float()
    return [
        Operation("", "copy", 8, lambda: out.copy_(w)),
        Operation("reuse, SAM", "‖g‖²: read g", 4, lambda: passes.squared_norm([g], device)),
        Operation("reuse", "u = g + c v: read g, v, write g", 12, lambda: passes.add_reused_([g], [v], [small])),
        Operation("reuse", "the same with v in bf16", 10, lambda: passes.add_reused_([g], [v_low], [small])),
        Operation("SAM", "w + eps in fp32: read w, g, write", 12,
                  lambda: passes.add_perturbation(w, g, lambda lo, hi: scale, out)),
        Operation("SAM", "w + eps in bf16, and how far it moved: read w, g, write", 10,
                  lambda: passes.add_perturbation(w, g, lambda lo, hi: scale, low)),
        Operation("SAM", "<g, d>, ‖d‖², <v, d>, <v, g>: read g, g_s, v", 12,
                  lambda: passes.replay_sums([g], [g_s], [v], device)),
        Operation("SAM", "g_v: read g, g_s, write g", 12, lambda: passes.project_out_([g], [g_s], small)),
        Operation("SAM", "‖g_v‖² as stored: read g_v", 4, lambda: passes.squared_norm([v], device)),
    ]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=22_000_000)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; the CPU time of all of them is counted")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    todo = operations(args.numel, args.device, choose_passes(args.device, True) if args.compile else EAGER)
    if args.compile:
        for operation in todo:
            operation.run()
        print(f"All compiled after {time.perf_counter() - start:.1f} s\n")
    times: list[list[float]] = [[] for _ in todo]
    for turn in range(args.turns + 1):
        for operation, taken in zip(todo, times, strict=True):
            value = seconds(operation.run, args.device)
            if turn:  # the first one fetches memory
                taken.append(value)
    print("| step | | bytes an element | ms | GB/s | of a copy |\n|---|---|---|---|---|---|")
    for operation, taken in zip(todo, times, strict=True):
        # Pairs of one turn: a busy machine slows down the copy as well.
        share = median((operation.nbytes / t) / (8 / of_copy) for t, of_copy in zip(taken, times[0], strict=True))
        print(f"| {operation.step} | {operation.name} | {operation.nbytes} | {1e3 * median(taken):.1f} | "
              f"{operation.nbytes * args.numel / median(taken) / 1e9:.0f} | {share:.0%} |")


if __name__ == "__main__":
    main()

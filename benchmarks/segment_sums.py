"""Squared norms of the layers in one flat shard: which way is fastest, and how exact it is.

    python -m benchmarks.segment_sums [--device cuda]

Prints milliseconds (the best of several runs) and the largest relative error of a layer against float64. The way that
ds_looksam/arithmetic/layout.py uses is the last but one on a GPU and the last on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ds_looksam.arithmetic.eager import CHUNK_CPU, chunks
from ds_looksam.arithmetic.layout import CUT_DEVICE

SHARDS = {"ViT-S of 150 tensors": (150, 22_000_000), "1,500 tensors": (1500, 22_000_000),
          "1,500 tensors on one of 64 ranks": (1500, 350_000), "10 tensors": (10, 86_000_000)}


def ways(x: Tensor, lengths: list[int]) -> dict[str, Callable[[], Tensor]]:
    counts = torch.tensor(lengths, device=x.device)
    layer = torch.arange(len(lengths), device=x.device)

    def index_add() -> Tensor:
        # The layer of every element: as many int64 as the shard has elements. Kept, it would be twice the shard.
        of_element = torch.repeat_interleave(layer, counts, output_size=x.numel())
        out = torch.zeros(len(lengths), dtype=torch.float64, device=x.device)
        return out.index_add_(0, of_element, (x * x).double())

    cuts = [[b - a for a, b in chunks(length, CUT_DEVICE)] for length in lengths]
    cut_lengths = torch.tensor([cut for of_piece in cuts for cut in of_piece], device=x.device)
    parts = torch.tensor([len(of_piece) for of_piece in cuts], device=x.device)

    def segment_reduce_twice() -> Tensor:
        sums = torch.segment_reduce(x * x, "sum", lengths=cut_lengths, unsafe=True).double()
        return torch.segment_reduce(sums, "sum", lengths=parts, unsafe=True)

    def dots_of_pieces() -> Tensor:
        pieces = [[part] if part.numel() <= CHUNK_CPU else part.split(CHUNK_CPU) for part in x.split(lengths)]
        sums = torch.stack([torch.dot(piece, piece) for parts in pieces for piece in parts]).double()
        index = torch.tensor([i for i, parts in enumerate(pieces) for _ in parts], device=x.device)
        return torch.zeros(len(lengths), dtype=torch.float64, device=x.device).index_add_(0, index, sums)

    return {
        "_foreach_norm of views": lambda: torch.stack(torch._foreach_norm(x.split(lengths))).double().square(),
        "_foreach_norm of views in float64":
            lambda: torch.stack(torch._foreach_norm(x.split(lengths), 2, dtype=torch.float64)).square(),
        "segment_reduce": lambda: torch.segment_reduce(x * x, "sum", lengths=counts).double(),
        "index_add": index_add,
        "one dot per tensor": lambda: torch.stack([torch.dot(part, part) for part in x.split(lengths)]).double(),
        "segment_reduce of pieces, and of these": segment_reduce_twice,
        "dots of pieces of tensors": dots_of_pieces,
    }


def milliseconds(run: Callable[[], Tensor], device: torch.device, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    generator = torch.Generator().manual_seed(0)
    for name, (tensors, numel) in SHARDS.items():
        cuts = torch.randperm(numel - 1, generator=generator)[:tensors - 1].sort().values + 1
        lengths = torch.diff(torch.cat([torch.zeros(1, dtype=cuts.dtype), cuts, torch.tensor([numel])])).tolist()
        x = torch.randn(numel, generator=generator).to(device)
        exact = torch.stack([part.double().square().sum() for part in x.split(lengths)])
        print(f"{name} ({numel:,} elements, {device})")
        for way, run in ways(x, lengths).items():
            error = ((run() - exact) / exact).abs().max().item()
            print(f"  {way:38} {milliseconds(run, device):9.2f} ms   {error:.0e}")


if __name__ == "__main__":
    main()

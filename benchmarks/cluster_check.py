"""How far :mod:`benchmarks.cluster_model` is off where it can be measured: real CPU ranks of this machine. Markdown.

    python -m benchmarks.cluster_check
    python -m benchmarks.cluster_check --stage 0 1 2 --ranks 1 2 4 --rounds 9

Calibrated on little, so that there is something left to predict: FLOP/s and memory bandwidth on AdamW alone in one
process; bandwidth and latency of a link on two all-reduces, a small and a large one, between two ranks without any
training. Predicted, and then measured: AdamW, SAM and LookSAM (k = 2) on every stage and number of ranks.

Ranks beyond the machine's cores share them: FLOP/s and memory bandwidth are divided. Timed by
:mod:`benchmarks.step_time`; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from dataclasses import replace
from statistics import median

import torch

from benchmarks import step_time
from benchmarks.cluster_model import ADAMW, SCALARS, Cluster, Workload, predict
from benchmarks.scale_models import vit
from tests.ranks import run_on_ranks

MODEL, IMAGE, CHANNELS, CLASSES, MICRO_BATCH, K = "mini/7", 28, 1, 10, 32, 2
NAMES = ("base", "SAM", "LookSAM")

Seconds = dict[str, float]


def train(stage: int, rounds: int) -> Seconds:
    """On every rank: seconds of an update of each contender, and of AdamW's evaluation and step()."""
    import ds_looksam  # noqa: F401 - registers LookSAM

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    args = step_time.parse(["--model", MODEL, "--image", str(IMAGE), "--classes", str(CLASSES), "--precision", "bf16",
                            "--micro-batch", str(MICRO_BATCH), "--k", str(K), "--rounds", str(rounds),
                            "--only", *NAMES])
    contenders = step_time.measure(args, stage)
    seconds = {name: median(contender.cycles) / K for name, contender in contenders.items()}
    base = contenders["base"].seconds
    return seconds | {"evaluation": median(base["evaluation"]), "step": median(base["update"])}


def all_reduces(sizes: list[int], repeats: int = 15) -> list[float]:
    """On every rank: seconds of an all-reduce of so many bytes of bf16."""
    result = []
    for nbytes in sizes:
        payload, times = torch.zeros(nbytes // 2, dtype=torch.bfloat16), []
        for _ in range(repeats):
            torch.distributed.barrier()
            start = time.perf_counter()
            torch.distributed.all_reduce(payload)
            times.append(time.perf_counter() - start)
        result.append(median(times))
    return result


def calibrate(work: Workload, alone: Seconds, small: float, large: float) -> Cluster:
    """From AdamW alone in one process, and two all-reduces between two ranks: 2 (n - 1) (bytes / n / bandwidth +
    latency) with n = 2."""
    latency = small / 2
    return Cluster(flops=3 * work.forward_flops * work.micro_batch / alone["evaluation"],
                   memory=ADAMW * work.numel / alone["step"],
                   intra=work.numel * 2 / 2 / max(large / 2 - latency, 1e-9), inter=float("inf"),
                   latency_intra=latency, latency_inter=latency, gpus_per_node=64, overlap=0, host=0,
                   algorithm="ring")


def on_shared_cores(cluster: Cluster, ranks: int, cores: int) -> Cluster:
    share = min(1.0, cores / ranks)
    return replace(cluster, flops=cluster.flops * share, memory=cluster.memory * share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, nargs="+", default=[0, 1, 2], choices=[0, 1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model, cores = vit(MODEL, IMAGE, CHANNELS, CLASSES), len(os.sched_getaffinity(0))
    work = Workload(model.forward_flops(), model.sizes(), micro_batch=MICRO_BATCH, k=K)
    small, large = run_on_ranks(2, all_reduces, [SCALARS, 2 * work.numel])[0]
    cluster = calibrate(work, run_on_ranks(1, train, 1, args.rounds)[0], small, large)
    print(f"Calibrated: {cluster.flops / 1e9:.1f} GFLOP/s, {cluster.memory / 1e9:.2f} GB/s memory, "
          f"{cluster.intra / 1e9:.2f} GB/s and {cluster.latency_intra * 1e6:.0f} us a link; {cores} cores, load "
          f"{os.getloadavg()[0]:.1f}\n")
    print("| stage | ranks | AdamW, ms: predicted | measured | LookSAM / AdamW: predicted | measured | error | "
          "SAM / AdamW: predicted | measured | error |\n|---|---|---|---|---|---|---|---|---|---|")
    errors = []
    for stage in args.stage:
        for ranks in args.ranks:
            expected = predict(on_shared_cores(cluster, ranks, cores), replace(work, stage=stage), ranks)
            got = run_on_ranks(ranks, train, stage, args.rounds, timeout=1200)[0]
            cells = [str(stage), str(ranks), f"{1e3 * expected.adamw:.1f}", f"{1e3 * got['base']:.1f}"]
            for name, seconds in (("LookSAM", expected.looksam), ("SAM", expected.sam)):
                predicted, measured = seconds / expected.adamw, got[name] / got["base"]
                errors.append(predicted / measured - 1)
                cells += [f"{predicted:.3f}", f"{measured:.3f}", f"{errors[-1]:+.1%}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\nRatios are off by {median(map(abs, errors)):.1%} in the median, {max(errors, key=abs):+.1%} at worst.")


if __name__ == "__main__":
    main()

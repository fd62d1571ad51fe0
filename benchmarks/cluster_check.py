"""How far :mod:`benchmarks.cluster_model` is off where it can be measured: real CPU ranks of this machine. Markdown.

    python -m benchmarks.cluster_check
    python -m benchmarks.cluster_check --clock cpu   # on a busy machine

Calibrated on little, so that there is something left to predict: FLOP/s and memory bandwidth on AdamW alone in one
process; bandwidth and latency of a link on two all-reduces, a small and a large one, between two ranks without any
training. Predicted, and then measured: AdamW, SAM and LookSAM (k = 2) on every stage and number of ranks.

By the wall clock, ranks beyond the machine's cores share them: FLOP/s and memory bandwidth are divided. The CPU clock
counts what a rank computes and copies, gloo's threads included, and no waiting, for the network or for a core: other
programs hardly disturb it, but it says less. Timed by :mod:`benchmarks.step_time`.
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


def train(stage: int, rounds: int, clock: int) -> Seconds:
    """On every rank: an update of each contender, and AdamW's evaluation and step(), by step_time's clock."""
    import ds_looksam  # noqa: F401 - registers LookSAM

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    args = step_time.parse(["--model", MODEL, "--image", str(IMAGE), "--classes", str(CLASSES),
                            "--micro-batch", str(MICRO_BATCH), "--k", str(K), "--rounds", str(rounds),
                            "--only", *NAMES])
    contenders = step_time.measure(args, stage, "bf16", seconds=float("inf"))
    result: Seconds = {}
    for name, contender in contenders.items():
        updates = [update for turns in contender.rounds for update in turns]
        result[name] = median(step_time.total(turns, clock) for turns in contender.rounds) / K
        if name == "base":
            result["evaluation"] = median(update.evaluation[clock] for update in updates)
            result["step"] = median(update.step[clock] for update in updates)
    return result


def all_reduces(sizes: list[int], clock: int, repeats: int = 15) -> list[float]:
    """On every rank: seconds of an all-reduce of so many bytes of bf16."""
    seconds, result = (time.perf_counter, time.process_time)[clock], []
    for nbytes in sizes:
        payload, times = torch.zeros(nbytes // 2, dtype=torch.bfloat16), []
        for _ in range(repeats):
            torch.distributed.barrier()
            start = seconds()
            torch.distributed.all_reduce(payload)
            times.append(seconds() - start)
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
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    clock = {"wall": step_time.WALL, "cpu": step_time.CPU}[args.clock]
    model, cores = vit(MODEL, IMAGE, CHANNELS, CLASSES), len(os.sched_getaffinity(0))
    work = Workload(model.forward_flops(), model.sizes(), micro_batch=MICRO_BATCH, k=K)
    small, large = run_on_ranks(2, all_reduces, [SCALARS, 2 * work.numel], clock)[0]
    cluster = calibrate(work, run_on_ranks(1, train, 1, args.rounds, clock, timeout=1200)[0], small, large)
    print(f"Calibrated: {cluster.flops / 1e9:.1f} GFLOP/s, {cluster.memory / 1e9:.2f} GB/s memory, "
          f"{cluster.intra / 1e9:.2f} GB/s and {cluster.latency_intra * 1e6:.0f} us a link; {cores} cores, load "
          f"{os.getloadavg()[0]:.1f}\n")
    print("| stage | ranks | AdamW, ms: predicted | measured | LookSAM / AdamW: predicted | measured | error | "
          "SAM / AdamW: predicted | measured | error |\n|---|---|---|---|---|---|---|---|---|---|")
    errors = []
    for stage in args.stage:
        for ranks in args.ranks:
            own = on_shared_cores(cluster, ranks, cores) if clock == step_time.WALL else cluster
            expected = predict(own, replace(work, stage=stage), ranks)
            got = run_on_ranks(ranks, train, stage, args.rounds, clock, timeout=1200)[0]
            cells = [str(stage), str(ranks), f"{1e3 * expected.adamw:.1f}", f"{1e3 * got['base']:.1f}"]
            for name, seconds in (("LookSAM", expected.looksam), ("SAM", expected.sam)):
                predicted, measured = seconds / expected.adamw, got[name] / got["base"]
                errors.append(predicted / measured - 1)
                cells += [f"{predicted:.3f}", f"{measured:.3f}", f"{errors[-1]:+.1%}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\nRatios are off by {median(map(abs, errors)):.1%} in the median, {max(errors, key=abs):+.1%} at worst.")


if __name__ == "__main__":
    main()

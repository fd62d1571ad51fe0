"""How long an update takes on a cluster, by arithmetic: AdamW, SAM and LookSAM on 8 to 4,096 GPUs. Prints Markdown.

    python -m benchmarks.cluster_model                              # ViT-B/16, ZeRO-2, 256 images a GPU
    python -m benchmarks.cluster_model --global-batch 32768         # the same images over ever more GPUs
    python -m benchmarks.cluster_model --model gpt-1.3b --stage 3 --micro-batch 4 --algorithm ring
    python -m benchmarks.cluster_model --ascent rank                # a perturbation for each GPU
    python -m benchmarks.cluster_model --plot scaling.svg

A model, not a measurement: docs/scaling.md says what it assumes, and how far it was off where it could be checked
(:mod:`benchmarks.cluster_check`). Bytes come from :mod:`benchmarks.scale_formulas`, which :mod:`benchmarks.scale`
compares with what DeepSpeed really asks for. Every other number is an argument.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import scale_formulas
from benchmarks.scale_models import MODELS

# Bytes that an update moves through memory for each element of the shard, least. fp32: a number read or written is 4.
ADAMW = 2 + 6 * 4 + 2
"""Gradient (bf16) read; master weight and two moments read and written; weight written in bf16."""
REUSE = 4 + 3 * 4
"""‖g‖; u = g + factor v: g and v read, g written."""
SAM = 4 + (4 + 4 + 2) + 3 * 4 + 3 * 4 + 4
"""‖g‖; w + eps: w and g read, bf16 written; the sums over g, g_s and v; g_v: g and g_s read, g written; ‖g_v‖."""
OWN_SUM = 3 * 2
"""A rank's own gradient of a micro-batch, of the whole model in bf16: read, added to what is there."""
OWN_PERTURBATION = 2 + 3 * 2
"""Its norm; w + eps in place."""
CLEAN_COPY = 4 * 2
"""Of the weights in bf16: kept, and copied back."""
MICRO_BATCH_SUMS = 2 * 3 * 4
"""g and g_s of a micro-batch are added to those of the window."""
SCALARS = 64
"""Bytes of the larger all-reduce of scalars: it is all latency."""


@dataclass(frozen=True)
class Cluster:
    """``flops``: a GPU's achieved FLOP/s, not its peak. ``memory``: bytes/s of its memory. ``intra``: bytes/s a GPU
    sends to another in its node; ``inter``: bytes/s a node sends to another, all its network cards together.
    ``latency_intra``, ``latency_inter``: seconds of one step from a GPU to the next. ``overlap``: the part of an
    evaluation's computation behind which communication can hide. ``host``: seconds that DeepSpeed's ZeRO-3 takes on the
    host for each rank and tensor, per evaluation (``python -m benchmarks.scale --stage 3`` measures it)."""

    flops: float = 400e12
    memory: float = 2.5e12
    intra: float = 350e9
    inter: float = 350e9
    latency_intra: float = 1e-6
    latency_inter: float = 5e-6
    gpus_per_node: int = 8
    overlap: float = 0.7
    host: float = 4e-6
    algorithm: str = "best"

    def all_reduce(self, ranks: int, nbytes: float) -> float:
        """Ring (Patarasuk, Yuan 2009): 2 (n - 1) steps of nbytes / n each. Tree: a pipelined double binary tree over
        nodes and a chain in each (Sanders et al. 2009; NCCL 2.4): all bytes up and down, at logarithmic latency."""
        return self._fastest(ranks, nbytes, ring=2 * self._ring(ranks, nbytes),
                             tree=2 * (nbytes / self._bandwidth(ranks) + self._tree_latency(ranks)))

    def all_gather(self, ranks: int, nbytes: float) -> float:
        """``nbytes`` come out. Ring: n - 1 steps of nbytes / n. Tree: the same bytes at logarithmic latency (recursive
        doubling; NCCL 2.23's PAT). A reduce-scatter is an all-gather run backwards, and takes as long."""
        sent = (ranks - 1) / ranks * nbytes
        return self._fastest(ranks, nbytes, ring=self._ring(ranks, nbytes),
                             tree=sent / self._bandwidth(ranks) + self._tree_latency(ranks))

    def _fastest(self, ranks: int, nbytes: float, ring: float, tree: float) -> float:
        if ranks == 1 or nbytes == 0:
            return 0.0
        return {"ring": ring, "tree": tree, "best": min(ring, tree)}[self.algorithm]

    def _ring(self, ranks: int, nbytes: float) -> float:
        """A ring goes at the pace of its slowest link."""
        latency = self.latency_intra if ranks <= self.gpus_per_node else self.latency_inter
        return (ranks - 1) * (nbytes / ranks / self._bandwidth(ranks) + latency)

    def _tree_latency(self, ranks: int) -> float:
        in_node = min(ranks, self.gpus_per_node)
        nodes = math.ceil(ranks / self.gpus_per_node)
        return (in_node - 1) * self.latency_intra + math.ceil(math.log2(nodes)) * self.latency_inter

    def _bandwidth(self, ranks: int) -> float:
        return self.intra if ranks <= self.gpus_per_node else min(self.intra, self.inter)


@dataclass(frozen=True)
class Workload:
    """A training run. ``forward_flops``: of a sample. ``sizes``: elements of each parameter tensor, and of each use of
    one. ``micro_batch``, ``accumulation``: of a rank, an update. ``bucket``: elements that DeepSpeed sends at once."""

    forward_flops: float
    sizes: tuple[list[int], list[int]]
    stage: int = 2
    micro_batch: float = 256
    accumulation: int = 1
    bucket: int = 500_000_000
    k: int = 5
    ascent: str = "global"

    @cached_property
    def numel(self) -> int:
        return sum(self.sizes[0])

    @property
    def samples(self) -> float:
        """Of a rank, an update."""
        return self.micro_batch * self.accumulation


@dataclass(frozen=True)
class Update:
    """Seconds of one update of each kind; LookSAM's ``sam`` and ``reuse`` steps, and the mean over ``k``."""

    k: int
    evaluation: float
    adamw: float
    sam: float
    reuse: float
    looksam: float

    @property
    def throughput(self) -> float:
        """LookSAM's samples a second beside AdamW's."""
        return self.adamw / self.looksam

    @property
    def overhead(self) -> float:
        """What LookSAM takes over its evaluations and AdamW's update, as a part of that."""
        return self.looksam / (self.adamw + self.evaluation / self.k) - 1


def predict(cluster: Cluster, work: Workload, ranks: int) -> Update:
    """The time of an update on ``ranks`` GPUs."""
    formulas = scale_formulas.Formulas(work.stage, ranks, *work.sizes)
    evaluation = window_seconds(cluster, work, ranks)
    publish, publish_eps = (publication_seconds(cluster, work, ranks, at_once) for at_once in (False, True))
    element = formulas.owned / cluster.memory  # seconds for a byte of every element of the shard
    scalars = cluster.all_reduce(ranks, SCALARS) if work.stage else 0.0
    adamw = evaluation + ADAMW * element + publish + scalars  # the clipping norm
    reuse = adamw + REUSE * element + scalars
    sam = adamw + evaluation + SAM * element + publish_eps + 3 * scalars
    if work.ascent != "global":
        sam += ascent_seconds(cluster, work, ranks)
    return Update(work.k, evaluation, adamw, sam, reuse, (sam + (work.k - 1) * reuse) / work.k)


def ascent_seconds(cluster: Cluster, work: Workload, ranks: int) -> float:
    """What a SAM step takes beside one with a global perturbation; less where that does not have to be published."""
    formulas = scale_formulas.Formulas(work.stage, ranks, *work.sizes)
    shard, model = formulas.owned / cluster.memory, formulas.numel / cluster.memory
    publish_eps = publication_seconds(cluster, work, ranks, at_once=True)
    more = 0.0
    if work.ascent in ("rank", "micro_batch"):
        more += work.accumulation * OWN_SUM * model - publish_eps
    if work.ascent == "rank":
        return more + OWN_PERTURBATION * model
    reduced, usual = (window_seconds(cluster, work, ranks, each) for each in (True, False))
    more += 2 * (reduced - usual) + (work.accumulation - 1) * (MICRO_BATCH_SUMS + SAM) * shard
    if work.ascent == "micro_batch":
        return more + work.accumulation * (OWN_PERTURBATION + CLEAN_COPY) * model
    return more + (2 * work.accumulation - 1) * publish_eps  # and w again


def publication_seconds(cluster: Cluster, work: Workload, ranks: int, at_once: bool) -> float:
    """Of new weights, or of w + eps (``at_once``): one all-gather, but that on stage 3 DeepSpeed sends new weights with
    one for each tensor that stays gathered."""
    nbytes = scale_formulas.Formulas(work.stage, ranks, *work.sizes).update().get("allgather_base", 0)
    if not nbytes:
        return 0.0
    messages = sum(n <= scale_formulas.PERSISTENT for n in work.sizes[0]) if work.stage == 3 and not at_once else 1
    return messages * cluster.all_gather(ranks, nbytes / messages)


def window_seconds(cluster: Cluster, work: Workload, ranks: int, each: bool = False) -> float:
    """Forward, backward and reduction of all of a window's micro-batches. Stages 0 and 1 reduce in the last one, but
    where ``each`` is one for itself."""
    computing = 3 * work.forward_flops * work.micro_batch / cluster.flops
    payloads = scale_formulas.Formulas(work.stage, ranks, *work.sizes).evaluation()
    buckets = math.ceil(work.numel / work.bucket)
    reducing = buckets * cluster.all_reduce(ranks, payloads.get("allreduce", 0) / buckets)
    reducing += buckets * cluster.all_gather(ranks, payloads.get("reduce_scatter_base", 0) / buckets)
    gathered = payloads.get("allgather_base", 0)
    gathers = 2 * sum(n > scale_formulas.PERSISTENT for n in work.sizes[1])
    gathering = gathers * cluster.all_gather(ranks, gathered / gathers) if gathered else 0.0
    host = cluster.host * ranks * len(work.sizes[0]) if work.stage == 3 and ranks > 1 else 0.0

    def exposed(communication: float) -> float:
        return max(computing, host) + max(0.0, communication - cluster.overlap * computing)

    if work.stage < 2 and not each:
        return (work.accumulation - 1) * computing + exposed(reducing)
    return work.accumulation * exposed(reducing + gathering)


# Output ---------------------------------------------------------------------------------------------------------------


def split_batch(global_batch: int, ranks: int, largest: int) -> tuple[float, int]:
    """A rank's micro-batch and accumulation for its part of the batch, the micro-batch at most ``largest``."""
    own = global_batch / ranks
    accumulation = math.ceil(own / largest)
    return own / accumulation, accumulation


def rows(args: argparse.Namespace, cluster: Cluster) -> list[tuple[int, Workload, Update]]:
    model = MODELS[args.model]()
    work = Workload(model.forward_flops(), model.sizes(), args.stage, args.micro_batch, k=args.k,
                    ascent=args.ascent)
    result = []
    for ranks in args.gpus:
        if args.global_batch:
            micro_batch, accumulation = split_batch(args.global_batch, ranks, args.micro_batch)
            work = replace(work, micro_batch=micro_batch, accumulation=accumulation)
        result.append((ranks, work, predict(cluster, work, ranks)))
    return result


def table(lines: list[tuple[int, Workload, Update]]) -> str:
    """Markdown. Scaling is samples a second and GPU, beside the first row's."""
    text = ["| GPUs | samples a GPU and update | AdamW, ms | scaling | LookSAM, ms | scaling | "
            "LookSAM's throughput over AdamW's | SAM's | LookSAM over its evaluations |",
            "|---|---|---|---|---|---|---|---|---|"]

    _, first_work, first = lines[0]
    for ranks, work, update in lines:
        more = work.samples / first_work.samples
        adamw, looksam = more * first.adamw / update.adamw, more * first.looksam / update.looksam
        cells = [f"{ranks:,}", f"{work.samples:g}", f"{1e3 * update.adamw:.1f}", f"{adamw:.0%}",
                 f"{1e3 * update.looksam:.1f}", f"{looksam:.0%}", f"{update.throughput:.3f}",
                 f"{update.adamw / update.sam:.3f}", f"{update.overhead:+.2%}"]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def plot(path: Path, args: argparse.Namespace, cluster: Cluster) -> None:
    """Throughput over AdamW's and scaling, for ring and tree."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for algorithm, style in (("ring", ":"), ("tree", "--"), ("best", "-")):
        lines = rows(args, replace(cluster, algorithm=algorithm))
        gpus = [ranks for ranks, *_ in lines]
        for color, name, ratios in (("C0", "LookSAM", [update.throughput for *_, update in lines]),
                                    ("C1", "SAM", [update.adamw / update.sam for *_, update in lines])):
            axes[0].plot(gpus, ratios, style, color=color, label=f"{name}, {algorithm}")
        for color, name in (("C2", "adamw"), ("C0", "looksam")):
            rate = [work.samples * ranks / getattr(update, name) for ranks, work, update in lines]
            axes[1].plot(gpus, rate, style, color=color, label=f"{name}, {algorithm}")
    axes[0].axhline(1 / (1 + 1 / args.k), color="grey", linewidth=0.8)
    axes[0].set(xscale="log", xlabel="GPUs", title="throughput over AdamW's (grey: evaluations alone)", ylim=(0, 1))
    axes[1].set(xscale="log", yscale="log", xlabel="GPUs", title="samples a second")
    for axis in axes:
        axis.set_xticks(args.gpus, [f"{n:,}" for n in args.gpus])
        axis.minorticks_off()
        axis.legend(fontsize="small")
    figure.suptitle(f"{args.model}, ZeRO-{args.stage}, predicted")
    figure.tight_layout()
    figure.savefig(path)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Cluster]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit-b16")
    parser.add_argument("--stage", type=int, choices=[0, 1, 2, 3], default=2)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--micro-batch", type=int, default=256, help="samples of a GPU; with --global-batch the most")
    parser.add_argument("--global-batch", type=int, help="samples of an update, over all GPUs")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--ascent", choices=["global", "rank", "micro_batch", "global_micro_batch"], default="global")
    parser.add_argument("--plot", type=Path, help="a file for matplotlib: .png, .svg, ...")
    kinds: dict[str, Callable[[str], Any]] = {"gpus_per_node": int, "algorithm": str}
    for name, default in vars(Cluster()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=kinds.get(name, float), default=default,
                            choices=["ring", "tree", "best"] if name == "algorithm" else None,
                            help=f"see Cluster; default {default:g}" if name != "algorithm" else f"default {default}")
    args = parser.parse_args(argv)
    if args.stage == 3 and args.ascent in ("rank", "micro_batch"):
        parser.error(f"--ascent {args.ascent} is for stages 0 to 2")
    return args, Cluster(**{name: getattr(args, name) for name in vars(Cluster())})


def main() -> None:
    args, cluster = parse()
    print(table(rows(args, cluster)))
    if args.plot:
        plot(args.plot, args, cluster)


if __name__ == "__main__":
    main()

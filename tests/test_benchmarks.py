"""What docs/costs.md says is what benchmarks/traffic.py measures; and the arithmetic of cluster_model.py, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import traffic
from benchmarks.cluster_model import ADAMW, REUSE, SAM, Cluster, Workload, parse, predict, rows, split_batch, table
from benchmarks.scale_models import MODELS

PAGE = Path(__file__).parent.parent / "docs" / "costs.md"


def test_traffic() -> None:
    measured = [traffic.measure(stage, world=2, precision="bf16") for stage in traffic.STAGES]
    shown = PAGE.read_text().split("<!-- python -m benchmarks.traffic -->\n")[1]
    assert shown.startswith(traffic.table(measured) + "\n\n")
    assert all({c.ranks for c in row.sam} == {2} for row in measured)


# Small numbers, so that each time below can be followed. 4 ranks are 2 nodes, 32 are 16: 4 levels of a tree.
SLOW = Cluster(flops=10, memory=100, intra=4, inter=2, latency_intra=0.5, latency_inter=1, gpus_per_node=2, overlap=0,
               host=0)
RING = replace(SLOW, algorithm="ring")
WORK = Workload(forward_flops=20, sizes=([160], [160]), stage=2, micro_batch=3, accumulation=2, k=4)
# Of WORK on 4 ranks.
COMPUTING = 3 * 20 * 3 / 10
REDUCING = 6 * (2 * 160 / 4 / 2 + 1)
PUBLISHING = REDUCING / 2
SCALARS = 6 * (64 / 4 / 2 + 1)
SHARD, MODEL = 160 / 4 / 100, 160 / 100
"""Seconds for a byte of each element."""


@pytest.mark.parametrize("algorithm, ranks, all_reduce, all_gather", [
    ("ring", 1, 0, 0),
    ("ring", 2, 2 * 1 * (8 / 2 / 4 + 0.5), 1 * (8 / 2 / 4 + 0.5)),  # inside the node
    ("ring", 4, 2 * 3 * (8 / 4 / 2 + 1), 3 * (8 / 4 / 2 + 1)),  # every step at the pace of the link between nodes
    ("tree", 2, 2 * (8 / 4 + 0.5), 8 / 2 / 4 + 0.5),
    ("tree", 32, 2 * (8 / 2 + 0.5 + 4), 8 * 31 / 32 / 2 + 0.5 + 4),
    ("best", 2, 3, 1.5),  # the ring
    ("best", 32, 17, 8.375),  # the tree
])
def test_collectives(algorithm, ranks, all_reduce, all_gather):
    cluster = replace(SLOW, algorithm=algorithm)
    assert cluster.all_reduce(ranks, 8) == pytest.approx(all_reduce)
    assert cluster.all_gather(ranks, 8) == pytest.approx(all_gather)


def test_an_update():
    evaluation = 2 * (COMPUTING + REDUCING)  # stage 2 reduces every micro-batch
    adamw = evaluation + 28 * SHARD + PUBLISHING + SCALARS
    reuse = adamw + 16 * SHARD + SCALARS
    sam = adamw + evaluation + 42 * SHARD + PUBLISHING + 2 * SCALARS
    update = predict(RING, WORK, 4)
    assert (ADAMW, REUSE, SAM) == (28, 16, 42)
    assert (update.evaluation, update.adamw, update.reuse, update.sam) == pytest.approx((evaluation, adamw, reuse, sam))
    assert update.looksam == pytest.approx((sam + 3 * reuse) / 4)
    assert update.overhead == pytest.approx(update.looksam / (adamw + evaluation / 4) - 1)
    # Stage 1 reduces in the last one only; what hides behind computation costs nothing.
    assert predict(RING, replace(WORK, stage=1), 4).evaluation == pytest.approx(2 * COMPUTING + REDUCING)
    assert predict(replace(RING, overlap=0.5), WORK, 4).evaluation == pytest.approx(COMPUTING + 2 * REDUCING)


@pytest.mark.parametrize("ascent, more, micro_batches_reduced", [
    ("rank", 2 * 6 * MODEL + 8 * MODEL - PUBLISHING, 0),
    # 24 + 42: the second micro-batch's sums and arithmetic.
    ("micro_batch", 2 * 6 * MODEL + 2 * 16 * MODEL - PUBLISHING + (24 + 42) * SHARD, 2),
    ("global_micro_batch", 3 * PUBLISHING + (24 + 42) * SHARD, 2),
])
def test_ascent_groups(ascent, more, micro_batches_reduced):
    """On stage 1, too, their two micro-batches are reduced one by one."""
    for stage, reducing in (2, 0), (1, micro_batches_reduced * REDUCING):
        update, usual = (predict(RING, replace(WORK, stage=stage, ascent=mode), 4) for mode in (ascent, "global"))
        assert update.sam - usual.sam == pytest.approx(more + reducing)
        assert (update.reuse, update.adamw) == (usual.reuse, usual.adamw)


def test_stage_3_gathers_twice_and_waits_for_its_host():
    work = Workload(forward_flops=20, sizes=([200_000, 6], [200_000, 6]), stage=3, micro_batch=3)
    cluster = replace(RING, intra=1e6, inter=1e6)
    gather = 3 * (400_000 / 4 / 1e6 + 1)
    scatter = 3 * (2 * (200_000 + 8) / 4 / 1e6 + 1)
    assert predict(cluster, work, 4).evaluation == pytest.approx(COMPUTING + 2 * gather + scatter)
    waiting = predict(replace(cluster, host=3.0), work, 4).evaluation  # 4 ranks x 2 tensors x 3 s
    assert waiting == pytest.approx(2 * gather + scatter + 24)


def test_flops_of_the_models():
    """ViT-B/16 takes 17.6 G multiply-adds for an image (Touvron et al. 2021, table 5); GPT-3 XL 2 P = 2.6 G for a token
    and what attention takes, 24 layers x 4 x 2048 tokens x 2048."""
    assert MODELS["vit-b16"]().forward_flops() == pytest.approx(2 * 17.6e9, rel=0.02)
    assert MODELS["gpt-1.3b"]().forward_flops() == pytest.approx(2048 * (2 * 1.3155e9 + 24 * 4 * 2048 * 2048), rel=0.01)


def test_table_and_arguments():
    assert split_batch(32768, 8, 256) == (256, 16)
    assert split_batch(1000, 3, 100) == (pytest.approx(1000 / 12), 4)
    args, cluster = parse(["--gpus", "8", "4096", "--global-batch", "32768", "--inter", "1e10", "--algorithm", "tree"])
    assert (cluster.inter, cluster.algorithm) == (1e10, "tree")
    lines = table(rows(args, cluster)).splitlines()
    assert len(lines) == 4 and lines[3].startswith("| 4,096 | 8 |")
    throughput = [float(line.split("|")[7]) for line in lines[2:]]
    assert 0.5 < throughput[1] < throughput[0] < 0.834  # 1 / 1.2, as printed

"""The arithmetic of benchmarks/cluster_model.py, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.cluster_model import ADAMW, REUSE, SAM, Cluster, Workload, parse, predict, rows, split_batch, table
from benchmarks.scale_models import MODELS

# Nodes of 2; small numbers, so that each time below can be followed. 4 ranks are 2 nodes.
SLOW = Cluster(flops=10, memory=100, intra=4, inter=2, latency_intra=0.5, latency_inter=1, gpus_per_node=2, overlap=0,
               host=0)


@pytest.mark.parametrize("algorithm, ranks, all_reduce, all_gather", [
    ("ring", 1, 0, 0),
    ("ring", 2, 2 * 1 * (8 / 2 / 4 + 0.5), 1 * (8 / 2 / 4 + 0.5)),  # inside the node
    ("ring", 4, 2 * 3 * (8 / 4 / 2 + 1), 3 * (8 / 4 / 2 + 1)),  # every step at the pace of the link between nodes
    ("tree", 2, 2 * (8 / 4 + 0.5), 8 / 2 / 4 + 0.5),
    ("tree", 4, 2 * (8 / 2 + 0.5 + 1), 8 * 3 / 4 / 2 + 0.5 + 1),
    ("tree", 32, 2 * (8 / 2 + 0.5 + 4), 8 * 31 / 32 / 2 + 0.5 + 4),  # 16 nodes: 4 levels
    ("best", 2, 3, 1.5),  # the ring
    ("best", 32, 17, 8.375),  # the tree
])
def test_collectives(algorithm, ranks, all_reduce, all_gather):
    cluster = replace(SLOW, algorithm=algorithm)
    assert cluster.all_reduce(ranks, 8) == pytest.approx(all_reduce)
    assert cluster.all_gather(ranks, 8) == pytest.approx(all_gather)


def test_a_ring_over_4096_ranks_is_all_latency():
    cluster = Cluster(algorithm="ring", latency_inter=5e-6)
    assert cluster.all_reduce(4096, 64) == pytest.approx(2 * 4095 * 5e-6, rel=1e-3)
    assert replace(cluster, algorithm="tree").all_reduce(4096, 64) == pytest.approx(2 * (7e-6 + 9 * 5e-6), rel=1e-3)


def test_an_update_by_hand():
    work = Workload(forward_flops=20, sizes=([160], [160]), stage=2, micro_batch=3, accumulation=2, k=4)
    cluster = replace(SLOW, algorithm="ring")
    computing = 3 * 20 * 3 / 10
    reducing = 6 * (2 * 160 / 4 / 2 + 1)
    publishing = 3 * (2 * 160 / 4 / 2 + 1)
    scalars = 6 * (64 / 4 / 2 + 1)
    element = 160 / 4 / 100
    evaluation = 2 * (computing + reducing)  # stage 2 reduces every micro-batch
    adamw = evaluation + 28 * element + publishing + scalars
    reuse = adamw + 16 * element + scalars
    sam = adamw + evaluation + 42 * element + publishing + 2 * scalars
    update = predict(cluster, work, 4)
    assert (ADAMW, REUSE, SAM) == (28, 16, 42)
    assert (update.evaluation, update.adamw, update.reuse, update.sam) == pytest.approx((evaluation, adamw, reuse, sam))
    assert update.looksam == pytest.approx((sam + 3 * reuse) / 4)
    assert update.overhead == pytest.approx(update.looksam / (adamw + evaluation / 4) - 1)
    # Stage 1 reduces in the last one only; what hides behind computation costs nothing.
    assert predict(cluster, replace(work, stage=1), 4).evaluation == pytest.approx(2 * computing + reducing)
    hidden = predict(replace(cluster, overlap=0.5), work, 4).evaluation
    assert hidden == pytest.approx(2 * (computing + reducing - 0.5 * computing))


def test_ascent_groups_by_hand():
    """As above; two micro-batches, which stage 2 reduces one by one and stage 1 together."""
    work = Workload(forward_flops=20, sizes=([160], [160]), stage=2, micro_batch=3, accumulation=2, k=4)
    cluster = replace(SLOW, algorithm="ring")
    usual = predict(cluster, work, 4).sam
    reducing = 6 * (2 * 160 / 4 / 2 + 1)
    publishing = 3 * (2 * 160 / 4 / 2 + 1)
    model, shard = 160 / 100, 160 / 4 / 100
    of_window = (24 + 42) * shard  # the second micro-batch's sums and arithmetic
    expected = {"rank": 2 * 6 * model + 8 * model - publishing,
                "micro_batch": 2 * 6 * model + 2 * 16 * model - publishing + of_window,
                "global_micro_batch": 3 * publishing + of_window}
    for ascent, more in expected.items():
        update = predict(cluster, replace(work, ascent=ascent), 4)
        assert update.sam - usual == pytest.approx(more)
        assert (update.reuse, update.adamw) == (predict(cluster, work, 4).reuse, predict(cluster, work, 4).adamw)
        stage_1 = [predict(cluster, replace(work, stage=1, ascent=mode), 4).sam for mode in (ascent, "global")]
        assert stage_1[0] - stage_1[1] == pytest.approx(more + (0 if ascent == "rank" else 2 * reducing))


def test_stage_3_gathers_twice_and_waits_for_its_host():
    work = Workload(forward_flops=20, sizes=([200_000, 6], [200_000, 6]), stage=3, micro_batch=3)
    cluster = replace(SLOW, algorithm="ring", intra=1e6, inter=1e6)
    computing = 18
    gather = 3 * (400_000 / 4 / 1e6 + 1)
    scatter = 3 * (2 * (200_000 + 8) / 4 / 1e6 + 1)
    evaluation = predict(cluster, work, 4).evaluation
    assert evaluation == pytest.approx(computing + 2 * gather + scatter)
    waiting = predict(replace(cluster, host=3.0), work, 4).evaluation  # 4 ranks x 2 tensors x 3 s
    assert waiting == pytest.approx(evaluation - computing + 24)


def test_without_a_network_and_with_fast_memory_only_evaluations_count():
    cluster = Cluster(memory=math.inf)
    work = Workload(forward_flops=1e12, sizes=([10**6], [10**6]), stage=1, k=5)
    update = predict(cluster, work, 1)
    assert update.throughput == pytest.approx(1 / 1.2) and update.overhead == pytest.approx(0)


def test_flops_of_the_models():
    """ViT-B/16 takes 17.6 G multiply-adds for an image (Touvron et al. 2021, table 5); GPT-3 XL 2 P = 2.6 G for a token
    and what attention takes, 24 layers x 4 x 2048 tokens x 2048."""
    assert MODELS["vit-b16"]().forward_flops() == pytest.approx(2 * 17.6e9, rel=0.02)
    assert MODELS["gpt-1.3b"]().forward_flops() == pytest.approx(2048 * (2 * 1.3155e9 + 24 * 4 * 2048 * 2048), rel=0.01)


def test_split_batch():
    assert split_batch(32768, 8, 256) == (256, 16)
    assert split_batch(32768, 4096, 256) == (8, 1)
    assert split_batch(1000, 3, 100) == (pytest.approx(1000 / 12), 4)


def test_table_and_arguments():
    args, cluster = parse(["--gpus", "8", "4096", "--global-batch", "32768", "--inter", "1e10", "--algorithm", "tree"])
    assert (cluster.inter, cluster.algorithm) == (1e10, "tree")
    lines = table(rows(args, cluster)).splitlines()
    assert len(lines) == 4 and lines[3].startswith("| 4,096 | 8 |")
    throughput = [float(line.split("|")[7]) for line in lines[2:]]
    assert 0.5 < throughput[1] < throughput[0] < 0.834  # 1 / 1.2, as printed

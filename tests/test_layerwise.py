"""What Look-LayerSAM, LAMB and LARS promise beside their weights: what they send, and where elements belong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_looksam.arithmetic.layerwise import perturbation_scales
from ds_looksam.arithmetic.layout import LayerMap, Segment

from .collectives import Collective
from .costs import record_steps
from .models import make_model
from .ranks import run_on_ranks
from .test_optimizers import SUB_GROUPS
from .training import Case

CPU = torch.device("cpu")
LAYERS = sum(1 for _ in make_model("mlp").parameters())


def _sent(case: Case, looksam: bool = True) -> list[list[list[Collective]]]:
    """By rank and window. In the first two stage 3 records its trace."""
    return [[step.evaluation + step.update for step in steps][2:]
            for steps in run_on_ranks(2, record_steps, replace(case, updates=4), looksam, partial(make_model, "mlp"))]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_layerwise_sends_no_more_than_looksam(stage: int) -> None:
    """The layers' norms ride in the all-reduce of ‖g‖² and ‖v‖², two float64 per layer; nothing else is sent."""
    case = Case(stage=stage, k=2, alpha=0.7)
    for (sam, reuse), (layer_sam, layer_reuse) in zip(_sent(case), _sent(replace(case, layer_scale="norm")),
                                                      strict=True):
        assert layer_reuse == reuse
        first = sam.index(Collective("allreduce", 8 * 2, ranks=2))
        assert layer_sam == [*sam[:first], Collective("allreduce", 8 * (2 * LAYERS + 1), ranks=2), *sam[first + 1:]]


@pytest.mark.parametrize("case", [Case(stage=2, base="Lamb", two_groups=True),
                                  Case(stage=3, base="Lars", two_groups=True, zero=SUB_GROUPS)],
                         ids=lambda case: f"stage{case.stage}")
def test_trust_ratios_take_one_small_all_reduce(case: Case) -> None:
    """However many flat tensors the wrapper steps through: beside what AdamW sends, one vector of two per layer."""
    for sent, plain in zip(_sent(case, False), _sent(replace(case, base="AdamW"), False), strict=True):
        extra = list(sent[-1])
        for call in plain[-1]:
            extra.remove(call)
        assert extra == [Collective("allreduce", 8 * (2 * LAYERS + 2), ranks=2)]


@pytest.mark.parametrize("rule", ["norm", "relative", "gradient"])
@pytest.mark.parametrize("g", [[0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0], [1e-300, 0.0]])
def test_nothing_is_ever_divided_by_zero(rule: str, g: list[float]) -> None:
    """The second layer has no weights yet."""
    w, g, rho = (torch.tensor(values, dtype=torch.float64) for values in ([1.0, 0.0], g, [0.1, 0.1]))
    scales = perturbation_scales(w**2, g**2, torch.tensor([True, True]), rho, rule, 1.0)
    assert torch.isfinite(scales).all() and scales[-1] == 0


# Which layer an element belongs to ----------------------------------------------------------------------------------


def partition_zero12(sizes: list[int], world: int, rank: int, alignment: int) -> tuple[list[Segment], int]:
    """One group's partition by the rule of stages 1 and 2: laid end to end, padded, cut into ``world`` equal pieces."""
    padded = -(-sum(sizes) // (alignment * world)) * alignment * world
    piece = padded // world
    segments, offset = [], 0
    for number, size in enumerate(sizes):
        lo, hi = max(offset, rank * piece), min(offset + size, (rank + 1) * piece)
        if lo < hi:
            segments.append(Segment(PARAMETERS[number], lo - rank * piece, lo - offset, hi - lo))
        offset += size
    return segments, piece


def partition_zero3(sizes: list[int], world: int, rank: int) -> tuple[list[Segment], int]:
    """One sub-group's partition by the rule of stage 3: every parameter padded and cut by itself, pieces in a row."""
    segments, start = [], 0
    for number, size in enumerate(sizes):
        piece = -(-size // world)
        numel = min(size - rank * piece, piece)
        if numel > 0:
            segments.append(Segment(PARAMETERS[number], start, rank * piece, numel))
        start += piece
    return segments, start


PARAMETERS = [nn.Parameter(torch.empty(0)) for _ in range(64)]
SIZES = st.lists(st.one_of(st.integers(1, 9), st.integers(10, 3000)), min_size=1, max_size=12)
WORLD = st.one_of(st.integers(1, 9), st.sampled_from([64, 512, 1024, 4096]), st.integers(1, 4096))


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, world=WORLD, stage=st.sampled_from([2, 3]), alignment=st.sampled_from([1, 2, 4]),
       chunk=st.integers(1, 5000))
def test_all_ranks_together_hold_every_element_once(sizes: list[int], world: int, stage: int, alignment: int,
                                                    chunk: int) -> None:
    """Sums of ones count elements: over all ranks every layer has as many as it has, wherever chunks end. And each
    element is given its own layer's value, padding none."""
    total = torch.zeros(len(sizes), dtype=torch.float64)
    groups = [PARAMETERS[:len(sizes) // 2], PARAMETERS[len(sizes) // 2:len(sizes)]]
    values = torch.arange(1.0, len(sizes) + 2)
    values[-1] = 0
    seen = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    for rank in range(world):
        segments, size = (partition_zero3(sizes, world, rank) if stage == 3
                          else partition_zero12(sizes, world, rank, alignment))
        layers = LayerMap([segments], [size], groups, CPU)
        out = layers.zeros(1)[:, 0]
        for lo in range(0, size, chunk):
            hi = min(lo + chunk, size)
            layers.add_squares_(out, [(0, lo, hi)], [torch.ones(hi - lo)])
            expanded = layers.expand(values, 0, lo, hi).expand(hi - lo)
            for segment in segments:
                number = next(i for i, p in enumerate(PARAMETERS) if p is segment.parameter)
                a, b = max(segment.start, lo), min(segment.start + segment.numel, hi)
                if a < b:
                    assert (expanded[a - lo:b - lo] == number + 1).all()
                    first = segment.param_offset + a - segment.start
                    seen[number][first:first + b - a] += 1
            assert (expanded != 0).sum() == sum(max(0, min(s.start + s.numel, hi) - max(s.start, lo)) for s in segments)
        total += out[:-1]
    assert total.round().tolist() == sizes
    assert all((count == 1).all() for count in seen)

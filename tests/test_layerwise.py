"""What Look-LayerSAM promises beside its weights: what it sends, its rules' invariances, and where elements belong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_looksam.arithmetic.layerwise import perturbation_scales
from ds_looksam.arithmetic.layout import LayerMap, Segment
from ds_looksam.config.params import parse_params
from ds_looksam.errors import LookSAMConfigError

from .collectives import Collective, Recorder
from .models import make_model
from .ranks import run_on_ranks
from .training import Case, engine_for, train_window

CPU = torch.device("cpu")


def _sam_and_reuse_step(case: Case) -> list[list[Collective]]:
    """What a SAM step's and a reuse step's windows send, after a first round in which stage 3 records its trace."""
    with engine_for(case) as engine:
        sent = []
        for update in range(4):
            with Recorder() as recorder:
                train_window(engine, case, update)
            sent.append(recorder.collectives)
        return sent[2:]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_layerwise_sends_no_more_than_looksam(stage: int) -> None:
    """The layers' norms ride in the all-reduce of ‖g‖² and ‖v‖², two float64 per layer; nothing else is sent."""
    looksam = Case(stage=stage, k=2, alpha=0.7)
    layers = sum(1 for _ in make_model(looksam.model).parameters())
    plain = run_on_ranks(2, _sam_and_reuse_step, looksam)
    by_layer = run_on_ranks(2, _sam_and_reuse_step, replace(looksam, layer_scale="norm"))
    for (sam, reuse), (layer_sam, layer_reuse) in zip(plain, by_layer, strict=True):
        assert layer_reuse == reuse
        first = sam.index(Collective("allreduce", 8 * 2, ranks=2))
        assert layer_sam == [*sam[:first], Collective("allreduce", 8 * (2 * layers + 1), ranks=2), *sam[first + 1:]]


# The rules ----------------------------------------------------------------------------------------------------------


def _scales(rule: Any, w: list[float], g: list[float], layerwise: list[bool] | None = None,
            loss_scale: float = 1.0) -> torch.Tensor:
    """From norms to the layers' scales; test_update.py compares what comes of them with the oracle."""
    wanted = torch.tensor(layerwise if layerwise is not None else [True] * len(w))
    double = [torch.tensor(x, dtype=torch.float64) for x in (w, g, [0.1] * len(w))]
    scales = perturbation_scales(double[0]**2, (double[1] * loss_scale)**2, wanted, double[2], rule, loss_scale)
    assert scales[-1] == 0
    return scales[:-1].double() * loss_scale


W, G = [3.0, 0.0, 2.0, 1.0, 5.0], [0.1, 0.4, 0.0, 2.0, 0.5]
"""Norms of five layers; the second has no weights yet, the third no gradient."""


@pytest.mark.parametrize("rule", ["norm", "relative", "gradient"])
def test_loss_scale_changes_nothing(rule: str) -> None:
    layerwise = [True, True, True, False, True]
    scaled = _scales(rule, W, G, layerwise, loss_scale=2.0**16)
    assert scaled.tolist() == pytest.approx(_scales(rule, W, G, layerwise).tolist(), rel=1e-6)


@pytest.mark.parametrize("rule", ["norm", "relative", "gradient"])
@pytest.mark.parametrize("g", [[0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0], [1e-300, 0.0]])
def test_nothing_is_ever_divided_by_zero(rule: str, g: list[float]) -> None:
    assert torch.isfinite(_scales(rule, [1.0, 0.0], g)).all()


def test_json_keys() -> None:
    assert parse_params({}, "LookLayerSAM")[0].layerwise
    assert not parse_params({}, "LookSAM")[0].layerwise
    assert parse_params({"layerwise": True, "layer_scale": "relative"})[0].layer_scale == "relative"
    with pytest.raises(LookSAMConfigError, match="layerwise: false contradicts"):
        parse_params({"layerwise": False}, "LookLayerSAM")
    with pytest.raises(LookSAMConfigError, match=r"optimizer\.params\.layer_scale"):
        parse_params({"layer_scale": "global"})
    with pytest.raises(LookSAMConfigError, match=r"optimizer\.params\.layerwise"):
        parse_params({"layerwise": 1})


# Which layer an element belongs to ----------------------------------------------------------------------------------


def partition_zero12(sizes: list[int], world: int, rank: int, alignment: int) -> tuple[list[Segment], int]:
    """One group's partition by the rule of stages 1 and 2: laid end to end, padded, cut into ``world`` equal pieces."""
    padded = -(-sum(sizes) // (alignment * world)) * alignment * world
    piece = padded // world
    segments, offset = [], 0
    for number, size in enumerate(sizes):
        lo, hi = max(offset, rank * piece), min(offset + size, (rank + 1) * piece)
        if lo < hi:
            segments.append(Segment(PARAMETERS[number], lo - rank * piece, lo - offset, hi - lo, size))
        offset += size
    return segments, piece


def partition_zero3(sizes: list[int], world: int, rank: int) -> tuple[list[Segment], int]:
    """One sub-group's partition by the rule of stage 3: every parameter padded and cut by itself, pieces in a row."""
    segments, start = [], 0
    for number, size in enumerate(sizes):
        piece = -(-size // world)
        numel = min(size - rank * piece, piece)
        if numel > 0:
            segments.append(Segment(PARAMETERS[number], start, rank * piece, numel, size))
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
        segments, size = (partition_zero3(sizes, world, rank) if stage == 3 else
                          partition_zero12(sizes, world, rank, alignment))
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

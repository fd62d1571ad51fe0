"""On GPUs, against the float64 oracle: NCCL, DeepSpeed's fused optimizers, Triton kernels, streams and pinned memory.

    DS_ACCELERATOR=cuda python -m pytest -m gpu

World size 1, and 2 and 4 where there are so many GPUs.
"""

from __future__ import annotations

import os
import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import ds_looksam
from ds_looksam.arithmetic.choose import choose_passes
from ds_looksam.arithmetic.eager import Passes
from ds_looksam.arithmetic.layout import CUT_DEVICE, LayerMap, Segment

from .fuzz import rounding_tolerance
from .models import Mlp
from .ranks import run_on_ranks
from .test_algebra import NUMEL, check_nothing, check_perturbation, check_projection, check_reuse, check_sums
from .training import DTYPES, Case, as_plain, check_against_oracle, distance, engine_for, run_oracle, train_window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("DS_ACCELERATOR") != "cuda" or not torch.cuda.is_available(),
                       reason="needs a GPU, and DS_ACCELERATOR=cuda"),
]

TOLERANCE = 3e-5
"""fp32, as in test_options.py: DeepSpeed's Adams keep 1 - beta2^t as a float. In low precision that of the fuzz
command: a GPU adds up in another order than the oracle on its CPU, so that activations and gradients that lie near a
rounding boundary come out one unit apart."""
EFFECT = 2
"""LookSAM must have moved the weights away from the base optimizer's by so many tolerances: else nothing is tested."""

COMMON: dict[str, Any] = {"accumulation": 2, "clipping": 0.05, "alpha": 0.7, "two_groups": True}
FOREACH = {"compile": False}
CPU = {"device": "cpu"}
GRAD_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def _cases() -> list[Any]:
    cases: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        at: dict[str, Any] = {"stage": stage, **COMMON}
        cases[f"fused-stage{stage}"] = {"model": "straddling", **at}
        cases[f"foreach-stage{stage}"] = {"params": {**FOREACH, "torch_adam": True}, **at}
        cases[f"by-layer-stage{stage}"] = {"layer_scale": "norm", "base": "Lamb", **at}
        for precision in ("bf16", "fp16"):
            low = {"stage": stage, "precision": precision, "base": "SGD", "alpha": 0.7,
                   "loss_scale": 128.0 if stage else 1.0}
            cases[f"{precision}-stage{stage}"] = low
            cases[f"{precision}-foreach-stage{stage}"] = {**low, "params": FOREACH}
    cases["bf16-optimizer"] = {**cases["bf16-stage1"], "accumulation": 2, "config": GRAD_FP32}
    for stage in (1, 2, 3):
        zero: dict[str, Any] = {"offload_optimizer": CPU}
        cases[f"offload-stage{stage}"] = {"stage": stage, "model": "wide", "zero": zero, **COMMON}
        cases[f"offload-bf16-stage{stage}"] = {**cases[f"bf16-stage{stage}"], "model": "wide", "zero": zero,
                                               "config": {"zero_force_ds_cpu_optimizer": False}}
        cases[f"offload-by-layer-stage{stage}"] = {**cases[f"by-layer-stage{stage}"], "zero": zero,
                                                   "config": {"zero_force_ds_cpu_optimizer": False}}
    cases["offload-both"] = {"stage": 3, "model": "wide", "zero": {**zero, "offload_param": CPU}, **COMMON}
    cases["sub-groups"] = {"stage": 3, "model": "straddling", "zero": {"sub_group_size": 30}, **COMMON}
    cases["overlap"] = {"stage": 2, "model": "wide", "zero": {"overlap_comm": True}, **COMMON}
    cases["v-in-bf16"] = {"stage": 2, "params": {"v_dtype": "bf16"}, "base": "SGD", "alpha": 0.7}
    for ascent, stage in (("rank", 0), ("rank", 2), ("micro_batch", 1), ("global_micro_batch", 3)):
        cases[f"{ascent}-stage{stage}"] = {"stage": stage, "ascent": ascent, **COMMON}
    worlds = [n for n in (1, 2, 4) if n <= max(1, torch.cuda.device_count())]
    return [pytest.param(Case(world=world, **settings), id=f"{name}-world{world}")
            for name, settings in cases.items() for world in worlds]


@pytest.mark.parametrize("case", _cases())
def test_against_oracle(case: Case) -> None:
    tolerance = TOLERANCE if case.precision == "fp32" else rounding_tolerance(case)
    dtype = torch.float64 if case.precision == "fp32" else DTYPES[case.precision]
    v_dtype = torch.bfloat16 if case.params.get("v_dtype") == "bf16" else torch.float64
    reference = check_against_oracle(case, tolerance, dtype=dtype, v_dtype=v_dtype)
    assert not case.clipping or reference.clipped > 0, "clipping was meant to bind"
    effect = distance(run_oracle(as_plain(case), dtype)[1], run_oracle(case, dtype, v_dtype)[1])
    assert effect > EFFECT * tolerance, f"LookSAM moved the weights by {effect:.1e} only"


GPU = torch.device("cuda")


@pytest.fixture
def fused() -> Passes:
    return choose_passes(GPU, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", NUMEL)
def test_sums_and_reuse(fused: Passes, numel: int, dtype: torch.dtype) -> None:
    check_sums(fused, numel, dtype, GPU)
    check_reuse(fused, numel, dtype, GPU)
    check_projection(fused, numel, GPU)
    check_nothing(fused, GPU)


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("master, model, in_place", [
    (torch.float32, torch.float32, False), (torch.float32, torch.float32, True), (torch.float32, torch.bfloat16, False),
    (torch.float32, torch.float16, False), (torch.bfloat16, torch.bfloat16, True),
])
@pytest.mark.parametrize("numel", NUMEL[2:])
def test_perturbation(fused: Passes, numel: int, master: torch.dtype, model: torch.dtype, in_place: bool,
                      per_element: bool) -> None:
    check_perturbation(fused, numel, master, model, in_place, per_element, GPU, one_off=1e-3)


@pytest.mark.parametrize("master, model, in_place", [
    (torch.float32, torch.bfloat16, False), (torch.float32, torch.float16, False),
    (torch.bfloat16, torch.bfloat16, True), (torch.float16, torch.float16, True),
])
def test_perturbation_rounded_at_random(fused: Passes, master: torch.dtype, model: torch.dtype, in_place: bool) -> None:
    check_perturbation(fused, NUMEL[-1], master, model, in_place, False, GPU, one_off=1e-3, rounding=1234)


def waits(case: Case, looksam: bool) -> list[list[str]]:
    """On a rank: where each update's step() made the host wait for the GPU."""
    with engine_for(case, looksam) as engine:
        found = []
        for update in range(case.updates):
            x, y = case.micro_batches(update, torch.distributed.get_rank())[0]
            engine.backward(engine(x.to(engine.device, DTYPES[case.precision]), y.to(engine.device)))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                engine.step()
                torch.cuda.set_sync_debug_mode("default")
            found.append([f"{w.filename}:{w.lineno}" for w in caught
                          if "called a synchronizing CUDA operation" in str(w.message)])
        return found


def in_looksam(places: list[str]) -> list[str]:
    return [where for where in places if where.startswith(str(Path(ds_looksam.__file__).parent))]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_reuse_step_never_waits_for_the_gpu(stage: int, precision: str) -> None:
    case = Case(world=1, stage=stage, precision=precision, alpha=0.7, k=3, updates=6, params={"torch_adam": True})
    steps, plain = run_on_ranks(1, waits, case, True)[0], run_on_ranks(1, waits, case, False)[0]
    for reuse in (4, 5):  # the first window's steps include what happens once
        assert len(steps[reuse]) == len(plain[reuse]), (steps[reuse], plain[reuse])
    in_sam = in_looksam(steps[3])
    assert 0 < len(in_sam) <= 2, in_sam  # is g finite; is g_v


def test_look_layersam_waits_no_more_often() -> None:
    case = Case(world=1, stage=2, precision="bf16", alpha=0.7, k=3, updates=4, layer_scale="norm",
                params={"torch_adam": True})
    in_sam = in_looksam(run_on_ranks(1, waits, case, True)[0][3])
    assert 0 < len(in_sam) <= 2, in_sam


def test_squares_of_large_and_small_layers() -> None:
    """Every run gives the same bits: replicas of ZeRO stage 0 must not differ. 2e-6: sums over 65,536 in fp32."""
    sizes = [1, 3 * CUT_DEVICE + 5, CUT_DEVICE, 7, 2_000_001]
    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    starts = [3, *(3 + end for end in accumulate(sizes[:-1]))]  # after three elements of padding
    flat = torch.randn(3 + sum(sizes), device=GPU)
    segments = [Segment(p, start, 0, size, size) for p, start, size in zip(parameters, starts, sizes, strict=True)]
    layers = LayerMap([segments], [flat.numel()], [parameters], GPU)
    exact = torch.stack([part.double().square().sum() for part in flat[3:].split(sizes)])
    squares = layers.squares([flat])
    assert ((squares - exact) / exact).abs().max() < 2e-6
    for _ in range(20):
        assert torch.equal(layers.squares([flat]), squares)


class Dropping(Mlp):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        return super().body(F.dropout(x, 0.5, training=True))


def drop(case: Case, looksam: bool) -> tuple[torch.Tensor, float | None]:
    """On a rank: the state of the GPU's generator after training with dropout, and ‖g_v‖ / ‖g‖."""
    torch.cuda.manual_seed(7)
    with engine_for(case, looksam, module=Dropping()) as engine:
        for update in range(case.updates):
            train_window(engine, case, update)
        ratio = engine.looksam.orthogonal_ratio.item() if looksam else None
        return torch.cuda.get_rng_state(), ratio


def test_the_second_evaluation_drops_what_the_first_did() -> None:
    """With rho 0 both evaluations are at the same weights: the same mask gives the same gradient, another a far one."""
    case = Case(world=1, k=2, rho=0.0, updates=3, accumulation=2)
    (state, ratio), (plain_state, _) = (run_on_ranks(1, drop, case, looksam)[0] for looksam in (True, False))
    assert ratio is not None and ratio < 1e-6
    assert torch.equal(state, plain_state)

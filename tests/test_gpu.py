"""On GPUs, against the float64 oracle: NCCL, DeepSpeed's fused optimizers, Triton kernels, streams and pinned memory.

    DS_ACCELERATOR=cuda python -m pytest -m gpu

World size 1, and 2 and 4 where there are so many GPUs.
"""

from __future__ import annotations

import os
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import ds_looksam
from ds_looksam.arithmetic.layout import CUT_DEVICE
from ds_looksam.engines.passes import choose_passes

from .fuzz import rounding_tolerance
from .models import Mlp
from .ranks import run_on_ranks
from .test_algebra import CHECKS, NUMEL, PERTURBATIONS, layer_map
from .training import DTYPES, Case, as_plain, check_against_oracle, distance, run_oracle, train

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
        zero: dict[str, Any] = {"zero": {"offload_optimizer": CPU}}
        torchs = {"config": {"zero_force_ds_cpu_optimizer": False}}
        by_layer = {"layer_scale": "norm", "base": "Lamb", **at}
        of_stage = {"fused": {"model": "straddling", **at},
                    "foreach": {"params": {**FOREACH, "torch_adam": True}, **at}, "by-layer": by_layer}
        for precision in ("bf16", "fp16"):
            low = {"stage": stage, "precision": precision, "base": "SGD", "alpha": 0.7,
                   "loss_scale": 128.0 if stage else 1.0}
            of_stage |= {precision: low, f"{precision}-foreach": {**low, "params": FOREACH}}
        if stage > 0:
            of_stage |= {"offload": {"model": "wide", **zero, **at}, "offload-by-layer": {**by_layer, **zero, **torchs},
                         "offload-bf16": {**of_stage["bf16"], "model": "wide", **zero, **torchs}}
        cases |= {f"{name}-stage{stage}": settings for name, settings in of_stage.items()}
    cases |= {
        "bf16-optimizer": {**cases["bf16-stage1"], "accumulation": 2, "config": GRAD_FP32},
        "offload-param": {**cases["offload-stage3"], "zero": {"offload_param": CPU}},
        "offload-both": {**cases["offload-stage3"], "zero": {"offload_optimizer": CPU, "offload_param": CPU}},
        # Its first cycle, and the last micro-batch of a window, leave gradients where DeepSpeed has put them.
        "offload-sometimes": {**cases["offload-stage3"], "model": "sometimes", "accumulation": 3, "alpha": "auto"},
        "sub-groups": {"stage": 3, "model": "straddling", "zero": {"sub_group_size": 30}, **COMMON},
        "overlap": {"stage": 2, "model": "wide", "zero": {"overlap_comm": True}, **COMMON},
        "v-in-bf16": {"stage": 2, "params": {"v_dtype": "bf16"}, "base": "SGD", "alpha": 0.7},
        **{f"{ascent}-stage{stage}": {"stage": stage, "ascent": ascent, **COMMON}
           for ascent, stage in (("rank", 0), ("rank", 2), ("micro_batch", 1), ("global_micro_batch", 3))}}
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


def enough(check: str) -> int:
    """Elements: in fewer, rounding need not show, or a thousandth of them is none."""
    return 0 if check not in PERTURBATIONS else NUMEL[-1] if "random" in check else 200


@pytest.mark.parametrize(("check", "numel"), [(check, n) for check in CHECKS for n in NUMEL if n >= enough(check)])
def test_passes(check: str, numel: int) -> None:
    CHECKS[check](choose_passes(GPU, True), numel, GPU)


def waits(engine: Any, batches: list[Any]) -> list[str]:
    """Where step() makes the host wait for the GPU."""
    ((x, y), ) = batches
    engine.backward(engine(x, y))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        engine.step()
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing CUDA operation" in str(w.message)]


def waits_of(case: Case, looksam: bool) -> list[list[str]]:
    return run_on_ranks(1, train, case, looksam, loop=waits)[0].history


@pytest.mark.parametrize(("stage", "precision", "layer_scale"), [
    *product(range(4), ("fp32", "bf16"), (None, )), (2, "bf16", "norm")])
def test_a_reuse_step_never_waits_for_the_gpu(stage: int, precision: str, layer_scale: str | None) -> None:
    case = Case(world=1, stage=stage, precision=precision, alpha=0.7, k=3, updates=6, params={"torch_adam": True},
                layer_scale=layer_scale)
    steps, plain = waits_of(case, True), waits_of(case, False)
    for reuse in (4, 5):  # the first window's steps include what happens once
        assert len(steps[reuse]) == len(plain[reuse]), (steps[reuse], plain[reuse])
    in_sam = [where for where in steps[3] if where.startswith(str(Path(ds_looksam.__file__).parent))]
    # Is g finite; is g_v; on stage 0, which keeps gradients where a loop may change them: was that so.
    assert 0 < len(in_sam) <= 2 + (stage == 0), in_sam


def test_squares_of_large_and_small_layers() -> None:
    """Every run gives the same bits: replicas of ZeRO stage 0 must not differ. 2e-6: sums over 65,536 in fp32."""
    sizes = [1, 3 * CUT_DEVICE + 5, CUT_DEVICE, 7, 2_000_001]
    layers = layer_map(sizes, 3, 0, GPU)
    flat = torch.randn(3 + sum(sizes), device=GPU)
    exact = torch.stack([part.double().square().sum() for part in flat[3:].split(sizes)])
    squares = layers.squares([flat])
    assert ((squares - exact) / exact).abs().max() < 2e-6
    assert all(torch.equal(layers.squares([flat]), squares) for _ in range(20))


class Dropping(Mlp):
    def __init__(self) -> None:
        super().__init__()
        torch.cuda.manual_seed(7)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return super().body(F.dropout(x, 0.5, training=True))


def generator_and_ratio(engine: Any) -> tuple[torch.Tensor, float | None]:
    """The state of the GPU's generator, and ‖g_v‖ / ‖g‖."""
    return torch.cuda.get_rng_state(), engine.looksam.orthogonal_ratio.item() if hasattr(engine, "looksam") else None


def test_the_second_evaluation_drops_what_the_first_did() -> None:
    """With rho 0 both evaluations are at the same weights: the same mask gives the same gradient, another a far one."""
    case = Case(world=1, k=2, rho=0.0, updates=3, accumulation=2)
    (state, ratio), (plain_state, _) = (
        run_on_ranks(1, train, case, looksam, module=Dropping, after=generator_and_ratio)[0].history[-1]
        for looksam in (True, False))
    assert ratio is not None and ratio < 1e-6
    assert torch.equal(state, plain_state)

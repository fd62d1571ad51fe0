"""``"compile": true``: what torch.compile makes of the shard arithmetic against the same formulas in float64, and whole
runs against the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_looksam import compiled
from ds_looksam.algebra import Passes

from .test_algebra import CPU, check_projection, check_reuse, check_sums, close, shards, whole
from .test_low_precision import TIGHT
from .test_oracle_grid import TOLERANCE
from .test_v_dtype import BF16_V, ROUNDED
from .training import DTYPES, Case, check_against_oracle

COMPILED: dict[str, Any] = {"compile": True}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Several pieces for each flat tensor, and a short last one."""
    monkeypatch.setattr(compiled, "CHUNK_CPU", 64)
    return compiled.compiled_passes(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_reuse(passes: Passes, dtype: torch.dtype) -> None:
    check_sums(passes, 200, dtype)
    check_reuse(passes, 200, dtype)


def test_without_v_and_where_a_rank_owns_nothing(passes: Passes) -> None:
    g, g_s = shards(0, 2)
    x, d = whole(g), whole(g_s) - whole(g)
    expected = torch.stack([x @ d, d @ d, 0 * (x @ x), 0 * (x @ x)])
    close(passes.replay_sums(g, g_s, None, CPU), expected, x @ x + d @ d)
    assert passes.replay_sums([], [], None, CPU).tolist() == [0, 0, 0, 0]
    assert passes.squared_norm([g[0]], CPU).item() == 0


def test_projection_keeps_a_small_difference(passes: Passes) -> None:
    check_projection(passes, 200)


@pytest.mark.parametrize("per_element, in_place", [(False, False), (True, False), (False, True)])
def test_perturbation_is_measured_as_it_was_rounded(passes: Passes, per_element: bool, in_place: bool) -> None:
    """A compiler that takes x.to(bfloat16).float() for x says that the weights moved by eps."""
    (w, _), (g, _) = shards(200, 2)
    w = w.bfloat16() if in_place else w
    scale = torch.rand(200) * 1e-3 if per_element else torch.tensor(1e-3)
    clean, eps = w.bfloat16().double(), (g * scale).double()
    expected = (w.float() + g * scale).bfloat16().double()
    out = w if in_place else torch.empty(200, dtype=torch.bfloat16)

    sums = passes.add_perturbation(w, g, lambda lo, hi: scale[lo:hi] if per_element else scale, out)

    assert torch.equal(out.double(), expected)
    moved = expected - clean
    assert (moved @ moved - eps @ eps).abs() > 0.1 * (eps @ eps), "rounding was meant to show"
    close(sums, torch.stack([moved @ moved, moved @ eps, eps @ eps]), moved @ moved + eps @ eps)


BF16 = Case(stage=2, world=2, precision="bf16", loss_scale=128.0, base="SGD", params=COMPILED,
            config={"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"})
CASES = [
    pytest.param(BF16, TIGHT["SGD"], id="bf16-stage2"),
    *(pytest.param(case, tolerance, id=name, marks=pytest.mark.grid) for name, case, tolerance in [
        ("fp32-stage0", Case(stage=0, two_groups=True, clipping=0.05, params=COMPILED), TOLERANCE),
        ("fp32-stage3", Case(stage=3, model="straddling", world=4, zero={"sub_group_size": 30}, params=COMPILED),
         TOLERANCE),
        ("offload", Case(stage=1, base="SGD", zero={"offload_optimizer": {"device": "cpu"}}, params=COMPILED,
                         config={"zero_force_ds_cpu_optimizer": False}), TOLERANCE),
        ("layerwise", Case(stage=2, layer_scale="norm", two_groups=True, params=COMPILED), TOLERANCE),
        ("bf16-optimizer", replace(BF16, stage=1, clipping=0.05, alpha=0.7), TIGHT["SGD"]),
        ("bf16-stage3", replace(BF16, stage=3, world=1, config={}), TIGHT["SGD"]),
    ]),
]


@pytest.mark.parametrize("case, tolerance", CASES)
def test_against_oracle(case: Case, tolerance: float) -> None:
    check_against_oracle(case, tolerance, dtype=DTYPES[case.precision])


@pytest.mark.grid
def test_v_in_bf16() -> None:
    case = Case(stage=2, base="SGD", alpha=0.7, params={**COMPILED, **BF16_V})
    check_against_oracle(case, ROUNDED["SGD"], v_dtype=torch.bfloat16)


def test_no_compiler(tmp_path: Path) -> None:
    program = ("import torch; from torch._inductor import config; config.cpp.cxx = ('no-such-compiler', )\n"
               "from ds_looksam.compiled import compiled_passes; compiled_passes(torch.device('cpu'))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent,
                          env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode and "LookSAMConfigError: optimizer.params.compile: torch.compile failed" in done.stderr

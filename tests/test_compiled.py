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
from packaging.version import Version

from ds_looksam import LookSAMConfigError
from ds_looksam.arithmetic import choose, compiled
from ds_looksam.arithmetic.choose import COMPILES_ON_CPU, choose_passes
from ds_looksam.arithmetic.eager import EAGER, Passes

from .test_algebra import CPU, SEED, check_nothing, check_perturbation, check_projection, check_reuse, check_sums
from .test_options import BF16_V, TIGHT
from .test_options import V_ROUNDED as ROUNDED
from .test_oracle_grid import TOLERANCE
from .training import DTYPES, Case, check_against_oracle

pytestmark = pytest.mark.skipif(Version(torch.__version__) < COMPILES_ON_CPU, reason="refused with this torch")

COMPILED: dict[str, Any] = {"compile": True}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Several pieces for each flat tensor, and a short last one."""
    monkeypatch.setattr(compiled, "CHUNK", 64)
    return choose_passes(CPU, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_reuse(passes: Passes, dtype: torch.dtype) -> None:
    check_sums(passes, 200, dtype)
    check_reuse(passes, 200, dtype)


def test_a_rank_that_owns_nothing(passes: Passes) -> None:
    check_nothing(passes)


def test_projection_keeps_a_small_difference(passes: Passes) -> None:
    check_projection(passes, 200)


@pytest.mark.parametrize("per_element, in_place", [(False, False), (True, False), (False, True)])
def test_perturbation_is_measured_as_it_was_rounded(passes: Passes, per_element: bool, in_place: bool) -> None:
    """A compiler that takes x.to(bfloat16).float() for x says that the weights moved by eps."""
    master = torch.bfloat16 if in_place else torch.float32
    check_perturbation(passes, 200, master, torch.bfloat16, in_place, per_element)


@pytest.mark.parametrize("model, in_place", [(torch.bfloat16, True), (torch.float16, False)])
def test_stochastic_rounding(passes: Passes, model: torch.dtype, in_place: bool) -> None:
    """Bit by bit as the eager arithmetic rounds."""
    master = model if in_place else torch.float32
    check_perturbation(passes, 200, master, model, in_place, per_element=False, rounding=SEED)


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
               "from ds_looksam.arithmetic.choose import choose_passes; choose_passes(torch.device('cpu'), True)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent,
                          env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode and "LookSAMConfigError: optimizer.params.compile: the arithmetic could" in done.stderr


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_passes(CPU, None) is choose_passes(CPU, False) is EAGER
    assert choose_passes(CPU, True) is compiled.COMPILED
    monkeypatch.setattr(choose, "COMPILES_ON_CPU", Version("99"))
    with pytest.raises(LookSAMConfigError, match=r"optimizer\.params\.compile: .* takes torch 99"):
        choose_passes(CPU, True)


@pytest.mark.parametrize("here, everywhere", [(True, True), (True, False), (False, False)])
def test_a_gpu_without_triton_on_any_rank(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, here: bool,
                                          everywhere: bool) -> None:
    """No GPU here: the CPU's passes stand for the fused ones. Without ``compile`` all ranks take the same."""
    def fused(device: torch.device) -> Passes:
        if not here:
            raise RuntimeError("no C compiler")
        return replace(EAGER, squared_norm=lambda *_: None)

    asked = []

    def on_all_ranks(yes: bool, device: torch.device) -> bool:
        asked.append(yes)
        return everywhere

    monkeypatch.setattr(choose, "_fused_passes", fused)
    monkeypatch.setattr(choose, "on_all_ranks", on_all_ranks)
    monkeypatch.setattr(choose.torch, "ones", lambda *_, **__: None)
    assert (choose_passes(torch.device("cuda"), None) is EAGER) == (not everywhere)
    assert asked == [here]

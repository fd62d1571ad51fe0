"""``"compile": true``: what torch.compile makes of the shard arithmetic against the same formulas in float64, and whole
runs against the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._inductor.config
from packaging.version import Version

from ds_looksam import LookSAMConfigError
from ds_looksam.arithmetic import compiled
from ds_looksam.arithmetic.eager import EAGER
from ds_looksam.engines import passes
from ds_looksam.engines.passes import COMPILES_ON_CPU, choose_passes

from .test_algebra import CHECKS, CPU
from .test_options import BF16_V, TIGHT
from .test_options import V_ROUNDED as ROUNDED
from .training import DTYPES, TOLERANCE, Case, check_against_oracle

pytestmark = pytest.mark.skipif(Version(torch.__version__) < COMPILES_ON_CPU, reason="refused with this torch")

COMPILED: dict[str, Any] = {"compile": True}


@pytest.mark.parametrize("check", [
    "nothing", "projection", "sums and reuse, fp32", "sums and reuse, bf16", "fp32-bf16-out-one-nearest",
    "fp32-bf16-out-each-nearest", "bf16-bf16-in place-one-nearest", "bf16-bf16-in place-one-random",
    "fp32-fp16-out-one-random"])
def test_passes(monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    """Several pieces for each flat tensor, and a short last one."""
    monkeypatch.setattr(compiled, "CHUNK", 64)
    CHECKS[check](choose_passes(CPU, True), 200)


BF16 = Case(stage=2, world=2, precision="bf16", loss_scale=128.0, base="SGD", params=COMPILED,
            config={"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"})
CASES: dict[str, tuple[Case, float]] = {
    "bf16-stage2": (BF16, TIGHT["SGD"]),
    "fp32-stage0": (Case(stage=0, two_groups=True, clipping=0.05, params=COMPILED), TOLERANCE),
    "fp32-stage3": (Case(stage=3, model="straddling", world=4, zero={"sub_group_size": 30}, params=COMPILED),
                    TOLERANCE),
    "offload": (Case(stage=1, base="SGD", zero={"offload_optimizer": {"device": "cpu"}}, params=COMPILED,
                     config={"zero_force_ds_cpu_optimizer": False}), TOLERANCE),
    "layerwise": (Case(stage=2, layer_scale="norm", two_groups=True, params=COMPILED), TOLERANCE),
    "bf16-optimizer": (replace(BF16, stage=1, clipping=0.05, alpha=0.7), TIGHT["SGD"]),
    "bf16-stage3": (replace(BF16, stage=3, world=1, config={}), TIGHT["SGD"]),
    "v-in-bf16": (Case(stage=2, base="SGD", alpha=0.7, params={**COMPILED, **BF16_V}), ROUNDED["SGD"]),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.grid if name != "bf16-stage2" else [])
                                  for name in CASES])
def test_against_oracle(name: str) -> None:
    case, tolerance = CASES[name]
    check_against_oracle(case, tolerance, dtype=torch.float64 if case.precision == "fp32" else DTYPES[case.precision],
                         v_dtype=torch.bfloat16 if name == "v-in-bf16" else torch.float64)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler", )}), \
            pytest.raises(LookSAMConfigError, match=r"optimizer\.params\.compile: the arithmetic could"):
        choose_passes(CPU, True)


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_passes(CPU, None) is choose_passes(CPU, False) is EAGER
    assert choose_passes(CPU, True) is compiled.COMPILED
    monkeypatch.setattr(passes, "COMPILES_ON_CPU", Version("99"))
    with pytest.raises(LookSAMConfigError, match=r"optimizer\.params\.compile: .* takes torch 99"):
        choose_passes(CPU, True)


@pytest.mark.parametrize("here, everywhere", [(True, True), (True, False), (False, False)])
def test_a_gpu_without_triton_on_any_rank(monkeypatch: pytest.MonkeyPatch, here: bool, everywhere: bool) -> None:
    """No GPU here: the CPU's passes stand for the fused ones. Without ``compile`` all ranks take the same."""
    fused = mock.Mock(return_value=replace(EAGER, squared_norm=lambda *_: None),
                      side_effect=None if here else RuntimeError("no C compiler"))
    on_all_ranks = mock.Mock(return_value=everywhere)
    monkeypatch.setattr(passes, "_fused_passes", fused)
    monkeypatch.setattr(passes, "on_all_ranks", on_all_ranks)
    monkeypatch.setattr(passes.torch, "ones", lambda *_, **__: None)
    assert (choose_passes(torch.device("cuda"), None) is EAGER) == (not everywhere)
    on_all_ranks.assert_called_once_with(here, torch.device("cuda"))

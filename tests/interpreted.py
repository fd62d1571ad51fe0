"""The Triton kernels of the shard arithmetic, run by Triton's interpreter, against the same formulas in float64.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted.py

In a process of its own (tests/test_fused.py): Triton decides when it is imported whether kernels are interpreted. On a
GPU tests/test_gpu.py runs them. The interpreter cuts off where bfloat16 rounds to nearest: w + eps is formed in fp16
here, and in both on a GPU.
"""

from __future__ import annotations

import pytest

from ds_looksam.arithmetic import eager
from ds_looksam.arithmetic.triton_passes import FUSED

from .test_algebra import CHECKS, NUMEL, PERTURBATIONS


@pytest.mark.parametrize(("check", "numel"), [
    (check, numel) for check in CHECKS for numel in (NUMEL[2:] if check in PERTURBATIONS else NUMEL)
    if not check.startswith("fp32-bf16") and not ("bf16" in check and "nearest" in check)])
def test_passes(monkeypatch: pytest.MonkeyPatch, check: str, numel: int) -> None:
    """In several launches."""
    monkeypatch.setattr(eager, "chunk_size", lambda device: 8192)
    CHECKS[check](FUSED, numel)

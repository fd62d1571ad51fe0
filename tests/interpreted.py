"""The Triton kernels of the shard arithmetic, run by Triton's interpreter, against the same formulas in float64.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted.py

In a process of its own (tests/test_fused.py): Triton decides when it is imported whether kernels are interpreted. On a
GPU tests/test_gpu.py runs them. The interpreter cuts off where bfloat16 rounds to nearest: w + eps is formed in fp16
here, and in both on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from ds_looksam.arithmetic import eager
from ds_looksam.arithmetic.triton_passes import FUSED

from .test_algebra import NUMEL, SEED, check_nothing, check_perturbation, check_projection, check_reuse, check_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", NUMEL)
def test_sums_and_reuse(numel: int, dtype: torch.dtype) -> None:
    check_sums(FUSED, numel, dtype)
    check_reuse(FUSED, numel, dtype)


@pytest.mark.parametrize("numel", NUMEL)
def test_projection_keeps_a_small_difference(numel: int) -> None:
    check_projection(FUSED, numel)


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("master, model, in_place", [
    (torch.float32, torch.float32, False), (torch.float32, torch.float32, True), (torch.float32, torch.float16, False),
    (torch.float16, torch.float16, True),
])
@pytest.mark.parametrize("numel", NUMEL[2:])
def test_perturbation(numel: int, master: torch.dtype, model: torch.dtype, in_place: bool, per_element: bool) -> None:
    check_perturbation(FUSED, numel, master, model, in_place, per_element)


@pytest.mark.parametrize("master, model, in_place", [
    (torch.float32, torch.float16, False), (torch.float16, torch.float16, True), (torch.bfloat16, torch.bfloat16, True),
])
@pytest.mark.parametrize("numel", NUMEL[2:])
def test_stochastic_rounding(monkeypatch: pytest.MonkeyPatch, numel: int, master: torch.dtype, model: torch.dtype,
                             in_place: bool) -> None:
    """Bit by bit as the eager arithmetic rounds, in several launches."""
    monkeypatch.setattr(eager, "chunk_size", lambda device: 8192)
    check_perturbation(FUSED, numel, master, model, in_place, per_element=False, rounding=SEED)


def test_a_rank_that_owns_nothing() -> None:
    check_nothing(FUSED)

"""Base optimizers against the oracle's own: LookSAM hands each of them u, at the clean weights, group by group."""

from __future__ import annotations

from typing import Any

import pytest

from .test_oracle_grid import TOLERANCE
from .training import Case, check_against_oracle

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {"betas": (0.8, 0.95), "eps": 1e-6}),
    "AdamW-torch": ("AdamW", {"torch_adam": True}),
    "Adam": ("Adam", {}),
    "Adam-torch": ("Adam", {"torch_adam": True}),
    "SGD-plain": ("SGD", {"momentum": 0.0}),
    "SGD-momentum": ("SGD", {"momentum": 0.9}),
    "SGD-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "Adagrad": ("Adagrad", {}),
}


@pytest.mark.parametrize("name, stage", [
    pytest.param(name, stage, marks=[] if (i + stage) % 2 == 0 else pytest.mark.grid)
    for i, name in enumerate(BASES) for stage in range(4)
])
def test_bases(name: str, stage: int) -> None:
    base, options = BASES[name]
    check_against_oracle(Case(stage=stage, base=base, options=options, two_groups=True, updates=8,
                              zero={"sub_group_size": 60} if stage == 3 else {}), TOLERANCE)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["AdamW", "Adam", pytest.param("Adagrad", marks=pytest.mark.grid)])  # to compile
def test_bases_on_the_cpu(name: str, stage: int) -> None:
    """DeepSpeedCPUAdam and DeepSpeedCPUAdagrad, which the JSON's names mean where the optimizer is offloaded."""
    base, options = BASES[name]
    check_against_oracle(Case(stage=stage, base=base, options=options, two_groups=True, updates=8, zero=OFFLOAD),
                         3 * TOLERANCE)  # see test_offload


@pytest.mark.grid  # an operator of its own to compile
@pytest.mark.parametrize("stage", [1, 3])
def test_lion(stage: int) -> None:
    """DeepSpeedCPULion (FusedLion exists on GPUs only). It steps by the sign of a mean of gradients: the seed is one
    for which no element's mean comes near 0, where rounding would decide."""
    check_against_oracle(Case(stage=stage, base="Lion", two_groups=True, updates=8, zero=OFFLOAD), TOLERANCE)

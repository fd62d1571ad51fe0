"""Parameters that nobody optimizes, such as a momentum teacher's: where this rank keeps their values.

Under ZeRO stage 3 that is a partition, from which every forward gathers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from torch import Tensor

from .base import full_shape

_PIECE = 1 << 24


def is_partitioned(p: Any) -> bool:
    return hasattr(p, "ds_id")


def values_of(p: Any) -> Tensor:
    """What this rank keeps: the parameter, or its partition. To write to ``.data``, then :func:`drop_gathered`."""
    values: Tensor = p.ds_tensor if is_partitioned(p) else p
    return values


def are_in_memory(p: Any) -> bool:
    """Not on NVMe."""
    return not is_partitioned(p) or p.ds_tensor.status is PartitionedParamStatus.AVAILABLE


def whole_nbytes(p: Any) -> int:
    """The same on every rank."""
    return math.prod(full_shape(p)) * int(p.element_size())


def drop_gathered(parameters: Iterable[Any]) -> None:
    """Let the next forward gather them again from partitions that have been written. To be called for the same ones on
    every rank, whether their own part has changed or not: gathering is collective."""
    for p in parameters:
        if is_partitioned(p) and p.ds_status is ZeroParamStatus.AVAILABLE:
            p.data = torch.empty(0, dtype=p.dtype, device=p.device)
            p.ds_status = ZeroParamStatus.NOT_AVAILABLE


def norms_of(parameters: Iterable[Any]) -> list[Tensor]:
    """In fp64; the sum of the bytes where torch has no such norm: weights that were quantized (uint8, int8, fp8)."""
    values = [values_of(p) for p in parameters]
    floats = [i for i, x in enumerate(values) if x.is_floating_point() and x.element_size() > 1]
    norms = torch._foreach_norm([values[i].detach() for i in floats], 2, torch.float64) if floats else ()
    of = dict(zip(floats, norms, strict=True))
    return [of[i] if i in of else _sum_of_bytes(x) for i, x in enumerate(values)]


def _sum_of_bytes(values: Tensor) -> Tensor:
    """In pieces: torch makes a copy in int64 of what it adds up."""
    pieces = values.detach().reshape(-1).view(torch.uint8).split(_PIECE)
    return torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum()

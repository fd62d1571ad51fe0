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

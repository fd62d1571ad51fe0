"""The few sums over ranks of a training step."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator


def sum_over_ranks(partial_sums: torch.Tensor, process_group: Any | None) -> torch.Tensor:
    """Add up float64 [n], this rank's part of n scalars, over the ranks that share the shards; nothing is sent where
    every rank holds everything (ZeRO stage 0: None). Collective over ``process_group``. Returns the sums, on the device
    of ``partial_sums`` and the same on every rank of the group."""
    if ranks_in(process_group) == 1:
        return partial_sums
    # Shards that are offloaded lie on the CPU, where NCCL cannot add them up.
    on_accelerator = partial_sums.to(get_accelerator().current_device_name())
    dist.all_reduce(on_accelerator, group=process_group)
    return on_accelerator.to(partial_sums.device)


def sum_over_all_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add up float64 [n] over every rank of the job, shards or not. Collective."""
    return sum_over_ranks(values, dist.get_world_group()) if dist.is_initialized() else values


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks_in(process_group: Any | None) -> int:
    """How many ranks :func:`sum_over_ranks` adds up over."""
    return 1 if process_group is None else dist.get_world_size(group=process_group)

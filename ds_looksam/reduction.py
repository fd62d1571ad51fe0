"""The few sums over ranks. Everything LookSAM sends beside gradients and weights goes through here."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist


def sum_over_ranks(partial_sums: torch.Tensor, process_group: Any | None) -> torch.Tensor:
    """Add up per-rank partial sums, in place. Collective over ``process_group``.

    Args:
        partial_sums: float64 [n], this rank's part of n scalars.
        process_group: the ranks that share the shards; None where every rank holds everything (ZeRO stage 0),
            then nothing is sent.

    Returns:
        ``partial_sums``, now the same on every rank of the group.
    """
    if process_group is not None and dist.get_world_size(group=process_group) > 1:
        dist.all_reduce(partial_sums, group=process_group)
    return partial_sums

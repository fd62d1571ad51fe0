"""ZeRO stage 1 in bf16 with fp32 gradient accumulation: BF16_Optimizer.

What DeepSpeed keeps per param group i, on this rank:

- ``fp32_groups_flat_partition[i]``: the fp32 master weights of this rank's partition, [partition_size]. LookSAM never
  writes to them.
- ``bf16_partitioned_groups[i][rank]``: the same elements in bf16, views of the flat buffer the model computes with.
- ``fp32_groups_gradients_flat[i]``: the *whole* group's gradient in fp32, [partition_size * world], all-reduced whole
  and the same on every rank. ``fp32_groups_gradient_flat_partition[i]`` is this rank's part of it, which the step
  takes.

The clipping norm, and with it the decision to skip, is taken from the whole buffer on each rank by itself. LookSAM
edits this rank's part only, so the other parts are stale: they are zeroed, and one element of them gets the length that
they would have, from ‖u‖² over the whole model::

    rank 0: [ u u u u | f 0 0 0 ]      rank 1: [ f 0 0 0 | u u u u ]      f² = ‖u‖² - (this rank's part)
"""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from ..arithmetic.eager import Shard
from ..arithmetic.layout import Segment
from .zero12 import PartitionedShards


class BF16Shards(PartitionedShards):
    wants_squared_norm = True

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        super().__init__(optimizer, optimizer.bf16_groups, optimizer.bf16_groups_flat,
                         optimizer.bf16_partitioned_groups, optimizer.fp32_groups_flat_partition)
        self._rank = dist.get_rank(group=optimizer.dp_process_group)

    def layout(self) -> list[list[Segment]]:
        flats = []
        for i, params in enumerate(self.groups):
            lo, hi = self._own_range(i)
            position, segments = 0, []
            for p in params:
                start, end = max(position, lo), min(position + p.numel(), hi)
                if start < end:
                    segments.append(Segment(p, start - lo, start - position, end - start))
                position += p.numel()
            flats.append(segments)
        return flats

    def take_gradient(self, *, survives_evaluation: bool) -> Shard:
        own = self._zero.fp32_groups_gradient_flat_partition
        if not survives_evaluation:
            return [flat.detach() for flat in own]
        gradient = [flat.detach().clone() for flat in own]
        self._zero_gradients()  # or the next evaluation would be added onto this one
        return gradient

    def give_gradient(self, gradient: Shard) -> None:
        zero = self._zero
        for i, flat in enumerate(gradient):
            lo, hi = self._own_range(i)
            whole = zero.fp32_groups_gradients_flat[i]
            whole[:lo].zero_()
            whole[lo:hi].copy_(flat)  # the same memory after take_gradient(survives_evaluation=False)
            whole[hi:].zero_()
            # A parameter without a gradient in this window may have a part of v: clip that too.
            zero.fp32_groups_has_gradients[i] = [True] * len(self.groups[i])

    def tell_squared_norm(self, squared_norm: Tensor) -> None:
        slot = self._slot_of_others()
        if slot is not None:
            own = [flat.detach() for flat in self._zero.fp32_groups_gradient_flat_partition]
            rest = squared_norm - self.passes.squared_norm(own, self.device)
            # Not finite in one part is not finite everywhere, so that all ranks skip: clamp keeps NaN.
            slot.copy_(torch.where(torch.isfinite(squared_norm), torch.clamp(rest, min=0).sqrt(), squared_norm))

    def zero_grad_drops(self, by_optimizer: bool, is_complete: bool) -> bool:
        return by_optimizer  # which clears its own buffers

    def _own_range(self, i: int) -> tuple[int, int]:
        size = self._masters[i].numel()
        return self._rank * size, (self._rank + 1) * size

    def _slot_of_others(self) -> Tensor | None:
        """One element of the gradient buffers that is a parameter's and not this rank's; None if this rank has all."""
        for i, params in enumerate(self.groups):
            lo, hi = self._own_range(i)
            if lo > 0:
                return self._zero.fp32_groups_gradients_flat[i][0]
            if hi < sum(p.numel() for p in params):
                return self._zero.fp32_groups_gradients_flat[i][hi]
        return None

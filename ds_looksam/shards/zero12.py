"""ZeRO stages 1 and 2: DeepSpeedZeroOptimizer, without offload.

What DeepSpeed keeps per param group i, on this rank:

- ``single_partition_of_fp32_groups[i]``: the fp32 master weights of this rank's partition, [partition_size]. LookSAM
  never writes to them, so taking w + eps back costs nothing: the step casts the master and gathers.
- ``parallel_partitioned_bit16_groups[i][rank]``: the same elements in the model's dtype (a separate copy in fp32 too),
  a view of the flat buffer whose views are the model's parameters.
- ``averaged_gradients[i]``: this partition's averaged gradient as a list of fragments, padding included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.stage_1_and_2 import (
    INITIAL_MICRO_STEP_ID,
    DeepSpeedZeroOptimizer,
    GradPartitionBufferGroup,
)
from torch import Tensor
from torch.distributed import Work

from ..arithmetic.eager import Shard
from ..arithmetic.layout import Segment
from .base import GradientShards, ScaleOf, views_of
from .own import OwnModel


class PartitionedShards(GradientShards):
    """What DeepSpeedZeroOptimizer and BF16_Optimizer have in common, under other names: by param group the model's
    parameters, the flat tensor whose views they are, its partitions by rank, and this rank's master weights."""

    def __init__(self, optimizer: Any, groups: list[list[torch.nn.Parameter]], wholes: Shard, partitions: list[Shard],
                 masters: Shard) -> None:
        self._zero, self.groups, self._wholes = optimizer, groups, wholes
        self._partitions, self._masters = partitions, masters
        self.process_group = optimizer.dp_process_group
        self.device = masters[0].device
        self.group_of = list(range(len(masters)))

    def gradient_writers(self) -> Iterable[tuple[Any, str]]:
        return [(p, "set_full_hp_grad") for p in self.parameters() if hasattr(p, "set_full_hp_grad")]

    def master_weights(self) -> Shard:
        return [w.detach() for w in self._masters]

    def perturb_weights(self, gradient: Shard, scale_of: ScaleOf, rounding: int | None) -> Tensor:
        own = [self._own_partition(i) for i in self.group_of]
        return self._perturb_flats(self.master_weights(), gradient, scale_of, rounding, own, self._publish)

    def own_model(self) -> OwnModel:
        return OwnModel(self, self._wholes)

    def restore_weights(self) -> None:
        self._zero.update_lp_params()

    def cast_weights(self, i: int) -> None:
        self._own_partition(i).copy_(self._masters[i].data)

    def abort_evaluation(self) -> None:
        self._zero_gradients()
        self._zero._backward_hook_state.backward_active_depth = 0
        self._zero._backward_hook_state.reset_for_new_step()

    def _zero_gradients(self) -> None:
        """The class's own: the engine watches the instance's for calls of the user, who throws a window away."""
        type(self._zero).zero_grad(self._zero, set_to_none=True)

    def _own_partition(self, i: int) -> Tensor:
        return self._partitions[i][dist.get_rank(group=self._zero.real_dp_process_group[i])].data

    def _publish(self, i: int) -> Work | None:
        """As DeepSpeed's all_gather_dp_groups does one group after the other."""
        group = self._zero.real_dp_process_group[i]
        if dist.get_world_size(group=group) == 1:
            return None
        # Detached: BF16_Optimizer's flat tensor hangs on the graph of the parameters that it was flattened from.
        return dist.all_gather_into_tensor(self._wholes[i].detach(), self._own_partition(i), group=group, async_op=True)


class Zero12Shards(PartitionedShards):
    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        super().__init__(optimizer, optimizer.bit16_groups, optimizer.bit16_groups_flat,
                         optimizer.parallel_partitioned_bit16_groups, optimizer.single_partition_of_fp32_groups)
        self._taken: dict[int, tuple[Tensor, list[Tensor]]] = {}  # what was last taken of each group, its fragments

    def layout(self) -> list[list[Segment]]:
        zero, flats = self._zero, []
        for i in self.group_of:
            rank = dist.get_rank(group=zero.real_dp_process_group[i])
            segments = []
            for p in zero.params_in_partition[i]:
                key = zero.get_param_id(p)
                start = zero.grad_partition_insertion_offset[i][rank][key]
                offset = zero.grad_start_offset[i][rank][key]
                numel = min(p.numel() - offset, zero.partition_size[i] - start)
                segments.append(Segment(p, start, offset, numel))
            flats.append(segments)
        return flats

    def take_gradient(self, *, survives_evaluation: bool) -> Shard:
        gradient = [self._flat_fp32(i) for i in self.group_of]
        self._start_window()
        return gradient

    def give_gradient(self, gradient: Shard) -> None:
        # DeepSpeed's step takes a group that owns its flat partition as it is, where it would otherwise flatten and
        # cast the fragments. The fragments stay visible in their shapes: the clipping norm is summed over them, in
        # DeepSpeed's order.
        for i, flat in enumerate(gradient):
            taken, fragments = self._taken.pop(i)
            if taken is not flat:
                fragments = fragments_like(fragments, flat)
            self._zero.averaged_gradients[i] = GradPartitionBufferGroup(fragments, flat)

    def zero_grad_drops(self, by_optimizer: bool, is_complete: bool) -> bool:
        # Stage 2 keeps it elsewhere until the boundary's backward, which writes over the last one.
        return is_complete or not self._zero.partition_gradients

    def gradients_are_gone(self) -> bool:
        # Stage 1 moves them to grad_accum where they are accumulated in another dtype than the model's.
        return not self._zero.partition_gradients and all(
            p.grad is None and getattr(p, "grad_accum", None) is None for p in self.parameters())

    def abort_evaluation(self) -> None:
        zero = self._zero
        for bucket in zero.ipg_buckets.values():
            bucket.clear()
        zero.extra_large_param_to_reduce.clear()
        zero.previous_reduced_grads.clear()
        zero.params_already_reduced = [False] * len(zero.params_already_reduced)
        zero._release_ipg_buffers()
        super().abort_evaluation()
        self._start_window()

    def _flat_fp32(self, i: int) -> Tensor:
        """Group i's averaged gradient as one fp32 tensor [partition_size]; a copy, unless LookSAM gave it."""
        fragments = self._zero.averaged_gradients[i]
        flat: Tensor | None = getattr(fragments, "flat_partition", None)
        if flat is None or flat.dtype != torch.float32:
            flat = torch.empty(sum(f.numel() for f in fragments), dtype=torch.float32, device=self.device)
            views = fragments_like(fragments, flat)
            torch._foreach_copy_(views, [f.detach() for f in fragments])
            fragments = views
        self._taken[i] = flat, fragments
        return flat

    def _start_window(self) -> None:
        """Without this the next evaluation would be added onto the last one."""
        self._zero.micro_step_id = INITIAL_MICRO_STEP_ID
        for i in self.group_of:
            self._zero.averaged_gradients[i] = None
            self._zero.all_grad_tensors[i] = None


def fragments_like(fragments: list[Any], flat: Tensor) -> list[Any]:
    """Views of ``flat`` with the shapes and padding marks of these fragments."""
    views: list[Any] = views_of(flat, fragments)
    for view, fragment in zip(views, fragments, strict=True):
        if getattr(fragment, "_zero_padding", False):
            view._zero_padding = True
    return views

"""ZeRO stages 1 and 2 with ``offload_optimizer``: the same partitions as without, master weights and gradient in host
memory.

What DeepSpeed keeps per param group i, on this rank, beside what :mod:`.zero12` lists:

- ``single_partition_of_fp32_groups[i]`` lies on the CPU, and so does its ``.grad``: one buffer [partition_size] that
  lives as long as the optimizer. At the boundary every parameter with a gradient copies its part there.
- ``norm_for_param_grads[param_id]``: the norm of that part, taken when it was copied. The step clips with these norms,
  so they must follow the gradient that LookSAM gives back.
- ``local_overflow``: whether a copied part was not finite; the step skips the update where any rank says so.
- ``param_buffer_of_bit16_for_cpu_offload_groups[i]``: the partition in the model's dtype on the CPU, on its way to the
  device.
"""

from __future__ import annotations

import torch
from torch.distributed import Work

from ..arithmetic.eager import Shard
from ..errors import LookSAMConfigError
from .base import ScaleOf, in_fp32, part_norms
from .zero12 import Zero12Shards


class Zero12OffloadShards(Zero12Shards):

    def take_gradient(self, *, survives_evaluation: bool) -> Shard:
        self._complete_gradient()
        gradient = [in_fp32(buffer, survives_evaluation) for buffer in self._gradient_buffers()]
        self._start_window()
        return gradient

    def give_gradient(self, gradient: Shard) -> None:
        zero = self._zero
        for buffer, flat in zip(self._gradient_buffers(), gradient, strict=True):
            if buffer.data_ptr() != flat.data_ptr():
                buffer.copy_(flat)
        ids, parts = [], []
        for flat, params in zip(gradient, zero.params_in_partition, strict=True):
            for p in params:
                param_id = zero.get_param_id(p)
                _, _, start, numel = zero.grad_position[param_id]
                ids.append(param_id)
                parts.append(flat.narrow(0, start, numel))
        norms = part_norms(parts)
        zero.norm_for_param_grads = dict(zip(ids, norms, strict=True))
        zero.local_overflow = bool(parts) and not torch.isfinite(torch.stack(norms)).all().item()

    def zero_grad_drops(self, by_optimizer: bool, is_complete: bool) -> bool:
        return False  # it is in host memory

    def gradients_are_gone(self) -> bool:
        return False

    def keep_gradient(self) -> None:
        self._complete_gradient()

    def end_window(self) -> None:
        self._clear_partial_sums()

    def perturb_weights(self, gradient: Shard, scale_of: ScaleOf, rounding: int | None) -> torch.Tensor:
        on_host = self._zero.param_buffer_of_bit16_for_cpu_offload_groups
        return self._perturb_flats(self.master_weights(), gradient, scale_of, rounding, on_host, self._publish)

    def _publish(self, i: int) -> Work | None:
        on_host = self._zero.param_buffer_of_bit16_for_cpu_offload_groups[i]
        self._own_partition(i).copy_(on_host, non_blocking=True)
        return super()._publish(i)

    def _start_window(self) -> None:
        super()._start_window()
        self._zero._wait_for_offload_copies()  # one of an evaluation that broke off would land in the next window's sum
        self._clear_partial_sums()
        self._zero.norm_for_param_grads = {}
        self._zero.local_overflow = False
        self._zero._offload_accumulated_param_ids = set()

    def _gradient_buffers(self) -> Shard:
        return [master.grad.view(-1) for master in self._zero.single_partition_of_fp32_groups]

    def _clear_partial_sums(self) -> None:
        """Without this a parameter that first appears in a later micro-batch is added onto the last window's sum."""
        sums = list(self._zero.accumulated_grads_in_cpu.values())
        if sums:
            torch._foreach_zero_(sums)

    def _complete_gradient(self) -> None:
        """Bring in what DeepSpeed 0.19.8 leaves out: it copies the parts of those parameters only that have a gradient
        in the window's last micro-batch. Of those that an earlier one reached the sum waits to be copied; the parts of
        others still hold an earlier window's."""
        zero = self._zero
        waiting = zero._offload_accumulated_param_ids - zero.norm_for_param_grads.keys()
        if waiting:
            zero._offload_accumulated_param_ids = waiting
            zero._finalize_cpu_offload_gradient_accumulation()
        zero._wait_for_offload_copies()
        for buffer, params in zip(self._gradient_buffers(), zero.params_in_partition, strict=True):
            for p in params:
                param_id = zero.get_param_id(p)
                if param_id not in zero.norm_for_param_grads:
                    # DeepSpeed's own check comes too late: by then every parameter has a norm.
                    if not zero.ignore_unused_parameters:
                        raise LookSAMConfigError(
                            "zero_optimization.ignore_unused_parameters is false, and a parameter of shape "
                            f"{tuple(p.shape)} has no gradient in this window: set it to true, or let every parameter "
                            "take part in the loss")
                    _, _, start, numel = zero.grad_position[param_id]
                    buffer.narrow(0, start, numel).zero_()

"""ZeRO stage 3 with ``offload_optimizer``: master weights and gradient in host memory, or the master weights on NVMe.

What DeepSpeed keeps, on this rank, beside what :mod:`.zero3` lists:

- ``grad_partitions_flat_buffer``: the averaged gradient of all sub-groups, one partition per parameter, on the CPU in
  the gradient accumulation dtype. It lives as long as the optimizer, also where the optimizer's state is on NVMe.
- ``fp32_partitioned_groups_flat[i].grad``: what the step reads. A copy of the sub-group's part of that buffer, made at
  the boundary; for a sub-group on NVMe it is handed to ``optimizer_swapper`` instead, and exists while it is swapped
  in.
- ``norm_for_param_grads[param_id]``: the norm of each partition, taken when it was copied. The step clips with these
  norms, so they must follow the gradient that LookSAM gives back.

Sub-groups on NVMe (all but those under 1 MiB) have no master weights in memory between the steps; a SAM step reads
them, one sub-group after another. Their g_v is a file beside them, mapped into memory: the arithmetic reads it like any
tensor, and the operating system keeps of it in memory what there is room for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import mkstemp

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from ..arithmetic.eager import Shard
from ..arithmetic.layout import Segment
from .base import part_norms
from .zero3 import Zero3Shards


class Zero3OffloadShards(Zero3Shards):

    def __init__(self, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
        super().__init__(optimizer)
        self.device = torch.device("cpu")
        self._segments = self.layout()
        self._v_on_nvme: dict[int, Tensor] = {}

    def show_gradient(self, gradient: Shard) -> None:
        """Not here: handing it over means copies to the host, or to NVMe, and back."""

    def hide_gradient(self, gradient: Shard) -> Shard:
        return gradient

    def give_gradient(self, gradient: Shard) -> None:
        self._zero.norm_for_param_grads = {}
        for i, (flat, segments) in enumerate(zip(gradient, self._segments, strict=True)):
            self._hand_over(i, flat, segments)

    def take_gradient(self, *, survives_evaluation: bool) -> Shard:
        self._wait_for_copies()
        return super().take_gradient(survives_evaluation=survives_evaluation)

    def keep_gradient(self) -> None:
        """Hand over what DeepSpeed has not. A sub-group on NVMe is handed over whole."""
        self._wait_for_copies()
        for i, segments in enumerate(self._segments):
            if not self._zero._swappable_optimizer_subgroup(i):
                self._complete_gradient(i)
            elif segments:
                self._hand_over(i, self._accumulated_gradient(i).to(torch.float32), segments)

    def reserve_v(self, dtype: torch.dtype) -> None:
        for i, numel in enumerate(self.flat_sizes()):
            if self._zero._swappable_optimizer_subgroup(i):
                self._v_on_nvme[i] = file_backed(self._zero.optimizer_swapper.swap_folder, numel, dtype)

    def keep_v(self, v: Shard, dtype: torch.dtype) -> Shard:
        return [self._v_on_nvme[i].copy_(part) if i in self._v_on_nvme else part.to(dtype) for i, part in enumerate(v)]

    def master_weights(self) -> Shard:
        """As everywhere; a sub-group on NVMe is read into memory."""
        masters = []
        for i in range(len(self.group_of)):
            with self._master(i) as master:
                masters.append(master.clone() if self._zero._swappable_optimizer_subgroup(i) else master)
        return masters

    def layer_squares(self) -> Tensor:
        out = self.layers.zeros(1)[:, 0]
        for i in range(len(self.group_of)):  # one after the other: memory may have no room for all that is on NVMe
            with self._master(i) as master:
                self.layers.add_squares_(out, [(i, 0, master.numel())], [master])
        return out[:-1]

    def _wait_for_copies(self) -> None:
        """With ``managed_gradient_accumulation: false`` DeepSpeed's own step starts copies to the host, and waits for
        them only where it takes the norm; otherwise the last backward has."""
        get_accelerator().synchronize()

    def _start_window(self) -> None:
        super()._start_window()
        self._zero.norm_for_param_grads = {}

    def _complete_gradient(self, i: int) -> None:
        """Copy to where sub-group i's step reads it what DeepSpeed has not: the gradient of parameters that have none
        in the window's last micro-batch. The step would find that of an earlier window in their place."""
        known = self._zero.norm_for_param_grads
        missing = [s for s in self._segments[i] if self._zero.get_param_id(s.parameter) not in known]
        if missing:
            self._hand_over(i, self._accumulated_gradient(i), missing)
        for key in [self._zero.get_param_id(s.parameter) for s in missing]:
            # Where DeepSpeed has the others, and adds all of them up.
            known[key] = known[key].to(get_accelerator().current_device_name())

    def _flat_gradient(self, i: int) -> Tensor:
        """What the step reads: fp32 already, where fresh memory for a copy would take longer than the arithmetic."""
        if self._zero._swappable_optimizer_subgroup(i):
            return self._accumulated_gradient(i)
        self._complete_gradient(i)
        return self._zero.fp32_partitioned_groups_flat[i].grad.view(-1)

    def _accumulated_gradient(self, i: int) -> Tensor:
        """Sub-group i's part of the gradient buffer, in the order of its master weights."""
        sizes = self._zero.fp16_partitioned_groups_flat_numel
        return self._zero.grad_partitions_flat_buffer.narrow(0, sum(sizes[:i]), sizes[i])

    def _hand_over(self, i: int, flat: Tensor, segments: list[Segment]) -> None:
        """Give sub-group i's optimizer step the gradient of the parameters in ``segments``, and its norms."""
        zero, master = self._zero, self._zero.fp32_partitioned_groups_flat[i]
        parts = [flat.narrow(0, s.start, s.numel) for s in segments]
        zero.norm_for_param_grads.update(
            {zero.get_param_id(s.parameter): norm for s, norm in zip(segments, part_norms(parts), strict=True)})
        if zero._swappable_optimizer_subgroup(i):
            # In memory, where DeepSpeed keeps small gradients until the step. It writes large ones to NVMe and reads
            # each to its place in the sub-group, which O_DIRECT refuses where that is not aligned to a block: DeepSpeed
            # 0.19.8 alone does not notice, and steps with whatever was in the buffer.
            swapped = zero.optimizer_swapper.swap_params_info[zero.optimizer_swapper.parameter_id(master)]
            swapped.swapped_gradients = {}
            swapped.unswapped_gradients = {0: flat}
        elif flat.data_ptr() != master.grad.data_ptr():
            for s, part in zip(segments, parts, strict=True):
                master.grad.narrow(0, s.start, s.numel).copy_(part)

    @contextmanager
    def _master(self, i: int) -> Iterator[Tensor]:
        """As everywhere; read from NVMe where they are there."""
        zero = self._zero
        if not zero._swappable_optimizer_subgroup(i):
            yield zero.fp32_partitioned_groups_flat[i].detach()
            return
        zero._optimizer_states_and_gradient_swap_in(i)
        try:
            yield zero.fp32_partitioned_groups_flat[i].detach()
        finally:
            zero._release_swap_buffers(i)


def file_backed(folder: str, numel: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor [numel] whose memory is a file in ``folder``, without a name: it goes with the process. Raises
    OSError where there is not that much room; without taking it beforehand a write would kill the process."""
    handle, path = mkstemp(dir=folder, prefix="looksam_g_v_")
    size = numel * dtype.itemsize
    try:
        os.posix_fallocate(handle, 0, size)
        return torch.from_file(path, shared=True, size=numel, dtype=dtype)
    except OSError as error:
        raise OSError(error.errno, f"offload_optimizer.nvme_path: LookSAM's g_v needs {size:,} bytes more on this rank "
                                   f"(\"v_dtype\": \"bf16\" halves it): {error.strerror}", path) from error
    finally:
        os.close(handle)
        os.unlink(path)

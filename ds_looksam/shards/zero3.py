"""ZeRO stage 3: DeepSpeedZeroOptimizer_Stage3, without offload.

What DeepSpeed keeps per sub-group i, on this rank:

- ``fp32_partitioned_groups_flat[i]``: the fp32 master weights, the partitions of the sub-group's parameters one after
  another, each with its own padding at the end.
- ``fp16_partitioned_groups_flat[i]``: the partitions in the model's dtype, from which every forward gathers. Another
  tensor in fp32 training too: DeepSpeed 0.19.8 would share it, but compares a device with a string.
- ``averaged_gradients[i]``: one partition per parameter, views of one buffer that lives as long as the optimizer. The
  first micro-batch of a window that has a gradient for a parameter overwrites its partition, later ones add to it, and
  a parameter that takes no part in the window's loss still shows the gradient of an earlier one: DeepSpeed 0.19.8 alone
  trains on that. So LookSAM zeroes the buffer before each evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ..arithmetic.eager import Shard, chunks
from ..arithmetic.layout import Segment
from ..errors import LookSAMConfigError
from .base import GradientShards, ScaleOf, in_fp32

STAGED = 1 << 24
"""Elements of the model that are on their way between the host and the accelerator at once."""


class Zero3Shards(GradientShards):
    def __init__(self, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
        self._zero, self.groups = optimizer, optimizer.fp16_groups
        self.process_group = optimizer.dp_process_group
        self.device = optimizer.fp32_partitioned_groups_flat[0].device
        self.group_of = [optimizer.sub_group_to_group_id[i] for i in range(len(optimizer.fp16_groups))]
        flats = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True)
        if any(master.numel() and master.data_ptr() == model.data_ptr() for master, model in flats):
            raise LookSAMConfigError("DeepSpeed shares master weights with the model, where LookSAM would lose w with "
                                     "w + eps: use DeepSpeed 0.19.8")
        optimizer.flatten = partial(_flatten, optimizer.flatten)
        self._clear_padding()

    def _clear_padding(self) -> None:
        """DeepSpeed 0.19.8 leaves there what was in memory: a nan, perhaps, which would be in every sum."""
        for segments, *flats in zip(self.layout(), self._zero.fp32_partitioned_groups_flat,
                                    self._zero.fp16_partitioned_groups_flat, strict=True):
            ends = [0, *(s.start + s.numel for s in segments)]
            for lo, hi in zip(ends, [*(s.start for s in segments), None], strict=True):
                for flat in flats:
                    flat.data[lo:hi].zero_()

    def gradient_writers(self) -> Iterable[tuple[Any, str]]:
        return [(self._zero, name) for name in ("set_fp32_grad_for_param", "set_local_grad_for_param",
                                                "update_fp32_grad_for_param_vectorized")]

    def layout(self) -> list[list[Segment]]:
        flats = []
        for params in self.groups:
            start, segments = 0, []
            for p in params:
                offset = p.partition_numel() * self._zero._get_param_partition_rank(p)
                numel = min(p.ds_numel - offset, p.partition_numel())
                if numel > 0:
                    segments.append(Segment(p, start, offset, numel))
                start += p.partition_numel()
            flats.append(segments)
        return flats

    def flat_sizes(self) -> list[int]:
        return list(self._zero.fp16_partitioned_groups_flat_numel)

    def take_gradient(self, *, survives_evaluation: bool) -> Shard:
        gradient = [in_fp32(self._flat_gradient(i), survives_evaluation) for i in range(len(self.group_of))]
        self._start_window()
        if survives_evaluation:
            self._zero.grad_partitions_flat_buffer.zero_()
        return gradient

    def give_gradient(self, gradient: Shard) -> None:
        for i, flat in enumerate(gradient):
            self._zero.averaged_gradients[i] = Partitions(flat, [p.partition_numel() for p in self.groups[i]])

    def show_gradient(self, gradient: Shard) -> None:
        # DeepSpeed's safe_get_full_grad reads the buffer, not averaged_gradients.
        partitions = self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for params, flat in zip(self.groups, gradient, strict=True):
            for p, part in zip(params, flat.split([p.partition_numel() for p in params]), strict=True):
                partitions[p.ds_id].copy_(part)

    def hide_gradient(self, gradient: Shard) -> Shard:
        self.end_window()
        return gradient

    def end_window(self) -> None:
        self._zero.grad_partitions_flat_buffer.zero_()

    def zero_grad_drops(self, by_optimizer: bool, is_complete: bool) -> bool:
        return by_optimizer  # which resets the counter by which a first micro-batch writes over the last window

    def master_weights(self) -> Shard:
        return [master.detach() for master in self._zero.fp32_partitioned_groups_flat]

    def perturb_weights(self, gradient: Shard, scale_of: ScaleOf, rounding: int | None) -> torch.Tensor:
        moved = torch.zeros(3, dtype=torch.float64, device=self.device)
        for i, flat in enumerate(gradient):
            with self._master(i) as master:
                moved += self._perturb_model(i, master, flat, scale_of, rounding)
        self._republish()
        return moved

    def _perturb_model(self, i: int, master: torch.Tensor, gradient: torch.Tensor, scale_of: ScaleOf,
                       rounding: int | None) -> torch.Tensor:
        """w + eps of sub-group i in the model's partitions. With one of ``offload_optimizer`` and ``offload_param``
        alone these lie elsewhere than the master weights: then it is rounded there and sent, in pieces, by way of a
        small buffer. Returns the sums of ``add_perturbation``."""
        model = self._zero.fp16_partitioned_groups_flat[i].data
        if model.device == self.device:
            return self._perturb_flat(master, gradient, i, scale_of, rounding, out=model)
        moved = torch.zeros(3, dtype=torch.float64, device=self.device)
        buffer = torch.empty(min(STAGED, model.numel()), dtype=model.dtype, device=self.device)
        if buffer.device.type == "cpu":
            buffer = get_accelerator().pin_memory(buffer)
        for lo, hi in chunks(model.numel(), STAGED):
            piece = buffer[:hi - lo]
            moved += self._perturb_flat(master[lo:hi], gradient[lo:hi], i, scale_of, rounding, out=piece, start=lo)
            model[lo:hi].copy_(piece)
        return moved

    def restore_weights(self) -> None:
        for i, model in enumerate(self._zero.fp16_partitioned_groups_flat):
            with self._master(i) as master:
                model.data.copy_(master)
        self._republish(drop_all=True)

    def cast_weights(self, i: int) -> None:
        self._zero.fp16_partitioned_groups_flat[i].data.copy_(self._zero.fp32_partitioned_groups_flat[i].data)

    def abort_evaluation(self) -> None:
        zero = self._zero
        for param_id in zero.params_already_reduced:
            zero.params_already_reduced[param_id] = False
        for p in self.parameters():
            p.grad = None  # DeepSpeed's zero_grad(set_to_none=True) records streams, which fails on a CPU
        zero._backward_hook_state.backward_active_depth = 0
        zero._backward_hook_state.reset_for_new_step()
        coordinator = zero._get_param_coordinator()
        coordinator.release_backward_leftovers()
        # A trace that was being recorded ends in the middle of the model; a complete one is replayed from its start
        # by the next forward.
        if coordinator.is_record_trace():
            coordinator._invalidate_trace()
        self._start_window()
        self.end_window()

    @contextmanager
    def _master(self, i: int) -> Iterator[torch.Tensor]:
        """Sub-group i's fp32 master weights, valid inside the block."""
        yield self._zero.fp32_partitioned_groups_flat[i].detach()

    def _flat_gradient(self, i: int) -> torch.Tensor:
        """Sub-group i's averaged gradient as one tensor, DeepSpeed's own memory where that is in one piece."""
        partitions = self._zero.averaged_gradients[i]
        flat = self._contiguous(partitions)
        return torch.cat([p.reshape(-1) for p in partitions]) if flat is None else flat

    def _start_window(self) -> None:
        """The next backward is the first of a window, as after a step."""
        self._zero.micro_step_id = 0
        self._zero._epilogue_ran_this_backward = False
        self._zero._offload_boundary_param_ids = set()
        self._zero.averaged_gradients = {}
        for bucket in self._zero.ipg_buckets.values():
            bucket.clear_params()

    def _republish(self, *, drop_all: bool = False) -> None:
        """Gather again what DeepSpeed keeps gathered. Collective.

        After an evaluation that is the persistent parameters alone, as between two micro-batches. If anything else is
        still gathered or on its way, all is dropped first, as DeepSpeed's step does, which takes longer than to gather;
        with ``drop_all`` in any case: an evaluation that broke off has left modules marked as running.
        """
        parameters: list[Any] = self.parameters()
        if drop_all or any(p.ds_status != ZeroParamStatus.NOT_AVAILABLE and not p.ds_persist for p in parameters):
            self._zero._partition_all_parameters()
        gather_at_once(self._zero.persistent_parameters)
        self._zero.invalidate_secondary_tensor()
        self.weights_were_written()

    def weights_were_written(self) -> None:
        # DeepSpeed gathers on a stream of its own. Its step relies on the host having waited for the device since.
        accelerator = get_accelerator()
        if not accelerator.resolves_data_dependency():
            gathers = self._zero._get_param_coordinator()._PartitionedParameterCoordinator__allgather_stream
            gathers.wait_stream(accelerator.current_stream())

    @staticmethod
    def _contiguous(partitions: list[torch.Tensor]) -> torch.Tensor | None:
        """The one flat tensor whose consecutive views ``partitions`` are, or None if they are not."""
        first, offset = partitions[0], partitions[0].storage_offset()
        for p in partitions:
            if (p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or p.storage_offset() != offset
                    or not p.is_contiguous()):
                return None
            offset += p.numel()
        return first.as_strided((offset - first.storage_offset(), ), (1, ))


class Partitions(list[torch.Tensor]):
    """A sub-group's gradient, one partition for each parameter, for the clipping norm: DeepSpeed makes a copy in fp64
    of each. The step takes ``flat``, of which they are views, as it is."""

    def __init__(self, flat: torch.Tensor, sizes: list[int]) -> None:
        super().__init__(flat.split(sizes))
        self.flat = flat


def _flatten(flatten: Callable[[list[torch.Tensor]], torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
    """DeepSpeed's ``flatten``, which would copy."""
    return tensors.flat if isinstance(tensors, Partitions) else flatten(tensors)


def gather_at_once(parameters: list[Any]) -> None:
    """Make parameters whole on every rank, from their partitions. Collective: one all-gather (for each dtype).

    DeepSpeed's ``all_gather`` sends one for each parameter, its ``all_gather_coalesced`` copies ranks x parameters
    pieces in Python, and reads hpZ's secondary partitions, which are still the old weights'.
    """
    by_dtype: dict[torch.dtype, list[Any]] = {}
    for p in parameters:
        by_dtype.setdefault(p.ds_tensor.dtype, []).append(p)
    device = get_accelerator().current_device_name()
    for dtype, params in by_dtype.items():
        group = params[0].ds_process_group
        pieces = [p.ds_tensor.detach().to(device).view(-1) for p in params]
        own = torch.cat(pieces)
        gathered = own.view(1, -1)
        if dist.get_world_size(group=group) > 1:
            gathered = torch.empty(dist.get_world_size(group=group), own.numel(), dtype=dtype, device=device)
            dist.all_gather_into_tensor(gathered.view(-1), own, group=group)
        for p, columns in zip(params, gathered.split([piece.numel() for piece in pieces], dim=1), strict=True):
            p.data = columns.contiguous().view(-1)[:p.ds_numel].view(p.ds_shape)  # a view would keep all in memory
            p.ds_status = ZeroParamStatus.AVAILABLE

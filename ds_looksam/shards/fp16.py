"""ZeRO stage 0 in bf16 or fp16: FP16_UnfusedOptimizer, and FP16_Optimizer where the base is FusedAdam.

DeepSpeed uses both classes for either dtype. Weights, fp32 master and gradients are whole on every rank, the gradients
averaged by the engine at the accumulation boundary: LookSAM sends nothing. The parameters of one group are one flat
tensor.

What DeepSpeed keeps per param group i:

- ``fp16_groups[i]``: the model's parameters; their ``.grad`` is what the step reads, casts, clips and unscales.
- the fp32 master: ``fp32_groups[i]``, one tensor per parameter (unfused), or ``fp32_groups_flat[i]`` (fused).

Two oddities of DeepSpeed 0.19.8 that LookSAM leaves as they are, so that a run with rho 0 and alpha 0 stays the base's:

- To create the optimizer's state, both wrappers step once with a gradient of 0 when they are built: weight decay is
  applied to the master (the model does not see it until the first real step), and Adam's step count starts at 1.
- ``engine.backward`` multiplies the loss by the loss scale only for ZeRO optimizers. These wrappers' steps divide by it
  all the same, so in fp16 the update gets the gradient divided by the loss scale.
"""

from __future__ import annotations

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import logger
from torch import Tensor

from ..arithmetic.eager import Shard
from .base import ScaleOf
from .replicated import WholeShards


class FP16Shards(WholeShards):
    def __init__(self, optimizer: FP16_UnfusedOptimizer | FP16_Optimizer) -> None:
        self._wrapper = optimizer
        self.groups = optimizer.fp16_groups
        self.group_of = list(range(len(self.groups)))
        self.device = self.groups[0][0].device
        for p in self.parameters():
            # So that the reuse step's u reaches the base in fp32 instead of being rounded once more. None allows any
            # dtype in p.grad; what backward puts there stays in the model's.
            p.grad_dtype = None
        if optimizer.low_precision_dtype == torch.float16 and optimizer.loss_scale_config.cur_scale != 1:
            logger.warning(
                "fp16 with zero_optimization.stage 0: DeepSpeed 0.19.8 does not multiply the loss by the loss scale "
                "there, but divides the gradient by it, with LookSAM or without. Use zero_optimization.stage 1, bf16, "
                "or \"fp16\": {\"loss_scale\": 1}.")

    def master_weights(self) -> Shard:
        if isinstance(self._wrapper, FP16_Optimizer):
            return [flat.detach() for flat in self._wrapper.fp32_groups_flat]
        return [self._flatten(group) for group in self._wrapper.fp32_groups]

    def perturb_weights(self, gradient: Shard, scale_of: ScaleOf, rounding: int | None) -> Tensor:
        # Copies, not casts of the master, bring the weights back: until the first step the two differ (see above).
        self._clean = self._copy_weights()
        perturbed = [torch.empty_like(flat) for flat in self._clean]
        moved = self._perturb_flats(self.master_weights(), gradient, scale_of, rounding, perturbed)
        self._write_weights(perturbed)
        return moved

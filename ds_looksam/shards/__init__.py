"""One small room per DeepSpeed optimizer wrapper. What else touches a wrapper's private attributes is in
engines/host.py and engines/deepspeed_fixes.py."""

from __future__ import annotations

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ..errors import LookSAMConfigError
from .base import GradientShards, ScaleOf, full_shape
from .bf16 import BF16Shards
from .fp16 import FP16Shards
from .replicated import ReplicatedShards
from .zero3 import Zero3Shards
from .zero3_offload import Zero3OffloadShards
from .zero12 import Zero12Shards
from .zero12_offload import Zero12OffloadShards

__all__ = ["GradientShards", "ScaleOf", "full_shape", "open_shards"]


def open_shards(engine: DeepSpeedEngine) -> GradientShards:
    """The room for the wrapper that DeepSpeed has put around the base optimizer, without ``whole_groups``. By its exact
    type: a subclass (ZenFlow, SuperOffload) keeps its gradients elsewhere.

    Raises:
        LookSAMConfigError: the wrapper is one that LookSAM does not know.
    """
    optimizer = engine.optimizer
    if type(optimizer) is DeepSpeedZeroOptimizer:
        return Zero12OffloadShards(optimizer) if optimizer.cpu_offload else Zero12Shards(optimizer)
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return Zero3OffloadShards(optimizer) if optimizer.offload_optimizer else Zero3Shards(optimizer)
    if type(optimizer) is BF16_Optimizer:
        return BF16Shards(optimizer)
    if type(optimizer) in (FP16_UnfusedOptimizer, FP16_Optimizer):
        return FP16Shards(optimizer)
    if optimizer is engine.basic_optimizer and isinstance(optimizer, torch.optim.Optimizer):
        return ReplicatedShards(optimizer, engine.device)
    raise LookSAMConfigError(
        f"LookSAM does not support the DeepSpeed optimizer wrapper {type(optimizer).__name__}. Use ZeRO stage 1, 2 or "
        f"3 (\"zero_optimization\": {{\"stage\": ...}}) with fp32, bf16 or fp16.")

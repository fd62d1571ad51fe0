"""What is supported, and the refusals of what is not: at initialize, naming the JSON key and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DtypeEnum

from ..errors import LookSAMConfigError
from ..optimizers import LAYERWISE_OPTIMIZERS
from .params import OPTIMIZER_TYPES, LookSAMConfig

_BASES_REFUSED = {
    "lbfgs": "it evaluates the loss itself",
    "sparseadam": "it takes sparse gradients",
}


def deepspeed_name(optimizer: str) -> str:
    """The spelling DeepSpeed's engine compares with: its own optimizers in lower case, torch.optim's as they are.

    "Lamb" and "Lars" are ours: DeepSpeed's FusedLamb would take one trust ratio for a whole flat shard.
    """
    ours = next((name for name in LAYERWISE_OPTIMIZERS if optimizer.lower() in (name.lower(), name[4:].lower())), None)
    if ours is not None:
        return ours
    return optimizer.lower() if optimizer.lower() in DEEPSPEED_OPTIMIZERS else optimizer


def refuse_unsupported(config: Any, settings: LookSAMConfig, client_optimizer: Any) -> None:
    """Check a parsed DeepSpeedConfig before an engine is built from it.

    Raises:
        LookSAMConfigError: listing everything that LookSAM does not support in it.
    """
    problems = list(_problems(config, settings, client_optimizer))
    if problems:
        raise LookSAMConfigError("LookSAM cannot train with this configuration:\n  - " + "\n  - ".join(problems))


def refuse_layerwise_optimizer(config: Any, client_optimizer: Any) -> None:
    """Check a parsed DeepSpeedConfig of a run with LAMB or LARS alone.

    Raises:
        LookSAMConfigError: listing everything in it that they do not support.
    """
    problems = list(_layerwise_problems(config))
    if client_optimizer is not None:
        problems.append("deepspeed.initialize(optimizer=...) would override the JSON's optimizer block: leave it out")
    if problems:
        raise LookSAMConfigError(f"{config.optimizer_name} cannot train with this configuration:\n  - " +
                                 "\n  - ".join(problems))


def _layerwise_problems(config: Any) -> Iterator[str]:
    """What LAMB and LARS do not support, alone and under LookSAM: moments must be there for all shards at once."""
    if config.bfloat16_config.bf16_master_weights_and_grads:
        yield "bf16.bf16_master_weights_and_grads: not supported with LAMB and LARS; leave it off"
    offload = config.zero_config.offload_optimizer
    if offload is not None and offload.device == "nvme":
        yield "zero_optimization.offload_optimizer.device: \"nvme\" is not supported with LAMB and LARS; use \"cpu\""
    if offload is not None and offload.ratio < 1.0:
        yield "zero_optimization.offload_optimizer.ratio: below 1 is not supported with LAMB and LARS; leave it out"
    if config.zero_config.zenflow is not None:
        yield "zero_optimization.zenflow: not supported with LAMB and LARS; leave it out"
    if config.torch_autocast_enabled and config.torch_autocast_dtype == torch.float16:
        yield "torch_autocast.dtype: \"float16\" is not supported with LAMB and LARS; use \"bfloat16\""


def _muon_problems(config: Any) -> Iterator[str]:
    """Muon has to orthogonalise u, so DeepSpeed must come to it after LookSAM's turn, inside the optimizer's step."""
    zero, stage = config.zero_config, int(config.zero_config.stage)
    offload = zero.offload_optimizer.device if zero.offload_optimizer is not None else "none"
    muon = "optimizer.params.base_optimizer: \"Muon\" is not supported with"
    if stage in (1, 2) and offload == "none":
        yield (f"{muon} zero_optimization.stage {stage} (DeepSpeed orthogonalises the gradient while it is being "
               "partitioned, before LookSAM sees it); use stage 3 with \"reduce_scatter\": false, or "
               "zero_optimization.offload_optimizer.device \"cpu\"")
    if offload == "nvme":
        yield f"{muon} zero_optimization.offload_optimizer.device \"nvme\"; use \"cpu\""
    if stage == 3 and zero.reduce_scatter:
        yield f"{muon} zero_optimization.reduce_scatter true at stage 3, by DeepSpeed; use false"
    if stage == 0 and (config.float16_config.enabled or config.bfloat16_config.enabled):
        yield f"{muon} zero_optimization.stage 0 in bf16 and fp16; use stage 3 with \"reduce_scatter\": false"


def _problems(config: Any, settings: LookSAMConfig, client_optimizer: Any) -> Iterator[str]:
    name = deepspeed_name(settings.base_optimizer)
    base = name.lower()
    if settings.base_optimizer in OPTIMIZER_TYPES:
        yield f"optimizer.params.base_optimizer: {settings.base_optimizer!r} cannot be its own base; use \"AdamW\""
    elif name in LAYERWISE_OPTIMIZERS:
        yield from _layerwise_problems(config)
    elif name not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, name):
        yield (f"optimizer.params.base_optimizer: {settings.base_optimizer!r} is known neither to DeepSpeed "
               f"({', '.join(DEEPSPEED_OPTIMIZERS)}) nor to torch.optim, and is neither \"Lamb\" nor \"Lars\"")
    if base in _BASES_REFUSED:
        yield (f"optimizer.params.base_optimizer: {settings.base_optimizer!r} is not supported "
               f"({_BASES_REFUSED[base]}); use \"AdamW\", \"SGD\" or another element-wise optimizer")
    if base == "muon":
        yield from _muon_problems(config)
    if client_optimizer is not None:
        yield ("deepspeed.initialize(optimizer=...) would override the JSON's optimizer block: leave it out, and name "
               "the base in optimizer.params.base_optimizer")
    zero, stage = config.zero_config, int(config.zero_config.stage)
    if config.float16_config.fp16_master_weights_and_grads:
        yield ("fp16.fp16_master_weights_and_grads: not supported (the reuse step's update, loss scale included, may "
               "lie beyond fp16's range); leave it off, or use bf16.bf16_master_weights_and_grads")
    if config.grad_accum_dtype is not None:
        low = torch.float16 if config.float16_config.enabled else torch.bfloat16
        model = low if config.float16_config.enabled or config.bfloat16_config.enabled else torch.float32
        if DtypeEnum(config.grad_accum_dtype).value not in (torch.float32, model):
            yield (f"data_types.grad_accum_dtype: {config.grad_accum_dtype!r} is not supported with a model in "
                   f"{model}; use \"fp32\", or leave it out to accumulate in the model's dtype")
    if config.optimizer_legacy_fusion:
        yield "optimizer.legacy_fusion: not supported; leave it out"
    if config.torch_autocast_enabled and config.torch_autocast_dtype != torch.bfloat16:
        yield ("torch_autocast.dtype: only \"bfloat16\" is supported (fp16 scales the loss with a GradScaler that "
               "skips updates unseen); use it, or \"fp16\": {\"enabled\": true}")
    if zero.offload_param is not None and zero.offload_param.device == "nvme":
        yield "zero_optimization.offload_param.device \"nvme\": not supported; use \"cpu\""
    if zero.offload_optimizer is not None and zero.offload_optimizer.device != "none" and stage == 3:
        if zero.offload_optimizer.ratio != 1.0:
            yield ("zero_optimization.offload_optimizer.ratio: not supported (a second optimizer updates the part that "
                   "stays on the accelerator, out of the LR scheduler's sight); leave it at 1.0")
    if zero.offload_optimizer is not None and (zero.offload_optimizer.pipeline_read or
                                               zero.offload_optimizer.pipeline_write):
        yield ("zero_optimization.offload_optimizer.pipeline_read, pipeline_write: not supported (results were not "
               "always those without); leave them off")
    if zero.offload_optimizer is not None and zero.offload_optimizer.super_offload:
        yield "zero_optimization.offload_optimizer.super_offload: not supported; leave it off (ordinary offload)"
    if zero.zenflow is not None:
        yield "zero_optimization.zenflow: not supported; leave it out"
    if _is_anything_enabled(config.data_efficiency_config):
        yield ("data_efficiency: not supported (curriculum sampling, dynamic batching and random-LTD have not been "
               "tested with a second evaluation); leave it out, or set \"enabled\" to false in all its blocks")
    writer = config.checkpoint_config["writer"]
    if writer is not None and stage != 3:
        yield ("checkpoint.writer: supported with zero_optimization.stage 3 only (on the other stages DeepSpeed 0.19.8 "
               "lets several ranks write the same file, and cannot hand a decoupled writer its state); leave it out")
    if writer is not None and writer["type"] != "PYTHON":
        yield (f"checkpoint.writer.type: {writer['type']!r} is not supported (\"fast\", the default, takes an "
               "accelerator and has not been tested, \"mock\" writes nothing); use \"python\"")
    if config.datastates_config.enabled:
        yield "datastates_ckpt: not supported (not tested); leave it out, or see checkpoint.writer"
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if getattr(zero, key):
            yield f"zero_optimization.{key}: not supported (ZeRO++ quantization); leave it out"
    if config.compile_config.deepcompile:
        yield "compile.deepcompile: not supported; use engine.compile() without it"
    if config.tensor_parallel_config.autotp_size > 1:
        yield "tensor_parallel.autotp_size: not supported; use data parallelism (ZeRO)"


def _is_anything_enabled(block: Any) -> bool:
    """Whether "enabled" is true anywhere in a block of the JSON: DeepSpeed looks at some inner blocks only."""
    return isinstance(block, dict) and (bool(block.get("enabled")) or any(map(_is_anything_enabled, block.values())))


def refuse_model(engine: Any) -> None:
    """Check what only shows once the engine knows its model and process groups.

    Raises:
        LookSAMConfigError: the model is parallel in another way than by data, or its gradients are sparse.
    """
    # DeepSpeed's own MoE layers, and parameters that say themselves that they are not the same on every rank.
    if engine.has_moe_layers or any(getattr(p, "allreduce", True) is False for p in engine.module.parameters()):
        raise LookSAMConfigError("LookSAM does not support MoE layers, nor other parameters with allreduce = False "
                                 "(norms over expert groups are not implemented); use dense layers")
    if engine.sequence_parallel_size > 1 and engine.mpu is None:
        raise LookSAMConfigError(
            "sequence_parallel_size: not supported in the JSON (gradients and optimizer state are then averaged and "
            "partitioned over the data parallel ranks alone); leave it out, and use deepspeed.initialize(mpu=...) with "
            "what UlyssesSPAttentionHF.register_with_transformers returns")
    if any(getattr(module, "sparse", False) is True for module in engine.module.modules()):
        raise LookSAMConfigError("LookSAM does not support sparse gradients; build embeddings with sparse=False")
    if engine.mp_world_size > 1:
        raise LookSAMConfigError("LookSAM does not support model parallelism (mpu); use data parallelism (ZeRO)")

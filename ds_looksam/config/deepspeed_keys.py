"""The keys of a JSON that DeepSpeed 0.19.8 reads. It ignores any other in silence, at the top level and in some blocks.

``{"zero_optimisation": {"stage": 2}}`` would train on stage 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.compile.config import CompileConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import (
    DeepSpeedZeroConfig,
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from .params import did_you_mean, keys_of_params

SIMILAR = {"": 0.85, "optimizer": 0.6, "scheduler": 0.6}
"""difflib's ratio from which on an unknown key of a block is a misspelling, and not somebody's own key."""

KEYS = {
    "": set("""
        activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
        compile csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt
        disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
        gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
        managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
        seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard timers
        torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
        vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer zero_optimization""".split()),
    "optimizer": {"type", "params", "legacy_fusion"},
    "scheduler": {"type", "params"},
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
    "checkpoint": {"tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "writer",
                   "checkpoint_serialization"},
}
"""By block; "" is the top level. DeepSpeed ignores other keys there."""

MODELS: dict[str, type[DeepSpeedConfigModel]] = {
    "bf16": DeepSpeedBF16Config,
    "compile": CompileConfig,
    "fp16": DeepSpeedFP16Config,
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
}
"""Blocks in which DeepSpeed refuses other keys."""


def misspelt(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that DeepSpeed does not read, or refuses: (the key with its blocks, what is wrong). Of the unknown keys that
    DeepSpeed ignores all in the block optimizer are told, elsewhere those that look like one that it knows."""
    for block, keys in KEYS.items():
        for key in (key for key in within(values, block) if key not in keys):
            name = f"{block}.{key}".removeprefix(".")
            if block == "optimizer" and key in keys_of_params():
                yield name, f"{name}: DeepSpeed would ignore it there; it belongs in optimizer.params"
                continue
            hint = did_you_mean(key, keys, SIMILAR.get(block, SIMILAR[""]))
            if block == "optimizer" and not key.startswith("_"):  # that may be a comment
                hint = hint or f" It knows {', '.join(sorted(keys))}"
            if hint:
                yield name, f"{name}: DeepSpeed knows no such key and would ignore it.{hint}"
    for block, model in MODELS.items():
        known = {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}
        for key in within(values, block):
            if key not in known:
                yield f"{block}.{key}", f"{block}.{key}: DeepSpeed knows no such key.{did_you_mean(key, known)}"


def ignored(values: dict[str, Any]) -> list[str]:
    """Top-level keys that DeepSpeed does not read."""
    return sorted(values.keys() - KEYS[""])


def within(values: dict[str, Any], block: str) -> dict[str, Any]:
    """An inner object, ``block`` or ``block.of.blocks``; an empty one where there is none, or something else."""
    for key in block.split(".") if block else []:
        inner = values.get(key)
        values = inner if isinstance(inner, dict) else {}
    return values

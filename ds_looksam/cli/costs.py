"""What LookSAM adds to a run, from the configuration alone: evaluations, bytes sent, memory. Formulas in check.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.config import DtypeEnum

from ..config.params import LookSAMConfig

FP32 = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def precision_of(config: Any) -> str:
    """Of the model's weights: "fp32", "bf16" or "fp16"."""
    return "bf16" if config.bfloat16_config.enabled else "fp16" if config.float16_config.enabled else "fp32"


def rows(config: Any, settings: LookSAMConfig, world_size: int, parameters: int | None) -> Iterator[tuple[str, str]]:
    """Lines of the table: (what, how much). Without ``parameters`` in bytes per parameter."""
    scale, per = (parameters, "") if parameters is not None else (1, " a parameter")
    yield "evaluations an update", f"{1 + 1 / settings.k:.4g} (a SAM step, of two, at one update in {settings.k})"
    sent = bytes_sent(config, world_size)
    yield "extra sent, SAM step", _amount(sent * scale, per)
    yield "extra sent, on average", _amount(sent / settings.k * scale, per)
    for what, where, amount in memory(config, settings, world_size):
        yield f"extra memory, {what}", f"{_amount(amount * scale, per)} a rank, {where}"


def bytes_sent(config: Any, world_size: int) -> float:
    """By one rank in a SAM step beside what the same step of the base sends, in bytes per parameter of the model."""
    stage, micro_batches = int(config.zero_config.stage), config.gradient_accumulation_steps
    weight = BYTES[precision_of(config)]
    gradient = weight
    if config.communication_data_type is not None:
        gradient = config.communication_data_type.itemsize
    elif _accumulates_whole_fp32(config):
        gradient = FP32
    all_reduce = 2 if config.zero_config.use_multi_rank_bucket_allreduce or stage < 2 else 1
    payload = {
        0: all_reduce * gradient,
        1: all_reduce * gradient + weight,
        2: all_reduce * gradient * micro_batches + weight,
        3: (gradient + 2 * weight) * micro_batches,
    }[stage]
    return payload * (world_size - 1) / world_size


def memory(config: Any, settings: LookSAMConfig, world_size: int) -> Iterator[tuple[str, str, float]]:
    """(what, on which tier, bytes per parameter of the model on one rank)."""
    stage, offload = int(config.zero_config.stage), config.zero_config.offload_optimizer
    shard = 1.0 if stage == 0 else 1 / world_size
    on_host = stage > 0 and offload is not None and offload.device not in (None, "none")
    where = "in host memory (offload_optimizer)" if on_host else "on the accelerator"
    yield f"always: g_v in {settings.v_dtype}", where, BYTES[settings.v_dtype] * shard
    yield "during a SAM step: g in fp32", where, FP32 * shard
    if stage == 0:
        yield "during a SAM step: clean weights, and w + eps", where, 2 * FP32 * shard
    elif stage == 3 and precision_of(config) == "fp32" and not on_host:
        yield "during a SAM step: clean weights", where, FP32 * shard  # model and master are one tensor


def _accumulates_whole_fp32(config: Any) -> bool:
    """BF16_Optimizer reduces gradients in the dtype in which it accumulates them."""
    return (config.bfloat16_config.enabled and int(config.zero_config.stage) == 1
            and config.grad_accum_dtype is not None and DtypeEnum(config.grad_accum_dtype).value == torch.float32)


def _amount(count: float, per: str) -> str:
    for unit, size in UNITS:
        if count >= size:
            return f"{count / size:.2f} {unit}{per}"
    return f"{count:.3g} bytes{per}"


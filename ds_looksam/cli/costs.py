"""What LookSAM adds to a run, from the configuration alone: evaluations, bytes sent, memory. Formulas in check.py."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..config.params import OWN, PER_MICRO_BATCH, LookSAMConfig
from ..config.rounding import computes_in, precision_of
from ..config.support import Run

if TYPE_CHECKING:
    from .check import Checked

FP32, BF16 = 4, 2
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def rows(checked: Checked, world_size: int, parameters: int | None) -> Iterator[tuple[str, str]]:
    """Lines of the table: (what, how much). Without ``parameters`` in bytes per parameter."""
    config, settings = checked.config, checked.settings
    by_trainer = {key.partition(".")[0] for key in checked.placeholders}
    yield "optimizer", config.optimizer_name if settings is None else f"LookSAM around {settings.base_optimizer}"
    precision = precision_of(config)
    if by_trainer & {"bf16", "fp16"}:
        precision = "as the Trainer or Accelerate says"
    elif computes_in(config) != precision:
        precision += " (weights; torch_autocast computes in bf16)"
    yield "ZeRO stage, precision", f"{int(config.zero_config.stage)}, {precision}"
    micro, accumulation = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    known_batch = not any("batch" in key for key in by_trainer)
    yield "batch of one update", (f"{config.train_batch_size} = {micro} a rank x {accumulation} micro-batches x "
                                  f"{world_size} ranks" if known_batch else "as the Trainer or Accelerate says")
    if "gradient_clipping" not in by_trainer:
        clip = f"{config.gradient_clipping:g}" if config.gradient_clipping else "off"
        yield "gradient clipping", clip + ("" if "gradient_clipping" in checked.given else
                                           " (DeepSpeed's default: the JSON says nothing; 0 is off)")
    if checked.run is None or settings is None:
        return
    default = default_of(checked.run, "weight_decay")
    if "weight_decay" not in checked.run.base_params and default is not None \
            and "optimizer.params.weight_decay" not in checked.placeholders:
        yield "weight decay", f"{default:g} (the default of {settings.base_optimizer}: the JSON says nothing)"
    if known_batch:
        m = {"global": config.train_batch_size, "rank": micro * accumulation, "micro_batch": micro,
             "global_micro_batch": micro * world_size}[settings.ascent]
        yield "examples per perturbation", f'{m} ("ascent": "{settings.ascent}")'
    yield "evaluations per update", f"{1 + 1 / settings.k:.4g} " + (
        "(every update is a SAM step)" if settings.k == 1 else f"(a SAM step, of two, every {settings.k} updates)")
    scale, per = (parameters, "") if parameters is not None else (1, " per parameter")
    if world_size > 1:
        sent = bytes_sent(checked.run, settings.ascent, world_size)
        yield "extra sent, SAM step", _amount(sent * scale, per)
        yield "extra sent, on average", _amount(sent / settings.k * scale, per)
    else:
        yield "extra sent", "nothing by one rank; give --world-size for more"
    for what, where, amount in memory(checked.run, settings, world_size):
        yield f"extra memory, {what}", f"{_amount(amount * scale, per)} a rank, {where}"


def default_of(run: Run, key: str) -> float | None:
    """What the base optimizer takes for a number that the JSON does not give; None if that cannot be known."""
    arguments = inspect.signature(run.base_class).parameters if run.base_class is not None else {}
    return arguments[key].default if key in arguments and isinstance(arguments[key].default, int | float) else None


def bytes_sent(run: Run, ascent: str, world_size: int) -> float:
    """By one rank in a SAM step beside what the same step of the base sends, in bytes per parameter of the model."""
    stage, micro_batches, weight = run.stage, run.config.gradient_accumulation_steps, run.dtype.itemsize
    sent_as = run.config.communication_data_type
    # BF16_Optimizer reduces gradients in the dtype in which it accumulates them.
    gradient = sent_as.itemsize if sent_as is not None else FP32 if run.has_bf16_optimizer else weight
    all_reduce = 2 if run.zero.use_multi_rank_bucket_allreduce or stage < 2 else 1
    if stage == 3:
        payload = (gradient + 2 * weight) * micro_batches
    else:
        # Stages 0 and 1 reduce once a window; in the micro-batch modes both gradients of every micro-batch.
        reductions = micro_batches if stage == 2 else 2 * micro_batches - 1 if ascent in PER_MICRO_BATCH else 1
        # w + eps; for each micro-batch w again too.
        publications = {"global": 1, "global_micro_batch": 2 * micro_batches}.get(ascent, 0) if stage > 0 else 0
        payload = all_reduce * gradient * reductions + weight * publications
    return payload * (world_size - 1) / world_size


def memory(run: Run, settings: LookSAMConfig, world_size: int) -> Iterator[tuple[str, str, float]]:
    """(what, on which tier, bytes per parameter of the model on one rank)."""
    stage, on_host = run.stage, run.stage > 0 and run.offloaded
    shard = 1.0 if stage == 0 else 1 / world_size
    here = "on the accelerator"
    where = "in host memory (offload_optimizer)" if on_host else here
    yield f"always: g_v in {settings.v_dtype}", where, (BF16 if settings.v_dtype == "bf16" else FP32) * shard
    yield "during a SAM step: g in fp32", where, FP32 * shard
    if stage == 0:
        yield "during a SAM step: clean weights", where, run.dtype.itemsize
    own = FP32 if stage == 0 else run.dtype.itemsize
    if settings.ascent in OWN:
        yield "in a SAM step's window: the rank's own gradient", here, own
    if settings.ascent == "micro_batch" and stage > 0:
        yield "during a SAM step: clean weights of the whole model", here, own
    if settings.ascent in PER_MICRO_BATCH and run.config.gradient_accumulation_steps > 1:
        yield "in a SAM step's window: the sums of g and g_s", where, 2 * FP32 * shard


def _amount(count: float, per: str) -> str:
    unit, size = next(((unit, size) for unit, size in UNITS if count >= size), ("bytes", 1))
    return (f"{count:.3g}" if size == 1 else f"{count / size:.2f}") + f" {unit}{per}"


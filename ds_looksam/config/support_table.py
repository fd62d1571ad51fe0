"""What LookSAM supports, as data: rendered into the docs and by ``python -m ds_looksam report``, checked by the tests.

A row is supported only with tests that compare it with the oracle. What is refused is in support.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from .support import REFUSED

ALL = (0, 1, 2, 3)
ZERO = (1, 2, 3)
FULL, BF16, EVERY = ("fp32", ), ("fp32", "bf16"), ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Supported:
    """A feature that training with LookSAM is right with.

    Attributes:
        feature: the JSON key or call, and what it is.
        stages: ZeRO stages it was compared with the oracle on; on the others DeepSpeed does not have it, or see
            Refused.
        precisions: likewise.
        offload: whether also with ``offload_optimizer`` to the CPU.
        tests: ``file::function`` of the tests that show it.
    """

    feature: str
    stages: tuple[int, ...]
    precisions: tuple[str, ...]
    offload: bool
    tests: tuple[str, ...]


SUPPORTED = (
    Supported("fp32", ALL, FULL, True, ("test_oracle_grid.py::test_matches_oracle",)),
    Supported("`bf16`, `fp16`", ALL, ("bf16", "fp16"), True,
              ("test_options.py::test_wrappers", )),
    Supported("`data_types.grad_accum_dtype` fp32", ZERO, ("bf16", "fp16"), False,
              ("test_options.py::test_wrappers", )),
    Supported("`fp16` with a dynamic loss scale, overflow in either evaluation", ALL, ("fp16", ), False,
              ("test_overflow.py::test_skipped", "test_overflow.py::test_loss_scale_may_change_between_sam_and_reuse")),
    Supported("`bf16_master_weights_and_grads`, `bf16_optimizer_states`", ZERO, ("bf16", ), True,
              ("test_options.py::test_bf16_masters", "test_options.py::test_bf16_masters_on_ranks")),
    Supported("`overlap_comm`, `contiguous_gradients` off, `round_robin_gradients`, `reduce_scatter` off, "
              "`use_multi_rank_bucket_allreduce` off, `parameter_alignment`, bucket sizes", (1, 2), FULL, False,
              ("test_options.py::test_options", )),
    Supported("`gradient_predivide_factor`, `prescale_gradients`", ALL, FULL, False,
              ("test_options.py::test_options", )),
    Supported("`communication_data_type`", ZERO, EVERY, False,
              ("test_options.py::test_options", )),
    Supported("g_v kept in bf16: `v_dtype`", ALL, FULL, False,
              ("test_options.py::test_options", "test_shards.py::test_bytes_of_v")),
    Supported("LookSAM's arithmetic compiled: `compile`", ALL, BF16, True, ("test_compiled.py::test_against_oracle", )),
    Supported("`torch_autocast`, dtype bfloat16", ALL, FULL, True,
              ("test_torch_features.py::test_autocast", "test_torch_features.py::test_autocast_tightly")),
    Supported("`offload_optimizer` to `cpu`, DeepSpeed's CPU optimizers or torch's", ZERO, BF16, True,
              ("test_options.py::test_wrappers", )),
    Supported("`offload_optimizer` to `nvme`", (3, ), BF16, True,
              ("test_shards.py::test_optimizer_state_on_nvme", )),
    Supported("`offload_param` to `cpu`", (3, ), BF16, True, ("test_options.py::test_wrappers", )),
    Supported("models built under `deepspeed.zero.Init`", (3, ), FULL, False,
              ("test_options.py::test_options", )),
    Supported("`stage3_param_persistence_threshold`, `sub_group_size`, `reduce_scatter` off, "
              "`contiguous_gradients` off, bucket sizes", (3, ), FULL, False,
              ("test_options.py::test_options", )),
    Supported("hpZ: `zero_hpz_partition_size`", (3, ), FULL, False, ("test_shards.py::test_hpz", )),
    Supported("activation checkpointing: torch's (reentrant or not), DeepSpeed's", ALL, FULL, False,
              ("test_torch_features.py::test_activation_checkpointing", )),
    Supported("`engine.compile()`", ALL, FULL, False, ("test_torch_features.py::test_compiled", )),
    Supported("gradient accumulation, managed or `managed_gradient_accumulation` false", ALL, EVERY, True,
              ("test_accumulation.py::test_ways_to_accumulate",
               "test_options.py::test_wrappers")),
    Supported("`set_gradient_accumulation_boundary`", ALL, FULL, False,
              ("test_accumulation.py::test_ways_to_accumulate", )),
    Supported("`loss.backward()` instead of `engine.backward(loss)`", ZERO, FULL, False,
              ("test_accumulation.py::test_ways_to_accumulate", )),
    Supported("`engine.no_sync()`", (0, 1), FULL, False, ("test_accumulation.py::test_ways_to_accumulate", )),
    Supported("`engine.coalesce_grad_reduction()`", ZERO, FULL, True,
              ("test_accumulation.py::test_ways_to_accumulate", )),
    Supported("`deepspeed.initialize(training_data=)`, `engine.deepspeed_io`, `RepeatingLoader`", ALL, FULL, False,
              ("test_data_loaders.py::test_training_data", )),
    Supported("Ulysses: `deepspeed.sequence.layer.DistributedAttention`, with "
              "`deepspeed.runtime.sequence_parallel.parallel_state_sp` as `mpu`", ALL, FULL, True,
              ("test_ulysses.py::test_ulysses", "test_ulysses.py::test_resume_is_bit_exact")),
    Supported("`checkpoint.writer` of type \"python\", also `decoupled`", (3, ), FULL, False,
              ("test_faults.py::test_deepspeeds_own_writers", )),
    Supported("Ulysses: `UlyssesSPAttentionHF.register_with_transformers`", ZERO, FULL, False,
              ("test_ulysses.py::test_ulysses", )),
    Supported("`gradient_clipping`", ALL, EVERY, True,
              ("test_oracle_grid.py::test_matches_oracle", "test_options.py::test_wrappers")),
    Supported("`scheduler`, every one of DeepSpeed's, and torch's through `lr_scheduler=`", ALL, FULL, False,
              ("test_schedules.py::test_schedulers", )),
    Supported("base AdamW, Adam (`adam_w_mode` false: L2), `torch_adam`, SGD (momentum, Nesterov), Adagrad", ALL, FULL,
              True, ("test_options.py::test_options", )),
    Supported("base Lion", ZERO, FULL, True, ("test_options.py::test_options", )),
    Supported("base Muon", (0, ), FULL, False, ("test_options.py::test_options", )),
    Supported("base Muon, with `offload_optimizer` to `cpu`", (1, 2), EVERY, True,
              ("test_options.py::test_options", )),
    Supported("base Muon, with `reduce_scatter` off", (3, ), EVERY, True,
              ("test_options.py::test_options", )),
    Supported("base LAMB and LARS, Look-LayerSAM", ALL, BF16, True,
              ("test_options.py::test_wrappers", "test_optimizers.py::test_alone_matches_oracle")),
)

def render() -> str:
    """The table as Markdown, and the list of what is refused."""
    lines = ["| supported | stage | precision | with offload | compared with the oracle in `tests/` |",
             "|---|---|---|---|---|"]
    for row in SUPPORTED:
        files = ", ".join(dict.fromkeys(f"`{test.partition('::')[0]}`" for test in row.tests))
        lines.append(f"| {row.feature} | {', '.join(map(str, row.stages))} | {', '.join(row.precisions)} "
                     f"| {'yes' if row.offload else ''} | {files} |")
    lines += ["", "| refused at initialize | use instead |", "|---|---|"]
    lines += [f"| {row.feature} | {row.instead} |" for row in REFUSED]
    return "\n".join(lines)

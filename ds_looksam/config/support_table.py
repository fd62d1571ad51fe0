"""What LookSAM supports, as data: rendered into docs/support.md and by ``python -m ds_looksam report``, checked by the
tests.

A row is supported only with tests that compare it with the oracle, and refused only if a test sees the refusal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Refused:
    """A feature that raises LookSAMConfigError at initialize.

    Attributes:
        feature: the JSON key or call, and what it is.
        instead: the way out.
        config: JSON that shows it, merged into a working configuration; None where it takes a model or a call.
    """

    feature: str
    instead: str
    config: dict[str, Any] | None = None


SUPPORTED = (
    Supported("fp32", ALL, FULL, True, ("test_oracle_grid.py::test_matches_oracle",)),
    Supported("`bf16`, `fp16`", ALL, ("bf16", "fp16"), True,
              ("test_low_precision.py::test_one_rank_tight", "test_low_precision.py::test_low_precision_accumulation",
               "test_offload.py::test_offload_to_cpu")),
    Supported("`data_types.grad_accum_dtype` fp32", ZERO, ("bf16", "fp16"), False,
              ("test_low_precision.py::test_fp32_accumulation_tight", )),
    Supported("`fp16` with a dynamic loss scale, overflow in either evaluation", ALL, ("fp16", ), False,
              ("test_overflow.py::test_fp16", "test_overflow.py::test_fp16_stage_0",
               "test_overflow.py::test_loss_scale_may_change_between_sam_and_reuse")),
    Supported("`bf16_master_weights_and_grads`, `bf16_optimizer_states`", ZERO, ("bf16", ), True,
              ("test_bf16_masters.py::test_one_rank_tight", "test_bf16_masters.py::test_ranks")),
    Supported("`overlap_comm`, `contiguous_gradients` off, `round_robin_gradients`, `reduce_scatter` off, "
              "`use_multi_rank_bucket_allreduce` off, `parameter_alignment`, bucket sizes", (1, 2), FULL, False,
              ("test_reduction_options.py::test_fp32", "test_reduction_options.py::test_layout")),
    Supported("`gradient_predivide_factor`, `prescale_gradients`", ALL, FULL, False,
              ("test_reduction_options.py::test_fp32", )),
    Supported("`communication_data_type`", ZERO, EVERY, False,
              ("test_reduction_options.py::test_low_precision_sent_in_fp32",
               "test_reduction_options.py::test_fp32_sent_in_low_precision")),
    Supported("g_v kept in bf16: `v_dtype`", ALL, FULL, False,
              ("test_v_dtype.py::test_against_oracle", "test_v_dtype.py::test_bytes")),
    Supported("LookSAM's arithmetic compiled: `compile`", ALL, BF16, True, ("test_compiled.py::test_against_oracle", )),
    Supported("`torch_autocast`, dtype bfloat16", ALL, FULL, True,
              ("test_torch_features.py::test_autocast", "test_torch_features.py::test_autocast_tightly")),
    Supported("`offload_optimizer` to `cpu`, DeepSpeed's CPU optimizers or torch's", ZERO, BF16, True,
              ("test_offload.py::test_offload_to_cpu", "test_offload.py::test_torch_optimizer_on_the_cpu")),
    Supported("`offload_optimizer` to `nvme`", (3, ), BF16, True,
              ("test_offload.py::test_optimizer_state_on_nvme", )),
    Supported("`offload_param` to `cpu`", (3, ), BF16, True, ("test_offload.py::test_offload_to_cpu", )),
    Supported("models built under `deepspeed.zero.Init`", (3, ), FULL, False,
              ("test_stage3_options.py::test_models_built_under_zero_init", "test_stage3_options.py::test_options")),
    Supported("`stage3_param_persistence_threshold`, `sub_group_size`, `reduce_scatter` off, "
              "`contiguous_gradients` off, bucket sizes", (3, ), FULL, False,
              ("test_stage3_options.py::test_options", )),
    Supported("hpZ: `zero_hpz_partition_size`", (3, ), FULL, False, ("test_stage3_options.py::test_hpz", )),
    Supported("activation checkpointing: torch's (reentrant or not), DeepSpeed's", ALL, FULL, False,
              ("test_torch_features.py::test_activation_checkpointing", )),
    Supported("`engine.compile()`", ALL, FULL, False, ("test_torch_features.py::test_compiled", )),
    Supported("gradient accumulation, managed or `managed_gradient_accumulation` false", ALL, EVERY, True,
              ("test_accumulation.py::test_ways_to_accumulate",
               "test_low_precision.py::test_low_precision_accumulation",
               "test_accumulation.py::test_ways_to_accumulate_with_offload")),
    Supported("`set_gradient_accumulation_boundary`", ALL, FULL, False,
              ("test_accumulation.py::test_ways_to_accumulate", )),
    Supported("`loss.backward()` instead of `engine.backward(loss)`", ZERO, FULL, False,
              ("test_accumulation.py::test_ways_to_accumulate", )),
    Supported("`engine.no_sync()`", (0, 1), FULL, False, ("test_accumulation.py::test_ways_to_accumulate", )),
    Supported("`engine.coalesce_grad_reduction()`", ZERO, FULL, True,
              ("test_accumulation.py::test_ways_to_accumulate",
               "test_accumulation.py::test_ways_to_accumulate_with_offload")),
    Supported("`deepspeed.initialize(training_data=)`, `engine.deepspeed_io`, `RepeatingLoader`", ALL, FULL, False,
              ("test_data_loaders.py::test_training_data", )),
    Supported("Ulysses: `deepspeed.sequence.layer.DistributedAttention`, with "
              "`deepspeed.runtime.sequence_parallel.parallel_state_sp` as `mpu`", ALL, FULL, True,
              ("test_ulysses.py::test_ulysses", "test_ulysses.py::test_resume_is_bit_exact")),
    Supported("`checkpoint.writer` of type \"python\", also `decoupled`", (3, ), FULL, False,
              ("test_faults.py::test_deepspeeds_own_writers", )),
    Supported("Ulysses: `UlyssesSPAttentionHF.register_with_transformers`", ZERO, FULL, False,
              ("test_ulysses_hf.py::test_llama", )),
    Supported("`gradient_clipping`", ALL, EVERY, True,
              ("test_oracle_grid.py::test_matches_oracle", "test_offload.py::test_offload_to_cpu")),
    Supported("`scheduler`, every one of DeepSpeed's, and torch's through `lr_scheduler=`", ALL, FULL, False,
              ("test_schedules.py::test_schedulers", )),
    Supported("base AdamW, Adam (`adam_w_mode` false: L2), `torch_adam`, SGD (momentum, Nesterov), Adagrad", ALL, FULL,
              True, ("test_bases.py::test_bases", "test_bases.py::test_bases_on_the_cpu")),
    Supported("base Lion", ZERO, FULL, True, ("test_bases.py::test_lion", )),
    Supported("base Muon", (0, ), FULL, False, ("test_muon.py::test_fp32", )),
    Supported("base Muon, with `offload_optimizer` to `cpu`", (1, 2), EVERY, True,
              ("test_muon.py::test_fp32", "test_muon.py::test_low_precision")),
    Supported("base Muon, with `reduce_scatter` off", (3, ), EVERY, True,
              ("test_muon.py::test_fp32", "test_muon.py::test_low_precision")),
    Supported("base LAMB and LARS, Look-LayerSAM", ALL, BF16, True,
              ("test_layerwise_oracle.py::test_matches_oracle",
               "test_optimizers.py::test_offload_and_bf16_under_look_layer_sam")),
)

REFUSED = (
    Refused("`offload_param` to `nvme`", "offload it to `cpu`",
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}),
    Refused("`offload_optimizer.ratio` below 1", "leave it at 1.0",
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}),
    Refused("`offload_optimizer.pipeline_read`, `pipeline_write` (NVMe)", "leave them off",
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp",
                                                                     "pipeline_read": True}}}),
    Refused("`checkpoint.writer` on stages 0-2", "leave it out, or stage 3",
            {"zero_optimization": {"stage": 2}, "checkpoint": {"writer": {"type": "python", "data_parallel":
                                                                          "replica"}}}),
    Refused("`checkpoint.writer.type` \"fast\" (the default) and \"mock\"", "\"python\"",
            {"zero_optimization": {"stage": 3}, "checkpoint": {"writer": {"decoupled": True}}}),
    Refused("DataStates: `datastates_ckpt`", "leave it out, or `checkpoint.writer`", {"datastates_ckpt": {}}),
    Refused("SuperOffload: `offload_optimizer.super_offload`", "leave it off: ordinary offload",
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}}),
    Refused("ZenFlow: `zero_optimization.zenflow`", "leave it out: ordinary offload",
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"},
                                   "zenflow": {"topk_ratio": 0.1, "update_interval": 4, "full_warm_up_rounds": 0,
                                               "overlap_step": False}}}),
    Refused("ZeRO++ quantization: `zero_quantized_weights`", "leave it off; hpZ is supported",
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}),
    Refused("ZeRO++ quantization: `zero_quantized_gradients`", "leave it off",
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}),
    Refused("DeepCompile: `compile.deepcompile`", "`engine.compile()` without it", {"compile": {"deepcompile": True}}),
    Refused("AutoTP: `tensor_parallel.autotp_size`", "data parallelism (ZeRO)",
            {"tensor_parallel": {"autotp_size": 2}}),
    Refused("`torch_autocast.dtype` float16", "bfloat16, or `fp16`",
            {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
    Refused("`fp16_master_weights_and_grads`", "leave it off, or `bf16_master_weights_and_grads`",
            {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}),
    Refused("`data_types.grad_accum_dtype` that is neither fp32 nor the model's", "fp32, or leave it out",
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp16"}}),
    Refused("`optimizer.legacy_fusion`", "leave it out", {"optimizer": {"legacy_fusion": True}}),
    Refused("`data_efficiency`: curriculum sampling, dynamic batching, random-LTD", "leave it out",
            {"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": True,
                                                                           "curriculum_metrics": {}}}}}),
    Refused("base Muon at stages 1 and 2 without `offload_optimizer`", "stage 3, or offload to `cpu`",
            {"optimizer": {"params": {"base_optimizer": "Muon"}}}),
    Refused("base Muon at stage 3 with `reduce_scatter` (DeepSpeed's own demand)", "`reduce_scatter` false",
            {"optimizer": {"params": {"base_optimizer": "Muon"}}, "zero_optimization": {"stage": 3}}),
    Refused("base Muon with `offload_optimizer.device` nvme", "offload to `cpu`",
            {"optimizer": {"params": {"base_optimizer": "Muon"}},
             "zero_optimization": {"stage": 3, "reduce_scatter": False,
                                   "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}),
    Refused("base Muon at `stage` 0 in bf16 or fp16", "`stage` 3",
            {"optimizer": {"params": {"base_optimizer": "Muon"}}, "zero_optimization": {"stage": 0},
             "bf16": {"enabled": True}}),
    Refused("base LBFGS (evaluates the loss itself) and SparseAdam", "AdamW, SGD or another element-wise one",
            {"optimizer": {"params": {"base_optimizer": "LBFGS"}}}),
    Refused("hybrid engine: `hybrid_engine.enabled`", "leave it off", {"hybrid_engine": {"enabled": True}}),
    Refused("`PipelineModule`", "a plain module with ZeRO"),
    Refused("MoE layers (`deepspeed.moe`)", "dense layers"),
    Refused("parameters with `allreduce = False` (experts outside `deepspeed.moe`)", "dense layers"),
    Refused("Ulysses through `sequence_parallel_size` in the JSON", "`deepspeed.initialize(mpu=)`"),
    Refused("tensor parallelism (`mpu` with a model parallel size above 1)", "data parallelism (ZeRO)"),
    Refused("sparse gradients (`nn.Embedding(sparse=True)`)", "`sparse=False`"),
    Refused("`deepspeed.initialize(optimizer=...)`", "name it in `optimizer.params.base_optimizer`"),
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

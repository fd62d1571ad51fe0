"""What is refused at initialize, each refusal once: initialize, ``ds-looksam check``, the table in the docs and the
tests all read REFUSED.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.runtime.config import DtypeEnum

from ..optimizers import LAYERWISE_OPTIMIZERS
from .base_optimizers import base_class, is_tested_with_zero, torch_optimizers
from .params import OWN, LookSAMConfig
from .rounding import DTYPES, precision_of


@dataclass(frozen=True)
class Run:
    """What refusals are decided by.

    Attributes:
        config: DeepSpeed's view of the JSON, a ``DeepSpeedConfig``.
        settings: LookSAM's keys; None where LAMB or LARS train alone.
        base: the base optimizer, as :func:`deepspeed_name` spells it.
        base_params: its keys of ``optimizer.params``.
        client_optimizer: what ``deepspeed.initialize(optimizer=...)`` was given.
    """

    config: Any
    settings: LookSAMConfig | None
    base: str
    base_params: dict[str, Any] = field(default_factory=dict)
    client_optimizer: Any = None

    @property
    def zero(self) -> Any:
        return self.config.zero_config

    @property
    def stage(self) -> int:
        return int(self.zero.stage)

    @property
    def offload(self) -> str:
        """The device that the optimizer's state is offloaded to, or "none"."""
        return self.zero.offload_optimizer.device if self.zero.offload_optimizer is not None else "none"

    @property
    def offloaded(self) -> bool:
        return self.offload != "none"

    def offload_option(self, *names: str) -> bool:
        return any(getattr(self.zero.offload_optimizer, name, False) for name in names)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        return DTYPES[precision_of(self.config)]

    @property
    def grad_accum_dtype(self) -> torch.dtype | None:
        """None if what the JSON says is no dtype."""
        return self.dtype if self.config.grad_accum_dtype is None else dtype_named(self.config.grad_accum_dtype)

    @property
    def has_bf16_optimizer(self) -> bool:
        """Whether DeepSpeed wraps the base in its BF16_Optimizer."""
        return (self.stage == 1 and self.dtype == torch.bfloat16 and self.grad_accum_dtype == torch.float32
                and self.offload != "cpu")

    @property
    def base_class(self) -> type[torch.optim.Optimizer] | None:
        return base_class(self.base, self.base_params, self.offloaded)

    @property
    def writer(self) -> dict[str, Any]:
        """The block ``checkpoint.writer``, empty if there is none."""
        return self.config.checkpoint_config["writer"] or {}

    @property
    def layerwise_base(self) -> bool:
        return self.base in LAYERWISE_OPTIMIZERS

    @property
    def muon(self) -> bool:
        return self.base == "muon"


@dataclass(frozen=True)
class Refused:
    """One refusal.

    Attributes:
        key: the JSON key or call; "" where there is none.
        what: what about it; a sentence's subject together with ``key``.
        instead: the way out, in the imperative.
        why: the reason, if it is not just that nobody has made it work.
        json: whether a run shows it before anything is built; None if that takes the model.
        model: whether an engine shows it that has its model and its process groups.
        config: JSON that is refused, merged into a working one; None where it takes a model or a call.
        alone: whether LAMB and LARS without LookSAM are refused it too. Where ``model`` says so they always are.
    """

    key: str
    what: str
    instead: str
    why: str = ""
    json: Callable[[Run], bool] | None = None
    model: Callable[[Any], bool] | None = None
    config: dict[str, Any] | None = None
    alone: bool = False

    @property
    def message(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return f"{self.key} {self.what}".strip() + f": not supported{why}; {self.instead}"

    @property
    def feature(self) -> str:
        """For a table in Markdown."""
        return (f"`{self.key}` {self.what}" if self.key else self.what).strip()


def dtype_named(name: Any) -> torch.dtype | None:
    """DeepSpeed's names of dtypes, "bf16" say; None for what is none."""
    try:
        return DtypeEnum(name).value
    except ValueError:
        return None


def _is_anything_enabled(block: Any) -> bool:
    """Whether "enabled" is true anywhere in a block of the JSON: DeepSpeed looks at some inner blocks only."""
    return isinstance(block, dict) and (bool(block.get("enabled")) or any(map(_is_anything_enabled, block.values())))


def _trained_dtypes(engine: Any, stage: int) -> set[torch.dtype]:
    """Those that the model computes in at this stage of ZeRO; none where the blocks fp16 and bf16 choose the dtype."""
    chosen = engine.fp16_enabled() or engine.bfloat16_enabled() or engine.zero_optimization_stage() != stage
    return set() if chosen else {p.dtype for p in engine.module.parameters() if p.requires_grad}


def _zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


def _params(**keys: Any) -> dict[str, Any]:
    return {"optimizer": {"params": keys}}


_CPU, _NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/tmp"}
_BASE, _OFFLOAD = "optimizer.params.base_optimizer", "zero_optimization.offload_optimizer"

REFUSED = (
    Refused("zero_optimization.offload_param.device", '"nvme"', 'use "cpu"',
            json=lambda run: run.zero.offload_param is not None and run.zero.offload_param.device == "nvme",
            config=_zero(3, offload_param=_NVME)),
    Refused(f"{_OFFLOAD}.ratio", "below 1", "leave it at 1.0", why="a second optimizer updates the part that stays on "
            "the accelerator, out of the LR scheduler's sight",
            json=lambda run: run.stage == 3 and run.offloaded and run.zero.offload_optimizer.ratio != 1.0, alone=True,
            config=_zero(3, offload_optimizer={**_CPU, "ratio": 0.5})),
    Refused(f"{_OFFLOAD}.pipeline_read, pipeline_write", "", "leave them off",
            why="results did not always match",
            json=lambda run: run.offload_option("pipeline_read", "pipeline_write"),
            config=_zero(3, offload_optimizer={**_NVME, "pipeline_read": True})),
    Refused(f"{_OFFLOAD}.super_offload", "", "leave it off: ordinary offload",
            json=lambda run: run.offload_option("super_offload"),
            config=_zero(3, offload_optimizer={**_CPU, "super_offload": True})),
    Refused("zero_optimization.zenflow", "", "leave it out: ordinary offload",
            json=lambda run: run.zero.zenflow is not None, alone=True,
            config=_zero(2, offload_optimizer=_CPU, zenflow={"topk_ratio": 0.1, "update_interval": 4,
                                                             "full_warm_up_rounds": 0, "overlap_step": False})),
    Refused("zero_optimization.zero_quantized_weights, zero_quantized_nontrainable_weights", "",
            "leave them off; hpZ is supported", why="ZeRO++ quantization",
            json=lambda run: run.zero.zero_quantized_weights or run.zero.zero_quantized_nontrainable_weights,
            config=_zero(3, zero_quantized_weights=True)),
    Refused("zero_optimization.zero_quantized_gradients", "", "leave it off", why="ZeRO++ quantization",
            json=lambda run: run.zero.zero_quantized_gradients, config=_zero(3, zero_quantized_gradients=True)),
    Refused("checkpoint.writer", "on stages 0 to 2", "leave it out, or use zero_optimization.stage 3",
            why="DeepSpeed 0.19.8 lets several ranks write the same file there, and cannot hand a decoupled writer its "
            "state", json=lambda run: bool(run.writer) and run.stage != 3,
            config={**_zero(2), "checkpoint": {"writer": {"type": "python", "data_parallel": "replica"}}}),
    Refused("checkpoint.writer.type", '"fast" (the default) and "mock"', 'use "python"',
            why='"fast" takes an accelerator and was not tested, "mock" writes nothing',
            json=lambda run: bool(run.writer) and run.writer["type"] != "PYTHON",
            config={**_zero(3), "checkpoint": {"writer": {"decoupled": True}}}),
    Refused("datastates_ckpt", "", "leave it out, or see checkpoint.writer", why="not tested",
            json=lambda run: run.config.datastates_config.enabled, config={"datastates_ckpt": {}}),
    Refused("compile.deepcompile", "", "use engine.compile() without it",
            json=lambda run: run.config.compile_config.deepcompile, config={"compile": {"deepcompile": True}}),
    Refused("tensor_parallel.autotp_size", "above 1", "use data parallelism (ZeRO)",
            json=lambda run: run.config.tensor_parallel_config.autotp_size > 1,
            config={"tensor_parallel": {"autotp_size": 2}}),
    Refused("torch_autocast.dtype", "other than bfloat16", 'use "bfloat16", or "fp16": {"enabled": true}',
            why="in fp16 a GradScaler skips updates unseen",
            json=lambda run: run.config.torch_autocast_enabled and run.config.torch_autocast_dtype != torch.bfloat16,
            alone=True, config={"torch_autocast": {"enabled": True, "dtype": "float16"}}),
    Refused("fp16.fp16_master_weights_and_grads", "", "leave it off, or use bf16.bf16_master_weights_and_grads",
            why="the reuse step's update, loss scale included, may lie beyond fp16's range",
            json=lambda run: run.config.float16_config.fp16_master_weights_and_grads,
            config={**_zero(2, offload_optimizer=_CPU),
                    "fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}),
    Refused("data_types.grad_accum_dtype", "that is neither fp32 nor the model's dtype",
            'use "fp32", or leave it out to accumulate in the model\'s dtype',
            json=lambda run: run.grad_accum_dtype not in (torch.float32, run.dtype),
            config={"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp16"}}),
    Refused("data_types.grad_accum_dtype", "fp32 at stage 0 in bf16 and fp16", "leave it out, or use ZeRO stage 1",
            why="DeepSpeed has no such mode", json=lambda run: run.stage == 0 and run.grad_accum_dtype != run.dtype,
            config={**_zero(0), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    Refused("optimizer.legacy_fusion", "", "leave it out", json=lambda run: bool(run.config.optimizer_legacy_fusion),
            config={"optimizer": {"legacy_fusion": True}}),
    Refused("data_efficiency", "", 'leave it out, or set "enabled" to false in all its blocks',
            why="curriculum sampling, dynamic batching and random-LTD were not tested with a second evaluation",
            json=lambda run: _is_anything_enabled(run.config.data_efficiency_config),
            config={"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": True,
                                                                                  "curriculum_metrics": {}}}}}),
    Refused("hybrid_engine.enabled", "", "leave it off", json=lambda run: run.config.hybrid_engine.enabled,
            config={"hybrid_engine": {"enabled": True}}, alone=True),

    Refused(_BASE, "LBFGS", 'use "AdamW", "SGD" or another element-wise one', why="it evaluates the loss itself",
            json=lambda run: run.base.lower() == "lbfgs", config=_params(base_optimizer="LBFGS")),
    Refused(_BASE, "SparseAdam", 'use "AdamW", "SGD" or another element-wise one', why="it takes sparse gradients",
            json=lambda run: run.base.lower() == "sparseadam", config=_params(base_optimizer="SparseAdam")),
    Refused(_BASE, "MuAdam, MuAdamW, MuSGD", 'use "AdamW" or "SGD"', why="not tested",
            json=lambda run: run.base in ("muadam", "muadamw", "musgd"), config=_params(base_optimizer="MuAdam")),
    Refused(_BASE, "that was not tested with ZeRO, without zero_allow_untested_optimizer",
            'use one that was ("ds-looksam report" lists them), or set "zero_allow_untested_optimizer": true',
            json=lambda run: (run.base in torch_optimizers() and run.stage > 0
                              and not run.config.zero_allow_untested_optimizer
                              and not is_tested_with_zero(run.base, run.base_params, run.offloaded)),
            config={**_zero(1), **_params(base_optimizer="NAdam"), "zero_allow_untested_optimizer": False}),
    Refused(_BASE, "Muon at stages 1 and 2 without offload_optimizer",
            'use stage 3 with "reduce_scatter": false, or zero_optimization.offload_optimizer.device "cpu"',
            why="DeepSpeed orthogonalises the gradient while it is being partitioned, before LookSAM sees it",
            json=lambda run: run.muon and run.stage in (1, 2) and not run.offloaded,
            config={**_zero(2), **_params(base_optimizer="Muon")}),
    Refused(_BASE, "Muon at stage 3 with zero_optimization.reduce_scatter", 'use "reduce_scatter": false',
            why="DeepSpeed's own demand", json=lambda run: run.muon and run.stage == 3 and run.zero.reduce_scatter,
            config={**_zero(3), **_params(base_optimizer="Muon")}),
    Refused(_BASE, "Muon with zero_optimization.offload_optimizer.device nvme", 'use "cpu"',
            json=lambda run: run.muon and run.offload == "nvme",
            config={**_zero(3, reduce_scatter=False, offload_optimizer=_NVME), **_params(base_optimizer="Muon")}),
    Refused("optimizer.params.per_head_muon", "", "leave it out", why="not tested",
            json=lambda run: run.muon and bool(run.base_params.get("per_head_muon")),
            config={**_zero(3, reduce_scatter=False), **_params(base_optimizer="Muon", per_head_muon=True)}),
    Refused(_BASE, "Muon at stage 0 in bf16 and fp16", 'use stage 3 with "reduce_scatter": false',
            json=lambda run: run.muon and run.stage == 0 and run.dtype != torch.float32,
            config={**_zero(0), **_params(base_optimizer="Muon"), "bf16": {"enabled": True}}),

    # LAMB and LARS need every shard's moments, and its gradient, at once.
    Refused("bf16.bf16_master_weights_and_grads", "with LAMB and LARS", "leave it off", alone=True,
            json=lambda run: run.layerwise_base and run.config.bfloat16_config.bf16_master_weights_and_grads,
            config={**_zero(2), **_params(base_optimizer="Lamb"),
                    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}),
    Refused(f"{_OFFLOAD}.device", '"nvme" with LAMB and LARS', 'use "cpu"', alone=True,
            json=lambda run: run.layerwise_base and run.offload == "nvme",
            config={**_zero(3, offload_optimizer=_NVME), **_params(base_optimizer="Lars")}),

    Refused("optimizer.params.ascent", '"rank" and "micro_batch" at stage 3', 'use "global_micro_batch", or stage 2',
            why="each rank holds a part of the weights that all compute with, so all are moved alike",
            json=lambda run: (run.stage == 3 and run.settings is not None
                              and run.settings.ascent in OWN),
            config={**_zero(3), **_params(ascent="rank")}),

    Refused("optimizer.params.ascent", '"rank" and "micro_batch" with Ulysses', 'use "global" or "global_micro_batch"',
            "each rank holds a part of each sequence, not whole examples",
            model=lambda engine: engine.sequence_parallel_size > 1 and getattr(engine, "perturbs_by_rank", False)),
    Refused("deepspeed.initialize(optimizer=...)", "", "leave it out, and name the base in "
            "optimizer.params.base_optimizer", why="it would override the JSON's optimizer block", alone=True,
            json=lambda run: run.client_optimizer is not None),
    Refused("PipelineModule", "", "use a plain module with ZeRO"),  # engines/registration.py sees the class
    Refused("", "MoE layers (`deepspeed.moe`), and other parameters with `allreduce = False`", "use dense layers",
            why="norms over expert groups are not implemented",
            model=lambda engine: (engine.has_moe_layers or any(getattr(p, "allreduce", True) is False
                                                               for p in engine.module.parameters()))),
    Refused("sequence_parallel_size", "in the JSON, or deepspeed.initialize(mesh_param=...)", "leave it out, and use "
            "deepspeed.initialize(mpu=...) with what UlyssesSPAttentionHF.register_with_transformers returns",
            why="gradients and optimizer state are then averaged and partitioned over the data parallel ranks alone",
            model=lambda engine: engine.sequence_parallel_size > 1 and engine.mpu is None),
    Refused("", "tensor parallelism (`mpu` with a model parallel size above 1)", "use data parallelism (ZeRO)",
            model=lambda engine: engine.mp_world_size > 1),
    Refused("", "sparse gradients", "build embeddings with `sparse=False`",
            model=lambda engine: any(isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse
                                     for module in engine.module.modules())),
    Refused("deepspeed.initialize(model_parameters=...)", "with parameters that are not the model's",
            "make them parameters of a module in the model",
            why="DeepSpeed neither averages their gradients nor saves them",
            model=lambda engine: engine.has_parameters_outside_of_model()),
    Refused("", "trained parameters that are complex", "train their real and imaginary parts, torch.view_as_real",
            why="DeepSpeed neither reduces nor partitions them",
            model=lambda engine: any(p.requires_grad and p.is_complex() for p in engine.module.parameters())),
    Refused("", "trained parameters that are not fp32, at stage 0 without `bf16` or `fp16`",
            'set "bf16": {"enabled": true}, call model.float(), or use ZeRO stage 1',
            why="there is no fp32 copy of them then, which LookSAM's arithmetic needs",
            model=lambda engine: any(not dtype.is_complex and dtype != torch.float32
                                     for dtype in _trained_dtypes(engine, stage=0))),
    Refused("", "trained parameters of several dtypes at stage 3 without `bf16` or `fp16`",
            'set "bf16": {"enabled": true}, or call model.float()', why="DeepSpeed partitions one dtype",
            model=lambda engine: len(_trained_dtypes(engine, stage=3)) > 1),
)


DEMANDED = (
    Refused("bf16.bf16_master_weights_and_grads", "without bf16_optimizer_states or DeepSpeed's CPU Adam",
            f'set "bf16_optimizer_states": true, or {_OFFLOAD}.device "cpu" with base "AdamW"',
            json=lambda run: (run.stage > 0 and run.config.bfloat16_config.bf16_master_weights_and_grads
                              and (run.offloaded or not run.config.bfloat16_config.bf16_optimizer_states)
                              and not run.has_bf16_optimizer
                              and getattr(run.base_class, "__name__", "") != "DeepSpeedCPUAdam"),
            config={"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}),
    Refused("gradient_predivide_factor, prescale_gradients", "with zero_optimization.reduce_scatter at stages 2 and 3",
            'set "reduce_scatter": false',
            json=lambda run: (run.zero.reduce_scatter and run.stage >= 2
                              and (run.stage == 3 or run.config.gradient_allreduce_op == "mean")
                              and (run.config.gradient_predivide_factor != 1.0 or run.config.prescale_gradients)),
            config={"gradient_predivide_factor": 2.0}),
    Refused("zero_optimization.compute_grad_norm", "false with gradient_clipping, offload_optimizer or gradients of a "
            "bf16 model in fp32", 'leave it out, or set "gradient_clipping": 0.0 (DeepSpeed\'s default is 1.0)',
            json=lambda run: (run.stage > 0 and not run.zero.compute_grad_norm
                              and (run.offloaded or run.has_bf16_optimizer or run.config.gradient_clipping != 0)),
            config=_zero(1, compute_grad_norm=False)),
    Refused("zero_optimization.legacy_stage1", "", "leave it out", json=lambda run: run.zero.legacy_stage1,
            config=_zero(1, legacy_stage1=True)),
    Refused("zero_optimization", 'with a device "nvme" and no nvme_path', "give the path",
            json=lambda run: any(block is not None and block.device == "nvme" and block.nvme_path is None
                                 for block in (run.zero.offload_optimizer, run.zero.offload_param)) and run.stage == 3,
            config=_zero(3, offload_optimizer={"device": "nvme"})),
    Refused("managed_gradient_accumulation", "false with zero_optimization.overlap_comm at stages 0 and 1",
            "leave overlap_comm off, or use stage 2",
            json=lambda run: (run.stage < 2 and run.zero.overlap_comm and not run.config.managed_gradient_accumulation),
            config={**_zero(1, overlap_comm=True), "managed_gradient_accumulation": False}),
    Refused("data_types.param_dtype", "that contradicts the blocks fp16 and bf16", "leave it out",
            json=lambda run: run.config.param_dtype is not None and dtype_named(run.config.param_dtype) != run.dtype,
            config={"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}}),
    Refused("gradient_clipping", "that is not a number", "give one; 0 switches clipping off",
            json=lambda run: not isinstance(run.config.gradient_clipping, int | float),
            config={"gradient_clipping": "1.0"}),
)
"""What DeepSpeed 0.19.8 demands itself, half an engine later and in other words, or notices in the first step."""

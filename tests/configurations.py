"""Configurations, and whether LookSAM trains with them: for ``ds-looksam check`` and for deepspeed.initialize."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ds_looksam.config.support import DEMANDED, REFUSED

CPU = {"device": "cpu"}


class Configuration(NamedTuple):
    """``accepted`` by both, on one rank; or refused by both, and ``check`` says ``words``, and initialize too where
    they are ``raised``: registration.py has words of its own for DeepSpeed's other engines."""

    name: str
    json: dict[str, Any]
    accepted: bool
    words: tuple[str, ...] = ()
    raised: bool = False


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` put into a copy of ``config``, block by block; a value of None takes the key out."""
    result = dict(config)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        else:
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


WORKS: dict[str, Any] = {"train_batch_size": 8, "zero_optimization": {"stage": 2},
                         "optimizer": {"type": "LookSAM", "params": {"lr": 1e-3}}}


def looksam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"params": params}}


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


def scheduler(name: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


BF16 = {"bf16": {"enabled": True}}
BF16_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
FP16 = {"fp16": {"enabled": True}}

_ACCEPTED: list[dict[str, Any]] = [
    {}, zero(0), zero(1), {"zero_optimization": None},
    {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
    {"comment": "ours", "experiment": {"id": 3}}, looksam(base_optimizer="SGD", momentum=0.9, nesterov=True),
    merged(looksam(base_optimizer="SGD"), {"optimizer": {"params": {"lr": None}}}),
    merged(zero(0), looksam(base_optimizer="NAdam")),
    merged(looksam(base_optimizer="NAdam"), {"zero_allow_untested_optimizer": True}),
    looksam(base_optimizer="Adagrad", initial_accumulator_value=0.1), looksam(base_optimizer="Adam", adam_w_mode=False),
    looksam(base_optimizer="Adam", torch_adam=True, adam_w_mode=False, amsgrad=True),
    looksam(torch_adam=True, foreach=False, maximize=False), looksam(bias_correction=False),
    merged(zero(2, offload_optimizer=CPU), looksam(bias_correction=False, fp32_optimizer_states=True)),
    looksam(base_optimizer="Lamb", max_coeff=5.0), merged(zero(0), looksam(base_optimizer="lars")),
    merged(zero(0), looksam(base_optimizer="Muon", momentum=0.9, muon_lr=0.02)),
    {"optimizer": {"type": "LookLayerSAM", "params": {"layer_scale": "relative", "rho": 0.01}}},
    looksam(alpha="calibrated"), looksam(alpha=0), looksam(rho=0, k=1), looksam(ascent="rank"),
    looksam(rho_schedule={"type": "cosine", "updates": 10, "end": 0.1}), looksam(rho_schedule={"type": "lr"}), BF16,
    {"bf16": {"enabled": False}}, merged(zero(1), FP16),
    {**zero(1), **BF16, "data_types": {"grad_accum_dtype": "fp32"}},
    merged(BF16_MASTERS, {"bf16": {"bf16_optimizer_states": True}}), {**zero(2, offload_optimizer=CPU), **BF16_MASTERS},
    {**zero(1, compute_grad_norm=False), "gradient_clipping": 0.0},
    {"gradient_predivide_factor": 2.0, **zero(2, reduce_scatter=False)},
    {**BF16, "data_types": {"param_dtype": "bf16"}}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    zero(2, offload_optimizer=CPU), zero(0, offload_optimizer=CPU), zero(3, offload_optimizer=CPU, offload_param=CPU),
    zero(2, offload_optimizer={"device": "none"}),
    {**zero(3, reduce_bucket_size="auto", stage3_prefetch_bucket_size="auto"), **looksam(ascent="global_micro_batch")},
    scheduler("WarmupLR", warmup_max_lr=1e-3, warmup_num_steps=5), {**zero(0), **scheduler("StepLR", step_size=3)},
    scheduler("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3), {"gradient_clipping": 0.5},
    {"managed_gradient_accumulation": False}, {"optimizer": {"type": "ZeroLamb", "params": {"max_coeff": 5.0}}},
]

_REFUSED: list[tuple[dict[str, Any], *tuple[str, ...]]] = [
    # LookSAM's keys
    ({**looksam(k=0, rho=-1, foo=1), **zero(2, zero_quantized_gradients=True), "tensor_parallel": {"autotp_size": 2}},
     "params.k: ", "params.rho: ", "params.foo: ", "zero_quantized_gradients", "autotp_size"),
    (looksam(K=5, roh=0.05, base_optimiser="SGD", momentum=0.9), "params.K: ", "Did you mean 'k'?",
     "Did you mean 'rho'?", "Did you mean 'base_optimizer'?"),
    (looksam(alpha="atuo"), "params.alpha: should be a number", '"calibrated"'),
    (looksam(ascent="ranks"), "params.ascent: "),
    (looksam(k="auto", rho="auto", momentum="auto"), "params.k: ", "params.rho: ", "params.momentum: "),
    (looksam(rho_schedule={"type": "linear"}), "updates"),
    (looksam(rho_schedule={"typ": "linear"}), "rho_schedule.typ: ", "Did you mean 'type'?"),
    (looksam(lr=0, rho_schedule={"type": "lr"}), "rho_schedule.lr"),
    ({"optimizer": {"type": "LookLayerSAM", "params": {"layerwise": False}}}, "contradicts"),
    # The base's
    (looksam(base_optimizer="sgd"), "'sgd' is known neither", "Did you mean 'SGD'?"),
    (looksam(base_optimizer={"type": "SGD", "params": {"lr": 0.1}}), "base_optimizer: ", "stand beside it"),
    ({"optimizer": {"k": 2, "rho": 0.1, "lr": 0.1}}, "optimizer.k: ", "optimizer.rho: ", "optimizer.lr: ",
     "optimizer.params"),
    ({"optimizer": {"parmas": {"lr": 0.1}}}, "optimizer.parmas: ", "Did you mean 'params'?"),
    ({"optimizer": {"settings": {}}}, "optimizer.settings: ", "It knows legacy_fusion, params, type"),
    ({"scheduler": {"tpye": "WarmupLR", "params": {}}}, "scheduler.tpye: ", "Did you mean 'type'?"),
    (looksam(betas=["0.9", 0.9]), "params.betas: "),
    (looksam(base_optimizer="lr_scheduler"), "is known neither"),
    (looksam(base_optimizer="LookSAM"), "cannot be its own base"),
    (looksam(momentum=0.9), "params.momentum: neither a key of LookSAM"), (looksam(foreach=True), "params.foreach: "),
    ({**zero(2, offload_optimizer=CPU), **looksam(set_grad_none=True)}, "params.set_grad_none"),
    ({**zero(2, offload_optimizer=CPU), **looksam(adamw_mode=True)}, "Did you mean 'adam_w_mode'?"),
    (merged(zero(0), looksam(base_optimizer="Muon", momentun=0.9)), "Did you mean 'momentum'?"),
    (looksam(amsgrad=True), "params.amsgrad: "), (looksam(base_optimizer="SGD", nesterov=True), "momentum"),
    (looksam(betas=[0.9, 1.0]), "params.betas: "), (looksam(lr="1e-3"), "params.lr: "),
    (looksam(base_optimizer="Lamb", min_coeff=2.0, max_coeff=1.0), "min_coeff"),
    ({"optimizer": {"type": "ZeroLamb", "params": {"momentum": 0.9}}}, "params.momentum: "),
    ({"optimizer": {"type": "ZeroLamb", "params": {"lr": -1.0}}}, "params.lr: "),
    # DeepSpeed's
    ({"optimizer": {"type": "looksam"}}, "Did you mean 'LookSAM'?"),
    ({"zero_optimisation": {"stage": 2}, "gradient_acumulation_steps": 2, "fp_16": {}},
     "'zero_optimization'", "'gradient_accumulation_steps'", "'fp16'"),
    ({"torch_autocast": {"enable": True}, "data_types": {"grad_acum_dtype": "fp32"}},
     "torch_autocast.enable: ", "data_types.grad_acum_dtype: "),
    (merged(zero(2, overlap_com=True, offload_optimizer={"devise": "cpu"}), looksam(k=0)),
     "Did you mean 'overlap_comm'?", "Did you mean 'device'?", "params.k: "),
    ({**zero(5, reduce_bucket_size=-1), **looksam(k=0)}, "stage: ", "bucket_size: ", "params.k"),
    ({"train_micro_batch_size_per_gpu": 3, **looksam(k=0)}, "world size 1; give --world-size", "params.k: "),
    ({"train_batch_size": None}, "train_batch_size"),
    ({**BF16, **FP16, **looksam(rho=-1)}, "cannot be simultaneously enabled", "params.rho: "),
    ({"elasticity": {"enabled": True}}, "Elastic training has been removed"),
    (scheduler("WarmupLRR"), "Did you mean 'WarmupLR'?"), (scheduler("WarmupLR", warmup_steps=5), "warmup_steps"),
    (scheduler("WarmupDecayLR"), "total_num_steps"), (scheduler("WarmupLR", warmup_num_steps=0), "warmup_num_steps"),
    ({"data_types": {"grad_accum_dtype": "fp33"}}, "data_types.grad_accum_dtype"),
    ({**zero(2, offload_optimizer=CPU), **looksam(torch_adam=True), **BF16_MASTERS}, "CPU Adam"),
    (looksam(max_grad_norm=1.0), "Use gradient_clipping"), (scheduler("StepLR", step_size=3), "lr_scheduler=lambda"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params is missing"),
    ({"compile": {"enabled": True}, **looksam(k=0)}, "compile.enabled", "params.k: "),
    ({"communication_data_type": "fp8"}, "communication_data_type"),
]

CONFIGURATIONS = [
    *(Configuration(json.dumps(given), merged(WORKS, given), False, tuple(words), "Did you mean 'LookSAM'?" in words)
      for given, *words in _REFUSED),
    *(Configuration(row.feature, merged(WORKS, row.config), False, (row.message, ), "hybrid" not in row.key)
      for row in (*REFUSED, *DEMANDED) if row.config),
    # Last, so that they also show that a refusal leaves nothing behind.
    *(Configuration(json.dumps(changes), merged(WORKS, changes), True) for changes in _ACCEPTED),
]

_AUTO = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
         "gradient_clipping": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
         "bf16": {"enabled": "auto"},
         "optimizer": {"type": "LookSAM", "params": {"k": 4, "alpha": "calibrated", "lr": "auto", "betas": "auto",
                                                     "eps": "auto", "weight_decay": "auto"}},
         "scheduler": {"type": "WarmupDecayLR", "params": {
             "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
             "total_num_steps": "auto"}}}  # yapf: disable
FILLED: list[tuple[dict[str, Any], dict[str, Any]]] = [(_AUTO, {
    "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0, "zero_optimization.reduce_bucket_size": 1000, "bf16.enabled": True,
    "optimizer.params.lr": 1e-3, "optimizer.params.betas": [0.9, 0.99], "optimizer.params.eps": 1e-3,
    "optimizer.params.weight_decay": 0.0, "scheduler.params.warmup_min_lr": 0.0, "scheduler.params.warmup_max_lr": 1e-3,
    "scheduler.params.warmup_num_steps": 3, "scheduler.params.total_num_steps": 10})]
"""Configurations with placeholders, and what Hugging Face's Trainer would fill in for each."""

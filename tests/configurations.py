"""Configurations, and whether LookSAM trains with them: for ``ds-looksam check`` and for deepspeed.initialize."""

from __future__ import annotations

from typing import Any, NamedTuple

from ds_looksam.config.support import DEMANDED, REFUSED

CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/tmp"}


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
FP16 = {"fp16": {"enabled": True}}

_ACCEPTED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "stage 0": zero(0), "stage 1": zero(1),
    "no block for ZeRO": {"zero_optimization": None},
    "micro-batches": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
    "own top-level key": {"comment": "ours", "experiment": {"id": 3}},
    "SGD on ZeRO": looksam(base_optimizer="SGD", momentum=0.9, nesterov=True),
    "SGD, no lr": merged(looksam(base_optimizer="SGD"), {"optimizer": {"params": {"lr": None}}}),
    "NAdam at stage 0": merged(zero(0), looksam(base_optimizer="NAdam")),
    "NAdam allowed": merged(looksam(base_optimizer="NAdam"), {"zero_allow_untested_optimizer": True}),
    "Adagrad": looksam(base_optimizer="Adagrad", initial_accumulator_value=0.1),
    "Adam with L2": looksam(base_optimizer="Adam", adam_w_mode=False),
    "torch's Adam": looksam(base_optimizer="Adam", torch_adam=True, adam_w_mode=False, amsgrad=True),
    "torch's AdamW, foreach": looksam(torch_adam=True, foreach=False, maximize=False),
    "FusedAdam's own key": looksam(bias_correction=False),
    "CPU Adam's own key": merged(zero(2, offload_optimizer=CPU), looksam(bias_correction=False,
                                                                         fp32_optimizer_states=True)),
    "Lamb": looksam(base_optimizer="Lamb", max_coeff=5.0),
    "Lars at stage 0": merged(zero(0), looksam(base_optimizer="lars")),
    "Muon at stage 0": merged(zero(0), looksam(base_optimizer="Muon", momentum=0.9, muon_lr=0.02)),
    "LookLayerSAM": {"optimizer": {"type": "LookLayerSAM", "params": {"layer_scale": "relative", "rho": 0.01}}},
    "alpha calibrated": looksam(alpha="calibrated"), "alpha 0": looksam(alpha=0), "rho 0, k 1": looksam(rho=0, k=1),
    "ascent on stage 2": looksam(ascent="rank"),
    "rho_schedule": looksam(rho_schedule={"type": "cosine", "updates": 10, "end": 0.1}),
    "rho by lr": looksam(rho_schedule={"type": "lr"}),
    "bf16": BF16, "bf16 off": {"bf16": {"enabled": False}}, "fp16": merged(zero(1), FP16),
    "bf16, gradients in fp32": {**zero(1), **BF16, "data_types": {"grad_accum_dtype": "fp32"}},
    "bf16 masters": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    "bf16 masters, offload": {**zero(2, offload_optimizer=CPU),
                              "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
    "no gradient norm": {**zero(1, compute_grad_norm=False), "gradient_clipping": 0.0},
    "predivided": {"gradient_predivide_factor": 2.0, **zero(2, reduce_scatter=False)},
    "param_dtype": {**BF16, "data_types": {"param_dtype": "bf16"}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "offload": zero(2, offload_optimizer=CPU), "offload at stage 0": zero(0, offload_optimizer=CPU),
    "offload, stage 3": zero(3, offload_optimizer=CPU, offload_param=CPU),
    "offload off": zero(2, offload_optimizer={"device": "none"}),
    "stage 3, ascent, DeepSpeed's own auto": {**zero(3, reduce_bucket_size="auto", stage3_prefetch_bucket_size="auto"),
                                              **looksam(ascent="global_micro_batch")},
    "WarmupLR": scheduler("WarmupLR", warmup_max_lr=1e-3, warmup_num_steps=5),
    "torch's scheduler": {**zero(0), **scheduler("StepLR", step_size=3)},
    "OneCycle": scheduler("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3),
    "clipping": {"gradient_clipping": 0.5},
    "unmanaged": {"managed_gradient_accumulation": False},
    "ZeroLamb alone": {"optimizer": {"type": "ZeroLamb", "params": {"max_coeff": 5.0}}},
}

_REFUSED: dict[str, tuple[dict[str, Any], *tuple[str, ...]]] = {
    # LookSAM's keys
    "several wrong": (merged(looksam(k=0, rho=-1, foo=1), {**zero(2, zero_quantized_gradients=True),
                                                            "tensor_parallel": {"autotp_size": 2}}),
                      "params.k: ", "params.rho: ", "params.foo: ", "zero_quantized_gradients", "autotp_size"),
    "misspelt keys": (looksam(K=5, roh=0.05, base_optimiser="SGD", momentum=0.9), "params.K: ", "Did you mean 'k'?",
                      "Did you mean 'rho'?", "Did you mean 'base_optimizer'?"),
    "alpha misspelt": (looksam(alpha="atuo"), "params.alpha: should be a number", '"calibrated"'),
    "ascent misspelt": (looksam(ascent="ranks"), "params.ascent: "),
    "auto": (looksam(k="auto", rho="auto", momentum="auto"), "params.k: ", "params.rho: ", "params.momentum: "),
    "schedule without updates": (looksam(rho_schedule={"type": "linear"}), "updates"),
    "schedule's key misspelt": (looksam(rho_schedule={"typ": "linear"}), "rho_schedule.typ: ", "Did you mean 'type'?"),
    "nothing to measure lr by": (looksam(lr=0, rho_schedule={"type": "lr"}), "rho_schedule.lr"),
    "LookLayerSAM off": ({"optimizer": {"type": "LookLayerSAM", "params": {"layerwise": False}}}, "contradicts"),
    # The base's
    "base misspelt": (looksam(base_optimizer="sgd"), "'sgd' is known neither", "Did you mean 'SGD'?"),
    "a module of torch.optim": (looksam(base_optimizer="lr_scheduler"), "is known neither"),
    "its own base": (looksam(base_optimizer="LookSAM"), "cannot be its own base"),
    "another base's key": (looksam(momentum=0.9), "params.momentum: neither a key of LookSAM"),
    "torch's key, DeepSpeed's Adam": (looksam(foreach=True), "params.foreach: "),
    "FusedAdam's key, CPU": ({**zero(2, offload_optimizer=CPU), **looksam(set_grad_none=True)}, "params.set_grad_none"),
    "adamw_mode": ({**zero(2, offload_optimizer=CPU), **looksam(adamw_mode=True)}, "Did you mean 'adam_w_mode'?"),
    "Muon's key misspelt": (merged(zero(0), looksam(base_optimizer="Muon", momentun=0.9)), "Did you mean 'momentum'?"),
    "AMSGrad": (looksam(amsgrad=True), "params.amsgrad: "),
    "Nesterov without momentum": (looksam(base_optimizer="SGD", nesterov=True), "momentum"),
    "betas": (looksam(betas=[0.9, 1.0]), "params.betas: "), "lr": (looksam(lr="1e-3"), "params.lr: "),
    "Lamb's coefficients": (looksam(base_optimizer="Lamb", min_coeff=2.0, max_coeff=1.0), "min_coeff"),
    "Lamb alone, key": ({"optimizer": {"type": "ZeroLamb", "params": {"momentum": 0.9}}}, "params.momentum: "),
    "Lamb alone, value": ({"optimizer": {"type": "ZeroLamb", "params": {"lr": -1.0}}}, "params.lr: "),
    # DeepSpeed's
    "type misspelt": ({"optimizer": {"type": "looksam"}}, "Did you mean 'LookSAM'?"),
    "top level misspelt": ({"zero_optimisation": {"stage": 2}, "gradient_acumulation_steps": 2, "fp_16": {}},
                           "'zero_optimization'", "'gradient_accumulation_steps'", "'fp16'"),
    "block misspelt": ({"torch_autocast": {"enable": True}, "data_types": {"grad_acum_dtype": "fp32"}},
                       "torch_autocast.enable: ", "data_types.grad_acum_dtype: "),
    "ZeRO's keys misspelt": (merged(zero(2, overlap_com=True, offload_optimizer={"devise": "cpu"}), looksam(k=0)),
                             "Did you mean 'overlap_comm'?", "Did you mean 'device'?", "params.k: "),
    "ZeRO's values": ({**zero(5, reduce_bucket_size=-1), **looksam(k=0)}, "stage: ", "bucket_size: ", "params.k"),
    "batch": ({"train_micro_batch_size_per_gpu": 3, **looksam(k=0)}, "world size 1; give --world-size", "params.k: "),
    "no batch": ({"train_batch_size": None}, "train_batch_size"),
    "bf16 and fp16": ({**BF16, **FP16, **looksam(rho=-1)}, "cannot be simultaneously enabled", "params.rho: "),
    "a removed block": ({"elasticity": {"enabled": True}}, "Elastic training has been removed"),
    "scheduler misspelt": (scheduler("WarmupLRR"), "Did you mean 'WarmupLR'?"),
    "scheduler's key": (scheduler("WarmupLR", warmup_steps=5), "warmup_steps"),
    "scheduler's missing key": (scheduler("WarmupDecayLR"), "total_num_steps"),
    "scheduler's value": (scheduler("WarmupLR", warmup_num_steps=0), "warmup_num_steps"),
    "no dtype": ({"data_types": {"grad_accum_dtype": "fp33"}}, "data_types.grad_accum_dtype"),
    "bf16 masters of torch's Adam": (merged(zero(2, offload_optimizer=CPU), {
        **looksam(torch_adam=True), "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}), "CPU Adam"),
    "clipping in the wrong block": (looksam(max_grad_norm=1.0), "Use gradient_clipping"),
    "torch's scheduler on ZeRO": (scheduler("StepLR", step_size=3), "lr_scheduler=lambda"),
    "scheduler without params": ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params is missing"),
    "another block's key": ({"compile": {"enabled": True}, **looksam(k=0)}, "compile.enabled", "params.k: "),
    "communication_data_type": ({"communication_data_type": "fp8"}, "communication_data_type"),
}

CONFIGURATIONS = [
    *(Configuration(name, merged(WORKS, changes), False, tuple(words), name == "type misspelt")
      for name, (changes, *words) in _REFUSED.items()),
    *(Configuration(row.feature, merged(WORKS, row.config), False, (row.message, ), "hybrid" not in row.key)
      for row in (*REFUSED, *DEMANDED) if row.config),
    # Last, so that they also show that a refusal leaves nothing behind.
    *(Configuration(name, merged(WORKS, changes), True) for name, changes in _ACCEPTED.items()),
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

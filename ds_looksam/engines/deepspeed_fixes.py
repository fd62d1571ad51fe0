"""Repairs of DeepSpeed 0.19.8. Each says what is wrong there, and which test fails without it. Delete one with the
release that is right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine


def tag_for_muon(config_class: Any, model: torch.nn.Module) -> None:
    """Mark the parameters that Muon trains, if it is the base: deepspeed.initialize saw only "LookSAM" there. Shown by
    test_options.py with Muon."""
    deepspeed.set_optimizer_flags(config_class, model)


def keep_group_keys(given: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """Bring back what DeepSpeed drops of a user's param groups when it makes two of each, for Muon and for its Adam.
    Shown by test_options.py with Muon."""
    for built in optimizer.param_groups:
        if "use_muon" in built:
            first = built["params"][0]
            for group in given:
                if isinstance(group, dict) and any(p is first for p in group["params"]):
                    for key, value in group.items():
                        built.setdefault(key, value)


def keep_adagrad(wrapper: Any, adagrad: torch.optim.Optimizer) -> None:
    """Undo what DeepSpeed's ZeRO wrappers do to ``torch.optim.Adagrad``: they put a new one, made from its defaults, in
    its place, because its state is made at construction, for other parameters. Every param group but one is lost with
    it, and what the groups brought. Shown by test_options.py with Adagrad."""
    if not isinstance(adagrad, torch.optim.Adagrad) or getattr(wrapper, "optimizer", adagrad) is adagrad:
        return
    in_stage_3 = hasattr(wrapper, "fp32_partitioned_groups_flat")
    flats = wrapper.fp32_partitioned_groups_flat if in_stage_3 else wrapper.single_partition_of_fp32_groups
    start = adagrad.defaults["initial_accumulator_value"]
    adagrad.state.clear()
    for flat in flats:
        adagrad.state[flat] = {"step": torch.zeros((), device="cpu"), "sum": torch.full_like(flat.detach(), start)}
    wrapper.optimizer = adagrad
    if not in_stage_3:  # for the groups that were lost, what DeepSpeed knows of each parameter is missing too
        wrapper._link_all_hp_params()
        wrapper._param_slice_mappings = wrapper._create_param_mapping()


@contextmanager
def whole_pickles(checkpoint_engine: CheckpointEngine) -> Iterator[None]:
    """DeepSpeed 0.19.8 reads with ``checkpoint.writer`` by torch's default, weights_only, which refuses what it has
    written. Inside it reads as it does without that key. Shown by test_faults.py, resume with a writer."""
    checkpoint_engine.load = TorchCheckpointEngine().load
    try:
        yield
    finally:
        del checkpoint_engine.load


@contextmanager
def keeping_param_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Stages 1 and 2 hand the base optimizer one param group at a time, and leave it that one where its step raises.
    Shown by test_interruptions.py, an update that raises."""
    groups = optimizer.param_groups
    try:
        yield
    finally:
        optimizer.param_groups = groups


@contextmanager
def keeping_trust_ratios(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """ZeRO-3 gives every param group the keys of the first one when it loads a universal checkpoint. Afterwards which
    groups have trust ratios is what this run's groups say (test_optimizers.py,
    test_lamb_goes_on_at_another_world_size_and_stage)."""
    wanted = [group.get("trust_ratio") for group in optimizer.param_groups]
    yield
    for group, value in zip(optimizer.param_groups, wanted, strict=True):
        if value is not None:
            group["trust_ratio"] = value


def unshare_steps(optimizer: torch.optim.Optimizer) -> None:
    """ZeRO-3 gives all its sub-groups one and the same step when it loads a universal checkpoint, and torch's
    optimizers count it up in place, once for each. Shown by test_checkpoint_moves.py, "universal" with torch's Adam."""
    known = set()
    for state in optimizer.state.values():
        if isinstance(step := state.get("step"), torch.Tensor):
            if id(step) in known:
                state["step"] = step.clone()
            known.add(id(step))


def take_cpu_adam_steps_again(optimizer: torch.optim.Optimizer) -> None:
    """Let the C++ part of a loaded CPU Adam take the steps of its state again, on one element of no consequence.

    It keeps beta^t between the steps, multiplied by beta from each to the next, but takes it from pow() where a step
    does not follow the last one. So the steps after a load would differ in their last bits from those of the run that
    never stopped. Nothing to do for other optimizers, on an accelerator, or where groups have different betas (pow()
    each time then). Shown by test_checkpoint.py, test_late_resume_on_a_cpu_adam_is_bit_exact.
    """
    update = _update_of(getattr(optimizer, "aux_optimizer", optimizer))  # of Muon, for what is no matrix
    betas = {tuple(group["betas"]) for group in optimizer.param_groups if "betas" in group}
    steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    if update is None or len(betas) != 1 or not steps:
        return
    beta1, beta2 = betas.pop()
    element = [torch.zeros(1, device="cpu") for _ in range(4)]
    for step in range(1, max(steps) + 1):
        update(step, beta1, beta2, *element)


def _update_of(optimizer: torch.optim.Optimizer | None) -> Any:
    """f(step, beta1, beta2, parameter, gradient, exp_avg, exp_avg_sq) of a CPU Adam; None for another optimizer."""
    if isinstance(optimizer, DeepSpeedCPUAdam):
        def update(step: int, beta1: float, beta2: float, *tensors: torch.Tensor) -> None:
            optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *tensors)
        return update
    if isinstance(optimizer, FusedAdam) and get_accelerator().device_name() == "cpu":
        def update_fused(step: int, beta1: float, beta2: float, p: torch.Tensor, *others: torch.Tensor) -> None:
            g, m, v = others
            # 2048 * 32 elements a chunk, as FusedAdam itself; a CPU reads neither it nor the overflow buffer.
            optimizer.multi_tensor_adam(2048 * 32, optimizer._dummy_overflow_buf, [[g], [p], [m], [v]], 0.0, beta1,
                                        beta2, 1.0, step, optimizer.adam_w_mode, True, 0.0)
        return update_fused
    return None

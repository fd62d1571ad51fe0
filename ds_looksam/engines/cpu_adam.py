"""DeepSpeed's Adam on a CPU: FusedAdam's C++ form and DeepSpeedCPUAdam, brought to the step that a checkpoint is at."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam


def relive_steps(optimizer: torch.optim.Optimizer) -> None:
    """Let the C++ part of a loaded CPU Adam take the steps of its state again, on one element of no consequence.

    It keeps beta^t between the steps, multiplied by beta from each to the next, but takes it from pow() where a step
    does not follow the last one. So the steps after a load would differ in their last bits from those of the run that
    never stopped. Costs some microseconds for each step. Nothing to do for other optimizers, on an accelerator, or
    where groups have different betas (pow() each time then).
    """
    update = _update_of(getattr(optimizer, "aux_optimizer", optimizer))  # of Muon, for what is no matrix
    betas = {tuple(group["betas"]) for group in optimizer.param_groups if "betas" in group}
    steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    if update is None or len(betas) != 1 or not steps:
        return
    beta1, beta2 = betas.pop()
    element = [torch.zeros(1) for _ in range(4)]
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

"""LARS: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017
(arXiv 1708.03888), Algorithm 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Group, LayerwiseOptimizer, Parts


class Lars(LayerwiseOptimizer):
    """SGD with momentum, and per layer a local learning rate::

        local_l = trust_coefficient ‖w_l‖ / (‖g_l‖ + weight_decay ‖w_l‖)     1 where ‖w_l‖ or ‖g_l‖ is 0
        v_l = momentum v_l + lr local_l (g_l + weight_decay w_l)
        w_l <- w_l - v_l

    The learning rate is inside the momentum, as in the paper; torch's SGD has it outside.

    Args:
        lr: global learning rate. A layer moves by about lr trust_coefficient ‖w_l‖ per update.
        momentum: decay of v.
        weight_decay: coupled (L2), in the local learning rate too.
        trust_coefficient: the paper's eta.
        trust_ratio: False makes local_l 1 (SGD with momentum); meant for param groups of biases and norms, with a
            learning rate of their own.

    State per shard: momentum_buffer, in the parameter's dtype. DeepSpeed's converter to universal checkpoints knows
    Adam's state only: a run with LARS resumes at its own world size and stage.
    """

    STATE = ("momentum_buffer", )
    needs_gradient = True

    def __init__(self, params: Any, lr: float = 1e-1, momentum: float = 0.9, weight_decay: float = 0.0,
                 trust_coefficient: float = 1e-3, trust_ratio: bool = True) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay,
                         trust_coefficient=trust_coefficient, trust_ratio=trust_ratio)

    def gather(self, group: Group, step: int, w: Parts, g: Parts, moments: list[Parts]) -> Parts:
        return g

    def trust_ratio(self, group: Group, w_norm: Tensor, update_norm: Tensor) -> Tensor:
        return group["trust_coefficient"] * w_norm / (update_norm + group["weight_decay"] * w_norm)

    def apply(self, group: Group, step: int, factors: Parts, w: Parts, rest: list[Parts]) -> None:
        g, v = rest
        update = torch._foreach_add(g, w, alpha=group["weight_decay"])
        torch._foreach_mul_(update, factors)
        torch._foreach_mul_(v, group["momentum"])
        torch._foreach_add_(v, update)
        torch._foreach_sub_(w, v)

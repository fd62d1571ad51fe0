"""LAMB: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020
(arXiv 1904.00962), Algorithm 2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import Group, LayerwiseOptimizer, Parts


class Lamb(LayerwiseOptimizer):
    """Adam's direction with decoupled weight decay, and per layer a step in proportion to the layer's own norm::

        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g²
        r = m̂ / (√v̂ + eps) + weight_decay w            m̂, v̂: with bias correction, m, v without
        w_l <- w_l - lr (‖w_l‖ / ‖r_l‖) r_l             per layer l; ratio 1 where either norm is 0

    Args:
        lr: relative change of a layer per update: ‖Δw_l‖ = lr ‖w_l‖, whatever the gradient's size.
        betas: decay of the two means.
        eps: added to √v̂; above 0.
        weight_decay: decoupled, inside the norm of r as in the paper.
        bias_correction: divide m by 1 - beta1^t and v by 1 - beta2^t, t = 1, 2, ...
        min_coeff, max_coeff: clamp of the trust ratio, under the names of DeepSpeed's FusedLamb; None (default): none.
        trust_ratio: False keeps ratio 1 (Adam with decoupled decay); meant for param groups of biases and norms.

    State per shard: exp_avg and exp_avg_sq, in the parameter's dtype (ZeRO's is fp32), the names that DeepSpeed's
    universal checkpoints know. r is computed twice instead of being kept.
    """

    STATE = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 0.0, bias_correction: bool = True, min_coeff: float | None = None,
                 max_coeff: float | None = None, trust_ratio: bool = True) -> None:
        if not eps > 0:
            raise ValueError(f"eps: {eps!r} is not above 0; a parameter without gradients would become NaN")
        if min_coeff is not None and max_coeff is not None and min_coeff > max_coeff:
            raise ValueError(f"min_coeff: {min_coeff!r} is larger than max_coeff {max_coeff!r}")
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, min_coeff=min_coeff,
                         max_coeff=max_coeff, bias_correction=bias_correction, trust_ratio=trust_ratio)

    def gather(self, group: Group, step: int, w: Parts, g: Parts, moments: list[Parts]) -> Parts:
        m, v = moments
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        return self._direction(group, step, w, m, v)

    def trust_ratio(self, group: Group, w_norm: Tensor, update_norm: Tensor) -> Tensor:
        ratio = w_norm / update_norm
        low, high = group["min_coeff"], group["max_coeff"]
        return ratio if low is None and high is None else ratio.clamp(low, high)

    def apply(self, group: Group, step: int, factors: Parts, w: Parts, rest: list[Parts]) -> None:
        m, v = rest
        r = self._direction(group, step, w, m, v)
        torch._foreach_mul_(r, factors)
        torch._foreach_sub_(w, r)

    @staticmethod
    def _direction(group: Group, step: int, w: Parts, m: Parts, v: Parts) -> Parts:
        """r. With bias correction m̂ / (√v̂ + eps) = m / (c √v + c' eps), c' = 1 - beta1^t, c = c' / √(1 - beta2^t)."""
        beta1, beta2 = group["betas"]
        m_scale, v_scale = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_mul_(denominator, m_scale / math.sqrt(v_scale))
        torch._foreach_add_(denominator, m_scale * group["eps"])
        r = torch._foreach_div(m, denominator)
        torch._foreach_add_(r, w, alpha=group["weight_decay"])
        return list(r)

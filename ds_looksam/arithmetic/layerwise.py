"""The layer-wise perturbation: Look-LayerSAM's rule, from the norms of whole layers.

Source: Liu, Mai, Chen, Hsieh, You, CVPR 2022 (arXiv 2203.02714), Look-LayerSAM; its direction is that of LARS and LAMB.
Which global scalar divides it could not be checked: see :func:`perturbation_scales`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LayerScale = Literal["norm", "relative", "gradient"]


def perturbation_scales(w_squared: Tensor, g_squared: Tensor, layerwise: Tensor, rho: Tensor, rule: LayerScale,
                        loss_scale: float) -> Tensor:
    """The factor of each layer's gradient in eps = rho d / s.

    d_l = (‖w_l‖ / ‖g_l‖) g_l where layer l takes part in the scaling. A layer has trust ratio 1, so d_l = g_l, where
    ‖w_l‖ = 0 or ‖g_l‖ = 0 (as in LARS and LAMB), and where its param group says ``"layerwise": false``. The rules are
    three choices of the one global scalar s:

    - ``"norm"``: s = ‖d‖ over all layers, those with ratio 1 included. rho is the radius of the whole perturbation, as
      in SAM and LookSAM. Where no layer is scaled this is LookSAM's rho g / ‖g‖.
    - ``"relative"``: s = 1. A scaled layer moves by rho times its own norm; a layer with ratio 1 by rho g_l.
    - ``"gradient"``: s = ‖g‖. A reading of the paper's formula that could not be verified.

    ``rho`` may differ between layers (param groups): s is common to all, so under ``"norm"`` each group moves by its
    own rho times its share of d, as LookSAM's groups do.

    The gradients here carry the loss scale. It is taken out where it matters: for layers with ratio 1 beside scaled
    ones, and in ``"gradient"``.

    Args:
        w_squared, g_squared: float64 [L], ‖w_l‖² and ‖g_l‖² of whole layers, summed over ranks.
        layerwise: bool [L].
        rho: float64 [L].
        loss_scale: what the gradients are multiplied by.

    Returns:
        fp32 [L + 1], for :meth:`LayerMap.expand`; the last, for padding, is 0. 0 too where s is 0 or a factor is not
        finite.
    """
    g_squared = g_squared / loss_scale**2
    scaled = layerwise & (w_squared > 0) & (g_squared > 0)
    ratio = torch.where(scaled, (w_squared / g_squared).sqrt(), torch.ones_like(g_squared))
    if rule == "norm":
        s = torch.where(scaled, w_squared, g_squared).sum().sqrt()
    elif rule == "gradient":
        s = g_squared.sum().sqrt()
    else:
        s = torch.ones_like(rho[0])
    scales = torch.nan_to_num((rho * ratio / (s * loss_scale)).float(), 0.0, 0.0, 0.0)
    return torch.cat([scales, scales.new_zeros(1)])

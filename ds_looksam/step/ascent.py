"""Who shares one perturbation: the JSON key ``ascent``.

With the window's examples in groups G_j, each has a perturbation of its own (docs/algorithm.md, "Ascent groups")::

    eps_j = rho g_j / ‖g_j‖      s_j = gradient of group j at w + eps_j      g_s = sum_j |G_j| / |W| s_j

    ascent                  a group is                                      how it is formed
    "global"                the window of all ranks                         on the shards, published
    "rank"                  one rank's micro-batches of the window          on the rank's own model
    "micro_batch"           one rank's one micro-batch                      on the rank's own model
    "global_micro_batch"    one accumulation step of all ranks              on the shards, published

Perturbing per group is Foret et al.'s m-sharpness (2020, arXiv 2010.01412, section 4.1); that LookSAM does so is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arithmetic import eager as arithmetic
from ..arithmetic.eager import Shard
from ..arithmetic.layerwise import LayerScale, perturbation_scales
from ..arithmetic.layout import LayerMap
from ..config.params import GroupSettings
from ..errors import LookSAMReplayError
from ..ranks.reduce import sum_over_ranks
from ..shards import GradientShards, ScaleOf


class Ascent:
    """Forms the perturbation of the group that was evaluated last: one for all ranks, by the averaged gradient. w + eps
    is formed on the master weights and published.

    Attributes:
        is_local: each rank has a perturbation of its own.
    """

    is_local = False

    def __init__(self, shards: GradientShards, layer_scale: LayerScale) -> None:
        self._shards, self._layer_scale = shards, layer_scale

    def listen(self) -> None:
        """The first forward or backward of a group begins."""

    def check(self) -> None:
        """Raise LookSAMReplayError if the gradient of the group's examples was not heard."""

    def stop_listening(self) -> None:
        """Forget what was heard: the group was evaluated again, or given up."""

    def put_back(self) -> None:
        """The evaluation failed: another one may follow."""

    def norms(self, g: Shard, v_squared: Tensor | None, groups: Sequence[GroupSettings],
              loss_scale: float) -> tuple[Tensor, Tensor, ScaleOf]:
        """‖g‖² and ‖v‖² of the whole model, and the factor of each element of this group's gradient in eps.
        Collective: one all-reduce of scalars.

        Args:
            g: the averaged gradient on the shards, multiplied by ``loss_scale``.
            v_squared: this rank's part of ‖v‖².
        """
        shards = self._shards
        if not any(group.layerwise for group in groups):
            g_squared, v_squared = sum_norms(shards, g, v_squared)
            return g_squared, v_squared, uniform(groups, g_squared, shards.group_of)
        # 2 L + 1 scalars for L layers
        layers = shards.layers
        parts = torch.stack([shards.layer_squares(), layers.squares(g)], dim=1).reshape(-1)
        v_squared = v_squared if v_squared is not None else parts.new_zeros(())
        sums = sum_over_ranks(torch.cat([parts, v_squared.reshape(1)]), shards.process_group)
        w_squared, g_squared = sums[:-1].view(-1, 2).unbind(1)
        return g_squared.sum(), sums[-1], by_layer(groups, layers, w_squared, g_squared, self._layer_scale, loss_scale)

    def perturb(self, g: Shard, scale_of: ScaleOf, rounding: int | None, keep_clean: bool) -> Tensor:
        """Make the models of the group's ranks compute with w + eps. Collective where that is published. Returns the
        sums of ``add_perturbation``, float64 [3] on the shards' device. ``keep_clean``: :meth:`restore` follows;
        otherwise the update publishes clean weights."""
        return self._shards.perturb_weights(g, scale_of, rounding)

    def restore(self) -> None:
        """Bring back the clean weights. Collective where the perturbation was published."""
        self._shards.restore_weights()


class OwnAscent(Ascent):
    """Each rank perturbs its own model, by the gradient of its own examples. ‖g‖² and ‖v‖² are sent, by which all ranks
    decide alike whether the gradient is finite: one rank's overflow shows in the average."""

    is_local = True

    def __init__(self, shards: GradientShards, layer_scale: LayerScale) -> None:
        super().__init__(shards, layer_scale)
        self._own = shards.own_model()
        self._gradient: Shard | None = None

    def listen(self) -> None:
        self._own.listen()

    def check(self) -> None:
        if not self._own.is_listening:
            raise LookSAMReplayError("neither engine(...) nor engine.backward(...) was called in this window, so the "
                                     "gradient of this rank's own examples is not known: call them, or use "
                                     "optimizer.params.ascent \"global\"")

    def stop_listening(self) -> None:
        self._own.stop_listening()
        self._gradient = None

    def put_back(self) -> None:
        self._own.listen(self._gradient)

    def norms(self, g: Shard, v_squared: Tensor | None, groups: Sequence[GroupSettings],
              loss_scale: float) -> tuple[Tensor, Tensor, ScaleOf]:
        own, gradient = self._own, self._own.take_gradient()
        self._gradient = gradient
        by_layers = any(group.layerwise for group in groups)
        g_squared, v_squared = sum_norms(self._shards, g, v_squared, by_layers)
        if not by_layers:
            return g_squared, v_squared, uniform(groups, own.squared_norm(gradient), range(len(gradient)))
        scale_of = by_layer(groups, own.layers, own.layer_squares(), own.layers.squares(gradient), self._layer_scale,
                            loss_scale)
        return g_squared, v_squared, scale_of

    def perturb(self, g: Shard, scale_of: ScaleOf, rounding: int | None, keep_clean: bool) -> Tensor:
        assert self._gradient is not None
        return self._own.perturb(self._gradient, scale_of, rounding, keep_clean).to(self._shards.device)

    def restore(self) -> None:
        self._own.restore()


def sum_norms(shards: GradientShards, g: Shard, v_squared: Tensor | None,
              by_layers: bool = False) -> tuple[Tensor, Tensor]:
    """‖g‖² and ‖v‖² of the whole model. Collective: one all-reduce. ``v_squared``: this rank's part."""
    norms = sum_over_ranks(own_norms(shards, g, v_squared, by_layers), shards.process_group)
    return norms[0], norms[1]


def own_norms(shards: GradientShards, g: Shard, v_squared: Tensor | None, by_layers: bool) -> Tensor:
    """This rank's part of ‖g‖² and ‖v‖², float64 [2]. ``by_layers``: add up layer by layer, as the layer-wise rules
    do, so that one group gives the same bits in every mode."""
    g_squared = shards.layers.squares(g).sum() if by_layers else shards.passes.squared_norm(g, shards.device)
    return torch.stack([g_squared, v_squared if v_squared is not None else torch.zeros_like(g_squared)])


def uniform(groups: Sequence[GroupSettings], g_squared: Tensor, group_of: Sequence[int]) -> ScaleOf:
    """eps = rho g / ‖g‖."""
    scales = [arithmetic.perturbation_scale(group.rho, g_squared) for group in groups]
    return lambda i, lo, hi: scales[group_of[i]]


def by_layer(groups: Sequence[GroupSettings], layers: LayerMap, w_squared: Tensor, g_squared: Tensor, rule: LayerScale,
             loss_scale: float) -> ScaleOf:
    """The layer-wise eps, from ‖w_l‖² and ‖g_l‖² of whole layers."""
    # Filled there: a tensor made of a list is copied to a GPU, and the host waits for that.
    layerwise = torch.stack([torch.full((), group.layerwise, device=layers.device) for group in groups])
    rho = torch.stack([torch.full((), group.rho, dtype=torch.float64, device=layers.device) for group in groups])
    scales = perturbation_scales(w_squared, g_squared, layerwise[layers.group_of_layer], rho[layers.group_of_layer],
                                 rule, loss_scale)
    return lambda i, lo, hi: layers.expand(scales, i, lo, hi)

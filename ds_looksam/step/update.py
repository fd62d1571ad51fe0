"""Algorithm 1, one turn. Knows no DeepSpeed: it works on shards, with whatever evaluates the window again.

Source: Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022
(arXiv 2203.02714), Algorithm 1; alpha "auto" (beta) is not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..arithmetic import eager as arithmetic
from ..arithmetic.eager import Shard
from ..arithmetic.layerwise import LayerScale, perturbation_scales
from ..config.params import GroupSettings, parse_group
from ..ranks.reduce import ranks_in, sum_over_ranks
from ..shards import GradientShards, ScaleOf
from .schedule import RhoFactors
from .state import Fresh, LookSAMState
from .status import StepKind


class SecondEvaluation(Protocol):
    """What evaluates the window again: :class:`ds_looksam.replay.replay.Replay`, or a closure in a test."""

    def check(self) -> None:
        """Raise LookSAMReplayError if the window cannot be evaluated again. Nothing has been changed yet."""

    def perturbed(self, shards: GradientShards, put_back: Callable[[], None]) -> AbstractContextManager[None]:
        """While the weights are perturbed. Whatever happens inside leaves nothing of it behind. ``put_back``: gives the
        first gradient back to the wrapper where the evaluation fails."""

    def evaluate(self) -> None:
        """Forward and backward of the whole window, at the weights as they are. Collective."""

    def loss_rise(self, device: torch.device) -> Tensor:
        """The window's loss at w + eps minus its loss at w on this rank, float64 [1] on ``device``."""

    def forget(self) -> None:
        """The window's update is over: nothing of it is kept."""


class Update:
    """Turns the averaged gradient of a window into the one that the base optimizer gets.

    Args:
        param_groups: the optimizer's, as they stand at the moment; users change rho, alpha and lr in them.
        loss_scale: what the gradients in the wrapper are multiplied by at the moment.
    """

    def __init__(self, state: LookSAMState, shards: GradientShards, replay: SecondEvaluation, rho_factors: RhoFactors,
                 layer_scale: LayerScale, param_groups: Callable[[], list[dict[str, Any]]],
                 loss_scale: Callable[[], float]) -> None:
        self._state, self._shards, self._replay = state, shards, replay
        self._rho_factors, self._layer_scale = rho_factors, layer_scale
        self._param_groups, self._loss_scale = param_groups, loss_scale

    def __call__(self, apply_update: Callable[[], bool]) -> None:
        """One update. Collective: at most one all-reduce of scalars on a reuse step, two on a SAM step.

        Args:
            apply_update: clips, steps the base optimizer and publishes the weights; False if it skipped them.
        """
        status = self._state.status
        groups = self._groups_in_force()

        fresh: Fresh | None = None
        kind: StepKind
        if status.next_is_sam:
            self._replay.check()
            fresh = self._sam_step(groups)
            kind = "sam" if fresh is not None else "base"
        else:
            kind = self._reuse_step([group.alpha for group in groups])
        status.evaluations += 1
        status.rho, status.alpha = [group.rho for group in groups], [group.alpha for group in groups]

        if apply_update():
            status.updates += 1
            status.step_kind = kind
            if fresh is not None:
                self._state.keep(fresh)
        else:
            status.step_kind = "skipped"
            if fresh is not None:
                self._shards.restore_weights()
        self._shards.end_window()
        self._replay.forget()

    def _groups_in_force(self) -> list[GroupSettings]:
        """Each param group's settings for this update, with the schedule's factor in rho."""
        settings = []
        for i, group in enumerate(self._param_groups()):
            own = parse_group(group, i)
            factor = self._rho_factors.of(i, self._state.status.updates, group["lr"])
            settings.append(own._replace(rho=own.rho * factor))
        return settings

    # Reuse ----------------------------------------------------------------------------------------------------------

    def _reuse_step(self, alphas: list[float | None]) -> StepKind:
        """u = g + alpha (‖g‖ / ‖v‖) v, in the gradient's own memory."""
        shards, state = self._shards, self._state
        if state.v is None or state.status.is_off or all(self._adds_nothing(alpha) for alpha in alphas):
            shards.keep_gradient()
            return "base"
        passes = shards.passes
        g = shards.take_gradient(survives_evaluation=False)
        per_flat: Tensor | None = None
        if shards.wants_squared_norm:
            per_flat = sum_over_ranks(passes.reuse_sums(g, state.v, shards.device), shards.process_group)
            g_squared, _, v_squared = per_flat.sum(dim=0).unbind()
        else:
            g_squared, v_squared = self._sum_norms(g)
        beta = state.status.beta if state.status.beta is not None else torch.zeros_like(g_squared)
        strengths = [None if self._adds_nothing(alpha) else
                     arithmetic.reuse_strength(alpha, beta, g_squared, v_squared) for alpha in alphas]
        coefficients = [strengths[group] for group in shards.group_of]
        passes.add_reused_(g, state.v, coefficients)
        shards.give_gradient(g)
        if per_flat is not None:
            shards.tell_squared_norm(arithmetic.reused_squared_norm(per_flat, coefficients))
        return "reuse"

    def _adds_nothing(self, alpha: float | None) -> bool:
        return alpha == 0 or (alpha is None and self._state.status.beta is None)

    # SAM ------------------------------------------------------------------------------------------------------------

    def _sam_step(self, groups: list[GroupSettings]) -> Fresh | None:
        """Evaluate the window at w + eps and leave u = g_s with the wrapper. None if g is not finite: u = g then."""
        shards, state = self._shards, self._state
        g = shards.take_gradient(survives_evaluation=True)
        by_layer = any(group.layerwise for group in groups)
        g_squared, v_squared, scale_of = (self._layer_scales if by_layer else self._scales)(g, groups)

        def give_back() -> None:
            shards.give_gradient(g)
            shards.tell_squared_norm(g_squared)

        # The one host synchronisation before the replay: an overflowed gradient is not worth a second evaluation.
        if not torch.isfinite(g_squared).item():
            give_back()
            return None

        with self._replay.perturbed(shards, put_back=give_back):
            moved = shards.perturb_weights(g, scale_of)
            self._replay.evaluate()
            g_s = shards.take_gradient(survives_evaluation=False)
            parts = [shards.passes.replay_sums(g, g_s, state.v, shards.device), moved,
                     self._replay.loss_rise(shards.device)]
            sums = sum_over_ranks(torch.cat(parts), shards.process_group)
        shards.unperturb_local()
        state.status.evaluations += 1

        replayed, moved, loss_rise = sums.split([4, 3, 1])
        scalars = arithmetic.ReplayScalars.from_sums(g_squared, replayed, moved)
        g_v = shards.passes.project_out_(g, g_s, scalars.along)
        shards.give_gradient(g_s)
        shards.tell_squared_norm(scalars.g_s_squared)
        sharpness = loss_rise.sum() / ranks_in(shards.process_group)
        return Fresh(g_v, g_squared, v_squared, scalars, sharpness, self._loss_scale())

    def _scales(self, g: Shard, groups: list[GroupSettings]) -> tuple[Tensor, Tensor, ScaleOf]:
        """‖g‖², ‖v‖² and the factor of g in eps = rho g / ‖g‖. One all-reduce of two scalars."""
        g_squared, v_squared = self._sum_norms(g)
        scales = [arithmetic.perturbation_scale(group.rho, g_squared) for group in groups]
        return g_squared, v_squared, lambda i, lo, hi: scales[self._shards.group_of[i]]

    def _layer_scales(self, g: Shard, groups: list[GroupSettings]) -> tuple[Tensor, Tensor, ScaleOf]:
        """‖g‖², ‖v‖² and the factor of g in the layer-wise eps. One all-reduce of 2 L + 1 scalars for L layers."""
        layers = self._shards.layers
        parts = torch.stack([self._shards.layer_squares(), layers.squares(g)], dim=1).reshape(-1)
        v_squared = self._state.v_squared if self._state.v_squared is not None else parts.new_zeros(())
        sums = sum_over_ranks(torch.cat([parts, v_squared.reshape(1)]), self._shards.process_group)
        w_squared, g_squared = sums[:-1].view(-1, 2).unbind(1)
        # Filled there: a tensor made of a list is copied to a GPU, and the host waits for that.
        layerwise = torch.stack([torch.full((), group.layerwise, device=layers.device) for group in groups])
        rho = torch.stack([torch.full((), group.rho, dtype=torch.float64, device=layers.device) for group in groups])
        scales = perturbation_scales(w_squared, g_squared, layerwise[layers.group_of_layer], rho[layers.group_of_layer],
                                     self._layer_scale, self._loss_scale())
        return g_squared.sum(), sums[-1], lambda i, lo, hi: layers.expand(scales, i, lo, hi)

    def _sum_norms(self, g: Shard) -> tuple[Tensor, Tensor]:
        """‖g‖² and ‖v‖² of the whole model, in one all-reduce."""
        device, v_squared = self._shards.device, self._state.v_squared
        parts = [self._shards.passes.squared_norm(g, device)]
        parts.append(v_squared if v_squared is not None else torch.zeros_like(parts[0]))
        g_squared, v_squared = sum_over_ranks(torch.stack(parts), self._shards.process_group).unbind()
        return g_squared, v_squared

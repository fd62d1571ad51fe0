"""The DeepSpeed engine that trains with LookSAM: decides at the accumulation boundary, reads like the algorithm."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import log_dist, logger
from torch import Tensor

from ..arithmetic import eager as algebra
from ..arithmetic.choose import choose_passes
from ..arithmetic.eager import Shard
from ..arithmetic.layerwise import perturbation_scales
from ..config.params import (
    GroupSettings,
    LookSAMConfig,
    explain_unknown_key,
    group_settings,
    parse_group,
    parse_params,
    set_group_defaults,
)
from ..config.support import deepspeed_name, refuse_model, refuse_unsupported
from ..errors import LookSAMReplayError
from ..ranks.agree import raised_everywhere
from ..ranks.check import check_ranks
from ..ranks.reduce import ranks_in, sum_over_ranks
from ..replay.guard import guard_optimizer
from ..replay.snapshot import ModelSnapshot
from ..shards import ScaleOf
from ..step import monitor
from ..step.schedule import RhoFactors
from ..step.status import LookSAMStatus, StepKind
from .host import tag_for_muon
from .resume import V_DTYPES, ResumableEngine


@dataclass(frozen=True)
class _Fresh:
    """What a SAM step brings, to be kept if its update is applied. ``g_v`` lies in the memory that held g."""

    g_v: Shard
    g_squared: Tensor
    v_squared: Tensor
    scalars: algebra.ReplayScalars
    sharpness: Tensor
    loss_scale: float  # of g_squared and the scalars; the update may change the wrapper's


class LookSAMEngine(ResumableEngine):
    """A DeepSpeedEngine whose updates follow LookSAM (Liu et al. 2022, Algorithm 1).

    Made by ``deepspeed.initialize`` when the JSON says ``"optimizer": {"type": "LookSAM"}``. The base optimizer, the
    ZeRO wrapper around it and the user's loop stay DeepSpeed's own.

    Attributes:
        loss_fn: ``f(outputs, *inputs, **kwargs) -> loss``, to be set where the loss is computed outside the model in
            a way that cannot be recorded. It gets the model's output and the recorded inputs of its forward, and
            returns what the user hands to ``engine.backward``.
    """

    def __init__(self, *args: Any, config_class: Any, **kwargs: Any) -> None:
        settings, base_params = parse_params(config_class.optimizer_params, config_class.optimizer_name)
        refuse_unsupported(config_class, settings, client_optimizer=kwargs.get("optimizer"))
        self._settings: LookSAMConfig = settings
        # From here on DeepSpeed sees the configuration of a run with the base optimizer alone.
        config_class.optimizer_name = deepspeed_name(settings.base_optimizer)
        config_class.optimizer_params = base_params
        tag_for_muon(config_class, kwargs["model"])

        self._status = LookSAMStatus(k=settings.k, first_sam_update=settings.rho_schedule.off_updates)

        super().__init__(*args, config_class=config_class, **kwargs)
        self.open_shards()
        guard_optimizer(self.optimizer, lambda: self._running_engine_step, self._window.forget)
        self._shards.passes = choose_passes(self._shards.device, settings.compile)
        self._shards.reserve_v(V_DTYPES[settings.v_dtype])
        if self.zero_nvme_offload_optimizer():
            log_dist("LookSAM: zero_optimization.offload_optimizer.device is \"nvme\": save_checkpoint and "
                     "load_checkpoint will raise, save_16bit_model works", ranks=[0], level=logging.WARNING)
        log_dist(f"LookSAM: k={settings.k}, rho={settings.rho}, alpha={settings.alpha}, base optimizer "
                 f"{type(self.basic_optimizer).__name__} in {type(self.optimizer).__name__}", ranks=[0])

    @property
    def looksam(self) -> LookSAMStatus:
        """Counters and measurements. Read only."""
        return self._status

    @property
    def _window_is_recorded(self) -> bool:
        return self._status.next_is_sam

    def before_first_communication(self, device: torch.device) -> None:
        check_ranks(device)

    def prepare_base_optimizer(self, build: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        refuse_model(self)
        try:
            optimizer = super().prepare_base_optimizer(build)
        except TypeError as error:
            raise explain_unknown_key(error, self.optimizer_params() or {}, self._settings.base_optimizer) from error
        for i, group in enumerate(optimizer.param_groups):
            set_group_defaults(group, self._settings)
            parse_group(group, i)
        self._rho_factors = RhoFactors(self._settings.rho_schedule, [group["lr"] for group in optimizer.param_groups])
        self._configured_groups = [group_settings(group) for group in optimizer.param_groups]
        return optimizer

    # One update -----------------------------------------------------------------------------------------------------

    def update_at_boundary(self, apply_update: Callable[[], None]) -> None:
        """Algorithm 1, one turn. Collective: at most one all-reduce of scalars on a reuse step, two on a SAM step."""
        self.start_update()
        status = self._status
        groups = [self._settings_in_force(group, i) for i, group in enumerate(self.optimizer.param_groups)]

        fresh: _Fresh | None = None
        kind: StepKind
        if status.next_is_sam:
            if self._closure is None:
                self._window.check(self.loss_fn)
            fresh = self._sam_step(groups)
            kind = "sam" if fresh is not None else "base"
        else:
            kind = self._reuse_step([group.alpha for group in groups])
        status.evaluations += 1
        status.rho, status.alpha = [group.rho for group in groups], [group.alpha for group in groups]

        apply_update()

        if self.was_step_applied():
            status.updates += 1
            status.step_kind = kind
            if fresh is not None:
                self._keep(fresh)
        else:
            status.step_kind = "skipped"
            if fresh is not None:
                self._shards.restore_weights()
        self._shards.end_window()
        self._perturbed.end()
        self._window.forget()
        if self.monitors():
            self.write_to_monitors(monitor.events(status, self.global_samples, measured=status.step_kind == "sam"))

    def _settings_in_force(self, group: dict[str, Any], i: int) -> GroupSettings:
        """A param group's settings for this update, with the schedule's factor in rho."""
        settings = parse_group(group, i)
        return settings._replace(rho=settings.rho * self._rho_factors.of(i, self._status.updates, group["lr"]))

    def _reuse_step(self, alphas: list[float | None]) -> StepKind:
        """u = g + alpha (‖g‖ / ‖v‖) v, in the gradient's own memory."""
        if self._v is None or self._status.is_off or all(self._adds_nothing(alpha) for alpha in alphas):
            self._shards.keep_gradient()
            return "base"
        passes = self._shards.passes
        g = self._shards.take_gradient(survives_evaluation=False)
        per_flat: Tensor | None = None
        if self._shards.wants_squared_norm:
            per_flat = sum_over_ranks(passes.reuse_sums(g, self._v, self._shards.device), self._shards.process_group)
            g_squared, _, v_squared = per_flat.sum(dim=0).unbind()
        else:
            g_squared, v_squared = self._sum_norms(g)
        beta = self._status.beta if self._status.beta is not None else torch.zeros_like(g_squared)
        strengths = [None if self._adds_nothing(alpha) else algebra.reuse_strength(alpha, beta, g_squared, v_squared)
                     for alpha in alphas]
        coefficients = [strengths[group] for group in self._shards.group_of]
        passes.add_reused_(g, self._v, coefficients)
        self._shards.give_gradient(g)
        if per_flat is not None:
            self._shards.tell_squared_norm(algebra.reused_squared_norm(per_flat, coefficients))
        return "reuse"

    def _adds_nothing(self, alpha: float | None) -> bool:
        return alpha == 0 or (alpha is None and self._status.beta is None)

    def _sam_step(self, groups: list[GroupSettings]) -> _Fresh | None:
        """Evaluate the window at w + eps and leave u = g_s with the wrapper. None if g is not finite: u = g then."""
        shards, status = self._shards, self._status
        g = shards.take_gradient(survives_evaluation=True)
        by_layer = any(group.layerwise for group in groups)
        g_squared, v_squared, scale_of = (self._layer_scales if by_layer else self._scales)(g, groups)
        # The one host synchronisation before the replay: an overflowed gradient is not worth a second evaluation.
        if not torch.isfinite(g_squared).item():
            shards.give_gradient(g)
            shards.tell_squared_norm(g_squared)
            return None

        snapshot = ModelSnapshot.take(self.module, optimized=shards.parameters())
        try:
            self._perturbed.begin()
            moved = shards.perturb_weights(g, scale_of)
            self._evaluate_again()
            g_s = shards.take_gradient(survives_evaluation=False)
            parts = [shards.passes.replay_sums(g, g_s, self._v, shards.device), moved, self._loss_rise()]
            sums = sum_over_ranks(torch.cat(parts), shards.process_group)
        except Exception as error:
            # Any other BaseException ends the process: restoring is collective, and the other ranks may not be told.
            self._leave_evaluation(error, g, g_squared)
            raise
        finally:
            snapshot.restore()
        shards.unperturb_local()
        status.evaluations += 1

        replayed, moved, loss_rise = sums.split([4, 3, 1])
        scalars = algebra.ReplayScalars.from_sums(g_squared, replayed, moved)
        g_v = shards.passes.project_out_(g, g_s, scalars.along)
        shards.give_gradient(g_s)
        shards.tell_squared_norm(scalars.g_s_squared)
        sharpness = loss_rise.sum() / ranks_in(shards.process_group)
        return _Fresh(g_v, g_squared, v_squared, scalars, sharpness, self.gradient_loss_scale())

    def _leave_evaluation(self, error: Exception, g: Shard, g_squared: Tensor) -> None:
        """The second evaluation raised. If it did so on every rank, all is put back as it was before step(). Otherwise
        what this rank can put back alone, and the weights stay marked as perturbed: a load or the job's end is left.

        Raises:
            LookSAMReplayError: this rank's error is only what came of another rank's.
        """
        shards = self._shards
        apart = raised_everywhere(error, shards.process_group or dist.get_world_group(), self.progress)
        if apart is None:
            shards.abort_evaluation()
            shards.restore_weights()
        else:
            shards.unperturb_local()
        shards.give_gradient(g)
        shards.tell_squared_norm(g_squared)
        if apart is None:
            self._perturbed.end()
            return
        told = ("In the second evaluation of a SAM step " + (apart.first or "the other ranks were lost") +
                ". The ranks are not at one place any more, so the weights cannot be put back on all of them and "
                "nothing can be saved; go on from a checkpoint.")
        if apart.comes_after:
            raise LookSAMReplayError(told) from error
        logger.error(f"LookSAM: {told}")

    def _scales(self, g: Shard, groups: list[GroupSettings]) -> tuple[Tensor, Tensor, ScaleOf]:
        """‖g‖², ‖v‖² and the factor of g in eps = rho g / ‖g‖. One all-reduce of two scalars."""
        g_squared, v_squared = self._sum_norms(g)
        scales = [algebra.perturbation_scale(group.rho, g_squared) for group in groups]
        return g_squared, v_squared, lambda i, lo, hi: scales[self._shards.group_of[i]]

    def _layer_scales(self, g: Shard, groups: list[GroupSettings]) -> tuple[Tensor, Tensor, ScaleOf]:
        """‖g‖², ‖v‖² and the factor of g in the layer-wise eps. One all-reduce of 2 L + 1 scalars for L layers."""
        layers = self.layers()
        parts = torch.stack([self._shards.layer_squares(layers), layers.squares(g)], dim=1).reshape(-1)
        v_squared = self._v_squared_local if self._v_squared_local is not None else parts.new_zeros(())
        sums = sum_over_ranks(torch.cat([parts, v_squared.reshape(1)]), self._shards.process_group)
        w_squared, g_squared = sums[:-1].view(-1, 2).unbind(1)
        # Filled there: a tensor made of a list is copied to a GPU, and the host waits for that.
        layerwise = torch.stack([torch.full((), group.layerwise, device=layers.device) for group in groups])
        rho = torch.stack([torch.full((), group.rho, dtype=torch.float64, device=layers.device) for group in groups])
        scales = perturbation_scales(w_squared, g_squared, layerwise[layers.group_of_layer], rho[layers.group_of_layer],
                                     self._settings.layer_scale, self.gradient_loss_scale())
        return g_squared.sum(), sums[-1], lambda i, lo, hi: layers.expand(scales, i, lo, hi)

    def _sum_norms(self, g: Shard) -> tuple[Tensor, Tensor]:
        """‖g‖² and ‖v‖² of the whole model, in one all-reduce."""
        device = self._shards.device
        parts = [self._shards.passes.squared_norm(g, device)]
        parts.append(self._v_squared_local if self._v_squared_local is not None else torch.zeros_like(parts[0]))
        g_squared, v_squared = sum_over_ranks(torch.stack(parts), self._shards.process_group).unbind()
        return g_squared, v_squared

    def _keep(self, fresh: _Fresh) -> None:
        """The update was applied: the fresh g_v replaces v, beta and the measurements follow.

        A g_v that is not finite (in a wrapper that applies such updates) is dropped, on every rank alike.
        """
        scalars, g_squared, status = fresh.scalars, fresh.g_squared, self._status
        if not torch.isfinite(scalars.g_v_squared + scalars.v_dot_g_v).item():
            return
        if self._v is not None:
            status.beta = algebra.update_beta(status.beta, scalars.v_dot_g_v, fresh.v_squared, g_squared)
            status.orthogonal_cosine = algebra.cosine(scalars.v_dot_g_v, fresh.v_squared, scalars.g_v_squared)
        self._store_v(fresh.g_v)
        status.gradient_norm = g_squared.sqrt() / fresh.loss_scale
        status.perturbed_gradient_norm = scalars.g_s_squared.sqrt() / fresh.loss_scale
        status.orthogonal_norm = scalars.g_v_squared.sqrt() / fresh.loss_scale
        status.perturbation_ratio, status.perturbation_cosine = scalars.moved_ratio, scalars.moved_cosine
        status.gradient_cosine = algebra.cosine(scalars.g_dot_g_s, g_squared, scalars.g_s_squared)
        status.sharpness = fresh.sharpness

"""Algorithm 1, one turn. Knows no DeepSpeed: it works on shards, with whatever evaluates the window again.

Source: Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022
(arXiv 2203.02714), Algorithm 1; alpha "auto" (beta) is not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..arithmetic import eager as arithmetic
from ..arithmetic.eager import Shard
from ..arithmetic.rounding import rounding_seed
from ..config.params import OWN, PER_MICRO_BATCH, GroupSettings, LookSAMConfig, parse_group, set_group_defaults
from ..errors import LookSAMReplayError
from ..ranks.agree import raise_together
from ..ranks.reduce import ranks_in, sum_over_all_ranks, sum_over_ranks, this_rank, world_size
from ..replay.replay import Replay
from ..shards import GradientShards
from .ascent import Ascent, OwnAscent, own_norms, sum_norms
from .schedule import RhoFactors
from .state import Fresh, LookSAMState
from .status import StepKind


@dataclass(frozen=True)
class Gradients:
    """Both gradients of a group of examples, or of the groups of a window so far, in their weight in the window's.

    Attributes:
        g, g_s: at w and at w + eps, averaged over ranks, on this rank's shards; g_s is None where g is not finite.
        g_squared, v_squared: of the whole model, for this group.
        moved: the sums of ``add_perturbation``, float64 [3], this rank's part.
        loss_rise: float64 [1], this rank's.
        groups: how many they are.
    """

    g: Shard
    g_s: Shard | None
    g_squared: Tensor
    v_squared: Tensor
    moved: Tensor
    loss_rise: Tensor
    groups: int = 1

    def laid_out(self, lay_out: Callable[[Shard], Shard]) -> Gradients:
        """The same on shards that were laid out anew."""
        return replace(self, g=lay_out(self.g), g_s=None if self.g_s is None else lay_out(self.g_s))

    def plus(self, other: Gradients) -> Gradients:
        """The sum, in this one's memory; the norms are the other's."""
        torch._foreach_add_(self.g, other.g)
        g_s = None if other.g_s is None else self.g_s
        if g_s is not None and other.g_s is not None:
            torch._foreach_add_(g_s, other.g_s)
        return Gradients(self.g, g_s, other.g_squared, other.v_squared, self.moved + other.moved,
                         self.loss_rise + other.loss_rise, self.groups + 1)


class Update:
    """Turns the averaged gradient of a window into the one that the base optimizer gets.

    Args:
        replay: evaluates the window again.
        param_groups: the optimizer's, as they stand at the moment; users change rho, alpha and lr in them.
        loss_scale: what the gradients in the wrapper are multiplied by at the moment.
        is_observed: whether code of the user's runs inside of the base optimizer's step on this rank, before the update
            has published its weights.

    Attributes:
        is_per_micro_batch: each micro-batch of a SAM step's window is to be evaluated again by itself.
    """

    def __init__(self, settings: LookSAMConfig, state: LookSAMState, shards: GradientShards, replay: Replay,
                 rho_factors: RhoFactors, param_groups: Callable[[], list[dict[str, Any]]],
                 loss_scale: Callable[[], float], is_observed: Callable[[], bool]) -> None:
        self._settings, self._state, self._shards, self._replay = settings, state, shards, replay
        self._rho_factors = rho_factors
        self._param_groups, self._loss_scale, self._is_observed = param_groups, loss_scale, is_observed
        self._rounds_at_random = settings.rounding == "stochastic"
        self.is_per_micro_batch = settings.ascent in PER_MICRO_BATCH
        self._ascent = (OwnAscent if settings.ascent in OWN else Ascent)(shards, settings.layer_scale)
        self._so_far: Gradients | None = None
        self._is_shown = False  # its g lies with the wrapper, for the user to read

    def __call__(self, apply_update: Callable[[], bool]) -> None:
        """One update. Collective: at most one all-reduce of scalars on a reuse step, three on a SAM step, which also
        evaluates the window again and publishes w + eps.

        Args:
            apply_update: clips, steps the base optimizer and publishes the weights; False if it skipped them.
        """
        status = self._state.status
        if status.next_is_sam:
            self._check_gradient()
        if self._so_far is None:
            self._state.follow_changes()
        groups = self._groups_in_force()
        if not (status.next_is_sam and self.is_per_micro_batch):
            self._replay.edit_gradients()

        found = self._window_twice(groups) if status.next_is_sam else None
        fresh: Fresh | None = None
        kind: StepKind
        try:
            if found is not None:
                fresh = self._sam_step(found, groups)
                kind = "sam" if fresh is not None else "base"
            else:
                kind = self._reuse_step([group.alpha for group in groups])
            status.evaluations += 1
            status.rho, status.alpha = [abs(group.rho) for group in groups], [group.alpha for group in groups]
            is_applied = apply_update()
        except Exception as error:
            if found is not None and found.g_s is not None:
                self._replay.update_failed(error, self._shards)
                if not self._replay.is_perturbed:  # or the ranks are apart, and only a checkpoint helps
                    self.give_up_window()
            raise
        if is_applied:
            status.updates += 1
            status.step_kind = kind
            if fresh is not None:
                self._state.keep(fresh)
        else:
            status.step_kind = "skipped"
            if fresh is not None and not self.is_per_micro_batch:
                self._shards.restore_weights()
        self._shards.end_window()
        self._replay.update_is_over()

    def _groups_in_force(self) -> list[GroupSettings]:
        """Each param group's settings for this update, with the schedule's factor in rho. Where the base optimizer
        maximizes, uphill is the other way."""
        settings = []
        for i, group in enumerate(self._param_groups()):
            if "rho" not in group:  # added since
                set_group_defaults(group, self._settings)
            own = parse_group(group, i)
            factor = self._rho_factors.of(i, self._state.status.updates, group["lr"])
            settings.append(own._replace(rho=own.rho * (-factor if group.get("maximize") else factor)))
        return settings

    # Gradients that the user changes ----------------------------------------------------------------------------------

    @contextmanager
    def backward_runs(self) -> Iterator[None]:
        """While a backward of a window that may be evaluated again writes to its gradient."""
        self.window_runs()  # there may have been no forward of the engine's
        self.gradient_changes_hands()
        yield
        if not self.is_per_micro_batch:  # which takes it at once
            self.gradient_is_left()

    def forward_begins(self) -> None:
        """The user's. There are layers (tiled losses) whose backward runs inside of it and writes to gradients."""
        self.window_runs()
        if not self.is_per_micro_batch:
            self._shards.watch.pause()

    def forward_is_over(self) -> None:
        if self._shards.watch.is_on and not self.is_per_micro_batch:
            self._shards.watch.begin()

    def gradient_is_left(self) -> None:
        """DeepSpeed leaves the window's gradient to the user."""
        if self._state.status.next_is_sam:
            self._shards.watch.begin()

    def gradient_changes_hands(self) -> None:
        """The user leaves it to DeepSpeed."""
        self._shards.watch.pause()
        if self._is_shown:
            assert self._so_far is not None
            self._so_far = replace(self._so_far, g=self._shards.hide_gradient(self._so_far.g))
            self._is_shown = False

    def _check_gradient(self) -> None:
        """Raise LookSAMReplayError on every rank if the gradient was changed on any of them, or the window cannot be
        evaluated again there. Collective: one all-reduce of a flag, which the host reads."""
        self.gradient_changes_hands()
        watch = self._shards.watch
        error, values_changed = self._edited() if watch.was_written else None, watch.values_changed
        if self.is_per_micro_batch:
            raise_together(error, self._shards.device, values_changed, self._edited())
            watch.end()  # not before: the window may be stepped again, and is refused again
        else:
            watch.end()
            raise_together(error or self._objection(), self._shards.device, values_changed, self._edited())

    def _objection(self, in_step: bool = True) -> LookSAMReplayError | None:
        """Why this rank cannot evaluate the window, or a micro-batch of it, again. Nothing has been changed yet."""
        try:
            self._replay.check(in_step)
            self._ascent.check()
        except LookSAMReplayError as error:
            return error
        return None

    def _edited(self) -> LookSAMReplayError:
        again = (f" With optimizer.params.ascent \"{self._settings.ascent}\" it is called inside "
                 "engine.backward(), for each micro-batch: call engine.zero_grad() and run this window again"
                 if self.is_per_micro_batch else "")
        return LookSAMReplayError(
            "the gradient was changed between engine.backward() and engine.step(). A SAM step has two gradients, "
            "and what was done to the first would be lost. Set engine.edit_gradients to a function without "
            "arguments that does it: it is called whenever a window's gradient has been averaged, at w and w + eps."
            + again)

    # Reuse ----------------------------------------------------------------------------------------------------------

    def _reuse_step(self, alphas: list[float | None]) -> StepKind:
        """u = g + alpha (‖g‖ / ‖v‖) v, in the gradient's own memory. Collective where ‖g‖ is needed."""
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
            g_squared, v_squared = sum_norms(shards, g, state.v_squared)
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

    def _window_twice(self, groups: list[GroupSettings]) -> Gradients:
        """Both gradients of the window. The weights that the base optimizer's step reads are clean. Collective."""
        if self.is_per_micro_batch:
            if self._so_far is None:
                raise LookSAMReplayError("LookSAM cannot take its SAM step: no backward was seen in this window")
            found, self._so_far = self._so_far, None
            return found
        shards = self._shards
        put_back_model = shards.keep_model() if self._is_observed() else None
        found = self._two_gradients(groups, self._loss_scale(), keep_clean=False)
        if found.g_s is not None:
            shards.unperturb_local()
            if put_back_model is not None:
                put_back_model()
                self._replay.weights_are_clean()
        return found

    def _sam_step(self, found: Gradients, groups: list[GroupSettings]) -> Fresh | None:
        """Leave u = g_s with the wrapper. None if g is not finite: u = g then. Collective: one all-reduce."""
        shards, state = self._shards, self._state
        if found.g_s is None:
            self._give(found.g, found.g_squared)
            return None
        state.status.evaluations += 1

        g, g_s = found.g, found.g_s
        parts = [shards.passes.replay_sums(g, g_s, state.v, shards.device), found.moved, found.loss_rise]
        if self.is_per_micro_batch:  # those that are known are of the last micro-batch alone
            parts.append(own_norms(shards, g, state.v_squared, any(group.layerwise for group in groups)))
        sums = sum_over_ranks(torch.cat(parts), shards.process_group)
        replayed, moved, loss_rise, *norms = sums.split([part.numel() for part in parts])
        g_squared, v_squared = norms[0].unbind() if norms else (found.g_squared, found.v_squared)
        ranks = ranks_in(shards.process_group)
        if self._ascent.is_local and shards.process_group is None:
            # The shards are the same on every rank, but not by how much its own model moved.
            (moved, loss_rise), ranks = sum_over_all_ranks(torch.cat([moved, loss_rise])).split([3, 1]), world_size()
        scalars = arithmetic.ReplayScalars.from_sums(g_squared, replayed, moved)
        g_v = shards.passes.project_out_(g, g_s, scalars.along)
        self._give(g_s, scalars.g_s_squared)
        # Read here, before an update whose clipping reads too: later the host would wait for its weights' publication.
        is_finite = bool(torch.isfinite(scalars.g_v_squared + scalars.v_dot_g_v).item())
        return Fresh(g_v, g_squared, v_squared, scalars, loss_rise.sum() / ranks, self._loss_scale(), is_finite)

    def _two_gradients(self, groups: list[GroupSettings], loss_scale: float, keep_clean: bool) -> Gradients:
        """Take the gradient that the wrapper has, multiplied by ``loss_scale``, and that of the same examples at w +
        eps. ``keep_clean``: the weights are to be restored before the update. Collective."""
        shards, ascent = self._shards, self._ascent
        g = shards.take_gradient(survives_evaluation=True)
        g_squared, v_squared, scale_of = ascent.norms(g, self._state.v_squared, groups, loss_scale)

        def put_back() -> None:
            self._give(g, g_squared)
            ascent.put_back()

        # Read before the replay: an overflowed gradient is not worth a second evaluation.
        if not torch.isfinite(g_squared).item():
            ascent.stop_listening()
            nothing = torch.zeros(4, dtype=torch.float64, device=shards.device)
            return Gradients(g, None, g_squared, v_squared, moved=nothing[:3], loss_rise=nothing[3:])

        with self._replay.perturbed(shards, put_back):
            moved = ascent.perturb(g, scale_of, self._rounding(), keep_clean)
            self._replay.evaluate()
            self._replay.edit_gradients()
            g_s = shards.take_gradient(survives_evaluation=keep_clean)
            loss_rise = self._replay.loss_rise(shards.device)
        ascent.stop_listening()
        return Gradients(g, g_s, g_squared, v_squared, moved, loss_rise)

    def _give(self, gradient: Shard, squared: Tensor) -> None:
        self._shards.give_gradient(gradient)
        self._shards.tell_squared_norm(squared)

    def _rounding(self) -> int | None:
        """The seed of this perturbation's rounding. Replicas round alike, ranks that have a part or a perturbation of
        their own do not."""
        if not self._rounds_at_random:
            return None
        apart = self._ascent.is_local or self._shards.process_group is not None
        groups_before = 0 if self._so_far is None else self._so_far.groups
        return rounding_seed(self._state.status.updates, groups_before, this_rank() if apart else 0)

    # A SAM step whose perturbations belong to micro-batches ---------------------------------------------------------

    def window_runs(self) -> None:
        """A forward or a backward of the user's loop begins."""
        if self._state.status.next_is_sam:
            self._ascent.listen()

    def micro_batch_is_done(self, share: float, is_last: bool) -> None:
        """The wrapper has the gradient of one micro-batch, whose loss has the weight ``share`` in the window's:
        evaluate that again, and add both gradients up. After the window's last one the wrapper has the sum of the first
        gradients, for the user to read. Collective.

        Raises:
            LookSAMReplayError: it cannot be evaluated again. All is as before its backward, unless another rank alone
                failed: what the window had so far is kept, and its forward and backward may be tried once more.
        """
        so_far = self._so_far
        try:
            raise_together(self._objection(in_step=False), self._shards.device)
            lay_out = self._state.follow_changes(within_window=so_far is not None)
            if lay_out is not None and so_far is not None:
                self._so_far = so_far = so_far.laid_out(lay_out)
            self._replay.edit_gradients()
            if so_far is not None and so_far.g_s is None:  # an overflow: the update will be skipped
                found = replace(so_far, g=self._shards.take_gradient(survives_evaluation=True))
                self._ascent.stop_listening()
            else:
                found = self._two_gradients(self._groups_in_force(), self._loss_scale() * share, keep_clean=True)
            if found.g_s is not None:
                self._ascent.restore()
        except Exception:
            self._give_up_micro_batch()
            raise
        self._so_far = found if so_far is None else so_far.plus(found)
        self._replay.forget()
        if is_last:
            self._shards.show_gradient(self._so_far.g)
            self._is_shown = True
            self.gradient_is_left()

    def forget_gradient(self, told: bool) -> None:
        """The user has thrown away the gradient of the window so far. ``told``: by a call that was seen; that
        ``p.grad`` is None says nothing of earlier micro-batches whose gradients were taken out."""
        if told or not self.is_per_micro_batch:
            self._so_far, self._is_shown = None, False
        self._shards.watch.end()
        self._ascent.stop_listening()
        self.window_runs()  # forwards may have been made already

    def give_up_window(self) -> None:
        """Forget what has been evaluated since the last update."""
        self._so_far, self._is_shown = None, False
        self._shards.watch.end()
        self._ascent.stop_listening()
        self._replay.forget()

    def _give_up_micro_batch(self) -> None:
        self._ascent.stop_listening()
        if not self._replay.is_perturbed:  # or the ranks are apart, and only a checkpoint helps
            self._shards.abort_evaluation()
            self._replay.forget()

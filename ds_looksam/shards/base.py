"""What LookSAM asks of a DeepSpeed optimizer wrapper, a subclass for each: hand out the gradient, move the weights,
start over. The way of a gradient: wrapper -> take_gradient -> arithmetic -> give_gradient -> the wrapper's own step.

A picture of the flat tensors for two ranks (one param group, three tensors a b c, padding .)::

    rank 0: [ a a a a b b ]      rank 1: [ b b c c c . ]

b straddles the ranks, each element lives on exactly one rank, padding is zero in gradient and weights and so adds
nothing to any sum. A rank may own nothing of a group (all padding, or an empty tensor).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.distributed import Work

from ..arithmetic.eager import EAGER, Passes, Shard, squared_norm
from ..arithmetic.layout import LayerMap, Segment
from ..arithmetic.rounding import seed_for
from .watch import GradientWatch

if TYPE_CHECKING:
    from .own import OwnModel

ScaleOf = Callable[[int, int, int], Tensor]
"""(flat tensor's index, lo, hi) -> factor of the gradient in eps: fp32, 0-dim or [hi - lo]."""

Publish = Callable[[int], Work | None]
"""(flat tensor's index) -> the all-gather that has been started for it, to be waited for; None on a single rank."""


def part_norms(parts: Shard) -> list[Tensor]:
    """The norm of each part in host memory, fp32 0-dim. A foreach norm runs on one thread there."""
    return [squared_norm([part], part.device).sqrt().float() for part in parts]


def in_fp32(flat: Tensor, survives_evaluation: bool) -> Tensor:
    """A wrapper's own gradient buffer in fp32, as take_gradient has to hand it out: a copy where it must survive."""
    return flat.clone() if survives_evaluation and flat.dtype == torch.float32 else flat.to(torch.float32)


def views_of(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """``flat`` cut into pieces of these shapes. In C++: views of hundreds of parameters take Python a millisecond."""
    return list(_unflatten_dense_tensors(flat, like)) if like else []


def _values_in_model(p: Any) -> list[Tensor]:
    """The parameter; on stage 3 its partition, and the whole of one that DeepSpeed keeps gathered."""
    partition = getattr(p, "ds_tensor", None)
    return [p.data] if partition is None else [partition.data, p.data]


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO-3 has partitioned it and ``parameter.shape`` is (0,)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class GradientShards(ABC):
    """This rank's part of the gradient and of the weights, as lists of flat fp32 tensors ([numel_local] each).

    Attributes:
        process_group: the ranks over which the parts add up to the whole model; None where every rank holds it all.
        device: where the shards, and the sums over them, live.
        group_of: for each flat tensor, the index of its param group.
        passes, passes_of_model: the arithmetic on them, and on the weights that this rank's model computes with, which
            lie elsewhere with offload.
        groups: for each flat tensor the parameters that ranks have in theirs.
        whole_groups: the parameters of each param group of the optimizer, the same lists on every rank.
    """

    process_group: Any | None = None
    device: torch.device
    group_of: list[int]
    passes: Passes = EAGER
    passes_of_model: Passes = EAGER
    whole_groups: list[list[torch.nn.Parameter]]
    groups: list[list[Any]]
    wants_squared_norm: bool = False
    """True if the wrapper takes its clipping norm from buffers that hold more than this rank's part."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """The model's parameters that the base optimizer trains."""
        return [p for params in self.groups for p in params]

    def follow_changes(self, within_window: bool) -> Callable[[Shard], Shard] | None:
        """Called before gradients are taken. Where parameters were frozen, unfrozen or added since: what lays a shard
        out anew, with 0 for what is new; else None. ``within_window``: gradients of this window were taken already, so
        nothing is dropped. Only stage 0 in fp32 can: DeepSpeed's wrappers keep their partitions."""
        return None

    def hold(self, is_held: Callable[[torch.nn.Parameter], bool]) -> None:  # noqa: B027 - the others' are partitions
        """Lay shards out for these of the optimizer's parameters until :meth:`follow_changes`, whichever are trained at
        the moment: those that a checkpoint has a shard of. Only where that can."""

    @abstractmethod
    def layout(self) -> list[list[Segment]]:
        """For each flat tensor, what lies in it: segments in ascending order of ``start``, padding left out.

        Over all ranks of ``process_group`` (or on each rank, where that is None) every element of every trained
        parameter appears exactly once. Linear in this rank's tensors.
        """

    @cached_property
    def layers(self) -> LayerMap:
        """Which layer each element of the flat tensors belongs to. Built on first use, not collective."""
        return LayerMap(self.layout(), self.flat_sizes(), self.whole_groups, self.device)

    @abstractmethod
    def take_gradient(self, *, survives_evaluation: bool) -> Shard:
        """Take the window's averaged gradient out of the wrapper, which is then ready to accumulate a new one. Not
        collective.

        Args:
            survives_evaluation: these values are still needed while another evaluation writes into the wrapper's
                gradient buffers; False lets the wrapper hand out the buffers themselves.

        Returns:
            Flat fp32 gradients with the loss scale still in them. The caller owns them until give_gradient.
        """

    @abstractmethod
    def give_gradient(self, gradient: Shard) -> None:
        """Make ``gradient`` (sizes as taken) the one that the wrapper clips and hands to the base optimizer. Not
        collective."""

    def show_gradient(self, gradient: Shard) -> None:
        """Let the user find ``gradient`` where the window's is in a run without LookSAM, until it is hidden."""
        self.give_gradient(gradient)

    def hide_gradient(self, gradient: Shard) -> Shard:
        """The shown ``gradient``, which the wrapper has no longer."""
        return self.take_gradient(survives_evaluation=True)

    # Gradients that the user throws away: zero_grad() clears ``p.grad``, and DeepSpeed may have them elsewhere.

    @abstractmethod
    def zero_grad_drops(self, by_optimizer: bool, is_complete: bool) -> bool:
        """Whether the engine's zero_grad(), or the optimizer's, has thrown away all that backwards had left since the
        last update. ``is_complete``: the boundary's backward has run."""

    def gradients_are_gone(self) -> bool:
        """Whether no parameter has a gradient, where that is the only place for one (``module.zero_grad()``)."""
        return False

    @cached_property
    def watch(self) -> GradientWatch:
        """Whether the user changes the window's gradient."""
        return GradientWatch(self.parameters, self.gradient_writers)

    def gradient_writers(self) -> Iterable[tuple[Any, str]]:
        """Owner and name of DeepSpeed's functions that change the averaged gradient for the user, where it is not in
        ``p.grad``."""
        return ()

    def end_window(self) -> None:  # noqa: B027 - most wrappers have nothing to forget
        """The update is over, applied or skipped: nothing of this window's gradient may show in the next one, where
        gradient buffers outlive the step. Not collective."""

    def keep_gradient(self) -> None:  # noqa: B027 - most wrappers need nothing
        """Called instead of take_gradient and give_gradient where the update uses the averaged gradient as it is: for
        wrappers that would step with another window's where this window's loss has none. Not collective."""

    def tell_squared_norm(self, squared_norm: Tensor) -> None:  # noqa: B027 - most wrappers sum over ranks themselves
        """‖gradient‖² over the whole model, float64 0-dim, of the gradient that was given last. Called after every
        give_gradient of a SAM step; after a reuse step only where ``wants_squared_norm``."""

    def reserve_v(self, dtype: torch.dtype) -> None:  # noqa: B027 - memory needs no reservation
        """Called once, before training, with what g_v will be kept in: take the room for it that is not in memory.
        Raises OSError where there is not enough."""

    def keep_v(self, v: Shard, dtype: torch.dtype) -> Shard:
        """``v`` in ``dtype``, where the optimizer's state lives, to be read until the next call. Not collective."""
        return [part.to(dtype) for part in v]

    @abstractmethod
    def master_weights(self) -> Shard:
        """The clean master weights of this rank's part, fp32 (bf16 under ``bf16_master_weights_and_grads``). While they
        are perturbed in place, the saved copies."""

    def layer_squares(self) -> Tensor:
        """‖w_l‖² of this rank's part of every layer's master weights, float64 [L]. Not collective."""
        return self.layers.squares(self.master_weights())

    def flat_sizes(self) -> list[int]:
        """Elements of each flat tensor, padding included. Overridden where master_weights() copies."""
        return [w.numel() for w in self.master_weights()]

    def new_shard(self) -> Shard:
        """Zeros of the sizes and on the devices of this rank's gradient, padding included."""
        return [torch.zeros(numel, dtype=torch.float32, device=self.device) for numel in self.flat_sizes()]

    @abstractmethod
    def perturb_weights(self, gradient: Shard, scale_of: ScaleOf, rounding: int | None) -> Tensor:
        """Make every rank's model compute with w + eps, eps = scale * gradient formed in fp32. Collective on ZeRO.

        Args:
            rounding: as ``add_perturbation`` has it; a seed is to be another one on every rank of ``process_group``.

        Returns:
            The sums of ``add_perturbation``, float64 [3] on ``device``, this rank's part.
        """

    def _perturb_flat(self, weights: Tensor, gradient: Tensor, index: int, scale_of: ScaleOf, rounding: int | None,
                      out: Tensor, start: int = 0) -> Tensor:
        """``add_perturbation`` for the flat tensor of this index, or a piece of it from ``start`` on."""
        def scale(lo: int, hi: int) -> Tensor:
            return scale_of(index, start + lo, start + hi)

        seed = seed_for(out.dtype, rounding, index, start)
        with torch.no_grad():
            return self.passes.add_perturbation(weights, gradient, scale, out, seed).to(self.device)

    def _perturb_flats(self, weights: Shard, gradient: Shard, scale_of: ScaleOf, rounding: int | None, out: Shard,
                       publish: Publish | None = None) -> Tensor:
        """The same for every flat tensor; what it returns is summed. Each is published while the next one is formed."""
        moved = torch.zeros(3, dtype=torch.float64, device=self.device)
        under_way: list[Work | None] = []
        for i, (w, g, o) in enumerate(zip(weights, gradient, out, strict=True)):
            moved += self._perturb_flat(w, g, i, scale_of, rounding, o)
            if publish is not None:
                under_way.append(publish(i))
        for work in under_way:
            if work is not None:
                work.wait()
        return moved

    def own_model(self) -> OwnModel:
        """This rank's whole model, where it has one: stages 0 to 2."""
        raise NotImplementedError(type(self).__name__)

    def keep_model(self) -> Callable[[], None]:
        """Copy the weights that this rank's model computes with. Returns what writes them back. Not collective."""
        kept = [(p, [values.clone() for values in _values_in_model(p)]) for p in self.parameters()]

        def write_back() -> None:
            for p, copies in kept:
                for values, copy in zip(_values_in_model(p), copies, strict=True):
                    if values.shape == copy.shape:  # gathered now as it was then
                        values.copy_(copy)

        return write_back

    def unperturb_local(self) -> None:  # noqa: B027 - most steps read master weights, which were never perturbed
        """Bring back what the base optimizer's step reads. Sends nothing: that step publishes the new weights."""

    @abstractmethod
    def restore_weights(self) -> None:
        """Bring back the clean weights for good, everywhere, where no update follows that would publish them: it was
        skipped, or the replay raised. Collective on ZeRO."""

    def cast_weights(self, i: int) -> None:
        """Copy the master weights of flat tensor ``i`` into this rank's part of the model. Sends nothing. For a base
        optimizer that changes it after the wrapper has copied it, in wrappers that step one flat tensor after another.
        """
        raise NotImplementedError(type(self).__name__)

    def weights_were_written(self) -> None:  # noqa: B027 - most wrappers read weights where they are written
        """Called when something else has written to weights of the model (a frozen parameter that its forward changes):
        the next forward computes with them. Sends nothing, does not wait."""

    @abstractmethod
    def abort_evaluation(self) -> None:
        """Forget a half-done forward or backward, so that the next one starts clean. Not collective."""

"""ZeRO stage 0 in fp32: DeepSpeed leaves the bare base optimizer, weights and gradients are whole on every rank.

The gradients were averaged by the engine at the accumulation boundary, so every rank holds the same ones and LookSAM
sends nothing. Parameters of one group are handled as one flat tensor; ``p.grad`` become views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..arithmetic.eager import Shard
from ..arithmetic.layout import LayerMap, Segment
from .base import GradientShards, ScaleOf, views_of
from .own import OwnModel


class WholeShards(GradientShards):
    """Every rank holds everything: one flat tensor per param group, its parameters one after another."""

    _clean: Shard | None = None
    """The model's weights as they were, while it computes with w + eps."""

    def trained(self, within_window: bool = True) -> list[list[torch.nn.Parameter]]:
        """The parameters of each param group that are trained at the moment; ``within_window``: and those that were
        when this window's first gradient was taken."""
        return self.groups

    def layout(self) -> list[list[Segment]]:
        return [[Segment(p, lo, 0, hi - lo) for p, (lo, hi) in zip(params, _ends(params), strict=True)]
                for params in self.groups]

    def flat_sizes(self) -> list[int]:
        return [sum(p.numel() for p in params) for params in self.groups]

    def take_gradient(self, *, survives_evaluation: bool) -> Shard:
        gradient = [self._flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in params]).float()
                    for params in self.groups]
        self._clear_gradients()
        return gradient

    def give_gradient(self, gradient: Shard) -> None:
        for params, flat in zip(self.groups, gradient, strict=True):
            for p, view in zip(params, views_of(flat, params), strict=True):
                # DeepSpeed's FusedAdam goes through memory, whatever the strides: as in p, channels_last say.
                p.grad = view if p.is_contiguous() else torch.empty_like(p, dtype=view.dtype).copy_(view)

    def zero_grad_drops(self, by_optimizer: bool, is_complete: bool) -> bool:
        return True

    def gradients_are_gone(self) -> bool:
        return all(p.grad is None for p in self.parameters())

    def own_model(self) -> OwnModel:
        return OwnWholeModel(self)

    def unperturb_local(self) -> None:
        self.restore_weights()

    def restore_weights(self) -> None:
        if self._clean is not None:
            self._write_weights(self._clean)
            self._clean = None

    def abort_evaluation(self) -> None:
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        for p in self.parameters():
            p.grad = None

    def _copy_weights(self) -> Shard:
        return [self._flatten(params) for params in self.groups]

    def _write_weights(self, flats: Shard) -> None:
        for params, flat in zip(self.groups, flats, strict=True):
            if params:
                torch._foreach_copy_([p.data for p in params], views_of(flat, params))

    def _flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        if not tensors:
            return torch.empty(0, device=self.device)
        return torch.cat([t.detach().reshape(-1) for t in tensors])


class OwnWholeModel(OwnModel):
    """On stage 0 the shards are the whole model, in a tensor for each parameter. They follow what is trained, so
    nothing of theirs is kept here, and what is heard is laid out when it is taken."""

    _shards: WholeShards

    def __init__(self, shards: WholeShards) -> None:
        super().__init__(shards, [])
        self._heard: dict[torch.nn.Parameter, Tensor] = {}

    def listen(self, so_far: Shard | None = None) -> None:
        for params, flat in zip(self._shards.groups, so_far or [], strict=False):
            self._heard.update(zip(params, views_of(flat, params), strict=True))
        for p in (p for params in self._shards.trained() for p in params if p.requires_grad and p not in self._hooks):
            if p not in self._heard:
                self._heard[p] = torch.zeros(p.numel(), dtype=torch.float32, device=self._shards.device)
            self._hear(p, self._heard[p].view(-1))

    def take_gradient(self) -> Shard:
        gradient = [self._shards._flatten([self._heard[p] if p in self._heard else torch.zeros_like(p) for p in params])
                    for params in self._shards.groups]
        self.stop_listening()
        return gradient

    def stop_listening(self) -> None:
        super().stop_listening()
        self._heard = {}

    @property
    def layers(self) -> LayerMap:
        return self._shards.layers

    def layer_squares(self) -> Tensor:
        return self._shards.layer_squares()

    def perturb(self, gradient: Shard, scale_of: ScaleOf, rounding: int | None, keep_clean: bool) -> Tensor:
        return self._shards.perturb_weights(gradient, scale_of, rounding)

    def restore(self) -> None:
        self._shards.restore_weights()


class ReplicatedShards(WholeShards):
    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.device, self._optimizer = device, optimizer
        self.groups = self.trained(within_window=False)
        self.group_of = list(range(len(self.groups)))

    def trained(self, within_window: bool = True) -> list[list[torch.nn.Parameter]]:
        # A gradient that is there will be stepped with, also where its parameter was frozen since.
        kept = {p for params in self.groups for p in params} if within_window else set()
        return [[p for p in group["params"] if (p.requires_grad or p.grad is not None or p in kept) and p.numel() > 0]
                for group in self._optimizer.param_groups]

    def gradients_are_gone(self) -> bool:  # nor of those that were unfrozen since the shards were laid out
        return all(p.grad is None for group in self._optimizer.param_groups for p in group["params"])

    def follow_changes(self, within_window: bool) -> Callable[[Shard], Shard] | None:
        return self._lay_out(self.trained(within_window))

    def hold(self, is_held: Callable[[torch.nn.Parameter], bool]) -> None:
        self._lay_out([[p for p in group["params"] if is_held(p) and p.numel() > 0]
                       for group in self._optimizer.param_groups])

    def abort_evaluation(self) -> None:
        for group in self._optimizer.param_groups:  # also of those that are not in the shards at the moment
            for p in group["params"]:
                p.grad = None

    def _lay_out(self, now: list[list[torch.nn.Parameter]]) -> Callable[[Shard], Shard] | None:
        before = self.groups
        if list(map(len, before)) == list(map(len, now)) and all(
                p is q for old, new in zip(before, now, strict=True) for p, q in zip(old, new, strict=True)):
            return None
        self.groups, self.group_of = now, list(range(len(now)))
        self.whole_groups = [list(group["params"]) for group in self._optimizer.param_groups]
        self.__dict__.pop("layers", None)

        def lay_out(shard: Shard) -> Shard:
            kept = {p: part for params, flat in zip(before, shard, strict=True)
                    for p, part in zip(params, views_of(flat, params), strict=True)}
            return [self._flatten([kept[p] if p in kept else torch.zeros_like(p, dtype=shard[0].dtype)
                                   for p in params]) for params in now]

        return lay_out

    def master_weights(self) -> Shard:
        return self._clean if self._clean is not None else self._copy_weights()

    def layer_squares(self) -> Tensor:
        out = self.layers.zeros(1)[:, 0]
        for i, params in enumerate(self.groups):  # where they lie: master_weights() would copy all of them
            self.layers.add_squares_(out, [(i, *ends) for ends in _ends(params)],
                                     [p.detach().reshape(-1) for p in params])
        return out[:-1]

    def perturb_weights(self, gradient: Shard, scale_of: ScaleOf, rounding: int | None) -> Tensor:
        # The weights exist once, so a clean copy must outlive the replay: subtracting eps again would not give back the
        # same bits. w + eps is formed in place, parameter by parameter, as a factor belongs to a layer or to all of
        # them: fresh memory for it would take a CPU longer than the arithmetic.
        self._clean = self._copy_weights()
        for i, (params, flat) in enumerate(zip(self.groups, gradient, strict=True)):
            scales = [scale_of(i, lo, hi) for lo, hi in _ends(params)]
            if params:
                torch._foreach_addcmul_([p.data for p in params], views_of(flat, params), scales)
        return torch.zeros(3, dtype=torch.float64, device=self.device)


def _ends(params: list[torch.nn.Parameter]) -> Iterator[tuple[int, int]]:
    """Where each parameter begins and ends in its group's flat tensor."""
    return pairwise(accumulate((p.numel() for p in params), initial=0))

"""ZeRO stage 0 in fp32: DeepSpeed leaves the bare base optimizer, weights and gradients are whole on every rank.

The gradients were averaged by the engine at the accumulation boundary, so every rank holds the same ones and LookSAM
sends nothing. Parameters of one group are handled as one flat tensor; ``p.grad`` become views of it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..algebra import Shard
from .base import GradientShards, ScaleOf, Segment


class WholeShards(GradientShards):
    """Every rank holds everything: one flat tensor per param group, its parameters one after another."""

    _groups: list[list[torch.nn.Parameter]]

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for params in self._groups for p in params]

    def layout(self) -> list[list[Segment]]:
        flats = []
        for params in self._groups:
            start, segments = 0, []
            for p in params:
                segments.append(Segment(p, start, 0, p.numel(), p.numel()))
                start += p.numel()
            flats.append(segments)
        return flats

    def flat_sizes(self) -> list[int]:
        return [sum(p.numel() for p in params) for params in self._groups]


class ReplicatedShards(WholeShards):
    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.process_group: Any | None = None
        self.device = device
        self._groups = [[p for p in group["params"] if p.requires_grad and p.numel() > 0]
                        for group in optimizer.param_groups]
        self.group_of = list(range(len(self._groups)))
        self._clean: Shard | None = None

    def take_gradient(self, *, survives_evaluation: bool) -> Shard:
        gradient = [self._flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
                    for params in self._groups]
        for params in self._groups:
            for p in params:
                p.grad = None
        return gradient

    def give_gradient(self, gradient: Shard) -> None:
        for params, flat in zip(self._groups, gradient, strict=True):
            for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.grad = part.view_as(p)

    def master_weights(self) -> Shard:
        return self._clean if self._clean is not None else self._copy_weights()

    def perturb_weights(self, gradient: Shard, scale_of: ScaleOf) -> torch.Tensor:
        # The weights exist once, so a clean copy must outlive the replay: subtracting eps again would not give
        # back the same bits.
        self._clean = self._copy_weights()
        perturbed = [torch.empty_like(flat) for flat in self._clean]
        moved = self._perturb_flats(self._clean, gradient, scale_of, perturbed)
        for params, flat in zip(self._groups, perturbed, strict=True):
            self._write(params, flat)
        return moved

    def unperturb_local(self) -> None:
        self.restore_weights()

    def restore_weights(self) -> None:
        if self._clean is not None:
            for params, flat in zip(self._groups, self._clean, strict=True):
                self._write(params, flat)
            self._clean = None

    def abort_evaluation(self) -> None:
        for params in self._groups:
            for p in params:
                p.grad = None

    def _copy_weights(self) -> Shard:
        return [self._flatten(list(params)) for params in self._groups]

    def _flatten(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        if not tensors:
            return torch.empty(0, device=self.device)
        return torch.cat([t.detach().reshape(-1) for t in tensors])

    @staticmethod
    def _write(params: list[torch.nn.Parameter], flat: torch.Tensor) -> None:
        parts = [part.view_as(p) for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True)]
        if parts:
            torch._foreach_copy_([p.data for p in params], parts)

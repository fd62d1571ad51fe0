"""What one rank has for itself on stages 0 to 2: the whole model, and the gradient of its own examples.

For the JSON key ``ascent``: a perturbation that one rank's examples decide moves that rank's model alone, by the
gradient as it was before DeepSpeed reduced it (a picture is in docs/inside.md). Nothing here is collective.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..arithmetic.eager import Shard
from ..arithmetic.layout import LayerMap, Segment
from ..arithmetic.rounding import seed_for
from .base import GradientShards, ScaleOf


class OwnModel:
    """The model's weights in flat tensors of which the parameters are views: stages 1 and 2. ``wholes``: one for each
    param group, [numel of the whole group, padding included]."""

    def __init__(self, shards: GradientShards, wholes: Shard) -> None:
        self._shards, self._wholes = shards, wholes
        self._gradient: Shard | None = None
        self._hooks: dict[torch.nn.Parameter, tuple[Any, Any]] = {}
        self._clean: Shard | None = None

    # The gradient -----------------------------------------------------------------------------------------------------

    def listen(self, so_far: Shard | None = None) -> None:
        """From here to :meth:`take_gradient` the gradient of every backward is added up, to ``so_far`` if given.

        It is heard where it is about to be accumulated in p.grad: after every hook of the user's on the tensor, before
        DeepSpeed's, which reduce it, and not at all when torch.autograd.grad takes it (a gradient penalty). To be
        called before each forward and backward: parameters may have been unfrozen since.
        """
        if self._gradient is None:
            self._gradient = so_far if so_far is not None else [torch.zeros_like(flat) for flat in self._flats]
        for flat, segments in zip(self._gradient, self.layout, strict=True):
            for s in segments:
                if s.parameter.requires_grad and s.parameter not in self._hooks:
                    self._hear(s.parameter, flat[s.start:s.start + s.numel])

    def _hear(self, parameter: torch.nn.Parameter, total: Tensor) -> None:
        def add(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                total.add_(gradients[0].detach().reshape(-1))

        node = get_gradient_edge(parameter).node  # kept: torch keeps none that only its tensor knows
        self._hooks[parameter] = node.register_prehook(add), node

    @property
    def is_listening(self) -> bool:
        return bool(self._hooks)

    def take_gradient(self) -> Shard:
        """What was heard since :meth:`listen`, in the model's dtype and with the loss scale in it."""
        gradient = self._gradient
        assert gradient is not None, "listen() comes first"
        self.stop_listening()
        return gradient

    def stop_listening(self) -> None:
        for hook, _ in self._hooks.values():
            hook.remove()
        self._hooks, self._gradient = {}, None

    # The weights ------------------------------------------------------------------------------------------------------

    @property
    def _flats(self) -> Shard:
        return [flat.detach() for flat in self._wholes]

    @cached_property
    def layout(self) -> list[list[Segment]]:
        """For each flat tensor what lies in it, in ascending order."""
        layout = []
        for flat, params in zip(self._flats, self._shards.groups, strict=True):
            starts = {(p.data_ptr() - flat.data_ptr()) // flat.element_size(): p for p in params if p.numel() > 0}
            layout.append([Segment(p, start, 0, p.numel()) for start, p in sorted(starts.items())])
        return layout

    @cached_property
    def layers(self) -> LayerMap:
        sizes = [flat.numel() for flat in self._flats]
        return LayerMap(self.layout, sizes, self._shards.whole_groups, self._flats[0].device)

    def layer_squares(self) -> Tensor:
        """‖w_l‖² of every layer, float64 [L]."""
        return self.layers.squares(self._flats)

    def squared_norm(self, gradient: Shard) -> Tensor:
        return self._shards.passes_of_model.squared_norm(gradient, gradient[0].device)

    def perturb(self, gradient: Shard, scale_of: ScaleOf, rounding: int | None, keep_clean: bool) -> Tensor:
        """w <- w + scale * gradient, in the model's dtype. Returns the sums of :func:`add_perturbation`, float64 [3].
        ``keep_clean``: :meth:`restore` will be called. Otherwise whoever publishes the weights overwrites them."""
        flats = self._flats
        if keep_clean:
            self._clean = [flat.clone() for flat in flats]
        moved = torch.zeros(3, dtype=torch.float64, device=flats[0].device)
        with torch.no_grad():
            for i, (w, g) in enumerate(zip(flats, gradient, strict=True)):
                if w.numel() > 0:
                    seed = seed_for(w.dtype, rounding, i)
                    moved += self._shards.passes_of_model.add_perturbation(w, g, partial(scale_of, i), w, seed)
        return moved

    def restore(self) -> None:
        """Copy back what was kept."""
        for flat, clean in zip(self._flats, self._clean or [], strict=False):
            flat.copy_(clean)
        self._clean = None

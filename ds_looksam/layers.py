"""Which layer each element of this rank's shards belongs to, and the layer-wise perturbation built on it.

A *layer* is one parameter tensor, numbered 0 .. L-1 in the order of the optimizer's param groups, which is the same on
every rank. A rank holds pieces of some layers, anywhere in its flat tensors, and padding that belongs to none::

    rank 0: [ a a a a b b ]      rank 1: [ b b c c c . ]        layers a b c = 0 1 2
    rank 0: squares = [‖a‖², ‖first part of b‖², 0]             rank 1: [0, ‖rest of b‖², ‖c‖²]

The two add up to the squares of the whole layers, in one all-reduce of L numbers however many ranks share them.

Sums over pieces are ``torch._foreach_norm`` over views on a GPU, a fixed number of kernels whatever the number of
layers, and dot products on a CPU. ``benchmarks/segment_sums.py`` compares them with segment_reduce and index_add.

Source of the layer-wise rule: Liu, Mai, Chen, Hsieh, You, CVPR 2022 (arXiv 2203.02714), Look-LayerSAM; its direction is
that of LARS and LAMB. Which global scalar divides it could not be checked: see :func:`perturbation_scales`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .algebra import Shard, chunk_size, chunks
from .config import LayerScale
from .shards.base import Segment

Range = tuple[int, int, int]
"""Elements lo to hi of flat tensor i: (i, lo, hi)."""


class LayerMap:
    """The pieces of layers in this rank's flat tensors.

    Args:
        layout: for each flat tensor its segments in ascending order of ``start``, as GradientShards.layout gives them.
        sizes: for each flat tensor its number of elements, padding included.
        groups: the parameters of each param group of the optimizer, the same lists on every rank.
        device: where the flat tensors live.

    Attributes:
        count: L, the number of layers of the whole model.
        group_of_layer: int64 [L], each layer's param group.
    """

    def __init__(self, layout: Sequence[Sequence[Segment]], sizes: Sequence[int],
                 groups: Sequence[Sequence[nn.Parameter]], device: torch.device) -> None:
        number = {id(p): i for i, p in enumerate(p for group in groups for p in group)}
        self.count = len(number)
        self.device = device
        self.group_of_layer = torch.tensor([i for i, group in enumerate(groups) for _ in group], dtype=torch.int64,
                                           device=device)
        self._starts: list[list[int]] = []
        self._layers: list[list[int]] = []
        for segments, size in zip(layout, sizes, strict=True):
            starts, layers, end = [], [], 0
            for segment in segments:
                if segment.start > end:
                    starts.append(end)
                    layers.append(self.count)
                starts.append(segment.start)
                layers.append(number[id(segment.parameter)])
                end = segment.start + segment.numel
            if size > end:
                starts.append(end)
                layers.append(self.count)
            self._starts.append(starts)
            self._layers.append(layers)
        self._cached: dict[tuple[int, int, int], tuple[list[int], list[int], Tensor, Tensor]] = {}

    def zeros(self, columns: int) -> Tensor:
        """float64 [L + 1, columns] for :meth:`add_squares_`; the last row collects padding and is to be ignored."""
        return torch.zeros(self.count + 1, columns, dtype=torch.float64, device=self.device)

    def add_squares_(self, out: Tensor, ranges: Sequence[Range], x: Sequence[Tensor]) -> None:
        """Add the squared norms of the pieces of ``x`` to ``out``.

        Args:
            out: float64 [L + 1].
            ranges: for each of ``x`` which flat tensor, from which element to which.
            x: fp32 [hi - lo] each.
        """
        views: list[Tensor] = []
        numbers: list[int] = []
        on_device: list[Tensor] = []
        for (i, lo, hi), part in zip(ranges, x, strict=True):
            if hi > lo:
                lengths, layers, layers_on_device, _ = self._pieces(i, lo, hi)
                views += part.split(lengths)
                numbers += layers
                on_device.append(layers_on_device)
        if not views:
            return
        if views[0].device.type == "cpu":
            # In pieces that a sum in fp32 is exact enough for (algebra.CHUNK_CPU). A foreach norm runs on one thread,
            # adds up one element after the other, and so would have to do it in float64.
            step = chunk_size(views[0].device)
            pieces = [[view] if view.numel() <= step else view.split(step) for view in views]
            squares = torch.stack([torch.dot(piece, piece) for parts in pieces for piece in parts])
            index = torch.tensor([layer for layer, parts in zip(numbers, pieces, strict=True) for _ in parts])
        else:
            squares = torch.stack(torch._foreach_norm(views)).square()
            index = torch.cat(on_device)
        out.index_add_(0, index, squares.double())

    def squares(self, shard: Shard) -> Tensor:
        """The squared norms of this rank's part of every layer: float64 [L]."""
        out = self.zeros(1)[:, 0]
        for i, flat in enumerate(shard):
            at_once = flat.numel() if flat.dtype == torch.float32 else chunk_size(flat.device)
            for lo, hi in chunks(flat.numel(), max(1, at_once)):
                self.add_squares_(out, [(i, lo, hi)], [flat[lo:hi].float()])
        return out[:-1]

    def expand(self, values: Tensor, i: int, lo: int, hi: int) -> Tensor:
        """Each element's value of its layer, for elements ``lo`` to ``hi`` of flat tensor ``i``.

        Args:
            values: [L + 1]; the last is the padding's.

        Returns:
            [hi - lo], or 0-dim where all of them belong to one layer.
        """
        lengths, layers, layers_on_device, lengths_on_device = self._pieces(i, lo, hi)
        if len(layers) == 1:
            return values[layers[0]]
        mine = values[layers_on_device]
        if values.device.type == "cpu":
            return torch.repeat_interleave(mine, lengths_on_device, output_size=hi - lo)
        # On a GPU concatenating takes half the time of repeating.
        return torch.cat([value.expand(length) for value, length in zip(mine.unbind(), lengths, strict=True)])

    def _pieces(self, i: int, lo: int, hi: int) -> tuple[list[int], list[int], Tensor, Tensor]:
        """Lengths and layers, as lists and on the device. Cached: chunks are the same ones in every step."""
        key = (i, lo, hi)
        if key not in self._cached:
            starts = self._starts[i]
            first, last = bisect_right(starts, lo) - 1, bisect_left(starts, hi)
            bounds = [lo, *starts[first + 1:last], hi]
            lengths = [end - start for start, end in pairwise(bounds)]
            layers = self._layers[i][first:last]
            self._cached[key] = (lengths, layers, torch.tensor(layers, device=self.device),
                                 torch.tensor(lengths, device=self.device))
        return self._cached[key]


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
    scales = (rho * ratio / (s * loss_scale)).float()
    scales = torch.where(torch.isfinite(scales), scales, torch.zeros_like(scales))
    return torch.cat([scales, scales.new_zeros(1)])

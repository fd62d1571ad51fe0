"""Which layer each element of this rank's shards belongs to, and sums over layers.

A *layer* is one parameter tensor, numbered 0 .. L-1 in the order of the optimizer's param groups, which is the same on
every rank. A rank holds pieces of some layers, anywhere in its flat tensors, and padding that belongs to none; the
ranks' squares add up to those of whole layers, in one all-reduce of L numbers::

    rank 0: [ a a a a b b ]      rank 1: [ b b c c c . ]        layers a b c = 0 1 2
    rank 0: squares = [‖a‖², ‖first part of b‖², 0]             rank 1: [0, ‖rest of b‖², ‖c‖²]

Sums over pieces are ``torch.segment_reduce`` on a GPU, and dot products on a CPU: ``benchmarks/segment_sums.py``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .eager import Shard, chunk_size, chunks

Range = tuple[int, int, int]
"""Elements lo to hi of flat tensor i: (i, lo, hi)."""

CUT_DEVICE = 1 << 16
"""Elements that one sum on an accelerator goes over: segment_reduce gives each to one of its many processors."""


@dataclass(frozen=True)
class Segment:
    """A run of elements of one parameter inside one of this rank's flat tensors.

    ``parameter[param_offset : param_offset + numel]`` (flattened, row-major) lies at ``flat[start : start + numel]``.
    """

    parameter: torch.nn.Parameter
    start: int
    param_offset: int
    numel: int


@dataclass(frozen=True)
class Pieces:
    """What lies in a range: consecutive pieces, each of one layer, and these cut into what is summed at once:
    ``lengths`` and ``layers`` of the pieces, and the lengths of all ``cuts``. On the device, int64: the same, and
    ``parts``, into how many each piece is cut."""

    lengths: list[int]
    layers: list[int]
    cuts: list[int]
    lengths_on_device: Tensor
    layers_on_device: Tensor
    cuts_on_device: Tensor
    parts: Tensor


class LayerMap:
    """The pieces of layers in this rank's flat tensors.

    Args:
        layout: for each flat tensor its segments in ascending order of ``start``, as GradientShards.layout gives them.
        sizes: for each flat tensor its number of elements, padding included.
        groups: the parameters of each param group of the optimizer, the same lists on every rank.

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
        self._cached: dict[Range, Pieces] = {}

    def zeros(self, columns: int) -> Tensor:
        """float64 [L + 1, columns] for :meth:`add_squares_`; the last row collects padding and is to be ignored."""
        return torch.zeros(self.count + 1, columns, dtype=torch.float64, device=self.device)

    def add_squares_(self, out: Tensor, ranges: Sequence[Range], x: Sequence[Tensor]) -> None:
        """Add the squared norms of the pieces of ``x`` to ``out``.

        Args:
            out: float64 [L + 1].
            ranges: for each of ``x`` which flat tensor, from which element to which.
            x: [hi - lo] each, in any dtype; added up in fp32. On a GPU with a temporary of all their sizes.
        """
        there = [(self._pieces(r), part) for r, part in zip(ranges, x, strict=True) if part.numel() > 0]
        if not there:
            return
        # Without "unsafe" segment_reduce checks the lengths, and waits for the device to do so.
        if self.device.type == "cpu":  # a foreach norm runs on one thread, and adds up one element after the other
            views = (view.float() for pieces, part in there for view in part.split(pieces.cuts))
            squares = torch.stack([torch.dot(view, view) for view in views])
        else:
            whole = there[0][1] if len(there) == 1 else torch.cat([part for _, part in there])
            cuts = torch.cat([pieces.cuts_on_device for pieces, _ in there])
            squares = torch.segment_reduce(whole.float().square(), "sum", lengths=cuts, unsafe=True)
        # Added up piece by piece first: index_add_ takes what goes to one layer in any order on a GPU.
        parts = torch.cat([pieces.parts for pieces, _ in there])
        sums = torch.segment_reduce(squares.double(), "sum", lengths=parts, unsafe=True)
        out.index_add_(0, torch.cat([pieces.layers_on_device for pieces, _ in there]), sums)

    def squares(self, shard: Shard) -> Tensor:
        """The squared norms of this rank's part of every layer: float64 [L]. Of flat tensors in any dtype."""
        out = self.zeros(1)[:, 0]
        for i, flat in enumerate(shard):
            # Chunks bound the temporary of its size; on a CPU add_squares_ has none.
            for lo, hi in chunks(flat.numel(), max(flat.numel(), 1) if flat.is_cpu else chunk_size(flat.device)):
                self.add_squares_(out, [(i, lo, hi)], [flat[lo:hi]])
        return out[:-1]

    def expand(self, values: Tensor, i: int, lo: int, hi: int) -> Tensor:
        """Each element's value of its layer, for elements ``lo`` to ``hi`` of flat tensor ``i``.

        Args:
            values: [L + 1]; the last is the padding's.

        Returns:
            [hi - lo], or 0-dim where all of them belong to one layer.
        """
        pieces = self._pieces((i, lo, hi))
        if len(pieces.layers) == 1:
            return values[pieces.layers[0]]
        mine = values[pieces.layers_on_device]
        if values.device.type == "cpu":
            return torch.repeat_interleave(mine, pieces.lengths_on_device, output_size=hi - lo)
        # On a GPU concatenating takes half the time of repeating.
        return torch.cat([value.expand(length) for value, length in zip(mine.unbind(), pieces.lengths, strict=True)])

    def _pieces(self, where: Range) -> Pieces:
        """Cached: chunks are the same ones in every step."""
        if where not in self._cached:
            i, lo, hi = where
            starts = self._starts[i]
            first, last = bisect_right(starts, lo) - 1, bisect_left(starts, hi)
            lengths = [end - start for start, end in pairwise([lo, *starts[first + 1:last], hi])]
            layers = self._layers[i][first:last]
            # What a sum in fp32 is exact enough for (eager.CHUNK_CPU).
            most = chunk_size(self.device) if self.device.type == "cpu" else CUT_DEVICE
            cuts = [[b - a for a, b in chunks(length, most)] for length in lengths]
            flat_cuts = [cut for of_piece in cuts for cut in of_piece]
            on_device = [torch.tensor(x, device=self.device)
                         for x in (lengths, layers, flat_cuts, [len(of_piece) for of_piece in cuts])]
            self._cached[where] = Pieces(lengths, layers, flat_cuts, *on_device)
        return self._cached[where]

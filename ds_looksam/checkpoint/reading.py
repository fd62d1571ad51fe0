"""Which elements of g_v lie where: in this rank's flat tensors, and in the rank files of a checkpoint.

At the world size and stage that saved, a rank reads its own file and no other. Otherwise the ranks share out the work
of reading the files' headers, tell each other which ranges lie where, and each reads the blocks that overlap its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed import comm as dist

from ..arithmetic.eager import Shard
from ..errors import LookSAMCheckpointError
from ..ranks.agree import from_all_ranks, on_all_ranks, together
from ..shards import GradientShards, full_shape
from .files import Manifest, Range, RankFile

Stored = dict[str, list[tuple[int, int, int]]]
"""By parameter: which elements [lo, hi) lie in the file of which number."""


@dataclass
class NamedLayout:
    """Which parameters LookSAM trains, by name, and where this rank's elements of them lie in its flat tensors."""

    shapes: dict[str, list[int]]
    layout: list[list[tuple[int, Range]]]
    """For each flat tensor: (start, range of a parameter that lies there)."""

    @classmethod
    def of(cls, module: torch.nn.Module, shards: GradientShards) -> NamedLayout:
        names = names_of(module)
        unnamed = [p for p in shards.parameters() if id(p) not in names]
        if unnamed:
            raise LookSAMCheckpointError(
                f"a parameter of shape {full_shape(unnamed[0])} is optimized but is no parameter of the model, so its "
                "part of LookSAM's state has no name to be saved or loaded by")
        layout = [[(s.start, Range(names[id(s.parameter)], s.param_offset, s.param_offset + s.numel))
                   for s in segments] for segments in shards.layout()]
        return cls({names[id(p)]: list(full_shape(p)) for p in shards.parameters()}, layout)


def names_of(module: torch.nn.Module) -> dict[int, str]:
    """The name of each parameter by its id; the first of several."""
    return {id(p): name for name, p in reversed(list(module.named_parameters(remove_duplicate=False)))}


def read_own_part(folder: Path, manifest: Manifest, here: NamedLayout, shards: GradientShards, device: torch.device,
                  where: str) -> Shard:
    """This rank's elements of g_v, out of the files that ``manifest`` speaks of. Collective. Raises
    LookSAMCheckpointError: on every rank, beginning with ``where``."""
    group = shards.process_group
    rank = 0 if group is None else dist.get_rank(group=group)

    def headers(numbers: Iterable[int]) -> list[tuple[str, int, int, int]]:
        return [(part.name, part.lo, part.hi, i) for i in numbers if i < manifest.files
                for part in RankFile(folder, i, manifest.save_id).ranges]

    stored = _by_name(together(lambda: headers([rank]), device, where))
    is_here = all(sum(last - first for *_, first, last in _overlaps(stored, part)) == part.hi - part.lo
                  for segments in here.layout for _, part in segments)
    if not on_all_ranks(is_here, device):
        shared_out = range(dist.get_rank(), manifest.files, dist.get_world_size())
        everywhere = from_all_ranks(together(lambda: headers(shared_out), device, where))
        stored = _by_name(range_ for of_rank in everywhere for range_ in of_rank)
    return together(lambda: _read(folder, manifest, stored, here, shards.new_shard()), device, where)


def _by_name(ranges: Iterable[tuple[str, int, int, int]]) -> Stored:
    stored: Stored = {}
    for name, lo, hi, file in ranges:
        stored.setdefault(name, []).append((lo, hi, file))
    return stored


def _overlaps(stored: Stored, wanted: Range) -> Iterator[tuple[Range, int, int, int]]:
    """Each stored range that has elements of ``wanted``, the number of its file, and which elements [first, last)."""
    for lo, hi, file in stored.get(wanted.name, []):
        first, last = max(lo, wanted.lo), min(hi, wanted.hi)
        if first < last:
            yield Range(wanted.name, lo, hi), file, first, last


def _read(folder: Path, manifest: Manifest, stored: Stored, here: NamedLayout, v: Shard) -> Shard:
    """Fill this rank's flat tensors from the files' blocks; what is no parameter's element stays as it is."""
    files: dict[int, RankFile] = {}
    for flat, segments in zip(v, here.layout, strict=True):
        for start, part in segments:
            missing = part.hi - part.lo
            for block, i, first, last in _overlaps(stored, part):
                if i not in files:
                    files[i] = RankFile(folder, i, manifest.save_id)
                elements = files[i].read(block)[first - block.lo:last - block.lo]
                flat[start + first - part.lo:start + last - part.lo].copy_(elements)
                missing -= last - first
            if missing != 0:
                raise LookSAMCheckpointError(f"{folder}: the files do not hold every element of {part.key} once")
    return v

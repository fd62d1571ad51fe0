"""Which elements of g_v lie where: in this rank's flat tensors, and in the rank files of a checkpoint.

At the world size and stage that saved, a rank reads its own file and no other. Otherwise the ranks share out the work
of reading the files' headers, tell each other which ranges lie where, and each reads the blocks that overlap its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from ..arithmetic.eager import Shard
from ..errors import LookSAMCheckpointError
from ..ranks.agree import on_all_ranks, together
from ..shards import GradientShards, full_shape
from .files import Manifest, Range, RankFile


@dataclass
class NamedLayout:
    """Which parameters LookSAM trains, by name, and where this rank's elements of them lie in its flat tensors."""

    shapes: dict[str, list[int]]
    layout: list[list[tuple[int, Range]]]
    """For each flat tensor: (start, range of a parameter that lies there)."""

    @classmethod
    def of(cls, module: torch.nn.Module, shards: GradientShards) -> NamedLayout:
        names = {id(p): name for name, p in reversed(list(module.named_parameters(remove_duplicate=False)))}
        unnamed = [p for p in shards.parameters() if id(p) not in names]
        if unnamed:
            raise LookSAMCheckpointError(
                f"a parameter of shape {full_shape(unnamed[0])} is optimized but is no parameter of the model, so its "
                "part of LookSAM's state has no name to be saved or loaded by")
        layout = [[(s.start, Range(names[id(s.parameter)], s.param_offset, s.param_offset + s.numel))
                   for s in segments] for segments in shards.layout()]
        return cls({names[id(p)]: list(full_shape(p)) for p in shards.parameters()}, layout)


def read_own_part(folder: Path, manifest: Manifest, here: NamedLayout, shards: GradientShards, device: torch.device,
                  where: str) -> Shard:
    """This rank's elements of g_v, out of the files that ``manifest`` speaks of. Collective.

    Raises:
        LookSAMCheckpointError: on every rank, beginning with ``where``.
    """
    group = shards.process_group
    rank = 0 if group is None else dist.get_rank(group=group)
    wanted = {part for segments in here.layout for _, part in segments}
    own = together(lambda: RankFile(folder, rank, manifest.save_id) if rank < manifest.files else None, device, where)
    if on_all_ranks(own is not None and _covers(own.ranges, wanted), device):
        stored = {part: rank for part in own.ranges} if own is not None else {}
    else:
        stored = _index_of_all_files(folder, manifest, device, where)
    return together(lambda: _read(folder, manifest, stored, here, shards.new_shard()), device, where)


def _covers(ranges: list[Range], wanted: set[Range]) -> bool:
    """Whether every range of ``wanted`` is made up of ``ranges``, which may be cut into blocks."""
    by_name = _by_name({part: 0 for part in ranges})
    return all(sum(min(hi, part.hi) - max(lo, part.lo) for lo, hi, _ in by_name.get(part.name, [])
                   if lo < part.hi and hi > part.lo) == part.hi - part.lo for part in wanted)


def _by_name(stored: dict[Range, int]) -> dict[str, list[tuple[int, int, int]]]:
    by_name: dict[str, list[tuple[int, int, int]]] = {}
    for part, file in stored.items():
        by_name.setdefault(part.name, []).append((part.lo, part.hi, file))
    return by_name


def _index_of_all_files(folder: Path, manifest: Manifest, device: torch.device, where: str) -> dict[Range, int]:
    """Range -> number of the file it lies in, over all files. Collective; a rank reads every world-size-th header."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def headers() -> list[tuple[str, int]]:
        return [(part.key, i) for i in range(rank, manifest.files, world)
                for part in RankFile(folder, i, manifest.save_id).ranges]

    mine = together(headers, device, where)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, mine)
    return {Range.from_key(key, folder): i for part in gathered for key, i in part}


def _read(folder: Path, manifest: Manifest, stored: dict[Range, int], here: NamedLayout, v: Shard) -> Shard:
    """Fill this rank's flat tensors from the files' blocks; what is no parameter's element stays as it is."""
    by_name, files = _by_name(stored), dict[int, RankFile]()
    for flat, segments in zip(v, here.layout, strict=True):
        for start, part in segments:
            missing = part.hi - part.lo
            for lo, hi, i in by_name.get(part.name, []):
                first, last = max(lo, part.lo), min(hi, part.hi)
                if first < last:
                    if i not in files:
                        files[i] = RankFile(folder, i, manifest.save_id)
                    elements = files[i].read(Range(part.name, lo, hi))[first - lo:last - lo]
                    flat[start + first - part.lo:start + last - part.lo].copy_(elements)
                    missing -= last - first
            if missing != 0:
                raise LookSAMCheckpointError(f"{folder}: the files do not hold every element of {part.key} once")
    return v

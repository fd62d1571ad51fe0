"""What may grow with the world size, and why: collectives, bytes and memory of one rank in bf16, by ZeRO stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.collectives import Collective

WIDTH = 2  # bytes of a weight or gradient in bf16
PERSISTENT = 100_000  # DeepSpeed's default "stage3_param_persistence_threshold"
SCALARS = 256
"""Bytes: an all-reduce that carries at most this many carries scalars."""
SMALL_THINGS = 30_000
"""Bytes that no formula explains: a batch, the states of random number generators, scalars."""

# Buckets that fit in memory beside the model; stage 3 keeps nothing gathered but what is persistent, so that it gathers
# every other parameter for the forward and again for the backward.
_BUCKETS: dict[str, Any] = {"reduce_bucket_size": 120_000_000, "allgather_bucket_size": 120_000_000}
ZERO: dict[int, dict[str, Any]] = {
    0: {}, 1: _BUCKETS, 2: _BUCKETS,
    3: {"reduce_bucket_size": 120_000_000, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0,
        "stage3_param_persistence_threshold": PERSISTENT},
}


def padded(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


def bulk(collectives: Iterable[Collective]) -> dict[str, int]:
    """Bytes by kind, without scalars."""
    sums: Counter[str] = Counter()
    for c in collectives:
        if not ((c.kind == "allreduce" and c.nbytes <= SCALARS) or c.kind == "broadcast"):
            sums[c.kind] += c.nbytes
    return dict(sums)


@dataclass(frozen=True)
class Formulas:
    """Of a rank of ``world``, one micro-batch an update. ``shapes``: elements of each parameter tensor. ``uses``: the
    same, but a tensor that several modules share as often as it is used. ``ascent``: the JSON key."""

    stage: int
    world: int
    shapes: list[int]
    uses: list[int]
    ascent: str = "global"

    @property
    def numel(self) -> int:
        return sum(self.shapes)

    @property
    def owned(self) -> int:
        """Elements of this rank's shard, padding included: stages 1 and 2 pad the whole model to a multiple of twice
        the world size (NCCL's alignment), stage 3 each tensor to a multiple of the world size."""
        if self.stage == 0:
            return self.numel
        if self.stage == 3:
            return sum(padded(n, self.world) for n in self.shapes) // self.world
        return padded(self.numel, 2 * self.world) // self.world

    # Traffic: payloads in bytes, of an all-gather what comes out, of a reduce-scatter what goes in.

    def evaluation(self) -> dict[str, int]:
        if self.stage < 3:
            return {"allreduce": WIDTH * self.numel}
        gathered = sum(padded(n, self.world) for n in self.uses if n > PERSISTENT) if self.world > 1 else 0
        return _positive({"allgather_base": 2 * WIDTH * gathered,
                          "reduce_scatter_base": WIDTH * self.owned * self.world})

    def update(self) -> dict[str, int]:
        """Every new weight is published; on stage 3 those that stay gathered are."""
        if self.stage == 0 or self.world == 1:
            return {}
        if self.stage == 3:
            return _positive({"allgather_base": WIDTH * sum(padded(n, self.world) for n in self.shapes
                                                            if n <= PERSISTENT)})
        return {"allgather_base": WIDTH * self.owned * self.world}

    def reuse_adds(self) -> Counter[Collective]:
        """‖g‖² and ‖v‖²."""
        return Counter() if self._sends_nothing() else Counter([self._scalars(2)])

    def sam_adds(self, base_update: list[Collective]) -> Counter[Collective]:
        """Beside another evaluation: w + eps is published as the base publishes w, but on stage 3 in one all-gather,
        unless it is this rank's own; so is w again where the update is still to come ("global_micro_batch"). 2 scalars
        before, 8 after, with ‖g‖² and ‖v‖² 10 where those before were of a micro-batch. On stage 0 every rank knows all
        but by how much the others' own weights moved, and their losses: 4. And a flag: whether all ranks can evaluate
        the window again; for each micro-batch that is evaluated by itself another one."""
        publication = Counter(c for c in base_update if c.kind == "allgather_base")
        if self.stage == 3 and publication:
            nbytes = sum(c.nbytes * count for c, count in publication.items())
            publication = Counter([Collective("allgather_base", nbytes, self.world)])
        by_itself = self.ascent in ("micro_batch", "global_micro_batch")
        flags = Counter([self._scalars(1)] * (1 + by_itself if self.world > 1 else 0))
        if self._sends_nothing():
            return flags + Counter([self._scalars(4)] if self.world > 1 and self._is_own() else [])
        if self._is_own():
            publication = Counter()
        elif self.ascent == "global_micro_batch":
            publication += publication
        return publication + flags + Counter([self._scalars(2), self._scalars(10 if by_itself else 8)])

    def _is_own(self) -> bool:
        return self.ascent in ("rank", "micro_batch")

    def _sends_nothing(self) -> bool:
        return self.stage == 0 or self.world == 1

    def _scalars(self, count: int) -> Collective:
        return Collective("allreduce", 8 * count, self.world)

    # Memory, in bytes.

    def persistent(self) -> int:
        """g_v in fp32."""
        return 4 * self.owned

    def replay(self) -> int:
        """g_v and g; on stage 0 the clean bf16 weights too. A rank's own gradient is in bf16, in fp32 on stage 0; per
        micro-batch the clean weights are kept."""
        whole = self.owned * (self.world if self.stage else 1)
        own = whole * (WIDTH if self.stage else 4) if self._is_own() else 0
        clean = WIDTH * whole if self.stage == 0 or self.ascent == "micro_batch" else 0
        return 8 * self.owned + own + clean

    def peak(self) -> int:
        """Roughly, of the whole process: bf16 weights, gradients and a copy of either, fp32 master and AdamW's two
        moments, their transient fp32 gradient, a bucket or two, and LookSAM's part."""
        whole = self.numel * WIDTH * (4 if self.stage == 0 else 3)
        own = 2 * WIDTH * self.numel if self._is_own() else 0
        return whole + self.owned * (4 * 4 + 8) + 2 * WIDTH * min(self.numel, 120_000_000) + own


def _positive(sums: dict[str, int]) -> dict[str, int]:
    return {kind: nbytes for kind, nbytes in sums.items() if nbytes}

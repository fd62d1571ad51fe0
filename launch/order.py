"""Which rank sees which samples, when. Pure functions of seed and position: all a resumed run needs is a number."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainingOrder:
    """Each epoch is a permutation of the samples, cut into global batches; what does not fill one is left out.

    The j-th global batch of an epoch holds the same samples for any number of ranks and any accumulation.
    """

    samples: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < self.global_batch:
            raise ValueError(f"train_batch_size {self.global_batch} is more than the {self.samples} training images")

    @property
    def updates_per_epoch(self) -> int:
        return self.samples // self.global_batch

    def micro_batches(self, update: int) -> list[list[int]]:
        """The index lists of this rank from update number ``update`` (counted from 0) to the end of its epoch."""
        epoch, first = divmod(update, self.updates_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.samples, generator=generator)[:self.updates_per_epoch * self.global_batch]
        by_rank = order.view(self.updates_per_epoch, -1, self.world_size, self.micro_batch)
        return by_rank[first:, :, self.rank].reshape(-1, self.micro_batch).tolist()


def evaluation_shard(samples: int, rank: int, world_size: int, batch: int) -> tuple[list[list[int]], int]:
    """Every sample once over all ranks.

    Returns:
        This rank's index lists, as many and as long as every other rank's: under ZeRO-3 each forward is collective, a
        rank with fewer would leave the others waiting. So the last index may be a filler; and how many are none.
    """
    mine = list(range(rank, samples, world_size))
    padded = mine + [0] * (-(-samples // world_size) - len(mine))
    return [padded[i:i + batch] for i in range(0, len(padded), batch)], len(mine)

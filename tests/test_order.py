"""launch/order.py: every sample once, the same global batches on any layout, and after a resume the rest of the run."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from order import TrainingOrder, evaluation_shard


def global_batches(order: TrainingOrder, update: int) -> list[set[int]]:
    """The samples of each update from ``update`` to the end of the epoch, over all ranks."""
    ranks = [replace(order, rank=rank).micro_batches(update) for rank in range(order.world_size)]
    accumulation = order.global_batch // order.world_size // order.micro_batch
    return [set(chain(*(chain(*rank[i:i + accumulation]) for rank in ranks)))
            for i in range(0, len(ranks[0]), accumulation)]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31), st.integers(0, 3), st.data())
def test_an_epoch(world_size, micro_batch, accumulation, seed, epoch, data):
    """Each sample at most once in whole batches, the same ones on any layout, and after a resume the rest of them."""
    batch = world_size * micro_batch * accumulation
    order = TrainingOrder(data.draw(st.integers(batch, 4 * batch + 3)), batch, micro_batch, 0, world_size, seed)
    first = epoch * order.updates_per_epoch
    batches = global_batches(order, first)
    assert len(batches) == order.samples // batch and all(len(samples) == batch for samples in batches)
    assert len(set().union(*batches)) == batch * len(batches)
    assert set().union(*batches) <= set(range(order.samples))
    assert global_batches(replace(order, world_size=1, micro_batch=batch), first) == batches
    done = data.draw(st.integers(0, order.updates_per_epoch - 1))
    assert global_batches(order, first + done) == batches[done:]


def test_epochs_and_seeds_differ():
    order = TrainingOrder(samples=64, global_batch=8, micro_batch=4, rank=1, world_size=2, seed=3)
    assert order.micro_batches(0) != order.micro_batches(8) != replace(order, seed=4).micro_batches(8)
    assert order.micro_batches(8) == replace(order).micro_batches(8)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="train_batch_size 65 is more than the 64"):
        TrainingOrder(samples=64, global_batch=65, micro_batch=65, rank=0, world_size=1, seed=0)


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 9))
def test_evaluation_takes_every_sample_once_in_equally_many_forwards(samples, world_size, batch):
    shards = [evaluation_shard(samples, rank, world_size, batch) for rank in range(world_size)]
    assert len({tuple(map(len, batches)) for batches, _ in shards}) == 1
    real = [sample for batches, count in shards for sample in list(chain(*batches))[:count]]
    assert sorted(real) == list(range(samples))

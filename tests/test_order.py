"""launch/order.py: every sample once, the same global batches on any layout, and after a resume the rest of the run."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from order import TrainingOrder, evaluation_shard


@st.composite
def orders(draw):
    world_size, micro_batch, accumulation = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    global_batch = world_size * micro_batch * accumulation
    samples = draw(st.integers(global_batch, 4 * global_batch + 3))
    return TrainingOrder(samples, global_batch, micro_batch, 0, world_size, draw(st.integers(0, 2**31)))


def global_batches(order: TrainingOrder, update: int) -> list[set[int]]:
    """The samples of each update from ``update`` to the end of the epoch, over all ranks."""
    ranks = [replace(order, rank=rank).micro_batches(update) for rank in range(order.world_size)]
    accumulation = order.global_batch // order.world_size // order.micro_batch
    updates = len(ranks[0]) // accumulation
    return [{sample for rank in ranks for micro_batch in rank[i * accumulation:(i + 1) * accumulation]
             for sample in micro_batch} for i in range(updates)]


@given(orders(), st.integers(0, 3))
def test_an_epoch_has_each_sample_at_most_once_in_whole_batches(order, epoch):
    batches = global_batches(order, epoch * order.updates_per_epoch)
    assert len(batches) == order.samples // order.global_batch
    assert all(len(batch) == order.global_batch for batch in batches)
    assert len(set().union(*batches)) == order.global_batch * len(batches)
    assert set().union(*batches) <= set(range(order.samples))


@given(orders())
def test_global_batches_do_not_depend_on_the_layout(order):
    alone = replace(order, world_size=1, micro_batch=order.global_batch)
    assert global_batches(order, 0) == global_batches(alone, 0)


@given(orders(), st.data())
def test_a_resume_has_the_rest_of_the_epoch(order, data):
    epoch, done = data.draw(st.integers(0, 2)), data.draw(st.integers(0, order.updates_per_epoch - 1))
    first = epoch * order.updates_per_epoch
    assert global_batches(order, first + done) == global_batches(order, first)[done:]


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

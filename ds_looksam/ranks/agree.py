"""What the ranks agree on when something fails on one of them, so that all go on or all raise, and none waits forever.

While nothing is under way, by an all-reduce (:func:`together`). In the middle of a second evaluation, where the other
ranks may be waiting in a collective that the failed one will never join, by the process group's key-value store
(:func:`raised_everywhere`): the store answers whatever the group is doing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from deepspeed import comm as dist
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store, _world

from ..errors import LookSAMCheckpointError, LookSAMReplayError
from .reduce import sum_over_all_ranks, world_size

Result = TypeVar("Result")


def together(function: Callable[[], Result], device: torch.device, what: str) -> Result:
    """Call ``function`` on this rank; if it raises on any rank, raise LookSAMCheckpointError on every rank, beginning
    with ``what`` and saying what went wrong on which ranks. Collective: one small all-reduce.

    Without it a rank with a broken file would raise, and the others would wait for it in the next collective.
    """
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    if on_all_ranks(error is None, device):
        return result
    messages = from_all_ranks(None if error is None else
                              str(error) if isinstance(error, LookSAMCheckpointError) else _in_words(error))
    failed: dict[str, list[int]] = {}
    for rank, message in enumerate(messages):
        if message is not None:
            failed.setdefault(message, []).append(rank)
    reasons = [message if len(ranks) == len(messages) else f"{message} (on rank {', '.join(map(str, ranks[:4]))})"
               for message, ranks in list(failed.items())[:4]]
    raise LookSAMCheckpointError(f"{what}: " + "; ".join(reasons)) from error


def raise_together(error: Exception | None, device: torch.device, also: torch.Tensor | None = None,
                   late: Exception | None = None) -> None:
    """If any rank has an error, raise it there, and on the others a LookSAMReplayError that names the first rank and
    says what it has. Collective: one all-reduce of a flag, which the host reads.

    Args:
        error: this rank's, as far as its host knows.
        also: bool 0-dim on a device, read only here: then ``late`` is the error.
    """
    if error is None and also is None and world_size() == 1:
        return
    flag = torch.full((1, ), float(error is not None), dtype=torch.float64, device=device)
    if also is not None:
        flag = torch.maximum(flag, also.to(device, torch.float64))
    if sum_over_all_ranks(flag).item() == 0:
        return
    if error is None and also is not None and also.item():
        error = late
    errors = from_all_ranks(None if error is None else str(error))
    if error is not None:
        raise error
    rank = next(rank for rank, message in enumerate(errors) if message is not None)
    raise LookSAMReplayError(f"on rank {rank}: {errors[rank]}")


def on_all_ranks(yes: bool, device: torch.device) -> bool:
    """Whether it is so on every rank. Collective."""
    flag = torch.tensor([0 if yes else 1], dtype=torch.int32, device=device)
    dist.all_reduce(flag)
    return int(flag.item()) == 0


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's ``value``, which is pickled. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(function: Callable[[], Result], device: torch.device) -> Result:
    """The result of ``function`` on rank 0, on every rank; what it raises there, everywhere. Collective."""
    here = dist.get_rank() == 0
    box: list[Any] = [together(lambda: function() if here else None, device, "LookSAM's part of the checkpoint")]
    dist.broadcast_object_list(box, src=0)
    return box[0]


GRACE = 5.0
"""Seconds that a rank waits at least for the others to raise too, before it takes itself for the only one."""

_failures = itertools.count()
"""The number of failed evaluations so far, the same on all ranks as long as they failed together. When they did not,
the job is over, but for the restart of its processes."""


@dataclass(frozen=True)
class RanksApart:
    """Not every rank raised, or not at the same place: no collective can be counted on any more.

    Attributes:
        first: which rank raised first, and what; None if the ranks' store does not answer any more.
        comes_after: whether the others had been given up before this rank raised, which is then what came of it.
    """

    first: str | None
    comes_after: bool


def raised_everywhere(error: Exception, group: Any, place: str, patience: float = 0.0) -> RanksApart | None:
    """None if every rank of ``group`` (None: all) has raised at the same ``place``, on every rank alike: they may go on
    with a collective; ranks that raised at different places would meet in different ones. ``error``: what this rank
    raised. Not collective, and waits for no more than :data:`GRACE` or ``patience`` seconds, whichever is longer: as
    long again as this rank took to come here, since nothing may have held the others to its pace.
    """
    if not dist.is_initialized():
        return None
    group = group or dist.get_world_group()
    world_size, failure = dist.get_world_size(group=group), next(_failures)
    if world_size == 1:
        return None
    try:
        # Of every group that all are in: DeepSpeed reduces in copies of the first. A rank that is ahead of the others,
        # where NCCL does not hold it up, has one under way that would answer the next one of theirs.
        groups: list[Any] = [own for own in _world.pg_map if own.size() == world_size]
        sent = [own._get_sequence_number_for_group() for own in groups]
        place = f"{place}, {sent} collectives"
        store = PrefixStore(f"ds_looksam/failure-{failure}", _get_default_store())
        comes_after = store.check(["verdict"])
        first = store.compare_set("first", "", f"rank {dist.get_rank(group=group)} raised {_in_words(error)}").decode()
        same_place = store.compare_set("place", "", place).decode() == place
        store.add("raised", 1)
        deadline = time.monotonic() + max(GRACE, patience)
        # add(.., 0) reads the counter without blocking.
        while (same_place and not store.check(["verdict"]) and store.add("raised", 0) < world_size
               and time.monotonic() <= deadline):
            time.sleep(0.02)
        everywhere = same_place and store.add("raised", 0) == world_size
        # The first to write this decides for all: one that gives up, and one that sees the last of them raise.
        verdict = store.compare_set("verdict", "", "together" if everywhere else "apart").decode()
    except Exception:  # the rank that keeps the store has ended, or this backend has none
        return RanksApart(None, comes_after=True)
    return None if verdict == "together" else RanksApart(first, comes_after)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

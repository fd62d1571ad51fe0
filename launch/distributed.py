"""Joining and leaving the other processes, and sums over them."""

from __future__ import annotations

import gc
import socket

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which its default arguments would keep
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_looksam.ranks.agree import from_all_ranks
from ds_looksam.ranks.join import join

__all__ = ["device", "join", "leave", "same_on_all_ranks", "summed"]


def leave() -> None:
    """Take the process group down, with all its threads, so that they are gone before the interpreter is.

    A thread of gloo's that still holds a tensor of a finished operation needs the interpreter to let go of it, and
    aborts the process ("terminate called without an active exception") where that is being taken down. DeepSpeed has
    references to the group, which keep it alive after ``torch.distributed.destroy_process_group``.
    """
    if dist.is_initialized():
        (deepspeed.comm if deepspeed.comm.is_initialized() else dist).destroy_process_group()
        gc.collect()


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def same_on_all_ranks(what: str, value: str) -> None:
    """Raise ValueError on every rank where ``value`` is not the same on all. Collective."""
    found = dict.fromkeys(from_all_ranks((value, socket.gethostname())))
    if len({value for value, _ in found}) > 1:
        told = "; ".join(f"{value} on {host}" for value, host in found)
        raise ValueError(f"{what} are not the same on all ranks: {told}")


def summed(values: Tensor) -> list[float]:
    """The sums over all ranks, on the host. Collective."""
    dist.all_reduce(values)
    return values.tolist()

"""Every rank runs the same software, or the job says at start who differs.

A host with another DeepSpeed or with yesterday's checkout trains on without a word, and what comes out is neither
version's result. So ranks compare versions before anything else is sent.
"""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path

import deepspeed
import torch
from torch import distributed

from ..errors import LookSAMVersionError
from .versions import __version__


@cache
def sources_digest() -> str:
    """A short digest of the package's own files: two checkouts may carry the same version number."""
    package = Path(__file__).parent.parent
    files = {str(path.relative_to(package)): path.read_bytes() for path in sorted(package.rglob("*.py"))}
    return hashlib.sha256(repr(files).encode()).hexdigest()[:8]


def rank_versions() -> dict[str, str]:
    """What has to be the same on every rank, of this one."""
    return {"ds_looksam": f"{__version__} (sources {sources_digest()})", "deepspeed": deepspeed.__version__,
            "torch": str(torch.__version__)}


def own_device() -> torch.device:
    """The one on which DeepSpeed will put this rank: before ``deepspeed.initialize`` the current one is the first on
    every rank."""
    accelerator = deepspeed.get_accelerator()
    local_rank = os.environ.get("LOCAL_RANK")
    return torch.device(accelerator.current_device_name() if local_rank is None else
                        accelerator.device_name(int(local_rank)))


def check_ranks(device: torch.device | None = None) -> None:
    """Compare the versions of ds_looksam, DeepSpeed and torch over all ranks.

    Collective over the default process group: one all-reduce of two integers; only where they differ are the versions
    themselves gathered. LookSAMEngine calls it in ``deepspeed.initialize``; a program may call it earlier, before it
    loads its data. Without a process group there is nothing to compare.

    Args:
        device: that of this rank, for a backend that sends from devices only (NCCL); LOCAL_RANK's if not given.

    Raises:
        LookSAMVersionError: on every rank, naming for each package the versions and the ranks and hosts that have them.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    if device is None:
        device = own_device()
    mine = rank_versions()
    digest = int.from_bytes(hashlib.sha256(repr(mine).encode()).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest], dtype=torch.int64, device=device)  # 56 bits: both signs fit
    distributed.all_reduce(extremes, op=distributed.ReduceOp.MAX)
    highest, lowest = extremes[0].item(), -extremes[1].item()
    if highest == lowest:
        return
    ranks: list[tuple[str, dict[str, str]]] = [("", {})] * distributed.get_world_size()
    if device.index is not None:
        deepspeed.get_accelerator().set_device(device.index)  # pickles are sent from the current one
    distributed.all_gather_object(ranks, (socket.gethostname(), mine))
    raise LookSAMVersionError(_who_differs(ranks))


def _who_differs(ranks: list[tuple[str, dict[str, str]]]) -> str:
    """The message. ``ranks``: host name and versions, by rank."""
    lines = ["the ranks of this job do not run the same software:"]
    for package in rank_versions():
        have: dict[str, list[int]] = {}
        for rank, (_, versions) in enumerate(ranks):
            have.setdefault(versions.get(package, "none"), []).append(rank)
        if len(have) > 1:
            lines += [f"  {package} {version} on rank{'s' if len(who) > 1 else ''} {_ranges(who)} "
                      f"({', '.join(sorted({ranks[rank][0] for rank in who}))})"
                      for version, who in sorted(have.items(), key=lambda item: -len(item[1]))]
    lines.append("Install the same versions on every host (constraints.txt pins them), or let all hosts use one "
                 "environment on a shared file system.")
    return "\n".join(lines)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5": a message about 4,096 ranks stays readable."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in spans)

"""A lock that a killed compilation left behind: torch's extension builder waits for it forever, without a word. From
2.14 on torch asks the operating system instead, which knows which locks are gone."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import psutil
from torch.utils import cpp_extension

COMPILERS = {"ninja", "c++", "g++", "cc1plus", "nvcc", "cicc", "ptxas", "hipcc", "clang++", "ld"}
OLD = 60.0
"""Seconds without a new file after which a build that has no compiler running is not under way."""


def warn_of_stale_locks() -> None:
    """Say which files under torch's folder of extensions block every later run on this host, once a host. Not
    collective."""
    if int(os.environ.get("LOCAL_RANK", 0)) != 0 or not hasattr(cpp_extension, "FileBaton"):
        return
    try:
        locks = stale_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()))
    except OSError:  # of another user, or gone since: something is being built, or cleared away
        return
    if locks:
        warnings.warn(  # to stderr: DeepSpeed's logger writes between what the command line prints
            "a compilation of DeepSpeed's operators was killed here, and left a lock on which every run that needs the "
            f"operator waits forever. No compiler is running: remove {' and '.join(map(str, locks))}", stacklevel=3)


def stale_locks(root: Path) -> list[Path]:
    """Locks of builds in which nothing has been written for a minute while no compiler runs on this host."""
    old = [lock for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern)
           if time.time() - max((path.stat().st_mtime for path in lock.parent.iterdir() if path.is_file()),
                                default=time.time()) > OLD]
    if not old or any(process.info["name"] in COMPILERS for process in psutil.process_iter(["name"])):
        return []
    return old

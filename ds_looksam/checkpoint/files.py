"""LookSAM's part of a checkpoint on disk. Nothing here is collective, and nothing is pickled.

    looksam.json                       counters, settings, names and shapes of the parameters
    looksam_rank_00000.safetensors     the elements of g_v that lie on rank 0, padding left out: a tensor "name[lo:hi]"
    looksam_rank_00001.safetensors     for elements [lo, hi) of the parameter "name", flattened row-major
    ...

Every file is written under another name, flushed to the disk and renamed, so a file that has its name is whole. Every
tensor, and the text around the tensors, has a CRC-32, so that what a disk or a copy has changed is not trained on. A
``save_id``, drawn anew for each save and also kept in DeepSpeed's own file, tells files of another save apart.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import LookSAMCheckpointError

MANIFEST = "looksam.json"
FORMAT = 1
BLOCK = 1 << 22
"""Elements per tensor at most (16 MiB of fp32): the unit that is read and checked where only a range is needed."""

_KEY = re.compile(r"(.*)\[(\d+):(\d+)\]", re.DOTALL)


def rank_file_name(rank: int) -> str:
    return f"looksam_rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class Range:
    """Elements [lo, hi) of the flattened parameter ``name``."""

    name: str
    lo: int
    hi: int

    @property
    def key(self) -> str:
        return f"{self.name}[{self.lo}:{self.hi}]"

    @classmethod
    def from_key(cls, key: str, path: Path) -> Range:
        match = _KEY.fullmatch(key)
        if match is None:
            raise LookSAMCheckpointError(f"{path}: tensor {key!r} is not named as LookSAM names its tensors")
        return cls(match[1], int(match[2]), int(match[3]))


@dataclass(frozen=True)
class Manifest:
    """What looksam.json says.

    Attributes:
        save_id: the same in every file of one save.
        files: number of rank files; 0 where there was no g_v yet.
        settings: LookSAM's part of ``optimizer.params`` of the run that saved.
        configured_groups: LookSAM's keys of each param group, as that run's configuration gave them.
        groups: the param groups as they were when it saved, after whatever the user, a schedule or DeepSpeed changed
            in them: LookSAM's keys and the base optimizer's, as far as JSON has them.
        status: counters and measurements.
        shapes: shape of every trained parameter, by name.
    """

    save_id: str
    files: int
    settings: dict[str, Any]
    configured_groups: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    status: dict[str, Any]
    shapes: dict[str, list[int]]

    def write(self, folder: Path) -> None:
        content = {"format": FORMAT, **asdict(self)}
        text = json.dumps({**content, "crc32": _crc_of_json(content)}, indent=1)
        write_atomically(folder / MANIFEST, lambda temporary: temporary.write_text(text))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check a looksam.json; LookSAMCheckpointError where it is damaged, or of a newer format."""
        try:
            content = json.loads(path.read_bytes())
            crc = content.pop("crc32")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _damaged(path, error) from error
        if crc != _crc_of_json(content):
            raise _damaged(path, "its checksum is wrong")
        _refuse_other_format(path, content.pop("format"))
        return cls(**content)


def write_rank_file(folder: Path, rank: int, save_id: str, parts: list[tuple[Range, Tensor]]) -> None:
    """Write one rank's part of g_v, cut into blocks. ``parts``: disjoint ranges and their elements ([hi - lo])."""
    blocks = {Range(whole.name, lo, min(lo + BLOCK, whole.hi)).key:
              tensor[lo - whole.lo:lo - whole.lo + BLOCK].detach().cpu().contiguous()
              for whole, tensor in parts for lo in range(whole.lo, whole.hi, BLOCK)}
    about = {"format": str(FORMAT), "save_id": save_id, "rank": str(rank),
             "crc32": json.dumps({key: _crc(tensor) for key, tensor in blocks.items()})}
    about["about_crc32"] = str(_crc_of_json(about))
    write_atomically(folder / rank_file_name(rank), lambda temporary: save_file(blocks, temporary, metadata=about))


class RankFile:
    """One rank's file, opened and checked but for its tensors, which :meth:`read` checks. Raises
    LookSAMCheckpointError: it is missing, truncated or damaged, or of another save or another rank."""

    def __init__(self, folder: Path, rank: int, save_id: str) -> None:
        self.path = folder / rank_file_name(rank)
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu")
            about = dict(self._file.metadata() or {})
            keys = list(self._file.keys())
        except FileNotFoundError:
            raise LookSAMCheckpointError(f"{self.path} is missing") from None
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise _damaged(self.path, error) from error
        if about.pop("about_crc32", None) != str(_crc_of_json(about)):
            raise _damaged(self.path, "the checksum of its description is wrong")
        _refuse_other_format(self.path, int(about["format"]))
        if about["rank"] != str(rank):
            raise LookSAMCheckpointError(f"{self.path} is the file of rank {about['rank']}, not of rank {rank}")
        if about["save_id"] != save_id:
            raise LookSAMCheckpointError(f"{self.path} belongs to another save than {folder / MANIFEST} beside it")
        self._crcs = json.loads(about["crc32"])
        if self._crcs.keys() != set(keys):
            raise _damaged(self.path, "its tensors are not those of its description")
        self.ranges = [Range.from_key(key, self.path) for key in keys]

    def read(self, stored: Range) -> Tensor:
        """The elements of one of :attr:`ranges`, [hi - lo], on the CPU, in the dtype in which they were saved."""
        try:
            tensor = self._file.get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error
        if tensor.numel() != stored.hi - stored.lo or _crc(tensor) != self._crcs[stored.key]:
            raise _damaged(self.path, f"the checksum of {stored.key} is wrong")
        return tensor


def verify_file(path: Path) -> None:
    """Read all of one of LookSAM's files and check it, against looksam.json beside it. Other files are passed over.
    Raises LookSAMCheckpointError where it is missing, damaged or foreign."""
    if path.name == MANIFEST:
        Manifest.read(path)
    elif match := re.fullmatch(r"looksam_rank_(\d+)\.safetensors", path.name):
        file = RankFile(path.parent, int(match[1]), Manifest.read(path.with_name(MANIFEST)).save_id)
        for stored in file.ranges:
            file.read(stored)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` write a temporary file beside ``path``, flush it to the disk and give it its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(torch.uint8).numpy().data)


def _crc_of_json(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _refuse_other_format(path: Path, found: int) -> None:
    if found != FORMAT:
        raise LookSAMCheckpointError(f"{path} has format {found}, this version of ds_looksam reads format {FORMAT}")


def _damaged(path: Path, reason: object) -> LookSAMCheckpointError:
    return LookSAMCheckpointError(f"{path} is damaged: {reason}")

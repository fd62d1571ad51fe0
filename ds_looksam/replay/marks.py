"""What tells that a tensor or an array was written to."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Mark = tuple[Any, Callable[[Any], int | None], int | None]
"""A tensor or an array, how to look at it, and what was seen then."""


def version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def crc(value: Any) -> int:
    """Of the bytes of a tensor in host memory, or of an array: CRC-32, some GB/s."""
    if isinstance(value, Tensor):
        value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else np.zeros(0)
    return 0 if value.dtype.hasobject else zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def marks_of(value: Tensor | np.ndarray) -> list[Mark]:
    """A tensor has a version counter. What is written to the memory of a NumPy array does not count there, so of
    arrays, and of tensors on memory that torch has not allocated, the bytes are summed up. Nothing tells of what is
    written through ``tensor.data``, or by another program."""
    marks: list[Mark] = [(value, version_of, version_of(value))] if isinstance(value, Tensor) else []
    with torch._C.DisableTorchFunction():  # another engine's tape may be on, and would take this for the user's code
        is_foreign = isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided and (
            not value.untyped_storage().resizable()) and not value.is_pinned()
        if is_foreign or isinstance(value, np.ndarray):
            marks.append((value, crc, crc(value)))
    return marks


def is_changed(mark: Mark) -> bool:
    value, look, then = mark
    with torch._C.DisableTorchFunction():
        return look(value) != then

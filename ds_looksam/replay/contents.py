"""What is in a value that a module holds, and how it is put back."""

from __future__ import annotations

import sys
import sysconfig
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .inputs import GENERATORS, set_state_of, state_of

Restore = Callable[[], Any]

# Nothing is in them; looked up first, for there are many. (Proxies say that they are what they stand for.)
PLAIN = {type(None), bool, int, float, str, bytes, weakref.ProxyType, weakref.CallableProxyType}
TOO_MANY = 1024
"""Entries of a container (a vocabulary, a data set) inside of which no state is looked for."""
NOT_ENTERED = {"torch", "triton", "deepspeed", "ds_looksam", "lightning", "lightning_fabric", "pytorch_lightning"}
_OF_THE_STANDARD_LIBRARY = {"types", "collections", "argparse"}  # what is entered
_OF_DEEPSPEED = frozenset({"_ds_child_entered", "_external_params", "_original_parameters",
                           "applied_pre_backward_ref_cnt", "ds_external_parameters", "ds_grads_remaining", "ds_id",
                           "ds_inflight_param_registry", "ds_recompute_parameters", "post_bwd_fn", "pre_bwd_fn"})
"""What DeepSpeed 0.19.8 puts on modules. Shown by test_loops.py, which names the user's attributes alike."""
_LEFT_OUT = frozenset(vars(nn.Module())) | _OF_DEEPSPEED | {"forward"}
_OF_LIGHTNING = frozenset({"trainer", "_trainer", "_fabric"})


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Without torch's own, DeepSpeed's counters on modules, and the trainer of a Lightning module."""
    left_out = _LEFT_OUT
    if not _OF_LIGHTNING.isdisjoint(vars(module)) and any(
            base.__module__.startswith(("lightning.", "pytorch_lightning.")) for base in type(module).__mro__):
        left_out = _LEFT_OUT | _OF_LIGHTNING
    return {name: value for name, value in vars(module).items() if name not in left_out}


@cache
def is_entered(module: str) -> bool:
    """Whether the attributes of an object are looked at whose class is from there."""
    package = module.partition(".")[0]
    return package in _OF_THE_STANDARD_LIBRARY or not (package in NOT_ENTERED or _is_standard(package))


def _is_standard(package: str) -> bool:
    """Of Python's standard library, and not a user's own ``code`` or ``test``."""
    if package not in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(package), "__file__", None)
    return file is None or Path(file).is_relative_to(sysconfig.get_path("stdlib"))


def copy_of(value: Any) -> Restore:
    """What puts back the contents of ``value``."""
    if isinstance(value, Tensor):
        return _Copy(value).write
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy())
    if isinstance(value, GENERATORS):
        return partial(set_state_of, value, state_of(value))
    if isinstance(value, (bytearray, array)):
        return partial(value.__setitem__, slice(None), value[:])
    return partial(refill, value, dict(items_of(value)) if isinstance(value, dict) else list(value))


class _Copy:
    """A tensor's values, to be written back in place, without a trace in its version counter: also where it has been
    resized since, or where many of its elements are one (``expand``)."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._shape, self._values = tensor, tensor.shape, _each_once(tensor).clone()

    def write(self) -> None:
        with torch.no_grad():
            if self._tensor.shape != self._shape:
                self._tensor.resize_(self._shape)
            _each_once(self._tensor).copy_(self._values)


def _each_once(tensor: Tensor) -> Tensor:
    """A view of the elements of ``tensor`` that have memory of their own."""
    if tensor.layout != torch.strided or 0 not in tensor.stride():
        return tensor.data
    return tensor.data[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def items_of(value: dict[Any, Any]) -> Any:
    """In order, whatever the class makes of ``items``."""
    return (OrderedDict if isinstance(value, OrderedDict) else dict).items(value)


def refill(container: Any, items: Any) -> None:
    """Unless nothing has changed; by the methods of the built-in type: a class may do more in its own, or refuse."""
    kind: Any
    if isinstance(container, dict):
        if [*map(id, chain(*items_of(container)))] != [*map(id, chain(*items_of(items)))]:
            kind = OrderedDict if isinstance(container, OrderedDict) else dict
            kind.clear(container)
            for key, item in items.items():
                kind.__setitem__(container, key, item)
    elif [*map(id, container)] != [*map(id, items)]:
        kind = next(kind for kind in (list, set, deque) if isinstance(container, kind))
        kind.clear(container)
        (kind.update if kind is set else kind.extend)(container, items)

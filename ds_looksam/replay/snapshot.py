"""What an evaluation of the user's model changes besides gradients, saved and put back around the replay."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed import checkpointing
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn


@dataclass(frozen=True)
class TorchRandomState:
    """States of torch's generators, on CPU and device. Reading them does not synchronise."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def capture(cls) -> TorchRandomState:
        on_device = get_accelerator().device_name() != "cpu"
        return cls(cpu=torch.get_rng_state(), device=get_accelerator().get_rng_state() if on_device else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            get_accelerator().set_rng_state(self.device)

    def is_current(self) -> bool:
        """Whether nothing was drawn since."""
        now = TorchRandomState.capture()
        return torch.equal(now.cpu, self.cpu) and (self.device is None or now.device is None
                                                   or torch.equal(now.device, self.device))


@dataclass(frozen=True)
class RandomState:
    """States of every generator a model is likely to draw from: torch on CPU and device, NumPy, Python, and those that
    DeepSpeed tracks by name (``deepspeed.checkpointing.get_cuda_rng_tracker().fork()``)."""

    torch: TorchRandomState
    numpy: Any
    python: Any
    tracked: dict[str, Tensor]

    @classmethod
    def capture(cls) -> RandomState:
        return cls(torch=TorchRandomState.capture(), numpy=np.random.get_state(), python=random.getstate(),
                   tracked=checkpointing.get_cuda_rng_tracker().get_states())

    def restore(self) -> None:
        self.torch.restore()
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        checkpointing.get_cuda_rng_tracker().set_states(dict(self.tracked))


@dataclass(frozen=True)
class AutocastState:
    """The caller's autocast settings: (device, enabled, dtype) each, and whether casts of weights are cached."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]
    cache: bool

    @classmethod
    def capture(cls) -> AutocastState:
        devices = dict.fromkeys(("cpu", torch.device(get_accelerator().device_name()).type))
        return cls(settings=tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices),
                   cache=torch.is_autocast_cache_enabled())

    def apply(self) -> None:
        for device, enabled, dtype in self.settings:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.cache)


def submodules(module: nn.Module) -> list[nn.Module]:
    """``module`` and everything in it, each once. ``module.modules()`` takes several times as long."""
    found, known = [module], {module}
    for m in found:  # grows meanwhile
        for child in m._modules.values():
            if child is not None and child not in known:
                known.add(child)
                found.append(child)
    return found


@dataclass(frozen=True)
class ComputeMode:
    """What one forward of a module ran with: the training flags of every submodule, the caller's autocast state, and
    ``module.forward`` where the instance has one of its own. PyTorch Lightning puts ``training_step`` there, for the
    time of one call.
    """

    training: tuple[tuple[nn.Module, bool], ...]
    autocast: AutocastState
    own_forward: Callable[..., Any] | None

    @classmethod
    def capture(cls, module: nn.Module) -> ComputeMode:
        return cls(training=tuple((m, m.training) for m in submodules(module)), autocast=AutocastState.capture(),
                   own_forward=vars(module).get("forward"))

    def apply(self, module: nn.Module) -> None:
        """Set all of it again (without calling user code in ``train()``)."""
        for m, flag in self.training:
            if m.training != flag:  # nn.Module's __setattr__ is slow, and hardly ever needed
                m.training = flag
        self.autocast.apply()
        if self.own_forward is None:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = self.own_forward


_STRUCTURE = ("_modules", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
              "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks")


Flags = list[tuple[nn.Parameter, bool]]


@contextmanager
def requiring_grad(flags: Flags) -> Iterator[None]:
    """Inside, these parameters require grad or do not."""
    changed = [(p, p.requires_grad) for p, flag in flags if p.requires_grad != flag]
    try:
        for p, flag in changed:
            p.requires_grad_(not flag)
        yield
    finally:
        for p, flag in changed:
            p.requires_grad_(flag)


class Structure:
    """A module's submodules and hooks, and which of its parameters require grad, at one moment: loops register hooks
    for one forward, swap a part, and freeze a layer for one micro-batch."""

    def __init__(self, module: nn.Module) -> None:
        modules = submodules(module)
        self._contents = [(d, d.copy()) for m in modules for name in _STRUCTURE
                          if isinstance(d := vars(m).get(name), dict)]
        self._flags = [(p, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module is as it was then."""
        contents = [(d, d.copy()) for d, then in self._contents if d != then]
        self._put(self._contents if contents else ())
        try:
            with requiring_grad(self._flags):
                yield
        finally:
            self._put(contents)

    def flags_now(self) -> Flags:
        """Which of the same parameters require grad now."""
        return [(p, p.requires_grad) for p, _ in self._flags]

    @staticmethod
    def _put(contents: Iterable[tuple[dict[Any, Any], dict[Any, Any]]]) -> None:
        for d, then in contents:
            if d != then:
                d.clear()
                d.update(then)


class ModelSnapshot:
    """Generators, flags, and gradients of parameters that nobody optimizes. See also module_state.py.

    Sets aside ``.grad`` of trainable parameters that are not in ``optimized``: the replay would add to them.
    """

    def __init__(self, module: nn.Module, optimized: Iterable[nn.Parameter]) -> None:
        self._module, self._random, self._mode = module, RandomState.capture(), ComputeMode.capture(module)
        known = set(optimized)
        self._outside = [(p, p.grad) for m, _ in self._mode.training for p in m._parameters.values()
                         if p is not None and p.requires_grad and p not in known]
        for p, _ in self._outside:
            p.grad = None

    def restore(self) -> None:
        for p, gradient in self._outside:
            p.grad = gradient
        self._mode.apply(self._module)
        self._random.restore()

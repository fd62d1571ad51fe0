"""Which engine class a configuration gets.

``deepspeed.initialize`` constructs ``DeepSpeedEngine``. Registration gives that class a ``__new__`` that looks at the
parsed configuration: one whose optimizer type is LookSAM's gets a :class:`LookSAMEngine` (a subclass, so ``isinstance``
checks hold), one with LAMB or LARS a :class:`HostEngine`, every other one exactly the object it would have
got. It works for whatever way ``initialize`` was imported.

After :func:`unregister` the ``__new__`` does what ``object``'s does: once a class has had a ``__new__`` of its own,
CPython cannot give it back the inherited one (deleting it makes ``object.__new__`` refuse all arguments).
"""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from ..config.params import OPTIMIZER_TYPES, did_you_mean
from ..errors import LookSAMConfigError
from ..optimizers import LAYERWISE_OPTIMIZERS
from .host import HostEngine
from .looksam import LookSAMEngine

ENGINES: dict[str, type[DeepSpeedEngine]] = {
    **dict.fromkeys(OPTIMIZER_TYPES, LookSAMEngine),
    **dict.fromkeys(LAYERWISE_OPTIMIZERS, HostEngine)
}
"""By JSON ``optimizer.type``."""

_registered = False


def _engine_for_configuration(cls: type[DeepSpeedEngine], *args: Any, **kwargs: Any) -> DeepSpeedEngine:
    if not _registered:
        return object.__new__(cls)
    name = getattr(kwargs.get("config_class"), "optimizer_name", None)
    ours = ENGINES.get(name or "")
    if ours is None and isinstance(name, str) and name.lower() in map(str.lower, ENGINES):
        raise LookSAMConfigError(f"optimizer.type: {name!r} is not known to DeepSpeed.{did_you_mean(name, ENGINES)}")
    if ours is not None and not issubclass(cls, ours):
        if cls is not DeepSpeedEngine:
            raise LookSAMConfigError(
                f"optimizer.type {name!r} is not supported by {cls.__name__}; use a model that is no PipelineModule, "
                "and leave hybrid_engine.enabled off")
        cls = ours
    return object.__new__(cls)


def register() -> None:
    """Make DeepSpeed answer to ``"optimizer": {"type": "LookSAM"}`` and our other types. Importing ds_looksam does."""
    global _registered
    DeepSpeedEngine.__new__ = staticmethod(_engine_for_configuration)
    _registered = True


def unregister() -> None:
    """Undo :func:`register`. Engines that exist go on as they are."""
    global _registered
    _registered = False


def is_registered() -> bool:
    """Whether ``deepspeed.initialize`` knows LookSAM: since ``import ds_looksam``, unless it was unregistered."""
    return _registered


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``, knowing LookSAM for this one call whether or not it is registered.

    Same arguments and results as ``deepspeed.initialize``. Collective, as that is.
    """
    registered_before = is_registered()
    register()
    try:
        return deepspeed.initialize(*args, **kwargs)
    finally:
        if not registered_before:
            unregister()

"""LookSAM for DeepSpeed: sharpness-aware training on ZeRO shards at nearly the price of the base optimizer.

``import ds_looksam`` makes DeepSpeed answer to ``"optimizer": {"type": "LookSAM"}``; nothing else changes.
"""

from .ranks.versions import __version__, check_versions

check_versions()

from .config.params import LookSAMConfig  # noqa: E402
from .engines.compile_lock import warn_of_stale_locks  # noqa: E402
from .engines.looksam import LookSAMEngine  # noqa: E402
from .engines.registration import initialize, is_registered, register, unregister  # noqa: E402
from .errors import LookSAMCheckpointError, LookSAMConfigError, LookSAMError, LookSAMReplayError, LookSAMVersionError  # noqa: E402
from .optimizers import Lamb, Lars  # noqa: E402
from .optimizers.grouping import parameter_groups  # noqa: E402
from .ranks.check import check_ranks  # noqa: E402
from .step.status import LookSAMStatus  # noqa: E402

register()
warn_of_stale_locks()

__all__ = [
    "Lamb", "Lars", "LookSAMCheckpointError", "LookSAMConfig", "LookSAMConfigError", "LookSAMEngine", "LookSAMError",
    "LookSAMReplayError", "LookSAMStatus", "LookSAMVersionError", "__version__", "check_ranks", "initialize",
    "is_registered", "parameter_groups", "register", "unregister"
]

"""The exceptions users see. Each message names what is wrong and the way out."""


class LookSAMError(Exception):
    """Base of every error raised by ds_looksam."""


class LookSAMConfigError(LookSAMError, ValueError):
    """The DeepSpeed JSON, or a value set through ``param_groups``, is wrong or not supported."""


class LookSAMReplayError(LookSAMError, RuntimeError):
    """The second gradient evaluation of a SAM step cannot be run. Nothing has been changed, unless another rank alone
    failed in it."""


class LookSAMVersionError(LookSAMError, RuntimeError):
    """The ranks of a job run different versions of ds_looksam, DeepSpeed or torch."""


class LookSAMCheckpointError(LookSAMError, RuntimeError):
    """LookSAM's part of a checkpoint cannot be written, or cannot be loaded. Raised on every rank alike.

    At load, raised before anything has been changed.
    """

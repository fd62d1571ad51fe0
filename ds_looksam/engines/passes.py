"""Which code goes through the shards: :mod:`.eager`'s, or its fused forms, torch.compile's and Triton's."""

from __future__ import annotations

import torch
from deepspeed.utils import logger
from packaging.version import Version

from ..arithmetic.eager import EAGER, Passes
from ..errors import LookSAMConfigError
from ..ranks.agree import on_all_ranks

COMPILES_ON_CPU = Version("2.13")
"""The torch release with which the compiled passes were tested on a CPU. 2.11 takes x.to(bfloat16).float() for x there,
and so would say that the weights moved by eps, whatever rounding made of it."""


def choose_passes(device: torch.device, fuse: bool | None) -> Passes:
    """The passes for shards on ``device``.

    Collective on a GPU where ``fuse`` is None: all ranks take the same, as replicas (ZeRO stage 0) must not differ in
    a bit.

    Args:
        fuse: the JSON key ``compile``. None: fused on a GPU, if Triton works there on every rank; not on a CPU.

    Raises:
        LookSAMConfigError: ``fuse`` is True, and what it takes does not work on this machine.
    """
    if fuse is False or (fuse is None and device.type == "cpu"):
        return EAGER
    works = False
    try:
        passes = _fused_passes(device)
        passes.squared_norm([torch.ones(2, device=device)], device)  # a missing compiler is noticed here
        works = True
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if fuse:
            raise LookSAMConfigError("optimizer.params.compile: the arithmetic could not be compiled on this machine; "
                                     f"leave the key out, or install what it asks for. {told}") from error
        logger.warning("LookSAM: Triton does not work on this rank, so LookSAM's arithmetic is fused on no rank. "
                       f"{told}")
    return passes if fuse or on_all_ranks(works, device) else EAGER


def _fused_passes(device: torch.device) -> Passes:
    if device.type != "cpu":
        from ..arithmetic.triton_passes import FUSED  # Triton comes with torch for GPUs only

        return FUSED
    if Version(torch.__version__) < COMPILES_ON_CPU:
        raise RuntimeError(f"on a CPU it takes torch {COMPILES_ON_CPU}, this is {torch.__version__}")
    from ..arithmetic.compiled import COMPILED

    return COMPILED

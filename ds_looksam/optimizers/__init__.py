"""LAMB and LARS that know about ZeRO's shards: LookSAM's ``base_optimizer``, or a JSON ``optimizer.type`` alone."""

from __future__ import annotations

from .base import LayerwiseOptimizer
from .lamb import Lamb
from .lars import Lars

__all__ = ["LAYERWISE_OPTIMIZERS", "Lamb", "Lars", "LayerwiseOptimizer"]

LAYERWISE_OPTIMIZERS: dict[str, type[LayerwiseOptimizer]] = {"ZeroLamb": Lamb, "ZeroLars": Lars}
"""By JSON ``optimizer.type``. As LookSAM's ``base_optimizer`` they are also called "Lamb" and "Lars"."""

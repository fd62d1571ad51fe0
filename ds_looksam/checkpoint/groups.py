"""LookSAM's keys of the param groups, and the base optimizer's, across a checkpoint."""

from __future__ import annotations

from typing import Any

from ..config.params import LookSAMConfig
from .files import Manifest


def plain_group(group: dict[str, Any]) -> dict[str, Any]:
    """What JSON has of a param group."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}
    return {key: value for key, value in values.items() if key != "params" and all(
        x is None or isinstance(x, int | float | str) for x in (value if isinstance(value, list) else [value]))}


def restore_base_groups(param_groups: list[dict[str, Any]], saved: Manifest) -> None:
    """Give each param group what it had when the checkpoint was saved.

    For universal checkpoints: from one, DeepSpeed 0.19's ZeRO-3 gives every group the values of the first.
    """
    if len(param_groups) == len(saved.groups):
        for group, values in zip(param_groups, saved.groups, strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def restore_groups(param_groups: list[dict[str, Any]], configured: list[dict[str, Any]],
                   saved: Manifest | None) -> list[str]:
    """Settle LookSAM's keys of ``param_groups``, which DeepSpeed has just overwritten or dropped. Returns what changed,
    for the log.

    The configuration wins. Where it says what it said when the checkpoint was saved, the value that was in force then
    goes on (a schedule of rho, say).
    """
    changes = []
    comparable = saved is not None and len(saved.groups) == len(configured)
    # Not strict: a group that was added during training has no configuration.
    for i, (group, now) in enumerate(zip(param_groups, configured, strict=False)):
        then, last = (saved.configured_groups[i], saved.groups[i]) if saved is not None and comparable else ({}, {})
        for key, value in now.items():
            same = key in last and then.get(key) == value
            group[key] = last[key] if same else value
            if key in last and not same:
                changes.append(f"param_groups[{i}].{key}: {last[key]!r} -> {value!r}")
    return changes


def changed_settings(saved: Manifest, settings: LookSAMConfig) -> list[str]:
    """Which keys of ``optimizer.params`` differ from those of the run that saved, for the log."""
    return [f"{key}: {saved.settings[key]!r} -> {value!r}" for key, value in settings.model_dump().items()
            if key in saved.settings and saved.settings[key] != value]

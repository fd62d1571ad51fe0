"""LookSAM's state in a checkpoint, beside DeepSpeed's: saved by parameter name, loaded at any world size and stage.

Saving: every rank writes its part of g_v and rank 0 what they have in common (``checkpoint_files.py``), DeepSpeed saves
its own, and once all of that is there ``latest`` is made to name it. Loading: everything of LookSAM's is found, read
(``checkpoint_layout.py``) and checked before DeepSpeed's ``load_checkpoint`` changes anything. In both, ranks agree on
how it went by one small all-reduce per phase, so that all of them go on or all of them raise.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from ..arithmetic.eager import Shard
from ..config.base_optimizers import deepspeed_name
from ..config.params import OPTIMIZER_TYPES, LookSAMConfig
from ..errors import LookSAMCheckpointError
from ..ranks.agree import from_rank_0, together
from ..shards import GradientShards
from ..step.status import LookSAMStatus
from .files import MANIFEST, Manifest, write_atomically, write_rank_file
from .reading import Trained, read_own_part

MARK = "ds_looksam"
"""Key of DeepSpeed's model states file (through client_state) that names the save to which LookSAM's files belong."""

WITHOUT = ("To do without LookSAM's saved state (the next update is then a SAM step): "
           "engine.load_checkpoint(..., load_looksam_states=False).")


@dataclass
class Saved:
    """LookSAM's state out of a checkpoint, checked and on this rank, but not yet in force."""

    manifest: Manifest
    v: Shard | None


# Saving -------------------------------------------------------------------------------------------------------------


def save(folder: Path, *, v: Shard | None, module: torch.nn.Module, shards: GradientShards, status: LookSAMStatus,
         settings: LookSAMConfig, configured_groups: list[dict[str, Any]], param_groups: list[dict[str, Any]],
         device: torch.device, writes_common_files: bool) -> dict[str, Any]:
    """Write LookSAM's files into ``folder``, flushed to the disk. Collective.

    Args:
        device: where collectives take their tensors.
        writes_common_files: whether this rank writes what all ranks have in common: true on rank 0, or on one rank
            per node where nodes have their own storage.

    Returns:
        What DeepSpeed's file has to say about them, for ``client_state``.

    Raises:
        LookSAMCheckpointError: on every rank, if one of them could not write.
    """
    save_id = from_rank_0(lambda: secrets.token_hex(8), device)
    group = shards.process_group
    files = 0 if v is None else 1 if group is None else dist.get_world_size(group=group)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trained = Trained.of(module, shards)
        if v is not None and (group is not None or writes_common_files):
            parts = [(part, flat[start:start + part.hi - part.lo])
                     for flat, segments in zip(v, trained.layout, strict=True) for start, part in segments]
            write_rank_file(folder, 0 if group is None else dist.get_rank(group=group), save_id, parts)
        if writes_common_files:
            Manifest(save_id, files, settings.model_dump(), configured_groups, [_plain(g) for g in param_groups],
                     _plain_status(status), trained.shapes).write(folder)

    together(write, device, f"LookSAM's part of checkpoint {folder} could not be written")
    return {MARK: {"save_id": save_id}}


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}
    return {key: value for key, value in values.items() if key != "params" and
            all(x is None or isinstance(x, bool | int | float | str) for x in
                (value if isinstance(value, list) else [value]))}


def _plain_status(status: LookSAMStatus) -> dict[str, Any]:
    values = {field.name: getattr(status, field.name) for field in fields(status)}
    return {name: {"float64": value.item()} if isinstance(value, Tensor) else value for name, value in values.items()}


@contextmanager
def deferred_write_errors(checkpoint_engine: CheckpointEngine) -> Iterator[list[Exception]]:
    """What DeepSpeed's own writes raise inside is kept in the list.

    A rank that raised at once would leave the others in the barrier at the end of DeepSpeed's save_checkpoint.
    """
    errors: list[Exception] = []
    save = checkpoint_engine.save

    def keep_error(*args: Any, **kwargs: Any) -> Any:
        try:
            return save(*args, **kwargs)
        except Exception as error:
            errors.append(error)

    checkpoint_engine.save = keep_error
    try:
        yield errors
    finally:
        del checkpoint_engine.save


def refuse_incomplete(folder: Path, errors: list[Exception], device: torch.device) -> None:
    """After DeepSpeed's part: raise on every rank if one failed. Collective."""

    def raise_error() -> None:
        if errors:
            raise errors[0]

    together(raise_error, device, f"checkpoint {folder} could not be written")


def name_latest(folder: Path, writes_common_files: bool, device: torch.device) -> None:
    """Let ``latest`` name a checkpoint of which every rank has written its part. Collective."""

    def write_latest() -> None:
        if writes_common_files:
            write_atomically(folder.parent / "latest", lambda temporary: temporary.write_text(folder.name))

    together(write_latest, device, f"{folder.parent / 'latest'} could not be written")


# Loading ------------------------------------------------------------------------------------------------------------


@contextmanager
def whole_pickles(checkpoint_engine: CheckpointEngine) -> Iterator[None]:
    """DeepSpeed 0.19.8 reads with ``checkpoint.writer`` by torch's default, weights_only, which refuses what it has
    written. Inside it reads as it does without that key."""
    checkpoint_engine.load = TorchCheckpointEngine().load
    try:
        yield
    finally:
        del checkpoint_engine.load


def resolve_tag(load_dir: str, tag: Any, universal: bool) -> str | None:
    """The checkpoint's folder in ``load_dir``, found as DeepSpeed finds it; None where DeepSpeed finds none."""
    if tag is not None:
        return str(tag)
    latest = Path(load_dir) / ("latest_universal" if universal else "latest")
    return latest.read_text().strip() if latest.is_file() else None


def load(folder: Path, *, module: torch.nn.Module, shards: GradientShards, settings: LookSAMConfig,
         device: torch.device, universal: bool) -> Saved | None:
    """Find, read and check LookSAM's part of a checkpoint. Changes nothing. Collective.

    Args:
        folder: the checkpoint's folder, ``load_dir/tag``.
        device: where collectives take their tensors.
        universal: it was made by DeepSpeed's ds_to_universal. LookSAM's files are then looked for in it, and in the
            folders beside it, where the checkpoint lies that was converted.

    Returns:
        None if the checkpoint is not from a LookSAM run.

    Raises:
        LookSAMCheckpointError: on every rank, naming file and parameter: something is missing, damaged or foreign,
            or does not belong to this model or base optimizer.
    """
    found = from_rank_0(lambda: _find(folder, settings, universal), device)
    if found is None:
        return None
    at, manifest = found

    def check() -> Trained:
        trained = Trained.of(module, shards)
        _check_belongs(at / MANIFEST, manifest, settings, trained)
        return trained

    where = f"LookSAM's part of checkpoint {at} cannot be loaded"
    trained = together(check, device, where)
    if manifest.files == 0:
        return Saved(manifest, None)
    return Saved(manifest, read_own_part(at, manifest, trained, shards, device, where))


def restore_status(status: LookSAMStatus, values: dict[str, Any], device: torch.device) -> None:
    """Put back counters and measurements. The period is the configuration's."""
    defaults = LookSAMStatus(k=status.k)
    for field in fields(status):
        value = values.get(field.name, getattr(defaults, field.name))
        if isinstance(value, dict):
            value = torch.tensor(value["float64"], dtype=torch.float64, device=device)
        if field.name not in ("k", "first_sam_update"):  # the configuration's
            setattr(status, field.name, value)


def restore_base_groups(param_groups: list[dict[str, Any]], saved: Manifest) -> None:
    """Give each param group what it had when the checkpoint was saved.

    For universal checkpoints: from one, DeepSpeed 0.19's ZeRO-3 gives every group the values of the first.
    """
    if len(param_groups) == len(saved.groups):
        for group, values in zip(param_groups, saved.groups, strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def restore_groups(param_groups: list[dict[str, Any]], configured: list[dict[str, Any]],
                   saved: Manifest | None) -> list[str]:
    """Settle LookSAM's keys of ``param_groups``, which DeepSpeed has just overwritten or dropped.

    The configuration wins. Where it says what it said when the checkpoint was saved, the value that was in force then
    goes on (a schedule of rho, say).

    Returns:
        What changed, for the log.
    """
    changes = []
    for i, (group, now) in enumerate(zip(param_groups, configured, strict=True)):
        then, last = {}, {}
        if saved is not None and len(saved.groups) == len(configured):
            then, last = saved.configured_groups[i], saved.groups[i]
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


def _find(folder: Path, settings: LookSAMConfig, universal: bool) -> tuple[Path, Manifest] | None:
    """The folder with LookSAM's files that belong to a checkpoint, and what they say. None: no LookSAM checkpoint."""
    states = sorted(folder.glob("*model_states.pt"))
    if not states:
        return None  # DeepSpeed says best what it misses
    described = _describe(states[0])
    mark = described.get(MARK)
    if mark is None:
        _check_plain_base(states[0], described, settings)
        return None
    folders = [folder]
    if universal:
        folders += sorted(path.parent for path in folder.parent.glob(f"*/{MANIFEST}") if path.parent != folder)
    foreign = None
    for candidate in folders:
        path = candidate / MANIFEST
        if path.exists():
            manifest = Manifest.read(path)
            if manifest.save_id == mark["save_id"]:
                return candidate, manifest
            foreign = foreign or path
    if foreign is not None and not universal:
        raise LookSAMCheckpointError(f"{foreign} belongs to another save than {states[0]} beside it. {WITHOUT}")
    advice = (f"Copy looksam* from the checkpoint that was converted into {folder}, or leave that checkpoint beside it."
              if universal else "Put back the looksam* files that were saved there.")
    raise LookSAMCheckpointError(f"{folder / MANIFEST} is missing, but {states[0].name} is of a LookSAM run. {advice} "
                                 f"{WITHOUT}")


def _describe(states: Path) -> dict[str, Any]:
    """DeepSpeed's model states file, without reading the weights where its format allows that."""
    try:
        try:
            return torch.load(states, map_location="cpu", mmap=True, weights_only=False)
        except RuntimeError:  # not a zip file: "checkpoint_serialization" false, or damaged
            return torch.load(states, map_location="cpu", weights_only=False)
    except Exception as error:
        raise LookSAMCheckpointError(f"{states} is damaged: {error}") from error


def _check_plain_base(states: Path, described: dict[str, Any], settings: LookSAMConfig) -> None:
    config = described.get("ds_config")
    block = config.get("optimizer") if isinstance(config, dict) else None
    saved = block.get("type") if isinstance(block, dict) else None
    if isinstance(saved, str) and saved not in OPTIMIZER_TYPES and _differ(saved, settings.base_optimizer):
        raise _other_base(states, saved, settings)


def _check_belongs(path: Path, manifest: Manifest, settings: LookSAMConfig, trained: Trained) -> None:
    if _differ(manifest.settings["base_optimizer"], settings.base_optimizer):
        raise _other_base(path, manifest.settings["base_optimizer"], settings)
    reasons = []
    for name in sorted(trained.shapes.keys() | manifest.shapes.keys()):
        saved, here = manifest.shapes.get(name), trained.shapes.get(name)
        if saved is None:
            reasons.append(f"{name!r} is trained by the model but not in the checkpoint")
        elif here is None:
            reasons.append(f"{name!r} is in the checkpoint but not trained by the model")
        elif saved != here:
            reasons.append(f"{name!r} is {saved} in the checkpoint and {here} in the model")
    if reasons:
        more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        raise LookSAMCheckpointError(f"{path}: parameter {'; parameter '.join(reasons[:4])}{more}. {WITHOUT}")


def _differ(optimizer: str, other: str) -> bool:
    return deepspeed_name(optimizer).lower() != deepspeed_name(other).lower()


def _other_base(path: Path, saved: str, settings: LookSAMConfig) -> LookSAMCheckpointError:
    return LookSAMCheckpointError(
        f"{path}: the checkpoint's base optimizer is {saved!r}, the configuration's is {settings.base_optimizer!r}, "
        f"and one cannot go on with the state of the other. Set optimizer.params.base_optimizer to {saved!r}, or load "
        "the weights alone: engine.load_checkpoint(..., load_module_only=True).")

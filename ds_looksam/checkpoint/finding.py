"""Which of LookSAM's files belong to a checkpoint, and whether that checkpoint belongs to this run. Not collective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..config.base_optimizers import deepspeed_name
from ..config.params import OPTIMIZER_TYPES, LookSAMConfig
from ..errors import LookSAMCheckpointError
from .files import MANIFEST, Manifest
from .reading import NamedLayout

MARK = "ds_looksam"
"""Key of DeepSpeed's model states file (through client_state) that names the save to which LookSAM's files belong."""

WITHOUT = ("To do without LookSAM's saved state (the next update is then a SAM step): "
           "engine.load_checkpoint(..., load_looksam_states=False).")
WEIGHTS_ALONE = ("The optimizer's state does not fit either. To load the weights that do: engine.load_checkpoint(..., "
                 "load_module_only=True, load_module_strict=False), with custom_load_fn=f(src, dst) where one has "
                 "another shape.")


def resolve_tag(load_dir: str, tag: Any, universal: bool) -> str | None:
    """The checkpoint's folder in ``load_dir``, found as DeepSpeed finds it; None where DeepSpeed finds none."""
    if tag is not None:
        return str(tag)
    latest = Path(load_dir) / ("latest_universal" if universal else "latest")
    return latest.read_text().strip() if latest.is_file() else None


def find(folder: Path, settings: LookSAMConfig, universal: bool, states_are: str) -> tuple[Path, Manifest] | None:
    """The folder with LookSAM's files that belong to a checkpoint, and what they say. None: no LookSAM checkpoint.
    ``states_are``: the pattern of the files that DeepSpeed is going to load; an older run at another stage may have
    left others beside them."""
    states = sorted(folder.glob(states_are)) or sorted(folder.glob("*model_states.pt"))
    if not states:
        return None  # DeepSpeed says best what it misses
    described = _describe(states[0])
    mark = described.get(MARK)
    if mark is None:
        _check_plain_base(states[0], described, settings)
        return None
    candidates = [folder / MANIFEST] if (folder / MANIFEST).exists() else []
    if universal:
        candidates += sorted(path for path in folder.parent.glob(f"*/{MANIFEST}") if path.parent != folder)
    for path in candidates:
        manifest = Manifest.read(path)
        if manifest.save_id == mark["save_id"]:
            return path.parent, manifest
    if candidates and not universal:
        raise LookSAMCheckpointError(f"{candidates[0]} belongs to another save than {states[0]} beside it. {WITHOUT}")
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
    saved: Any = described
    for key in ("ds_config", "optimizer", "type"):
        saved = saved.get(key) if isinstance(saved, dict) else None
    if isinstance(saved, str) and saved not in OPTIMIZER_TYPES and _differ(saved, settings.base_optimizer):
        raise _other_base(states, saved, settings)


def check_belongs(path: Path, manifest: Manifest, settings: LookSAMConfig, here: NamedLayout) -> None:
    if _differ(manifest.settings["base_optimizer"], settings.base_optimizer):
        raise _other_base(path, manifest.settings["base_optimizer"], settings)
    reasons = []
    for name in sorted(here.shapes.keys() | manifest.shapes.keys()):
        saved, mine = manifest.shapes.get(name), here.shapes.get(name)
        if saved is None:
            reasons.append(f"{name!r} is trained by the model but not in the checkpoint")
        elif mine is None:
            reasons.append(f"{name!r} is in the checkpoint but not trained by the model")
        elif saved != mine:
            reasons.append(f"{name!r} is {saved} in the checkpoint and {mine} in the model")
    if reasons:
        more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        raise LookSAMCheckpointError(f"{path}: parameter {'; parameter '.join(reasons[:4])}{more}. {WEIGHTS_ALONE}")


def _differ(optimizer: str, other: str) -> bool:
    return deepspeed_name(optimizer).lower() != deepspeed_name(other).lower()


def _other_base(path: Path, saved: str, settings: LookSAMConfig) -> LookSAMCheckpointError:
    return LookSAMCheckpointError(
        f"{path}: the checkpoint's base optimizer is {saved!r}, the configuration's is {settings.base_optimizer!r}, "
        f"and one cannot go on with the state of the other. Set optimizer.params.base_optimizer to {saved!r}, or load "
        "the weights alone: engine.load_checkpoint(..., load_module_only=True).")

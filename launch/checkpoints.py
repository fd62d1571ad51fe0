"""Saving and resuming, so that a job may be killed at any moment.

A checkpoint is written into a folder with another name, listed, flushed and renamed: ``checkpoints/update-0000100`` is
complete if it is there. Beside DeepSpeed's and LookSAM's files lies one of each rank: its random generators' state and
the sums of the metrics line that it is in the middle of.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_looksam.checkpoint.files import verify_file, write_atomically
from ds_looksam.ranks.agree import from_all_ranks, together

FOLDER = "checkpoints"
LISTING = "files.json"


def path(run_dir: Path, update: int) -> Path:
    return run_dir / FOLDER / f"update-{update:07d}"


def save(engine: Any, run_dir: Path, facts: dict[str, Any], sums: Tensor, keep: int = 0) -> None:
    """Write a checkpoint of this update, with ``facts`` about the run in it. Collective.

    Args:
        sums: of this rank's metrics, to go on with.
        keep: how many checkpoints to leave, the newest; 0 for all.
    """
    rank, final = dist.get_rank(), path(run_dir, engine.global_steps)
    partial = final.with_name(f".partial-{final.name}")
    if rank == 0:
        for left in final.parent.glob(".partial-*"):  # by jobs that were killed while they saved
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(partial.parent), tag=partial.name, client_state=facts, save_latest=False)
    if engine.checkpoint_engine.is_decoupled():
        engine.checkpoint_engine.commit(engine.checkpoint_engine.get_commit_info())
    together(lambda: save_file(_random_state() | {"sums": sums.cpu()}, partial / _rank_file(rank)), engine.device,
             f"checkpoint {final} could not be written")

    def complete() -> None:
        if rank == 0:
            absent = [rank for rank in range(dist.get_world_size()) if not (partial / _rank_file(rank)).exists()]
            if absent:
                raise FileNotFoundError(f"the files of ranks {absent} are not there: every host must see this folder")
            files = {str(p.relative_to(partial)): [p.stat().st_size, _is_archive(p)]
                     for p in sorted(partial.rglob("*")) if p.is_file()}
            (partial / LISTING).write_text(json.dumps(files, indent=1))
            for name in [*files, LISTING]:
                with open(partial / name, "rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)  # there is one if this run went back behind a damaged one
            os.replace(partial, final)
            write_atomically(final.parent / "latest", lambda temporary: temporary.write_text(final.name))
            # Those that are newer are damaged: --resume has passed them over.
            older = [p for p in _all(run_dir) if p.name <= final.name]
            for old in older[keep:] if keep else []:
                shutil.rmtree(old)

    together(complete, engine.device, f"checkpoint {final} could not be completed")


def resume(engine: Any, run_dir: Path, must_agree: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Load the newest whole checkpoint of a run, and put back this rank's random generators. Collective.

    The position of the run is then ``engine.global_steps``. A damaged checkpoint is passed over with a warning.

    Args:
        must_agree: facts without which the rest of the run would not be the rest of that run.

    Returns:
        The facts and sums that were saved with it; empty and None if there is no checkpoint yet. The sums are None, and
        the generators left as they are, where another number of ranks wrote it.

    Raises:
        ValueError: a fact in ``must_agree`` was another one when the checkpoint was written.
        RuntimeError: there are checkpoints, but none that is whole.
    """
    rank = dist.get_rank()
    found: list[Any] = [[p.name for p in _all(run_dir)] if rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    for name in found[0]:
        folder = run_dir / FOLDER / name
        damage = _damage(folder)
        if damage is None:
            break
        if rank == 0:
            warnings.warn(f"--resume passes over {folder}: {damage}", stacklevel=2)
    else:
        if found[0]:
            raise RuntimeError(f"--resume: every checkpoint in {run_dir / FOLDER} is damaged; --overwrite starts again")
        return {}, None
    loaded, facts = engine.load_checkpoint(str(folder.parent), tag=name)
    for key, value in must_agree.items():
        if facts.get(key, value) != value:
            raise ValueError(f"--resume: {key} is {value!r}, but {loaded} was written with {facts.get(key)!r}")
    if facts.get("ranks") != dist.get_world_size():
        return facts, None
    state = load_file(folder / _rank_file(rank))
    torch.set_rng_state(state["cpu"])
    if "device" in state:
        get_accelerator().set_rng_state(state["device"])
    return facts, state["sums"]


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state if get_accelerator().device_name() == "cpu" else state | {"device": get_accelerator().get_rng_state()}


def _rank_file(rank: int) -> str:
    return f"run_rank_{rank:05d}.safetensors"


def _is_archive(file: Path) -> bool:
    """As torch writes them; not all of DeepSpeed's writers do."""
    return file.suffix == ".pt" and zipfile.is_zipfile(file)


def has_any(run_dir: Path) -> bool:
    return bool(_all(run_dir))


def _all(run_dir: Path) -> list[Path]:
    """Newest first."""
    return sorted((run_dir / FOLDER).glob("update-*"), reverse=True)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint. Collective: the ranks share out its files, and read each of them once."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = None
    try:
        files = json.loads((folder / LISTING).read_bytes())
        for name in sorted(files)[rank::world_size]:
            file = folder / name
            # 0.1 wrote the size alone.
            size, was_zip = files[name] if isinstance(files[name], list) else (files[name], False)
            if file.stat().st_size != size:
                raise ValueError(f"{name} has {file.stat().st_size} bytes, it had {size}")
            is_zip = _is_archive(file)
            if was_zip and not is_zip:
                raise ValueError(f"{name} is no archive any more")
            if is_zip:
                with zipfile.ZipFile(file) as archive:
                    if (record := archive.testzip()) is not None:
                        raise ValueError(f"{name}: the checksum of {record} is wrong")
            verify_file(file)
    except Exception as error:
        found = f"{error}"
    return next((damage for damage in from_all_ranks(found) if damage is not None), None)

"""Saves and loads LookSAM's state beside DeepSpeed's: by parameter name, at any world size and stage.

Saving: every rank writes its part of g_v and rank 0 what they have in common (``files.py``), DeepSpeed saves its own,
and once all of that is there ``latest`` is made to name it. Loading: everything of LookSAM's is found (``finding.py``),
read (``reading.py``) and checked before DeepSpeed's ``load_checkpoint`` changes anything. In both, ranks agree on how
it went by one small all-reduce per phase, so that all of them go on or all of them raise.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.utils import log_dist

from ..arithmetic.eager import Shard
from ..config.params import LookSAMConfig
from ..errors import LookSAMCheckpointError
from ..ranks.agree import from_rank_0, together
from ..ranks.reduce import ranks_in
from ..replay.replay import Replay
from ..shards import GradientShards
from ..step.state import LookSAMState
from .files import MANIFEST, Manifest, write_atomically, write_rank_file
from .finding import MARK, check_belongs, find, resolve_tag
from .groups import changed_settings, plain_group, restore_base_groups, restore_groups
from .reading import NamedLayout, names_of, read_own_part


class Saved(NamedTuple):
    """LookSAM's state out of a checkpoint, checked and on this rank, but not yet in force."""

    manifest: Manifest
    v: Shard | None


class Checkpointer:
    """What is pending, saving and loading.

    Args:
        module: gives the parameters their names.
        param_groups: the optimizer's, as they stand at the moment.
        configured_groups: LookSAM's keys of each param group, as the configuration gave them.
        device: where collectives take their tensors.
        writes_common_files: whether this rank writes what all ranks have in common: true on rank 0, or on one rank per
            node where nodes have their own storage.
        nvme: the optimizer's state is on NVMe, where DeepSpeed 0.19.8 does not resume.
        states_are: the pattern of DeepSpeed's model states files, see :func:`find`.
    """

    def __init__(self, module: torch.nn.Module, settings: LookSAMConfig, state: LookSAMState, shards: GradientShards,
                 replay: Replay, param_groups: Callable[[], list[dict[str, Any]]],
                 configured_groups: list[dict[str, Any]], device: torch.device, writes_common_files: bool,
                 nvme: bool, states_are: str) -> None:
        self._module, self._settings, self._state, self._shards = module, settings, state, shards
        self._replay, self._param_groups, self._configured_groups = replay, param_groups, configured_groups
        self._device, self._writes_common_files, self._nvme = device, writes_common_files, nvme
        self._states_are = states_are
        # Folder and tag of the checkpoint that DeepSpeed's decoupled writer is still writing.
        self._to_be_named: tuple[Path, str] | None = None

    # Saving -----------------------------------------------------------------------------------------------------------

    def save(self, save_dir: Path, tag: str, client_state: dict[str, Any], name_it_latest: bool,
             is_decoupled: bool, save: Callable[[dict[str, Any]], Any]) -> Any:
        """Write LookSAM's files into ``save_dir/tag`` and then DeepSpeed's, by ``save(client_state)``. Collective.
        ``is_decoupled``: DeepSpeed's are written by a process of their own, which :meth:`writer_is_done` tells of.

        Raises:
            LookSAMReplayError: the weights are perturbed.
            LookSAMCheckpointError: on every rank, if one of them could not write, or the optimizer's state is on NVMe.
        """
        folder = save_dir / tag
        mark = self._write(folder)
        result = save({**client_state, **mark})
        self._to_be_named = (save_dir, tag) if name_it_latest else None
        if not is_decoupled:
            self.writer_is_done()
        return result

    def refuse(self, what: str) -> None:
        """Raise where ``engine.{what}()`` cannot be right: at perturbed weights, or with NVMe."""
        if what.startswith("save") or self._replay.is_evaluating:
            self._replay.refuse(f"engine.{what}()")
        if self._nvme:
            raise LookSAMCheckpointError(
                f"engine.{what}(): with zero_optimization.offload_optimizer.device \"nvme\" DeepSpeed 0.19.8 cannot go "
                "on from a checkpoint of such a run (it restores neither the optimizer's step count nor the model's "
                "weights). Use \"cpu\" to save and resume, or save weights alone: engine.save_16bit_model(...).")

    def writer_is_done(self) -> None:
        """Every rank's part of the last checkpoint is there: ``latest`` may name it. Collective."""
        to_be_named, self._to_be_named = self._to_be_named, None
        if to_be_named is not None:
            latest, tag = to_be_named[0] / "latest", to_be_named[1]  # a tag may be several folders deep
            together(lambda: write_atomically(latest, lambda temporary: temporary.write_text(tag))
                     if self._writes_common_files else None, self._device, f"{latest} could not be written")

    def _write(self, folder: Path) -> dict[str, Any]:
        """LookSAM's files, flushed to the disk. Returns what DeepSpeed's file has to say about them. Collective."""
        save_id = from_rank_0(lambda: secrets.token_hex(8), self._device)
        v, group = self._state.v, self._shards.process_group
        files = 0 if v is None else ranks_in(group)

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            here = NamedLayout.of(self._module, self._shards)
            if v is not None and (group is not None or self._writes_common_files):
                parts = [(part, flat[start:start + part.hi - part.lo])
                         for flat, segments in zip(v, here.layout, strict=True) for start, part in segments]
                write_rank_file(folder, 0 if group is None else dist.get_rank(group=group), save_id, parts)
            if self._writes_common_files:
                groups = [plain_group(g) for g in self._param_groups()]
                Manifest(save_id, files, self._settings.model_dump(), self._configured_groups, groups,
                         self._state.to_json(), here.shapes).write(folder)

        together(write, self._device, f"LookSAM's part of checkpoint {folder} could not be written")
        return {MARK: {"save_id": save_id}}

    # Loading ----------------------------------------------------------------------------------------------------------

    def load(self, load_dir: str, tag: Any, universal: bool, goes_on: bool,
             load: Callable[[str | None], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Read and check LookSAM's files, then have DeepSpeed load its own, by ``load(tag)``, and go on. Collective.

        ``universal``: ds_to_universal has made the checkpoint. LookSAM's files are then looked for in it, and in the
        folders beside it, where the checkpoint lies that was converted. ``goes_on``: LookSAM's state is wanted;
        otherwise the counters start at 0.
        """
        tag = from_rank_0(lambda: resolve_tag(load_dir, tag, universal), self._device)
        saved = self.read(Path(load_dir) / tag, universal) if goes_on and tag is not None else None
        if self._replay.is_perturbed:  # a step was cut off; what it left behind would come back over the loaded weights
            self._shards.abort_evaluation()
            self._shards.unperturb_local()
        path, client_state = load(tag)
        if path is not None:
            client_state.pop(MARK, None)
            if saved is not None and universal:
                restore_base_groups(self._param_groups(), saved.manifest)
            self._go_on_with(saved, path)
        return path, client_state

    def read(self, folder: Path, universal: bool) -> Saved | None:
        """Find, read and check LookSAM's part of a checkpoint, ``load_dir/tag``; None if it is not from a LookSAM run.
        Changes nothing. Collective. Raises LookSAMCheckpointError: on every rank, naming file and parameter: something
        is missing, damaged or foreign, or does not belong to this model or base optimizer."""
        found = from_rank_0(lambda: find(folder, self._settings, universal, self._states_are), self._device)
        if found is None:
            return None
        at, manifest = found

        def check() -> NamedLayout:
            self._lay_out_as(manifest)
            here = NamedLayout.of(self._module, self._shards)
            check_belongs(at / MANIFEST, manifest, self._settings, here)
            return here

        where = f"LookSAM's part of checkpoint {at} cannot be loaded"
        held = set(self._shards.parameters())
        try:
            here = together(check, self._device, where)
            return Saved(manifest, read_own_part(at, manifest, here, self._shards, self._device, where)
                         if manifest.files > 0 else None)
        finally:
            self._shards.hold(held.__contains__)

    def _lay_out_as(self, saved: Manifest) -> None:
        """As when it was saved: another part of the model may have been frozen then. The next update follows that."""
        names = names_of(self._module)
        self._shards.hold(lambda p: names.get(id(p)) in (None, *saved.shapes))

    def _go_on_with(self, saved: Saved | None, path: str) -> None:
        manifest, v = saved or (None, None)
        if manifest is not None:
            self._lay_out_as(manifest)
        self._state.restore({} if manifest is None else manifest.status, v)
        changes = [] if manifest is None else changed_settings(manifest, self._settings)
        changes += restore_groups(self._param_groups(), self._configured_groups, manifest)
        self._replay.forget()
        state = "goes on" if saved is not None else "starts anew, there is nothing of its own to load,"
        status = self._state.status
        step = "a SAM step" if status.next_is_sam else "a base step" if v is None else "a reuse step"
        log_dist(f"LookSAM {state} at update {status.updates} with {step}; weights from {path}", ranks=[0])
        if changes:
            log_dist("LookSAM: the configuration wins over the checkpoint: " + "; ".join(changes), ranks=[0])

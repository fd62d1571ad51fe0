"""The engine whose LookSAM state can be saved and loaded, by DeepSpeed's own calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import log_dist
from torch import Tensor

from ..arithmetic.eager import Shard
from ..checkpoint import checkpoint
from ..config.params import LookSAMConfig
from ..errors import LookSAMCheckpointError
from ..ranks.agree import from_rank_0
from ..step.status import LookSAMStatus
from .cpu_adam import relive_steps
from .evaluation import ReplayingEngine

V_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ResumableEngine(ReplayingEngine):
    """What LookSAM keeps from one update to the next, and how it gets into a checkpoint and back."""

    _settings: LookSAMConfig
    _status: LookSAMStatus
    _configured_groups: list[dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._to_be_named: Path | None = None  # the checkpoint that DeepSpeed's decoupled writer is still writing
        self._v: Shard | None = None
        self._v_squared_local: Tensor | None = None  # this rank's part of ‖v‖²
        super().__init__(*args, **kwargs)

    def _store_v(self, v: Shard) -> None:
        """Keep v in ``v_dtype``. ‖v‖ is that of v as stored, so that the reuse adds the length it says."""
        self._v = self._shards.keep_v(v, V_DTYPES[self._settings.v_dtype])
        self._v_squared_local = self._shards.passes.squared_norm(self._v, self._shards.device)

    def save_checkpoint(self, save_dir: str, tag: Any = None, client_state: dict[str, Any] | None = None,
                        save_latest: bool = True, exclude_frozen_parameters: bool = False) -> Any:
        """As DeepSpeed's, with LookSAM's files beside DeepSpeed's. ``latest`` names it once every rank has written.

        Raises:
            LookSAMReplayError: the weights are perturbed.
            LookSAMCheckpointError: on every rank, if one of them could not write, or the optimizer's state is on NVMe.
        """
        self._perturbed.refuse("engine.save_checkpoint()")
        self._refuse_nvme("save_checkpoint")
        if not save_dir:
            return super().save_checkpoint(save_dir)  # DeepSpeed's own refusal
        folder = Path(save_dir) / (f"global_step{self.global_steps}" if tag is None else str(tag))
        mark = checkpoint.save(folder, v=self._v, module=self.module, shards=self._shards, status=self._status,
                               settings=self._settings, configured_groups=self._configured_groups,
                               param_groups=self.optimizer.param_groups, device=self.device,
                               writes_common_files=self._writes_common_files())
        with checkpoint.deferred_write_errors(self.checkpoint_engine) as errors:
            result = super().save_checkpoint(save_dir, folder.name, {**(client_state or {}), **mark},
                                             False, exclude_frozen_parameters)
        checkpoint.refuse_incomplete(folder, errors, self.device)
        self._to_be_named = folder if save_latest else None
        if not self.checkpoint_engine.is_decoupled():
            self.writer_is_done()
        return result

    def writer_is_done(self) -> None:
        """Every rank's part of the last checkpoint is there: ``latest`` may name it. Collective."""
        if self._to_be_named is not None:
            checkpoint.name_latest(self._to_be_named, self._writes_common_files(), self.device)
            self._to_be_named = None

    def _writes_common_files(self) -> bool:
        return (self.local_rank if self.use_node_local_storage() else self.global_rank) == 0

    def load_checkpoint(self, load_dir: str, tag: Any = None, load_module_strict: bool = True,
                        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True,
                        load_module_only: bool = False, custom_load_fn: Any = None, *,
                        load_looksam_states: bool = True) -> tuple[Any, Any]:
        """As DeepSpeed's; LookSAM's files are read and checked before anything is changed.

        Where there is nothing of LookSAM's to go on with (a checkpoint of a plain run, ``load_module_only``,
        ``load_optimizer_states`` or ``load_looksam_states`` false), the counters start at 0: the next update is a SAM
        step. k, rho, alpha and LookSAM's other settings are those of the configuration; the log says which of them
        differ from the checkpoint's.

        Raises:
            LookSAMReplayError: called from inside a second evaluation.
            LookSAMCheckpointError: on every rank, before anything is changed: LookSAM's part is missing, damaged, of
                another save, model or base optimizer.
        """
        if self._replaying:
            self._perturbed.refuse("engine.load_checkpoint()")
        self._refuse_nvme("load_checkpoint")
        universal = self.load_universal_checkpoint()
        tag = from_rank_0(lambda: checkpoint.resolve_tag(load_dir, tag, universal), self.device)
        goes_on = load_optimizer_states and load_looksam_states and not load_module_only
        saved = None
        if goes_on and tag is not None:
            saved = checkpoint.load(Path(load_dir) / tag, module=self.module, shards=self._shards,
                                    settings=self._settings, device=self.device, universal=universal)
        if self._perturbed:  # a step was cut off; what it left behind would come back over the loaded weights
            self._shards.abort_evaluation()
            self._shards.unperturb_local()
        if load_module_only and self.zero_optimization_partition_weights():
            load_optimizer_states = False  # or DeepSpeed's ZeRO-3 loads nothing at all, and says nothing
        with checkpoint.whole_pickles(self.checkpoint_engine):
            path, client_state = super().load_checkpoint(load_dir, tag, load_module_strict, load_optimizer_states,
                                                         load_lr_scheduler_states, load_module_only, custom_load_fn)
        if path is not None:
            client_state.pop(checkpoint.MARK, None)
            if load_optimizer_states and not load_module_only:
                relive_steps(self.basic_optimizer)
            if saved is not None and universal:
                checkpoint.restore_base_groups(self.optimizer.param_groups, saved.manifest)
            self._go_on_with(saved, path)
        return path, client_state

    def _refuse_nvme(self, what: str) -> None:
        if self.zero_nvme_offload_optimizer():
            raise LookSAMCheckpointError(
                f"engine.{what}(): with zero_optimization.offload_optimizer.device \"nvme\" DeepSpeed 0.19.8 cannot go "
                "on from a checkpoint of such a run (it restores neither the optimizer's step count nor the model's "
                "weights). Use \"cpu\" to save and resume, or save weights alone: engine.save_16bit_model(...).")

    def _go_on_with(self, saved: checkpoint.Saved | None, path: str) -> None:
        manifest = None if saved is None else saved.manifest
        self._v = self._v_squared_local = None
        if saved is not None and saved.v is not None:
            self._store_v(saved.v)
        checkpoint.restore_status(self._status, {} if manifest is None else manifest.status, self._shards.device)
        changes = checkpoint.restore_groups(self.optimizer.param_groups, self._configured_groups, manifest)
        if manifest is not None:
            changes = checkpoint.changed_settings(manifest, self._settings) + changes
        self._window.forget()
        self._perturbed.end()
        state = "goes on" if saved is not None else "starts anew, there is nothing of its own to load,"
        step = "a SAM step" if self._status.next_is_sam else "a base step" if self._v is None else "a reuse step"
        log_dist(f"LookSAM {state} at update {self._status.updates} with {step}; weights from {path}", ranks=[0])
        if changes:
            log_dist("LookSAM: the configuration wins over the checkpoint: " + "; ".join(changes), ranks=[0])

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's. Raises LookSAMReplayError while the weights are perturbed."""
        self._perturbed.refuse("engine.save_16bit_model()")
        return super().save_16bit_model(*args, **kwargs)

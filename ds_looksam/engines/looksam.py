"""The DeepSpeed engine that trains with LookSAM: builds its four parts, and forwards DeepSpeed's calls to them.

One SAM step: :meth:`LookSAMEngine.update_at_boundary` -> ``step/update.py`` (Algorithm 1) -> ``shards/`` (this rank's
part of gradient and weights) -> ``replay/replay.py`` (the second evaluation) -> ``step/state.py`` (what is kept).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import log_dist
from torch import Tensor

from ..checkpoint.checkpointer import Checkpointer
from ..config.accept import explain_unknown_key
from ..config.params import OWN, group_settings, parse_group, set_group_defaults
from ..config.rounding import DTYPES, computes_in, rounding_warning
from ..config.support import Run
from ..errors import LookSAMReplayError
from ..ranks.check import check_ranks
from ..replay.replay import Closure, Replay
from ..replay.window import LossFn
from ..shards import full_shape
from ..step import monitor
from ..step.schedule import RhoFactors
from ..step.state import LookSAMState
from ..step.status import LookSAMStatus
from ..step.update import Update
from .deepspeed_fixes import tag_for_muon
from .host import HostEngine
from .passes import choose_passes
from .signals import signals_wait


class LookSAMEngine(HostEngine):
    """A DeepSpeedEngine whose updates follow LookSAM (Liu et al. 2022, Algorithm 1).

    Made by ``deepspeed.initialize`` when the JSON says ``"optimizer": {"type": "LookSAM"}``. The base optimizer, the
    ZeRO wrapper around it and the user's loop stay DeepSpeed's own.

    Attributes:
        loss_fn: ``f(outputs, *inputs, **kwargs) -> loss``, to be set where the loss is computed outside the model in
            a way that cannot be recorded. It gets the model's output and the recorded inputs of its forward, and
            returns what the user hands to ``engine.backward``.
        edit_gradients: ``f() -> None``, to be set where gradients are changed between backward and step (masked,
            clipped by hand): called whenever a window's gradient has been averaged, so twice on a SAM step, the second
            time at w + eps. It finds them where DeepSpeed has them: ``safe_get_full_grad`` and ``safe_set_full_grad``
            on stages 1 to 3, ``p.grad`` on stage 0. With ``ascent`` "rank" and "micro_batch" the perturbation itself
            follows the rank's gradient as it was before. With ``ascent`` "micro_batch" and "global_micro_batch" a SAM
            step calls it for the gradient of each micro-batch, inside ``engine.backward``.
    """

    def __init__(self, *args: Any, config_class: Any, **kwargs: Any) -> None:
        super().__init__(*args, config_class=config_class, **kwargs)
        settings, shards = self._settings, self.gradient_shards
        shards.passes = shards.passes_of_model = choose_passes(shards.device, settings.compile)
        if self.perturbs_by_rank and shards.device.type != self.device.type:
            shards.passes_of_model = choose_passes(self.device, settings.compile)
        status = LookSAMStatus(k=settings.k, first_sam_update=settings.rho_schedule.off_updates,
                               ascent=settings.ascent)
        self._state = LookSAMState(status, shards, DTYPES[settings.v_dtype])
        self._replay = Replay(self, self.module, super().forward, super().backward,
                              is_recorded=lambda: status.next_is_sam, optimized=shards.parameters)
        self._update = Update(settings, self._state, shards, self._replay, self._rho_factors, self._param_groups,
                              loss_scale=self.gradient_loss_scale, is_observed=self.has_step_hooks)
        self._replay.when_forgotten = self._update.forget_gradient
        self._replay.around_backward = self._update.backward_runs
        self.refuse_steps_of_optimizer(LookSAMReplayError(
            "optimizer.step() was called, which takes the base optimizer's step without LookSAM: call engine.step()"))
        self.watch_zero_grad_of_optimizer()
        self._requires_grad = [p.requires_grad for p in self.module.parameters()]
        on_nvme = self.zero_nvme_offload_optimizer()
        local = self.use_node_local_storage()
        self._checkpointer = Checkpointer(
            self.module, settings, self._state, shards, self._replay, self._param_groups, self._configured_groups,
            self.device, writes_common_files=(self.local_rank if local else self.global_rank) == 0, nvme=on_nvme,
            states_are=self.names_of_model_states())
        if on_nvme:
            log_dist("LookSAM: zero_optimization.offload_optimizer.device is \"nvme\": save_checkpoint and "
                     "load_checkpoint will raise, save_16bit_model works", ranks=[0], level=logging.WARNING)
        log_dist(f"LookSAM is on: k={settings.k}, rho={settings.rho}, alpha={settings.alpha}, "
                 f"ascent={settings.ascent}, base optimizer {type(self.basic_optimizer).__name__} in "
                 f"{type(self.optimizer).__name__}", ranks=[0])

    # Construction ---------------------------------------------------------------------------------------------------

    def read_configuration(self, config: Any, model: torch.nn.Module, client_optimizer: Any) -> Run:
        run = super().read_configuration(config, model, client_optimizer)
        assert run.settings is not None
        self._settings, self._computes_in = run.settings, computes_in(config)
        # From here on DeepSpeed sees the configuration of a run with the base optimizer alone.
        config.optimizer_name, config.optimizer_params = run.base, run.base_params
        tag_for_muon(config, model)
        return run

    def before_first_communication(self, device: torch.device) -> None:
        check_ranks(device)

    def explain(self, error: TypeError) -> Exception:
        return explain_unknown_key(error, self._settings.base_optimizer)

    def base_optimizer_is_built(self, optimizer: torch.optim.Optimizer) -> None:
        for i, group in enumerate(optimizer.param_groups):
            set_group_defaults(group, self._settings)
            parse_group(group, i)
        self._rho_factors = RhoFactors(self._settings.rho_schedule, [group["lr"] for group in optimizer.param_groups])
        self._configured_groups = [group_settings(group) for group in optimizer.param_groups]
        if self._settings.layer_scale == "norm" or not self._settings.layerwise:  # rho is a length
            trained = sum(math.prod(full_shape(p)) for group in optimizer.param_groups for p in group["params"])
            warning = rounding_warning(self._settings.rho, self._computes_in, trained)
            if warning is not None:
                log_dist(f"LookSAM: {warning}", ranks=[0], level=logging.WARNING)

    @property
    def perturbs_by_rank(self) -> bool:
        """Whether each rank has a perturbation of its own: ``ascent`` "rank" or "micro_batch"."""
        return self._settings.ascent in OWN

    def _param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    # What users read and set ----------------------------------------------------------------------------------------

    @property
    def looksam(self) -> LookSAMStatus:
        """Counters and measurements. Read only."""
        return self._state.status

    @property
    def loss_fn(self) -> LossFn | None:
        """Where none was set, the model's own attribute of that name, as with DeepSpeed's engine."""
        return self._replay.loss_fn if self._replay.loss_fn is not None else getattr(self.module, "loss_fn", None)

    @property
    def edit_gradients(self) -> Callable[[], None] | None:
        return self._replay.gradient_edit

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss_fn":  # nn.Module would take a criterion that is a module for a part of the engine
            self._replay.loss_fn = value
        elif name == "edit_gradients":
            self._replay.gradient_edit = value
        else:
            super().__setattr__(name, value)

    # The loop -------------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, and collective where that is (stage 3). In a window that ends in a SAM step inputs and RNG
        state are remembered."""
        if self._replay.is_perturbed or not torch.is_grad_enabled():
            return self._replay.forward(*inputs, **kwargs)
        with self._replay.window.not_recording():
            self._update.forward_begins()
        output = self._replay.forward(*inputs, **kwargs)
        with self._replay.window.not_recording():
            self._update.forward_is_over()
        return output

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """As DeepSpeed's, and collective as that is; in a window that ends in a SAM step it is remembered how ``loss``
        was formed.

        Raises:
            LookSAMReplayError: with ``ascent`` "micro_batch" and "global_micro_batch", which evaluate the micro-batch
                again here: it cannot be. All is as before the call, unless another rank alone failed.
            LookSAMConfigError: a gradient is sparse.
        """
        if self._replay.is_perturbed or not self._evaluates_micro_batches_again:
            return self._replay.backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        self._refuse_per_micro_batch(self.inside_no_sync(), "engine.no_sync()", "call engine.backward() outside of it")
        self._refuse_per_micro_batch(self.inside_coalesce(), "engine.coalesce_grad_reduction()",
                                     "call engine.backward() outside of it")
        with self.as_a_window_of_its_own():
            loss = self._replay.backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        with self._signals_wait(), self._replay.window.not_recording():
            is_last = self.is_gradient_accumulation_boundary()
            self._update.micro_batch_is_done(1 / self.gradient_accumulation_steps() if scale_wrt_gas else 1.0, is_last)
        self._replay.gradient_is_complete = is_last
        return loss

    def direct_backward_begins(self) -> None:
        if not self._replay.direct_backward_begins():
            return
        self._refuse_per_micro_batch(self._evaluates_micro_batches_again and not self._replay.is_perturbed,
                                     "loss.backward()", "call engine.backward(loss)")

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """As DeepSpeed's, and collective as that is."""
        with super().coalesce_grad_reduction():
            yield
            if not self._replay.is_perturbed:
                self._update.gradient_changes_hands()
        if not self._replay.is_perturbed:
            self._update.gradient_is_left()

    def gradients_zeroed(self, by_optimizer: bool) -> None:
        replay = self._replay
        if self.gradient_shards.zero_grad_drops(by_optimizer, replay.gradient_is_complete):
            replay.forget_backwards(told=True)
        elif replay.gradient_is_complete and not by_optimizer:  # a window was given up: also where DeepSpeed keeps it
            self.optimizer.zero_grad()

    @property
    def _evaluates_micro_batches_again(self) -> bool:
        return self._update.is_per_micro_batch and self._state.status.next_is_sam

    def _refuse_per_micro_batch(self, happens: bool, what: str, instead: str) -> None:
        if happens:
            raise LookSAMReplayError(
                f"{what} cannot be used with optimizer.params.ascent \"{self._settings.ascent}\", which evaluates each "
                f"micro-batch again in engine.backward(): {instead}, or use \"ascent\": \"global\"")

    def step(self, lr_kwargs: dict[str, Any] | None = None, closure: Closure | None = None) -> None:
        """As DeepSpeed's, and collective as that is; at the boundary of a SAM step the window is evaluated a second
        time, at w + eps. Signals that Python handles wait until that step is over, a second Ctrl-C excepted.

        Args:
            lr_kwargs: handed to the LR scheduler, as in DeepSpeed.
            closure: runs ``engine(...)`` and ``engine.backward(...)`` for every micro-batch of the window again. Only
                called in SAM steps, and only needed where the loss can neither be replayed nor recomputed by
                ``loss_fn``.

        Raises:
            LookSAMReplayError: the second evaluation cannot be run. Weights, gradients, RNG and statistics are as
                before the call, unless another rank alone failed: then a checkpoint must be loaded.
            LookSAMConfigError: a value of LookSAM's in ``param_groups`` is wrong.
        """
        self._refuse_per_micro_batch(closure is not None and self._update.is_per_micro_batch,
                                     "engine.step(closure=...)", "set engine.loss_fn")
        # The second evaluation takes gradients, and v is written to in later steps: neither is for inference tensors.
        leave_inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
        with self._signals_wait(), leave_inference, self._replay.stepping(closure):
            if not self.managed_gradient_accumulation():  # reduces in step()
                self._update.gradient_changes_hands()
            try:
                with self.nothing_left_to_reduce() if self._evaluates_micro_batches_again else nullcontext():
                    super().step(lr_kwargs)
            except BaseException:
                self.leave_failed_step()
                raise

    def _signals_wait(self) -> AbstractContextManager[None]:
        """Where weights may be perturbed: no signal handler of the user's sees them."""
        return signals_wait() if self._state.status.next_is_sam else nullcontext()

    def update_at_boundary(self, apply_update: Callable[[], bool]) -> None:
        if self._state.status.next_is_sam:
            self._warn_of_freezing()
        self._update(apply_update)
        status = self._state.status
        self.write_to_monitors(lambda: monitor.events(status, self.global_samples, status.step_kind == "sam"))

    def _warn_of_freezing(self) -> None:
        """Once, where DeepSpeed ignores that parameters were frozen or unfrozen: everywhere but on stage 0 in fp32."""
        now = [p.requires_grad for p in self.module.parameters()]
        if now != self._requires_grad and self.zero_optimization():
            log_dist(f"zero_optimization.stage {self.zero_optimization_stage()}: requires_grad of a parameter was "
                     "changed after deepspeed.initialize. DeepSpeed goes on training what was frozen, and does not "
                     "train what was unfrozen, with LookSAM or without: save, and initialize again", ranks=[0],
                     level=logging.WARNING)
        self._requires_grad = now

    def destroy(self) -> None:
        """As DeepSpeed's. A window that has no update yet is forgotten, and nothing of the user's is recorded any more.
        """
        if hasattr(self, "_update"):  # not where the constructor raised
            self._update.give_up_window()
        super().destroy()

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, save_dir: str, tag: Any = None, client_state: dict[str, Any] | None = None,
                        save_latest: bool = True, exclude_frozen_parameters: bool = False) -> Any:
        """As DeepSpeed's, with LookSAM's files beside DeepSpeed's. ``latest`` names it once every rank has written.
        Collective. Returns what DeepSpeed's does.

        Raises:
            LookSAMReplayError: the weights are perturbed.
            LookSAMCheckpointError: on every rank, if one of them could not write, or the optimizer's state is on NVMe.
        """
        self._checkpointer.refuse("save_checkpoint")
        if not save_dir:
            return super().save_checkpoint(save_dir)  # DeepSpeed's own refusal
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        save = super().save_checkpoint

        def save_deepspeeds(client_state: dict[str, Any]) -> Any:
            with self.deferred_write_errors(f"checkpoint {Path(save_dir) / tag} could not be written"):
                return save(save_dir, tag, client_state, False, exclude_frozen_parameters)

        with self._replay.window.not_recording():  # a signal handler may save where the loss is not formed yet
            return self._checkpointer.save(Path(save_dir), tag, client_state or {}, save_latest,
                                           self.checkpoint_engine.is_decoupled(), save_deepspeeds)

    def writer_is_done(self) -> None:
        self._checkpointer.writer_is_done()

    def load_checkpoint(self, load_dir: str, tag: Any = None, load_module_strict: bool = True,
                        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True,
                        load_module_only: bool = False, custom_load_fn: Any = None, *,
                        load_looksam_states: bool = True) -> tuple[Any, Any]:
        """As DeepSpeed's; LookSAM's files are read and checked before anything is changed. Collective. Returns the
        checkpoint's path, None if there is none, and the client state.

        Where there is nothing of LookSAM's to go on with (a checkpoint of a plain run, ``load_module_only``,
        ``load_optimizer_states`` or ``load_looksam_states`` false), the counters start at 0: the next update is a SAM
        step. k, rho, alpha and LookSAM's other settings are those of the configuration; the log says which of them
        differ from the checkpoint's.

        Raises:
            LookSAMReplayError: called from inside a second evaluation.
            LookSAMCheckpointError: on every rank, before anything is changed: LookSAM's part is missing, damaged, of
                another save, model or base optimizer.
        """
        self._checkpointer.refuse("load_checkpoint")
        load = super().load_checkpoint
        path, client_state = self._checkpointer.load(
            load_dir, tag, universal=self.load_universal_checkpoint(),
            goes_on=load_optimizer_states and load_looksam_states and not load_module_only,
            load=lambda tag: load(load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states,
                                  load_module_only, custom_load_fn))
        if path is not None:
            self._update.give_up_window()
            self.gradient_shards.abort_evaluation()  # DeepSpeed keeps the gradient of a window that had begun
        return path, client_state

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, and collective as that is. Raises LookSAMReplayError while the weights are perturbed."""
        self._replay.refuse("engine.save_16bit_model()")
        with self._replay.window.not_recording():
            return super().save_16bit_model(*args, **kwargs)

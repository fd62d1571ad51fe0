"""DeepSpeedEngine's private surface, under names that say what it is. LookSAMEngine builds on this and touches none.

By itself a :class:`HostEngine` is the engine of ``"type": "ZeroLamb"`` and ``"ZeroLars"``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import log_dist
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..config.accept import accept, explain_unknown_key, refuse_model
from ..config.base_optimizers import TESTED_WITH_ZERO
from ..config.deepspeed_keys import ignored
from ..config.support import Run
from ..errors import LookSAMCheckpointError
from ..optimizers import LAYERWISE_OPTIMIZERS, LayerwiseOptimizer
from ..ranks.agree import together
from ..shards import open_shards
from . import deepspeed_fixes


class HostEngine(DeepSpeedEngine):
    """A DeepSpeedEngine whose update can be surrounded, whose forward and backward can be run again, and whose base
    optimizer may have trust ratios (LAMB, LARS)."""

    # DeepSpeed's own, for the type checker.
    _is_gradient_accumulation_boundary: bool | None
    enable_backward_allreduce: bool
    micro_steps: int

    _failed_at: int | None = None
    """``micro_steps`` when step() raised last."""

    def __init__(self, *args: Any, config_class: Any, **kwargs: Any) -> None:
        self.read_configuration(config_class, kwargs["model"], kwargs.get("optimizer"))
        super().__init__(*args, config_class=config_class, **kwargs)
        self.gradient_shards = open_shards(self)
        # Whole parameters, the same lists on every rank, from before the wrapper put flat tensors in their place.
        self.gradient_shards.whole_groups = self._whole_groups
        if isinstance(self.basic_optimizer, LayerwiseOptimizer):
            self.basic_optimizer.bind(self.gradient_shards)

    def refuse_steps_of_optimizer(self, error: Exception) -> None:
        """``engine.optimizer.step()`` raises ``error`` from now on, where it is not called by ``engine.step()``."""
        step = self.optimizer.step

        def guarded(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._running_engine_step:
                raise error
            return step(*args, **kwargs)

        # torch's LR schedulers want a method, and look for what they have put around it.
        guarded.__dict__.update(getattr(step, "__dict__", {}))
        self.optimizer.step = MethodType(guarded, self.optimizer)

    def watch_zero_grad_of_optimizer(self) -> None:
        """``engine.optimizer.zero_grad()`` is told of from now on, as ``engine.zero_grad()`` is."""
        zero_grad = type(self.optimizer).zero_grad

        def watched(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            zero_grad(optimizer, *args, **kwargs)
            self._zeroed(by_optimizer=True)

        self.optimizer.zero_grad = MethodType(watched, self.optimizer)

    def zero_grad(self) -> None:
        super().zero_grad()
        self._zeroed(by_optimizer=False)

    def _zeroed(self, by_optimizer: bool) -> None:
        if not self._running_engine_step:  # by the user
            self._begin_window_anew()
            self.gradients_zeroed(by_optimizer)

    def gradients_zeroed(self, by_optimizer: bool) -> None:
        """Called when the user has called ``engine.zero_grad()`` or ``engine.optimizer.zero_grad()``."""

    def read_configuration(self, config: Any, model: torch.nn.Module, client_optimizer: Any) -> Run:
        """Check DeepSpeed's parsed configuration, with the keys of its JSON that DeepSpeed does not read, and make it
        that of the base optimizer. Called before anything else.

        Raises:
            LookSAMConfigError: it is wrong, or not supported.
        """
        for key in ignored(config._param_dict):
            log_dist(f"LookSAM: {key} in the configuration: DeepSpeed knows no such key and ignores it", ranks=[0],
                     level=logging.WARNING)
        return accept(config, config._param_dict, client_optimizer)

    def before_first_communication(self, device: torch.device) -> None:
        """Called when this rank has its device and DeepSpeed has sent nothing yet."""

    def explain(self, error: TypeError) -> Exception:
        """What the user is told where the base optimizer does not know one of its parameters."""
        return explain_unknown_key(error, self.optimizer_name())

    def base_optimizer_is_built(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before any wrapper takes the base optimizer's parameters."""

    def update_at_boundary(self, apply_update: Callable[[], bool]) -> None:
        """Called once per accumulation window, with the averaged gradient in place. ``apply_update`` is
        DeepSpeed's clipping, optimizer step, publication of the weights and LR schedule; False if it skipped them."""
        self.gradient_shards.keep_gradient()
        try:
            apply_update()
        finally:
            self.gradient_shards.end_window()

    @contextmanager
    def running_again(self) -> Iterator[None]:
        """Forward and backward inside do not count as micro-batches, samples or throughput of the user's loop."""
        kept = [(owner, name, getattr(owner, name)) for owner, names in (
            (self, ("_is_gradient_accumulation_boundary", "_unmanaged_backward_count", "warn_unscaled_loss")),
            (self._config, ("gradient_accumulation_steps", )), (self.tput_timer.config, ("enabled", )))
            for name in names]
        self.tput_timer.config.enabled = False  # it would also wait for the device in every forward
        try:
            yield
        finally:
            for owner, name, value in kept:
                setattr(owner, name, value)

    def set_up_next_backward(self, is_boundary: bool, accumulation: int) -> None:
        """Override the engine's accumulation counter, and what it divides by, for one backward of a replay."""
        self._is_gradient_accumulation_boundary = is_boundary
        self._config.gradient_accumulation_steps = accumulation

    @contextmanager
    def as_a_window_of_its_own(self) -> Iterator[None]:
        """A backward inside is an accumulation boundary: afterwards its gradient is reduced, as before a step.
        Collective."""
        boundary = self._is_gradient_accumulation_boundary
        if self.managed_gradient_accumulation():
            self._is_gradient_accumulation_boundary = True
        try:
            yield
            self.finish_unmanaged_window()
        finally:
            self._is_gradient_accumulation_boundary = boundary

    @contextmanager
    def nothing_left_to_reduce(self) -> Iterator[None]:
        """step() inside does not reduce what ``managed_gradient_accumulation: false`` leaves to it: every backward was
        a window of its own."""
        if self.managed_gradient_accumulation():
            yield
            return
        reduces, self.enable_backward_allreduce = self.enable_backward_allreduce, False
        self.optimizer.finalize_gradient_accumulation_boundary = lambda: None
        try:
            yield
        finally:
            self.enable_backward_allreduce = reduces
            del self.optimizer.finalize_gradient_accumulation_boundary

    def inside_no_sync(self) -> bool:
        """Whether the caller is inside ``engine.no_sync()``."""
        return self.inside_no_sync_ctxt and not self.inside_coalesce()

    def inside_coalesce(self) -> bool:
        """Whether the caller is inside ``engine.coalesce_grad_reduction()``."""
        return getattr(self.optimizer, "_coalesce_grad_reduction", False)

    def direct_backward_begins(self) -> None:
        """Called when a backward reaches the output of a forward without ``engine.backward``."""

    def backward_directly(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """``loss.backward()``, as a user who has scaled the loss where fp16 asks for it."""
        self._manual_backward_expected = True
        loss.backward(retain_graph=retain_graph)

    def finish_unmanaged_window(self) -> None:
        """Reduce what ``managed_gradient_accumulation: false`` leaves for step() to reduce. Collective."""
        if self.managed_gradient_accumulation():
            return
        self._is_gradient_accumulation_boundary = True
        if self.zero_optimization_partition_gradients():
            self.optimizer.finalize_gradient_accumulation_boundary()
        else:
            self.allreduce_gradients()

    def write_to_monitors(self, events: Callable[[], list[tuple[str, float, int]]]) -> None:
        """(name, value, number of samples) each, beside what DeepSpeed writes: on rank 0, where the JSON asks for it.
        """
        if self.monitor.enabled and self.global_rank == 0:
            self.monitor.write_events(events())

    def gradient_loss_scale(self) -> float:
        """What the gradients in the wrapper are multiplied by. That is the loss scale for ZeRO optimizers only: for the
        others DeepSpeed 0.19.8 leaves the loss as it is (shards/fp16.py)."""
        return float(getattr(self.optimizer, "loss_scale", 1.0)) if isinstance(self.optimizer, ZeROOptimizer) else 1.0

    def names_of_model_states(self) -> str:
        """The pattern of the model states files that a run at this stage writes, and loads."""
        return f"{'zero_pp_rank_*_' if self.zero_optimization_partition_weights() else ''}mp_rank_*_model_states.pt"

    def has_parameters_outside_of_model(self) -> bool:
        """Whether ``deepspeed.initialize(model_parameters=...)`` was given parameters that the model has not."""
        own = {id(p) for p in self.module.parameters()}
        return any(id(p) not in own for group in self._whole_groups for p in group)

    def has_step_hooks(self) -> bool:
        """Whether hooks of the user's run in the base optimizer's step, on this rank."""
        own = self.basic_optimizer
        return bool(own._optimizer_step_pre_hooks or own._optimizer_step_post_hooks
                    or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def writer_is_done(self) -> None:
        """Called when every rank's writer has written the last decoupled checkpoint."""

    def _commit_decoupled_checkpoint(self) -> None:
        """As DeepSpeed's, which lets rank 0 name the checkpoint in ``latest`` when its own writer is done. Collective:
        where a rank's writer has failed, it raises here, and none gets through the barrier."""
        save = self.checkpoint_engine.get_commit_info()
        if save is not None:
            self.checkpoint_engine.commit(save)
            dist.barrier()
            self.writer_is_done()

    @contextmanager
    def deferred_write_errors(self, what: str) -> Iterator[None]:
        """What DeepSpeed's own writes of a checkpoint raise inside is raised at the end, on every rank, as a
        LookSAMCheckpointError that begins with ``what``. Collective.

        A rank that raised at once would leave the others in the barrier at the end of DeepSpeed's save_checkpoint.
        """
        errors: list[Exception] = []

        def deferring(write: Callable[..., Any]) -> Callable[..., Any]:
            def keep_error(*args: Any, **kwargs: Any) -> Any:
                try:
                    return write(*args, **kwargs)
                except Exception as error:
                    errors.append(error)

            return keep_error

        def raise_error() -> None:
            if errors:
                raise errors[0]

        writers = ((self.checkpoint_engine, "save"), (self, "_copy_recovery_script"))
        for owner, name in writers:
            setattr(owner, name, deferring(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name in writers:
                delattr(owner, name)
        together(raise_error, self.device, what)

    def leave_failed_step(self) -> None:
        """step() raised: put back the flags that its normal end resets, and the timers that it stops, so that it can be
        called again; or the window be run again, after zero_grad()."""
        self._running_engine_step = False
        self._failed_at = self.micro_steps
        self.reset_running_timers()

    def _begin_window_anew(self) -> None:
        """The user throws away the gradients of a window whose step() has raised. DeepSpeed goes on counting, and would
        take the next micro-batch for the window's last."""
        if self._failed_at == self.micro_steps and self._is_gradient_accumulation_boundary is None:
            self.micro_steps -= self.micro_steps % self.gradient_accumulation_steps()
        self._failed_at = None

    def leave_failed_evaluation(self) -> None:
        """An evaluation raised on every rank: wait for what DeepSpeed's streams still do with its buffers, which are to
        be given back, and reset the timers."""
        get_accelerator().synchronize()
        self.reset_running_timers()

    def reset_running_timers(self) -> None:
        """What raised has left them running, and DeepSpeed refuses to start one that runs."""
        for timer in self.timers.get_timers().values():
            if timer.started_:
                timer.reset()

    def load_checkpoint(self, load_dir: str, tag: Any = None, load_module_strict: bool = True,
                        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True,
                        load_module_only: bool = False, custom_load_fn: Any = None) -> tuple[Any, Any]:
        """As DeepSpeed's, with its faults in loading repaired. Collective.

        Raises:
            LookSAMCheckpointError: a universal checkpoint is to be loaded at stage 0, which DeepSpeed cannot.
        """
        if self.load_universal_checkpoint() and not self.zero_optimization():
            raise LookSAMCheckpointError(
                "checkpoint.load_universal: a universal checkpoint can be loaded with zero_optimization.stage 1 to 3 "
                "only. For stage 0 take the weights: run zero_to_fp32.py, which lies beside the checkpoint that was "
                "converted, and load what it writes into the model")
        if load_module_only and self.zero_optimization_partition_weights():
            load_optimizer_states = False  # or DeepSpeed's ZeRO-3 loads nothing at all, and says nothing
        with (deepspeed_fixes.whole_pickles(self.checkpoint_engine),
              deepspeed_fixes.keeping_trust_ratios(self.basic_optimizer)):
            path, client_state = super().load_checkpoint(load_dir, tag, load_module_strict, load_optimizer_states,
                                                         load_lr_scheduler_states, load_module_only, custom_load_fn)
        if path is not None and load_optimizer_states and not load_module_only:
            deepspeed_fixes.unshare_steps(self.basic_optimizer)
            deepspeed_fixes.take_cpu_adam_steps_again(self.basic_optimizer)
        return path, client_state

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        super()._configure_optimizer(client_optimizer, model_parameters)
        deepspeed_fixes.keep_adagrad(self.optimizer, self.basic_optimizer)

    def _backward_prologue(self) -> None:
        if not self._running_engine_backward:
            self.direct_backward_begins()
        super()._backward_prologue()

    def _set_distributed_vars(self, args: Any) -> None:
        super()._set_distributed_vars(args)
        self.before_first_communication(self.device)

    def _own_optimizer_class(self) -> type[torch.optim.Optimizer] | None:
        """The class of the base optimizer where it is not one that DeepSpeed builds, or None."""
        return LAYERWISE_OPTIMIZERS.get(self.optimizer_name() or "")

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return self._own_optimizer_class() is not None or super()._is_supported_optimizer(optimizer_name)

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        own = self._own_optimizer_class()
        try:
            if own is not None:
                optimizer = own(model_parameters, **(self.optimizer_params() or {}))
            else:
                optimizer = super()._configure_basic_optimizer(model_parameters)
                deepspeed_fixes.keep_group_keys(model_parameters, optimizer)
        except TypeError as error:
            raise self.explain(error) from error
        # DeepSpeed does so too, but later, and then what is kept of each group would be another one's.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self._whole_groups = [list(group["params"]) for group in optimizer.param_groups]
        refuse_model(self)
        if isinstance(optimizer, LayerwiseOptimizer):
            optimizer.wait_for_wrapper()
        self.base_optimizer_is_built(optimizer)
        return optimizer

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> Any:
        """DeepSpeed asks for "zero_allow_untested_optimizer" with any class that is not in its list. Ours are made for
        ZeRO, others were tested with it under LookSAM; these are in the list while such an engine is being built, and
        no longer."""
        tested = [cls for cls in (self._own_optimizer_class(), *TESTED_WITH_ZERO) if cls is not None]
        ZERO_SUPPORTED_OPTIMIZERS.extend(tested)
        try:
            return super()._do_optimizer_sanity_check(basic_optimizer)
        finally:
            for cls in tested:
                ZERO_SUPPORTED_OPTIMIZERS.remove(cls)

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        def apply_update() -> bool:
            with deepspeed_fixes.keeping_param_groups(self.basic_optimizer):
                super(HostEngine, self)._take_model_step(lr_kwargs)
            return self.was_step_applied()

        if isinstance(self.basic_optimizer, LayerwiseOptimizer):
            self.basic_optimizer.begin_update()
        self.update_at_boundary(apply_update)

"""DeepSpeedEngine's private surface, under names that say what it is. LookSAMEngine builds on this and touches none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS


class HostEngine(DeepSpeedEngine):
    """A DeepSpeedEngine whose update can be surrounded, and whose forward and backward can be run again.

    Subclasses override :meth:`before_first_communication`, :meth:`own_optimizer_class`,
    :meth:`prepare_base_optimizer` and :meth:`update_at_boundary`.
    """

    # DeepSpeed's own, for the type checker.
    _is_gradient_accumulation_boundary: bool | None
    _unmanaged_backward_count: int
    _running_engine_step: bool
    warn_unscaled_loss: bool
    inside_no_sync_ctxt: bool
    _running_engine_backward: bool
    _manual_backward_expected: bool
    device: torch.device

    def own_optimizer_class(self) -> type[torch.optim.Optimizer] | None:
        """The class of the base optimizer where it is not one that DeepSpeed builds, or None."""
        return None

    def prepare_base_optimizer(self, build: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """Build the base optimizer with DeepSpeed's own code, before any wrapper takes its parameters."""
        return build()

    def before_first_communication(self, device: torch.device) -> None:
        """Called when this rank has its device and DeepSpeed has sent nothing yet."""

    def update_at_boundary(self, apply_update: Callable[[], None]) -> None:
        """Called once per accumulation window, with the averaged gradient in place. ``apply_update`` is
        DeepSpeed's clipping, optimizer step, publication of the weights and LR schedule."""
        apply_update()

    @contextmanager
    def running_again(self) -> Iterator[None]:
        """Forward and backward inside do not count as micro-batches, samples or throughput of the user's loop."""
        boundary = self._is_gradient_accumulation_boundary
        backwards = self._unmanaged_backward_count
        timer = (self.tput_timer.started, self.tput_timer.start_time)
        unscaled_loss_warning = self.warn_unscaled_loss
        try:
            yield
        finally:
            self.warn_unscaled_loss = unscaled_loss_warning
            self.tput_timer.started, self.tput_timer.start_time = timer
            self._unmanaged_backward_count = backwards
            self._is_gradient_accumulation_boundary = boundary

    def set_boundary_of_next_backward(self, is_boundary: bool) -> None:
        """Override the engine's accumulation counter for one backward of a replay."""
        self._is_gradient_accumulation_boundary = is_boundary

    def inside_no_sync(self) -> bool:
        """Whether the caller is inside ``engine.no_sync()``."""
        return self.inside_no_sync_ctxt and not self.inside_coalesce()

    def inside_coalesce(self) -> bool:
        """Whether the caller is inside ``engine.coalesce_grad_reduction()``."""
        return getattr(self.optimizer, "_coalesce_grad_reduction", False)

    def direct_backward_begins(self) -> None:
        """Called when a backward reaches the output of a forward without ``engine.backward``."""

    def backward_directly(self, loss: torch.Tensor, retain_graph: bool = False) -> torch.Tensor:
        """``loss.backward()``, as a user who has scaled the loss where fp16 asks for it."""
        self._manual_backward_expected = True
        loss.backward(retain_graph=retain_graph)
        return loss

    def finish_unmanaged_window(self) -> None:
        """Reduce what ``managed_gradient_accumulation: false`` leaves for step() to reduce. Collective."""
        if self.managed_gradient_accumulation():
            return
        self._is_gradient_accumulation_boundary = True
        if self.zero_optimization_partition_gradients():
            self.optimizer.finalize_gradient_accumulation_boundary()
        else:
            self.allreduce_gradients()

    def monitors(self) -> bool:
        """Whether this rank writes to monitors that DeepSpeed's configuration asks for."""
        return bool(self.monitor.enabled) and self.global_rank == 0

    def write_to_monitors(self, events: list[tuple[str, float, int]]) -> None:
        """(name, value, number of samples) each, beside what DeepSpeed writes itself."""
        self.monitor.write_events(events)

    def gradient_loss_scale(self) -> float:
        """What the gradients in the wrapper are multiplied by. That is the loss scale for ZeRO optimizers only: for the
        others DeepSpeed 0.19.8 leaves the loss as it is (shards/fp16.py)."""
        return float(getattr(self.optimizer, "loss_scale", 1.0)) if isinstance(self.optimizer, ZeROOptimizer) else 1.0

    def writer_is_done(self) -> None:
        """Called when every rank's writer has written the last decoupled checkpoint."""

    def _commit_decoupled_checkpoint(self) -> None:
        """As DeepSpeed's, which lets rank 0 name the checkpoint in ``latest`` when its own writer is done. Collective.

        A rank whose writer has failed raises here, and then none gets through the barrier.
        """
        save = self.checkpoint_engine.get_commit_info()
        if save is not None:
            self.checkpoint_engine.commit(save)
            dist.barrier()
            self.writer_is_done()

    def leave_failed_step(self) -> None:
        """step() raised: put back the flags that its normal end resets, so that it can be called again."""
        self._running_engine_step = False

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        super()._configure_optimizer(client_optimizer, model_parameters)
        keep_adagrad(self.optimizer, self.basic_optimizer)

    def _backward_prologue(self) -> None:
        if not self._running_engine_backward:
            self.direct_backward_begins()
        super()._backward_prologue()

    def _set_distributed_vars(self, args: Any) -> None:
        super()._set_distributed_vars(args)
        self.before_first_communication(self.device)

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return self.own_optimizer_class() is not None or super()._is_supported_optimizer(optimizer_name)

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        def build() -> torch.optim.Optimizer:
            own = self.own_optimizer_class()
            if own is not None:
                return own(model_parameters, **(self.optimizer_params() or {}))
            optimizer = super(HostEngine, self)._configure_basic_optimizer(model_parameters)
            keep_group_keys(model_parameters, optimizer)
            return optimizer

        return self.prepare_base_optimizer(build)

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> Any:
        """DeepSpeed asks for "zero_allow_untested_optimizer" with any class that is not in its list. Ours is made for
        ZeRO; it is in the list while the engine that binds it to its shards is being built, and no longer."""
        own = self.own_optimizer_class()
        if own is None:
            return super()._do_optimizer_sanity_check(basic_optimizer)
        ZERO_SUPPORTED_OPTIMIZERS.append(own)
        try:
            return super()._do_optimizer_sanity_check(basic_optimizer)
        finally:
            ZERO_SUPPORTED_OPTIMIZERS.remove(own)

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        self.update_at_boundary(lambda: super(HostEngine, self)._take_model_step(lr_kwargs))


def tag_for_muon(config_class: Any, model: torch.nn.Module) -> None:
    """Mark the parameters that Muon trains, if it is the base: deepspeed.initialize has looked for it in vain."""
    deepspeed.set_optimizer_flags(config_class, model)


def keep_group_keys(given: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """Bring back what DeepSpeed drops of a user's param groups when it makes two of each, for Muon and for its Adam."""
    for built in optimizer.param_groups:
        if "use_muon" in built:
            first = built["params"][0]
            for group in given:
                if isinstance(group, dict) and any(p is first for p in group["params"]):
                    for key, value in group.items():
                        built.setdefault(key, value)


def keep_adagrad(wrapper: Any, adagrad: torch.optim.Optimizer) -> None:
    """Undo what DeepSpeed's ZeRO wrappers do to ``torch.optim.Adagrad``.

    They put a new one, made from its defaults, in its place, because it makes its state at construction, for parameters
    that are no longer those it steps. Every param group but one is lost with it, and what the groups brought.
    """
    if not isinstance(adagrad, torch.optim.Adagrad) or getattr(wrapper, "optimizer", adagrad) is adagrad:
        return
    in_stage_3 = hasattr(wrapper, "fp32_partitioned_groups_flat")
    flats = wrapper.fp32_partitioned_groups_flat if in_stage_3 else wrapper.single_partition_of_fp32_groups
    start = adagrad.defaults["initial_accumulator_value"]
    adagrad.state.clear()
    for flat in flats:
        adagrad.state[flat] = {"step": torch.zeros(()), "sum": torch.full_like(flat.detach(), start)}
    wrapper.optimizer = adagrad
    if not in_stage_3:  # for the groups that were lost, what DeepSpeed knows of each parameter is missing too
        wrapper._link_all_hp_params()
        wrapper._param_slice_mappings = wrapper._create_param_mapping()

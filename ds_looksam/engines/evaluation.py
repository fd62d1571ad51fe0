"""An engine that remembers how an accumulation window was evaluated, and can evaluate it again at other weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import LookSAMReplayError
from ..replay.guard import PerturbedWeights
from ..replay.side_effects import without_side_effects
from ..replay.window import Backward, LossFn, Window
from .zero_optimizer import LayerwiseEngine

Closure = Callable[[], Any]


class ReplayingEngine(LayerwiseEngine):
    """The user's loop: ``forward`` and ``backward`` of a window that ends in a SAM step are recorded, and
    :meth:`_evaluate_again` runs them once more. :class:`~ds_looksam.engines.looksam.LookSAMEngine` decides when.
    """

    loss_fn: LossFn | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.loss_fn = None
        self._window = Window()
        self._closure: Closure | None = None
        self._replaying = False
        self._evaluating_again = False  # inside one forward or backward of a replay
        self._replayed_forwards = self._replayed_backwards = 0
        self._replayed = Window()  # of the second evaluation; only its loss
        super().__init__(*args, **kwargs)
        self._perturbed = PerturbedWeights(self.module)

    @property
    def _window_is_recorded(self) -> bool:
        """Whether the window now running may have to be evaluated again. The same throughout a window."""
        raise NotImplementedError

    # The user's loop ------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's; in a window that ends in a SAM step the inputs and the RNG state are remembered."""
        if self._perturbed:
            self._refuse_unless_in_closure("forward")
            return self._forward_again(*inputs, **kwargs)
        run = super().forward
        if self._window_is_recorded and torch.is_grad_enabled():
            return self._window.add_forward(self.module, run, inputs, kwargs, self._note_backward)
        with self._window.not_recording():
            return run(*inputs, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """As DeepSpeed's; in a window that ends in a SAM step it is remembered how ``loss`` was formed."""
        if self._perturbed:
            self._refuse_unless_in_closure("backward")
            return self._backward_again(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        if self._window_is_recorded:
            self._forget_what_was_zeroed()
            self._window.add_backward(loss, self._backward_now(scale_wrt_gas=scale_wrt_gas))
            self._window.add_loss(loss, self._share(scale_wrt_gas))
        with self._window.not_recording():
            return super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)

    def _backward_now(self, scale_wrt_gas: bool = True, direct: bool = False) -> Backward:
        return Backward(self.is_gradient_accumulation_boundary(), scale_wrt_gas, direct, no_sync=self.inside_no_sync(),
                        coalesced=self.inside_coalesce())

    def _note_backward(self, loss: Tensor, by_engine: bool, problem: str | None) -> None:
        """A backward that this engine did not begin is about to run over its output: ``loss.backward()``, or another
        engine's ``backward``, which has divided the loss by its own accumulation steps."""
        if by_engine and self.gradient_loss_scale() != 1:
            problem = "the loss went through the backward of another engine, which has a loss scale of its own"
        self._forget_what_was_zeroed()
        self._window.add_backward(loss, self._backward_now(scale_wrt_gas=not by_engine, direct=not by_engine), problem)
        self._window.add_loss(loss, self._share(scale_wrt_gas=not by_engine, direct=True))

    def _forget_what_was_zeroed(self) -> None:
        """Where the gradients are the parameters' own, ``module.zero_grad()`` throws them away too."""
        if isinstance(self.optimizer, torch.optim.Optimizer) and all(p.grad is None for p in self._shards.parameters()):
            self._window.forget_backwards()

    def direct_backward_begins(self) -> None:
        if self._window_is_recorded and not self._perturbed:
            self._window.unknown_backward_begins()

    def zero_grad(self) -> None:
        """As DeepSpeed's, also of what a wrapper has taken out of ``p.grad``: the window begins anew."""
        super().zero_grad()
        if self.zero_optimization():
            self.optimizer.zero_grad()
        self._window.forget()

    def step(self, lr_kwargs: dict[str, Any] | None = None, closure: Closure | None = None) -> None:
        """As DeepSpeed's; at the boundary of a SAM step the window is evaluated a second time, at w + eps.

        Args:
            lr_kwargs: handed to the LR scheduler, as in DeepSpeed.
            closure: runs ``engine(...)`` and ``engine.backward(...)`` for every micro-batch of the window again. Only
                called in SAM steps, and only needed where the loss can neither be replayed nor recomputed by
                ``loss_fn``.

        Raises:
            LookSAMReplayError: the second evaluation cannot be run. Weights, gradients, RNG and statistics are as
                before the call, unless another rank alone failed: then a checkpoint must be loaded.
        """
        self._perturbed.refuse("engine.step()")
        self._closure = closure
        try:
            with self._window.not_recording():
                super().step(lr_kwargs)
        except BaseException:
            self.leave_failed_step()
            raise
        finally:
            self._closure = None

    # The second evaluation ------------------------------------------------------------------------------------------

    @property
    def progress(self) -> str:
        """How far the second evaluation has come."""
        return f"forward {self._replayed_forwards}, backward {self._replayed_backwards}"

    def _evaluate_again(self) -> None:
        """Forward and backward of every micro-batch of the window, with its own RNG state and training flags."""
        self._replaying, self._replayed_forwards, self._replayed_backwards = True, 0, 0
        self._replayed = Window()
        try:
            with self.running_again(), torch.enable_grad(), without_side_effects(self.module):
                if self._closure is not None:
                    self._call_closure(self._closure)
                else:
                    self._replay_window()
                self.finish_unmanaged_window()
        finally:
            self._replaying = False

    def _replay_window(self) -> None:
        def backward(loss: Tensor, how: Backward, retain_graph: bool) -> None:
            with self.no_sync() if how.no_sync else nullcontext():
                self._backward_again(loss, retain_graph, how.scale_wrt_gas, how.direct)

        coalesced = any(how.coalesced for how in self._window.backwards)
        with self.coalesce_grad_reduction() if coalesced else nullcontext():
            self._window.evaluate_again(self._forward_again, backward, self.loss_fn)

    def _call_closure(self, closure: Closure) -> None:
        closure()
        n = len(self._window.backwards)
        if self._replayed_backwards != n:
            raise LookSAMReplayError(
                f"engine.step(closure=...): the closure called engine.backward() {self._replayed_backwards} times, the "
                f"window had {n}. It must evaluate the whole accumulation window.")

    def _forward_again(self, *inputs: Any, **kwargs: Any) -> Any:
        recorded = self._window.forwards
        if self._replayed_forwards < len(recorded):
            forward = recorded[self._replayed_forwards]
            forward.mode.apply(self.module)
            forward.random.restore()
        self._replayed_forwards += 1
        self._evaluating_again = True
        try:
            return super().forward(*inputs, **kwargs)
        finally:
            self._evaluating_again = False

    def _backward_again(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True,
                        direct: bool = False) -> Tensor:
        recorded = self._window.backwards
        if self._replayed_backwards < len(recorded):
            self.set_boundary_of_next_backward(recorded[self._replayed_backwards].is_boundary)
        self._replayed_backwards += 1
        self._replayed.add_loss(loss, self._share(scale_wrt_gas, direct))
        self._evaluating_again = True
        try:
            if direct:
                return self.backward_directly(loss, retain_graph)
            return super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        finally:
            self._evaluating_again = False

    def _refuse_unless_in_closure(self, what: str) -> None:
        """Only the user's closure runs the engine at perturbed weights: not a hook, not an evaluation without grad."""
        by_closure = self._replaying and self._closure is not None and not self._evaluating_again
        if not (by_closure and torch.is_grad_enabled()):
            self._perturbed.refuse(f"engine.{what}()")

    def _loss_rise(self) -> Tensor:
        """The window's loss at w + eps minus its loss at w on this rank, float64 [1] where the sums are."""
        before, after = self._window.loss, self._replayed.loss
        rise = torch.tensor(torch.nan) if before is None or after is None else after - before
        return rise.to(self._shards.device, torch.float64).reshape(1)

    def _share(self, scale_wrt_gas: bool = True, direct: bool = False) -> float:
        """What DeepSpeed multiplies the loss of one micro-batch with: 1 / accumulation, unless the user did so. A loss
        whose backward was called directly carries the loss scale."""
        share = 1 / self.gradient_accumulation_steps() if scale_wrt_gas else 1.0
        return share / self.gradient_loss_scale() if direct else share

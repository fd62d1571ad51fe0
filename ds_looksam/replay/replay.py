"""The user's loop, recorded where its window ends in a SAM step, and the second evaluation of that window.

Where a :class:`Replay` stands, and what may be done there:

    IDLE         the user's loop; weights are clean
    PERTURBED    the model computes with w + eps: nobody may run it, save it or read its state_dict
    EVALUATING   the window is run again: by us, or by the user's closure, which alone may call the engine here
    INSIDE       in one forward or backward of that: hooks may not call the engine either
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum, auto
from typing import Any

import torch
from deepspeed.utils import logger
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import LookSAMReplayError
from ..ranks.agree import raised_everywhere
from ..shards import GradientShards
from .module_state import Isolation
from .snapshot import ModelSnapshot, submodules
from .tape import in_functorch
from .window import Backward, LossFn, Window

Closure = Callable[[], Any]

_WHEN = ("was called while the weights are perturbed: from inside the second evaluation of a SAM step (a forward hook, "
         "say), or after it was interrupted. Call it after step(); load a checkpoint after an interruption.")


class Where(Enum):
    IDLE = auto()
    PERTURBED = auto()
    EVALUATING = auto()
    INSIDE = auto()


class Replay:
    """See the module's docstring.

    Args:
        engine: a :class:`ds_looksam.engines.host.HostEngine`; its own methods, and DeepSpeed's public ones.
        forward, backward: DeepSpeed's own.
        is_recorded: whether the window now running may have to be evaluated again. The same throughout a window.
        optimized: the parameters that are.

    Attributes:
        loss_fn, gradient_edit: the user's, see :class:`ds_looksam.LookSAMEngine`.
        window: what was recorded since the last update.
        gradient_is_complete: the boundary's backward has run since.
        when_forgotten: called when the user has thrown the window's gradient away, with :meth:`forget_backwards`'s
            ``told``.
        around_backward: entered around each backward of the user's that belongs to the window.
    """

    def __init__(self, engine: Any, module: nn.Module, forward: Callable[..., Any], backward: Callable[..., Tensor],
                 is_recorded: Callable[[], bool], optimized: Callable[[], Iterable[nn.Parameter]]) -> None:
        self.loss_fn: LossFn | None = None
        self.gradient_edit: Callable[[], None] | None = None
        self.when_forgotten: Callable[[bool], None] = lambda told: None
        self.around_backward: Callable[[], AbstractContextManager[None]] = nullcontext
        self.window = Window()
        self.gradient_is_complete = False
        self._isolation = Isolation(optimized)
        self._engine, self._module = engine, module
        self._forward, self._backward, self._is_recorded = forward, backward, is_recorded
        self._where = Where.IDLE
        self._guards: list[Any] = []
        self._closure: Closure | None = None
        self._forwards = self._backwards = 0  # of the second evaluation, so far
        self._started = time.monotonic()  # when it began
        self._replayed = Window()  # of the second evaluation; only its loss

    # The user's loop ------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The engine's forward: inputs and RNG state are remembered where the window may be evaluated again."""
        if self._where is not Where.IDLE:
            self._refuse_unless_in_closure("forward")
            return self._forward_again(*inputs, **kwargs)
        if self._is_recorded() and torch.is_grad_enabled():
            return self.window.add_forward(self._module, self._forward, inputs, kwargs, self._backward_of_another,
                                           self._isolation.before)
        with self.window.not_recording():
            return self._forward(*inputs, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """The engine's backward: how ``loss`` was formed is remembered where the window may be evaluated again."""
        if self._where is not Where.IDLE:
            self._refuse_unless_in_closure("backward")
            return self._backward_again(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        with self.window.not_recording(), self._recorded(loss, scale_wrt_gas) if self._is_recorded() else nullcontext():
            self.gradient_is_complete = self._engine.is_gradient_accumulation_boundary()
            return self._backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)

    @contextmanager
    def _backward_of_another(self, loss: Tensor, by_engine: bool, problem: str | None) -> Iterator[None]:
        """While a backward that this engine did not begin runs over its output: ``loss.backward()``, or another
        engine's ``backward``, which has divided the loss by its own accumulation steps."""
        if by_engine and self._engine.gradient_loss_scale() != 1:
            problem = "the loss went through the backward of another engine, which has a loss scale of its own"
        with self._recorded(loss, not by_engine, direct=not by_engine, is_scaled=True, problem=problem):
            self.gradient_is_complete = self._engine.is_gradient_accumulation_boundary()
            yield

    @contextmanager
    def _recorded(self, loss: Tensor, scale_wrt_gas: bool, direct: bool = False, is_scaled: bool = False,
                  problem: str | None = None) -> Iterator[None]:
        """While a backward runs that belongs to the window, unless it raises."""
        engine = self._engine
        if self.window.backwards and engine.gradient_shards.gradients_are_gone():
            self.forget_backwards(told=False)
        how = Backward(engine.is_gradient_accumulation_boundary(), engine.gradient_accumulation_steps(), scale_wrt_gas,
                       direct, engine.inside_no_sync(), engine.inside_coalesce())
        with self.window.unless_it_raises(), self.around_backward():
            self.window.add_backward(loss, how, problem)
            self.window.add_loss(loss, self._share(scale_wrt_gas, is_scaled))
            yield

    def forget_backwards(self, told: bool) -> None:
        """The user has thrown away what backwards had left since the last update. ``told``: by a call that we saw; else
        ``p.grad`` is None."""
        self.window.forget_backwards()
        self.when_forgotten(told)

    def direct_backward_begins(self) -> bool:
        """A gradient has reached the output of a forward without ``engine.backward``. False if none will reach
        parameters: ``torch.autograd.grad`` or ``torch.func`` runs."""
        if self._where is Where.IDLE and self._is_recorded():
            return self.window.unknown_backward_begins()
        return not in_functorch()

    @contextmanager
    def stepping(self, closure: Closure | None) -> Iterator[None]:
        """The user called ``engine.step(closure=...)``."""
        self.refuse("engine.step()")
        self._closure = closure
        try:
            with self.window.not_recording():
                yield
        finally:
            self._closure = None

    def forget(self) -> None:
        """The window's update is over, its weights are published: nothing of it is kept."""
        self.weights_are_clean()
        self.window.forget()
        self.gradient_is_complete = False

    def update_is_over(self) -> None:
        self.forget()
        self._isolation.update_is_over()

    def weights_are_clean(self) -> None:
        """On this rank the model computes with w again."""
        for guard in self._guards:
            guard.remove()
        self._guards = []
        self._where = Where.IDLE

    # The second evaluation ------------------------------------------------------------------------------------------

    @property
    def is_perturbed(self) -> bool:
        return self._where is not Where.IDLE

    @property
    def is_evaluating(self) -> bool:
        return self._where in (Where.EVALUATING, Where.INSIDE)

    def refuse(self, what: str) -> None:
        """Raise LookSAMReplayError if the weights are perturbed."""
        if self.is_perturbed:
            raise LookSAMReplayError(f"{what} {_WHEN}")

    def check(self, in_step: bool = True) -> None:
        """Raise LookSAMReplayError if the window cannot be evaluated again. Nothing has been changed yet. ``in_step``:
        ``engine.step`` asks, which may be given a closure."""
        if self._closure is None:
            self.window.check(self.loss_fn, with_closure=in_step)

    @contextmanager
    def perturbed(self, shards: GradientShards, put_back: Callable[[], None]) -> Iterator[None]:
        """While the weights are perturbed for a second evaluation. Collective where it is left by an exception that
        every rank raises. On leaving it the module and all generators are
        as before; the weights are clean, and no longer marked, when the update has published them (:meth:`forget`).

        Args:
            put_back: gives the first gradient back to the wrapper, where the evaluation fails. If it did so on every
                rank, all is then as it was before step(). Otherwise what this rank can put back alone is, and the
                weights stay marked as perturbed: a load or the job's end is left.

        Raises:
            LookSAMReplayError: this rank's error is only what came of another rank's.
        """
        snapshot = ModelSnapshot(self._module, optimized=shards.parameters())
        _drop_cached_weights()
        try:
            self._where = Where.PERTURBED
            # The door through which perturbed weights could leave: torch.save(model.state_dict()) from a forward hook,
            # or from an exit handler after an interruption. Assigning parameters cannot be intercepted.
            self._guards = self._guards or [
                m.register_state_dict_pre_hook(lambda m, *_: self.refuse(f"{type(m).__name__}.state_dict()"))
                for m in submodules(self._module) if not isinstance(m, torch.jit.ScriptModule)]  # which have no hooks
            with self._isolation.second_evaluation(self._module, self.window.before):
                yield
        except Exception as error:
            # Any other BaseException ends the process: restoring is collective, and the other ranks may not be told.
            self._leave(error, shards, put_back, "the second evaluation of a SAM step")
            raise
        finally:
            snapshot.restore()
            _drop_cached_weights()
            shards.weights_were_written()

    def update_failed(self, error: Exception, shards: GradientShards) -> None:
        """The update of a SAM step raised, before or after it had published its weights. If it did so on every rank,
        which is collective then, the weights are the masters' afterwards and the gradient is gone."""
        self._where = Where.PERTURBED  # here they may be clean by now, but if the ranks are apart nobody may save
        self._leave(error, shards, lambda: None, "the update of a SAM step")

    def _leave(self, error: Exception, shards: GradientShards, put_back: Callable[[], None], where: str) -> None:
        apart = raised_everywhere(error, shards.process_group,
                                  f"forward {self._forwards}, backward {self._backwards}",
                                  patience=time.monotonic() - self._started)
        if apart is None:
            self._engine.leave_failed_evaluation()
            shards.abort_evaluation()
            shards.restore_weights()
            put_back()
            self.weights_are_clean()  # the window stays: step(closure=...) may be called again
            return
        shards.unperturb_local()
        put_back()
        told = (f"In {where} " + (apart.first or "the other ranks were lost") +
                ". The ranks are no longer in sync, so the weights cannot be put back on all of them and "
                "nothing can be saved; go on from a checkpoint.")
        if apart.comes_after:
            raise LookSAMReplayError(told) from error
        logger.error(f"LookSAM: {told}")

    def evaluate(self) -> None:
        """Forward and backward of every micro-batch of the window, with its own RNG state and training flags.
        Collective."""
        self._forwards = self._backwards = 0
        self._replayed = Window()
        self._where = Where.EVALUATING
        self._started = time.monotonic()
        try:
            with self._engine.running_again(), torch.enable_grad():
                self._announce_next_backward()
                if self._closure is not None:
                    self._call_closure(self._closure)
                else:
                    self._run_again()
                self._engine.finish_unmanaged_window()
        finally:
            self._where = Where.PERTURBED

    def edit_gradients(self) -> None:
        """Let the user change the gradient that the wrapper has just averaged."""
        if self.gradient_edit is not None:
            self.gradient_edit()

    def loss_rise(self, device: torch.device) -> Tensor:
        """The window's loss at w + eps minus its loss at w on this rank, float64 [1] on ``device``."""
        before, after = self.window.loss, self._replayed.loss
        rise = torch.tensor(torch.nan) if before is None or after is None else after - before
        return rise.to(device, torch.float64).reshape(1)

    def _run_again(self) -> None:
        engine = self._engine

        def backward(loss: Tensor, how: Backward, retain_graph: bool) -> None:
            with engine.no_sync() if how.no_sync else nullcontext():
                self._backward_again(loss, retain_graph, how.scale_wrt_gas, how.direct)

        coalesced = any(how.coalesced for how in self.window.backwards)
        with engine.coalesce_grad_reduction() if coalesced else nullcontext():
            self.window.evaluate_again(self._forward_again, backward, self.loss_fn)

    def _call_closure(self, closure: Closure) -> None:
        closure()
        expected = len(self.window.backwards)
        if self._backwards != expected:
            raise LookSAMReplayError(
                f"engine.step(closure=...): the closure called engine.backward() {self._backwards} times, the window "
                f"had {expected}. It must evaluate the whole accumulation window.")

    def _forward_again(self, *inputs: Any, **kwargs: Any) -> Any:
        recorded = self.window.forwards
        structure: AbstractContextManager[None] = nullcontext()
        if self._forwards < len(recorded):
            this = recorded[self._forwards]
            this.mode.apply(self._module)
            this.random.restore()
            if self._closure is None:  # which sets them itself
                structure = this.structure.applied()
                left = recorded[self._forwards - 1].left if self._forwards else None
                if left is not None:
                    this.entered.set_changes_since(left)
                    self._engine.gradient_shards.weights_were_written()
        self._forwards += 1
        with self._inside(), structure:
            return self._forward(*inputs, **kwargs)

    def _backward_again(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True,
                        direct: bool = False) -> Tensor:
        self._backwards += 1
        self._replayed.add_loss(loss, self._share(scale_wrt_gas, direct))
        with self._inside():
            if direct:
                self._engine.backward_directly(loss, retain_graph)
            else:
                loss = self._backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        self._announce_next_backward()
        return loss

    def _announce_next_backward(self) -> None:
        """Also to what runs before it: the hooks of a ``torch.autograd.grad`` in the loss reduce at the boundary."""
        recorded = self.window.backwards
        if self._backwards < len(recorded):
            how = recorded[self._backwards]
            self._engine.set_up_next_backward(how.is_boundary, how.accumulation)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._where = Where.INSIDE
        try:
            yield
        finally:
            self._where = Where.EVALUATING

    def _refuse_unless_in_closure(self, what: str) -> None:
        """Only the user's closure runs the engine at perturbed weights: not a hook, not an evaluation without grad."""
        by_closure = self._where is Where.EVALUATING and self._closure is not None
        if by_closure and not torch.is_grad_enabled():
            raise LookSAMReplayError(f"engine.step(closure=...): the closure called engine.{what}() under "
                                     "torch.no_grad(), where the weights are perturbed. What it returns is a constant "
                                     "of the loss: take the value that your loop has computed before")
        if not by_closure:
            self.refuse(f"engine.{what}()")

    def _share(self, scale_wrt_gas: bool, is_scaled: bool) -> float:
        """What DeepSpeed multiplies the loss of one micro-batch with: 1 / accumulation, unless the user did so.
        ``is_scaled``: it carries the loss scale, as one whose backward was called directly."""
        share = 1 / self._engine.gradient_accumulation_steps() if scale_wrt_gas else 1.0
        return share / self._engine.gradient_loss_scale() if is_scaled else share


def _drop_cached_weights() -> None:
    """What torch keeps of weights until a region ends would be used at other weights: casts of autocast, and what
    ``parametrize.cached()`` has computed. A user may call step() inside of one, so that nothing ends."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()

"""Remembers the forwards and backwards of an accumulation window, so that it can be evaluated again at w + eps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LookSAMReplayError
from .between import Attributes
from .inputs import Watched, rebuilt
from .module_state import Before
from .recording import (
    OUTPUT,
    Apart,
    GraphId,
    Made,
    RecordedCall,
    Step,
    Values,
    graph_id,
    graph_of,
    output_tensors,
    with_predecessors,
)
from .snapshot import ComputeMode, Flags, RandomState, Structure, requiring_grad
from .tape import LossTape, OnBackward, in_functorch

LossFn = Callable[..., Tensor]


def closure_way(with_closure: bool) -> str:
    """What always helps, where ``ascent`` allows it."""
    return (", or call engine.step(closure=...) with a function that runs forward and engine.backward() for every "
            "micro-batch of the window again") if with_closure else ""


def ways_out(with_closure: bool = True) -> str:
    """What a user can do about a loss that cannot be formed again."""
    return ("The second evaluation can form the loss again if the model returns it, or if torch functions make it of "
            "the model's output between engine(...) and engine.backward(). Otherwise set engine.loss_fn = "
            f"f(outputs, *inputs, **kwargs) -> loss{closure_way(with_closure)}. (In a Hugging Face Trainer: "
            "trainer.model_wrapped.loss_fn, from a TrainerCallback's on_train_begin.)")


def _comes_from_the_model(leaf: Tensor) -> str:
    by = "a parameter of the model" if leaf.grad_fn is None else leaf.grad_fn.name()
    return (f"an input of the model (shape {tuple(leaf.shape)}) has an autograd graph that reaches the model's own "
            f"parameters, but was not made by torch functions called on its output ({by}): made by a part of the model "
            "that the loop called itself, or kept by an earlier forward, say. The second evaluation would lose the "
            "gradient that flows through it")


_IN_FORWARD = ("engine.backward() was called inside the model's own forward, which LookSAM runs again: call it, and "
               "engine.step(), after the forward. In PyTorch Lightning, manual optimization does this: use automatic "
               "optimization")


_NO_FORWARD = ("no forward of the engine was seen in this window before a backward: call engine(...), not a method of "
               "engine.module")


@dataclass(eq=False)
class Forward(Step):
    """One forward of the user's loop and all that is needed to run it again. ``args`` and ``kwargs`` hold
    :class:`Made` and :class:`Apart` in place of tensors that depend on the model or require grad."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    watched: Watched
    random: RandomState
    mode: ComputeMode
    structure: Structure
    entered: Attributes
    before: Before | None = None  # where no backward has come before it
    left: Attributes | None = None
    lost: str | None = None  # what a replay would not have of an input: the way of a gradient, say
    n_outputs: int = 0
    nodes: list[GraphId] = field(default_factory=list)

    def check(self) -> None:
        self.watched.check()

    def inputs(self, values: Values) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The recorded inputs, in containers of their own. What lies upstream of them is not reached by a replay, but
        for other forwards of the same window."""
        args, kwargs = rebuilt((self.args, self.kwargs), values.of)
        return args, kwargs

    def run(self, values: Values, forward: Callable[..., Any]) -> None:
        args, kwargs = self.inputs(values)
        output = forward(*args, **kwargs)
        tensors = output_tensors(output)
        if len(tensors) != self.n_outputs:
            raise LookSAMReplayError(f"the model returned {self.n_outputs} tensors in the first evaluation and "
                                     f"{len(tensors)} in the second")
        values.outputs[self] = output
        values.nodes |= {graph_id(t) for t in tensors} - {None}  # now: what is done in place gives tensors other nodes
        values.made[self] = [*(values.of(apart) for apart in self.apart), *tensors]


@dataclass(frozen=True)
class Backward:
    """How the user ran one backward."""

    is_boundary: bool  # whether DeepSpeed took it for the last one of its accumulation window
    accumulation: int  # gradient_accumulation_steps, which DeepSpeed divides by; the loop may have changed it since
    scale_wrt_gas: bool = True  # engine.backward's argument
    direct: bool = False  # loss.backward() instead of engine.backward(loss)
    no_sync: bool = False  # inside engine.no_sync()
    coalesced: bool = False  # inside engine.coalesce_grad_reduction()


@dataclass(eq=False)
class RecordedBackward(Step):
    """One backward, the forwards that its graph reaches, and what made its loss: None where ``problem`` tells why
    that is not known. ``flags``: which parameters required grad, for others autograd accumulates nothing. ``random``: a
    backward may draw, where activations are computed again by ``checkpoint(..., preserve_rng_state=False)``, say."""

    how: Backward
    forwards: list[Forward]
    loss: Made | None
    graph: list[Any]
    flags: Flags
    random: RandomState

    def form_loss(self, values: Values, loss_fn: LossFn | None) -> Tensor:
        """The loss of the second evaluation, formed as the user formed the first one."""
        if loss_fn is not None:
            args, kwargs = self.forwards[0].inputs(values)
            loss = loss_fn(values.outputs[self.forwards[0]], *args, **kwargs)
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                raise LookSAMReplayError("engine.loss_fn must return a one-element tensor that requires grad, "
                                         f"got {type(loss).__name__}")
            return loss
        assert self.loss is not None
        loss = values.of(self.loss)
        if graph_of(loss, values.nodes, ()) != self.graph:
            raise LookSAMReplayError("the second evaluation formed the loss by other operations than the first one: "
                                     "set engine.loss_fn, or call engine.step(closure=...)")
        return loss


class Window:
    """The forwards and backwards since the last update. Empty, and not filled, in a window without a SAM step."""

    def __init__(self) -> None:
        self._in_forward = False
        self.forget()

    def forget(self) -> None:
        """Nothing of a window outlives its update, nor gradients that were thrown away."""
        tape: LossTape | None = getattr(self, "_tape", None)
        if tape is not None:
            tape.discard()
        self._tape: LossTape | None = None
        self._left: Attributes | None = None  # by the last forward
        self._trained: Attributes | None = None  # left by the last one that a backward reached
        self._frozen: list[nn.Parameter] = []  # those whose changes between forwards are followed
        self._newest: Forward | None = None  # the others are kept by what was made of them
        self.forget_backwards()

    def forget_backwards(self) -> None:
        """Their gradients were thrown away; forwards may still be trained."""
        self._backwards: list[RecordedBackward] = []
        self._problem: str | None = None
        self.loss: Tensor | None = None  # of the micro-batches so far, see add_loss

    @contextmanager
    def unless_it_raises(self) -> Iterator[None]:
        """The backward that is recorded inside belongs to the window: not if it raised, since the loop may try again.
        """
        count, kept = len(self._backwards), (self._problem, self.loss, self._trained)
        try:
            yield
        except BaseException:  # also one that Ctrl-C has cut off
            del self._backwards[count:]
            self._problem, self.loss, self._trained = kept
            raise

    @property
    def backwards(self) -> list[Backward]:
        """How they were run, in the user's order."""
        return [backward.how for backward in self._backwards]

    @property
    def forwards(self) -> list[Forward]:
        """Those that a backward reached, in the user's order."""
        steps = with_predecessors(*self._backwards, *(f for backward in self._backwards for f in backward.forwards))
        return [step for step in steps if isinstance(step, Forward)]

    @property
    def before(self) -> Before | None:
        """The module before the first of :attr:`forwards`."""
        return next((forward.before for forward in self.forwards), None)

    # The first evaluation -------------------------------------------------------------------------------------------

    def add_forward(self, module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
                    on_backward: OnBackward,
                    before: Callable[[nn.Module], Before] | None = None) -> Any:
        """Run a forward and remember it, as long as a tensor depends on it. What is made of its output is recorded from
        here on. ``on_backward``: :class:`LossTape`'s. ``before`` remembers the module's state."""
        if in_functorch():  # its output is a value like any other, or refused where it gets into the loss
            with self.not_recording():
                return run(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if self._tape is None:
                self._tape = LossTape(module, on_backward)
            tape, inputs, apart = self._tape, [], []
            needs: list[Step] = []
            values: list[Step] = []
            lost: list[str | None] = []

            def keep(leaf: Any) -> Any:
                if not isinstance(leaf, Tensor):
                    return leaf
                made = tape.known(leaf)
                if made is not None:  # of the model's output, with its graph or detached: computed again
                    lost.append(tape.changed_unseen(leaf, "an input of the model"))
                    (needs if leaf.requires_grad else values).extend(tape.needs_of(leaf))
                    return made
                if not leaf.requires_grad:
                    return leaf
                if any(tape.reached(leaf)):
                    lost.append(_comes_from_the_model(leaf))
                apart.append(Apart(leaf.detach(), graph_id(leaf), None))
                inputs.append(leaf)
                return apart[-1]

            at_first = before(module) if before is not None and not self._backwards else None
            if at_first is not None:
                self._frozen = at_first.copied
            since = self._trained or self._left
            watched = Watched((args, kwargs))
            kept_args, kept_kwargs = rebuilt((args, kwargs), keep)
            forward = Forward(kept_args, kept_kwargs, watched, RandomState.capture(), ComputeMode.capture(module),
                              Structure(module), Attributes(module, since, self._frozen if since is not None else ()),
                              apart=apart, number=tape.number(), needs=needs, needs_values=values,
                              before=at_first, lost=next(filter(None, lost), None))
        self._in_forward = True
        try:
            with self.not_recording():
                output = run(*args, **kwargs)
        finally:
            self._in_forward = False
        with torch._C.DisableTorchFunction():
            watched.forward_is_over()
            forward.left = self._left = Attributes(module, frozen=self._frozen)
            outputs = output_tensors(output)
            forward.n_outputs, forward.nodes = len(outputs), tape.add_forward(forward, inputs, outputs)
        self._newest = forward
        return output

    def add_backward(self, loss: Tensor, how: Backward, problem: str | None = None) -> None:
        """Remember a backward of this engine that is about to run. What is wrong is told by :meth:`check`."""
        if self._in_forward:
            self._problem = _IN_FORWARD
            return
        if self._tape is None:  # engine.module.method(...), say: a closure can do it again
            self._backwards.append(RecordedBackward(how, [], None, [], [], RandomState.capture(), problem=_NO_FORWARD))
            return
        with torch._C.DisableTorchFunction():
            forwards = [f for f in self._tape.reached(loss)[0] if isinstance(f, Forward)]
            made, steps, reason = self._tape.trace(loss)
            graph: list[Any] = []
            if reason is None:
                recorded = [step for step in steps if isinstance(step, Forward)]
                graph = graph_of(loss, {node for f in recorded for node in f.nodes},
                                 {apart.made_by for step in steps for apart in step.apart})
                if OUTPUT not in graph:
                    reason = "the loss given to backward() does not depend on the output of the model"
            if not forwards and self._newest is not None:
                forwards = [self._newest]
            flags = forwards[0].structure.flags_now() if forwards else []
            backward = RecordedBackward(how, forwards, made, graph, flags, RandomState.capture(),
                                        number=self._tape.number(), needs=steps, problem=problem or reason)
            self._trained = max(forwards, key=lambda forward: forward.number).left if forwards else None
        self._backwards.append(backward)

    def add_loss(self, loss: Tensor, share: float) -> None:
        """Add up the window's loss, float64 0-dim on the loss's device; ``share``: this micro-batch's weight in it."""
        part = loss.detach().to(torch.float64, copy=True).sum() * share
        self.loss = part if self.loss is None else self.loss + part

    def unknown_backward_begins(self) -> bool:
        """A gradient has reached an output of the model without ``engine.backward``. False if it goes to no parameter.
        """
        if in_functorch() or (self._tape is not None and self._tape.in_grad):
            return False
        if self._tape is None or not self._tape.in_backward:
            self._problem = ("a backward was run by neither engine.backward(loss) nor loss.backward(), or over a "
                             "forward of an earlier window")
        return True

    def not_recording(self) -> AbstractContextManager[None]:
        """What is called inside is not part of how the user forms the loss."""
        return nullcontext() if self._tape is None else self._tape.paused()

    # The second evaluation ------------------------------------------------------------------------------------------

    def check(self, loss_fn: LossFn | None, with_closure: bool = True) -> None:
        """Raise LookSAMReplayError if the window cannot be evaluated again. ``with_closure``: that may do it instead.
        """
        reasons = [self._problem]
        if not self._backwards:
            reasons.append("no backward was seen in this window")
        if len({how.coalesced for how in self.backwards}) > 1:
            reasons.append("only some of the window's backwards ran inside coalesce_grad_reduction()")
        for backward in self._backwards:
            if loss_fn is None:
                reasons.append(backward.problem)
            elif len(backward.forwards) != 1:
                reasons.append(f"engine.loss_fn is given the output of one forward, and {len(backward.forwards)} come "
                               "before one backward")
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is not None:
            ways = "" if reason is _IN_FORWARD else f" {ways_out(with_closure)}"
            raise LookSAMReplayError(f"LookSAM cannot run the second evaluation: {reason}.{ways}")
        for step in self._steps(loss_fn):
            step.check()
            if isinstance(step, Forward) and step.lost is not None:
                raise LookSAMReplayError(f"LookSAM cannot run the second evaluation: {step.lost}. Let the model's own "
                                         f"forward make it{closure_way(with_closure)}.")
        for earlier, later in itertools.pairwise(self.forwards):
            assert earlier.left is not None
            later.entered.check_frozen(earlier.left)

    def _steps(self, loss_fn: LossFn | None) -> list[Step]:
        """What the second evaluation runs, in the user's order."""
        if loss_fn is None:
            return with_predecessors(*self._backwards)
        forwards = with_predecessors(*(f for backward in self._backwards for f in backward.forwards))
        return sorted([*forwards, *self._backwards], key=lambda step: step.number)

    def evaluate_again(self, forward: Callable[..., Any], backward: Callable[[Tensor, Backward, bool], None],
                       loss_fn: LossFn | None) -> None:
        """Run the window's forwards, the forming of each loss (by ``loss_fn``, where there is one), and its backwards
        in the user's order. ``backward`` gets the loss, how its backward was run, and whether its graph is needed on.
        """
        steps, values = self._steps(loss_fn), Values()

        def needs(step: Step) -> Sequence[Step]:
            if isinstance(step, RecordedBackward) and loss_fn is not None:  # which gets the inputs too
                return [*step.forwards, *(need for forward in step.forwards for need in needs(forward))]
            return step.needs + step.needs_values

        uses = Counter(need for step in steps for need in needs(step))
        for step in steps:
            if isinstance(step, Forward):
                step.run(values, forward)
            elif isinstance(step, RecordedCall):
                step.run(values)
            elif isinstance(step, RecordedBackward):
                loss = step.form_loss(values, loss_fn)
                kept = any(uses[need] > 1 for need in needs(step))
                step.random.restore()
                with requiring_grad(step.flags):
                    backward(loss, step.how, kept)
                del loss
            for need in needs(step):  # its part of the graph is freed as early as in the user's loop
                uses[need] -= 1
                if not uses[need]:
                    values.made.pop(need, None)
                    values.outputs.pop(need, None)

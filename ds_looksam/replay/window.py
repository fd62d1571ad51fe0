"""Remembers the micro-batches of an accumulation window, so that they can be evaluated again at w + eps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import LookSAMReplayError
from .loss_path import LossPath, UnknownLoss, follow, mark, model_loss, trace
from .recording import Recording
from .snapshot import ComputeMode, RandomState
from .tape import LossTape

LossFn = Callable[..., Tensor]


def ways_out(with_closure: bool = True) -> str:
    """What a user can do about a loss that cannot be formed again."""
    closure = (", or call engine.step(closure=...) with a function that runs forward and engine.backward() for every "
               "micro-batch of the window again") if with_closure else ""
    return ("The second evaluation can form the loss again if the model returns it, or if torch functions make it of "
            "the model's output between engine(...) and engine.backward(). Otherwise set engine.loss_fn = "
            f"f(outputs, *inputs, **kwargs) -> loss{closure}. (In a Hugging Face Trainer: "
            "trainer.model_wrapped.loss_fn, from a TrainerCallback's on_train_begin.)")


@dataclass
class Forward:
    """One forward of the user's loop and all that is needed to run it again."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    mode: ComputeMode
    input_versions: list[tuple[Tensor, int]]

    @classmethod
    def capture(cls, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not t.is_inference()]
        return cls(args, kwargs, RandomState.capture(), ComputeMode.capture(module),
                   [(t, t._version) for t in tensors])

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The recorded inputs, detached: the replay must not reach what lies upstream of them.

        Raises:
            LookSAMReplayError: an input was changed in place since the forward.
        """
        for tensor, version in self.input_versions:
            if tensor._version != version:
                raise LookSAMReplayError(
                    f"an input of the model (shape {tuple(tensor.shape)}, {tensor.dtype}) was changed in place after "
                    "its forward, so the second evaluation would see another micro-batch. Give each forward its own "
                    "tensors.")
        return tree_map_only(Tensor, lambda t: t.detach().requires_grad_() if t.requires_grad else t,
                             (self.args, self.kwargs))


@dataclass(frozen=True)
class Backward:
    """How the user ran one backward.

    Attributes:
        is_boundary: whether DeepSpeed took it for the last one of its accumulation window.
        scale_wrt_gas: ``engine.backward``'s argument.
        direct: ``loss.backward()`` instead of ``engine.backward(loss)``.
        no_sync: inside ``engine.no_sync()``.
        coalesced: inside ``engine.coalesce_grad_reduction()``.
    """

    is_boundary: bool
    scale_wrt_gas: bool = True
    direct: bool = False
    no_sync: bool = False
    coalesced: bool = False


@dataclass
class MicroBatch:
    """One forward and the backward that followed it. ``loss`` tells how it came out of the forward's output, or why
    that is not known."""

    forward: Forward
    backward: Backward
    loss: LossPath | Recording | UnknownLoss


@dataclass
class Window:
    """The forwards and backwards since the last update. Empty, and not filled, in a window without a SAM step."""

    micro_batches: list[MicroBatch] = field(default_factory=list)
    backwards: int = 0
    last_forward: Forward | None = None
    forwards_since_backward: int = 0
    unmatched: UnknownLoss | None = None
    tape: LossTape | None = None
    loss: Tensor | None = None  # of the micro-batches so far, see add_loss

    def add_forward(self, forward: Forward, module: torch.nn.Module, output: Any,
                    on_backward: Callable[..., None]) -> None:
        """Remember a forward. Its inputs are kept by the graph of its loss, so one whose loss is dropped (metrics,
        an evaluation without no_grad) is forgotten with it; only the newest is held here. What is made of its output
        is recorded from here on, and ``on_backward`` called with the arguments of a ``loss.backward()``."""
        mark(output, forward)
        self.last_forward = forward
        self.forwards_since_backward += 1
        self.stop_recording()
        self.tape = LossTape.start(module, output, on_backward)

    def add_backward(self, loss: Tensor, backward: Backward) -> None:
        """Match a backward with its forward. Problems are kept, and told by :meth:`check`, at the boundary."""
        self.backwards += 1
        # A direct backward is seen by the tape itself, which cannot be taken off while it is being called.
        tape = self.tape if backward.direct else self.stop_recording()
        forward = self.last_forward
        path: LossPath | Recording | UnknownLoss
        try:
            forward, path = trace(loss)
        except UnknownLoss as reason:
            path = reason
            if self.forwards_since_backward != 1:
                self.unmatched = UnknownLoss(f"{self.forwards_since_backward} forwards of the engine came before one "
                                             f"backward(), and {reason}")
            elif tape is not None:
                try:
                    path = tape.finish(loss)
                except UnknownLoss as reason_of_tape:
                    path = reason_of_tape
        if forward is not None:
            self.micro_batches.append(MicroBatch(forward, backward, path))
        self.last_forward, self.forwards_since_backward = None, 0

    def add_loss(self, loss: Tensor, share: float) -> None:
        """Add up the window's loss, float64 0-dim on the loss's device; ``share``: this micro-batch's weight in it."""
        part = loss.detach().to(torch.float64, copy=True).sum() * share
        self.loss = part if self.loss is None else self.loss + part

    def not_recording(self) -> AbstractContextManager[None]:
        """What is called inside is not part of how the user forms the loss."""
        return nullcontext() if self.tape is None else self.tape.paused()

    def stop_recording(self) -> LossTape | None:
        tape, self.tape = self.tape, None
        if tape is not None:
            tape.discard()
        return tape

    def check(self, loss_fn: LossFn | None, with_closure: bool) -> None:
        """Raise LookSAMReplayError if the window cannot be evaluated again. ``with_closure``: that may do it instead.
        """
        reasons = [self.unmatched] if self.unmatched else []
        if not self.micro_batches:
            reasons.append(UnknownLoss("no backward was seen in this window"))
        if len({mb.backward.coalesced for mb in self.micro_batches}) > 1:
            reasons.append(UnknownLoss("only some of the window's backwards ran inside coalesce_grad_reduction()"))
        if loss_fn is None:
            reasons += [mb.loss for mb in self.micro_batches if isinstance(mb.loss, UnknownLoss)]
        if reasons:
            raise LookSAMReplayError(f"LookSAM cannot run the second evaluation: {reasons[0]}. "
                                     f"{ways_out(with_closure)}")
        for micro_batch in self.micro_batches:
            micro_batch.forward.inputs()
            if loss_fn is None and isinstance(micro_batch.loss, Recording):
                micro_batch.loss.check()


def loss_again(micro_batch: MicroBatch, output: Any, loss_fn: LossFn | None) -> Tensor:
    """The loss of a replayed forward, formed as the user formed the first one."""
    if loss_fn is not None:
        args, kwargs = micro_batch.forward.inputs()
        loss = loss_fn(output, *args, **kwargs)
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            raise LookSAMReplayError("engine.loss_fn must return a one-element tensor that requires grad, "
                                     f"got {type(loss).__name__}")
        return loss
    if isinstance(micro_batch.loss, Recording):
        return micro_batch.loss.loss(output)
    replayed = model_loss(output)
    if replayed is None or isinstance(micro_batch.loss, UnknownLoss):
        raise LookSAMReplayError(f"the model returned no loss in the second evaluation. {ways_out()}")
    return follow(micro_batch.loss, replayed)

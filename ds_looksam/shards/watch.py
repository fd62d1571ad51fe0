"""Whether the user changes a window's gradient after its backward: a SAM step has two gradients, and what was done to
the first alone would be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.eager import are_same
from ..errors import LookSAMConfigError


class GradientWatch:
    """Compares gradients where DeepSpeed leaves them to the user with those that it gets back: in between it writes to
    them nowhere. Not collective.

    Args:
        parameters: those whose ``p.grad`` is looked at; the list may change.
        writers: owner and name of each function of DeepSpeed that changes the averaged gradient for the user
            (``safe_set_full_grad`` and its like). It may set them anew, when it loads a checkpoint, say.

    Attributes:
        is_on: there was a gradient to watch since :meth:`end`.
        values_changed: bool, on the device: whether the norm of a ``p.grad`` is another one, of which nothing else
            tells. None: no gradient lies there.
    """

    def __init__(self, parameters: Callable[[], list[torch.nn.Parameter]],
                 writers: Callable[[], Iterable[tuple[Any, str]]]) -> None:
        self._parameters, self._writers = parameters, writers
        self.is_on, self._was_written = False, False
        self._marks: tuple[list[tuple[int, int]], Tensor] | None = None
        self.values_changed: Tensor | None = None

    def begin(self) -> None:
        """From here to :meth:`pause` only the user writes to gradients.

        Raises:
            LookSAMConfigError: a gradient is sparse.
        """
        if not self.is_on:
            self.end()  # what was noted outside of a window
        for owner, name in self._writers():
            write = getattr(owner, name)
            if not hasattr(write, "is_noted"):
                setattr(owner, name, self._noting(write))
        self._marks = self._look()
        self.is_on = True

    def pause(self) -> None:
        """Until here only the user wrote to gradients."""
        if self._marks is None:
            return
        (places, norms), (places_now, norms_now) = self._marks, self._look()
        self._marks = None
        if places != places_now:
            self._was_written = True
        elif norms.numel():
            other = ~are_same(norms, norms_now).all()
            self.values_changed = other if self.values_changed is None else self.values_changed | other

    def end(self) -> None:
        """The window's gradient is no longer there to be changed."""
        self.is_on, self._was_written, self.values_changed, self._marks = False, False, None, None

    @property
    def was_written(self) -> bool:
        """Whether somebody has changed the window's gradient, as far as the host knows: through a writer, on every rank
        that called it, or ``p.grad`` where DeepSpeed keeps it there. What was done through ``p.grad.data`` only
        :attr:`values_changed` tells, if that."""
        return self.is_on and self._was_written

    def _look(self) -> tuple[list[tuple[int, int]], Tensor]:
        """Of each ``p.grad`` where its memory is and how often it was written to; and its norm, on the device."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if any(g.layout != torch.strided for g in gradients):
            raise LookSAMConfigError("the gradient of a parameter is sparse: LookSAM needs dense ones. Take "
                                     "sparse=False in torch.nn.functional.embedding")
        norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)) if gradients else torch.zeros(0)
        return [(g.data_ptr(), g._version) for g in gradients], norms

    def _noting(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            self._was_written = True
            return write(*args, **kwargs)

        noting.is_noted = True  # type: ignore[attr-defined]
        return noting

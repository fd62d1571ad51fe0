"""Signal handlers of the user's, while the weights are perturbed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

_SIGNALS = signal.valid_signals()  # asking takes longer than all the rest


@contextmanager
def signals_wait() -> Iterator[None]:
    """Handlers of Python's signals run when this block is left, once for each signal that came. Inside they would find
    perturbed weights, and what they set in the model would be undone with the second evaluation's traces. A second
    Ctrl-C interrupts at once.

    Outside of the main thread, where no handler runs, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[..., Any]] = {
        number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    came: dict[int, bool] = {}

    def wait(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and came.pop(number, False):
            handlers[number](number, frame)
        came[number] = True

    for number in handlers:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            now = signal.getsignal(number)
            if now is wait:
                signal.signal(number, handler)
            elif callable(now):  # set anew inside
                handlers[number] = now
        # Not raised once more: asyncio is told of a signal when it comes, and would be told twice.
        with ExitStack() as all_of_them:  # also if one raises
            for number in came:
                all_of_them.callback(handlers[number], number, None)

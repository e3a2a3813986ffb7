"""Keeps a Ctrl-C from cutting in two what must happen as a whole, such as letting go of six joints."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: two


@contextmanager
def signals_held() -> Iterator[list[int]]:
    """Inside the block, Ctrl-C, SIGTERM and the loss of the terminal only join the list that it yields.

    When the block ends, whatever is still in the list is delivered, once. Only the main thread gets signals;
    in another one the block is an ordinary one.
    """
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in ENDING}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: came.append(number))
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[-1])

"""Ctrl-C, SIGTERM and the loss of the terminal: one way out of a program, which can be held up for a moment.

`launch` takes them over for the whole program. Handlers that are exchanged back and forth instead would leave
instants in which a signal is lost, or cuts in two what must happen as a whole, such as letting go of six joints.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")  # Windows has the first two
ENDING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
BOUNCE = 0.3  # s; a second Ctrl-C so soon is the first one's, and must not interrupt the way out that it began
HUNG_S = 5.0  # s; what holds the signals for longer hangs, on a disk mostly: it is not waited for any more

_held: list[int] | None = None  # the signals that came while somebody holds them up; None while nobody does
_came_at = -math.inf  # s; when the last one came
_held_at = math.inf  # s; when the first one in _held came


def take_signals() -> None:
    """From now on each of ENDING is a KeyboardInterrupt, unless nohup or a background shell had it ignored."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _came_at
    if number == getattr(signal, "SIGHUP", None):
        _mute_what_is_lost()
    if time.monotonic() - _came_at > BOUNCE:
        _came_at = time.monotonic()
        _deliver(number)


def _deliver(number: int) -> None:
    global _held_at
    if _held is None or (_held and time.monotonic() - _held_at > HUNG_S):
        raise KeyboardInterrupt
    if not _held:
        _held_at = time.monotonic()
    _held.append(number)


def _mute_what_is_lost() -> None:
    """Where the terminal is gone, what is said goes nowhere from here on, instead of raising on the way to rest."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextmanager
def signals_held() -> Iterator[list[int]]:
    """Inside the block the signals only join the list that it yields; what is left in it counts at its end.

    One that comes HUNG_S after the first in the list is a KeyboardInterrupt all the same: an arm must not wait for a
    disk that hangs. (It may have to: in a system call that nothing interrupts no handler runs either.)

    Only the main thread gets signals; in another one the block is an ordinary one.
    """
    global _held
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    outer, _held = _held, came
    try:
        yield came
    finally:
        _held = outer
        if came:
            _deliver(came[-1])


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Inside the block the signals wait in the system; a process that is started there has them blocked as well."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

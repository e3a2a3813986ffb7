"""The errors a person can cause or meet, each with the exit code of the program that stops for it.

A message says where, what was found, what is allowed and what to do next, in one or two sentences.
Anything else that escapes a script is a bug and keeps its traceback.
"""

import atexit
import sys
from collections.abc import Callable
from contextlib import suppress

EXIT_DONE, EXIT_INTERRUPTED = 0, 130

hearers: list[Callable[[str], object]] = []  # who is told too: the flight recorder of a rig that is open


class UserError(Exception):
    """Base of the errors that end a script with one sentence instead of a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """A config, an override or a command line that cannot be used."""

    exit_code = 2


class HardwareError(UserError):
    """A port, servo or camera that is missing or does not answer."""

    exit_code = 3


class EpisodeAborted(HardwareError):
    """The episode in progress cannot go on, though the arm is well: drop it, and begin another.

    A script that meets one after the other with no finished episode between them gives up, with exit code 3.
    """


class DataError(UserError):
    """Data that is damaged, would be overwritten, or was made under another schema."""

    exit_code = 4


class SafetyStop(UserError):
    """The arm was stopped because going on could have hurt it or somebody."""

    exit_code = 5


def tell(message: str) -> None:
    """Print a warning on stderr. Never raises: a reader that has gone must not stop what keeps an arm safe."""
    for hearer in hearers:
        hearer(message)
    with suppress(OSError, ValueError):  # a broken pipe or a terminal that is lost; a stream that is closed
        print(message, file=sys.stderr, flush=True)


def tell_at_last(message: str) -> None:
    """`tell` it when the program ends, below the error or the traceback that ends it."""
    atexit.register(tell, message)

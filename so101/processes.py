"""The learner as a process beside the actor's: spawned, watched, started anew where it was killed."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from so101.errors import UserError, tell
from so101.signals import ENDING, signals_blocked, take_signals

STOP_WITHIN = 60.0  # s for the last checkpoint
KILLS_IN_A_ROW, SOON = 3, 60.0  # a learner that is killed so often within so many s has no memory, say


class LearnerProcess:
    """Runs `run(config)` in a process of its own, which prints to learner.log. A context manager; it ends with SIGTERM.

    Spawned, not forked: a fork would share the camera, the serial line and torch's threads.
    """

    def __init__(self, run: Callable[[Any], None], config: Any, folder: Path) -> None:
        self._run, self._config, self._log = run, config, folder / "learner.log"
        self._kills: list[float] = []

    def __enter__(self) -> "LearnerProcess":
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.join(STOP_WITHIN)
        finally:  # a Ctrl-C meanwhile: whoever cannot wait loses the updates since the last checkpoint
            if self._process.exitcode is None:
                tell(f"the learner does not end, and is killed; its last checkpoint is an earlier one ({self._log})")
                self._process.kill()
                self._process.join()

    def watch(self) -> None:
        """Start the learner anew if it was killed. Raises UserError, with its last words, if it failed."""
        if self._process.is_alive():
            return
        code = self._process.exitcode or 0
        self._kills = [*self._kills, time.monotonic()][-KILLS_IN_A_ROW:]
        often = len(self._kills) == KILLS_IN_A_ROW and self._kills[-1] - self._kills[0] < SOON
        if code >= 0 or often:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            said = f"(exit code {code}): {lines[-1] if lines else 'without a word'}" if code else "as it was told to"
            error = UserError(f"the learner ended {said}; resume=true goes on, {self._log} has the rest")
            error.exit_code = code if code > 0 else 1
            raise error
        tell(f"the learner was killed (signal {-code}); it is started again from its last checkpoint")
        self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=_run, args=(self._run, self._config, self._log), name="learner")
        with signals_blocked():  # it would hear the terminal's Ctrl-C until it has a session of its own
            self._process.start()


def _run(run: Callable[[Any], None], config: Any, log: Path) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # the terminal's Ctrl-C is for the actor, which then ends this
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    take_signals()
    try:
        run(config)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("ended", flush=True)


def parent_is_gone() -> bool:
    """Whether the process that spawned this one has died; False where none did."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()

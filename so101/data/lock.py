"""One writer at a time: locks that the operating system lets go of when their holder dies."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from so101.errors import DataError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOOK_AGAIN = 0.1  # s
BYTE = 1 << 30  # Windows locks a byte, and nobody may read it then: one far behind the holder's name


class FolderLock:
    """Holds `<folder>/.lock` until `release`; its text names the holder.

    Raises DataError, naming the other's process id and host, where somebody else holds it for longer than `patience`
    seconds.
    """

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        path, until = folder / ".lock", time.monotonic() + patience
        self._file: IO[str] = open(path, "a+", encoding="utf-8")  # noqa: SIM115  held open: that is the lock
        try:
            while True:
                try:
                    _lock(self._file)
                    break
                except OSError:
                    if time.monotonic() >= until:
                        raise
                    time.sleep(LOOK_AGAIN)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise DataError(f"{folder}: {holder} is writing to it; stop that first, or use another folder") from error
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()

    def release(self) -> None:
        """Let the next writer in. The file stays: removing it would let two writers in at once."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """For the moment that it takes to read a file of `folder`, change it and write it: others wait their turn."""
    if sys.platform == "win32":  # where a folder cannot be opened
        with open(folder / ".turn", "a+") as file:
            _lock(file, waiting=True)
            yield
    else:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _lock(file: IO[str], waiting: bool = False) -> None:
    if sys.platform == "win32":
        file.seek(BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if waiting else msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

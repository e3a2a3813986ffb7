"""Files that are whole or absent (write aside, sync, rename), and JSON that is read strictly."""

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from so101.errors import DataError, UserError


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows cannot open a folder, and needs no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Push a finished file's bytes to the disk. Windows does so only for a file that may be written."""
    with open(path, "rb" if os.name == "posix" else "rb+") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` so that a reader, or a crash at any instant, sees the old bytes or the new ones."""
    if isinstance(content, str):
        content = content.encode()
    path = path.resolve() if path.is_symlink() else path  # what a link leads to is replaced, not the link
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")  # two at once must not share it
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # the person knows the file by its own name
        with suppress(OSError):
            aside.unlink(missing_ok=True)  # on a full disk the half of it would keep the rest full
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync_folder(path.parent)


def link_or_copy(path: Path, place: Path) -> None:
    """Bring a finished file to a new place: as a link, or as a copy on another disk."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), place)  # what a symbolic link leads to
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(path, place)
        sync_file(place)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that is whole or absent: fill the one that this yields; it gets its name when the block ends well.

    Raises DataError where the name is taken, then or meanwhile.
    """
    taken = f"{folder}: exists already, and nothing is written over; name another"
    if os.path.lexists(folder):
        raise DataError(taken)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_folder(aside)
        try:
            os.rename(aside, folder)
        except OSError as error:
            raise DataError(taken) if folder.exists() else error from None
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def read_json(path: Path, error: type[UserError], hint: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises `error`, which names the file and ends in `hint`, where there is none."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}{hint}") from None
    except (ValueError, RecursionError) as problem:  # also not UTF-8, or a number of thousands of digits
        raise error(f"{path}: no usable JSON: {problem}{hint}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: must hold one JSON object {{...}}{hint}")
    return content


def parse_json(text: str) -> Any:
    """The value that JSON says. Raises ValueError, also for a key given twice, of which json would keep the last."""

    def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if len(counts) < len(pairs):
            raise ValueError(f"the key {counts.most_common(1)[0][0]!r} is given twice in one object")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=refuse_twins)

"""Files that are whole or absent: write aside, sync, rename. Used wherever something must survive a kill."""

import hashlib
import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows cannot open a folder, and needs no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Push a finished file's bytes to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` so that a reader, or a crash at any instant, sees the old bytes or the new ones."""
    if isinstance(content, str):
        content = content.encode()
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""A fast way to what meta/episodes holds: 1,000 files of 143 columns take 1 to 2 s to parse, their index 0.1 s.

The index is written when a recording is closed. It is believed of a file only while the checksum of both is what it
was; an index that is old, torn or lost costs those seconds and no more.
"""

import json
import zlib
from pathlib import Path
from typing import Any

from so101.data import layout
from so101.files import parse_json, write_atomic

NAME = "meta/index.json"


def read_index(folder: Path, paths: list[Path]) -> dict[Path, dict[str, Any]]:
    """The rows of those of `paths`, files of meta/episodes, that have not changed since they were indexed."""
    try:
        entries = parse_json((folder / NAME).read_text(encoding="utf-8"))
        found = ((path, entries[_key(path)]) for path in paths if _key(path) in entries)
        return {path: row for path, (stamp, row) in found if stamp == _stamp(path, row)}
    except (OSError, ValueError, AttributeError, TypeError, IndexError, KeyError):
        return {}


def write_index(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Index the rows of files that have one each, where that changes anything."""
    places = (folder / layout.EPISODES_PATH.format(**layout.address(row, "meta/episodes/")) for row in rows)
    text = json.dumps({_key(path): [_stamp(path, row), row] for path, row in zip(places, rows, strict=True)}) + "\n"
    path = folder / NAME
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def _key(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _stamp(path: Path, row: dict[str, Any]) -> int:
    """Of the file's bytes and of what the index says of it."""
    return zlib.crc32(json.dumps(row).encode(), zlib.crc32(path.read_bytes()))

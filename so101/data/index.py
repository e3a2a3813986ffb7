"""A fast way to what meta/episodes holds: 1,000 files of 143 columns take 1 to 2 s to read, their index 10 ms.

The index is written when a recording is closed. It is believed of a file only while size and time of change are those
that it was made from; a copy that has other times, an index that is old or torn, cost those seconds and no more.
"""

import json
from pathlib import Path
from typing import Any

from so101.data import layout
from so101.files import parse_json, write_atomic

NAME = "meta/index.json"


def read_index(folder: Path, paths: list[Path]) -> dict[Path, dict[str, Any]]:
    """The rows of those of `paths`, files of meta/episodes, that have not changed since they were indexed."""
    try:
        entries = parse_json((folder / NAME).read_text(encoding="utf-8"))
        return {path: entry[1] for path in paths if (entry := entries.get(_key(path))) and entry[0] == _stamp(path)}
    except (OSError, ValueError, AttributeError, TypeError, IndexError, KeyError):
        return {}


def write_index(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Index the rows of files that have one each, where that changes anything."""
    places = (folder / layout.EPISODES_PATH.format(**layout.address(row, "meta/episodes/")) for row in rows)
    text = json.dumps({_key(path): [_stamp(path), row] for path, row in zip(places, rows, strict=True)}) + "\n"
    path = folder / NAME
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def _key(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]

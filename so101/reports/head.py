"""What every report begins with: what was run, when and with what, and what is different from the run before."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

import so101
from so101.config import flat, to_dict
from so101.errors import DataError, UserError
from so101.files import read_json
from so101.plots import html_table
from so101.runlog import duration, in_words

# Of two runs, what says nothing of how they differ: where they lie, and how they were shown or taken up again.
OF_NO_INTEREST = {"output", "resume", "changed", "page", "page_port", "report", "open", "port"}
SAME_KIND = 0.5  # share of their settings that two configs of one script have in common; of two scripts at most 0.3
GIT_PATIENCE = 5.0  # s

Section = tuple[str, str]  # a heading, and HTML


class Run(NamedTuple):
    """What is compared of two runs: the config by dotted key, and the main figures by name."""

    name: str
    config: Mapping[str, Any]
    figures: Mapping[str, Any]


def head(script: str, began: float, config: Any, more: Mapping[str, Any] | None = None) -> Section:
    """What was run: `began` in Unix seconds, `config` the script's own; `more` rows go below the times."""
    ended, now, usual = time.time(), flat(to_dict(config)), flat(to_dict(type(config)()))
    rows = {
        "script": script,
        "command line": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "began": time_of_day(began),
        "report written": f"{time_of_day(ended)}, {duration(max(0.0, ended - began))} later",
        **(more or {}),
        "seed": now.get("seed"),
        "program": f"so101 {_version('so101')}, {commit(Path(so101.__file__).parent.parent)}",
        "versions": f"Python {platform.python_version()}, torch {_version('torch')}, numpy {np.__version__}, "
        f"OpenCV {cv2.__version__}, PyAV {_version('av')}",
        "machine": f"{os.cpu_count()} CPU threads ({platform.machine()}, {platform.system()}), "
        f"device {now.get('device', 'cpu')}",
    }
    other = [  # a part that was set to null has no keys in `now` where the default has several
        [key, _plain(value), _plain(usual[key]) if key in usual else "not null"]
        for key, value in now.items()
        if key not in usual or value != usual[key]
    ]
    said = html_table(["setting", "value", "default"], other) if other else "<p>Every setting is at its default.</p>"
    whole = escape(json.dumps(to_dict(config), indent=2))
    return "What was run", (
        html_table(["", ""], [[name, value] for name, value in rows.items() if value is not None])
        + f"<p>Settings that are not at their defaults:</p>{said}" * bool(other)
        + said * (not other)
        + f"<details><summary>All {len(now)} settings</summary><pre>{whole}</pre></details>"
    )


def time_of_day(seconds: float) -> str:
    """Unix seconds as this machine's date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of no known version"


def commit(root: Path) -> str:
    """The git commit of the program in `root`, and whether it was changed since; says so where there is none."""
    if not (root / ".git").exists():  # else git would tell of the repository of somebody else around it
        return "not from a git repository"
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty= with changes"]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=GIT_PATIENCE, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "commit not known: git did not run"
    return f"commit {told.stdout.strip()}" if told.returncode == 0 else "commit not known: git could not tell"


def _plain(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def runs_before(
    here: Path, began: float, config: Mapping[str, Any], pattern: str,
    config_in: Callable[[dict[str, Any]], Any], begun: Callable[[Path], float],
) -> Iterator[tuple[Path, dict[str, Any]]]:  # fmt: skip
    """Files `pattern` beside the run `here` that hold the config of a run of the same kind begun before, newest first.

    Each with what it holds. `config_in` takes the config out of that, `begun` says when the file's run began.
    """
    found = []
    for path in here.parent.glob(pattern):
        place = path.relative_to(here.parent).parts[0]
        if not place.startswith(".") and place != here.name:
            with suppress(OSError):  # taken away meanwhile
                found.append((begun(path), path))
    for when, path in sorted(found, reverse=True):
        with suppress(DataError):  # damaged, or none of ours
            held = read_json(path, DataError)
            other = config_in(held)
            if when < began and isinstance(other, dict) and _same_kind(config, other):
                yield path, held


def modified(path: Path) -> float:
    """When a file was written last, in Unix seconds."""
    return path.stat().st_mtime


def _same_kind(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return len(one.keys() & other.keys()) > SAME_KIND * len(one.keys() | other.keys())


def changes(this: Run, before: Callable[[], Run | None]) -> Section:
    """What changed against the previous run, which `before` reads; whatever is wrong with that one is only told."""
    heading = "What changed against the previous run"
    try:
        previous = before()
    except (UserError, OSError) as problem:
        return heading, f"<p>The previous run could not be read: {escape(str(problem))}</p>"
    if previous is None:
        return heading, "<p>There is no previous run of this kind beside it.</p>"
    rows = [
        [key, _setting(previous.config, key), _setting(this.config, key)]
        for key in {**previous.config, **this.config}
        if key.partition(".")[0] not in OF_NO_INTEREST and _setting(previous.config, key) != _setting(this.config, key)
    ]
    names = list({**this.figures, **previous.figures})
    figures = [[name, *(in_words(run.figures.get(name)) for run in (previous, this))] for name in names]
    return heading, (
        f"<p>The previous run is {escape(previous.name)}.</p>"
        + html_table(["figure", previous.name, this.name], figures)
        + (html_table(["setting", previous.name, this.name], rows) if rows else "<p>Their settings are the same.</p>")
    )


def _setting(config: Mapping[str, Any], key: str) -> str:
    return _plain(config[key]) if key in config else "(no such setting)"


def bullets(lines: list[str], otherwise: str) -> str:
    """A list of sentences, escaped; or `otherwise` where there is none."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else f"<p>{otherwise}</p>"

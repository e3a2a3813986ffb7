"""What a run leaves behind and what it shows meanwhile: metrics.csv, events.jsonl, progress, small tables.

Each row reaches the disk as it happens, so that a killed run keeps everything but the line in progress.
"""

import csv
import io
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from so101.files import write_atomic

BAR_WIDTH = 24
REDRAW_EVERY = 0.1  # s, on a terminal
PLAIN_LINE_EVERY = 10.0  # s, between progress lines where there is no terminal


class RunLog:
    """Appends numbers to metrics.csv and happenings to events.jsonl in a run's folder.

    Reopening goes on at the end of both. A last line torn by a kill is cut off, and an event says so.
    """

    def __init__(self, folder: Path | str, mend: bool = True) -> None:
        """`mend` False leaves torn lines to somebody else, who may be writing one right now."""
        self._metrics, self._events = Path(folder) / "metrics.csv", Path(folder) / "events.jsonl"
        torn = [path.name for path in (self._metrics, self._events) if mend and _cut_torn_line(path)]
        self._columns = _read_columns(self._metrics)
        for name in torn:
            self.event("torn_line_removed", file=name)
            print(f"{name}: the last line was cut short when the run was killed; removed it", file=sys.stderr)

    def metrics(self, **values: float | int | str | bool) -> None:
        """Append one row. A new column is added on the right; the rows before it leave it empty."""
        fresh = [name for name in values if name not in self._columns]
        if fresh:
            rows = list(csv.reader(io.StringIO(_text(self._metrics))))[1:]
            self._columns += fresh
            padded = [row + [""] * (len(self._columns) - len(row)) for row in rows]
            write_atomic(self._metrics, "".join(_csv_line(row) for row in [self._columns, *padded]))
        _append(self._metrics, _csv_line([_short(values.get(name, "")) for name in self._columns]))

    def forget(self, column: str, above: float) -> int:
        """Take out the rows whose `column` is above a number, of updates that a kill undid, say; how many they were."""
        header, *rows = list(csv.reader(io.StringIO(_text(self._metrics)))) or [[]]
        if column not in header:
            return 0
        at = header.index(column)
        kept = [row for row in rows if not as_number(row[at]) > above]
        if len(kept) < len(rows):
            write_atomic(self._metrics, "".join(_csv_line(row) for row in [header, *kept]))
        return len(rows) - len(kept)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one JSON object: the time of day (Unix seconds), the kind and the fields.

        NaN and infinity, which JSON does not have, are written as text.
        """
        line = {"time": round(time.time(), 3), "kind": kind, **fields}
        plain = json.loads(json.dumps(line, default=_plain), parse_constant=str)
        _append(self._events, json.dumps(plain) + "\n")


def read_events(folder: Path | str) -> list[dict[str, Any]]:
    """The objects of events.jsonl, a torn last line left out; [] where there is no file yet."""
    lines = _text(Path(folder) / "events.jsonl").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def read_rows(folder: Path | str) -> list[dict[str, str]]:
    """The rows of metrics.csv as text by column; [] where there is no file yet."""
    return list(csv.DictReader(io.StringIO(_text(Path(folder) / "metrics.csv"))))


def read_metrics(folder: Path | str) -> dict[str, list[float]]:
    """Each column of metrics.csv as numbers; NaN where a row has none. {} where there is no file yet."""
    rows = read_rows(folder)
    return {name: [as_number(row[name]) for row in rows] for name in _read_columns(Path(folder) / "metrics.csv")}


def as_number(cell: str | None) -> float:
    """What a cell of metrics.csv says; NaN where it is empty, missing or a word."""
    try:
        return float(cell or "nan")
    except ValueError:
        return math.nan


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").replace("\0", " ") if path.exists() else ""  # csv of Python 3.10 takes no 0


def _append(path: Path, line: str) -> None:
    with open(path, "ab") as file:  # opened for each line: at most a few a second, and never a full buffer
        file.write(line.encode())


def _csv_line(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _short(value: Any) -> str:
    """What a file keeps: a number in at most 6 digits, a flag as 1 or 0, anything else as it prints."""
    if isinstance(value, bool | np.bool_):
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


def _plain(value: Any) -> Any:
    """What json cannot write by itself: numpy values and paths."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"an event cannot hold a {type(value).__name__}")


def _read_columns(path: Path) -> list[str]:
    return next(csv.reader(io.StringIO(_text(path))), [])


def _cut_torn_line(path: Path) -> bool:
    """Remove what follows the last line end; True where there was something."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        write_atomic(path, content[:whole])
    return whole < len(content)


class ProgressScreen(Protocol):
    """Somewhere else where progress is shown."""

    def facts(self, label: str, done: int, total: int, unit: str, info: Mapping[str, float | int | str]) -> None:
        """How far something has come."""

    def tell(self, kind: str, words: str) -> None:
        """A line of its own."""


class Progress:
    """How far long work has come: a line that redraws itself on a terminal, now and then a line elsewhere.

    As a context manager it closes itself, also when the work fails.
    """

    def __init__(self, label: str, total: int, unit: str, also: "ProgressScreen | None" = None) -> None:
        """`also` is told the same: the page, where there is one."""
        self.label, self.total, self.unit, self.also = label, total, unit, also
        self._started: tuple[float, int] | None = None  # when, and at which count: a resume is not at 0
        self._shown = time.monotonic()
        self._done, self._text = 0, ""
        self._width = 0  # of the line on the terminal
        if also is not None:
            also.facts(label, 0, total, unit, {})

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def say(self, words: str) -> None:
        """Print a line of its own where the bar may stand."""
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""
        print(f"{clear}{words}", flush=True)
        if self.also is not None:
            self.also.tell("said", words)

    def update(self, done: int, **info: float | int | str) -> None:
        """Show `done` of `total`, with the rate since the first update and the time left once known, and `info`."""
        now = time.monotonic()
        if self._started is None:
            self._started = (now, done)
        elapsed, made = now - self._started[0], done - self._started[1]
        rate = made / elapsed if elapsed > 0 else 0.0
        words = [f"{done}/{self.total} {self.unit}"]
        if rate > 0:  # not known from one update
            words += [f"{rate:.3g}/s", f"{duration(max(0, self.total - done) / rate)} left"]
        if self.also is not None:
            self.also.facts(self.label, done, self.total, self.unit, info)
        self._done = done
        self._text = "  ".join(words + [f"{name} {in_words(value)}" for name, value in info.items()])
        if now - self._shown >= (REDRAW_EVERY if sys.stdout.isatty() else PLAIN_LINE_EVERY):
            self._show(now)

    def close(self) -> None:
        """Show the last update and end the line. Calling it again does nothing."""
        if self._text:
            self._show(time.monotonic())
            if sys.stdout.isatty():
                print()
        self._text, self._width = "", 0

    def _show(self, now: float) -> None:
        self._shown = now
        if not sys.stdout.isatty():
            print(f"{self.label}: {self._text}", flush=True)
            return
        filled = round(BAR_WIDTH * min(1.0, self._done / max(1, self.total)))
        line = f"{self.label} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {self._text}"
        line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be redrawn
        print("\r" + line.ljust(self._width), end="", flush=True)
        self._width = len(line)


def in_words(value: Any) -> str:
    """A value as people read it: a number in 4 digits, a truth as yes or no, what is missing or NaN as a dash."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "-"
    if isinstance(value, float | np.floating):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e12 else f"{value + 0:.4g}"  # + 0: no -0
    return str(value)


def duration(seconds: float) -> str:
    """A length of time to read: 42s, 3:05 (minutes) or 2:03:05 (hours)."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest}s"


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns of text: numbers to the right, words to the left, a rule under the headers."""
    cells = [[in_words(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [
        bool(rows) and all(isinstance(row[index], int | float | np.number) for row in rows)
        for index in range(len(headers))
    ]

    def line(words: Sequence[str]) -> str:
        columns = zip(words, widths, right, strict=True)
        return "  ".join(w.rjust(width) if r else w.ljust(width) for w, width, r in columns).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, cells)])


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of a success rate, 95 % for z = 1.96; (0, 1) when nothing was tried.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    rate, spread = successes / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(both: int, first: int, second: int, neither: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a difference between two success rates on the same starts, 95 % for z = 1.96.

    `first` and `second` are how often one alone succeeded. Wilson's intervals of both rates, added as squares, less
    what goes together: R. G. Newcombe, Statistics in Medicine 17 (1998) 2635, method 10. (-1, 1) of no starts.
    """
    trials = both + first + second + neither
    if trials == 0:
        return -1.0, 1.0
    one, other = both + first, both + second
    a, b = one / trials, other / trials
    (a_low, a_high), (b_low, b_high) = wilson_interval(one, trials, z), wilson_interval(other, trials, z)
    together = float(both * neither - first * second)
    if together > 0:
        together = max(0.0, together - trials / 2)  # a correction for continuity
    spread = math.sqrt(one * (trials - one) * other * (trials - other))
    phi = together / spread if spread else 0.0
    below, above, b_above, b_below = a - a_low, a_high - a, b_high - b, b - b_low
    low = a - b - math.sqrt(below**2 - 2 * phi * below * b_above + b_above**2)
    high = a - b + math.sqrt(above**2 - 2 * phi * above * b_below + b_below**2)
    return max(-1.0, low), min(1.0, high)


def mcnemar(first: int, second: int) -> float:
    """How likely chance alone splits the starts on which one of two policies succeeded at least as unevenly as this.

    McNemar's test, exact: with nothing between them each such start is the toss of a coin.
    """
    tosses = first + second
    tail = sum(math.comb(tosses, heads) for heads in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**tosses)

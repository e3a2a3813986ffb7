"""The flight recorder: the last 30 s of the arms, written to a folder when a fault has ended them.

While all is well it keeps references in rings, for some microseconds a tick. When a safety stop, lost hardware or a bug
ends the program and the arm has been brought to rest, a new folder gets

    diagnosis.txt    in plain words: what it most likely was, the numbers that say so, what to do next
    readings.csv     a row for each time that an arm was read: rad (gripper: opening), fraction of PWM, V, deg C, A
    commands.csv     a row for each time that goals were sent to one, rad (gripper: opening)
    events.jsonl     keys, cues, warnings, results of steps; of each observation the frames' ages (s), the target (m)
    CAMERA.png       the newest frame that the program used
    error.txt        the traceback

Times are in s of the rig's clock from the fault on: what led to it is negative, the way to rest positive. The 30 s are
those before the fault.
"""

import csv
import itertools
import json
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from so101.errors import DataError, HardwareError, SafetyStop, UserError
from so101.files import new_folder, sync_file
from so101.robot.arm import Arm, Reading
from so101.robot.safety import SafetyConfig
from so101.schema import JOINTS
from so101.timing import Clock

SECONDS = 30.0
MOST = 10_000  # rows of a ring, 11 MB of readings; 30 s at 10 Hz and the way to rest are under 1500
DECIMALS = 6  # in the files; a tick of a servo is 0.0015 rad
UNKNOWN = np.full(6, np.nan)


class Ring:
    """What came in the last SECONDS, and MOST of it at most; once it is `full`, only MOST counts."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.full = clock, False
        self.rows: deque[tuple[Any, ...]] = deque(maxlen=MOST)  # (s on the clock, what came), the oldest first

    def add(self, *what: Any) -> None:
        now = self.clock.now()
        self.rows.append((now, *what))
        if not self.full:
            self.forget(now - SECONDS)

    def forget(self, before: float) -> None:
        """Drop what is older (s on the clock)."""
        while self.rows and self.rows[0][0] < before:
            self.rows.popleft()


class Track:
    """One arm: what it said, and what it was told."""

    def __init__(self, arm: Arm, clock: Clock) -> None:
        self.arm, self.readings, self.commands = arm, Ring(clock), Ring(clock)
        self._goals = UNKNOWN
        arm.on_read, arm.on_command = self._read, self._sent

    def _read(self, reading: Reading) -> None:
        self.readings.add(reading, self._goals if self.arm.driven else UNKNOWN)

    def _sent(self, goals: np.ndarray) -> None:
        self._goals = goals.copy()  # the arm writes into its own
        self.commands.add(self._goals)


class FlightRecorder:
    """Listens to `arms`, by name, from now on; what else happens is brought to it. Neither costs much, or raises."""

    def __init__(self, clock: Clock, arms: Mapping[str, Arm], limits: SafetyConfig) -> None:
        self.clock, self.limits = clock, limits
        self.tracks = {name: Track(arm, clock) for name, arm in arms.items()}
        self.events = Ring(clock)
        self.frames: dict[str, tuple[np.ndarray, float]] = {}  # by camera the newest, (H, W, 3) RGB, and its time
        self.error: Exception | None = None  # what ended the program, where that is worth a record
        self.failed_at, self.failed_on = 0.0, time.localtime()  # on the rig's clock, and on the wall's

    def happened(self, *kinds: str) -> list[tuple[float, str, Any]]:
        """Events of these kinds, or all: s from the fault on, kind, words or values."""
        rows = list(self.events.rows)  # another thread may be telling something
        return [(at - self.failed_at, kind, what) for at, kind, what in rows if not kinds or kind in kinds]

    def note(self, kind: str, what: Any) -> None:
        """Something happened: words, or values by name."""
        self.events.add(kind, what)

    def told(self, message: str) -> None:
        """A warning was printed."""
        self.events.add("told", message)

    def observed(self, taken: Mapping[str, tuple[np.ndarray, float]], target: np.ndarray) -> None:
        """These frames, with their times, make an observation, and the tool is commanded to `target` (3,) m."""
        now = self.clock.now()
        self.frames.update(taken)
        self.events.add("observed", {"ages": {name: now - at for name, (_, at) in taken.items()}, "target": target})

    def failed(self, error: Exception) -> None:
        """The program ends with this. From here on what is kept stays, and the way to rest is added to it.

        An error in a setting or in data has said all that there is to say, and leaves no record.
        """
        if isinstance(error, UserError) and not isinstance(error, HardwareError | SafetyStop):
            return
        self.error, self.failed_at, self.failed_on = error, self.clock.now(), time.localtime()
        rings = [self.events, *(ring for track in self.tracks.values() for ring in (track.readings, track.commands))]
        newest = max((ring.rows[-1][0] for ring in rings if ring.rows), default=0.0)  # long ago, after a wait say
        for ring in rings:
            ring.forget(newest - SECONDS)
            ring.full = True

    def dump(self, place: Path, diagnosis: str) -> Path:
        """Write a new folder in `place`, whole or not at all; its path. Raises OSError where that takes no files."""
        name = time.strftime("flight-%Y%m%d-%H%M%S", self.failed_on)
        for number in itertools.count():
            folder = place / (f"{name}-{number}" if number else name)
            try:
                with new_folder(folder) as aside:
                    self._fill(aside, diagnosis)
                break
            except DataError:  # the name is taken
                continue
        return folder

    def _fill(self, folder: Path, diagnosis: str) -> None:
        (folder / "diagnosis.txt").write_text(diagnosis, encoding="utf-8")
        (folder / "error.txt").write_text("".join(traceback.format_exception(self.error)), encoding="utf-8")
        columns = [f"{field}.{joint}" for field in Reading._fields for joint in JOINTS]
        rows = self._rows((name, at, np.concatenate(said)) for name, t in self.tracks.items()
                          for at, said, _ in t.readings.rows)  # fmt: skip
        _write_csv(folder / "readings.csv", ["time", "arm", *columns], rows)
        rows = self._rows((name, at, goals) for name, t in self.tracks.items() for at, goals in t.commands.rows)
        _write_csv(folder / "commands.csv", ["time", "arm", *JOINTS], rows)
        with open(folder / "events.jsonl", "w", encoding="utf-8") as file:
            for at, kind, what in self.happened():
                line = {"time": round(at, DECIMALS), "kind": kind}
                line |= what if isinstance(what, dict) else {"what": what}
                file.write(json.dumps(line, default=lambda value: value.tolist()) + "\n")
        for camera, (frame, _) in self.frames.items():
            (folder / f"{camera}.png").write_bytes(cv2.imencode(".png", frame[..., ::-1])[1].tobytes())
        for path in folder.iterdir():
            sync_file(path)

    def _rows(self, values: Iterator[tuple[str, float, np.ndarray]]) -> list[list[Any]]:
        """Rows of a file, in the order of time, of (arm, s on the clock, values)."""
        rows = [[round(at - self.failed_at, DECIMALS), name, *np.round(row, DECIMALS)] for name, at, row in values]
        return sorted(rows, key=lambda row: row[0])


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])

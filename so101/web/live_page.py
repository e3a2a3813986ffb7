"""The page that shows a running script live, and from which a person steers it.

The control loop hands over what it has just seen (`show`) and takes what was pressed or is held (`poll`, `hand`):
references and small lists, no more. What costs time, JPEG and JSON, is done in the server's threads, once for all who
watch, and only while somebody does.

Who drives from the page sends ten times a second what he holds. What is older than HEARTBEAT_S counts as let go, so
a tunnel that breaks, a tab that is hidden or a laptop that is shut stops the motion.
"""

import csv
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from so101.env import Camera, Env, Observation, Step
from so101.errors import DataError, EpisodeAborted
from so101.robot.sound import Cue
from so101.robot.teleop import KEYS
from so101.schema import ACTION, JOINTS, OPENING, TOOL_XYZ
from so101.web.server import Answer, Request, Route, Server, Stream, as_jpeg, as_json, as_png, static, to_json

HEARTBEAT_S = 0.3  # without one so long what is held counts as let go
LOST_S = 2.0  # and after so long whoever held it as gone
STREAM_FPS = 30  # a second at most; a simulation without a pace makes more
STILL_THERE_S = 0.5  # at least so often the page hears something
JPEG_QUALITY = 75
LOOK_S = 0.01  # between two looks at a real camera
KEPT_TICKS = 600  # of the ribbon: a minute at 10 Hz
KEPT_LINES = 60  # of what was told
LATEST = 100  # ticks that the loop's figures are of
CURVES = (
    "success_last_20", "success_alone_last_20", "evaluated_success", "intervention_share", "episode_steps", "q",
    "q_max", "entropy", "critic_loss", "updates_per_s",
)  # fmt: skip
MOST_POINTS = 600  # of a curve
STATE, CAMERA, VIEW = 0, 1, 2  # kinds of parts
HEAD = struct.Struct(">BBI")  # of a part: kind, index, length


class Judge(Protocol):
    """What says how likely success is."""

    probability: float | None  # of the newest frame

    @property
    def threshold(self) -> float:
        """Above it a frame counts as success."""


class LivePage:
    """One running script. The loop's side never waits for the browser's."""

    def __init__(self, script: str, folder: Path | None = None) -> None:
        """`folder` is a run's, whose metrics.csv gives the curves."""
        self.script = script
        self.judge: Judge | None = None
        self._curves = Curves(folder / "metrics.csv") if folder is not None else None
        self._cameras: Mapping[str, Camera] = {}
        self._changed = threading.Condition()
        self._frames: dict[str, np.ndarray] = {}  # of simulated cameras
        self._views: np.ndarray | None = None  # (cameras, S, S, 3)
        self._encoding = threading.Lock()
        self._encoded: dict[
            tuple[int, int], tuple[np.ndarray, bytes]
        ] = {}  # what was encoded last, and what came of it
        self._state: dict[str, Any] = {"driver": "policy"}
        self._facts: dict[str, Any] = {}
        self._ticks: deque[tuple[int, str]] = deque(maxlen=KEPT_TICKS)
        self._periods: deque[float] = deque(maxlen=LATEST)
        self._told: deque[tuple[int, str, str]] = deque(maxlen=KEPT_LINES)  # number, kind, words
        self._tick, self._observed = 0, 0.0
        self._news = 0  # counts what came
        self._pressed: list[str] = []
        self._wheel: tuple[str, float, np.ndarray] | None = None  # who drives, when heard (s), what is held (4,)
        self._closed = False

    def routes(self) -> dict[str, Route]:
        """What a Server serves."""
        return {
            "GET ": static("live.html"),
            "GET live.js": static("live.js"),
            "GET style.css": static("style.css"),
            "GET live.css": static("live.css"),
            "GET api/about": self.about,
            "GET api/live": self.live,
            "GET api/curves": self.curves,
            "POST api/press": self.press,
            "POST api/hand": self.hold,
        }

    # What the control loop calls.

    def connect(self, cameras: Mapping[str, Camera]) -> None:
        """Show the newest frames of real cameras too, between the ticks."""
        self._cameras = cameras

    def show(self, env: Env, observation: Observation, step: Step | None) -> None:
        """What was just observed, and the step that led there; None at the start of an episode."""
        reading, rate, state = env.watchdog.newest, env.rate, observation.state
        if step is not None:
            self._periods.append(observation.time - self._observed)
        self._observed = observation.time
        seen: dict[str, Any] = {
            "driver": env.teleop.driver, "recording": env.teleop.recording, "paused": env.teleop.paused,
            "tool": state[TOOL_XYZ], "opening": state[OPENING], "target": env.target,
            "probability": None if self.judge is None else self.judge.probability,
            "period": rate.period, "busy": rate.busy, "overruns": rate.overruns,
        }  # fmt: skip
        if reading is not None:
            seen |= {"temperature": reading.temperature, "load": reading.load, "voltage": reading.voltage}
        if step is not None:
            seen |= {"action": step.action, "lag": step.lag, "late": step.late, "success": step.success}
        end = "" if step is None else "S" if step.success else "F" if step.terminated else "T" if step.truncated else ""
        driver = "-" if step is None else {"policy": "p", "leader": "l", "page": "b"}[env.teleop.driver]
        with self._changed:
            self._tick, self._news = self._tick + 1, self._news + 1
            self._state, self._views = seen, observation.images
            self._frames |= observation.frames
            self._ticks.append((self._tick, driver + end))
            self._changed.notify_all()

    def facts(self, label: str, done: int, total: int, unit: str, info: Mapping[str, float | int | str]) -> None:
        """How far the work has come, as the console says it."""
        with self._changed:
            self._facts = {"label": label, "done": done, "total": total, "unit": unit, "info": dict(info)}
            self._news += 1

    def hear(self, cue: Cue) -> None:
        """Show what the program tells the person."""
        self.tell(cue.kind, cue.text)

    def tell(self, kind: str, words: str) -> None:
        """Show a line of its own."""
        with self._changed:
            number = self._told[-1][0] + 1 if self._told else 1
            self._told.append((number, kind, words))
            self._news += 1
            self._changed.notify_all()

    def poll(self) -> list[str]:
        """Events (KEYS' values) since the last call; never waits."""
        with self._changed:
            pressed, self._pressed = self._pressed, []
        return pressed

    def quits(self) -> bool:
        """Whether "quit" will be among the events of the next `poll`."""
        return "quit" in self._pressed

    def hand(self) -> np.ndarray | None:
        """The action (4,) that is held now; zero where nothing is held or heard, None where nobody is to drive."""
        wheel = self._wheel
        if wheel is None:
            return None
        _, heard, action = wheel
        return action if time.monotonic() - heard <= HEARTBEAT_S else np.zeros(len(ACTION))

    def lost(self) -> bool:
        """Whether who was to drive has not been heard for LOST_S; said once, the wheel is then free."""
        with self._changed:
            gone = self._wheel is not None and time.monotonic() - self._wheel[1] > LOST_S
            if gone:
                self._wheel = None
        return gone

    def close(self) -> None:
        """The script ends: so do the streams, and the page says so."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # What the browser asks for.

    def about(self, request: Request) -> Answer:
        """What does not change while the script runs."""
        keys = {event: key for key, event in KEYS.items()}
        about: dict[str, Any] = {"script": self.script, "keys": keys, "joints": JOINTS}
        about |= {"threshold": None if self.judge is None else self.judge.threshold}
        about |= {"action": ACTION, "curves": self._curves is not None, "heartbeat_ms": 1000 * HEARTBEAT_S}
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._closed, timeout=1.0)
            return as_json(about | {"cameras": list(self._cameras or self._frames)})

    def live(self, request: Request) -> Stream:
        """All there is to see, as it comes: parts of kind, index, length (HEAD) and content.

        One connection for all of it: a browser opens six to one server at most, for all its windows together.
        """
        return Stream(self._parts(), "application/octet-stream")

    def _parts(self) -> Iterator[bytes]:
        shown: dict[tuple[int, int], np.ndarray] = {}
        tick = line = news = 0
        said = 0.0
        while not self._closed:
            began = time.monotonic()
            with self._changed:
                fresh = self._wait_for_news(news)
                news, state = self._news, self._since(tick, line)
                tick, line = self._tick, self._told[-1][0] if self._told else 0
            for kind, index, frame in self._pictures():
                if frame is not shown.get((kind, index)):
                    shown[kind, index] = frame
                    yield _part(kind, index, self._encode(kind, index, frame))
            if fresh or began - said > STILL_THERE_S:
                said = began
                yield _part(STATE, 0, to_json(state))
            time.sleep(max(0.0, began + 1 / STREAM_FPS - time.monotonic()))
        yield _part(STATE, 0, to_json({"over": True}))

    def _wait_for_news(self, since: int) -> bool:
        """Wait until there is some; but real cameras have new frames also without any."""
        patience = LOOK_S if self._cameras else STILL_THERE_S
        return self._changed.wait_for(lambda: self._news > since or self._closed, timeout=patience)

    def _since(self, tick: int, line: int) -> dict[str, Any]:
        """The state as it is, with the ticks and lines that came after the given ones."""
        state = self._state | {"facts": self._facts, "wheel": None if self._wheel is None else self._wheel[0]}
        state["ticks"] = [said for number, said in self._ticks if number > tick]
        state["told"] = [entry[1:] for entry in self._told if entry[0] > line]
        if self._periods:
            periods = np.array(self._periods)
            state["periods"] = [periods.mean(), np.percentile(periods, 99), periods.max()]
        return state

    def _pictures(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """The newest frame of each camera, and what the network sees of it."""
        for index, name in enumerate(self._cameras or self._frames):
            frame = self._frames.get(name)
            if self._cameras:
                with suppress(EpisodeAborted):  # it is lost: the last picture stands
                    frame = self._cameras[name].latest()[0]
            if frame is not None:
                yield CAMERA, index, frame
        for index, view in enumerate(() if self._views is None else self._views):
            yield VIEW, index, view

    def _encode(self, kind: int, index: int, frame: np.ndarray) -> bytes:
        """Encoded once, however many watch."""
        with self._encoding:
            made = self._encoded.get((kind, index))
            if made is None or made[0] is not frame:
                answer = as_jpeg(frame, JPEG_QUALITY) if kind == CAMERA else as_png(frame)
                made = self._encoded[kind, index] = frame, answer.content
            return made[1]

    def curves(self, request: Request) -> Answer:
        """The run's curves so far."""
        return as_json({} if self._curves is None else self._curves.read())

    def press(self, request: Request) -> Answer:
        """A key or a button, by what it means."""
        pressed: Any = request.body.get("event") if isinstance(request.body, dict) else None
        if pressed not in KEYS.values():
            raise DataError(f"event: got {pressed!r}, must be one of {', '.join(KEYS.values())}")
        with self._changed:
            self._pressed.append(pressed)
        return as_json({})

    def hold(self, request: Request) -> Answer:
        """A sign of life of who drives, `who`, with the action (4,) that is held; or null: he lets go of the wheel."""
        body = request.body if isinstance(request.body, dict) else {}
        who, held = body.get("who"), body.get("hand")
        if not isinstance(who, str) or not (held is None or _is_action(held)):
            raise DataError(f"hand: got {held!r} of {who!r}, must be null or {len(ACTION)} numbers in -1 .. 1")
        now = time.monotonic()
        with self._changed:
            wheel = self._wheel
            if wheel is not None and wheel[0] != who and now - wheel[1] <= LOST_S:
                raise DataError("another page drives; let it go there first")
            self._wheel = None if held is None else (who, now, np.array(held, np.float64))
            if (wheel is None) != (held is None):
                self._news += 1
                self._changed.notify_all()
        return as_json({})


@contextmanager
def live_page(wanted: bool, port: int, script: str, folder: Path | None = None) -> Iterator[LivePage | None]:
    """The page of a script while it runs; None where it is not wanted. Raises ConfigError for a port in use."""
    if not wanted:
        yield None
        return
    page = LivePage(script, folder)
    with ExitStack() as stack:
        server = stack.enter_context(Server(page.routes(), port))
        stack.enter_context(server.beside(open_browser=True))
        stack.callback(page.close)
        yield page


def _part(kind: int, index: int, content: bytes) -> bytes:
    return HEAD.pack(kind, index, len(content)) + content


def _is_action(held: Any) -> bool:
    numbers = isinstance(held, list) and all(type(value) in (int, float) for value in held)
    return numbers and len(held) == len(ACTION) and all(-1 <= value <= 1 for value in held)


class Curves:
    """What metrics.csv holds for the page; only what was added since the last look is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reading = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._read_up_to, self._columns = 0, [""]
        self._points: dict[str, list[tuple[float, float]]] = {name: [] for name in CURVES}

    def read(self) -> dict[str, list[tuple[float, float]]]:
        """The points (step, value) of each curve that has any, thinned to MOST_POINTS."""
        with self._reading, suppress(OSError):  # no file yet
            with open(self.path, newline="", encoding="utf-8") as file:
                columns = file.readline().rstrip("\n").split(",")
                if columns != self._columns or self.path.stat().st_size < self._read_up_to:
                    self._forget()  # a column was added: the file was written anew
                    self._columns, self._read_up_to = columns, file.tell()
                file.seek(self._read_up_to)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            self._read_up_to += len(whole.encode())
            for row in csv.DictReader(whole.splitlines(), columns):
                for name in CURVES:
                    if row.get("step") and row.get(name):
                        with suppress(ValueError):
                            self._points[name].append((float(row["step"]), float(row[name])))
        return {name: _thinned(points) for name, points in self._points.items() if points}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every so-manieth point, and the last; NaN is left out, as JSON has none."""
    points = [point for point in points if np.isfinite(point[1])]
    every = -(-len(points) // MOST_POINTS)
    return points[::every] + points[-1:] if every > 1 else points

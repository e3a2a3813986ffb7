"""The page that shows a running script live, and from which a person steers it.

The control loop hands over what it has just seen (`show`) and takes what was pressed or is held (`poll`, `hand`):
references and small lists, no more. What costs time, JPEG and JSON, is done in the server's threads, once for all who
watch, and only while somebody does.

Who drives from the page sends ten times a second what he holds. What is older than HEARTBEAT_S counts as let go, so
a tunnel that breaks, a tab that is hidden or a laptop that is shut stops the motion. Who is not heard for LOST_S is
gone: the episode that he drove is dropped, and the next one waits for somebody. A line that stalls keeps what was sent
and brings it later, so each sign says of when the newest state is that the page had: what answers an old one is no
sign of life.

A picture that is seconds old is worse than none for who drives. So the page says how many it has got, and no more are
on their way to it than its line takes (`_Watcher`).
"""

import csv
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from so101.env import Camera, Env, Observation, Step
from so101.errors import DataError, EpisodeAborted
from so101.robot.sound import Cue
from so101.robot.teleop import DROPPED, KEYS, NOTHING_HELD, Teleop
from so101.runlog import as_number
from so101.schema import ACTION, JOINTS, OPENING, TOOL_XYZ
from so101.web.server import Answer, Request, Route, Server, Stream, as_jpeg, as_json, as_png, static, to_json

HEARTBEAT_S = 0.3  # without one so long what is held counts as let go
LOST_S = 2.0  # and after so long whoever held it as gone
STALE_S = 1.0  # no older is the state that a sign answers: through 150 ms each way 0.5 s, 0.7 between episodes
STREAM_FPS = 30  # of a simulation, at most; without a pace it makes hundreds of ticks a second
LOOK_S = 1 / 60  # between two looks at real cameras: each frame of one at 30 a second is shown
STILL_THERE_S = 0.25  # at least so often the page hears something
JPEG_QUALITY = 75
# Pictures on their way to one page: at first, at most, and s beyond the shortest way seen that mean a queue. Of 46 KB
# each, a line of 1 MB/s takes 20 a second, and 2 MB in the buffers of an SSH tunnel would be 2 s.
UNDERWAY, MOST_UNDERWAY, QUEUED_S = 4, 60, 0.3
KEPT_TICKS = 600  # of the ribbon: a minute at 10 Hz
KEPT_LINES = 60  # of what was told
LATEST = 100  # ticks that the loop's figures are of
LAST = 20  # episodes whose outcome is shown
CURVES = (
    "success_last_20", "success_alone_last_20", "evaluated_success", "intervention_share", "episode_steps", "q",
    "q_max", "entropy", "critic_loss", "updates_per_s",
)  # fmt: skip
MOST_POINTS = 300  # of a curve, which is about as many pixels wide
STATE, CAMERA, VIEW = 0, 1, 2  # kinds of parts
HEAD = struct.Struct(">BBI")  # of a part: kind, index, length


class Likelihood(Protocol):
    """What says how likely success is."""

    probability: float | None  # of the newest frame

    @property
    def threshold(self) -> float:
        """Above it a frame counts as success."""

    @property
    def vetoed(self) -> bool:
        """Whether the newest frame is above it and the state guard says no."""


class LivePage:
    """One running script. The loop's side never waits for the browser's."""

    def __init__(self, script: str, folder: Path | None = None) -> None:
        """`folder` is a run's, whose metrics.csv gives the curves."""
        self.script = script
        self.judge: Likelihood | None = None
        self._curves = Curves(folder / "metrics.csv") if folder is not None else None
        self._cameras: Mapping[str, Camera] = {}
        self._changed = threading.Condition()
        self._news = 0  # counts what came
        self._closed = False
        # What the control loop showed.
        self._teleop: Teleop | None = None
        self._frames: dict[str, np.ndarray] = {}  # of simulated cameras
        self._views: list[np.ndarray] = []  # (S, S, 3) each; a list, since an array's rows are new objects at each look
        self._state: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._tick, self._shown, self._observed = 0, 0.0, 0.0  # number; when, real time and the rig's clock (s)
        self._ticks: deque[tuple[int, str]] = deque(maxlen=KEPT_TICKS)
        self._periods: deque[float] = deque(maxlen=LATEST)
        self._told: deque[tuple[int, str, str]] = deque(maxlen=KEPT_LINES)  # number, kind, words
        self._outcomes: deque[str] = deque(maxlen=LAST)  # how the episodes before this one ended
        self._outcome = ""  # how this one has so far; "" where there is none, or it was dropped
        # What the browsers sent.
        self._pressed: list[str] = []  # each event once
        self._wheel: tuple[str, float, np.ndarray] | None = None  # who drives, when heard (s), what is held (4,)
        self._heard = ("", -1)  # the last sign of life that counted: whose, and its number
        self._watchers: dict[str, _Watcher] = {}
        self._encoding = threading.Lock()
        # What was encoded last, and what came of it, by kind and index of the part.
        self._encoded: dict[tuple[int, int], tuple[np.ndarray, bytes]] = {}

    def routes(self) -> dict[str, Route]:
        """What a Server serves."""
        return {
            "GET ": static("live.html"),
            "GET common.js": static("common.js"),
            "GET live.js": static("live.js"),
            "GET style.css": static("style.css"),
            "GET live.css": static("live.css"),
            "GET api/about": self.about,
            "GET api/live": self.live,
            "GET api/curves": self.curves,
            "POST api/press": self.press,
            "POST api/hand": self.hold,
            "POST api/seen": self.seen,
        }

    # What the control loop calls.

    def connect(self, cameras: Mapping[str, Camera], teleop: Teleop | None = None) -> None:
        """Show the newest frames of real cameras too, between the ticks, and a pause before the first of them."""
        self._cameras = cameras
        self._teleop = teleop or self._teleop

    def show(self, env: Env, observation: Observation, step: Step | None) -> None:
        """What was just observed, and the step that led there; None at the start of an episode."""
        teleop, reading, rate, state = env.teleop, env.watchdog.newest, env.rate, observation.state
        seen: dict[str, Any] = {
            "tool": state[TOOL_XYZ], "opening": state[OPENING],
            "left": env.left, "period": rate.period, "busy": rate.busy, "overruns": rate.overruns,
        }  # fmt: skip
        if reading is not None:
            seen |= {"temperature": reading.temperature, "load": reading.load, "voltage": reading.voltage}
        if (judge := self.judge) is not None:
            seen |= {"probability": judge.probability, "threshold": judge.threshold, "vetoed": judge.vetoed}
        driver = end = ""
        if step is not None:
            seen |= {"action": step.action, "lag": step.lag, "edge": env.edge}
            driver = {"policy": "p", "leader": "l", "page": "b"}[teleop.driver]
            end = "S" if step.success else "F" if step.terminated else "T" if step.truncated else ""
        with self._changed:
            if step is not None:
                self._periods.append(observation.time - self._observed)
            self._count(step, teleop.afterwards, env.detector is not None)
            self._teleop, self._state, self._views = teleop, seen, list(observation.images)
            self._frames |= observation.frames
            self._tick, self._shown, self._observed = self._tick + 1, time.monotonic(), observation.time
            self._ticks.append((self._tick, (driver or "-") + end))
            self._announce()

    def _count(self, step: Step | None, afterwards: frozenset[str], judged: bool) -> None:
        """Keep how the last episodes ended; what is pressed in the reset corrects the one before it.

        Where no classifier judges, one that nobody labels is neither a success nor a failure.
        """
        if step is not None:
            if step.events & {"redo", "quit"}:
                self._outcome = ""
            elif "failure" in step.events:
                self._outcome = "failure"
            elif step.success or self._outcome == "success":
                self._outcome = "success"
            else:
                self._outcome = "failure" if judged else "unlabelled"
            return
        if self._outcome and "redo" not in afterwards:
            last_word = "failure" if "failure" in afterwards else "success" if "success" in afterwards else ""
            self._outcomes.append(last_word or self._outcome)
        self._outcome = ""

    def _announce(self) -> None:
        self._news += 1
        self._changed.notify_all()

    def facts(self, label: str, done: int, total: int, unit: str, info: Mapping[str, float | int | str]) -> None:
        """How far the work has come, as the console says it."""
        with self._changed:
            self._facts = {"label": label, "done": done, "total": total, "unit": unit, "info": dict(info)}
            self._news += 1

    def hear(self, cue: Cue) -> None:
        """Show what the program tells the person."""
        if cue.kind == DROPPED.kind or cue == NOTHING_HELD:
            self._outcome = ""
        self.tell(cue.kind, cue.text)

    def tell(self, kind: str, words: str) -> None:
        """Show a line of its own."""
        with self._changed:
            number = self._told[-1][0] + 1 if self._told else 1
            self._told.append((number, kind, words))
            self._announce()

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
        silent = time.monotonic() - wheel[1]
        return None if silent > LOST_S else wheel[2] if silent <= HEARTBEAT_S else np.zeros(len(ACTION))

    def silent(self) -> bool:
        """Whether who is to drive has not been heard for HEARTBEAT_S, and not yet for LOST_S."""
        wheel = self._wheel
        return wheel is not None and HEARTBEAT_S < time.monotonic() - wheel[1] <= LOST_S

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
        return as_json({"script": self.script, "keys": keys, "joints": JOINTS, "curves": self._curves is not None})

    def live(self, request: Request) -> Stream:
        """All there is to see, as it comes: parts of kind, index, length (HEAD) and content.

        One connection for all of it: a browser opens six to one server at most, for all its windows together. Who says
        `who` he is says with `seen` how many pictures came.
        """
        return Stream(self._parts(request.query.get("who")), "application/octet-stream")

    def _parts(self, who: str | None) -> Iterator[bytes]:
        watcher = None
        if who is not None:
            watcher = self._watchers[who] = _Watcher()
        shown: dict[tuple[int, int], np.ndarray] = {}
        tick = line = news = 0
        said, over = 0.0, False
        try:
            while not over:
                began, real = time.monotonic(), bool(self._cameras)
                with self._changed:
                    # Real cameras have new frames without any news as well.
                    self._changed.wait_for(self._has_news(news), timeout=LOOK_S if real else STILL_THERE_S)
                    over, fresh, news = self._closed, self._news > news, self._news
                    raw, frames, views = self._copy(tick, line), self._frames.copy(), self._views  # all of one tick
                    tick, line = self._tick, self._told[-1][0] if self._told else 0
                complaints: dict[str, str] = {}
                for kind, index, frame in self._pictures(frames, views, complaints):
                    ready = watcher is None or watcher.may_send()
                    if ready and frame is not shown.get((kind, index)):
                        shown[kind, index] = frame
                        if watcher is not None:
                            watcher.sent()
                        yield _part(kind, index, self._encode(kind, index, frame))
                if fresh or began - said > STILL_THERE_S:
                    said = began
                    behind = None if watcher is None else watcher.behind
                    yield _part(STATE, 0, to_json(_worked_out(raw) | {"cameras": complaints, "behind": behind}))
                time.sleep(max(0.0, began + (LOOK_S if real else 1 / STREAM_FPS) - time.monotonic()))
            yield _part(STATE, 0, to_json({"over": True}))  # after the last tick and line
        finally:
            if who is not None and self._watchers.get(who) is watcher:
                del self._watchers[who]

    def _has_news(self, since: int) -> Callable[[], bool]:
        return lambda: self._news > since or self._closed

    def _copy(self, tick: int, line: int) -> dict[str, Any]:
        """The state as it is, with the ticks and lines that came after the given ones."""
        teleop, wheel, now = self._teleop, self._wheel, time.monotonic()
        state: dict[str, Any] = self._state | {"now": now, "facts": self._facts, "periods": list(self._periods)}
        if teleop is not None:  # asked now: in a reset nothing is shown
            state |= {"driver": teleop.driver, "recording": teleop.recording, "paused": teleop.paused}
            state |= {"leader": teleop.leader is not None, "age": now - self._shown}
        state["wheel"] = wheel[0] if wheel is not None and now - wheel[1] <= LOST_S else None
        state["ticks"] = [said for number, said in self._ticks if number > tick]
        state["told"] = [entry[1:] for entry in self._told if entry[0] > line]
        state["outcomes"] = list(self._outcomes)
        return state

    def _pictures(
        self, frames: dict[str, np.ndarray], views: list[np.ndarray], complaints: dict[str, str]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """The newest frame of each camera, and what the network sees of it; `complaints` gets what each camera says."""
        for index, name in enumerate(self._cameras or frames):
            frame = frames.get(name)
            complaints[name] = ""
            if self._cameras:
                try:
                    frame = self._cameras[name].latest()[0]
                except EpisodeAborted as lost:  # the last picture stands, and must not pass for a new one
                    complaints[name] = str(lost)
            if frame is not None:
                yield CAMERA, index, frame
        for index, view in enumerate(views):
            yield VIEW, index, view

    def _encode(self, kind: int, index: int, frame: np.ndarray) -> bytes:
        """Encoded once, however many watch."""
        with self._encoding:
            made = self._encoded.get((kind, index))
            if made is None or made[0] is not frame:
                answer = as_jpeg(frame, JPEG_QUALITY) if kind == CAMERA else as_png(frame)
                made = self._encoded[kind, index] = frame, answer.content
            return made[1]

    def seen(self, request: Request) -> Answer:
        """How many pictures have come to a page, `who`, since it began to look."""
        who, count = _named(request, "count")
        with self._changed:
            if who in self._watchers:
                self._watchers[who].saw(count)
        return as_json({})

    def curves(self, request: Request) -> Answer:
        """The run's curves so far."""
        return as_json({} if self._curves is None else self._curves.read())

    def press(self, request: Request) -> Answer:
        """A key or a button, by what it means."""
        pressed: Any = request.body.get("event") if isinstance(request.body, dict) else None
        if pressed not in KEYS.values():
            raise DataError(f"event: got {pressed!r}, must be one of {', '.join(KEYS.values())}")
        if pressed != "quit" and (age := _age(request)) > LOST_S:  # by now it may mean something else
            raise DataError(f"it came {age:.1f} s after what you saw; look, and press again")
        with self._changed:
            if pressed not in self._pressed:
                self._pressed.append(pressed)
        return as_json({})

    def hold(self, request: Request) -> Answer:
        """A sign of life of who drives, `who`, with the action (4,) that is held; or null: he lets go of the wheel.

        Each has a `number`: one that was overtaken on its way tells nothing. Nor does one that answers a state older
        than STALE_S: then the answer says how much older, `late`.
        """
        who, number = _named(request, "number")
        held = request.body.get("hand")
        if not (held is None or _is_action(held)):
            raise DataError(f"hand: got {held!r}, must be null or {len(ACTION)} numbers in -1 .. 1")
        now, age = time.monotonic(), _age(request)
        with self._changed:
            wheel = self._wheel
            if wheel is not None and wheel[0] != who and now - wheel[1] <= LOST_S:
                raise DataError("another page drives; let go of the wheel there first")
            if self._heard[0] == who and number <= self._heard[1]:
                return as_json({})
            if age > STALE_S:
                return as_json({"late": age})
            self._heard = who, number
            self._wheel = None if held is None else (who, now, np.array(held, np.float64))
            if (wheel is None) != (held is None):
                self._announce()
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


def _named(request: Request, what: str) -> tuple[str, int]:
    """Who sent it, and the whole number by that name."""
    body = request.body if isinstance(request.body, dict) else {}
    who, number = body.get("who"), body.get(what)
    if not isinstance(who, str) or type(number) is not int:
        raise DataError(f"{what}: got {number!r} of {who!r}, must be a whole number of somebody")
    return who, number


def _age(request: Request) -> float:
    """How long ago it was sent (s), the newest state that whoever asks has seen."""
    seen, now = request.body.get("seen"), time.monotonic()
    if type(seen) not in (int, float) or not 0 <= seen <= now:
        raise DataError(f"seen: got {seen!r}, must be `now` of the newest state that came")
    return float(now - seen)


def _worked_out(state: dict[str, Any]) -> dict[str, Any]:
    """With the loop's periods as mean, 99th percentile and longest (s)."""
    periods = np.array(state["periods"])
    return state | {"periods": [periods.mean(), np.percentile(periods, 99), periods.max()] if len(periods) else None}


class _Watcher:
    """One page that looks on, and how many pictures may be on their way to it.

    One more with each sign of it, half as many where the way took QUEUED_S longer than it did at best.
    """

    def __init__(self) -> None:
        self._underway: deque[float] = deque()  # s, when each was sent
        self._count = 0  # that have come
        self._most, self._least = UNDERWAY, float("inf")
        self.behind: float | None = None  # s from sending the newest that came to its sign

    def may_send(self) -> bool:
        """Whether one more may be sent."""
        return len(self._underway) < self._most

    def sent(self) -> None:
        """One more is on its way."""
        self._underway.append(time.monotonic())

    def saw(self, count: int) -> None:
        """So many have come."""
        now = time.monotonic()
        while self._count < count and self._underway:
            self.behind, self._count = now - self._underway.popleft(), self._count + 1
        if self.behind is not None:
            self._least = min(self._least, self.behind)
            queued = self.behind > self._least + QUEUED_S
            self._most = max(1, self._most // 2) if queued else min(self._most + 1, MOST_UNDERWAY)


def _is_action(held: Any) -> bool:
    numbers = isinstance(held, list) and all(type(value) in (int, float) for value in held)
    return numbers and len(held) == len(ACTION) and all(-1 <= value <= 1 for value in held)


class Curves:
    """What metrics.csv holds for the page; only what was added since the last look is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reading = threading.Lock()
        self._file: tuple[int, bytes] | None = None  # the inode and the header
        self._read_up_to = 0
        self._points: dict[str, list[tuple[float, float]]] = {}

    def read(self) -> dict[str, list[tuple[float, float]]]:
        """The points (step, value) of each curve that has any, thinned to MOST_POINTS."""
        with self._reading, suppress(FileNotFoundError):
            with open(self.path, "rb") as file:
                about, header = os.fstat(file.fileno()), file.readline()
                if self._file != (about.st_ino, header) or about.st_size < self._read_up_to:
                    # Written anew: with one more column, or without the rows that a kill undid.
                    self._file, self._read_up_to = (about.st_ino, header), len(header)
                    self._points = {name: [] for name in CURVES}
                file.seek(self._read_up_to)
                added = file.read()
            whole = added[: added.rfind(b"\n") + 1]  # a row may be half written
            self._read_up_to += len(whole)
            names = header.decode(errors="replace").rstrip("\n").split(",")
            lines = whole.decode(errors="replace").replace("\0", " ").splitlines()  # csv of Python 3.10 takes no 0
            for row in csv.DictReader(lines, names):
                for name in CURVES:
                    self._points[name].append((as_number(row.get("step")), as_number(row.get(name))))
        return {name: thinned for name, points in self._points.items() if (thinned := _thinned(points))}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every so-manieth point, up to the last; NaN and infinity are left out, which JSON has not."""
    finite = [point for point in points if np.isfinite(point).all()]
    every = max(1, -(-len(finite) // MOST_POINTS))
    return finite[::-1][::every][::-1]

"""The page that shows what a reward classifier says, of a dataset's frames or of a live camera's.

Where it errs, a person marks the frame, and it is queued with the truth for the next training. The threshold that is
moved on the page is only looked through: what runs keeps the one that was chosen when the classifier was trained.
"""

import base64
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from so101.data.corrections import Corrections
from so101.data.dataset import Dataset
from so101.data.labels import load_labels
from so101.episodes import load_states, observed_success
from so101.errors import DataError
from so101.learn.reward import RewardConfig, SuccessDetector
from so101.learn.reward_training import HeldOutEpisode, episode_scores, frame_scores
from so101.schema import Preprocess
from so101.web.judge import Judge
from so101.web.label_page import LabelPage
from so101.web.server import Answer, Request, Route, Stream, as_jpeg, as_json, as_png, static

KEPT_LOOKS = 90  # of a live camera, to go back to and mark: 3 s, 0.9 MB each
KEPT_POINTS = 900  # of its curve: 30 s
JPEG_QUALITY = 80
STILL_THERE_S = 0.5  # at least so often the page hears something


class Queue:
    """The frames marked on this page, in order, and the dataset that they go to."""

    def __init__(self, corrections: Corrections, retrain: str) -> None:
        """`retrain` is the command line that makes use of them."""
        self.corrections, self.retrain = corrections, retrain
        self._marks: list[tuple[Any, bool, int]] = []  # place on the page, success, episode of the queue
        self._marking = threading.Lock()

    def mark(self, place: Any, state: np.ndarray, frames: Mapping[str, np.ndarray], success: Any) -> Answer:
        """Queue a frame once. Raises DataError for one that was marked, and as Corrections.add does."""
        if not isinstance(success, bool):
            raise DataError(f"success: got {success!r}, must be true or false")
        with self._marking:
            if any(place == marked for marked, _, _ in self._marks):
                raise DataError("this frame is marked already; take that back first, if it was wrong")
            self._marks.append((place, success, self.corrections.add(state, frames, success)))
        return self.about()

    def undo(self, request: Request) -> Answer:
        """Leave the frame that was marked last out."""
        with self._marking:
            if not self._marks:
                raise DataError("nothing is marked that could be taken back")
            _, success, index = self._marks[-1]
            self.corrections.leave_out(index, success)
            self._marks.pop()
        return self.about()

    def about(self, request: Request | None = None) -> Answer:
        """What was marked, where it lies, and what to do with it."""
        marks = [{"place": place, "success": success, "episode": index} for place, success, index in self._marks]
        return as_json({"marks": marks, "folder": str(self.corrections.folder), "retrain": self.retrain})


def _routes(queue: Queue) -> dict[str, Route]:
    """Those that both kinds of preview have."""
    return {
        "GET ": static("preview.html"),
        "GET common.js": static("common.js"),
        "GET preview.js": static("preview.js"),
        "GET style.css": static("style.css"),
        "GET preview.css": static("preview.css"),
        "GET api/queue": queue.about,
        "POST api/undo": queue.undo,
    }


def _about(name: str, detector: SuccessDetector, spec: Preprocess, fps: float) -> dict[str, Any]:
    guard = detector.guard
    return {
        "classifier": name,
        "threshold": detector.threshold,
        "consecutive": detector.consecutive,
        "guard": None if guard is None else {"height": guard.height, "opening": guard.opening},
        "crop": spec.crop,
        "fps": fps,
    }


class DatasetPreview:
    """A classifier on the episodes of a dataset, with its labels."""

    def __init__(
        self, name: str, dataset: Dataset, spec: Preprocess, judge: Judge, queue: Queue, held_out: Sequence[int] = ()
    ) -> None:
        """`held_out` are the episodes that its training judged on: a mark there is not trained on."""
        self.name, self.spec, self.judge, self.queue, self.held_out = name, spec, judge, queue, list(held_out)
        self.page = LabelPage(dataset, spec, judge, "a preview changes no labels; label.py does")
        self._rewarded: tuple[Dataset | None, dict[int, np.ndarray | None]] = (None, {})  # what its rows say

    def routes(self) -> dict[str, Route]:
        """What a Server serves."""
        return _routes(self.queue) | {
            "GET api/about": self.about,
            "GET api/episodes": self.page.episodes,
            "GET api/frame": self.page.frame,
            "GET api/view": self.page.view,
            "GET api/judged": self.page.judged,
            "GET api/scores": self.scores,
            "POST api/mark": self.mark,
        }

    def about(self, request: Request) -> Answer:
        """What does not change."""
        dataset = self.page.dataset
        about = _about(self.name, self.judge.detector, self.spec, dataset.fps)
        source = {"source": str(dataset.folder), "live": False, "held_out": self.held_out}
        return as_json(about | source | {"cameras": list(dataset.cameras)})

    def scores(self, request: Request) -> Answer:
        """Of the frames judged so far whose success is known: what is right at the stored threshold and at another."""
        try:
            moved = float(request.query.get("threshold", ""))
        except ValueError:
            moved = -1.0
        if not 0 <= moved <= 1:
            raise DataError(f"threshold: got {request.query.get('threshold')!r}, must be a number within 0 .. 1")
        detector, config = self.judge.detector, RewardConfig(consecutive=self.judge.detector.consecutive)
        known, success = self._known(), []
        episodes, probabilities = [], []
        for index, answer in sorted(self.judge.found().items()):
            truth = known.get(index)
            if truth is None or "error" in answer or len(truth) != len(answer["probability"]):
                continue
            found, allowed = np.array(answer["probability"]), np.array([code == "1" for code in answer["allowed"]])
            episodes.append(HeldOutEpisode.judge(index, found, truth, allowed, config))
            probabilities.append(found)
            success.append(truth)
        scores: dict[str, Any] = {"episodes": len(episodes), "frames": sum(map(len, success))}
        if episodes:
            every, truths = np.concatenate(probabilities), np.concatenate(success)
            for name, threshold in (("stored", detector.threshold), ("moved", moved)):
                whole = episode_scores(episodes, threshold)
                scores[name] = frame_scores(every, truths, threshold) | {
                    key: whole[key] for key in ("false_episodes", "missed_episodes")
                }
        return as_json(scores)

    def _known(self) -> dict[int, np.ndarray | None]:
        """The success of each episode's observations; None where nobody has said it."""
        dataset = self.page.dataset
        labels = load_labels(dataset.folder, dataset.observations)
        if labels is not None:
            return {episode.index: observed_success(episode, labels) for episode in dataset.episodes}
        if self._rewarded[0] is not dataset:  # it is another where a recorder has added to it
            self._rewarded = dataset, {episode.index: observed_success(episode, None) for episode in dataset.episodes}
        return self._rewarded[1]

    def mark(self, request: Request) -> Answer:
        """Queue {"episode", "frame"} as showing "success" or not."""
        episode, frame, success = _asked(request.body, "episode", "frame", "success")
        there = self.page.dataset.episodes
        if not 0 <= episode < len(there) or not 0 <= frame < there[episode].observations:
            raise DataError(f"there is no frame {frame} of an episode {episode}")
        shown = there[episode]
        frames = {camera: shown.frame(camera, frame) for camera in self.page.dataset.cameras}
        return self.queue.mark([episode, frame], load_states(shown)[frame], frames, success)


class Look(NamedTuple):
    """One look at live cameras, and what the classifier says of it."""

    number: int
    time: float  # s
    frames: dict[str, np.ndarray]  # per camera (H, W, 3) uint8 RGB, as they came
    views: np.ndarray  # (cameras, S, S, 3) uint8, what the network got
    state: np.ndarray | None  # (18,); None without the arm
    probability: float
    allowed: bool | None  # by the guard; None where that is not known
    counted: bool  # whether the vote, which goes at the task's rate, has taken it


class LivePreview:
    """A classifier on live cameras. The loop shows its looks here; the browsers get the newest ones."""

    def __init__(self, name: str, cameras: list[str], detector: SuccessDetector, spec: Preprocess, fps: float,
                 queue: Queue) -> None:  # fmt: skip
        """`fps` is the task's rate, at which the vote counts."""
        self.name, self.cameras, self.detector, self.spec, self.fps, self.queue = (
            name, cameras, detector, spec, fps, queue
        )  # fmt: skip
        self._changed = threading.Condition()
        self._looks: deque[Look] = deque(maxlen=KEPT_LOOKS)
        self._held: list[Look] = []  # those that were kept when somebody stopped the picture
        self._encoding = threading.Lock()
        self._encoded: tuple[int, bytes] = (0, b"")  # number of a look, and its line
        self._trouble = ""
        self._closed = False
        self.guarded = ""  # why the guard is not judged, or ""

    def routes(self) -> dict[str, Route]:
        """What a Server serves."""
        return _routes(self.queue) | {
            "GET api/about": self.about,
            "GET api/live": self.live,
            "GET api/frame": self.frame,
            "GET api/view": self.view,
            "POST api/hold": self.hold,
            "POST api/mark": self.mark,
        }

    # What the loop calls.

    def show(self, look: Look) -> None:
        """The newest look. Never waits for a browser."""
        with self._changed:
            self._looks.append(look)
            self._trouble = ""
            self._changed.notify_all()

    def tell(self, trouble: str) -> None:
        """Why there is no newer look."""
        with self._changed:
            self._trouble = trouble
            self._changed.notify_all()

    def close(self) -> None:
        """The program ends: so do the streams."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # What the browser asks for.

    def about(self, request: Request) -> Answer:
        """What does not change."""
        about = _about(self.name, self.detector, self.spec, self.fps)
        live = {"source": ", ".join(self.cameras), "live": True, "cameras": self.cameras, "kept": KEPT_LOOKS}
        return as_json(about | live | {"points": KEPT_POINTS})

    def live(self, request: Request) -> Stream:
        """Each look as a line of JSON with its pictures in base64; those that a slow browser misses, it misses."""
        return Stream(self._lines(), "application/x-ndjson")

    def _lines(self) -> Iterator[bytes]:
        seen = self._looks[-1].number - 1 if self._looks else 0
        while not self._closed:
            with self._changed:
                if not self._closed and not self._newer(seen):
                    self._changed.wait(STILL_THERE_S)
                newer, trouble = self._newer(seen), self._trouble
            passed = [[look.number, round(look.probability, 4), look.allowed, look.counted] for look in newer]
            yield _line({"passed": passed, "trouble": trouble, "guarded": self.guarded})
            if newer:
                seen = newer[-1].number
                yield self._pictures(newer[-1])
        yield _line({"over": True})

    def _newer(self, than: int) -> list[Look]:
        return [look for look in self._looks if look.number > than]

    def _pictures(self, look: Look) -> bytes:
        """Encoded once, however many watch."""
        with self._encoding:
            if self._encoded[0] != look.number:
                cameras = [as_jpeg(look.frames[name], JPEG_QUALITY) for name in self.cameras]
                views = [as_png(view) for view in look.views]
                line = {"number": look.number, "cameras": [*map(_data, cameras)], "views": [*map(_data, views)]}
                self._encoded = look.number, _line(line)
            return self._encoded[1]

    def frame(self, request: Request) -> Answer:
        """A kept look's frame."""
        return as_jpeg(self._kept(request.number("frame")).frames[self._camera(request)], JPEG_QUALITY)

    def view(self, request: Request) -> Answer:
        """The same as the network got it."""
        return as_png(self._kept(request.number("frame")).views[self.cameras.index(self._camera(request))])

    def mark(self, request: Request) -> Answer:
        """Queue the look of number "frame" as showing "success" or not."""
        number, success = _asked(request.body, "frame", "success")
        look = self._kept(number)
        if look.state is None:
            raise DataError(
                f"a frame is queued with the arm's state, which is not known here: {self.guarded}; connect the arm, or "
                "record the scene and mark it in the dataset"
            )
        return self.queue.mark(number, look.state, look.frames, success)

    def hold(self, request: Request) -> Answer:
        """Keep what is there to be looked at for as long as somebody does ("on" true), while new looks come."""
        wanted = request.body.get("on") if isinstance(request.body, dict) else None
        with self._changed:
            self._held = list(self._looks) if wanted is True else []
            return as_json({"held": [look.number for look in self._held]})

    def _kept(self, number: int) -> Look:
        for look in [*self._held, *self._looks]:
            if look.number == number:
                return look
        raise DataError(f"frame {number} is gone: the last {KEPT_LOOKS} are kept; stop the picture first, with space")

    def _camera(self, request: Request) -> str:
        name = request.query.get("camera", "")
        if name not in self.cameras:
            raise DataError(f"camera {name!r}: there is {', '.join(self.cameras)}")
        return name


def _asked(body: Any, *names: str) -> list[Any]:
    """The values of a mark. Raises DataError for anything else; `success` is judged by the queue."""
    if not isinstance(body, dict) or set(body) != set(names) or any(type(body[name]) is not int for name in names[:-1]):
        raise DataError(f"a mark needs {', '.join(names)}, and nothing else")
    return [body[name] for name in names]


def _line(values: Any) -> bytes:
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _data(picture: Answer) -> str:
    return f"data:{picture.kind};base64,{base64.b64encode(picture.content).decode()}"


def retrain_command(classifier: Path, provenance: Mapping[str, Any], queue: Path) -> str:
    """The command that trains a classifier like this one, with the queue."""
    words = [f"dataset={provenance.get('dataset', 'DATASET')}", f"corrections={queue}", f"output={classifier}_2"]
    if encoder := (provenance.get("config") or {}).get("encoder"):
        words.append(f"encoder={encoder}")
    return f"python train_reward.py {' '.join(words)}"

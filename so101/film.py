"""Pictures of evaluated episodes: a strip of each for the report and, where asked, a video with what was going on.

The video is made of clips, one an episode, which are kept until the evaluation is complete: a kill loses the clip in
progress alone, and an episode that was not counted is not in it.
"""

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from so101.data.video import VideoWriter, join_videos
from so101.env import Observation, Step
from so101.evaluation import Judges
from so101.files import write_atomic
from so101.schema import ACTION, Preprocess

FRAME_PX = 480  # height of each camera's picture in the video
PANEL_PX = 320  # width of what stands beside it
STRIP_PX, STRIP_FRAMES = 72, 5
HOLD_S = 1.0  # s for which the last picture stays, with the verdict
FONT = cv2.FONT_HERSHEY_SIMPLEX
INK, FAINT, PAPER = (235, 235, 235), (160, 160, 160), (24, 26, 30)
GREEN, RED, BLUE, YELLOW = (0, 190, 120), (230, 90, 60), (86, 160, 240), (240, 200, 60)
DRIVERS = {"policy": "the policy drives", "leader": "a person drives", "page": "a person drives (page)"}


class Film:
    """Takes in an evaluation's episodes one after the other, and keeps those that count in its folder."""

    def __init__(
        self, folder: Path, judges: Judges, threshold: float, preprocess: Preprocess, fps: float, max_steps: int,
        video: bool, may_wait: bool,
    ) -> None:  # fmt: skip
        """`threshold` is the classifier's. `may_wait`: the arm's time is not spoiled where the encoder is behind."""
        self.folder, self.judges, self.threshold, self.preprocess = folder, judges, threshold, preprocess
        self.fps, self.max_steps, self.video, self.may_wait = fps, max_steps, video, may_wait
        self._small: list[np.ndarray] = []  # frames of the strip
        self._title: list[str] = []
        self._last: np.ndarray | None = None  # of the video
        self._clip: VideoWriter | None = None

    def begin(self, *title: str) -> None:
        """An episode begins; `title` are the lines at the top of its video."""
        self.drop()
        self._title = list(title)

    def add(self, observation: Observation, step: Step | None, driver: str) -> None:
        """What was observed, and the step that led there; None at the start. `driver` is teleop's."""
        frames = list(observation.frames.values())
        self._small.append(_scaled(frames, STRIP_PX))
        if self.video:
            self._last = self._draw(frames, step, driver)
            if self._clip is None:
                aside = self.folder / "clips" / ".clip.tmp"
                aside.parent.mkdir(exist_ok=True)
                height, width = self._last.shape[:2]
                self._clip = VideoWriter(aside, self.fps, height, width, may_wait=self.may_wait)
            self._clip.add(self._last)

    def keep(self, name: str, verdict: str, success: bool) -> None:
        """The episode counts: put it beside the others, in place of one of the same name."""
        chosen = np.linspace(0, len(self._small) - 1, STRIP_FRAMES).round().astype(int)
        gap = np.full((STRIP_PX, 2, 3), 255, np.uint8)
        pieces = [piece for index in dict.fromkeys(chosen.tolist()) for piece in (self._small[index], gap)]
        strip = np.concatenate(pieces[:-1], axis=1)
        jpeg = cv2.imencode(".jpg", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
        (self.folder / "frames").mkdir(exist_ok=True)
        write_atomic(strip_path(self.folder, name), jpeg.tobytes())
        if self._clip is not None and self._last is not None:
            _banner(self._last, verdict, GREEN if success else RED)
            for _ in range(math.ceil(HOLD_S * self.fps)):
                self._clip.add(self._last)
            self._clip.close()
            os.replace(self._clip.path, self._clip.path.with_name(f"{name}.mp4"))
        self._clip, self._small = None, []

    def drop(self) -> None:
        """The episode does not count."""
        if self._clip is not None:
            self._clip.abort()
            with suppress(FileNotFoundError):
                self._clip.path.unlink()
        self._clip, self._small = None, []

    def _draw(self, frames: list[np.ndarray], step: Step | None, driver: str) -> np.ndarray:
        """One picture of the video: every camera with what the networks see of it, and the panel."""
        shown = []
        for frame in frames:
            frame = frame.copy()
            if self.preprocess.crop is not None:
                top, left, height, width = self.preprocess.crop
                cv2.rectangle(frame, (left, top), (left + width - 1, top + height - 1), YELLOW, 1)
            shown.append(frame)
        picture = _scaled(shown, FRAME_PX)
        panel = np.full((FRAME_PX, PANEL_PX, 3), PAPER, np.uint8)
        y = 34
        for index, line in enumerate(self._title):
            _text(panel, line, 16, y, 0.62 if index == 0 else 0.46, INK if index == 0 else FAINT)
            y += 24
        steps = self.judges.steps if step is not None else 0
        _text(panel, f"step {steps} of {self.max_steps}", 16, 130, 0.55)
        _text(panel, DRIVERS[driver], 16, 156, 0.55, INK if driver == "policy" else YELLOW)
        for index, name in enumerate(ACTION):
            value = 0.0 if step is None else float(step.action[index])
            _bar(panel, name.replace("delta_", ""), 190 + 28 * index, value)
        probability = self.judges.probability[-1] if step is not None and self.judges.probability else None
        self._draw_probability(panel, probability)
        for index, (judge, at) in enumerate(
            (("world", self.judges.world_at), ("classifier", self.judges.classifier_at))
        ):  # fmt: skip
            if judge == "classifier" or self.judges.world is not None:
                said = "not yet" if at is None else f"success at step {at}"
                _text(panel, f"{judge}: {said}", 16, 404 + 26 * index, 0.5, FAINT if at is None else GREEN)
        return np.concatenate([picture, panel], axis=1)

    def _draw_probability(self, panel: np.ndarray, probability: float | None) -> None:
        """The classifier's bar, with a line at its threshold."""
        vetoed = probability is not None and self.judges.eyes.vetoed
        said = "-" if probability is None else f"{probability:.2f}" + ", the state guard says no" * vetoed
        _text(panel, f"success probability {said}", 16, 330, 0.5)
        left, right, top, bottom = 16, PANEL_PX - 16, 342, 362
        cv2.rectangle(panel, (left, top), (right, bottom), FAINT, 1)
        if probability is not None:
            end = left + round(probability * (right - left))
            counts = probability > self.threshold and not vetoed
            cv2.rectangle(panel, (left, top), (end, bottom), GREEN if counts else BLUE, cv2.FILLED)
        at = left + round(self.threshold * (right - left))
        cv2.line(panel, (at, top - 4), (at, bottom + 4), YELLOW, 2)


def join_clips(folder: Path, names: list[str], complete: bool) -> None:
    """Make video.mp4 of these episodes' clips, in this order; a complete one needs its clips no longer."""
    clips, done = folder / "clips", folder / ".clips.tmp"
    parts = [path for name in names if (path := clips / f"{name}.mp4").exists()]
    if parts:
        aside = clips / ".video.tmp"
        try:
            join_videos(parts, aside)
            os.replace(aside, folder / "video.mp4")
        finally:
            aside.unlink(missing_ok=True)  # on a full disk the half of it would keep the rest full
    if complete:
        with suppress(FileNotFoundError):
            os.rename(clips, done)  # at once: a video of half the clips must never take the place of the whole
        shutil.rmtree(done, ignore_errors=True)


def strip_path(folder: Path, name: str) -> Path:
    """Where an episode's strip is kept."""
    return folder / "frames" / f"{name}.jpg"


def _scaled(frames: list[np.ndarray], height: int) -> np.ndarray:
    """Frames (H, W, 3) side by side at a height, of an even width each."""
    sizes = [(max(2, 2 * round(f.shape[1] * height / f.shape[0] / 2)), height) for f in frames]
    pairs = zip(frames, sizes, strict=True)
    return np.concatenate([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f, size in pairs], axis=1)


def _text(panel: np.ndarray, words: str, x: int, y: int, size: float, colour: tuple[int, int, int] = INK) -> None:
    """Words, made smaller where they would not fit."""
    (width, _), _ = cv2.getTextSize(words, FONT, size, 1)
    size *= min(1.0, (panel.shape[1] - x - 12) / width) if width else 1.0
    cv2.putText(panel, words, (x, y), FONT, size, colour, 1, cv2.LINE_AA)


def _bar(panel: np.ndarray, name: str, y: int, value: float) -> None:
    """One entry of the action, -1 .. 1 from the middle."""
    left, right = 100, PANEL_PX - 60
    middle = (left + right) // 2
    _text(panel, name, 16, y + 14, 0.5)
    cv2.rectangle(panel, (left, y), (right, y + 18), FAINT, 1)
    end = middle + round(value * (right - left) / 2)
    cv2.rectangle(panel, (min(middle, end), y + 2), (max(middle, end), y + 16), BLUE, cv2.FILLED)
    cv2.line(panel, (middle, y - 2), (middle, y + 20), INK, 1)
    _text(panel, f"{value:+.2f}", right + 8, y + 14, 0.42)


def _banner(picture: np.ndarray, words: str, colour: tuple[int, int, int]) -> None:
    """The verdict across the foot of the panel."""
    left = picture.shape[1] - PANEL_PX
    cv2.rectangle(picture, (left, FRAME_PX - 40), (picture.shape[1] - 1, FRAME_PX - 1), colour, cv2.FILLED)
    _text(picture, words, left + 16, FRAME_PX - 13, 0.62, (255, 255, 255))

"""The page that labels a dataset, or only shows it: what the browser asks for, and how a label is saved.

The label file is read anew for each answer, and each change goes into the file as it then is: a recorder that
appends, a second tab and an editor may all be at it. Nothing is ever written into the dataset's folder.
"""

import functools
import os
import threading
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from so101.data.dataset import Dataset, Episode, open_dataset
from so101.data.labels import EpisodeLabel, Labels, frames_wanted, label_episode, labels_path
from so101.errors import DataError
from so101.images import preprocess
from so101.schema import Preprocess
from so101.web.server import Answer, Request, Route, as_jpeg, as_json, as_png, static

if TYPE_CHECKING:
    from so101.web.judge import Judge  # importing it takes torch, 2 s that only a classifier is worth

JPEG_QUALITY = 90  # 640x480 is 30 to 60 KB, and shows what the video shows
KEPT_FRAMES = 32  # decoded ones, 0.9 MB each
PLACE = {"timestamp", "frame_index", "episode_index", "index", "task_index", "capture_time"}  # no curves


def why_read_only(folder: Path, view: bool) -> str | None:
    """Why labels cannot be changed: because that is wanted (`view`), or where they would lie; None where they can."""
    beside = labels_path(folder).parent
    if view:
        return "opened to look at only; without --view it can be labelled"
    return None if os.access(beside, os.W_OK) else f"{beside} cannot be written, so no label could be saved"


class LabelPage:
    """One dataset in the browser. `read_only` says why its labels cannot be changed; None where they can."""

    def __init__(self, dataset: Dataset, spec: Preprocess, judge: "Judge | None", read_only: str | None) -> None:
        self.dataset, self.spec, self.judge, self.read_only = dataset, spec, judge, read_only
        self.labels_file = labels_path(dataset.folder)
        self._opened = _stamp(dataset.folder / "meta" / "info.json")
        self._recorded = {episode.index: _stamp(episode.data) for episode in dataset.episodes}
        self._saving, self._decoding = threading.Lock(), threading.Lock()
        self._decode = functools.lru_cache(KEPT_FRAMES)(self._decode_anew)

    def routes(self) -> dict[str, Route]:
        """What a Server serves."""
        return {
            "GET ": static("label.html"),
            "GET common.js": static("common.js"),
            "GET label.js": static("label.js"),
            "GET style.css": static("style.css"),
            "GET api/about": self.about,
            "GET api/episodes": self.episodes,
            "GET api/frame": self.frame,
            "GET api/view": self.view,
            "GET api/curves": self.curves,
            "GET api/judged": self.judged,
            "POST api/label": self.label,
        }

    def about(self, request: Request) -> Answer:
        """What does not change: cameras, crop, the classifier's threshold, and what the page should warn of."""
        cameras = []
        for name, (height, width) in self.dataset.cameras.items():
            problem = None
            try:
                preprocess(np.zeros((height, width, 3), np.uint8), self.spec)
            except DataError as error:
                problem = str(error)
            cameras.append({"name": name, "height": height, "width": width, "problem": problem})
        return as_json(
            {
                "name": self.labels_file.name.removesuffix(".labels.json"),
                "folder": str(self.dataset.folder),
                "labels": str(self.labels_file),
                "fps": self.dataset.fps,
                "cameras": cameras,
                "image": asdict(self.spec),
                "notes": self.dataset.notes,
                "read_only": self.read_only,
                "threshold": self.judge.threshold if self.judge else None,
            }
        )

    def episodes(self, request: Request) -> Answer:
        """Every episode with its label, or only the `version` where that is what the page knows already."""
        self._reopen()
        if request.query.get("version") == self._version():
            return as_json({"version": self._version()})
        return self._listed()

    def _version(self) -> str:
        return f"{_stamp(self.labels_file)}-{self._opened}"

    def _listed(self) -> Answer:
        """Every episode with its label, and what their frames lack; `recorded` is another where it was made anew."""
        version, problem, labels = self._version(), None, {}
        try:
            labels = self._labels()
        except DataError as error:
            problem = str(error)
        rows = [
            {**_row(episode, labels.get(episode.index)), "recorded": self._recorded.get(episode.index)}
            for episode in self.dataset.episodes
        ]
        codes = "".join(row["frames"] for row in rows if not (row["label"] or {}).get("skip"))
        wanted = frames_wanted(codes.count("1"), codes.count("0") + codes.count("x"))
        told = [each._asdict() for each in wanted]
        return as_json({"version": version, "problem": problem, "episodes": rows, "wanted": told})

    def frame(self, request: Request) -> Answer:
        """One frame as recorded, as JPEG."""
        return as_jpeg(self._pixels(request), JPEG_QUALITY)

    def view(self, request: Request) -> Answer:
        """One frame as the network sees it, pixel for pixel."""
        return as_png(preprocess(self._pixels(request), self.spec))

    def curves(self, request: Request) -> Answer:
        """An episode's numbers over its rows: {name, entries: [{name, values}]} for each column that is no index."""
        curves = []
        for name, values in self._episode(request.number("episode")).columns().items():
            if name in PLACE or values.dtype.kind not in "biuf":
                continue
            rows = values.reshape(len(values), -1).astype(np.float64)
            names = _entry_names(self.dataset.features.get(name, {}).get("names"), rows.shape[1])
            entries = [{"name": n, "values": _plain(column)} for n, column in zip(names, rows.T, strict=True)]
            curves.append({"name": name, "entries": entries})
        return as_json(curves)

    def judged(self, request: Request) -> Answer:
        """What the classifier has said since, see Judge.answers."""
        if self.judge is None:
            raise DataError("no classifier was given; start label.py with reward_model=FOLDER")
        return as_json(
            self.judge.answers(
                self.dataset.episodes, self._recorded, request.number("first"), max(0, request.number("since"))
            )
        )

    def label(self, request: Request) -> Answer:
        """Give an episode a label, or take it away (null), if it still has the one that the page saw `before`.

        And if it is still the one that the page showed, which `recorded` says.
        """
        if self.read_only:
            raise DataError(self.read_only)
        if not isinstance(request.body, dict) or set(request.body) != {"episode", "recorded", "label", "before"}:
            raise DataError('a label needs "episode", "recorded", "label" and "before", and nothing else')
        with self._saving:
            self._reopen()  # before anything is saved: afterwards, its error would pass for one of saving
            episode = self._episode(request.body["episode"])
            if request.body["recorded"] != self._recorded.get(episode.index):
                raise DataError(f"episode {episode.index}: was recorded anew meanwhile; look at it, and label it then")
            label, before = _label(request.body["label"]), _label(request.body["before"])
            if label is not None:
                label.success(episode.observations)  # refuses frames that are not there
            label_episode(self.dataset.folder, episode.index, label, before)
        return self._listed()

    def _labels(self) -> dict[int, EpisodeLabel]:
        return Labels.load(self.labels_file).episodes if self.labels_file.exists() else {}

    def _reopen(self) -> None:
        """Take in what a recorder has appended, or recorded anew; it writes info.json after each episode.

        Raises DataError where the folder holds no dataset any more, or one that what the page knows does not fit.
        """
        folder = self.dataset.folder
        stamp = _stamp(folder / "meta" / "info.json")
        if stamp == self._opened:
            return
        dataset = open_dataset(folder)
        if any(getattr(dataset, name) != getattr(self.dataset, name) for name in ("fps", "cameras", "schema")):
            raise DataError(f"{folder}: was made anew with another rate, camera or schema; start label.py anew")
        recorded = {episode.index: _stamp(episode.data) for episode in dataset.episodes}
        with self._decoding:
            self.dataset, self._recorded, self._opened = dataset, recorded, stamp
            self._decode.cache_clear()

    def _episode(self, index: Any) -> Episode:
        count = len(self.dataset.episodes)
        if type(index) is not int or not 0 <= index < count:
            raise DataError(f"episode {index!r}: the dataset has {count}, counted from 0")
        return self.dataset.episodes[index]

    def _pixels(self, request: Request) -> np.ndarray:
        """The frame that is asked for, (H, W, 3) uint8 RGB, not to be changed."""
        camera, frame = request.query.get("camera", ""), request.number("frame")
        with self._decoding:  # one decoder at a time; what waits here is then found in the cache
            episode = self._episode(request.number("episode"))
            if camera not in self.dataset.cameras:
                raise DataError(f"camera {camera!r}: the dataset has {', '.join(self.dataset.cameras) or 'none'}")
            if not 0 <= frame < episode.observations:
                raise DataError(f"episode {episode.index}: has {episode.observations} frames and no frame {frame}")
            return self._decode(episode.index, camera, frame)

    def _decode_anew(self, episode: int, camera: str, frame: int) -> np.ndarray:
        return self.dataset.episodes[episode].frame(camera, frame)


def _row(episode: Episode, label: EpisodeLabel | None) -> dict[str, Any]:
    """An episode for the page; `frames` has a letter for each: 1 success, 0 failure, x excluded, - not said."""
    row: dict[str, Any] = {"length": episode.length, "observations": episode.observations, "task": episode.task}
    row |= {"label": None, "text": "unlabelled", "problem": None, "frames": "-" * episode.observations}
    if label is None:
        return row
    row |= {"label": asdict(label), "text": str(label)}
    if label.success_start is label.ranges is None and not label.all_fail:
        return row  # only skipped
    try:
        hits = label.success(episode.observations)
    except DataError as error:
        return row | {"problem": str(error)}
    bare = replace(label, exclude=[]).success(episode.observations)
    return row | {"frames": "".join(np.where(hits, "1", np.where(bare, "x", "0")))}


def _label(stored: Any) -> EpisodeLabel | None:
    """A label as the page sends it. Raises DataError for anything else."""
    if stored is None:
        return None
    if not isinstance(stored, dict) or not set(stored) <= {field.name for field in fields(EpisodeLabel)}:
        raise DataError(f"label: got {stored!r}, must be null or the fields of a label")
    return EpisodeLabel(**stored)


def _entry_names(names: Any, width: int) -> list[str]:
    """The names of a column's entries: LeRobot writes a list, or lists in an object; numbers where there are none."""
    if isinstance(names, dict):
        names = [name for part in names.values() for name in (part if isinstance(part, list) else [part])]
    fits = isinstance(names, list) and len(names) == width
    return [str(name) for name in names] if fits else ["" if width == 1 else str(i) for i in range(width)]


def _plain(values: np.ndarray) -> list[float | None]:
    """None for what is no number; 7 digits, as many as a float32 has, and all of a whole number."""
    return [
        None if not np.isfinite(value) else float(value if value.is_integer() else f"{value:.7g}") for value in values
    ]


def _stamp(path: Path) -> str:
    """Changes when a file is replaced; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_mtime_ns}.{found.st_size}.{found.st_ino}"

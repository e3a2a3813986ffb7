"""Label files: on which observations of an episode the task had succeeded. The only truth about success.

A label file lies beside its dataset, never inside it, and is applied when the data is read. Frames are
0-based and ranges half-open. An episode that is not in the file is unlabelled, which is not failure.
Labels written by hand, or for another program, count in their own ways: label_import.py reads them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from so101.data.lock import alone_in
from so101.errors import DataError
from so101.files import read_json, write_atomic

WANTED_POSITIVE = 200  # frames that a reward classifier needs at least
WANTED_NEGATIVE = (2, 3)  # and of the others two to three times as many
FORMS = ("success_start", "ranges", "all_fail")
FORMS_HELP = '"success_start": frame, "ranges": [[start, end], ...] or "all_fail": true'


class Wanted(NamedTuple):
    """Labelled frames of one kind, beside what a reward classifier wants of them."""

    name: str
    have: int
    goal: str
    missing: int

    def __str__(self) -> str:
        end = f", {self.missing} to go" if self.missing else ": enough"
        return f"{self.have} {self.name} frames of {self.goal} wanted{end}"


def frames_wanted(positive: int, negative: int) -> tuple[Wanted, Wanted]:
    """How far the labelled frames are from what a reward classifier wants."""
    low, high = (times * max(positive, WANTED_POSITIVE) for times in WANTED_NEGATIVE)
    return (
        Wanted("positive", positive, f"{WANTED_POSITIVE}", max(0, WANTED_POSITIVE - positive)),
        Wanted("negative", negative, f"{low} to {high}", max(0, low - negative)),
    )


@dataclass(frozen=True)
class EpisodeLabel:
    """One episode's label: one of three forms, or none where the episode is only skipped.

    `success_start`: success from this frame to the end. `ranges`: success in [start, end), an end of None is
    the episode's. `all_fail`: success nowhere. `exclude`: frames forced to failure. `skip`: leave it out.
    """

    success_start: int | None = None
    ranges: list[list[int | None]] | None = None
    all_fail: bool = False
    exclude: list[int] = field(default_factory=list)
    skip: bool = False

    def __post_init__(self) -> None:
        given = [name for name in FORMS if _is_said(getattr(self, name))]
        if len(given) > 1 or not (given or self.skip):
            raise DataError(f"got {' and '.join(given) or 'no label'}, must have exactly one of {FORMS_HELP}")
        for name, kind in (("all_fail", bool), ("skip", bool), ("exclude", list)):
            if type(getattr(self, name)) is not kind:
                raise DataError(f"{name} is {getattr(self, name)!r}, must be a {kind.__name__}")
        if self.success_start is not None:
            _check_frame("success_start", self.success_start)
        before: set[int] = set()
        for frame in self.exclude:
            _check_frame("exclude", frame)
            if frame in before:
                raise DataError(f"exclude has frame {frame} twice; take one away, or correct it")
            before.add(frame)
        if self.ranges is not None:
            self._check_ranges(self.ranges)

    def _check_ranges(self, ranges: Any) -> None:
        if not isinstance(ranges, list) or not ranges:
            raise DataError(f"ranges is {ranges!r}, must be [[start, end], ...]; no success is all_fail")
        before = 0
        for pair in ranges:
            if before is None or not isinstance(pair, list) or len(pair) != 2:
                raise DataError(f"ranges has {pair!r}, must be [start, end] pairs, null only as the last end")
            start, end = pair
            _check_frame("ranges", start)
            if end is not None:
                _check_frame("ranges", end)
            if start < before or (end is not None and end <= start):
                raise DataError(f"ranges has {pair}, each must end after its start and not overlap the one before")
            before = end

    def success(self, observations: int) -> np.ndarray:
        """Success of each of `observations` frames, (observations,) bool.

        Raises DataError, naming the frame, where the label speaks of one that is not there.
        """
        frames = np.zeros(observations, bool)
        ranges = [[self.success_start, None]] if self.success_start is not None else self.ranges or []
        for start, end in ranges:
            end = observations if end is None else end
            for name, frame, last in (("start", start, observations - 1), ("end", end, observations)):
                if frame is None or frame > last:
                    raise DataError(f"success {name} {frame} is past the last frame, {observations - 1}")
            frames[start:end] = True
        for frame in self.exclude:
            if frame >= observations:
                raise DataError(f"exclude has frame {frame}, past the last frame, {observations - 1}")
            frames[frame] = False
        return frames

    def __str__(self) -> str:
        words = ["skip"] if self.skip else []
        if self.ranges is not None:
            words.append(", ".join(f"{start}-{'end' if end is None else end}" for start, end in self.ranges))
        elif self.success_start is not None:
            words.append(f"from {self.success_start}")
        elif self.all_fail:
            words.append("all fail")
        return " ".join(words + ([f"without {self.exclude}"] if self.exclude else []))


class Labels:
    """The labels of one dataset's episodes, read from and written to its label file."""

    def __init__(self, dataset: str, path: Path | None = None) -> None:
        self.dataset = dataset
        self.path = path
        self.episodes: dict[int, EpisodeLabel] = {}

    @classmethod
    def load(cls, path: Path | str) -> "Labels":
        """Read a label file. Raises DataError with file, episode and value for whatever does not fit."""
        path = Path(path)
        content = read_json(path, DataError)
        if set(content) != {"dataset", "episodes"}:
            raise DataError(f'{path}: must hold "dataset" and "episodes" and nothing else, got {sorted(content)}')
        name, episodes = content["dataset"], content["episodes"]
        if not isinstance(name, str) or not isinstance(episodes, dict):
            raise DataError(f'{path}: "dataset" must be the dataset\'s name and "episodes" an object')
        labels = cls(name, path)
        known = EpisodeLabel.__dataclass_fields__
        for key, entry in episodes.items():
            episode = episode_number(str(path), key)
            if not isinstance(entry, dict) or not set(entry) <= set(known):
                got = sorted(set(entry) - set(known)) if isinstance(entry, dict) else entry
                raise DataError(f"{path}: episode {key}: unknown {got!r}; the keys are {', '.join(known)}")
            try:
                labels.episodes[episode] = EpisodeLabel(**entry)
            except DataError as error:
                raise DataError(f"{path}: episode {key}: {error}") from None
        return labels

    def save(self, path: Path | str) -> None:
        """Replace the label file as a whole; a kill leaves the old one or the new one."""
        episodes = {str(index): _plain(label) for index, label in sorted(self.episodes.items())}
        lines = ",\n".join(f'    "{index}": {json.dumps(label)}' for index, label in episodes.items())
        body = f"{{\n{lines}\n  }}" if lines else "{}"
        write_atomic(Path(path), f'{{\n  "dataset": {json.dumps(self.dataset)},\n  "episodes": {body}\n}}\n')

    def set(self, episode: int, label: EpisodeLabel | None) -> None:
        """Label an episode anew, or take its label away (None)."""
        if label is None:
            self.episodes.pop(episode, None)
        else:
            self.episodes[episode] = label

    def success(self, episode: int, length: int) -> np.ndarray | None:
        """Success of each observation of an episode of `length` rows, the closing one included.

        (length + 1,) bool, or None where the episode is unlabelled or skipped. Raises DataError, naming
        file, episode and frame, where the label speaks of frames that are not there.
        """
        label = self.episodes.get(episode)
        return None if label is None or label.skip else self._success(episode, length + 1)

    def check(self, observations: Sequence[int]) -> None:
        """Raise DataError, naming file, episode and frame, where a label, a skipped one too, fits nothing.

        `observations`: how many each of the dataset's episodes has; no more than its rows in a foreign set.
        """
        for episode in sorted(self.episodes):
            if episode >= len(observations):
                raise DataError(f"{self._place}: episode {episode}: the dataset has only {len(observations)}")
            self._success(episode, observations[episode])

    def _success(self, episode: int, observations: int) -> np.ndarray:
        try:
            return self.episodes[episode].success(observations)
        except DataError as error:
            raise DataError(f"{self._place}: episode {episode}: {error}") from None

    @property
    def _place(self) -> str:
        return str(self.path or self.dataset)


def load_labels(dataset_folder: Path | str, observations: Sequence[int]) -> Labels | None:
    """The labels beside a dataset whose episodes have so many observations; None where there is no label file.

    Raises DataError where the file is another dataset's, or labels an episode or a frame that is not there.
    """
    path = labels_path(dataset_folder)
    if not path.exists():
        return None
    labels = Labels.load(path)
    name = path.name.removesuffix(".labels.json")
    if labels.dataset != name:
        raise DataError(f"{path}: labels of {labels.dataset!r}, not {name!r}; if renamed, correct it there")
    labels.check(observations)
    return labels


def label_episode(dataset_folder: Path, episode: int, label: EpisodeLabel | None, *seen: EpisodeLabel | None) -> Labels:
    """Change one label in the file as it is now, where label.py may have changed others; all that it then holds.

    `seen`: the label that the change was decided upon. Raises DataError where it is another by now.
    """
    path = labels_path(dataset_folder)
    with alone_in(path.parent):
        labels = Labels.load(path) if path.exists() else Labels(path.name.removesuffix(".labels.json"))
        now = labels.episodes.get(episode)
        if seen and now != seen[0]:
            raise DataError(
                f"episode {episode}: was labelled {now or 'not at all'} elsewhere meanwhile, and that is kept; look at "
                f"it, and say yours again if it is right"
            )
        labels.set(episode, label)
        labels.save(path)
    return labels


def labels_path(dataset_folder: Path | str) -> Path:
    """Where the labels of a dataset lie."""
    return beside(dataset_folder, "labels.json")


def beside(dataset_folder: Path | str, kind: str) -> Path:
    """A dataset's neighbour `<folder>.<kind>`, by whatever link the dataset was reached."""
    folder = Path(dataset_folder)
    folder = folder.resolve() if folder.name in ("", "..") or folder.is_symlink() else folder
    return folder.with_name(f"{folder.name}.{kind}")


def episode_number(where: str, key: str) -> int:
    """The episode that a key means. Raises DataError, beginning with `where`, for anything but a number."""
    if not re.fullmatch("0|[1-9][0-9]{0,8}", key):
        raise DataError(f"{where}: episode {key!r}: must be a number, 0 for the first")
    return int(key)


def _check_frame(name: str, frame: Any) -> None:
    if type(frame) is not int or frame < 0:
        raise DataError(f"{name} has {frame!r}, must be a frame number, 0 for the first")


def _is_said(value: Any) -> bool:
    return value is not None and value is not False  # by identity: frame 0 equals False


def _plain(label: EpisodeLabel) -> dict[str, Any]:
    return {name: value for name, value in vars(label).items() if _is_said(value) and value != []}

"""Label files: on which observations of an episode the task had succeeded. The only truth about success.

A label file lies beside its dataset, never inside it, and is applied when the data is read. Frames are
0-based and ranges half-open. An episode that is not in the file is unlabelled, which is not failure.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from so101.errors import DataError
from so101.files import read_json, write_atomic

FORMS = ("success_start", "ranges", "all_fail")
FORMS_HELP = '"success_start": frame, "ranges": [[start, end], ...] or "all_fail": true'


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
        for frame in self.exclude:
            _check_frame("exclude", frame)
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
        if self.ranges is not None:
            text = ", ".join(f"{start}-{'end' if end is None else end}" for start, end in self.ranges)
        else:
            text = "all fail" if self.all_fail else f"from {self.success_start}"
        text = "" if self.skip and self.success_start is self.ranges is None and not self.all_fail else text
        text += f" without {self.exclude}" if self.exclude else ""
        return f"skip {text}".strip() if self.skip else text


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
        for key, entry in episodes.items():
            labels._read_episode(key, entry)
        return labels

    def _read_episode(self, key: str, entry: Any) -> None:
        if not (key.isascii() and key.isdigit()) or key != str(int(key)):
            raise DataError(f"{self.path}: episode {key!r}: must be a number, 0 for the first")
        known = EpisodeLabel.__dataclass_fields__
        if not isinstance(entry, dict) or not set(entry) <= set(known):
            got = sorted(set(entry) - set(known)) if isinstance(entry, dict) else entry
            raise DataError(f"{self.path}: episode {key}: unknown {got!r}; the keys are {', '.join(known)}")
        try:
            self.episodes[int(key)] = EpisodeLabel(**entry)
        except DataError as error:
            raise DataError(f"{self.path}: episode {key}: {error}") from None

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
        if label is None or label.skip:
            return None
        try:
            return label.success(length + 1)
        except DataError as error:
            raise DataError(f"{self.path or self.dataset}: episode {episode}: {error}") from None


def load_labels(dataset_folder: Path | str, episodes: int) -> Labels | None:
    """The labels beside a dataset of so many episodes; None where there is no label file.

    Raises DataError where the file is another dataset's, or labels an episode that is not there.
    """
    path = labels_path(dataset_folder)
    if not path.exists():
        return None
    labels = Labels.load(path)
    name = path.name.removesuffix(".labels.json")
    if labels.dataset != name:
        raise DataError(f"{path}: labels of {labels.dataset!r}, not {name!r}; if renamed, correct it there")
    beyond = sorted(set(labels.episodes) - set(range(episodes)))
    if beyond:
        raise DataError(f"{path}: episode {beyond[0]}: the dataset has only {episodes}")
    return labels


def label_episode(dataset_folder: Path, episode: int, label: EpisodeLabel | None) -> Labels:
    """Change one label in the file as it is now, where label.py may have changed others; all that it then holds."""
    path = labels_path(dataset_folder)
    labels = Labels.load(path) if path.exists() else Labels(path.name.removesuffix(".labels.json"))
    labels.set(episode, label)
    labels.save(path)
    return labels


def labels_path(dataset_folder: Path | str) -> Path:
    """Where the labels of a dataset lie: `<folder>.labels.json`, beside it."""
    folder = Path(dataset_folder)
    folder = folder.resolve() if folder.name in ("", "..") else folder
    return folder.with_name(f"{folder.name}.labels.json")


def import_labels(
    text: str, where: str, *, one_based: bool, end_inclusive: bool, every: int = 1
) -> dict[int, EpisodeLabel]:
    """Read hand-written labels: lines `NN: 34-`, `NN: 40-48, 60-`, `NN: all fail`; tables `00: 119 05: 39`.

    `one_based`: the first image was counted 1. `end_inclusive`: a range's last image still shows success.
    `every`: images had been taken from every n-th frame, so image i is frame i * every; of frames between
    the last image of success and the next, only the former's own counts. Episodes are always counted from 0.
    Blank lines and lines with # are passed over. Raises DataError with the line for anything else.
    """
    if every < 1:
        raise DataError(f"{where}: every is {every}, must be at least 1")
    first = int(one_based)
    labels: dict[int, EpisodeLabel] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        before, *entries = re.split(r"(\d+)\s*:", line)
        if before.strip() or not entries:
            raise DataError(f"{where}, line {number}: {line.strip()!r} does not start with an episode, as in 07: 34-")
        for key, spec in zip(entries[::2], entries[1::2], strict=True):
            episode = int(key)
            if episode in labels:
                raise DataError(f"{where}, line {number}: episode {episode} is labelled twice")
            try:
                labels[episode] = _import_one(spec.strip(), first, every, end_inclusive)
            except DataError as error:
                raise DataError(f"{where}, line {number}: episode {episode}: {error}") from None
    return labels


def _import_one(spec: str, first: int, every: int, end_inclusive: bool) -> EpisodeLabel:
    if spec.lower() == "all fail":
        return EpisodeLabel(all_fail=True)
    if start := re.fullmatch(r"(\d+)\s*-?", spec):
        return EpisodeLabel(success_start=(int(start[1]) - first) * every)
    ranges: list[list[int | None]] = []
    for part in spec.split(","):
        pair = re.fullmatch(r"\s*(\d+)\s*-\s*(\d*)\s*", part)
        if pair is None:
            raise DataError(f"{spec!r} is none of: 34-  40-48, 60-  all fail  34")
        end = (int(pair[2]) - first) * every + end_inclusive if pair[2] else None
        ranges.append([(int(pair[1]) - first) * every, end])
    return EpisodeLabel(ranges=ranges)


def _check_frame(name: str, frame: Any) -> None:
    if type(frame) is not int or frame < 0:
        raise DataError(f"{name} has {frame!r}, must be a frame number, 0 for the first")


def _is_said(value: Any) -> bool:
    return value is not None and value is not False  # by identity: frame 0 equals False


def _plain(label: EpisodeLabel) -> dict[str, Any]:
    return {name: value for name, value in asdict(label).items() if _is_said(value) and value != []}

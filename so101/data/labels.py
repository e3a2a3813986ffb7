"""Label files: on which observations of an episode the task had succeeded. The only truth about success.

A label file lies beside its dataset, never inside it, and is applied when the data is read. Frames are
0-based and ranges half-open. An episode that is not in the file is unlabelled, which is not failure.
Labels written by hand, or for another program, count in their own ways: `import_labels` reads them.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from so101.data.lock import alone_in
from so101.errors import DataError
from so101.files import parse_json, read_json, write_atomic

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
            episode = _episode_number(str(path), key)
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
    with alone_in(path.parent):
        labels = Labels.load(path) if path.exists() else Labels(path.name.removesuffix(".labels.json"))
        labels.set(episode, label)
        labels.save(path)
    return labels


def labels_path(dataset_folder: Path | str) -> Path:
    """Where the labels of a dataset lie: `<folder>.labels.json`, beside it."""
    folder = Path(dataset_folder)
    folder = folder.resolve() if folder.name in ("", "..") else folder
    return folder.with_name(f"{folder.name}.labels.json")


@dataclass(frozen=True)
class _Habits:
    """How a file of labels counts, as `import_labels` explains it: from an image's number to its frame."""

    one_based: bool
    end_inclusive: bool
    every: int
    multiplied: bool
    reset_is_failure: bool

    def frame(self, number: Any) -> int:
        """The frame that an image shows."""
        image, rest = divmod(number, self.every if self.multiplied else 1) if type(number) is int else (-1, 0)
        if image < self.one_based:
            raise DataError(f"{number!r} is no image's number, the first is {int(self.one_based)}")
        if rest:
            raise DataError(f"{number} is no multiple of {self.every}, so it was not multiplied")
        return (image - self.one_based) * self.every

    def end(self, number: Any) -> int:
        """Where success ends, given the first image without it: behind the frame of the image before."""
        return self.frame(number) - self.every + 1

    def ranges(self, ranges: Any) -> Any:
        """[[start, end], ...] in frames; what is no such list is left for EpisodeLabel to refuse."""
        if not isinstance(ranges, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in ranges):
            return ranges
        end = (lambda number: self.frame(number) + 1) if self.end_inclusive else self.end
        return [[self.frame(start), None if last is None else end(last)] for start, last in ranges]


Entry = tuple[str, str | None, int, Any]  # its place in the file, the dataset named there, the episode, what is said


def import_labels(
    text: str,
    where: str,
    *,
    one_based: bool,
    end_inclusive: bool,
    every: int = 1,
    multiplied: bool | None = None,
    reset_is_failure: bool = False,
    dataset: str | None = None,
    observations: Sequence[int] | None = None,
) -> dict[int, EpisodeLabel]:
    """Read labels that were not written here. `where` names the file in errors; episodes always count from 0.

    Lines `07: 34-`, `14: 40-48, 60-`, `02: all fail`, and tables of them, `00: 119 05: 39` or `{0: 119, 5: 39}`.
    JSON {"dataset_path": ..., "episodes": {...}} or only the latter's content: for each episode null (all fail),
    success_start, success_start with success_end, ranges or success_ranges, each with `exclude` if wanted.
    CSV with the columns episode, success start, env reset start, notes; a note may say `Gap: 78-88 are failure`.

    How a file counts cannot be seen in it, and is said:
    `one_based`: the first image is number 1. `end_inclusive`: the last image of a range belongs to it.
    `every`: there was an image of every n-th frame only, so that image i (from 0) is frame i * n; of the frames
    between the last image of success and the next only the former's own counts, and an exclude is one frame.
    `multiplied`: the numbers are images' numbers times `every`; must be said of a JSON with `every` above 1.
    `reset_is_failure`: frames from env reset start on count as failure. Must be true where the column is used.
    `dataset`: the name, in the file, of the one whose labels are wanted, where it has those of several.
    `observations`: how many each episode has; then a label past the end is refused here, by this file's name.

    Raises DataError with the place, the episode and the value for whatever does not fit.
    """
    if every < 1:
        raise DataError(f"{where}: every is {every}, must be at least 1")
    text = text.removeprefix("\ufeff")  # a byte order mark, as Windows' Notepad writes it
    read: Callable[[Any, _Habits], EpisodeLabel]
    if text.lstrip().startswith(("{", "[")):
        if every > 1 and multiplied is None:
            raise DataError(f"{where}: every is {every}; say multiplied too: whether its numbers are so already")
        entries, read = list(_json_entries(text, where)), _from_json
    elif re.match(r'\s*"?episode"?\s*,', text, re.IGNORECASE):
        entries, read = list(_table_entries(text, where)), _from_row
    else:
        entries, read = list(_line_entries(text, where)), _from_words
    named = sorted({name or "(not named)" for _, name, _, _ in entries})
    if not entries:
        raise DataError(f"{where}: has no labels in it")
    if len(named) > 1 if dataset is None else dataset not in named:
        raise DataError(f"{where}: has the labels of {', '.join(named)}; say dataset= and the one whose labels to take")
    labels = Labels(where)
    habits = _Habits(one_based, end_inclusive, every, bool(multiplied), reset_is_failure)
    for place, name, episode, said in entries:
        if dataset not in (None, name):
            continue
        if episode in labels.episodes:
            raise DataError(f"{place}: episode {episode} is labelled twice")
        try:
            labels.episodes[episode] = read(said, habits)
        except DataError as error:
            raise DataError(f"{place}: episode {episode}: {said!r}: {error}") from None
    if observations is not None:
        labels.check(observations)
    return labels.episodes


def _line_entries(text: str, where: str) -> Iterator[Entry]:
    dataset = None
    for number, line in enumerate(text.splitlines(), 1):
        said, _, comment = line.partition("#")
        if not said.strip():
            path = re.search(r"(?:^|\s)(~?/\S+)", comment)  # "# dataset path: /home/..." heads its block
            dataset = PurePosixPath(path[1]).name if path else dataset
            continue
        if table := re.fullmatch(r"\s*\w*\s*=?\s*\{(.*)\}\s*", said):
            said = re.sub(r",\s*(?=\d+\s*:|$)", " ", table[1])
        before, *parts = re.split(r"(\d+)\s*:", said)
        if before.strip() or not parts:
            raise DataError(f"{where}, line {number}: {line.strip()!r} does not start with an episode, as in 07: 34-")
        for episode, words in zip(parts[::2], parts[1::2], strict=True):
            yield f"{where}, line {number}", dataset, int(episode), words.strip()


def _from_words(words: str, habits: _Habits) -> EpisodeLabel:
    if words.lower() == "all fail":
        return EpisodeLabel(all_fail=True)
    if start := re.fullmatch(r"(\d+)(\s*-(\s*end)?)?", words):
        return EpisodeLabel(success_start=habits.frame(int(start[1])))
    pairs = [re.fullmatch(r"\s*(\d+)\s*-\s*(\d+|end|)\s*", part) for part in words.split(",")]
    ranges = [[int(pair[1]), int(pair[2]) if pair[2].isdigit() else None] for pair in pairs if pair]
    if len(ranges) < len(pairs):
        raise DataError("is none of: 34-  40-48, 60-  12-end  all fail  34")
    return EpisodeLabel(ranges=habits.ranges(ranges))


def _json_entries(text: str, where: str) -> Iterator[Entry]:
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{where}: no usable JSON: {problem}") from None
    if not isinstance(content, dict) or not isinstance(content.get("episodes", {}), dict):
        raise DataError(f'{where}: must hold labels by episode, {{"0": ..., "1": ...}}')
    if {"output_repo_id", "sources"} & set(content):
        raise DataError(
            f"{where}: a plan for merging datasets, not labels; import each source's own labels, and merge with "
            "python -m so101.tools.edit"
        )
    if "dataset" in content:
        raise DataError(f"{where}: a label file as written here; put it beside its dataset as <dataset>.labels.json")
    rest = {key: value for key, value in content.items() if key not in ("dataset_path", "source")}
    episodes = rest.pop("episodes", None)
    if episodes is not None and rest:
        raise DataError(f"{where}: unknown {sorted(rest)}; beside episodes stand only dataset_path and source")
    path = content.get("dataset_path")
    name = PurePosixPath(path).name if isinstance(path, str) else None
    for key, entry in (rest if episodes is None else episodes).items():
        yield where, name, _episode_number(where, key), entry


def _from_json(entry: Any, habits: _Habits) -> EpisodeLabel:
    if entry is None:
        return EpisodeLabel(all_fail=True)
    said = sorted(set(entry) - {"exclude"}) if isinstance(entry, dict) else []
    if said not in (["success_start"], ["success_end", "success_start"], ["ranges"], ["success_ranges"]):
        raise DataError(
            "must be null for all fail, or have one of success_start, success_start and success_end, ranges, "
            "success_ranges, and exclude if wanted"
        )
    exclude = entry.get("exclude", [])
    exclude = [habits.frame(number) for number in exclude] if isinstance(exclude, list) else exclude
    if said == ["success_start"]:
        return EpisodeLabel(success_start=habits.frame(entry["success_start"]), exclude=exclude)
    ranges = entry[said[0]] if len(said) == 1 else [[entry["success_start"], entry["success_end"]]]
    return EpisodeLabel(ranges=habits.ranges(ranges), exclude=exclude)


def _table_entries(text: str, where: str) -> Iterator[Entry]:
    table = csv.reader(text.lstrip().splitlines(), skipinitialspace=True)
    names = ["_".join(name.lower().replace("_", " ").split()) for name in next(table)]
    allowed = ["episode", "success_start", "env_reset_start", "notes"]
    if not set(allowed[:2]) <= set(names) <= set(allowed) or len(set(names)) < len(names):
        raise DataError(f"{where}: has the columns {names}, must have {allowed}, the last two if wanted")
    for cells in table:
        place = f"{where}, line {table.line_num}"
        if any(cells) and len(cells) != len(names):
            raise DataError(
                f'{place}: has {len(cells)} columns, must be {len(names)}; a note with a comma stands in ""'
            )
        if any(cells):
            row = dict(zip(names, (cell.strip() for cell in cells), strict=True))
            yield place, None, _episode_number(place, row.pop("episode")), row


def _from_row(row: dict[str, str], habits: _Habits) -> EpisodeLabel:
    start, reset = (re.fullmatch(r"(\d+)(\.0*)?", row.get(name, "")) for name in ("success_start", "env_reset_start"))
    if start is None or not (reset or row.get("env_reset_start", "") in ("", "nan")):
        raise DataError("success start must be an image's number, and env reset start one, empty or nan")
    if reset and not habits.reset_is_failure:
        raise DataError("say reset_is_failure, or take the column away: frames from env reset start on are failure")
    ranges: list[list[int | None]] = [[habits.frame(int(start[1])), None]]
    for note in filter(None, re.split(r"[;.]", row.get("notes", ""))):
        gap = re.fullmatch(r"gap:?\s*(\d+)\s*-\s*(\d+)(\s+(are|is) failures?)?", note.strip(), re.IGNORECASE)
        if gap is None and re.search(r"\d", note):
            raise DataError("the note has a number in it, and is no gap as in: Gap: 78-88 are failure")
        if gap:
            ranges[-1][1] = habits.end(int(gap[1]))
            ranges.append([habits.frame(int(gap[2])) + habits.every * habits.end_inclusive, None])
    if reset:
        ranges[-1][1] = habits.end(int(reset[1]))
    return EpisodeLabel(ranges=ranges) if reset or len(ranges) > 1 else EpisodeLabel(success_start=ranges[0][0])


def _episode_number(where: str, key: str) -> int:
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

"""Labels that were written by hand, or for another program: text, JSON and CSV, each counting in its own way."""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from so101.data.labels import EpisodeLabel, Labels, episode_number
from so101.errors import DataError, tell
from so101.files import parse_json


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


# "# dataset path: data/lamp" or "# /home/somebody/lamp" heads the block of its labels.
HEADER = re.compile(r"\bdataset(?:[ _]path)?\s*[:=]\s*(\S+)|(?:^|\s)(~?/\S+)", re.IGNORECASE)
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
    into: str | None = None,
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
    `into`: the name of the dataset that they are for; a file that names another one is told of, if `dataset` is not.
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
        try:
            entries, read = list(_table_entries(text, where)), _from_row
        except csv.Error as error:
            raise DataError(f"{where}: is no table of labels: {error}") from error
    else:
        entries, read = list(_line_entries(text, where)), _from_words
    named = sorted({name or "(not named)" for _, name, _, _ in entries})
    if not entries:
        raise DataError(f"{where}: has no labels in it")
    if len(named) > 1 if dataset is None else dataset not in named:
        raise DataError(f"{where}: has the labels of {', '.join(named)}; say dataset= and the one whose labels to take")
    if dataset is None and into is not None and entries[0][1] not in (None, into):
        tell(f"{where}: says that these are the labels of {entries[0][1]}; they are taken for {into} all the same")
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


def _name(path: str) -> str:
    return PureWindowsPath(path).name  # which takes either slash


def _line_entries(text: str, where: str) -> Iterator[Entry]:
    dataset = None
    for number, line in enumerate(text.splitlines(), 1):
        said, _, comment = line.partition("#")
        if not said.strip():
            path = HEADER.search(comment)
            dataset = _name(path[1] or path[2]) if path else dataset
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
    name = _name(path) if isinstance(path, str) else None
    for key, entry in (rest if episodes is None else episodes).items():
        yield where, name, episode_number(where, key), entry


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
            yield place, None, episode_number(place, row.pop("episode")), row


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

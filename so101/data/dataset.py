"""Datasets on disk: LeRobot's v3.0 and v2.1, its own and ours, as they are and as people have edited them.

Opening a dataset reads, and changes nothing. The rows are believed, not what the metadata says of them; what had
to be repaired on the way into memory is told in `Dataset.notes`, and what cannot be repaired is refused by file name.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from so101.data import layout
from so101.data.index import read_index
from so101.data.video import VideoReader, read_frame
from so101.errors import DataError
from so101.files import parse_json, read_json

KNOWN = {*layout.COLUMNS, *layout.PLACE}


@dataclass(frozen=True)
class Closing:
    """The observation after an episode's last row: state (18,), one uint8 RGB frame per camera, time in s."""

    state: np.ndarray
    frames: dict[str, np.ndarray]
    capture_time: float


@dataclass(frozen=True)
class Episode:
    """One recorded episode of `length` rows; its arrays are read from disk when asked for.

    `data` is its parquet file, `videos` says for each camera in which file its frames are, and from which on; `room`,
    where another episode's frames begin in that file, how many may be its own. A camera of `stills` has its frames in a
    column of the rows instead, as PNG or JPEG. `alone`: no other episode is in `data`.
    """

    index: int
    length: int
    task: str
    fps: float
    data: Path
    videos: dict[str, tuple[Path, int]]
    room: dict[str, int] = field(default_factory=dict)
    stills: dict[str, str] = field(default_factory=dict)
    alone: bool = True
    closing_path: Path | None = None

    @property
    def cameras(self) -> list[str]:
        """The cameras that it was seen by."""
        return [*self.videos, *self.stills]

    @property
    def observations(self) -> int:
        """How many observations there are: length + 1 where the closing one was kept."""
        return self.length + (self.closing_path is not None)

    def columns(self) -> dict[str, np.ndarray]:
        """Every column of numbers but the images, in row order: (T,) or (T, d) arrays.

        Where next.done is missing, the last row ends the episode. Columns that this program does not know are left out
        where they are no whole table of numbers. Raises DataError, naming the file, where it is missing or damaged.
        """
        table = layout.read_rows(self.data, None if self.alone else self.index, self.stills.values())
        columns = {}
        for name in table.column_names:
            with nullcontext() if name in KNOWN else suppress(DataError):
                columns[name] = layout.to_numpy(table[name], f"{self.data}: {name}")
        columns.setdefault("next.done", np.arange(self.length) == self.length - 1)
        for name, kind in (("next.reward", np.float32), ("next.done", bool), ("next.truncated", bool)):
            if name in columns:
                columns[name] = columns[name].astype(kind)
        return columns

    def frames(self, camera: str, threads: int = 0) -> Iterator[np.ndarray]:
        """The T frames of one camera, in row order, (height, width, 3) uint8 RGB each.

        `threads` of the decoder, 0 for all cores. Raises DataError, naming the file, where it is missing, damaged or
        too short.
        """
        if camera in self.stills:
            yield from map(self._picture, repeat(camera), self._stills(camera))
            return
        path, start = self.videos[camera]
        count = 0
        with VideoReader(path, threads) as reader:
            for frame in islice(reader.frames(start), min(self.length, self.room.get(camera, self.length))):
                yield frame
                count += 1
        if count < self.length:
            raise DataError(f"{path}: episode {self.index} has {self.length} rows, but only {count} frames")

    def observed(self, camera: str, threads: int = 0) -> Iterator[np.ndarray]:
        """The frames of all observations: those of the rows, and the closing one where it was kept."""
        yield from self.frames(camera, threads)
        if (closing := self.closing()) is not None:
            yield closing.frames[camera]

    def frame(self, camera: str, index: int) -> np.ndarray:
        """The frame of one observation, 0 .. observations - 1: (height, width, 3) uint8 RGB, at random access.

        Raises as `frames` does, and for an index that is not there.
        """
        if not 0 <= index < self.observations:
            raise DataError(f"episode {self.index}: there is no frame {index}, the last is {self.observations - 1}")
        if index == self.length:
            closing = self.closing()
            assert closing is not None  # it is counted in `observations`
            return closing.frames[camera]
        if camera in self.stills:
            return self._picture(camera, self._stills(camera)[index])
        path, start = self.videos[camera]
        if index >= self.room.get(camera, self.length):
            raise DataError(f"{path}: episode {self.index} has {self.length} rows, but only {self.room[camera]} frames")
        return read_frame(path, start + index)

    def closing(self) -> Closing | None:
        """The observation after the last row, or None where the dataset keeps none.

        Raises DataError, naming the file, where it is missing or damaged.
        """
        if self.closing_path is None:
            return None
        try:
            with open(self.closing_path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                frames = {camera: stored[layout.IMAGES + camera] for camera in self.videos}
                return Closing(stored["observation.state"], frames, float(stored["capture_time"]))
        except Exception as error:  # numpy's reader of a damaged file fails in any of ten ways
            raise DataError(f"{self.closing_path}: not a readable closing observation: {error}") from error

    def _stills(self, camera: str) -> pa.ChunkedArray:
        return layout.read_rows(self.data, None if self.alone else self.index)[self.stills[camera]]

    def _picture(self, camera: str, still: pa.Scalar) -> np.ndarray:
        """One frame of a camera of `stills`, of its {"bytes": PNG or JPEG}."""
        held = still.as_py()
        encoded = held.get("bytes") if isinstance(held, dict) else None
        if not isinstance(encoded, bytes) or not encoded:
            raise DataError(
                f"{self.data}: {self.stills[camera]} has a row without a picture, must hold PNG or JPEG bytes"
            )
        frame = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        if frame is None:
            raise DataError(f"{self.data}: {self.stills[camera]} has a picture that cannot be decoded")
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


@dataclass(frozen=True)
class Dataset:
    """An opened dataset. `notes` says what was found wrong with it, and how it is read all the same.

    `schema` is what schema.describe says of it; None where another program recorded it.
    """

    folder: Path
    version: str
    fps: float
    features: dict[str, Any]
    schema: dict[str, Any] | None
    cameras: dict[str, tuple[int, int]]  # camera -> height, width
    episodes: list[Episode] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def observations(self) -> list[int]:
        """How many observations each episode has, which is what a label speaks of."""
        return [episode.observations for episode in self.episodes]

    def require_schema(self) -> dict[str, Any]:
        """What schema.describe says of it. Raises DataError where another program recorded it, which said nothing."""
        if self.schema is None:
            raise DataError(
                f"{self.folder}: says nothing of its states, actions and cameras; "
                f"`python -m so101.tools.edit convert` makes a set that does"
            )
        return self.schema


def open_dataset(folder: Path | str) -> Dataset:
    """Open a v3.0 or v2.1 dataset, LeRobot's or ours; not a byte of it changes.

    Raises DataError, naming the file, where one is missing or unreadable, and for another version.
    """
    folder = Path(folder)
    info = read_info(folder)
    features, version = info["features"], info["codebase_version"]
    cameras = {layout.camera_of(key): layout.image_size(feature) for key, feature in layout.pictures(features).items()}
    dataset = Dataset(folder, version, info["fps"], features, info.get("so101"), cameras)
    rows = _v21_rows(dataset, info) if version.startswith("v2.") else episode_rows(folder)
    if "so101" in info and len(rows) < info.get("total_episodes", 0):  # it is raised only after a commit
        gone = folder / layout.EPISODES_PATH.format(**layout.place_of(len(rows)))
        raise DataError(f"{gone}: missing, though meta/info.json counts {info['total_episodes']} episodes; put it back")
    lengths: dict[Path, dict[int, int]] = {}  # data file -> how many rows of each episode it holds
    for row in rows:
        episode = _locate(dataset, info, row)
        if episode.data not in lengths:
            lengths[episode.data] = layout.episode_lengths(episode.data)
        _add(dataset, episode, row, lengths[episode.data])
    if "so101" not in info:
        _find_room(dataset)
    if len(rows) != info.get("total_episodes"):
        dataset.notes.append(f"{len(rows)} episodes, but meta/info.json says {info.get('total_episodes')}")
    if rows:
        _check_first(dataset)
    return dataset


def _add(dataset: Dataset, episode: Episode, row: dict[str, Any], lengths: dict[int, int]) -> None:
    """Take an episode up with the rows that its file holds, whatever the metadata says."""
    index, length = episode.index, lengths.get(episode.index, 0)
    if dataset.version.startswith("v2.") and set(lengths) != {index}:  # the file's name says which episode it is
        dataset.notes.append(f"{episode.data}: its column episode_index says {sorted(lengths)}; taken for {index}")
        length = sum(lengths.values())
    if length == 0:
        raise DataError(f"{episode.data}: holds no row of episode {index}, though the metadata says so")
    if length != row.get("length"):
        dataset.notes.append(f"episode {index}: {length} rows, but the metadata says {row.get('length')}")
    alone = dataset.version.startswith("v2.") or set(lengths) == {index}
    dataset.episodes.append(replace(episode, length=length, alone=alone))


def _find_room(dataset: Dataset) -> None:
    """Where several episodes share a video: how many frames each may have before the next one's begin.

    Not in sets of ours, where two episodes may be cut out of the same frames.
    """
    for camera in dataset.cameras:
        starts: dict[Path, list[int]] = {}
        for episode in dataset.episodes:
            if camera in episode.videos:
                path, first = episode.videos[camera]
                starts.setdefault(path, []).append(first)
        for episode in dataset.episodes:
            path, first = episode.videos.get(camera, (episode.data, 0))
            following = [start for start in starts.get(path, []) if start > first]
            if following and (room := min(following) - first) != episode.length:
                episode.room[camera] = room
                dataset.notes.append(
                    f"{path}: episode {episode.index} has {episode.length} rows and {room} frames"
                    + ("; the first ones are taken" if room > episode.length else "")
                )


def _locate(dataset: Dataset, info: dict[str, Any], row: dict[str, Any]) -> Episode:
    """Where the files of an episode are; each is there."""
    folder, index, videos = dataset.folder, row["episode_index"], {}
    keys = layout.pictures(dataset.features)
    for key in [key for key, feature in keys.items() if feature["dtype"] == "video"]:
        first = round((row.get(f"videos/{key}/from_timestamp") or 0.0) * dataset.fps)
        videos[layout.camera_of(key)] = folder / _fill(info, "video_path", row, f"videos/{key}/", key), first
    closing = folder / info["closing_path"].format(episode_index=index) if "closing_path" in info else None
    for needed in [*(path for path, _ in videos.values()), *([closing] if closing else [])]:
        if not needed.is_file():
            raise DataError(f"{needed}: missing, though episode {index} is recorded; put it back")
    stills = {layout.camera_of(key): key for key, feature in keys.items() if feature["dtype"] == "image"}
    tasks = row.get("tasks") or [""]
    task = tasks if isinstance(tasks, str) else str(tasks[0])
    data = folder / _fill(info, "data_path", row, "data/")
    return Episode(index, 0, task, dataset.fps, data, videos, stills=stills, closing_path=closing)


def _fill(info: dict[str, Any], path: str, row: dict[str, Any], prefix: str, key: str = "") -> str:
    """One of info.json's patterns for an episode: v3.0 numbers chunk and file, v2.1 the episode."""
    if info["codebase_version"].startswith("v2."):
        index = row["episode_index"]
        chunk = index // (info.get("chunks_size") or layout.CHUNK_FILES)
        return str(info[path].format(episode_chunk=chunk, episode_index=index, video_key=key))
    return str(info[path].format(video_key=key, **layout.address(row, prefix)))


def _check_first(dataset: Dataset) -> None:
    """Compare what info.json says of the columns and pictures with the first episode's own."""
    first = dataset.episodes[0]
    found = set(layout.column_names(first.data))
    if "next.reward" not in found:
        dataset.notes.append("no column next.reward: only labels can say where success is")
    if "next.done" not in found:
        dataset.notes.append("no column next.done: the last row of an episode is taken for its end")
    declared = {name for name, feature in dataset.features.items() if feature["dtype"] != "video"}
    if strange := sorted(found - set(first.columns()) - set(first.stills.values())):
        dataset.notes.append(f"columns that are no whole table of numbers, left out: {', '.join(strange)}")
    if extra := sorted(found - declared - {"next.truncated"}):
        dataset.notes.append(f"columns that meta/info.json does not name: {', '.join(extra)}")
    if gone := sorted(declared - found - {"next.reward", "next.done"}):
        dataset.notes.append(f"columns that meta/info.json names are not there: {', '.join(gone)}")
    for camera, size in dataset.cameras.items():
        height, width = first.frame(camera, 0).shape[:2]
        if (height, width) != size:
            dataset.cameras[camera] = (height, width)
            dataset.notes.append(f"camera {camera}: {width}x{height} pixels, not {size[1]}x{size[0]} as info.json says")


def require_outside(folder: Path) -> None:
    """Raise DataError where a folder to be made lies inside a dataset, which would take it for a stray."""
    for around in folder.resolve().parents:
        if (around / "meta" / "info.json").exists():
            raise DataError(f"{folder}: lies inside the dataset {around}, which is never changed; name one outside")


def read_info(folder: Path) -> dict[str, Any]:
    """meta/info.json, checked for what reading needs. Raises DataError."""
    path = folder / "meta" / "info.json"
    if not folder.exists():
        raise DataError(f"{folder}: there is no such folder; name a dataset, or record one with record.py")
    info = read_json(path, DataError, f"; without it {folder} is not a dataset")
    version = str(info.get("codebase_version"))
    if not version.startswith(("v3.", "v2.")):
        raise DataError(f"{path}: codebase_version is {version!r}; only v2.1 and {layout.VERSION} can be read")
    for key in ("fps", "features", "data_path"):
        if key not in info:
            raise DataError(f"{path}: {key!r} is missing")
    if not (type(info["fps"]) in (int, float) and 0 < info["fps"] < 10_000):
        raise DataError(f"{path}: fps is {info['fps']!r}, must be a number of frames a second")
    if not isinstance(info["features"], dict):
        raise DataError(f"{path}: features must be an object, each value with a dtype and a shape")
    for name, feature in info["features"].items():
        if not isinstance(feature, dict) or not {"dtype", "shape"} <= set(feature):
            raise DataError(f"{path}: feature {name!r} must have a dtype and a shape")
    filmed = any(feature["dtype"] == "video" for feature in info["features"].values())
    for key in ["data_path"] + ["video_path"] * filmed:
        if not isinstance(info.get(key), str):
            raise DataError(f"{path}: {key} is {info.get(key)!r}, must be the pattern of the files' names")
    size = info.get("chunks_size") or layout.CHUNK_FILES
    if type(size) is not int or size < 0:
        raise DataError(f"{path}: chunks_size is {size!r}, must be a whole number of files")
    return info


def episode_rows(folder: Path, with_stats: bool = False) -> list[dict[str, Any]]:
    """The rows of a v3.0 dataset's meta/episodes, which name each episode's files; 0, 1, 2 ... without a gap.

    Raises DataError for a file that is damaged, and for an episode that is missing.
    """
    paths = sorted((folder / "meta" / "episodes").glob("chunk-*/*.parquet"))
    known = {} if with_stats else read_index(folder, paths)
    unknown = [path for path in paths if path not in known]
    rows = [*known.values(), *layout.read_parts(unknown, lambda name: with_stats or not name.startswith("stats/"))]
    rows.sort(key=lambda row: row["episode_index"])
    _require_whole([row["episode_index"] for row in rows], f"{folder}/meta/episodes")
    return rows


def _v21_rows(dataset: Dataset, info: dict[str, Any]) -> list[dict[str, Any]]:
    """What episodes.jsonl says, one row an episode, and a row for each data file that it does not know."""
    path = dataset.folder / "meta" / "episodes.jsonl"
    rows: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
        dataset.notes.append(f"{path}: not there; the data files say which episodes there are")
    except ValueError as error:
        raise DataError(f"{path}: not text: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if type(row["episode_index"]) is not int:
                raise ValueError
            rows[row["episode_index"]] = row
        except (ValueError, TypeError, KeyError):
            if line.strip():
                dataset.notes.append(f"{path}: line {number} is damaged; left out of account")
    name = re.escape(Path(info["data_path"]).name)
    pattern = re.compile(re.sub(r"\\{episode_index.*?\\}", r"(\\d+)", name))
    on_disk = (pattern.fullmatch(file.name) for file in (dataset.folder / "data").rglob("*.parquet"))
    for index in sorted(int(match[1]) for match in on_disk if match):
        if index not in rows:
            rows[index] = {"episode_index": index}
    _require_whole(sorted(rows), f"{dataset.folder}/data")
    return [rows[index] for index in sorted(rows)]


def _require_whole(indices: list[int], where: str) -> None:
    if indices != list(range(len(indices))):
        wrong = next(i for i, index in enumerate(indices) if index != i)
        raise DataError(f"{where}: episode {wrong} is missing or there twice; put its file back")

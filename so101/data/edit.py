"""New datasets out of recorded ones: episodes chosen, cut and put together. The sources are only read.

A new dataset is made in `.<name>.tmp`, beside its place, and takes its name when it is whole: a kill or a full disk
leaves nothing under that name. A video is a link to its source's file, or a copy on another disk; it is encoded anew
only where its codec, its times or the layout ask for it. The new dataset's info.json says where all of it came from.
"""

import functools
import hashlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import cv2  # noqa: F401  # isort: skip  before av: the other way round cv2's windows hang on Linux
import av  # isort: skip
import numpy as np

from so101.data import layout
from so101.data.dataset import Closing, Dataset, Episode, open_dataset, read_info, require_outside
from so101.data.labels import EpisodeLabel, Labels, labels_path, load_labels
from so101.data.layout21 import Writer21
from so101.data.lock import FolderLock
from so101.data.video import CODECS, Codec, VideoReader, VideoWriter
from so101.data.writer import DatasetWriter
from so101.errors import DataError, UserError
from so101.files import sync_folder
from so101.signals import signals_held

TIME_TOLERANCE = 5e-5  # s that a frame may be shown off its place; LeRobot refuses 1e-4

Version = Literal["v3.0", "v2.1"]
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """A dataset that episodes are taken from, and its labels where it has any."""

    dataset: Dataset
    labels: Labels | None
    labels_sha256: str | None  # of the file that they were read from

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.dataset.folder


@dataclass(frozen=True)
class Piece:
    """Rows [start, end) of a recorded episode: it has end - start rows, and one observation more."""

    source: Source
    episode: Episode
    start: int
    end: int

    @property
    def label(self) -> EpisodeLabel | None:
        """What is said of its observations; None where nothing is."""
        labels = self.source.labels
        label = labels.episodes.get(self.episode.index) if labels else None
        return None if label is None else cut_label(label, self.start, self.end + 1)


class Summary(NamedTuple):
    """What was made, and how many bytes of video came into it in which way."""

    folder: Path
    episodes: int
    rows: int
    linked: int
    copied: int
    encoded: int

    def __str__(self) -> str:
        ways = ((self.linked, "linked"), (self.copied, "copied"), (self.encoded, "encoded anew"))
        videos = ", ".join(f"{size / 1e6:.1f} MB {way}" for size, way in ways if size)
        return f"{self.folder}: {self.episodes} episodes, {self.rows} rows; videos: {videos or 'none'}"


def open_source(folder: Path | str, foreign: bool = False) -> Source:
    """Open a dataset to take episodes from; `foreign`: also one that another program made.

    Raises DataError where it, or its label file, cannot be used.
    """
    dataset = open_dataset(folder)
    if dataset.schema is None and not foreign:
        raise DataError(
            f"{folder}: another program made it, and it does not say what its numbers mean; make a dataset of it with "
            "`python -m so101.tools.edit convert` first"
        )
    sha256 = _labels_sha256(folder)
    labels = load_labels(folder, dataset.observations)
    if sha256 != _labels_sha256(folder):
        raise DataError(f"{labels_path(folder)}: was changed while it was read; end the labelling, and do it again")
    return Source(dataset, labels, sha256)


def _labels_sha256(folder: Path | str) -> str | None:
    path = labels_path(folder)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def cut_label(label: EpisodeLabel, first: int, end: int) -> EpisodeLabel:
    """The label of observations [first, end) of an episode, counted from the first of them."""

    def clip(frame: int) -> int:
        return min(max(frame, first), end) - first

    exclude = [frame - first for frame in label.exclude if first <= frame < end]
    if label.success_start is not None:
        if label.success_start < end:
            return EpisodeLabel(success_start=clip(label.success_start), exclude=exclude, skip=label.skip)
    elif label.ranges is not None:
        ranges: list[list[int | None]] = []
        for start, last in label.ranges:
            if clip(start or 0) < clip(end if last is None else last):
                ranges.append([clip(start or 0), None if last is None else clip(last)])
        if ranges:
            return EpisodeLabel(ranges=ranges, exclude=exclude, skip=label.skip)
    elif not label.all_fail:
        return label  # skipped, and nothing said
    return EpisodeLabel(all_fail=True, exclude=exclude, skip=label.skip)


def recorded(piece: Piece) -> tuple[Columns, Closing]:
    """A piece's rows, and the observation after the last of them.

    Where it ends before its episode did, that is the next row's, and the last row is truncated: it bootstraps.
    Raises DataError where the episode lacks a column or its closing observation.
    """
    episode, last = piece.episode, piece.episode.closing()
    if last is None:
        raise DataError(
            f"{piece.source.folder}: episode {episode.index} has no closing observation; "
            "`python -m so101.tools.edit convert` makes one of its last row"
        )
    columns = episode.columns()
    if gone := sorted(set(layout.COLUMNS) - set(columns)):
        raise DataError(f"{episode.data}: has no column {gone[0]}; `python -m so101.tools.edit convert` makes it")
    rows = {name: columns[name][piece.start : piece.end].copy() for name in layout.COLUMNS}
    if piece.end < episode.length:
        frames = {camera: episode.frame(camera, piece.end) for camera in piece.source.dataset.cameras}
        last = Closing(columns["observation.state"][piece.end], frames, float(columns["capture_time"][piece.end]))
        rows["next.truncated"][-1] = not rows["next.done"][-1]
    if piece.start:
        began = float(columns["capture_time"][piece.start])
        rows["capture_time"] -= began
        last = Closing(last.state, last.frames, last.capture_time - began)
    return rows, last


def derive(
    folder: Path | str,
    pieces: Sequence[Piece],
    made: Mapping[str, Any],
    *,
    version: Version = "v3.0",
    codec: Codec | None = None,
    fill_rewards: bool = False,
    read: Callable[[Piece], tuple[Columns, Closing]] = recorded,
    schema: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Summary:
    """Make a new dataset of pieces, in their order, with their labels beside it.

    `made`: what is to be kept of how it was made, JSON values. `codec`: null for the one that all videos have; another
    encodes anew. `fill_rewards`: next.reward says what the labels say, 1.0 on a row whose following observation is a
    success. `read` and `schema`: for sources of another schema, how they become this one. `progress` is told how many
    pieces are done. Raises DataError where the folder is there, a source is damaged, sources differ, or a label is
    missing; UserError where the disk fails. Nothing is left then.
    """
    folder = Path(folder)
    dataset = _agreed(pieces)
    schema = schema or dataset.schema
    assert schema is not None  # see open_source
    if fill_rewards:
        _require_labels(pieces)
    codec = codec or _common_codec(pieces)
    provenance = {**made, **_provenance(pieces)}
    with _made_aside(folder) as place:
        kind: dict[str, Any] = {"fps": dataset.fps, "cameras": dataset.cameras, "schema": schema}
        kind |= {"codec": codec, "provenance": provenance}
        writer = DatasetWriter(place, task="", **kind) if version == "v3.0" else Writer21(place, **kind)
        labels, rows, encoded = Labels(folder.name), 0, 0
        try:
            for index, piece in enumerate(pieces):
                columns, closing = read(piece)
                if fill_rewards:
                    columns["next.reward"] = _rewards(piece)
                videos, fresh = _videos(piece, codec, version, place.parent / f"{index:06d}")
                writer.copy_episode(columns, closing, videos, piece.episode.task)
                encoded += sum(path.stat().st_size for path in fresh)
                for path in fresh:
                    path.unlink()
                count = piece.end - piece.start
                if piece.label is not None:  # v2.1 has no closing observation to label
                    labels.set(index, piece.label if version == "v3.0" else cut_label(piece.label, 0, count))
                rows += count
                progress(index + 1)
        finally:
            writer.close()
        if any(piece.source.labels for piece in pieces):
            labels.save(labels_path(place))
        linked, rest = _weighed(place, pieces)
    return Summary(folder, len(pieces), rows, linked, rest - encoded, encoded)


@contextmanager
def _made_aside(folder: Path) -> Iterator[Path]:
    """Where to make `folder`: what is there at the end of the block takes its name, after the label file beside it."""
    require_new(folder)
    aside = folder.with_name(f".{folder.name}.tmp")
    aside.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(aside)
    place = aside / folder.name
    try:
        for left in aside.iterdir():  # of a run that was killed
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != ".lock":
                left.unlink()
        try:
            yield place
        except OSError as error:
            raise UserError(f"{folder}: {error}. Nothing of it was kept; make room on the disk, or mend it") from error
        except UserError as error:
            cause = error.__cause__  # a writer says what became of its episodes, which are none of them kept
            if isinstance(cause, UserError):
                raise cause from None
            if cause is not None and type(error) is UserError:
                raise UserError(
                    f"{folder}: {cause}. Nothing of it was kept; make room on the disk, or mend it"
                ) from error
            raise
        require_new(folder)
        with signals_held():
            if labels_path(place).exists():
                os.rename(labels_path(place), labels_path(folder))
            os.rename(place, folder)
            sync_folder(folder.parent)
    finally:
        lock.release()
        shutil.rmtree(aside, ignore_errors=True)


def require_new(folder: Path) -> None:
    """Raise DataError where there is something by this name, or labels of it, or it lies inside a dataset."""
    for path in (folder, labels_path(folder)):
        if os.path.lexists(path):
            raise DataError(f"{path}: is there already, and nothing is ever overwritten; name another folder")
    require_outside(folder)


def _agreed(pieces: Sequence[Piece]) -> Dataset:
    """The first source, as all others are. Raises DataError where one is not."""
    if not pieces:
        raise DataError("no episode is left of those chosen, so there is nothing to make a dataset of")
    sources = {id(piece.source): piece.source.dataset for piece in pieces}
    folders = [source.folder.resolve() for source in sources.values()]
    for source in sources.values():
        if folders.count(source.folder.resolve()) > 1:
            raise DataError(f"{source.folder}: is given twice; its episodes would be there twice")
    first, *others = sources.values()
    for other in others:
        for name, have, want in (
            ("fps", other.fps, first.fps),
            ("cameras", other.cameras, first.cameras),
            *((key, (other.schema or {}).get(key), value) for key, value in (first.schema or {}).items()),
        ):
            if have != want:
                raise DataError(f"{other.folder}: {name} is {have!r}, but {want!r} in {first.folder}; only alike join")
    return first


def _require_labels(pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        if piece.label is None or piece.label.skip:
            raise DataError(
                f"{piece.source.folder}: episode {piece.episode.index} has no label to fill next.reward from; "
                "label it with label.py, or leave it out with keep=labelled"
            )


def _rewards(piece: Piece) -> np.ndarray:
    """(end - start,) float32: 1.0 where the observation that follows a row is a success."""
    assert piece.label is not None  # see _require_labels
    return piece.label.success(piece.end - piece.start + 1)[1:].astype(np.float32)


def _common_codec(pieces: Sequence[Piece]) -> Codec:
    """The codec that every video of the pieces has. Raises DataError where they differ, or none of ours is it."""
    files = {path for piece in pieces for path, _ in piece.episode.videos.values()}
    found = {look_at(path).codec: path for path in sorted(files)}
    if len(found) > 1 or not set(found) <= set(CODECS):
        said = ", ".join(f"{name} ({path})" for name, path in sorted(found.items()))
        raise DataError(f"the videos are {said}; say codec={next(iter(CODECS))} to encode anew those that are not")
    return cast(Codec, next(iter(found), "h264"))


class Video(NamedTuple):
    """A video file's codec, and when each of its frames is shown, in s."""

    codec: str
    times: np.ndarray


@functools.lru_cache(maxsize=8)  # LeRobot puts many episodes into one file
def _look(path: Path, changed_ns: int) -> Video:
    with (
        VideoReader(path) as reader,
        av.open(str(path.absolute())) as container,
    ):  # the reader names a file that is damaged
        stream = container.streams.video[0]
        return Video(stream.codec_context.codec.canonical_name, reader.times * float(stream.time_base or 0))


def look_at(path: Path) -> Video:
    """What must be known of a video before it is linked. Raises DataError, naming it, where it is damaged."""
    return _look(path, path.stat().st_mtime_ns)


def _videos(
    piece: Piece, codec: Codec, version: Version, scratch: Path
) -> tuple[dict[str, tuple[Path, int]], list[Path]]:
    """For each camera a file and the piece's first frame in it, and those files that had to be made for it."""
    videos, made = {}, []
    for camera, size in piece.source.dataset.cameras.items():
        place = None if camera in piece.episode.stills else piece.episode.videos[camera]
        if place is not None and _fits(piece, *place, codec, version):
            videos[camera] = place[0], place[1] + piece.start
            continue
        path = scratch.with_name(f"{scratch.name}.{camera}.mp4")
        writer = VideoWriter(path, piece.episode.fps, *size, codec)
        try:
            for frame in islice(piece.episode.frames(camera), piece.start, piece.end):
                writer.add(frame)
            writer.close()
        except BaseException:
            writer.abort()
            raise
        videos[camera] = path, 0
        made.append(path)
    return videos, made


def _fits(piece: Piece, path: Path, first: int, codec: Codec, version: Version) -> bool:
    """Whether a video can be taken as it is: LeRobot finds a frame by its time, and v2.1 wants an episode alone.

    Raises DataError where it holds fewer frames than the piece has rows.
    """
    begin, end = first + piece.start, first + piece.end
    video = look_at(path)
    if len(video.times) < end:
        raise DataError(
            f"{path}: holds {len(video.times)} frames, {end} are needed for the rows of episode {piece.episode.index}; "
            "leave it out, or trim it to what there is"
        )
    places = np.arange(begin, end) / piece.episode.fps
    alone = version == "v3.0" or (begin, end) == (0, len(video.times))
    on_time = bool(np.abs(video.times[begin:end] - places).max() < TIME_TOLERANCE)
    return alone and on_time and video.codec == codec


def _provenance(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Where pieces come from: the hashes of their sources and label files, and which rows were taken."""
    sources: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if id(piece.source) not in sources:
            folder = piece.source.folder
            entry: dict[str, Any] = {
                "name": labels_path(folder).name.removesuffix(".labels.json"),
                "sha256": digest(folder),
                "labels_sha256": piece.source.labels_sha256,
                "episodes": [],
            }
            sources[id(piece.source)] = entry
            if "provenance" in (info := read_info(folder)):
                entry["provenance"] = info["provenance"]
        sources[id(piece.source)]["episodes"].append([piece.episode.index, piece.start, piece.end])
    version = None
    with suppress(importlib.metadata.PackageNotFoundError):  # run from a folder that was only unpacked
        version = importlib.metadata.version("so101")
    return {"so101_version": version, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "sources": list(sources.values())}


def digest(folder: Path) -> str:
    """SHA-256 of what a dataset holds but its videos: over a line `<sha256>  <path>` for each file, sorted by path.

    `sha256sum` prints such lines, so that it can be found again: `LC_ALL=C find closing data meta -type f | sort |
    xargs sha256sum | sha256sum` in the folder, without closing where there is none.
    """
    files = [path for top in ("closing", "data", "meta") for path in (folder / top).rglob("*") if path.is_file()]
    names = sorted((path.relative_to(folder).as_posix(), path) for path in files)
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _weighed(place: Path, pieces: Sequence[Piece]) -> tuple[int, int]:
    """Bytes of the new dataset's videos: those that are the sources' own files, and the others."""
    files = {path for piece in pieces for path, _ in piece.episode.videos.values()}
    known = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, files)}
    linked = rest = 0
    for stat in map(os.stat, (place / "videos").rglob("*.mp4")):
        if (stat.st_dev, stat.st_ino) in known:
            linked += stat.st_size
        else:
            rest += stat.st_size
    return linked, rest

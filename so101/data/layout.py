"""How a v3.0 dataset looks on disk: its paths, its columns, its tables as LeRobot reads them."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from so101.data.video import PIXEL_FORMAT, Codec, check_size
from so101.errors import DataError
from so101.schema import ACTION, STATE

VERSION = "v3.0"
CHUNK_FILES = 1000  # files in one chunk folder
IMAGES = "observation.images."
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
CLOSING_PATH = "closing/episode_{episode_index:06d}.npz"

# What a row holds, as stored: type, and the names of its entries where it is a vector.
COLUMNS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "observation.state": ("float32", STATE),
    "action": ("float32", ACTION),
    "next.reward": ("float32", None),
    "next.done": ("bool", None),
    "next.truncated": ("bool", None),
    "complementary_info.is_intervention": ("bool", None),
    "capture_time": ("float64", None),
}
PLACE = {
    "timestamp": "float32",
    **dict.fromkeys(["frame_index", "episode_index", "index", "task_index"], "int64"),
}


def new_info(
    fps: float, cameras: Mapping[str, tuple[int, int]], schema: dict[str, Any], codec: Codec
) -> dict[str, Any]:
    """info.json of an empty dataset; `cameras` are name -> (height, width).

    Raises DataError for a camera whose name or size cannot be used.
    """
    features = {name: _feature(dtype, len(names or "1"), names) for name, (dtype, names) in COLUMNS.items()}
    fps = int(fps) if fps == int(fps) else fps
    for camera, (height, width) in cameras.items():
        check_size(height, width, f"camera {camera}")
        if "/" in camera or not camera:
            raise DataError(f"camera name {camera!r}: must not be empty or contain '/'")
        video: dict[str, Any] = {"video.height": height, "video.width": width, "video.codec": codec}
        video |= {"video.pix_fmt": PIXEL_FORMAT, "video.is_depth_map": False, "video.fps": fps}
        video |= {"video.channels": 3, "has_audio": False}
        names = ["height", "width", "channels"]
        features[IMAGES + camera] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": names,
            "info": video,
        }
    features |= {name: _feature(dtype, 1, None) for name, dtype in PLACE.items()}
    return {
        "codebase_version": VERSION,
        "robot_type": "so101_follower",
        "total_episodes": 0,
        "total_frames": 0,
        "total_tasks": 0,
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": "0:0"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "closing_path": CLOSING_PATH,
        "features": features,
        "so101": schema,
    }


def _feature(dtype: str, size: int, names: tuple[str, ...] | None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [size], "names": list(names) if names else None}


def data_table(columns: dict[str, np.ndarray]) -> pa.Table:
    """The rows as LeRobot stores them, with its description ("Sequence", which every version of it reads)."""
    arrays, described = [], {}
    for name, values in columns.items():
        kind = {"dtype": str(values.dtype), "_type": "Value"}
        array = pa.array(values.ravel())
        if values.ndim == 2:
            width = values.shape[1]
            array = pa.FixedSizeListArray.from_arrays(array, type=pa.list_(pa.field("element", array.type), width))
            described[name] = {"feature": kind, "length": width, "_type": "Sequence"}
        else:
            described[name] = kind
        arrays.append(array)
    metadata = {"huggingface": json.dumps({"info": {"features": described}})}
    return pa.table(arrays, names=list(columns)).replace_schema_metadata(metadata)


def episode_table(row: dict[str, Any]) -> pa.Table:
    """One episode's 170 columns of one value.

    Their types are given: pyarrow's guess takes 0.1 ms a value (17 ms of a save, typed 0.6), and imports a module
    each time, in which it swallows a Ctrl-C.
    """
    return pa.table({name: [value] for name, value in row.items()}, pa.schema({k: _arrow_type(row[k]) for k in row}))


def _arrow_type(value: Any) -> pa.DataType:
    if isinstance(value, list):
        return pa.list_(_arrow_type(value[0]))
    return {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}[type(value)]


def tasks_parquet(tasks: list[str]) -> bytes:
    """task_index by task, as pandas would write it: LeRobot looks tasks up in the index of this table."""
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": stored, "metadata": None}
        for name, kind, stored in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    labels = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{**labels, "metadata": {"encoding": "UTF-8"}}],
        "columns": columns,
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def places(row: dict[str, Any]) -> list[str]:
    """The files of a saved episode, relative to the dataset."""
    index = row["episode_index"]
    videos = [name.split("/")[1] for name in row if name.startswith("videos/") and name.endswith("/file_index")]
    return [
        DATA_PATH.format(**address(row, "data/")),
        *(VIDEO_PATH.format(video_key=key, **address(row, f"videos/{key}/")) for key in videos),
        CLOSING_PATH.format(episode_index=index),
        EPISODES_PATH.format(**address(row, "meta/episodes/")),
    ]


def place_of(episode: int) -> dict[str, int]:
    """Chunk and file number of an episode that has its files to itself."""
    return {"chunk_index": episode // CHUNK_FILES, "file_index": episode % CHUNK_FILES}


def address(row: dict[str, Any], prefix: str) -> dict[str, int]:
    """Chunk and file number that a row of meta/episodes gives for its data or one of its videos."""
    found: dict[str, int] = {}
    for name in ("chunk_index", "file_index"):
        number = row.get(prefix + name)
        if type(number) is not int:
            raise DataError(f"meta/episodes: episode {row.get('episode_index')} has {number!r} for {prefix}{name}")
        found[name] = number
    return found


def pictures(features: dict[str, Any]) -> dict[str, Any]:
    """The features that are a camera's: videos, or stills in the rows."""
    return {key: feature for key, feature in features.items() if feature["dtype"] in ("video", "image")}


def camera_of(video_key: str) -> str:
    """A video feature's camera: observation.images.side -> side."""
    return video_key.removeprefix(IMAGES)


def image_size(feature: dict[str, Any]) -> tuple[int, int]:
    """Height and width; HIL-SERL recordings made elsewhere put the channels first.

    Raises DataError for a shape that is no picture's.
    """
    shape = feature["shape"]
    if len(shape) != 3 or 3 not in (shape[0], shape[2]):
        raise DataError(f"meta/info.json: a picture of shape {shape}, must be height, width, 3 or 3, height, width")
    height, width = shape[:2] if shape[2] == 3 else shape[1:]
    return height, width


def placed(columns: dict[str, np.ndarray], fps: float, episode: int, first: int, task: int) -> dict[str, np.ndarray]:
    """The columns, (T,) or (T, d), with those that follow from the episode's place in the dataset.

    `first` is the dataset's number of frames before it.
    """
    length = len(columns["action"])
    rows = np.arange(length, dtype=np.int64)
    return columns | {
        "timestamp": (rows / fps).astype(np.float32),
        "frame_index": rows,
        "episode_index": np.full(length, episode, np.int64),
        "index": first + rows,
        "task_index": np.full(length, task, np.int64),
    }


def write_parquet(path: Path, table: pa.Table, **how: bool) -> None:
    """Write a table with checksums: of single flipped bits 88 of 400 changed values without a word, so 8 do."""
    # A relative path with a colon were the address of a file system.
    pq.write_table(table, path.absolute(), compression="snappy", write_page_checksum=True, **how)


def _footer(path: Path) -> pq.FileMetaData:
    with _reading(path):
        return pq.read_metadata(path.absolute())


def column_names(path: Path) -> list[str]:
    """The columns of a parquet file. Raises DataError where it is missing or damaged."""
    return list(_footer(path).schema.to_arrow_schema().names)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file, or some of its columns. Raises DataError where it is missing or damaged, or has them not."""
    with _reading(path), pq.ParquetFile(path.absolute(), page_checksum_verification=True) as file:
        if gone := sorted(set(columns or ()) - set(file.schema_arrow.names)):
            raise DataError(f"{path}: has no column {gone[0]}")
        return file.read(columns)


def read_parts(paths: list[Path], wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    """The rows of many small files of like columns, those `wanted`; pyarrow reads them side by side.

    Raises DataError, naming the file, where one is missing or damaged.
    """
    if not paths:
        return []
    try:
        parts = pads.dataset([str(path.absolute()) for path in paths], format="parquet")
        rows: list[dict[str, Any]] = parts.to_table(columns=[n for n in parts.schema.names if wanted(n)]).to_pylist()
        return rows
    except (OSError, ValueError, pa.ArrowException) as error:
        for path in paths:
            read_parquet(path)  # finds the one, and names it
        raise DataError(f"{paths[0].parent}: not readable together: {error}") from error


def read_rows(path: Path, episode: int | None, without: Collection[str] = ()) -> pa.Table:
    """The rows of one episode, or of the whole file (None), `without` some columns.

    Raises DataError where the file is missing or damaged.
    """
    names = [name for name in column_names(path) if name not in without]
    if episode is None:
        return read_parquet(path, names)
    with _reading(path):
        wanted = [("episode_index", "==", episode)]
        return pq.read_table(path.absolute(), columns=names, filters=wanted, page_checksum_verification=True)


def episode_lengths(path: Path) -> dict[int, int]:
    """How many rows of each episode a data file holds: from its footer where that says it (0.1 ms), else counted.

    Raises DataError where the file is missing or damaged.
    """
    footer, lengths = _footer(path), Counter[int]()
    places = [place for place in range(footer.num_columns) if footer.schema.column(place).path == "episode_index"]
    for group in (footer.row_group(number) for number in range(footer.num_row_groups)):
        # Of this column only: in a damaged file another's may bring down the interpreter.
        known = group.column(places[0]).statistics if places else None
        if known is None or not known.has_min_max or known.min != known.max:
            return dict(Counter(read_parquet(path, ["episode_index"])["episode_index"].to_pylist()))
        lengths[known.min] += group.num_rows
    return dict(lengths)


def to_numpy(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """(T,) of scalars, or (T, d) of lists; a list of one is a scalar, as some recorders write rewards.

    Raises DataError where rows are empty, of different lengths, or no numbers.
    """
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(f"{where}: row {row} is empty")
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return _numbers(column.to_numpy(), where)
    widths = set(pc.list_value_length(column).to_pylist())
    if len(widths) != 1:
        raise DataError(f"{where}: rows of different lengths: {sorted(widths)}")
    inner = column.combine_chunks().flatten()
    if inner.null_count:
        raise DataError(f"{where}: has entries that are empty")
    try:
        rows = np.array(inner.to_pylist()) if pa.types.is_nested(inner.type) else inner.to_numpy(zero_copy_only=False)
    except ValueError as error:  # lists in lists, of different lengths
        raise DataError(f"{where}: {error}") from None
    rows = _numbers(rows, where).reshape(len(column), -1)
    return rows[:, 0] if rows.shape[1] == 1 else rows


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: missing, though an episode is recorded in it; put it back") from None
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: names that are no text
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _numbers(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype.kind not in "biuf":
        raise DataError(f"{where}: holds {values.dtype}, must hold numbers")
    return values

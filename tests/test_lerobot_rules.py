"""What LeRobot 0.4.4 (v3.0) and 0.3.3 (v2.1) need of a dataset, checked by a reader that knows nothing of our writer.

The rules are those of a table of changes made to good datasets, one at a time, and of what LeRobot then did: refuse, or
open and misread. Each change of it is made here too, and must be found.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_edit import HABITS, choice, old_recording, sources, write_video

from so101.data.dataset import open_dataset
from so101.schema import Preprocess
from so101.tools import edit

__all__ = ["sources"]  # a fixture

TOLERANCE = 1e-4  # s
PLACE = ["timestamp", "frame_index", "episode_index", "index", "task_index"]
ARROW = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}


def problems(folder: Path, version: str) -> list[str]:
    """What LeRobot would refuse, or misread without a word, one line each."""
    found: list[str] = []
    try:
        info = json.loads((folder / "meta/info.json").read_text())
        (problems_30 if version == "v3.0" else problems_21)(folder, info, found)
    except (OSError, ValueError, KeyError, IndexError, pa.ArrowException, av.error.FFmpegError) as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


def problems_30(folder: Path, info: dict[str, Any], found: list[str]) -> None:
    if not info["codebase_version"].startswith("v3."):
        found.append(f"codebase_version {info['codebase_version']}")
    tasks = pq.read_table(folder / "meta/tasks.parquet")
    if json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] != ["task"]:
        found.append("tasks.parquet: task is not its index")
    if tasks["task_index"].to_pylist() != list(range(info["total_tasks"])):
        found.append("tasks.parquet: task_index is not 0 .. total_tasks - 1")
    files = sorted((folder / "meta/episodes").glob("*/*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    if [row["episode_index"] for row in rows] != list(range(info["total_episodes"])):
        found.append(
            "meta/episodes: not episodes 0 .. total_episodes - 1, in this order"
        )  # they are looked up by place
    if info["splits"] != {"train": f"0:{info['total_episodes']}"}:
        found.append("splits")
    named = {folder / info["data_path"].format(**place(row, "data/")) for row in rows}
    data = sorted((folder / "data").glob("*/*.parquet"))
    if set(data) != named:  # all that is there is read
        found.append(f"data: has {len(data)} files, meta/episodes names {len(named)}")
    tables = [pq.read_table(file) for file in data]
    found += [line for table in tables for line in wrong_columns(table, info)]
    table = pa.concat_tables([table.select(PLACE) for table in tables])
    starts = np.cumsum([0, *(row["length"] for row in rows)])
    found += wrong_rows(table, info, [row["length"] for row in rows])
    for row, start, end in zip(rows, starts, starts[1:], strict=False):
        where = f"episode {row['episode_index']}"
        if (row["dataset_from_index"], row["dataset_to_index"]) != (start, end):
            found.append(f"{where}: dataset_from_index")
        if not set(row["tasks"]) <= set(tasks["task"].to_pylist()):
            found.append(f"{where}: task not in tasks.parquet")
        stats = {name: row[name] for name in row if name.startswith("stats/")}
        for key in video_keys(info):
            video = folder / info["video_path"].format(video_key=key, **place(row, f"videos/{key}/"))
            shown = table["timestamp"].to_numpy()[start:end] + row[f"videos/{key}/from_timestamp"]
            found += wrong_video(video, shown)
            if not abs(row[f"videos/{key}/to_timestamp"] - shown[-1] - 1 / info["fps"]) < TOLERANCE:
                found.append(f"{where}: to_timestamp")
            for kind in ("min", "max", "mean", "std", "q01", "q50", "q99"):
                if np.shape(stats[f"stats/{key}/{kind}"]) != (3, 1, 1):
                    found.append(f"{where}: stats of {key} are not (3, 1, 1)")
    stats = json.loads((folder / "meta/stats.json").read_text())
    found += wrong_stats(stats, info, info["total_frames"])


def problems_21(folder: Path, info: dict[str, Any], found: list[str]) -> None:
    if info["codebase_version"] != "v2.1":
        found.append(f"codebase_version {info['codebase_version']}")
    lines = {
        name: [json.loads(line) for line in (folder / f"meta/{name}.jsonl").read_text().splitlines()]
        for name in ("tasks", "episodes", "episodes_stats")
    }
    count = info["total_episodes"]
    for name in ("episodes", "episodes_stats"):
        if [line["episode_index"] for line in lines[name]] != list(range(count)):
            found.append(f"{name}.jsonl: not episodes 0 .. total_episodes - 1")
    if [line["task_index"] for line in lines["tasks"]] != list(range(info["total_tasks"])):
        found.append("tasks.jsonl: not tasks 0 .. total_tasks - 1")
    if info["total_videos"] != count * len(video_keys(info)) or info["total_chunks"] != -(
        -count // info["chunks_size"]
    ):
        found.append("total_videos or total_chunks")
    lengths = [line["length"] for line in lines["episodes"]]
    places = [{"episode_chunk": e // info["chunks_size"], "episode_index": e} for e in range(count)]
    data = [folder / info["data_path"].format(**at) for at in places]
    if sorted((folder / "data").rglob("*.parquet")) != data:
        found.append("data: not a file for each episode, or a stray one")
    if len(list(folder.rglob("*.mp4"))) != info["total_videos"]:
        found.append("videos: not total_videos files")
    tables = [pq.read_table(file) for file in sorted((folder / "data").rglob("*.parquet"))]
    for table in tables:
        found += wrong_columns(table, info)
        if b'"List"' in (table.schema.metadata or {}).get(b"huggingface", b""):
            found.append("huggingface metadata: List, which datasets 3.6 does not know")
    found += wrong_rows(pa.concat_tables([table.select(PLACE) for table in tables]), info, lengths)
    for at, table, stats in zip(places, tables, lines["episodes_stats"], strict=False):
        for key in video_keys(info):
            found += wrong_video(folder / info["video_path"].format(video_key=key, **at), table["timestamp"].to_numpy())
        found += wrong_stats(stats["stats"], info, table.num_rows)


def place(row: dict[str, Any], prefix: str) -> dict[str, int]:
    return {name: row[prefix + name] for name in ("chunk_index", "file_index")}


def video_keys(info: dict[str, Any]) -> list[str]:
    return [key for key, feature in info["features"].items() if feature["dtype"] == "video"]


def wrong_columns(table: pa.Table, info: dict[str, Any]) -> list[str]:
    """The file's columns and their types are the features of info.json, no more and no fewer."""
    features = {key: feature for key, feature in info["features"].items() if feature["dtype"] != "video"}
    found = [f"feature {key!r}: a / in its name" for key in info["features"] if "/" in key]
    if set(table.column_names) != set(features):
        return [
            *found,
            f"columns {sorted(set(table.column_names) ^ set(features))} are only in the file or in info.json",
        ]
    for key, feature in features.items():
        inner, (size,) = ARROW[feature["dtype"]], feature["shape"]
        wanted = inner if size == 1 else pa.list_(pa.field("element", inner), size)
        if table.schema.field(key).type != wanted:
            found.append(f"{key}: stored as {table.schema.field(key).type}, declared as {wanted}")
    return found


def wrong_rows(table: pa.Table, info: dict[str, Any], lengths: list[int]) -> list[str]:
    """Rows are numbered through, and times follow from their numbers, in float32, to less than 1e-4 s."""
    found = []
    total = info["total_frames"]
    if (table.num_rows, sum(lengths)) != (total, total):
        found.append(f"{table.num_rows} rows, {sum(lengths)} by the episodes' lengths, total_frames {total}")
    columns = {name: table[name].to_numpy() for name in PLACE}
    if columns["index"].tolist() != list(range(table.num_rows)):
        found.append("index is not 0 .. N - 1")
    wanted = [(e, i) for e, length in enumerate(lengths) for i in range(length)]
    if list(zip(columns["episode_index"].tolist(), columns["frame_index"].tolist(), strict=True)) != wanted:
        found.append("episode_index and frame_index do not run through the episodes")
    off = np.abs(columns["timestamp"].astype(float) - columns["frame_index"] / info["fps"])
    if off.max() >= TOLERANCE:
        found.append(f"timestamp is {off.max():.4f} s off frame_index / fps")
    steps, same = np.diff(columns["timestamp"]), np.diff(columns["episode_index"]) == 0
    if np.abs(steps[same] - 1 / info["fps"]).max() >= TOLERANCE:  # float32, past 1024 s at 30 fps
        found.append("timestamps of neighbours are not 1 / fps apart")
    if not set(columns["task_index"].tolist()) <= set(range(info["total_tasks"])):
        found.append("task_index without a task")
    return found


def wrong_video(path: Path, wanted: np.ndarray) -> list[str]:
    """For each of the times (T,) a frame is decoded that is shown within 1e-4 s of it."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shown = np.array([float(frame.pts * stream.time_base) for frame in container.decode(stream)])
    off = np.abs(wanted.astype(float)[:, None] - shown).min(axis=1).max()
    return [f"{path.name}: no frame within {off:.4f} s of a row's time"] if off >= TOLERANCE else []


def wrong_stats(stats: dict[str, Any], info: dict[str, Any], rows: int) -> list[str]:
    """A feature whose name has "image" in it must have statistics of shape (3, 1, 1); the others as many as entries."""
    found = []
    for key, feature in info["features"].items():
        if key not in stats:
            found.append(f"no stats of {key}")
            continue
        shape = (3, 1, 1) if "image" in key else tuple(feature["shape"])
        if any(np.shape(stats[key][kind]) != shape for kind in ("min", "max", "mean", "std")):
            found.append(f"stats of {key} are not {shape}")
        if "image" not in key and stats[key]["count"] != [rows]:
            found.append(f"stats of {key} count {stats[key]['count']}, not {rows} rows")
    return found


Sets = dict[str, Path]


@pytest.fixture(scope="module")
def sets(sources: Sets, tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """One dataset of each way in which they are made."""
    top = tmp_path_factory.mktemp("sets")
    demos, more = sources.values()
    edit.merge(choice(top / "merged", demos, more, episodes="demos:0 more:1"))
    edit.filter_(choice(top / "filtered", demos, keep="success", max_rows=6))
    edit.split(edit.Split(**vars(choice(top / "split", more)), into={"a": "0", "b": "1"}))
    edit.trim(edit.Trim(**vars(choice(top / "trimmed", demos, episodes="0-1")), rows={"0": "1:3", "1": "2:"}))
    edit.export(edit.Export(**vars(choice(top / "labelled", top / "trimmed", episodes="1"))))
    edit.export(edit.Export(**vars(choice(top / "v21", top / "trimmed", demos, episodes="0")), to="v2.1"))
    old = old_recording(top / "old", open_dataset(demos).episodes[:1], lambda states: states / 1000)
    habits = {**HABITS, "intervention": "none", "preprocess": Preprocess(crop=[0, 0, 32, 32])}
    edit.convert_(edit.Convert(new=str(top / "converted"), source=str(old), **habits))
    names = ("merged", "filtered", "split_a", "split_b", "trimmed", "labelled", "v21", "converted")
    return {"recorded": demos} | {name: top / name for name in names}


def test_lerobot_opens_what_is_recorded_and_what_is_made_of_it(sets: Sets) -> None:
    found = {name: problems(folder, "v2.1" if name == "v21" else "v3.0") for name, folder in sets.items()}
    assert found == dict.fromkeys(sets, [])


# The changes. Each takes a copy of a good dataset of 4 and 3 rows (v3.0) or 2 and 4 (v2.1).


def edit_info(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def put(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with one column replaced, of the same type unless `values` is an Arrow array."""
    if not isinstance(values, pa.Array):
        values = pa.array(values, table.schema.field(name).type)
    return table.set_column(table.column_names.index(name), pa.field(name, values.type), values)


def shifted_times(table: pa.Table) -> pa.Table:
    times = table["timestamp"].to_numpy().copy()
    times[1:] += np.float32(0.01)
    return put(table, "timestamp", times)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def encoded_anew(path: Path, without_last: int = 0, fps: float = 10) -> None:
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    path.unlink()
    write_video(path, pictures[: len(pictures) - without_last], fps)


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


DATA, MP4 = "data/*/*.parquet", "videos/**/*.mp4"
EPISODES = "meta/episodes/*/*.parquet"
Damage = tuple[Callable[[Path], Any], str]


def data(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda folder: edit_table(first(folder, DATA), change)


def info(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_info(folder, change)


def jsonl(name: str, change: Callable[[str], str]) -> Callable[[Path], Any]:
    def edit_it(folder: Path) -> None:
        path = folder / f"meta/{name}.jsonl"
        path.write_text(change(path.read_text()))

    return edit_it


def with_action(shape: int) -> Callable[[Path], None]:
    return info(lambda info: info["features"]["action"].update(shape=[shape]))


def metadata(table: pa.Table) -> pa.Table:
    said = table.schema.metadata[b"huggingface"].replace(b'"Sequence"', b'"List"')
    return table.replace_schema_metadata({"huggingface": said})


def from_timestamp(late: float) -> Callable[[Path], None]:
    key = "videos/observation.images.wrist/from_timestamp"
    return lambda folder: edit_table(first(folder, EPISODES), lambda table: put(table, key, [late]))


def image_stats_flat(text: str) -> str:
    lines = [json.loads(line) for line in text.splitlines()]
    lines[0]["stats"]["observation.images.wrist"]["mean"] = [0.5, 0.5, 0.5]
    return "".join(json.dumps(line) + "\n" for line in lines)


BOTH: dict[str, Damage] = {
    "total_frames +1": (info(lambda info: info.update(total_frames=info["total_frames"] + 1)), "total_frames"),
    "total_episodes +1": (info(lambda info: info.update(total_episodes=info["total_episodes"] + 1)), "total_episodes"),
    "action shape 3 in info, 4 in data": (with_action(3), "action: stored as"),
    "extra column in data": (
        data(lambda table: table.append_column("extra", pa.array([0.0] * table.num_rows))),
        "'extra'",
    ),
    "feature in info missing in data": (data(lambda table: table.drop_columns(["next.done"])), "'next.done'"),
    "reward stored list of 1": (
        data(lambda table: put(table, "next.reward", pa.array([[0.0]] * table.num_rows, pa.list_(pa.float32())))),
        "next.reward: stored as list",
    ),
    "timestamps +0.01 s from frame 1": (data(shifted_times), "0.0100 s off"),
    "index column starts at 7": (
        data(lambda table: put(table, "index", np.arange(7, 7 + table.num_rows))),
        "index is not 0",
    ),
    "last row of data missing": (data(lambda table: table.slice(0, table.num_rows - 1)), "rows, "),
    "data parquet truncated": (lambda folder: cut_off(first(folder, DATA)), "Arrow"),
    "data parquet missing": (lambda folder: first(folder, DATA).unlink(), "data: "),
    "stray parquet in data dir": (
        lambda folder: shutil.copy(first(folder, DATA), folder / "data/chunk-000/file-900.parquet"),
        "data: ",
    ),
    "mp4 missing": (lambda folder: first(folder, MP4).unlink(), "No such file"),
    "mp4 truncated": (lambda folder: cut_off(first(folder, MP4)), "IndexError|Invalid data"),
    "mp4 at 20 fps": (lambda folder: encoded_anew(first(folder, MP4), fps=20), "no frame within"),
    "codebase_version v2.0": (info(lambda info: info.update(codebase_version="v2.0")), "codebase_version"),
    "a / in a feature's name": (
        info(lambda info: info["features"].update({"a/b": {"dtype": "float32", "shape": [1]}})),
        "a / in its name",
    ),
}
V30: dict[str, Damage] = {
    "mp4 one frame short": (lambda folder: encoded_anew(first(folder, MP4), 1), "no frame within 0.1"),
    "codebase_version v2.1": (info(lambda info: info.update(codebase_version="v2.1")), "codebase_version"),
    "no tasks.parquet": (lambda folder: (folder / "meta/tasks.parquet").unlink(), "tasks.parquet"),
    "no meta/episodes": (lambda folder: shutil.rmtree(folder / "meta/episodes"), "meta/episodes: not"),
    "meta/episodes missing last row": (
        lambda folder: sorted(folder.glob(EPISODES))[-1].unlink(),
        "meta/episodes: not",
    ),
    "from_timestamp one frame late": (from_timestamp(0.1), "no frame within 0.1000"),
    "from_timestamp half a frame late": (from_timestamp(0.05), "no frame within 0.0500"),
    "task is no index": (
        lambda folder: edit_table(
            folder / "meta/tasks.parquet",
            lambda table: table.replace_schema_metadata({"pandas": json.dumps({"index_columns": []})}),
        ),
        "not its index",
    ),
}
V21: dict[str, Damage] = {
    "fps in info 10->20": (info(lambda info: info.update(fps=20)), "s off frame_index / fps"),
    "no chunks_size key": (info(lambda info: info.pop("chunks_size")), "chunks_size"),
    "'List' instead of 'Sequence' in metadata": (data(metadata), "List, which"),
    "mp4 one frame short": (lambda folder: encoded_anew(first(folder, MP4), 1), "no frame within 0.1"),
    "no episodes_stats.jsonl": (lambda folder: (folder / "meta/episodes_stats.jsonl").unlink(), "episodes_stats"),
    "no tasks.jsonl": (lambda folder: (folder / "meta/tasks.jsonl").unlink(), "tasks.jsonl"),
    "no episodes.jsonl": (lambda folder: (folder / "meta/episodes.jsonl").unlink(), "episodes.jsonl"),
    "episodes.jsonl last line torn": (jsonl("episodes", lambda text: text[:-9]), "JSONDecodeError"),
    "episodes.jsonl length +3": (
        jsonl("episodes", lambda text: text.replace('"length": 2', '"length": 5', 1)),
        "rows, ",
    ),
    "image statistics that are no (3, 1, 1)": (jsonl("episodes_stats", image_stats_flat), r"are not \(3, 1, 1\)"),
}
DAMAGES = [("v3.0", *damage) for damage in {**BOTH, **V30}.items()] + [
    ("v2.1", *damage) for damage in {**BOTH, **V21}.items()
]


@pytest.mark.parametrize(
    ("version", "name", "damage"), DAMAGES, ids=[f"{version} {name}" for version, name, _ in DAMAGES]
)
def test_each_damage_that_lerobot_refuses_or_misreads_is_found(
    sets: Sets, tmp_path: Path, version: str, name: str, damage: Damage
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(sets["merged" if version == "v3.0" else "v21"], folder)
    do, said = damage
    do(folder)
    found = problems(folder, version)
    assert any(re.search(said, line) for line in found), found


def test_the_datasets_are_of_the_lengths_the_damages_count_on(sets: Sets) -> None:
    assert [episode.length for episode in open_dataset(sets["merged"]).episodes] == [4, 3]
    assert [episode.length for episode in open_dataset(sets["v21"]).episodes] == [2, 4]

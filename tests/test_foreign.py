"""Datasets of other programs, whole and with all the damage that people's edits did to them (v2.1 and v3.0).

The sets are built here from the format's own description, not with this project's writer of datasets.
"""

import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from so101.data.dataset import open_dataset
from so101.data.video import VideoWriter
from so101.errors import DataError
from so101.images import preprocess
from so101.schema import Preprocess

KEY = "observation.images.front"
SIZE = (48, 64)
LENGTHS = (3, 5)
CODEC = {"video.fps": 10, "video.codec": "h264", "video.pix_fmt": "yuv420p"}


def state(episode: int, row: int) -> list[float]:
    return [episode + row / 10 + i / 100 for i in range(18)]


def shade(episode: int, row: int) -> int:
    return 20 + 40 * episode + 10 * row


def rows_of(episode: int, length: int) -> dict[str, pa.Array]:
    """An episode's columns as LeRobot 0.3.3 stores them: vectors of fixed size, scalars bare."""
    states = pa.array([value for row in range(length) for value in state(episode, row)], pa.float32())
    actions = pa.array([value for row in range(length) for value in (0.1 * row, -0.2, 0.3)], pa.float32())
    return {
        "observation.state": pa.FixedSizeListArray.from_arrays(states, 18),
        "action": pa.FixedSizeListArray.from_arrays(actions, 3),
        "next.reward": pa.array([float(row == length - 1) for row in range(length)], pa.float32()),
        "next.done": pa.array([row == length - 1 for row in range(length)]),
        "timestamp": pa.array([row / 10 for row in range(length)], pa.float32()),
        "frame_index": pa.array(range(length), pa.int64()),
        "episode_index": pa.array([episode] * length, pa.int64()),
        "index": pa.array(range(sum(LENGTHS[:episode]), sum(LENGTHS[:episode]) + length), pa.int64()),
        "task_index": pa.array([0] * length, pa.int64()),
    }


def video(path: Path, shades: list[int], size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = VideoWriter(path, 10, *size)
    for value in shades:
        writer.add(np.full((*size, 3), value, np.uint8))
    writer.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of 3 and 5 rows in v2.1, as the author's recorder left them: channels first, stats beside."""
    folder = tmp_path_factory.mktemp("v21") / "grasp"
    scalar = {"shape": [1], "names": None}
    info = {
        "codebase_version": "v2.1", "robot_type": None, "total_episodes": 2, "total_frames": 8, "total_tasks": 1,
        "total_videos": 2, "total_chunks": 1, "chunks_size": 1000, "fps": 10, "splits": {"train": "0:2"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "repo_id": "somebody/grasp",
        "features": {
            "observation.state": {"dtype": "float32", "shape": [18], "names": None},
            "action": {"dtype": "float32", "shape": [3], "names": ["delta_x_ee", "delta_y_ee", "delta_z_ee"]},
            "next.reward": {"dtype": "float32", **scalar},
            "next.done": {"dtype": "bool", **scalar},
            KEY: {"dtype": "video", "shape": [3, *SIZE], "names": ["channels", "height", "width"], "info": CODEC},
            "timestamp": {"dtype": "float32", **scalar},
            **{name: {"dtype": "int64", **scalar} for name in ("frame_index", "episode_index", "index", "task_index")},
        },
    }  # fmt: skip
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info, indent=4))
    (folder / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "grasp"}\n')
    (folder / "data/chunk-000").mkdir(parents=True)
    lines, stats = [], []
    for episode, length in enumerate(LENGTHS):
        pq.write_table(pa.table(rows_of(episode, length)), data_file(folder, episode))
        video(video_file(folder, episode), [shade(episode, row) for row in range(length)])
        lines.append(json.dumps({"episode_index": episode, "tasks": ["grasp"], "length": length}))
        stats.append(json.dumps({"episode_index": episode, "stats": {"action": {"min": [9], "max": [-9]}}}))  # stale
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "meta/episodes_stats.jsonl").write_text("\n".join(stats) + "\n")
    return folder


@pytest.fixture
def foreign(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "grasp"))


def data_file(folder: Path, episode: int) -> Path:
    return folder / f"data/chunk-000/episode_{episode:06d}.parquet"


def video_file(folder: Path, episode: int) -> Path:
    return folder / f"videos/chunk-000/{KEY}/episode_{episode:06d}.mp4"


def check(folder: Path, notes: list[str]) -> None:
    """All that is in it reads as it was made, what was repaired is told, and no byte has changed."""
    before = digest(folder)
    dataset = open_dataset(folder)
    assert dataset.notes == [note.format(folder=folder) for note in notes]
    assert dataset.schema is None and dataset.fps == 10
    assert [episode.length for episode in dataset.episodes] == list(LENGTHS)
    for index, episode in enumerate(dataset.episodes):
        columns = episode.columns()
        assert np.allclose(columns["observation.state"], [state(index, row) for row in range(episode.length)])
        assert np.allclose(columns["action"], [[0.1 * row, -0.2, 0.3] for row in range(episode.length)])
        last = np.arange(episode.length) == episode.length - 1
        if "next.reward" in columns:
            assert columns["next.reward"].dtype == np.float32 and np.array_equal(columns["next.reward"], last)
        assert columns["next.done"].dtype == bool and np.array_equal(columns["next.done"], last)
        wanted = [shade(index, row) for row in range(episode.length)]
        assert np.abs([frame.mean() for frame in episode.frames("front")] - np.array(wanted)).max() < 4
        assert [abs(episode.frame("front", row).mean() - wanted[row]) < 4 for row in (2, 0, 1)] == [True] * 3
        assert episode.closing() is None and episode.observations == episode.length
        with pytest.raises(DataError, match=f"no frame {episode.length}, the last is {episode.length - 1}"):
            episode.frame("front", episode.length)
    assert digest(folder) == before


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rewrite(folder: Path, change, episodes: tuple[int, ...] = (0, 1)) -> None:
    """Write data files anew, as a script of pandas or Python would."""
    for episode in episodes:
        columns = rows_of(episode, LENGTHS[episode])
        change(columns)
        pq.write_table(pa.table(columns), data_file(folder, episode))


def edit_info(folder: Path, change) -> None:
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def test_a_whole_v21_set_opens_as_it_is(original: Path) -> None:
    check(original, [])
    dataset = open_dataset(original)
    assert dataset.version == "v2.1" and dataset.cameras == {"front": SIZE}
    assert [episode.task for episode in dataset.episodes] == ["grasp", "grasp"]


def test_statistics_are_never_needed(foreign: Path) -> None:
    """The file whose absence made LeRobot fetch an older copy from the hub over the data (field record, row 25)."""
    (foreign / "meta/episodes_stats.jsonl").unlink()
    (foreign / "meta/tasks.jsonl").unlink()
    check(foreign, [])


@pytest.mark.parametrize(
    "store",
    [
        lambda values: pa.array(values, pa.float64()),  # rebuilt from Python's floats
        lambda values: pa.FixedSizeListArray.from_arrays(pa.array(values, pa.float32()), 1),
        lambda values: pa.array([[value] for value in values], pa.list_(pa.float64())),
        lambda values: pa.array([int(value) for value in values]),
    ],
    ids=["double", "fixed list of one", "free list of one", "whole numbers"],
)
def test_rewards_in_every_form(foreign: Path, store) -> None:
    rewrite(foreign, lambda columns: columns.update({"next.reward": store(columns["next.reward"].to_pylist())}))
    check(foreign, [])


def test_lists_of_free_length_and_a_done_in_a_list_are_what_pandas_leaves(foreign: Path) -> None:
    def through_pandas(columns):
        for name in ("observation.state", "action"):
            columns[name] = pa.array(columns[name].to_pylist(), pa.list_(pa.float64()))
        columns["next.done"] = pa.array([[done] for done in columns["next.done"].to_pylist()])
        columns["__index_level_0__"] = pa.array(range(len(columns["action"])))

    rewrite(foreign, through_pandas)
    check(foreign, ["columns that meta/info.json does not name: __index_level_0__"])


def test_missing_columns_are_told_and_the_end_is_the_last_row(foreign: Path) -> None:
    def without(columns):
        del columns["next.reward"], columns["next.done"], columns["task_index"]

    rewrite(foreign, without)
    check(
        foreign,
        [
            "no column next.reward: only labels can say where success is",
            "no column next.done: the last row of an episode is taken for its end",
            "columns that meta/info.json names are not there: task_index",
        ],
    )
    assert "next.reward" not in open_dataset(foreign).episodes[0].columns()


@pytest.mark.parametrize(
    "text, notes",
    [
        (None, ["{folder}/meta/episodes.jsonl: not there; the data files say which episodes there are"] + [""] * 2),
        ("{first}\n" + '{{"episode_index": 1, "tas', ["{folder}/meta/episodes.jsonl: line 2 is damaged"] + [""]),
        ("{first}\n", [""]),
        ("{first}\n{second}\n\n", []),
        ("{second}\n{first}\n", []),
    ],
    ids=["absent", "torn", "short", "blank line", "another order"],
)
def test_episodes_jsonl_is_not_what_decides(foreign: Path, text: str | None, notes: list[str]) -> None:
    path = foreign / "meta/episodes.jsonl"
    first, second = path.read_text().splitlines()
    if text is None:
        path.unlink()
    else:
        path.write_text(text.format(first=first, second=second))
    told = open_dataset(foreign).notes
    assert len(told) == len(notes)
    assert all(note.format(folder=foreign) in had for had, note in zip(told, notes, strict=True))
    check(foreign, told)


def test_rows_are_believed_and_not_the_counts(foreign: Path) -> None:
    path = foreign / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 5', '"length": 119'))
    edit_info(foreign, lambda info: info.update(total_episodes=26))
    check(
        foreign,
        ["episode 1: 5 rows, but the metadata says 119", "2 episodes, but meta/info.json says 26"],
    )


def test_an_episode_index_that_was_not_renumbered_is_told(foreign: Path) -> None:
    rewrite(foreign, lambda columns: columns.update(episode_index=pa.array([7] * 5)), episodes=(1,))
    check(foreign, [f"{data_file(foreign, 1)}: its column episode_index says [7]; taken for 1"])


def test_a_video_longer_than_its_rows_ends_with_them_and_a_shorter_is_refused(foreign: Path) -> None:
    video(video_file(foreign, 0), [shade(0, row) for row in range(9)])
    check(foreign, [])
    video(video_file(foreign, 1), [shade(1, row) for row in range(4)])
    episodes = open_dataset(foreign).episodes
    with pytest.raises(DataError, match=r"episode_000001\.mp4: episode 1 has 5 rows, but only 4 frames"):
        list(episodes[1].frames("front"))
    with pytest.raises(DataError, match=r"episode_000001\.mp4: there is no frame 4, it holds 4"):
        episodes[1].frame("front", 4)
    assert len(list(episodes[0].frames("front"))) == 3


def test_the_size_is_that_of_the_pictures(foreign: Path) -> None:
    """Recorded at 84x84 and described as something else: it can be looked at, and its size is told."""
    for episode, length in enumerate(LENGTHS):
        video(video_file(foreign, episode), [shade(episode, row) for row in range(length)], (84, 84))
    check(foreign, ["camera front: 84x84 pixels, not 64x48 as info.json says"])
    dataset = open_dataset(foreign)
    assert dataset.cameras == {"front": (84, 84)}
    with pytest.raises(DataError, match="84x84 is smaller than the network's 128x128"):
        preprocess(dataset.episodes[0].frame("front", 0), Preprocess(crop=None))


def test_a_set_cropped_when_recorded_opens_with_crop_null_only(foreign: Path) -> None:
    for episode, length in enumerate(LENGTHS):
        video(video_file(foreign, episode), [shade(episode, row) for row in range(length)], (128, 128))
    edit_info(foreign, lambda info: info["features"][KEY].update(shape=[128, 128, 3], names=None))
    check(foreign, [])
    frame = open_dataset(foreign).episodes[0].frame("front", 1)
    assert np.array_equal(preprocess(frame, Preprocess(crop=None)), frame)
    with pytest.raises(DataError, match="needs crop=null"):
        preprocess(frame, Preprocess())


def test_frames_kept_in_the_rows_as_pictures(foreign: Path) -> None:
    """LeRobot's datasets without videos: a struct of bytes and path in each row."""

    def picture(columns):
        episode, length = columns["episode_index"][0].as_py(), len(columns["action"])
        pngs = [cv2.imencode(".png", np.full((*SIZE, 3), shade(episode, row), np.uint8))[1] for row in range(length)]
        columns[KEY] = pa.array([{"bytes": png.tobytes(), "path": None} for png in pngs])

    rewrite(foreign, picture)
    edit_info(foreign, lambda info: info["features"][KEY].update(dtype="image"))
    shutil.rmtree(foreign / "videos")
    check(foreign, [])


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda f: data_file(f, 1).write_bytes(data_file(f, 1).read_bytes()[:-20]), r"000001\.parquet: not a readable"),
        (lambda f: data_file(f, 0).unlink(), r"000000\.parquet: missing, though an episode is recorded in it"),
        (lambda f: video_file(f, 1).unlink(), r"000001\.mp4: missing, though episode 1 is recorded"),
        (lambda f: video_file(f, 0).write_bytes(b"x" * 999), r"000000\.mp4: not a readable video"),
        (lambda f: (f / "meta/info.json").write_text('{"codebase'), r"info\.json: no usable JSON"),
        (lambda f: edit_info(f, lambda info: info.pop("features")), r"info\.json: 'features' is missing"),
        (lambda f: edit_info(f, lambda info: info.update(fps=0)), r"fps is 0, must be a number of frames"),
        (lambda f: edit_info(f, lambda info: info.update(fps=float("inf"))), r"fps is inf, must be"),
        (lambda f: edit_info(f, lambda info: info.update(features=None)), r"features must be an object"),
        (lambda f: edit_info(f, lambda info: info.update(data_path=None)), r"data_path is None, must be the pattern"),
        (lambda f: edit_info(f, lambda info: info.update(video_path=None)), r"video_path is None, must be the pattern"),
        (lambda f: edit_info(f, lambda info: info.update(chunks_size="x")), r"chunks_size is 'x', must be"),
        (
            lambda f: rewrite(f, lambda c: c.update({"action": pa.array(["left"] * len(c["index"]))})),
            r"action: holds object, must hold numbers",
        ),
        (lambda f: edit_info(f, lambda i: i["features"][KEY].update(shape=[48, 64])), r"a picture of shape \[48, 64\]"),
        (lambda f: rewrite(f, lambda columns: columns.pop("episode_index")), r"has no column episode_index"),
        (
            lambda f: rewrite(f, lambda c: c.update({"next.reward": pa.array([None] + [0.0] * (len(c["index"]) - 1))})),
            r"next\.reward: row 0 is empty",
        ),
        (
            lambda f: rewrite(f, lambda c: c.update(action=pa.array([[0.0], *c["action"].to_pylist()[1:]]))),
            r"action: rows of different lengths: \[1, 3\]",
        ),
    ],
    ids=[
        "torn data", "no data", "no video", "torn video", "torn info", "no features", "no rate", "endless rate",
        "null features", "null data_path", "null video_path", "odd chunks", "words for actions", "odd shape",
        "no episode_index", "empty reward", "uneven actions",
    ],
)  # fmt: skip
def test_what_cannot_be_repaired_is_refused_by_name(foreign: Path, damage, sentence: str) -> None:
    damage(foreign)
    before = digest(foreign)
    with pytest.raises(DataError, match=sentence):
        dataset = open_dataset(foreign)
        dataset.episodes[0].columns()
    assert digest(foreign) == before


def test_columns_of_any_width_of_list_and_strange_ones_beside_them(foreign: Path) -> None:
    def widen(columns):
        columns["observation.state"] = pa.array(columns["observation.state"].to_pylist(), pa.large_list(pa.float64()))
        columns["notes"] = pa.array(["ok"] * len(columns["action"]))
        columns["ragged"] = pa.array([[1.0], [], [1.0, 2.0], None, [3.0]][: len(columns["action"])])

    rewrite(foreign, widen)
    check(
        foreign,
        [
            "columns that are no whole table of numbers, left out: notes, ragged",
            "columns that meta/info.json does not name: notes, ragged",
        ],
    )


def test_stills_under_another_name_and_what_is_no_still(foreign: Path) -> None:
    png = cv2.imencode(".png", np.full((*SIZE, 3), 77, np.uint8))[1].tobytes()

    def rename(info):
        info["features"] = {name: f for name, f in info["features"].items() if name != KEY}
        info["features"]["observation.image"] = {"dtype": "image", "shape": [*SIZE, 3], "names": None}
        del info["video_path"]

    edit_info(foreign, rename)
    rewrite(foreign, lambda c: c.update({"observation.image": pa.array([{"bytes": png}] * len(c["action"]))}))
    episode = open_dataset(foreign).episodes[1]
    assert episode.cameras == ["observation.image"] and episode.frame("observation.image", 4).mean() == 77
    for strange in ([png], [{"bytes": b""}], [{"bytes": None}], [{"path": "x.png"}], [{"bytes": b"no picture"}]):
        rewrite(foreign, lambda c, s=strange: c.update({"observation.image": pa.array(s * len(c["action"]))}))
        with pytest.raises(DataError, match=r"observation\.image has a (row without a picture|picture that cannot)"):
            open_dataset(foreign)


def test_a_gap_in_the_numbers_is_refused(foreign: Path) -> None:
    data_file(foreign, 0).rename(data_file(foreign, 4))
    (foreign / "meta/episodes.jsonl").unlink()
    with pytest.raises(DataError, match="episode 0 is missing or there twice"):
        open_dataset(foreign)

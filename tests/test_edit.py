"""Derived datasets: what is taken is taken whole, what is left out is gone, and the sources stay as they are."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_dataset import file_size_limit

import record
from so101.data import edit as edit_module
from so101.data.convert import Habits, convert, require_said
from so101.data.dataset import Dataset, Episode, open_dataset
from so101.data.edit import Piece, cut_label, derive, open_source
from so101.data.labels import EpisodeLabel, Labels, labels_path
from so101.data.video import VideoWriter
from so101.data.writer import DatasetWriter
from so101.env import EnvConfig
from so101.errors import ConfigError, DataError, UserError
from so101.rig import RigConfig
from so101.robot.camera import CameraConfig
from so101.robot.kinematics import forward
from so101.schema import Preprocess, describe
from so101.sim.camera import CameraConfig as SimCameraConfig
from so101.tools import edit

ROOT = Path(__file__).parents[1]
SIZE = (32, 48)
CAMERAS = {"wrist": SIZE, "side": SIZE}
SCHEMA = describe(Preprocess(), list(CAMERAS), 10, 0.02, 0.5)
CROP = [0, 8, 48, 48]
LIFT, PUSH = "lift the cube", "push the cube"
LENGTHS = {"demos": [4, 7, 5], "more": [6, 3]}
LABELS = {
    "demos": {
        0: EpisodeLabel(success_start=2),
        1: EpisodeLabel(ranges=[[1, 3], [5, None]], exclude=[6]),
        2: EpisodeLabel(all_fail=True, skip=True),
    },
    "more": {0: EpisodeLabel(all_fail=True)},
}
posix = pytest.mark.skipif(os.name != "posix", reason="kills and limits processes as POSIX does")


def level(name: str, episode: int, index: int) -> int:
    """The grey of a test frame: different for neighbours, so a frame out of place shows."""
    return 30 + (len(name) * 11 + episode * 37 + index * 23) % 200


def frames(name: str, episode: int, index: int) -> dict[str, np.ndarray]:
    grey = level(name, episode, index)
    return {"wrist": np.full((*SIZE, 3), grey, np.uint8), "side": np.full((*SIZE, 3), 255 - grey, np.uint8)}


def make(folder: Path, lengths: list[int], task: str, **other: Any) -> Path:
    """A recording whose every number tells where it belongs."""
    made = {"fps": 10, "cameras": CAMERAS, "schema": SCHEMA, **other}
    writer = DatasetWriter(folder, task=task, **made)
    for e, length in enumerate(lengths):
        for i in range(length):
            kind = {"done": i == length - 1, "reward": float(i == 1), "is_intervention": i % 2 == 0}
            state = np.arange(18) / 7 + 100 * e + i
            picture = {camera: frames(folder.name, e, i)[camera] for camera in made["cameras"]}
            writer.add(state, np.array([i / 100, -0.5, e / 10, -1]), picture, capture_time=0.1 * i + 0.003, **kind)
        last = {camera: frames(folder.name, e, length)[camera] for camera in made["cameras"]}
        writer.save_episode(np.arange(18) / 7 + 100 * e + length, last, 0.1 * length + 0.004)
    writer.close()
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two recordings of another task each, with labels."""
    top = tmp_path_factory.mktemp("sources")
    folders = {"demos": make(top / "demos", LENGTHS["demos"], LIFT), "more": make(top / "more", LENGTHS["more"], PUSH)}
    for name, folder in folders.items():
        labels = Labels(name)
        labels.episodes = dict(LABELS[name])
        labels.save(labels_path(folder))
    return folders


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and digest of everything in a folder, and of its labels."""
    found = {}
    for path in [labels_path(folder), folder, *folder.rglob("*")]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (path.stat().st_mtime_ns, digest)
    return found


@pytest.fixture(autouse=True)
def untouched(sources: dict[str, Path]) -> Iterator[None]:
    """Whatever a test does with the sources, not a byte of them changes."""
    before = {name: tree(folder) for name, folder in sources.items()}
    yield
    assert {name: tree(folder) for name, folder in sources.items()} == before


def choice(new: Path, *folders: Path, **other: Any) -> edit.Choice:
    return edit.Choice(new=str(new), sources=[str(folder) for folder in folders], **other)


def labels_of(folder: Path) -> dict[int, EpisodeLabel]:
    return Labels.load(labels_path(folder)).episodes


def check_piece(found: Episode, wanted: Episode, start: int, end: int, cameras: list[str]) -> None:
    """Each row, frame and the closing observation is that of rows [start, end) of `wanted`; nothing was encoded."""
    have, want = found.columns(), wanted.columns()
    assert found.length == end - start and found.task == wanted.task
    for name in ("observation.state", "action", "next.reward", "next.done", "complementary_info.is_intervention"):
        assert np.array_equal(have[name], want[name][start:end]), name
    assert have["frame_index"].tolist() == list(range(end - start))
    assert np.array_equal(have["timestamp"], np.float32(np.arange(end - start) / 10))
    for camera in cameras:
        assert os.path.samefile(found.videos[camera][0], wanted.videos[camera][0])
        assert found.videos[camera][1] == wanted.videos[camera][1] + start
        assert np.array_equal(found.frame(camera, end - start), wanted.frame(camera, end))
    assert np.array_equal(list(found.frames(cameras[0])), list(wanted.frames(cameras[0]))[start:end])
    last, theirs = found.closing(), wanted.closing()
    assert last is not None and theirs is not None
    cut = end < wanted.length
    assert np.array_equal(last.state, want["observation.state"][end] if cut else theirs.state)


def test_a_merge_holds_the_chosen_episodes_of_each_source(sources: dict[str, Path], tmp_path: Path) -> None:
    config = choice(tmp_path / "new", sources["demos"], sources["more"], episodes="demos:0-1 more:0-", without="more:0")
    edit.merge(config)
    new, demos, more = (open_dataset(folder) for folder in (tmp_path / "new", *sources.values()))
    assert new.notes == [] and new.schema == SCHEMA and new.cameras == CAMERAS and new.fps == 10
    wanted = [demos.episodes[0], demos.episodes[1], more.episodes[1]]
    assert [episode.task for episode in new.episodes] == [LIFT, LIFT, PUSH]
    for found, source in zip(new.episodes, wanted, strict=True):
        check_piece(found, source, 0, source.length, list(CAMERAS))
        assert np.array_equal(found.columns()["capture_time"], source.columns()["capture_time"])
    index = np.concatenate([episode.columns()["index"] for episode in new.episodes])
    assert index.tolist() == list(range(4 + 7 + 3))
    assert new.episodes[2].columns()["task_index"].tolist() == [1, 1, 1]
    assert labels_of(tmp_path / "new") == {0: LABELS["demos"][0], 1: LABELS["demos"][1]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.labels.json"]


def test_provenance_names_sources_hashes_rows_and_command(sources: dict[str, Path], tmp_path: Path) -> None:
    edit.merge(choice(tmp_path / "one", sources["demos"], episodes="0,2"))
    edit.filter_(choice(tmp_path / "two", tmp_path / "one", without="0"))
    found = json.loads((tmp_path / "two/meta/info.json").read_text())["provenance"]
    assert found["command"] == "filter" and found["settings"]["without"] == "0" and found["so101_version"] == "0.1.0"
    assert found["date"].startswith("20")
    (one,) = found["sources"]
    assert one["name"] == "one" and one["episodes"] == [[1, 0, 5]]
    (demos,) = one["provenance"]["sources"]
    assert demos["episodes"] == [[0, 0, 4], [2, 0, 5]]
    labels = hashlib.sha256(labels_path(sources["demos"]).read_bytes()).hexdigest()
    assert demos["labels_sha256"] == labels
    if sys.platform == "linux":
        command = "LC_ALL=C find closing data meta -type f | sort | xargs sha256sum | sha256sum"
        printed = subprocess.run(command, shell=True, cwd=sources["demos"], capture_output=True, text=True, check=True)
        assert demos["sha256"] == printed.stdout.split()[0]


def chosen(sources: dict[str, Path], **other: Any) -> list[tuple[str, int]]:
    opened = [open_source(folder) for folder in sources.values()]
    pieces = edit.choose(choice(Path("new"), *sources.values(), **other), opened)
    return [(piece.source.folder.name, piece.episode.index) for piece in pieces]


def test_filters(sources: dict[str, Path], tmp_path: Path) -> None:
    every = [("demos", 0), ("demos", 1), ("demos", 2), ("more", 0), ("more", 1)]
    assert chosen(sources) == every
    assert chosen(sources, episodes="1-") == [every[1], every[2], every[4]]
    assert chosen(sources, episodes="0,1", without="demos:1 more:0") == [every[0], every[4]]
    assert chosen(sources, keep="success") == every[:2]
    assert chosen(sources, keep="failure") == [every[3]]
    assert chosen(sources, keep="labelled") == [every[0], every[1], every[3]]  # 2 is skipped, the last has no label
    assert chosen(sources, drop_skipped=True) == [every[0], every[1], every[3], every[4]]
    assert chosen(sources, min_rows=4, max_rows=6) == [every[0], every[2], every[3]]
    assert chosen(sources, task=PUSH) == every[3:]
    bare = make(tmp_path / "bare", [4], LIFT)  # no label file: its own next.reward, 1.0 in row 1
    assert chosen({"bare": bare}, keep="success") == [("bare", 0)] and chosen({"bare": bare}, keep="failure") == []
    for wrong, said in (
        ({"episodes": "3-1"}, "'3-1', demos has the episodes 0-2"),
        ({"episodes": "more:0-2"}, "'0-2', more has the episodes 0-1"),
        ({"episodes": "other:1"}, "'other', the sources are demos, more"),
        ({"without": "one"}, "without: got 'one', must be a number"),
        ({"without": "emos:1"}, "without: got 'emos', the sources are demos, more"),
        ({"max_rows": 2, "min_rows": 3}, "max_rows: got 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            chosen(sources, **wrong)
    with pytest.raises(DataError, match="no episode is left"):
        edit.filter_(choice(tmp_path / "new", sources["demos"], min_rows=100))
    assert list(tmp_path.iterdir()) == [bare]


def test_two_sources_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = {name: make(tmp_path / name / "demo", [1, 1], LIFT, cameras={"wrist": SIZE}) for name in ("a", "b")}
    with pytest.raises(ConfigError, match="without: got 'demo', which is each of .*a/demo, .*b/demo; say more of its"):
        chosen(folders, without="demo:1")
    opened = [open_source(folder) for folder in folders.values()]
    kept = edit.choose(choice(Path("new"), *folders.values(), without="b/demo:1"), opened)
    assert [(piece.source.folder, piece.episode.index) for piece in kept] == [
        (folders["a"], 0), (folders["a"], 1), (folders["b"], 0),
    ]  # fmt: skip


def test_the_labels_that_are_used_are_the_ones_whose_hash_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody labels on between the parts of a split."""
    demos, labels = make(tmp_path / "demos", [2], LIFT, cameras={"wrist": SIZE}), Labels("demos")
    labels.set(0, EpisodeLabel(success_start=1))
    labels.save(labels_path(demos))
    source, before = open_source(demos), hashlib.sha256(labels_path(demos).read_bytes()).hexdigest()
    labels.set(0, EpisodeLabel(all_fail=True))
    labels.save(labels_path(demos))
    derive(tmp_path / "new", [Piece(source, source.dataset.episodes[0], 0, 2)], {})
    kept = json.loads((tmp_path / "new/meta/info.json").read_text())["provenance"]["sources"][0]["labels_sha256"]
    assert kept == before and labels_of(tmp_path / "new") == {0: EpisodeLabel(success_start=1)}
    load = edit_module.load_labels

    def changed_meanwhile(*where: Any) -> Labels | None:
        labels_path(demos).write_text(labels_path(demos).read_text() + "\n")
        return load(*where)

    monkeypatch.setattr(edit_module, "load_labels", changed_meanwhile)
    with pytest.raises(DataError, match="demos.labels.json: was changed while it was read"):
        open_source(demos)


def test_a_split_parts_the_episodes(sources: dict[str, Path], tmp_path: Path) -> None:
    config = edit.Split(**vars(choice(tmp_path / "s", *sources.values())), into={"train": "0.8", "test": "0.2"}, seed=3)
    edit.split(config)
    parts = {name: open_dataset(tmp_path / f"s_{name}") for name in ("train", "test")}
    assert {name: len(part.episodes) for name, part in parts.items()} == {"train": 4, "test": 1}
    lengths = [episode.length for part in parts.values() for episode in part.episodes]
    assert sorted(lengths) == [3, 4, 5, 6, 7]  # each of the five, once
    opened = [open_source(folder) for folder in sources.values()]
    pieces = edit.choose(config, opened)

    def drawn(**other: Any) -> dict[str, list[int]]:
        parts = edit.share(edit.replace(config, **other), pieces)
        return {name: [pieces.index(piece) for piece in part] for name, part in parts.items()}

    assert drawn() == drawn() and len({str(drawn(seed=seed)) for seed in range(20)}) > 2
    lists = drawn(into={"a": "demos:0,2 more:1", "b": "demos:1"})
    assert lists == {"a": [0, 2, 4], "b": [1]}
    for into, said in (
        ({"a": "0-1", "b": "1"}, "episode 1 is in two parts"),
        ({"a": "0.9", "b": "0.2"}, "at most 1"),
        ({"a": "0.9", "b": "1"}, "all shares"),
        ({"a": "0.99", "b": "0.001"}, "into.b: gets none"),
        ({"a": "0.5.1", "b": "0.5"}, "a share is a number"),
        ({"a": "0.5"}, "two names"),
    ):
        with pytest.raises(ConfigError, match=said):
            drawn(into=into)
    with pytest.raises(DataError, match="s_test: is there already"):
        edit.split(edit.replace(config, into={"new": "0.8", "test": "0.2"}))
    assert not (tmp_path / "s_new").exists()


def test_a_trim_keeps_the_next_observation_as_the_closing_one(sources: dict[str, Path], tmp_path: Path) -> None:
    rows = {"0": "1:", "1": "2:6"}
    edit.trim(edit.Trim(**vars(choice(tmp_path / "cut", sources["demos"])), rows=rows))
    cut, demos = open_dataset(tmp_path / "cut"), open_dataset(sources["demos"])
    for found, source, (start, end) in zip(cut.episodes, demos.episodes, [(1, 4), (2, 6), (0, 5)], strict=True):
        check_piece(found, source, start, end, list(CAMERAS))
    columns, last = cut.episodes[1].columns(), cut.episodes[1].closing()
    assert last is not None and columns["next.truncated"].tolist() == [False, False, False, True]
    assert np.allclose(columns["capture_time"], [0, 0.1, 0.2, 0.3]) and abs(last.capture_time - 0.4) < 1e-9
    assert cut.episodes[0].columns()["next.truncated"].tolist() == [False] * 3  # its own end is kept
    assert labels_of(tmp_path / "cut") == {
        0: EpisodeLabel(success_start=1),
        1: EpisodeLabel(ranges=[[0, 1], [3, None]], exclude=[4]),  # of its 5 observations, 2 to 6 of the source
        2: LABELS["demos"][2],
    }
    edit.trim(edit.Trim(**vars(choice(tmp_path / "again", tmp_path / "cut")), rows={"1": "1:3"}))  # 3 and 4
    check_piece(open_dataset(tmp_path / "again").episodes[1], demos.episodes[1], 3, 5, list(CAMERAS))
    for wrong, said in (
        ({"1": "2:8"}, r"rows.1: got '2:8', must be START:END within its rows, 0:7"),
        ({"1": "3:3"}, "got '3:3'"),
        ({"1": "all"}, "got 'all'"),
        ({"9": "1:2"}, "no episode 9"),
        ({}, "at least once"),
    ):
        with pytest.raises(ConfigError, match=said):
            edit.trim(edit.Trim(**vars(choice(tmp_path / "no", sources["demos"])), rows=wrong))


def test_a_cut_label_says_the_same_of_each_frame() -> None:
    rng = np.random.default_rng(4)
    for _ in range(400):
        count = int(rng.integers(2, 12))
        marks = np.sort(rng.choice(count + 1, 4 if count > 3 else 2, replace=False)).tolist()
        ranges = [marks[i : i + 2] for i in range(0, len(marks), 2)]
        if rng.random() < 0.3:
            ranges[-1][1] = None
        exclude = rng.choice(count, int(rng.integers(0, 3)), replace=False).tolist()
        kinds = [{"success_start": int(rng.integers(count))}, {"ranges": ranges}, {"all_fail": True}]
        label = EpisodeLabel(**kinds[rng.integers(3)], exclude=exclude, skip=bool(rng.integers(2)))
        if ranges[-1][0] == count and label.ranges:
            continue  # a range that starts past the end is refused when it is read
        first, end = np.sort(rng.choice(count + 1, 2, replace=False)).tolist()
        cut = cut_label(label, first, end)
        assert cut.skip == label.skip
        assert np.array_equal(cut.success(end - first), label.success(count)[first:end]), (label, first, end)
    assert cut_label(EpisodeLabel(skip=True), 1, 3) == EpisodeLabel(skip=True)


def test_a_source_that_is_not_alike_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    others = {
        "fps is 5": {"fps": 5, "schema": {**SCHEMA, "fps": 5}},
        "cameras is .*'wrist': .32, 48..*, but .*side": {"cameras": {"wrist": SIZE}},
        r"action_scale_m is 0\.03, but 0\.02": {"schema": {**SCHEMA, "action_scale_m": 0.03}},
    }
    for number, (said, other) in enumerate(others.items()):
        folder = make(tmp_path / f"other{number}", [2], LIFT, **other)
        with pytest.raises(DataError, match=f"other{number}: {said}"):
            edit.merge(choice(tmp_path / "new", sources["demos"], folder))
    with pytest.raises(DataError, match="given twice"):
        edit.merge(choice(tmp_path / "new", sources["demos"], sources["demos"]))
    foreign = old_recording(tmp_path / "foreign", open_dataset(sources["demos"]).episodes[:1])
    with pytest.raises(DataError, match="foreign: another program made it.*edit convert"):
        edit.merge(choice(tmp_path / "new", foreign))
    for taken in (sources["demos"], tmp_path / "labels_only"):
        if taken.name == "labels_only":
            labels_path(taken).write_text("{}")
        with pytest.raises(DataError, match="is there already, and nothing is ever overwritten"):
            edit.merge(choice(taken, sources["more"]))
    with pytest.raises(DataError, match="data/sub: lies inside the dataset .*demos, which is never changed"):
        edit.merge(choice(sources["demos"] / "data/sub", sources["more"]))  # a resume would set it aside as a stray
    assert not (tmp_path / "new").exists()


def test_videos_of_another_codec_or_off_their_times_are_encoded_anew(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = make(tmp_path / "mixed", [3, 4], LIFT, codec="mpeg4")
    with pytest.raises(DataError, match=r"the videos are h264 .*, mpeg4 .*; say codec=h264 to encode anew"):
        edit.merge(choice(tmp_path / "new", sources["demos"], mixed))
    slow = mixed / "videos/observation.images.side/chunk-000/file-000.mp4"
    slow.unlink()
    write_video(slow, [frames("mixed", 0, i)["side"] for i in range(3)], fps=8)  # of the right codec, at other times
    edit.merge(choice(tmp_path / "new", sources["more"], mixed, codec="h264"))
    printed = capsys.readouterr().out
    new = open_dataset(tmp_path / "new")
    assert os.path.samefile(
        new.episodes[0].videos["side"][0], open_dataset(sources["more"]).episodes[0].videos["side"][0]
    )
    assert not os.path.samefile(new.episodes[2].videos["side"][0], slow)
    for camera, (e, length) in itertools.product(CAMERAS, [(0, 3), (1, 4)]):
        seen = [frame.mean() for frame in new.episodes[2 + e].frames(camera)]
        assert np.abs(np.subtract(seen, [frames("mixed", e, i)[camera].mean() for i in range(length)])).max() < 4
    assert "MB linked" in printed and "encoded anew" in printed
    assert "new: 3 episodes have no label" in printed  # more's second, and those of mixed
    short = make(tmp_path / "short", [4], LIFT)
    video = short / "videos/observation.images.side/chunk-000/file-000.mp4"
    video.unlink()
    write_video(video, [frames("short", 0, i)["side"] for i in range(3)])
    with pytest.raises(DataError, match=r"file-000.mp4: holds 3 frames, 4 are needed"):
        edit.merge(choice(tmp_path / "whole", short))


def test_on_another_disk_videos_are_copied(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_disk(path: Path, place: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    edit.merge(choice(tmp_path / "new", sources["more"]))
    assert "MB copied" in capsys.readouterr().out
    for found, wanted in zip(
        open_dataset(tmp_path / "new").episodes, open_dataset(sources["more"]).episodes, strict=True
    ):
        for camera in CAMERAS:
            path = found.videos[camera][0]
            assert path.stat().st_nlink == 1 and path.read_bytes() == wanted.videos[camera][0].read_bytes()


@posix
@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_video_that_is_a_link_is_taken_itself(tmp_path: Path, version: str) -> None:
    """Hugging Face's cache: a dataset of relative links into a store, which may be emptied."""
    demos, store = make(tmp_path / "demos", [2], LIFT, cameras={"wrist": SIZE}), tmp_path / "store"
    store.mkdir()
    for number, video in enumerate(sorted((demos / "videos").rglob("*.mp4"))):
        video.rename(store / f"{number}")
        video.symlink_to(os.path.relpath(store / f"{number}", video.parent))
    edit.export(edit.Export(**vars(choice(tmp_path / "new", demos)), to=version, labels=False))  # type: ignore[arg-type]
    shutil.rmtree(store)
    assert len(list(open_dataset(tmp_path / "new").episodes[0].frames("wrist"))) == 2


@posix
@pytest.mark.parametrize(("size", "version"), [(2_000, "v3.0"), (20_000, "v3.0"), (3_000, "v2.1"), (1_000, "v2.1")])
def test_a_full_disk_is_told_and_nothing_is_left(
    sources: dict[str, Path], tmp_path: Path, size: int, version: str
) -> None:
    """It fills up in the first data file, in an episodes file, in what is written last."""
    source = open_source(sources["demos"])
    pieces = [Piece(source, episode, 0, episode.length) for episode in source.dataset.episodes]
    with file_size_limit(size), pytest.raises(UserError, match="new: .*File too large.*Nothing of it was kept"):
        derive(tmp_path / "new", pieces, {}, version=version)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_and_a_damaged_source_leave_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    source = open_source(sources["demos"])
    pieces = [Piece(source, episode, 0, episode.length) for episode in source.dataset.episodes]

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        derive(tmp_path / "new", pieces, {}, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    torn = make(tmp_path / "torn", [2, 3], LIFT)
    video = torn / "videos/observation.images.side/chunk-000/file-001.mp4"
    video.write_bytes(video.read_bytes()[:600])
    with pytest.raises(DataError, match=video.name):
        edit.merge(choice(tmp_path / "new", torn))
    content = (torn / "videos/observation.images.wrist/chunk-000/file-001.mp4").read_bytes()
    frames_from = content.index(b"mdat") + 4
    video.write_bytes(content[:frames_from] + b"\xff" * 100 + content[frames_from + 100 :])  # its index is whole
    with pytest.raises(DataError, match=f"{video.name}: not a readable video") as told:
        edit.merge(choice(tmp_path / "new", torn))
    assert "make room" not in str(told.value)
    video.write_bytes(content)
    data = torn / "data/chunk-000/file-001.parquet"
    data.write_bytes(data.read_bytes()[:-20])
    with pytest.raises(DataError, match=data.name):
        edit.merge(choice(tmp_path / "new", torn))
    assert list(tmp_path.iterdir()) == [torn]


@posix
def test_a_kill_leaves_nothing_under_the_name_and_the_next_run_makes_it(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    killed = (
        "import os, signal, sys; from so101.data.edit import Piece, derive, open_source; s = open_source(sys.argv[1]);"
        "derive(sys.argv[2], [Piece(s, e, 0, e.length) for e in s.dataset.episodes], {},"
        " progress=lambda done: done < 2 or os.kill(os.getpid(), signal.SIGKILL))"
    )
    command = [sys.executable, "-c", killed, str(sources["demos"]), str(tmp_path / "new")]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".new.tmp"]
    source = open_source(sources["demos"])
    pieces = [Piece(source, episode, 0, episode.length) for episode in source.dataset.episodes]

    def meanwhile(done: int) -> None:  # a second run of the same, at the same time
        with pytest.raises(DataError, match=f'"pid": {os.getpid()}'):
            derive(tmp_path / "new", pieces, {})

    derive(tmp_path / "new", pieces, {}, progress=meanwhile)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.labels.json"]
    assert [episode.length for episode in open_dataset(tmp_path / "new").episodes] == LENGTHS["demos"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command line, in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["edit.py", *words])
    with pytest.raises(SystemExit) as ended:
        edit.start()
    return int(ended.value.code or 0)


def test_the_command_line(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "filter",
        str(tmp_path / "new"),
        str(sources["demos"]),
        str(sources["more"]),
        "episodes=0",
        "--keep=success",
    ]
    assert run(monkeypatch, *words) == 0
    assert "new: 1 episodes, 4 rows; videos: 0.0 MB linked" in capsys.readouterr().out
    assert run(monkeypatch, *words) == 4
    assert "is there already" in capsys.readouterr().err
    assert run(monkeypatch, "trim", str(tmp_path / "cut"), str(sources["demos"]), "rows.0=1:3", "episodes=0") == 0
    assert [episode.length for episode in open_dataset(tmp_path / "cut").episodes] == [2]
    assert run(monkeypatch, "join") == 2 and run(monkeypatch, "merge", str(tmp_path / "none")) == 2
    assert "must begin with one of merge, filter, split, trim, export, convert" in capsys.readouterr().err
    assert run(monkeypatch, "--help") == 0 and run(monkeypatch, "split", "--help") == 0
    assert "into.train=0.8" in capsys.readouterr().out


# Old recordings: written by hand below, as the original project's recorder and others wrote them, and converted.


def write_video(path: Path, pictures: list[np.ndarray], fps: float = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = VideoWriter(path, fps, *pictures[0].shape[:2])
    for picture in pictures:
        writer.add(picture)
    writer.close()


def old_recording(
    folder: Path,
    episodes: list[Episode],
    state: Any = lambda states: states,
    action: Any = lambda actions: actions,
    after: bool = False,
    by_human: bool = False,
) -> Path:
    """The same episodes as v2.1, in another's habits: `state` (n, 18) and `action` (n, 4) turn ours into theirs.

    `after`: row t holds what was seen after action t. The videos are ours, but for `after`, whose are encoded anew.
    """
    lines = []
    for index, episode in enumerate(episodes):
        columns, last = episode.columns(), episode.closing()
        assert last is not None
        states = np.vstack([columns["observation.state"], last.state])
        rows = state(states.astype(np.float64))[after : len(states) - 1 + after].astype(np.float32)
        table = {
            "observation.state": [list(row) for row in rows],
            "action": [list(row) for row in action(columns["action"].astype(np.float64)).astype(np.float32)],
            "next.reward": [[float(value)] for value in columns["next.reward"]],
            "next.done": [i == len(rows) - 1 for i in range(len(rows))],
            "frame_index": list(range(len(rows))),
            "episode_index": [index] * len(rows),
            "complementary_info.discrete_penalty": [0.0] * len(rows),
        }
        if by_human:
            table["complementary_info.is_intervention"] = columns["complementary_info.is_intervention"].tolist()
        (folder / "data/chunk-000").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), folder / f"data/chunk-000/episode_{index:06d}.parquet")
        for camera, (source, _) in episode.videos.items():
            place = folder / f"videos/chunk-000/observation.images.{camera}/episode_{index:06d}.mp4"
            place.parent.mkdir(parents=True, exist_ok=True)
            if after:
                write_video(place, [episode.frame(camera, i) for i in range(1, len(states))])
            else:
                place.write_bytes(source.read_bytes())
        lines.append(json.dumps({"episode_index": index, "tasks": [episode.task], "length": len(rows)}))
    height, width, _ = episodes[0].frame(next(iter(episodes[0].videos)), 0).shape
    vector = {"dtype": "float32", "names": None}
    info = {
        "codebase_version": "v2.1", "robot_type": None, "fps": 10, "chunks_size": 1000, "total_episodes": len(episodes),
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.state": {**vector, "shape": [rows.shape[1]]},
            "action": {**vector, "shape": [len(table["action"][0])]},
            "next.reward": {**vector, "shape": [1]},
            **{
                f"observation.images.{camera}": {"dtype": "video", "shape": [3, height, width], "names": None}
                for camera in episodes[0].videos
            },
        },
    }  # fmt: skip
    (folder / "meta").mkdir()
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A real demonstration in the simulation, a second of the default task."""
    folder = tmp_path_factory.mktemp("simulated") / "demos"
    cameras = {"wrist": CameraConfig(source="sim", width=64, height=48)}
    rig = RigConfig(cameras=cameras, sim_camera=SimCameraConfig(width=64, height=48))
    timing = EnvConfig(control_time_s=1.2, reset_time_s=0.1)
    record.main(
        record.Config(dataset=str(folder), episodes=1, failures=0, rig=rig, env=timing, preprocess=Preprocess(CROP, 32))
    )
    return open_dataset(folder)


def gripperframe(states: np.ndarray) -> np.ndarray:
    """The tool's angles (n, 3) as MuJoCo's site gripperframe has them: quaternion (0.7071, 0, 0.7071, 0)."""
    w, x, y, z = np.array([1, 0, 1, 0]) / 2**0.5
    site = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    angles = []
    for state in states:
        axes = forward(state[:5], "gripper_link")[1] @ site
        pitch = np.arcsin(np.clip(-axes[2, 0], -1, 1))
        angles.append([np.arctan2(axes[2, 1], axes[2, 2]), pitch, np.arctan2(axes[1, 0], axes[0, 0])])
    return np.array(angles)


def authors_state(states: np.ndarray) -> np.ndarray:
    """Radians, the gripper's 0-100 turned into radians too, velocities of both, the tool in gripperframe."""
    there = states.copy()
    there[:, 5] = np.deg2rad(100 * states[:, 5])
    there[1:, 6:12] = np.diff(there[:, :6], axis=0) * 10
    there[:, 15:] = gripperframe(states)
    return there


def in_degrees(states: np.ndarray) -> np.ndarray:
    there = states[:, :12].copy()
    there[:, :5] = np.rad2deg(states[:, :5])
    there[:, 5] *= 100
    return there


HABITS = {
    "rows": "before", "reward": "next", "ends": "timeout", "gripper_action": "-1..1", "gripper_position": "0..1",
    "joints": "rad", "velocities": "kept", "tool_pose": "kept", "intervention": "given", "action_scale": 0.02,
    "gripper_step": 0.5,
}  # fmt: skip
AS_AUTHOR = {
    "rows": "after", "gripper_action": "0,1,2", "gripper_position": "0..1.7453", "velocities": "recomputed",
    "tool_pose": "gripperframe", "intervention": "all", "ends": "terminal",
}  # fmt: skip
DEGREES = {"gripper_action": "0..2", "gripper_position": "0..100", "joints": "deg", "velocities": "recomputed"}
LEAST = {"gripper_action": "none", "velocities": "recomputed", "tool_pose": "recomputed", "intervention": "none"}


@pytest.mark.parametrize("kind", ["ours", "author", "degrees", "least"])
def test_old_recordings_become_what_was_recorded(
    simulated: Dataset, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording of ours, written in each old habit, and back."""
    steps = np.array([0, 1, 2])
    written: dict[str, Any] = {
        "ours": {"by_human": True},
        "author": {
            "state": authors_state,
            "action": lambda a: np.column_stack([a[:, :3], steps[1 + np.sign(np.round(a[:, 3])).astype(int)]]),
            "after": True,
        },
        "degrees": {"state": in_degrees, "action": lambda a: a + [0, 0, 0, 1]},
        "least": {"state": lambda s: s[:, :6], "action": lambda a: a[:, :3]},
    }[kind]
    other = {"ours": {}, "author": AS_AUTHOR, "degrees": {**DEGREES, **LEAST, "gripper_action": "0..2"}, "least": LEAST}
    old = old_recording(tmp_path / "old", simulated.episodes, **written)
    labels = Labels("old")
    labels.set(0, EpisodeLabel(success_start=3))
    labels.save(labels_path(old))
    said = [f"preprocess.crop={CROP}", "preprocess.image_size=32"]
    said += [f"{name}={value}" for name, value in {**HABITS, **other[kind]}.items()]
    assert run(monkeypatch, "convert", str(tmp_path / "new"), str(old), *said) == 0

    new = open_dataset(tmp_path / "new")
    assert new.schema == simulated.schema and labels_of(tmp_path / "new") == labels.episodes and new.notes == []
    (found,), (wanted,) = new.episodes, simulated.episodes
    columns, theirs, last, closing = found.columns(), wanted.columns(), found.closing(), wanted.closing()
    assert last is not None and closing is not None and found.length == wanted.length - 1
    first = int(kind == "author")  # its recorder never saved the first observation
    states = np.vstack([theirs["observation.state"], closing.state])[first : first + wanted.length]
    rows = slice(first, first + found.length)
    kept = np.vstack([columns["observation.state"], last.state])
    if kind == "least" or "velocities" in other[kind]:  # zero at the start, and over the nominal tenth of a second
        assert np.abs(kept[0, 6:12]).max() == 0
        kept, states = kept[1:], states[1:]
    assert np.abs(kept - states).max() < (1e-5 if kind != "ours" else 1e-9)
    action = theirs["action"][rows].copy()
    if kind == "author":
        action[:, 3] = np.sign(np.round(action[:, 3]))
    if kind == "least":
        action[:, 3] = 0
    assert np.abs(columns["action"] - action).max() < 1e-6
    assert np.array_equal(columns["next.reward"], theirs["next.reward"][rows])
    ended = columns["next.done" if kind == "author" else "next.truncated"]
    assert ended.tolist() == [False] * (found.length - 1) + [True]
    assert not columns["next.truncated" if kind == "author" else "next.done"].any()
    human = columns["complementary_info.is_intervention"]
    assert human.all() if kind in ("ours", "author") else not human.any()
    (video,) = (old / "videos").rglob("*.mp4")
    camera = next(iter(new.cameras))
    assert found.videos[camera][0].read_bytes() == video.read_bytes()
    off = found.frame(camera, found.length).astype(int) - wanted.frame(camera, wanted.length - 1 + first)
    assert np.abs(off).mean() < (6 if first else 1e-9)  # the author's closing frame had been encoded


def test_a_habit_that_is_not_said_is_asked_for_with_what_the_data_shows(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    episodes = open_dataset(sources["demos"]).episodes[:1]

    def state(states: np.ndarray) -> np.ndarray:
        return np.column_stack([np.deg2rad(states[:, :5]), np.linspace(0.1, 0.87, len(states))])

    def action(actions: np.ndarray) -> np.ndarray:
        return np.column_stack([actions[:, :3], np.arange(len(actions)) % 3])

    old = old_recording(tmp_path / "old", episodes, state, action)
    with pytest.raises(ConfigError) as asked:
        edit.convert_(edit.Convert(new=str(tmp_path / "new"), source=str(old)))
    lines = str(asked.value).splitlines()
    assert lines[0] == f"{old}: say how it was recorded, none of it is guessed (--help explains each):"
    assert lines[1:] == [
        "  rows= before | after",
        "  reward= frame | next | none; 1 of 1 episodes have the column next.reward",
        "  ends= terminal | timeout",
        "  gripper_action= -1..1 | 0..2 | 0,1,2 | none; action[3] takes the values 0, 1, 2",
        "  gripper_position= 0..1 | 0..100 | 0..1.7453; "
        "observation.state[5] takes the values 0.1, 0.2925, 0.485, 0.6775",
        "  joints= rad | deg; they range from 0 to 0.06233",
        "  velocities= kept | recomputed; observation.state has 6 entries",
        "  tool_pose= kept | gripperframe | recomputed; observation.state has 6 entries",
        "  intervention= given | all | none; 0 of 1 episodes have the column complementary_info.is_intervention",
        "  action_scale= a number",
        "  gripper_step= a number",
    ]
    right = {**HABITS, **LEAST, "gripper_action": "0,1,2"}
    for name, wrong, shows in (
        ("gripper_action", "-1..1", "takes the values 0, 1, 2"),
        ("gripper_action", "none", "takes the values"),
        ("gripper_position", None, r"observation.state\[5\]"),
        ("joints", "deg", "they range from 0 to"),
        ("velocities", "kept", "6 entries"),
        ("tool_pose", "gripperframe", "6 entries"),
        ("intervention", "given", "0 of 1 episodes"),
    ):
        with pytest.raises(ConfigError, match=f"{name}={wrong or ''}.*{shows}"):
            edit.convert_(edit.Convert(new=str(tmp_path / "new"), source=str(old), **{**right, name: wrong}))
    with pytest.raises(DataError, match="crop .* does not fit a 48x32 frame"):
        edit.convert_(edit.Convert(new=str(tmp_path / "new"), source=str(old), **right))
    assert not (tmp_path / "new").exists()


def test_what_a_recording_of_ours_says_of_itself_is_no_habit_to_choose(simulated: Dataset) -> None:
    require_said(simulated, Habits(**HABITS))
    for name, wrong, said in (
        ("action_scale", 0.04, "action_scale=0.04 cannot be: it was recorded with 0.02"),
        ("gripper_step", 0.2, "gripper_step=0.2 cannot be: it was recorded with 0.5"),
        ("rows", "after", "rows=after cannot be: this program recorded it"),
        ("reward", "frame", "reward=frame cannot be: this program recorded it"),
    ):
        with pytest.raises(ConfigError, match=said):
            require_said(simulated, Habits(**{**HABITS, name: wrong}))
    with pytest.raises(ConfigError, match="fps=20 cannot be: it was recorded with 10"):
        require_said(replace(simulated, fps=20), Habits(**HABITS))


def test_whose_frame_a_reward_is_of_is_said(sources: dict[str, Path], tmp_path: Path) -> None:
    """next.reward is 0, 1, 0, 0: success in frame 1, where it is of its own row's, and else in frame 2."""
    old = open_dataset(old_recording(tmp_path / "old", open_dataset(sources["demos"]).episodes[:1], lambda s: s / 100))
    pose = edit.TOOL_POSES["kept"]
    for said, reward in (
        ({"reward": "frame"}, [1, 0, 0]),
        ({"reward": "next"}, [0, 1, 0]),
        ({"reward": "none"}, [0, 0, 0]),
        ({"reward": "frame", "rows": "after"}, [1, 0, 0]),  # the frame after the action is the row's own
        ({"reward": "next", "rows": "after"}, [1, 0, 0]),
    ):
        habits = Habits(**{**HABITS, "intervention": "none", **said})
        require_said(old, habits)
        columns, _ = convert(old.episodes[0], habits, pose)
        assert columns["next.reward"].tolist() == reward, said
    path = tmp_path / "old/data/chunk-000/episode_000000.parquet"
    pq.write_table(pq.read_table(path).drop(["next.reward"]), path)
    with pytest.raises(ConfigError, match="reward=next cannot be: 0 of 1 episodes have the column next.reward"):
        require_said(open_dataset(tmp_path / "old"), Habits(**{**HABITS, "intervention": "none"}))


def test_what_was_cropped_when_it_was_recorded_is_converted_as_it_is(tmp_path: Path) -> None:
    """84x84, as the original's first sets: to be looked at and labelled; what cannot be is said by name."""
    demos = make(tmp_path / "demos", [4], LIFT, cameras={"wrist": SIZE})
    old = old_recording(tmp_path / "old", open_dataset(demos).episodes, lambda s: s / 1000, lambda a: a)
    video = old / "videos/chunk-000/observation.images.wrist/episode_000000.mp4"
    video.unlink()
    write_video(video, [np.full((84, 84, 3), 40 * i, np.uint8) for i in range(4)])
    habits = {**HABITS, "intervention": "none", "preprocess": Preprocess(crop=None)}
    edit.convert_(edit.Convert(new=str(tmp_path / "new"), source=str(old), **habits))
    new = open_dataset(tmp_path / "new")
    assert new.cameras == {"wrist": (84, 84)} and new.schema is not None and new.schema["image"]["crop"] is None
    assert new.episodes[0].length == 3 and round(new.episodes[0].frame("wrist", 3).mean() / 40) == 3
    for change, said in (
        (lambda s: s[:, :7], r"observation.state has shape \(4, 7\), must have 6 entries"),
        (lambda s: s * np.nan, "states must be finite"),
        (lambda s: np.column_stack([s[:, :5] * 4000, s[:, 5:]]), "joints=rad cannot be: they range from"),
    ):
        table = pq.read_table(old / "data/chunk-000/episode_000000.parquet")
        states = np.array(open_dataset(demos).episodes[0].columns()["observation.state"]) / 1000
        column = pa.array([list(row) for row in change(states)])
        place = table.column_names.index("observation.state")
        pq.write_table(
            table.set_column(place, "observation.state", column), old / "data/chunk-000/episode_000000.parquet"
        )
        with pytest.raises(UserError, match=said):
            edit.convert_(edit.Convert(new=str(tmp_path / "no"), source=str(old), **habits))

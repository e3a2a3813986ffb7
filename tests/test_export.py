"""Exports for other software: rewards are the labels' own, and v2.1 is as LeRobot 0.3 wrote it."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_edit import CAMERAS, LIFT, PUSH, choice, frames, labels_of, sources

from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel
from so101.errors import DataError
from so101.tools import edit

__all__ = ["sources"]  # a fixture


def export(new: Path, *folders: Path, to: str = "v3.0", **other: str) -> Path:
    edit.export(edit.Export(**vars(choice(new, *folders, **other)), to=to))  # type: ignore[arg-type]
    return new


def test_a_reward_is_the_label_of_the_observation_that_follows(sources: dict[str, Path], tmp_path: Path) -> None:
    """Episode 0: 4 rows, success from observation 2. Episode 1: 7 rows, 1-2 and 5-7 but for 6. Episode 2 is skipped."""
    exported = open_dataset(export(tmp_path / "new", *sources.values(), without="more:1"))
    rewards = [episode.columns()["next.reward"].tolist() for episode in exported.episodes]
    assert rewards == [[0, 1, 1, 1], [1, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0]]
    assert sorted(labels_of(tmp_path / "new")) == [0, 1, 2]
    table = pq.read_table(tmp_path / "new/data/chunk-000/file-001.parquet")
    assert str(table.schema.field("next.reward").type) == "float"  # a scalar float32
    stats = json.loads((tmp_path / "new/meta/stats.json").read_text())
    assert abs(stats["next.reward"]["mean"][0] - 7 / 17) < 1e-12
    own = [episode.columns()["next.reward"].tolist() for episode in open_dataset(sources["demos"]).episodes]
    assert own[0] == [0, 1, 0, 0]  # what was recorded stays


def test_what_has_no_label_is_not_taken_for_failure(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="more: episode 1 has no label .* keep=labelled"):
        export(tmp_path / "new", sources["more"])
    assert len(open_dataset(export(tmp_path / "some", sources["more"], keep="labelled")).episodes) == 1
    edit.merge(choice(tmp_path / "bare", sources["more"], episodes="1"))
    (tmp_path / "bare.labels.json").unlink()
    with pytest.raises(DataError, match="bare: has no label file"):
        export(tmp_path / "new", tmp_path / "bare")
    assert not (tmp_path / "new").exists()
    edit.export(edit.Export(**vars(choice(tmp_path / "as_is", tmp_path / "bare")), labels=False))
    assert open_dataset(tmp_path / "as_is").episodes[0].columns()["next.reward"].tolist() == [0, 1, 0]


def test_v21_is_laid_out_as_lerobot_03_wrote_it(sources: dict[str, Path], tmp_path: Path) -> None:
    edit.trim(edit.Trim(**vars(choice(tmp_path / "cut", sources["demos"], episodes="1")), rows={"1": "2:6"}))
    new = export(tmp_path / "new", sources["demos"], tmp_path / "cut", sources["more"], to="v2.1", without="more:1")
    key = "observation.images.wrist"
    assert sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()) == sorted(
        [f"data/chunk-000/episode_{e:06d}.parquet" for e in range(4)]
        + [f"videos/chunk-000/observation.images.{c}/episode_{e:06d}.mp4" for c in CAMERAS for e in range(4)]
        + [f"meta/{name}" for name in ("info.json", "tasks.jsonl", "episodes.jsonl", "episodes_stats.jsonl")]
    )
    info = json.loads((new / "meta/info.json").read_text())
    assert {name: info[name] for name in info if name.startswith(("total", "codebase", "chunks", "splits", "fps"))} == {
        "codebase_version": "v2.1", "total_episodes": 4, "total_frames": 21, "total_tasks": 2, "total_videos": 8,
        "total_chunks": 1, "chunks_size": 1000, "fps": 10, "splits": {"train": "0:4"},
    }  # fmt: skip
    assert "data_files_size_in_mb" not in info and "closing_path" not in info and info["provenance"]["sources"]
    assert info["features"]["next.done"] == {"dtype": "bool", "shape": [1], "names": None}
    lines = (new / "meta/episodes.jsonl").read_text().splitlines()
    assert lines[2:] == [
        json.dumps({"episode_index": 2, "tasks": [LIFT], "length": 4}),
        json.dumps({"episode_index": 3, "tasks": [PUSH], "length": 6}),
    ]
    assert (new / "meta/tasks.jsonl").read_text().splitlines()[1] == json.dumps({"task_index": 1, "task": PUSH})
    stats = json.loads((new / "meta/episodes_stats.jsonl").read_text().splitlines()[2])["stats"]
    assert stats["next.reward"] == {"min": [0], "max": [1], "mean": [0.25], "std": [3**0.5 / 4], "count": [4]}
    assert stats["next.done"]["max"] == [False] and np.shape(stats[key]["mean"]) == (3, 1, 1)
    assert set(stats[key]) == {"min", "max", "mean", "std", "count"} and stats[key]["count"] == [4]

    dataset, demos = open_dataset(new), open_dataset(sources["demos"])
    assert dataset.version == "v2.1" and dataset.notes == [] and [e.length for e in dataset.episodes] == [4, 7, 4, 6]
    columns = dataset.episodes[2].columns()
    assert np.array_equal(columns["observation.state"], demos.episodes[1].columns()["observation.state"][2:6])
    assert columns["next.reward"].tolist() == [0, 0, 1, 0]  # of observations 3 to 6
    assert columns["index"].tolist() == [11, 12, 13, 14]
    assert os.path.samefile(dataset.episodes[1].videos["wrist"][0], demos.episodes[1].videos["wrist"][0])
    trimmed = dataset.episodes[2].videos["wrist"]  # v2.1 has an episode's frames, and no others, in a file
    assert trimmed[1] == 0 and trimmed[0].stat().st_nlink == 1
    seen = [frame.mean() for frame in dataset.episodes[2].frames("wrist")]
    assert np.abs(np.subtract(seen, [frames("demos", 1, i)["wrist"].mean() for i in range(2, 6)])).max() < 4
    assert labels_of(new) == {  # of as many frames as rows
        0: EpisodeLabel(success_start=2),
        1: EpisodeLabel(ranges=[[1, 3], [5, None]], exclude=[6]),
        2: EpisodeLabel(ranges=[[0, 1], [3, None]]),
        3: EpisodeLabel(all_fail=True),
    }
    with pytest.raises(DataError, match="new: episode 0 has no closing observation; .*edit convert"):
        edit.merge(choice(tmp_path / "back", new))

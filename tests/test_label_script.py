"""label.py: the table, the actions, and that nothing wrong is ever saved."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import label
from so101.data.labels import Labels
from so101.data.writer import DatasetWriter
from so101.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Three episodes of 9 rows, so of 10 observations."""
    writer = DatasetWriter(tmp_path / "lift", fps=10, cameras={}, task="lift", schema={})
    for _ in range(3):
        for i in range(9):
            writer.add(np.zeros(18), np.zeros(4), {}, capture_time=i / 10)
        writer.save_episode(np.zeros(18), {}, 0.9)
    writer.close()
    return str(tmp_path / "lift")


def run(folder: str, **values: object) -> None:
    label.main(label.Config(dataset=folder, **values))


def stored(folder: str) -> dict[str, object]:
    return json.loads(Path(folder + ".labels.json").read_text())["episodes"]


def test_without_an_action_it_only_shows_the_table(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "10", "0", "0", "-"]
    assert lines[-2:] == [
        "3 episodes, 3 unlabelled; 0 negative frames",
        "0 positive frames of 200 wanted, 200 to go",
    ]
    assert not Path(folder + ".labels.json").exists()


def test_actions_one_after_the_other(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, episode=0, success_start=4)
    run(folder, episode=1, all_fail=True)
    run(folder, episode=2, ranges=[[2, 4], [8, None]])
    run(folder, episode=2, exclude=[8])
    assert stored(folder) == {
        "0": {"success_start": 4},
        "1": {"all_fail": True},
        "2": {"ranges": [[2, 4], [8, None]], "exclude": [8]},
    }
    capsys.readouterr()
    run(folder)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["0", "10", "6", "4"],
        ["1", "10", "0", "10"],
        ["2", "10", "3", "7"],
    ]
    assert lines[3].endswith("2-4, 8-end without [8]")
    assert lines[-2:] == [
        "3 episodes, 0 unlabelled; 21 negative frames",
        "9 positive frames of 200 wanted, 191 to go",
    ]
    run(folder, episode=0, skip=True)
    run(folder, episode=1, unlabel=True)
    assert stored(folder)["0"] == {"success_start": 4, "skip": True} and "1" not in stored(folder)


def test_what_does_not_fit_the_dataset_is_never_saved(folder: str) -> None:
    run(folder, episode=0, success_start=9)
    before = Path(folder + ".labels.json").read_bytes()
    for values, error, said in (
        (
            {"episode": 1, "success_start": 10},
            DataError,
            "episode 1: success start 10 is past the last frame, 9",
        ),
        ({"episode": 3, "all_fail": True}, DataError, "episode 3: the dataset has only 3"),
        (
            {"episode": 1, "all_fail": True, "success_start": 1},
            DataError,
            "episode 1: got success_start and all_fail",
        ),
        ({"episode": 1}, ConfigError, "say its label"),
        ({"episode": 1, "unlabel": True, "skip": True}, ConfigError, "say its label"),
        ({"success_start": 1}, ConfigError, "episode=N"),
    ):
        with pytest.raises(error, match=said):
            run(folder, **values)
    assert Path(folder + ".labels.json").read_bytes() == before
    Labels("another").save(folder + ".labels.json")
    with pytest.raises(DataError, match="labels of 'another', not 'lift'"):
        run(folder)


def test_import_needs_its_habits_said_and_never_replaces_a_label(folder: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("00: 5-\n01: 2-3, 7-\n02: all fail\n")
    notes = {"import_file": str(tmp_path / "notes.txt")}
    with pytest.raises(ConfigError, match="one_based=true or false"):
        run(folder, **notes, end_inclusive=True)
    run(folder, **notes, one_based=True, end_inclusive=True)
    assert stored(folder) == {
        "0": {"success_start": 4},
        "1": {"ranges": [[1, 3], [6, None]]},
        "2": {"all_fail": True},
    }
    run(folder, **notes, one_based=True, end_inclusive=True)  # the same again is no change
    with pytest.raises(DataError, match="episode 0 is already labelled from 4"):
        run(folder, **notes, one_based=False, end_inclusive=True)
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        run(folder, import_file=str(tmp_path / "none.txt"), one_based=True, end_inclusive=True)


def test_the_command_line(folder: str) -> None:
    def call(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "label.py", *words], cwd=ROOT, capture_output=True, text=True)

    done = call(f"dataset={folder}", "episode=0", "ranges=[[3,5],[8,null]]")
    assert (done.returncode, done.stderr) == (0, "")
    assert stored(folder) == {"0": {"ranges": [[3, 5], [8, None]]}}
    refused = call(f"dataset={folder}nowhere")
    assert refused.returncode == 4 and "Traceback" not in refused.stderr
    assert "info.json: cannot be read" in refused.stderr and "nowhere is not a dataset" in refused.stderr

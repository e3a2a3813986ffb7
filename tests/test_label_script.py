"""label.py without a browser: the table, the actions, that nothing wrong is ever saved, and how the page starts."""

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from label_data import SMALL, files_of, make, make_foreign, shade, stored

import label
from so101.config import parse
from so101.data.labels import Labels
from so101.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of 9 rows, so of 10 observations."""
    return make(tmp_path_factory.mktemp("made") / "lift")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "lift"))


def run(folder: Path, *words: str) -> None:
    label.main(parse(label.Config, [str(folder), *words], ""))


def test_the_table_of_a_dataset_without_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "10", "0", "0", "-"]
    assert lines[-3:] == [
        "3 episodes, 3 unlabelled",
        "0 positive frames of 200 wanted, 200 to go",
        "0 negative frames of 400 to 600 wanted, 400 to go",
    ]
    assert stored(folder) == {} and not folder.with_name("lift.labels.json").exists()


def test_labels_set_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(folder)
    for word in ("0=4", "1=all_fail", "2=2-4, 8-", "2=without 8"):
        run(folder, "--set", word)
    assert stored(folder) == {
        "0": {"success_start": 4},
        "1": {"all_fail": True},
        "2": {"ranges": [[2, 4], [8, None]], "exclude": [8]},
    }
    capsys.readouterr()
    run(folder, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["0", "10", "6", "4"],
        ["1", "10", "0", "10"],
        ["2", "10", "3", "7"],
    ]
    assert lines[3].endswith("2-4, 8-end without [8]")
    assert lines[-3:] == [
        "3 episodes, 0 unlabelled",
        "9 positive frames of 200 wanted, 191 to go",
        "21 negative frames of 400 to 600 wanted, 379 to go",
    ]
    run(folder, "--set=0=skip")
    run(folder, "set=1=none")
    run(folder, "--set", "2=3-5 without 3,4")
    assert stored(folder) == {
        "0": {"success_start": 4, "skip": True},
        "2": {"ranges": [[3, 5]], "exclude": [3, 4]},
    }
    assert files_of(folder) == before


@pytest.mark.parametrize(
    "words, error, said",
    [
        (["1=10"], DataError, "episode 1: success start 10 is past the last frame, 9"),
        (["3=all_fail"], DataError, "episode 3: the dataset has only 3"),
        (["1"], ConfigError, "must be EPISODE=LABEL, as in 3=41"),
        (["1="], ConfigError, "must be EPISODE=LABEL"),
        (["x=4"], ConfigError, "must be EPISODE=LABEL"),
        (["1=soon"], ConfigError, "'1=soon'"),
        (["1=5-3"], ConfigError, "must end after its start"),
        (["1=without 3"], ConfigError, "no label"),
        (["1=4 without x"], ConfigError, "'1=4 without x'"),
        (["1=4", "--list"], ConfigError, "list and set; do one after the other"),
    ],
)
def test_what_is_wrong_is_never_saved(folder: Path, words: list[str], error: type[Exception], said: str) -> None:
    run(folder, "--set", "0=9")
    before = folder.with_name("lift.labels.json").read_bytes()
    with pytest.raises(error, match=said):
        run(folder, "--set", *words)
    assert folder.with_name("lift.labels.json").read_bytes() == before


def test_the_labels_of_another_dataset_are_refused(folder: Path) -> None:
    Labels("another").save(folder.with_name("lift.labels.json"))
    for words in (["--list"], ["--set", "0=1"], ["open=false"]):
        with pytest.raises(DataError, match="labels of 'another', not 'lift'"):
            run(folder, *words)


def test_import_needs_its_habits_said_and_never_replaces_a_label(folder: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("00: 5-\n01: 2-3, 7-\n02: all fail\n")
    with pytest.raises(ConfigError, match="one_based=true or false"):
        run(folder, "--import", str(notes), "end_inclusive=true")
    run(folder, "--import", str(notes), "one_based=true", "end_inclusive=true")
    wanted = {
        "0": {"success_start": 4},
        "1": {"ranges": [[1, 3], [6, None]]},
        "2": {"all_fail": True},
    }
    assert stored(folder) == wanted
    run(folder, "--import", str(notes), "one_based=true", "end_inclusive=true")  # the same again is no change
    with pytest.raises(DataError, match="episode 0 is already labelled from 4"):
        run(folder, "--import", str(notes), "one_based=false", "end_inclusive=true")
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        run(folder, "--import", str(tmp_path / "none.txt"), "one_based=true", "end_inclusive=true")
    assert stored(folder) == wanted


def test_import_of_every_third_frame_and_of_json(folder: Path, tmp_path: Path) -> None:
    notes = tmp_path / "lamp.json"
    notes.write_text('{"0": {"success_start": 6}, "1": null, "2": {"ranges": [[3, 6]]}}')
    habits = ["one_based=true", "end_inclusive=true", "every=3"]
    with pytest.raises(DataError, match="say multiplied too"):
        run(folder, "--import", str(notes), *habits)
    run(folder, "--import", str(notes), *habits, "multiplied=true")
    # image 2 (6 / 3) of those counted from 1 is frame 3; images 1 and 2 are frames 0 and 3
    assert stored(folder) == {"0": {"success_start": 3}, "1": {"all_fail": True}, "2": {"ranges": [[0, 4]]}}


def test_extract_writes_every_nth_frame_under_its_number(folder: Path, tmp_path: Path) -> None:
    before = files_of(folder)
    run(folder, "--extract", str(tmp_path / "frames"), "every=3")
    pictures = sorted((tmp_path / "frames").iterdir())
    assert [path.name for path in pictures] == [
        f"episode_{episode:06d}_wrist_frame_{frame:06d}.jpg" for episode in range(3) for frame in (0, 3, 6, 9)
    ]
    for path, (episode, frame) in zip(pictures, [(e, f) for e in range(3) for f in (0, 3, 6, 9)], strict=True):
        picture = cv2.imread(str(path))
        assert picture.shape == (48, 64, 3) and abs(int(picture[40, 30, 1]) - shade(episode, frame)) <= 4
    run(folder, "--extract", str(tmp_path / "small"), "cropped=true")
    assert len(list((tmp_path / "small").iterdir())) == 30
    assert cv2.imread(str(tmp_path / "small" / "episode_000002_wrist_frame_000008.jpg")).shape == (32, 32, 3)
    with pytest.raises(DataError, match="frames: exists already"):
        run(folder, "--extract", str(tmp_path / "frames"))
    with pytest.raises(DataError, match="lies inside the dataset"):
        run(folder, "--extract", str(folder / "frames"))
    with pytest.raises(DataError, match="does not fit a 64x48 frame"):
        run(folder, "--extract", str(tmp_path / "other"), "cropped=true", "preprocess.crop=[0,80,480,480]")
    assert files_of(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", "lift", "small"]


def test_extract_of_colours_and_of_a_dataset_that_was_cropped_before(tmp_path: Path) -> None:
    folder = make_foreign(tmp_path / "theirs", {"front": (64, 64), "side": (48, 64)})
    run(folder, "--extract", str(tmp_path / "all"), "every=8")
    assert len(list((tmp_path / "all").iterdir())) == 2 * 2 * 2  # frames 0 and 8 of 9: no closing one
    with pytest.raises(DataError, match="needs crop=null"):
        run(folder, "--extract", str(tmp_path / "small"), "cropped=true")


def test_the_network_image_is_the_datasets_own_unless_said(folder: Path) -> None:
    from so101.data.dataset import open_dataset

    dataset = open_dataset(folder)
    own = label.network_image(label.Config(), dataset)
    assert (own.crop, own.image_size) == (SMALL["crop"], SMALL["image_size"])
    said = label.network_image(parse(label.Config, ["preprocess.crop=null"], ""), dataset)
    assert (said.crop, said.image_size) == (None, 128)


def test_the_command_line_and_its_exit_codes(folder: Path) -> None:
    command = [sys.executable, "label.py", f"{folder}nowhere"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 4 and refused.stderr.count("\n") == 1
    assert "nowhere: there is no such folder" in refused.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_page_starts_says_how_to_reach_it_and_ends_with_ctrl_c(folder: Path) -> None:
    ssh = {"SSH_CONNECTION": "192.0.2.7 50000 192.0.2.9 2222", "DISPLAY": ":9", "BROWSER": "false"}
    process = subprocess.Popen(
        [sys.executable, "label.py", str(folder)],
        cwd=ROOT, env={**os.environ, **ssh}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline().rstrip() for _ in range(4)]
    assert lines[0] == f"{folder}: 3 episodes; labels in {folder}.labels.json"
    port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{32})/", lines[1]).groups()  # type: ignore[union-attr]
    assert lines[2].startswith(f"from your own machine, first: ssh -N -L {port}:127.0.0.1:{port} ")
    assert lines[2].endswith("@192.0.2.9 -p 2222") and lines[3] == "Ctrl-C ends it"
    wire = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
    wire.request("GET", f"/{token}/")
    assert b"<!doctype html>" in wire.getresponse().read()
    process.send_signal(signal.SIGINT)  # with a connection that is kept alive
    out, err = process.communicate(timeout=10)
    wire.close()
    assert (process.returncode, err) == (130, "interrupted\n") and f"report: {folder}.report.html" in out

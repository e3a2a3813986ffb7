"""What a run leaves on disk, also after a kill, and what it shows."""

import json
import math

import numpy as np
import pytest

from so101 import runlog
from so101.runlog import Progress, RunLog, read_metrics, table, wilson_interval


def test_metrics_rows_and_a_column_that_comes_later(tmp_path):
    log = RunLog(tmp_path)
    log.metrics(step=1, loss=1 / 3)
    log.metrics(step=2, loss=np.float32(0.1), success=True)
    RunLog(tmp_path).metrics(success=False, step=3, note='a, "b"')
    assert (tmp_path / "metrics.csv").read_text() == (
        'step,loss,success,note\n1,0.333333,,\n2,0.1,1,\n3,,0,"a, ""b"""\n'
    )
    columns = read_metrics(tmp_path)
    assert columns["step"] == [1, 2, 3] and columns["success"][1:] == [1, 0]
    assert math.isnan(columns["loss"][2]) and math.isnan(columns["success"][0])


def test_read_metrics_before_there_are_any(tmp_path):
    assert read_metrics(tmp_path) == {}


def test_events_are_json_lines_with_a_time(tmp_path):
    log = RunLog(tmp_path)
    log.event("fault", servo=4, load=np.float32(0.5), pose=np.zeros(2), where=tmp_path, q=math.nan)
    log.event("end")
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (first["kind"], first["servo"], first["load"], first["pose"]) == ("fault", 4, 0.5, [0.0, 0.0])
    assert first["where"] == str(tmp_path) and first["q"] == "NaN"
    assert second["kind"] == "end" and second["time"] >= first["time"] > 1.6e9
    with pytest.raises(TypeError, match="cannot hold a set"):
        log.event("bad", value={1})


def test_a_line_torn_by_a_kill_is_cut_off_and_reported(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.metrics(step=1)
    log.event("start")
    for name in ("metrics.csv", "events.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"ti' if name == "events.jsonl" else "2")
    again = RunLog(tmp_path)
    again.metrics(step=2)
    assert (tmp_path / "metrics.csv").read_text() == "step\n1\n2\n"
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["start", "torn_line_removed", "torn_line_removed"]
    assert "cut short" in capsys.readouterr().err
    RunLog(tmp_path)
    assert capsys.readouterr().err == ""


class Screen:
    """A stand-in for the terminal: keeps what is written, and says whether it is one."""

    def __init__(self, terminal: bool) -> None:
        self.terminal, self.text = terminal, ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return self.terminal


def show(monkeypatch, terminal: bool, counts: list[int], seconds_each: float) -> str:
    screen, now = Screen(terminal), [100.0]
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("so101.runlog.time.monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "80")
    with Progress("train", 100, "steps") as progress:
        for count in counts:
            progress.update(count, loss=1 / 3)
            now[0] += seconds_each
    return screen.text


def test_progress_without_a_terminal_is_a_line_each_10_s(monkeypatch):
    text = show(monkeypatch, False, list(range(50, 101)), 1.0)  # a resume at 50: the rate is still 1/s
    lines = text.splitlines()
    assert len(lines) == 6 and "\r" not in text  # at 10, 20, 30, 40, 50 s and at the end
    assert lines[0] == "train: 60/100 steps  1/s  40s left  loss 0.3333"
    assert lines[-1].startswith("train: 100/100 steps  1/s  0s left")


def test_progress_on_a_terminal_redraws_one_ascii_line(monkeypatch):
    text = show(monkeypatch, True, [0, 25, 50], 1.0)
    assert text.isascii() and text.endswith("\n") and text.count("\n") == 1
    shown = text.strip().split("\r")
    assert max(map(len, shown)) < 80
    assert "[############............] 50/100 steps  25/s  2s left" in shown[-1]


def test_progress_of_a_single_update_says_no_rate(monkeypatch):
    assert show(monkeypatch, False, [100], 0.0) == "train: 100/100 steps  loss 0.3333\n"


def test_progress_that_was_never_updated_prints_nothing(monkeypatch):
    assert show(monkeypatch, True, [], 1.0) == show(monkeypatch, False, [], 1.0) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1:00"), (185, "3:05"), (7385, "2:03:05")])
def test_duration(seconds, text):
    assert runlog.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (17.4593, "17.46"), (np.float32(0.5003997), "0.5004"), (-0.0, "0"), (np.float32(-0.0), "0"), (-0.004, "-0.004"),
        (12345.6, "12346"), (3, "3"), (123456, "123456"), (True, "yes"), (np.bool_(False), "no"), ("3/5", "3/5"),
        (None, "-"), (math.nan, "-"),
    ],
)  # fmt: skip
def test_values_in_words(value, text):
    assert runlog.in_words(value) == text


def test_what_a_table_lacks_is_a_dash_that_any_terminal_can_print():
    lines = table(["episode", "fired at"], [[1, None], [2, 17.4593]]).splitlines()
    assert lines[2:] == ["      1  -", "      2  17.46"]


def test_table_lines_up():
    assert table(["joint", "error"], [["pan", 0.5], ["wrist_roll", 12]]) == (
        "joint       error\n----------  -----\npan           0.5\nwrist_roll     12"
    )


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # by hand, z = 1.96: 0/n -> z^2 / (n + z^2) = 3.8416 / 13.8416, and its mirror image
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (3, 5, 0.2307, 0.8824),
        (14, 20, 0.4810, 0.8545),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_against_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)

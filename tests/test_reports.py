"""The reports of record, label, train_reward and train_sac: read back as HTML, their numbers counted by hand."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chromium import MISSING, Chromium
from label_data import SMALL, files_of, make, make_foreign

import label
import record
import train_sac
from so101 import config as configs
from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel, Labels, labels_path
from so101.data.lint import Finding
from so101.data.writer import DatasetWriter
from so101.errors import DataError
from so101.evaluation import Contestant, Evaluation, Result
from so101.learn.reward import RewardConfig
from so101.learn.reward_training import judge_frames
from so101.reports import head as heads
from so101.reports.dataset import STRIPS, write_dataset_report
from so101.reports.head import Run, changes, commit, head, runs_before
from so101.reports.reward import compared, doubts, trained, write_reward_report
from so101.reports.run import figures, write_run_report
from so101.rig import RigConfig
from so101.runlog import RunLog
from so101.schema import ACTION, STATE, TOOL_XYZ, Preprocess, describe
from so101.starts import Start

HOSTILE = "<script>alert('x')</script> & \"<b>"
GREEN, ORANGE, BLUE, YELLOW = (0, 158, 115), (213, 94, 0), (0, 114, 178), (230, 159, 0)
VOID = {"meta", "img", "br", "path", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """A report taken apart: its tags, its rows by heading, its links and pictures. Fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.pictures: list[dict[str, str]] = []
        self.rows: dict[str, list[list[str]]] = {}  # heading -> its tables' rows
        self.words: dict[str, str] = {}
        self.heading = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.rows.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.rows[self.heading][-1].append("")
        if tag == "img":
            self.pictures.append({**dict(attrs), "heading": self.heading})

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "h2" in self.open:
            self.heading += data
        elif "td" in self.open or "th" in self.open:
            self.rows[self.heading][-1][-1] += data
        self.words[self.heading] = self.words.get(self.heading, "") + data

    def cells(self, heading: str) -> dict[str, Any]:
        """The rows of a section by their first cell; what follows it, alone where it is one."""
        return {row[0]: row[1] if len(row) == 2 else row[1:] for row in self.rows[heading]}


def read(path: Path) -> Page:
    """A report, of which it holds that nothing outside of it is needed, nothing runs, and every picture has words."""
    text = path.read_text()
    page = Page(text)
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "iframe", "link", "object"} & set(page.tags)
    assert not re.search(r"@import|url\(", text) and not re.search(r'(?:cx|cy|d|points)="[^"]*nan', text)
    assert all(picture["alt"] for picture in page.pictures)
    assert text.count("<svg") == text.count('role="img"')
    return page


def pixels(picture: dict[str, str]) -> np.ndarray:
    """The RGB of an <img>."""
    data = np.frombuffer(base64.b64decode(picture["src"].partition("base64,")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1].astype(int)


def marks(picture: dict[str, str], count: int) -> list[tuple[int, ...]]:
    """The colours below the frames of a film strip, each the nearest of those that there are."""
    row = pixels(picture)[-3]
    places = ((np.arange(count) + 0.5) * len(row) / count).astype(int)
    known = [GREEN, ORANGE, BLUE, YELLOW, (153, 153, 153)]
    return [min(known, key=lambda colour: np.abs(row[place] - colour).sum()) for place in places]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes of 9 rows and 10 observations: a success from frame 4 on, a failure, one unlabelled, one left out.

    With the config of its recording beside it, as record.py leaves it.
    """
    folder = make(tmp_path_factory.mktemp("made") / "lift", episodes=4)
    labels = Labels("lift")
    labels.episodes = {0: EpisodeLabel(success_start=4), 1: EpisodeLabel(all_fail=True), 3: EpisodeLabel(skip=True)}
    labels.save(labels_path(folder))
    configs.save(record.Config(dataset=str(folder), task="lift", episodes=4), folder.with_name("lift.record.json"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    for path in made.parent.glob("lift.*"):
        shutil.copy2(path, tmp_path)
    return Path(shutil.copytree(made, tmp_path / "lift"))


def report_of(folder: Path, **kept: Any) -> Page:
    write_dataset_report(folder, "record.py", time.time() - 75, configs.load(record.Config, beside(folder)), **kept)
    return read(folder.with_name(f"{folder.name}.report.html"))


def beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.record.json")


def test_the_report_of_a_dataset_lies_beside_it_and_counts_what_is_in_it(folder: Path) -> None:
    before = files_of(folder)
    page = report_of(folder)
    assert files_of(folder) == before
    said = page.cells("What is in it")
    assert said["success, failure, unlabelled, left out"] == "1, 1, 1, 1"
    assert (said["episodes"], said["frames"]) == ("4", "40")
    # 6 of episode 0 from frame 4 on; its first 4 and the 10 of episode 1
    assert (said["positive frames"], said["negative frames"]) == ("6", "14")
    assert said["length"] == "4s"  # 4 x 9 rows at 10 Hz are 3.6 s
    assert said["positive"] == ["6", "200", "194 to go"]
    assert said["negative"] == ["14", "400 to 600", "386 to go"]
    assert said["ticks"] == "0 of 36 took more than 1.5 periods, the slowest 1.00"
    numbers = page.cells("Episodes in numbers")
    assert numbers["0"] == ["9", "0.9", "from 4", "6", "4", "33%", "0", "1"]  # rows 6 to 8 of 9 by a person
    assert numbers["1"][2:5] == ["all fail", "0", "10"]
    assert numbers["2"][2:5] == ["-", "-", "-"] and numbers["3"][2] == "skip"


def test_a_film_strip_shows_first_and_last_and_the_success_with_the_labels_colours(folder: Path) -> None:
    page = report_of(folder)
    strips = [picture for picture in page.pictures if picture["heading"] == "Episodes in pictures"]
    assert len(strips) == 4
    frames = [0, 2, 3, 4, 6, 8, 9]  # seven evenly over 10, of which 4 is where success begins
    assert f"frames {', '.join(map(str, frames))} of 10" in strips[0]["alt"] and "label from 4" in strips[0]["alt"]
    assert marks(strips[0], 7) == [ORANGE] * 3 + [GREEN] * 4
    assert marks(strips[1], 7) == [ORANGE] * 7 and marks(strips[2], 7) == [(153, 153, 153)] * 7
    rgb = pixels(strips[0])
    for place, frame in enumerate(frames):  # the lower half is of the grey that label_data gave the frame
        grey = rgb[60, int((place + 0.5) * rgb.shape[1] / 7)].mean()
        assert abs(grey - (15 + 20 * frame)) < 8


def rewrite(folder: Path, episode: int, column: str, values: list[Any]) -> None:
    """Put other values into a column of an episode's rows."""
    path = next(folder.glob(f"data/*/file-{episode:03d}.parquet"))
    table = pq.read_table(path)
    place, kind = table.column_names.index(column), table[column].type
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(values, kind)), path)


def test_late_ticks_and_start_poses_are_the_rows_own(tmp_path: Path) -> None:
    schema = describe(Preprocess(**SMALL), ["wrist"], 10, 0.02, 0.5)
    writer = DatasetWriter(tmp_path / "d", fps=10, cameras={"wrist": (48, 64)}, task=HOSTILE, schema=schema)
    for x in (0.2, 0.3):
        for row, when in enumerate((0.0, 0.1, 0.4, 0.5)):  # the second tick took three periods
            state = np.full(len(STATE), row / 10)
            state[TOOL_XYZ] = (x, 0.01, 0.07)
            writer.add(
                state, np.full(len(ACTION), 0.3), {"wrist": np.full((48, 64, 3), 9, np.uint8)}, capture_time=when
            )
        writer.save_episode(np.zeros(len(STATE)), {"wrist": np.zeros((48, 64, 3), np.uint8)}, 0.6)
    writer.close()
    actions = [[0.3] * len(ACTION)] * 3 + [[np.nan] * len(ACTION)]
    rewrite(tmp_path / "d", 0, "action", actions)  # as no writer of ours would
    seen = [Finding("error", "flat frames", 1, 0, HOSTILE)]
    write_dataset_report(tmp_path / "d", "record.py", time.time(), record.Config(), seen)
    page = read(tmp_path / "d.report.html")
    said = page.cells("What is in it")
    assert said["task"] == HOSTILE and said["ticks"] == "2 of 8 took more than 1.5 periods, the slowest 3.00"
    assert page.cells("Episodes in numbers")["1"][-2:] == ["1", "3"]
    found = page.words["What is wrong with it"]
    assert f"episode 1, frame 0: {HOSTILE} [flat frames]" in found
    assert "action: delta_x is nan, no number" in found
    text = (tmp_path / "d.report.html").read_text()
    above = text[text.index('aria-label="start of the tool, from above"') :].partition("</svg>")[0]
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', above)
    left, right = sorted(float(x) for x, _ in dots)
    assert (left, right) == (74, 384) and len({y for _, y in dots}) == 1  # 0.2 and 0.3 m are the axis's ends
    shares = text[text.index('aria-label="share of the steps by action"') :].partition("</svg>")[0]
    assert shares.count("<polyline") == 4  # NaN left out, the rest in one bin
    assert min(float(y) for y in re.findall(r"[\d.]+,([\d.]+)", shares.partition("<polyline")[2])) < 80  # a share of 1


def test_a_damaged_video_is_told_in_place_of_its_strip(folder: Path) -> None:
    next(folder.glob("videos/*/*/file-001.mp4")).write_bytes(b"nothing")
    page = report_of(folder)
    strips = [picture["alt"][:9] for picture in page.pictures]
    assert strips == ["episode 0", "episode 2", "episode 3"]
    assert "file-001.mp4" in page.words["Episodes in pictures"]


def test_a_dataset_of_another_program_has_a_report_too(tmp_path: Path) -> None:
    folder = make_foreign(tmp_path / "theirs", {"wrist": (48, 64)})
    write_dataset_report(folder, "label.py", time.time(), label.Config(dataset=str(folder)))
    page = read(tmp_path / "theirs.report.html")
    assert "This program did not record it" in page.words["Lengths, start poses and actions"]
    assert "There is no previous run of this kind" in page.words["What changed against the previous run"]
    assert len(page.pictures) == 2 and page.cells("What is in it")["frames"] == "18"  # no closing observation


def test_the_previous_recording_is_the_newest_older_one_of_the_same_kind(folder: Path) -> None:
    """Beside it: an older and an old one, a newer one, another script's config, a damaged one, one without data."""
    now = beside(folder).stat().st_mtime
    changed = {"old": ("lift", 3, -10), "older": ("lift", 5, -20), "newer": ("drop", 6, 10), "gone": ("lift", 7, -1)}
    for name, (task, seed, after) in changed.items():
        place = folder.with_name(name)
        configs.save(record.Config(dataset=str(place), task=task, episodes=4, seed=seed), beside(place))
        os.utime(beside(place), (now + after, now + after))
        if name != "gone":
            shutil.copytree(folder, place)
    configs.save(train_sac.Config(), beside(folder.with_name("sac")))
    beside(folder.with_name("torn")).write_text('{"dataset": ')
    for name in ("sac", "torn"):
        os.utime(beside(folder.with_name(name)), (now - 5, now - 5))
    page = report_of(folder)
    said = page.cells("What changed against the previous run")
    assert said["setting"] == said["figure"] == ["old", "lift"] and said["seed"] == ["3", "0"]
    assert said["success, failure, unlabelled, left out"] == ["0, 0, 4, 0", "1, 1, 1, 1"]  # it has no labels
    assert said["positive frames"] == ["0", "6"] and said["episodes"] == ["4", "4"]
    settings = [row[0] for row in page.rows["What changed against the previous run"]]
    assert settings[settings.index("setting") :] == ["setting", "seed"]  # and not where it lies


def test_a_previous_run_that_cannot_be_read_does_not_spoil_the_report() -> None:
    def damaged() -> Run:
        raise DataError(HOSTILE)

    heading, said = changes(Run("a", {}, {}), damaged)
    page = Page(f"<h2>{heading}</h2>{said}")
    assert f"could not be read: {HOSTILE}" in page.words[heading] and "script" not in page.tags


def test_settings_added_or_taken_away_since_are_shown_as_such() -> None:
    this, before = Run("new", {"a": 1, "b.c": [1, 2], "output": "x"}, {"f": 0.5}), Run("old", {"a": 1, "d": None}, {})
    heading, said = changes(this, lambda: before)
    cells = Page(f"<h2>{heading}</h2>{said}").cells(heading)
    assert cells["b.c"] == ["(no such setting)", "[1, 2]"] and cells["d"] == ["null", "(no such setting)"]
    assert cells["f"] == ["-", "0.5"] and "a" not in cells and "output" not in cells


def test_a_part_that_was_set_to_null_is_no_default() -> None:
    config = record.Config(page=True, rig=RigConfig(operator=None, leader=None))
    heading, said = head("record.py", time.time(), config, {})
    cells = Page(f"<h2>{heading}</h2>{said}").cells(heading)
    assert cells["rig.operator"] == cells["rig.leader"] == ["null", "not null"]
    assert cells["rig.pace"] == ["1.0", "null"]  # which follows from it: a person is not faster


def test_the_head_says_what_was_run_and_which_settings_are_not_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/record.py", f"task={HOSTILE}", "episodes=35"])
    config = record.Config(task=HOSTILE, episodes=35, seed=7)
    heading, said = head("record.py", time.time() - 3723, config, {"dataset": "d"})
    page = Page(f"<h2>{heading}</h2>{said}")
    cells = page.cells(heading)
    assert cells["report written"].endswith(", 1:02:03 later") and cells["seed"] in ("7", ["7", "0"])
    assert cells["task"] == [HOSTILE, "lift the cube"] and cells["episodes"] == ["35", "70"]
    assert cells["failures"] == ["6", "12"] and "env.fps" not in cells and cells["dataset"] == "d"
    assert "record.py 'task=<script>" in cells["command line"] and "episodes=35" in cells["command line"]
    assert f"Python {sys.version.split()[0]}, torch 2" in cells["versions"] and "script" not in page.tags
    whole = page.words[heading]
    assert json.loads(whole[whole.index("{") : whole.rindex("}") + 1]) == configs.to_dict(config)


def test_the_commit_is_gits_own_and_its_absence_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit(tmp_path) == "not from a git repository"
    (tmp_path / ".git").mkdir()
    assert commit(tmp_path).startswith("commit not known")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) == "commit not known: git did not run"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True).stdout

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    git("tag", "v1")
    told = git("rev-parse", "--short=12", "HEAD").strip()
    assert commit(tmp_path) == f"commit {told}"
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"commit {told} with changes"


def result(start: int, success: bool, steps: int) -> Result:
    return Result("A", start, [0.25, 0, 0.07], [0.25, 0, 0], steps, 1.0, success, success, True, None, "x", 1, 1, [0.5])


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run folder of train_sac.py with two parts, two actors' rows, events, checkpoints, an evaluation, episodes."""
    folder = tmp_path / "run"
    folder.mkdir()
    configs.save(train_sac.Config(output=str(folder), seed=3), folder / "config.json")
    log = RunLog(folder)
    began = {"steps": 0, "updates": 0, "mode": "alternate", "role": "both"}
    events: list[dict[str, Any]] = [
        {"kind": "started", "time": 1000.0, **began},
        {"kind": "alarm", "time": 1010.0, "step": 12, "said": HOSTILE},
        {"kind": "corrected", "time": 1020.0, "episode": 1, "success": False},
        {"kind": "ended", "time": 1100.0, "steps": 30, "updates": 100},
        {"kind": "started", "time": 2000.0, **began, "steps": 30},
        {"kind": "evaluated", "time": 2010.0, "checkpoint": "000030", "successes": 3, "episodes": 4, "steps": 9.25},
        {"kind": "something new", "time": 2020.0, "why": "<i>"},
        {"kind": "ended", "time": 2050.0, "steps": 40, "updates": 203},  # each 50th is in metrics.csv
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    rows = [(10, 0, 10, 0.5, 2, 0.5), (30, 1, 20, 0.25, 1, 1.0), (40, 2, 10, 0.0, 0, 1.0)]
    for step, episode, steps, share, helps, last in rows:
        log.metrics(
            step=step, actor="actor", episode=episode, episode_steps=steps, intervention_share=share,
            interventions=helps, success_last_20=last, success_alone_last_20=last / 2, actor_hz=2.0,
        )  # fmt: skip
        log.metrics(step=step, updates=step * 5, q=float("nan"), entropy=-1.0)
    for name in ("000030", "000040"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints" / "last").write_text("000040")
    (folder / "checkpoints" / "best").write_text("000030\n")
    place = folder / "evaluations" / "001"
    place.mkdir(parents=True)
    starts = [Start(number, number, [0.25, 0, 0.07], [0.25, 0, 0]) for number in (1, 2)]
    it = {"A": Contestant("run", "000040", 40, "0" * 64)}
    Evaluation({}, it, HOSTILE, starts, episodes=[result(1, True, 9), result(2, False, 30)]).save(place)
    shutil.copytree(made, folder / "episodes")
    return folder


def test_the_report_of_a_run_adds_up_what_its_files_say(run: Path) -> None:
    config = configs.load(train_sac.Config, run / "config.json")
    write_run_report(run, config)
    page = read(run / "report.html")
    said = page.cells("How it went")
    assert (said["environment steps"], said["episodes"], said["interventions"]) == ("40", "3", "3")
    assert said["steps that a person drove"] == "25%"  # 5 + 5 + 0 of 40
    assert (said["success"], said["success without help"]) == ("100% of the last 3", "50% of the last 3")
    assert said["updates"] == "203" and said["time"] == "2:30"  # 100 s and 50 s
    assert said["evaluation"] == "1 of 2, 95 % interval 9% to 91%, judged by the world"
    assert said["steps of an evaluated episode"] == "19.5"
    assert page.cells("Where the time went") == {
        "part 1": "1:40",
        "part 2": "50s",
        "within episodes, 3 of 3 of known rate": "18s",  # 9 / 2 + 19 / 2 + 9 / 2 s, rounded to even
        "between them: resets, learning that was made up, checkpoints": "2:12",
    }
    assert page.cells("Checkpoints")["000030"] == ["3 of 4", "9.25", "best"]
    assert page.cells("Checkpoints")["000040"] == ["-", "-", "last"]
    assert page.cells("What was run")["began"] == heads.time_of_day(1000.0)


def test_of_a_run_that_was_killed_the_updates_are_those_that_were_measured_since(run: Path) -> None:
    """What an earlier part ended with may have been undone."""
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:-1]).replace('"updates": 100', '"updates": 999'))
    assert figures(run)["updates"] == 200


def test_the_report_of_a_run_tells_its_events_in_words_with_their_steps(run: Path) -> None:
    write_run_report(run, configs.load(train_sac.Config, run / "config.json"))
    page = read(run / "report.html")
    assert [row[1:] for row in page.rows["What happened"][1:]] == [
        ["0", "began, mode alternate"],
        ["12", f"alarm: {HOSTILE}"],
        ["30", "a person: episode 1 was no success"],
        ["30", "ended"],
        ["30", "went on from update 0, mode alternate"],
        ["30", "checkpoint 000030 evaluated: 3 of 4, 9.2 steps an episode"],
        ["-", "something new, why <i>"],
        ["40", "ended"],
    ]
    assert page.rows["Alarms"][1][1:] == ["12", HOSTILE]
    evaluated = next(rows for heading, rows in page.rows.items() if heading.startswith("Last evaluation: 001"))
    assert [row[:4] for row in evaluated[1:]] == [["1", "9", "1.00", "SUCCESS"], ["2", "30", "1.00", "FAIL"]]
    assert HOSTILE in page.words["Last evaluation: 001"]


def test_a_damaged_evaluation_is_told_and_costs_the_report_nothing_else(run: Path) -> None:
    damaged = run / "evaluations" / "001" / "eval.json"
    damaged.write_text(damaged.read_text()[:-100])
    write_run_report(run, configs.load(train_sac.Config, run / "config.json"))
    page = read(run / "report.html")
    assert f"{damaged}: " in page.words["Last evaluation: 001"]
    assert page.cells("How it went")["updates"] == "203" and "evaluation" not in page.cells("How it went")


def test_online_episodes_are_shown_with_who_drove_and_those_that_a_person_corrected(run: Path) -> None:
    """Of 10 frames, the rows 6 to 8 and so the last frame too are a person's; the classifier was wrong both ways."""
    rewrite(run / "episodes", 1, "next.reward", [0.0] * 8 + [1.0])
    labels = Labels("episodes")
    labels.episodes = {0: EpisodeLabel(all_fail=True), 1: EpisodeLabel(all_fail=True), 2: EpisodeLabel(success_start=9)}
    labels.save(labels_path(run / "episodes"))
    write_run_report(run, configs.load(train_sac.Config, run / "config.json"))
    page = read(run / "report.html")
    shown = [picture for picture in page.pictures if picture["heading"] == "Some episodes"]
    assert [picture["alt"][:10] for picture in shown] == [f"episode {index}:" for index in range(4)]
    assert "frames 0, 1, 3, 4, 5, 6, 8, 9 of 10" in shown[0]["alt"] and "33% by a person" in shown[0]["alt"]
    assert marks(shown[0], 8) == [BLUE] * 5 + [YELLOW] * 3
    heading = "Verdicts that a person corrected"
    wrong = [picture["alt"] for picture in page.pictures if picture["heading"] == heading]
    assert [alt.partition(":")[0] for alt in wrong] == ["episode 1", "episode 2"]  # of 0 both said the same
    assert all("frames 6, 7, 8, 9 of 10" in alt for alt in wrong)
    words = page.words[heading]
    assert words.index("took back") < words.index("episode 1") < words.index("was missed") < words.index("episode 2")
    assert "episode 1: failure, corrected by a person" in page.words["Some episodes"]


def test_a_run_is_compared_with_the_one_begun_before_it_whatever_was_written_last(run: Path) -> None:
    """A resume writes config.json again, so its time says nothing."""
    before = shutil.copytree(run, run.with_name("before <b>"))
    configs.save(train_sac.Config(seed=9, steps=10), before / "config.json")
    events = (before / "events.jsonl").read_text().replace('"time": 1000.0', '"time": 900.0')
    (before / "events.jsonl").write_text(events)
    shutil.rmtree(before / "evaluations")
    after = shutil.copytree(run, run.with_name("after"))
    (after / "events.jsonl").write_text(events.replace('"time": 900.0', '"time": 1500.0'))
    write_run_report(run, configs.load(train_sac.Config, run / "config.json"))
    said = read(run / "report.html").cells("What changed against the previous run")
    assert said["figure"] == said["setting"] == ["before <b>", "run"]
    assert said["seed"] == ["9", "3"] and said["steps"] == ["10", str(train_sac.Config().steps)]
    assert said["time"] == ["4:10", "2:30"] and said["evaluation"][0] == "-"


def test_a_run_killed_before_its_first_row_has_a_report(tmp_path: Path) -> None:
    configs.save(train_sac.Config(), tmp_path / "config.json")
    write_run_report(tmp_path, train_sac.Config())
    page = read(tmp_path / "report.html")
    assert page.cells("How it went")["environment steps"] == "0" and "svg" not in page.tags


def test_the_report_of_a_classifier_says_when_it_fired_and_where_it_was_wrong(tmp_path: Path) -> None:
    """Two episodes of 6 frames, threshold 0.5, votes of two: the first fires 1 late, the second on a false run."""
    probabilities = np.array([0.1, 0.6, 0.2, 0.9, 0.95, 0.99, 0.1, 0.7, 0.8, 0.9, 0.2, 0.1])
    success = np.array([0, 0, 0, 1, 1, 1] + [0] * 6, bool)
    ids, states = np.repeat([4, 7], 6), np.zeros((12, len(STATE)))
    quick = RewardConfig(consecutive=2, tolerance_frames=0)
    report = judge_frames(probabilities, success, ids, states, None, quick, 0.5)
    images = np.stack([np.full((2, 32, 32, 3), 20 * index, np.uint8) for index in range(12)])
    held = {"provenance": {"config": {"seed": 1, "reward": {"lr": 1.0}}, "report": report, "seconds": 90.0}}
    older = {"provenance": {"config": {"seed": 1, "reward": {"lr": 2.0}}, "report": {**report, "f_half": None}}}
    for name, content in (("older", older), ("no classifier", {"a": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.json").write_text(json.dumps(content))
    changed = compared(tmp_path / "new", time.time() + 1, held, trained)
    page_head = head("train_reward.py", time.time(), record.Config())
    write_reward_report(tmp_path / "r.html", HOSTILE, page_head, changed, report, images, success, ids)
    page = read(tmp_path / "r.html")
    episodes = page.cells("Episodes")
    assert episodes["4"] == ["3", "4", "1", "", "1"]  # from 3 on, fired at 4; frame 1 alone was no vote
    assert episodes["7"] == ["-", "2", "-", "2-3", "1-3"]
    said = page.cells("How it does")
    assert said["mean delay, frames"] == "1" and said["episodes with a false success"] == "1"
    assert said["accuracy of frames"] == "0.6667"  # 4 of 12 wrong: 4/1, 7/1, 7/2, 7/3
    said = page.cells("What changed against the previous run")
    assert said["reward.lr"] == ["2.0", "1.0"] and said["time"] == ["-", "1:30"] and "seed" not in said
    assert said["figure"] == ["older", "new"] and said["F0.5 of episodes"][0] == "-"
    worst = [p for p in page.pictures if p["heading"] == "Worst frames: taken for a success, labelled none"]
    assert [p["alt"] for p in worst[::2]] == [f"episode {e}, frame {f}" for e, f in ((7, 3), (7, 2), (7, 1), (4, 1))]
    assert (pixels(worst[0]) == 20 * 9).all()  # frame 3 of episode 7 is row 9; two cameras each


SOLID: dict[str, Any] = {
    "frames": {"train": 800, "held_out": 200, "successes": 250}, "episodes": {"successes": 40}, "threshold": 0.6,
    "at_threshold": {"accuracy": 0.97}, "held_out": [{"success_start": 3}] * 6 + [{"success_start": None}] * 6,
    "vetoed": [], "problems": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"frames": {"train": 80, "held_out": 20, "successes": 33}}, "33 positive frames of 200 wanted, 167 to go"),
        ({"episodes": {"successes": 4}}, "4 episodes show a success, 20 are usual"),
        ({"threshold": 0.02}, "the threshold is 0.020, so frames pass that the classifier takes for failures"),
        ({"threshold": 0.96}, "the threshold is 0.960, so only frames pass of which the classifier is all but sure"),
        ({"at_threshold": {"accuracy": 0.941}}, "94.1% of the frames are right, over 95% are wanted"),
        # Wilson's interval of 0 of 5: 3.8416 / 8.8416
        ({"held_out": [{"success_start": 3}] * 5}, "only 5 episodes are judged: were none of them wrong, up to 43% of"),
        ({"vetoed": [4, 9]}, "the state guard forbids 2 of 6 successes (episode 4, 9), however sure"),
    ],
)
def test_what_a_classifiers_judgement_rests_on_is_said_where_it_is_thin(changed: dict[str, Any], said: str) -> None:
    found = doubts(SOLID | changed)
    assert found == [] if said is None else len(found) == 1 and found[0].startswith(said)


def test_runs_are_of_one_kind_by_their_settings_and_hidden_folders_are_none(tmp_path: Path) -> None:
    for name, config in (("a", {"x": 1, "y": 2, "z": 3}), ("b", {"x": 1}), (".c.tmp", {"x": 1, "y": 2}), ("me", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    mine = {"x": 0, "y": 0}
    found = runs_before(tmp_path / "me", 100.0, mine, "*/config.json", lambda held: held, lambda path: 1.0)
    assert [path.parent.name for path, _ in found] == ["a"]


def test_nothing_is_written_where_a_dataset_is_only_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the page; test_label_script.py sends a real one."""

    def ends(server: Any, open_browser: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(label.Server, "run", ends)
    for view in (True, False):
        with pytest.raises(KeyboardInterrupt):
            label.main(label.Config(dataset=str(folder), view=view, open=False))
        assert folder.with_name("lift.report.html").exists() is not view
    assert read(folder.with_name("lift.report.html")).cells("What was run")["script"] == "label.py"


@pytest.mark.slow
def test_a_thousand_episodes_are_reported_in_reasonable_time_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # writing them takes long enough
    folder, schema = tmp_path / "many", describe(Preprocess(**SMALL), ["wrist"], 10, 0.02, 0.5)
    writer = DatasetWriter(folder, fps=10, cameras={"wrist": (48, 64)}, task="lift", schema=schema)
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    for _ in range(1000):
        for row in range(3):
            writer.add(np.full(len(STATE), row / 10), np.zeros(len(ACTION)), {"wrist": frame}, capture_time=row / 10)
        writer.save_episode(np.zeros(len(STATE)), {"wrist": frame}, 0.3)
    writer.close()
    began = time.process_time()
    write_dataset_report(folder, "record.py", time.time(), record.Config())
    assert time.process_time() - began < 30
    page, path = read(tmp_path / "many.report.html"), tmp_path / "many.report.html"
    assert path.stat().st_size < 10e6 and len(page.pictures) == STRIPS
    assert f"{STRIPS} of 1000 episodes" in page.words["Episodes in pictures"]
    assert len(page.rows["Episodes in numbers"]) == 1001 and "1000 episodes" in page.words["Episodes in numbers"]
    assert len(open_dataset(folder).episodes) == 1000


@pytest.mark.browser
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_reports_show_whole_from_a_file_and_ask_nobody_for_anything(run: Path, folder: Path) -> None:
    write_run_report(run, configs.load(train_sac.Config, run / "config.json"))
    report_of(folder)
    with Chromium(width=1000) as browser:
        for path in (run / "report.html", folder.with_name("lift.report.html")):
            browser.open(path.as_uri())
            pictures = browser.run("return [...document.images].map(i => [i.complete, i.naturalWidth, i.width])")
            assert pictures and all(done and natural > 0 and shown > 0 for done, natural, shown in pictures)
            asked = browser.run("return performance.getEntriesByType('resource').map(e => e.name.slice(0, 5))")
            assert set(asked) <= {"data:"} and browser.errors() == []
            for width in (1000, 600):
                browser.size(width, 900)
                assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
            assert browser.run("return [...document.querySelectorAll('details')].every(d => !d.open)")

"""Evaluations that are cut short, disturbed or damaged: what was run is kept, and what is wrong is said in words."""

import csv
import json
import os
import re

import numpy as np
import pytest
from test_dataset import file_size_limit
from test_infer import evaluated, loaded, quick, result, run, trained  # noqa: F401  fixtures
from test_record import Scripted

import infer
from so101.data.video import VideoReader, VideoWriter
from so101.env import EnvConfig
from so101.errors import ConfigError, DataError, UserError
from so101.evaluation import Contestant, Evaluation, newest
from so101.film import Film, join_clips
from so101.learn.reward import StateGuard
from so101.reports.evaluation import compared
from so101.rig import RigConfig, open_rig
from so101.robot import teleop
from so101.robot.teleop import EVALUATION, Teleop
from so101.schema import Preprocess, RewardSpec
from so101.sim.world import WorldConfig
from so101.starts import make_starts
from so101.web.live_page import LivePage


def killed(*arguments, **named):
    """Where the process ends."""
    raise KeyboardInterrupt


def told_apart(episodes):
    """What does not depend on when it was run."""
    return [(one.policy, one.start, one.tool, one.steps, one.probability) for one in episodes]


# Cut short


def test_two_programs_are_never_at_one_evaluation(run, monkeypatch, tmp_path):  # noqa: F811
    drive, folder, refused = infer.drive, tmp_path / "mine", []
    begun = infer.Config(run=str(run), episodes=2, output=str(folder))

    def meanwhile(*arguments):
        monkeypatch.setattr(infer, "drive", drive)  # for one that would not be refused
        for other in (infer.Config(run=str(run), output=str(folder), resume=True), begun):
            with pytest.raises(DataError) as error:
                infer.main(other)
            refused.append(str(error.value).removeprefix(f"{folder}: "))
        monkeypatch.setattr(infer, "drive", meanwhile)
        return drive(*arguments)

    monkeypatch.setattr(infer, "drive", meanwhile)
    infer.main(begun)
    exists = "exists and is never overwritten; name another output"
    assert refused[:2] == ["holds no evaluation to go on with; leave resume=true out", exists]
    assert re.match(rf'.*"pid": {os.getpid()}.* is writing to it; stop that first', refused[2]) and refused[3] == exists
    assert [one.start for one in Evaluation.load(folder).episodes] == [1, 2]


def test_a_kill_after_the_last_episode_leaves_what_a_resume_makes_of_it(run, monkeypatch, capsys):  # noqa: F811
    config = infer.Config(run=str(run), episodes=2, video=True)
    with monkeypatch.context() as patch:  # the first thing after the last episode
        patch.setattr(Evaluation, "print", killed)
        with pytest.raises(KeyboardInterrupt):
            infer.main(config)
    folder = newest(run)
    done = Evaluation.load(folder)
    assert done.complete and not (folder / "report.html").exists() and not (folder / "video.mp4").exists()
    (folder / "clips" / "1.mp4").unlink()
    (folder / "report.html").write_text("of an earlier part")
    os.utime(folder / "report.html", (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(infer, "open_rig", None)  # no arm is moved for it
        infer.main(infer.Config(run=str(run), resume=True))
    said = capsys.readouterr().out
    assert f"{folder}: every episode was run; what is missing of its report and video is made now" in said
    assert f"report: {folder / 'report.html'}" in said and "0 of 2 succeed" in said
    assert "0 of 2 succeed" in (folder / "report.html").read_text()
    assert VideoReader(folder / "video.mp4").times.size == 7 + 10 and not (folder / "clips").exists()
    assert Evaluation.load(folder) == done
    with pytest.raises(DataError, match="001: is complete; leave resume=true out"):
        infer.main(infer.Config(run=str(run), resume=True))


@pytest.mark.parametrize("instant", ["os.replace", "os.rename", "shutil.rmtree"])
def test_a_kill_while_the_clips_are_joined_or_taken_away_loses_no_picture(tmp_path, monkeypatch, instant):
    (tmp_path / "clips").mkdir()
    for name, count in (("1", 4), ("2", 3)):
        writer = VideoWriter(tmp_path / "clips" / f"{name}.mp4", 10.0, 48, 64)
        for _ in range(count):
            writer.add(np.zeros((48, 64, 3), np.uint8))
        writer.close()
    with monkeypatch.context() as patch:
        patch.setattr(f"so101.film.{instant}", killed)
        with pytest.raises(KeyboardInterrupt):
            join_clips(tmp_path, ["1", "2"], True)
    for _ in range(2):
        join_clips(tmp_path, ["1", "2"], True)
        assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
        assert VideoReader(tmp_path / "video.mp4").times.size == 4 + 3


def test_an_episode_taken_out_by_hand_is_the_one_that_a_resume_runs(run):  # noqa: F811
    infer.main(infer.Config(run=str(run), episodes=2))
    folder = newest(run)
    first, second = Evaluation.load(folder).episodes
    written = json.loads((folder / "eval.json").read_text())
    assert written["complete"] and written["episodes"].pop(0)["start"] == 1
    (folder / "eval.json").write_text(json.dumps(written))
    infer.main(infer.Config(run=str(run), resume=True))
    assert told_apart(Evaluation.load(folder).episodes) == told_apart([second, first])


@pytest.mark.parametrize("instant", ["drive", "keep"])
def test_a_disk_that_fills_up_in_the_first_episode_leaves_nothing_behind(run, monkeypatch, instant):  # noqa: F811
    owner = Film if instant == "keep" else infer
    usual, limit = getattr(owner, instant), file_size_limit(1000)

    def full(*arguments):
        done = usual(*arguments) if instant == "keep" else None  # its pictures are there, eval.json is not
        limit.__enter__()
        return done if instant == "keep" else usual(*arguments)

    monkeypatch.setattr(owner, instant, full)
    try:
        with pytest.raises((OSError, UserError), match="File too large"):
            infer.main(infer.Config(run=str(run), episodes=2, video=instant != "keep"))
    finally:
        limit.__exit__(None, None, None)
    assert list((run / "evaluations").iterdir()) == []


# Damaged, or meant otherwise


def stored(folder, seed=1):
    """An evaluation of two episodes in a folder."""
    starts = make_starts("home", [3, 3], 2, seed, EnvConfig(), WorldConfig())
    episodes = [result("A", 1, True, 9), result("A", 2, False, 30)]
    done = Evaluation({}, {"A": Contestant("run", "10", 1, "")}, "starts: home", starts, episodes=episodes)
    folder.mkdir(parents=True)
    done.save(folder)
    return done


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "{}", "001/eval.json: config is missing"),
        (lambda text: text[: len(text) // 2], "001/eval.json: no usable JSON"),
        (lambda text: re.sub(r'"policies": \{.*?\}\s+\},', '"policies": {},', text, count=1, flags=re.S),
         "001/eval.json: policies: got none, the first is called A"),
        (lambda text: text.replace('"start": 2', '"start": "two"'), "001/eval.json: episodes"),
        (lambda text: re.sub(r'"policy": "A",\s+"start": 2', '"policy": "A", "start": 7', text),
         "001/eval.json: episodes: has policy A start 7, none of its turns"),
        (lambda text: re.sub(r'("ended".*?)?"object": \[[^]]*\],(\s+"steps")', r'"object": [],\2', text, count=1),
         "object: got [], must be three numbers"),
        # what follows from the episodes is worked out, not believed
        (lambda text: re.sub(r'"summary": .*', '"summary": {}}', text, flags=re.S), "both succeed on 1"),
        (lambda text: text.replace('"interval"', '"interwal"').replace('"complete": true', '"complete": false'),
         "both succeed on 1"),
    ],
)  # fmt: skip
def test_an_earlier_evaluation_that_is_damaged_is_told_of(tmp_path, damage, said):
    places = [tmp_path / "evaluations" / name for name in ("001", "002")]
    done = [stored(place) for place in places][1]
    text = (places[0] / "eval.json").read_text()
    assert damage(text) != text
    (places[0] / "eval.json").write_text(damage(text))
    assert said in compared(places[1], tmp_path, done)[1]


@pytest.mark.parametrize("name", ["/path/to/run", "outputs/other", "other", "", "a:b:", "C:\\runs\\other"])
def test_a_checkpoint_that_is_none_is_answered_with_what_to_write(run, name):  # noqa: F811
    with pytest.raises(ConfigError, match="must be last, best or a number; for one of another run write") as error:
        infer.prepare(infer.Config(run=str(run), against=name), infer.Trained.of(run))
    if ":" not in name and name:
        assert str(error.value).endswith(f"write its folder and a colon before that: against={name}:last")


# What the person does, and is told


def test_a_pause_in_the_reset_changes_no_bit_of_the_episode_after_it():
    seen = []
    for keys in ({}, {(1, 1): "pause", (1, 51): "pause"}):
        with open_rig(RigConfig(), 3) as rig:
            rig.teleop.keys = Scripted(rig.teleop.keys, keys, announced=(EVALUATION,))
            env = rig.make_env(EnvConfig(), Preprocess(), RewardSpec(), 3)
            rig.start_over(7)
            rig.teleop.hear(EVALUATION)
            observed = [env.reset(start=np.array([0.255, 0.004, 0.073]))[0]]
            seen.append(observed + [env.step(np.array([0.3, -0.2, -0.5, 0.1])).observation for _ in range(3)])
    assert seen[1][0].time - seen[0][0].time == pytest.approx(5.0)
    for one, other in zip(*seen, strict=True):
        assert np.array_equal(one.state, other.state)
        assert np.array_equal(one.frames["wrist"], other.frames["wrist"])


def test_on_a_real_arm_the_place_is_told_last_and_p_is_waited_for(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(teleop, "PLACE_S", 30.0)
    held, place_object = [], Teleop.place_object

    def timed(self, clock, *more):
        began = clock.now()
        pressed = place_object(self, clock, *more)
        held.append((began, clock.now()))
        return pressed

    monkeypatch.setattr(Teleop, "place_object", timed)
    # a look each 0.1 s: p after 2 s in the second reset, with f for the episode before
    keys = {(2, 10): "failure", (2, 21): "pause", (3, 15): "quit"}
    evaluation, person, film, _ = evaluated(run, 4, keys, real=True, says=0.9)
    waits = [round(ended - began, 6) for began, ended in held]
    assert waits == [30.0, 2.0, 1.4]
    for (_, ended), (_, observation) in zip(held, film.seen, strict=False):
        assert observation.time >= ended  # it shows the object where it was put
    assert [one.person for one in evaluation.episodes] == [False, None]
    for number, said in enumerate(("the policy starts", "goes on"), 1):
        at = next(n for n, words in enumerate(person.heard) if f"(start {number} of 4)" in words)
        assert person.heard[at].startswith("place the object 0.2") and "; press p when it is there" in person.heard[at]
        assert person.heard[at + 1] == said  # nothing is said that hides it


def test_what_the_guard_vetoes_is_counted_and_said(run, monkeypatch, capsys):  # noqa: F811
    detector = loaded((run / "config.json").resolve().parent, None)["A"].eyes.detector
    monkeypatch.setattr(detector, "guard", StateGuard((0.5, 0.6), (0.0, 1.0)))  # m: nowhere near
    evaluation, *_ = evaluated(run, 1, says=0.9)
    (only,) = evaluation.episodes
    assert (only.classifier, only.vetoed) == (False, len(only.probability)) == (False, 6)
    assert evaluation.rows("A")[0][5] == "no (6 vetoed)"
    assert any("that the guard vetoed: 6, episode 1; height or opening" in line for line in evaluation.sentences())
    evaluation.save(run)
    assert next(csv.DictReader((run / "eval.csv").read_text().splitlines()))["vetoed"] == "6"
    monkeypatch.setattr(detector, "guard", None)
    evaluation, *_ = evaluated(run, 1, says=0.9)
    assert evaluation.episodes[0].vetoed == 0 and evaluation.rows("A")[0][5] == "yes"


def test_the_evaluation_after_a_training_is_on_the_page_of_the_training(run, capsys):  # noqa: F811
    page = LivePage("train_sac")
    infer.main(infer.Config(run=str(run), episodes=2), page)
    assert "http://" not in capsys.readouterr().out and not page._closed
    shown = page._copy(0, 0)
    assert shown["facts"]["label"] == "evaluate" and shown["facts"]["done"] == 2
    assert len(shown["outcomes"]) == 1 and shown["threshold"] == 0.5  # of the second the last word is not known

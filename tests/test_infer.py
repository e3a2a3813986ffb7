"""Evaluation: the same starts for everybody, three judges, two policies compared, and nothing lost on the way.

The runs here hold policies and a classifier that learned nothing: what is tested is how they are judged.
"""

import csv
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_record import FaultyCamera, Scripted

import infer
import train_sac
from so101 import config as configs
from so101.data.video import VideoReader
from so101.env import EnvConfig
from so101.errors import ConfigError, DataError
from so101.evaluation import LATE, Contestant, Evaluation, Judges, Pairs, Result, all_of, begin, newest
from so101.film import PANEL_PX, Film, join_clips
from so101.learn.checkpoint import save_checkpoint
from so101.learn.resnet10 import load_resnet10, trunk_hash
from so101.learn.reward import SuccessClassifier, SuccessDetector, save_reward
from so101.learn.sac import Sac
from so101.reports.evaluation import compared
from so101.rig import WorldVerdict, open_rig
from so101.robot import teleop
from so101.runlog import mcnemar, paired_interval
from so101.schema import Preprocess
from so101.sim.world import WorldConfig
from so101.starts import make_starts, where

ROOT = Path(__file__).parent.parent
WORLD = WorldConfig()


def make_run(folder, seed=0, **env):
    """A run folder with two checkpoints, as train_sac.py leaves it, but for what nobody evaluates."""
    torch.manual_seed(seed)
    config = train_sac.Config(
        output=str(folder), env=EnvConfig(**{"control_time_s": 0.6, "reset_time_s": 0.2, **env}),
        preprocess=Preprocess(image_size=32),
    )  # fmt: skip
    config.rig.follower.rest = [0.0, 0.1, -0.2, 1.57, 1.57, 0.05]  # near home: a reset is soon done
    folder.mkdir()
    configs.save(config, folder / "config.json")
    known = trunk_hash(trunk(None))
    detector = SuccessDetector(SuccessClassifier(size=1), 0.5, None, 3)
    save_reward(folder / "reward", detector, config.schema(), known, {})
    for step in (10, 20):
        tensors = Sac(config.sac, 1, size=1).tensors()
        save_checkpoint(folder, step, tensors, {}, configs.to_dict(config), config.schema(), known)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One trunk for all, less time to place and to judge the last: each costs more than an episode here."""
    monkeypatch.setattr("so101.learn.eyes.load_resnet10", trunk)
    monkeypatch.setattr("infer.VERDICT_S", 1.0)
    monkeypatch.setattr("so101.robot.teleop.PLACE_S", 0.1)


@functools.cache
def trunk(path):
    return load_resnet10(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def run(trained, tmp_path):
    """The same run for each test, with no evaluation in it."""
    folder = tmp_path / "run"
    folder.mkdir()
    for part in trained.iterdir():
        (folder / part.name).symlink_to(part)
    return folder


class First:
    """Stands where a Film would, and keeps the first observation of each episode that began: (title, observation)."""

    def __init__(self):
        self.seen, self.kept = [], []

    def begin(self, episode, title):
        self.title = title

    def add(self, observation, step, driver):
        if step is None:
            self.seen.append((self.title, observation))

    def keep(self, name, verdict, success):
        self.kept.append((name, verdict))


@functools.cache
def loaded(run, against):
    trained, drivers = infer.Trained.of(run), {}
    for name, it in infer.prepare(infer.Config(run=str(run), against=against), trained).policies.items():
        drivers[name] = infer.load_driver(run, trained, it, drivers.get("A"))
    return drivers


def evaluated(run, episodes=2, keys=None, camera_fails_at=(), real=False, against=None, says=None, **settings):
    """An evaluation on an open rig, with a person's keys, camera faults and a classifier as told."""
    config = infer.Config(run=str(run), episodes=episodes, against=against, **settings)
    trained = infer.Trained.of(run)
    evaluation = infer.prepare(config, trained)
    drivers = loaded((run / "config.json").resolve().parent, against)
    eyes, film, states = drivers["A"].eyes, First(), []
    eyes.detector.probability = SuccessDetector.probability.__get__(eyes.detector)
    if says is not None:
        eyes.detector.probability = lambda features: says
    with open_rig(trained.rig, config.seed) as rig:
        person = Scripted(rig.teleop.keys, keys or {}, announced=(teleop.EVALUATION,))
        rig.teleop.keys = person
        if camera_fails_at:
            camera = rig.cameras["wrist"]

            class Failing(FaultyCamera):
                def latest(self):
                    super().latest()
                    return camera.latest()

            rig.cameras = {"wrist": Failing(camera_fails_at, (2, 2))}
        env = rig.make_env(trained.env, trained.preprocess, trained.reward, config.seed)
        if real:
            rig.verdict = None
        judges = Judges(eyes, rig.verdict)

        def keep():
            states.append(len(evaluation.episodes))

        infer.evaluate(env, rig, drivers, judges, evaluation, 0.0, keep, film)
    return evaluation, person, film, states


# Where it starts


def test_a_start_has_its_own_seed_so_more_episodes_change_none_of_the_first():
    env = EnvConfig()
    few, many = (make_starts("random", [3, 3], count, 7, env, WORLD) for count in (5, 50))
    assert many[:5] == few and len({start.seed for start in many}) == 50
    tools = np.array([start.tool for start in many])
    reach = [env.random_ee_range_xy] * 2 + [env.random_ee_range_z]
    assert (np.abs(tools - env.home) <= reach).all() and (tools.std(axis=0) > np.array(reach) / 3).all()
    assert make_starts("random", [3, 3], 5, 8, env, WORLD)[0] != few[0]
    objects = np.array([start.object for start in many])
    assert (np.abs(objects - [0.25, 0.0, 0.0]) <= [0.03, 0.03, 0.2]).all() and objects.std(axis=0).min() > 0.01
    assert make_starts("trained", [3, 3], 5, 7, env, WORLD) == few
    env.random_ee_reset = False
    at_home = make_starts("trained", [3, 3], None, 7, env, WORLD)
    assert len(at_home) == 50 and {tuple(start.tool) for start in at_home} == {(0.25, 0.0, 0.07)}


def test_a_grid_is_even_over_the_random_range_and_repeats_in_new_scenes():
    env = EnvConfig(random_ee_range_xy=0.02, random_ee_range_z=0.01)
    grid = make_starts("grid", [3, 2], 12, 0, env, WORLD)
    places = [[0.23, -0.02, 0.07], [0.23, 0.02, 0.07], [0.25, -0.02, 0.07], [0.25, 0.02, 0.07],
              [0.27, -0.02, 0.07], [0.27, 0.02, 0.07]]  # fmt: skip
    assert np.allclose([start.tool for start in grid], places + places)
    assert len({start.seed for start in grid}) == 12
    heights = [start.tool for start in make_starts("grid", [1, 1, 3], None, 0, env, WORLD)]
    assert np.allclose(heights, [[0.25, 0.0, 0.06], [0.25, 0.0, 0.07], [0.25, 0.0, 0.08]])
    with pytest.raises(ConfigError, match="episodes: got 7, but grid has 6 starts; a multiple"):
        make_starts("grid", [3, 2], 7, 0, env, WORLD)
    with pytest.raises(ConfigError, match="two of its places fall together"):
        make_starts("grid", [3, 2], None, 0, EnvConfig(random_ee_range_xy=0.0), WORLD)


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("[[0.25, 0, 0.07], [0.4, 0, 0.07]]", r"entry 2: got \[0.4, 0.0, 0.07\], must lie inside the workspace"),
        ("[[0.25, 0, 0.001]]", r"entry 1: got \[0.25, 0.0, 0.001\], must lie inside"),  # the fingertips in the table
        ("[[0.34, 0.14, 0.24]]", "entry 1: .*must be reached with the gripper down"),
        ("[[0.25, 0, 0.07], [0.25, 0]]", r"entry 2: got \[0.25, 0\], must be \[x, y, z\] in metres"),
        ("[[0.25, true, 0.07]]", "entry 1"),
        ("[[0.25, NaN, 0.07]]", "entry 1"),
        ("[]", "must hold a list of tool positions"),
        ("{}", "must hold a list of tool positions"),
        ("[[", "no usable JSON"),
    ],
)
def test_a_list_that_cannot_be_run_is_refused_by_entry(tmp_path, listed, said):
    path = tmp_path / "starts.json"
    path.write_text(listed)
    with pytest.raises(ConfigError, match=said):
        make_starts(str(path), [3, 3], None, 0, EnvConfig(), WORLD)


def test_a_list_is_run_as_listed(tmp_path):
    path = tmp_path / "starts.json"
    path.write_text("[[0.25, 0.01, 0.07], [0.2, -0.05, 0.1]]")
    starts = make_starts(str(path), [3, 3], 4, 0, EnvConfig(), WORLD)
    assert [start.tool for start in starts] == [[0.25, 0.01, 0.07], [0.2, -0.05, 0.1]] * 2
    with pytest.raises(ConfigError, match="nowhere.json cannot be read: No such file"):
        make_starts("nowhere.json", [3, 3], 4, 0, EnvConfig(), WORLD)


def test_the_cue_says_where_to_place_the_object():
    (start,) = make_starts("home", [3, 3], 1, 0, EnvConfig(), WORLD)
    asked = where(type(start)(3, 0, [0.25, 0, 0.07], [0.262, -0.013, 0.1]), 9)
    # 0.1 rad are 5.7 degrees; y and yaw are positive to the left
    assert asked == "0.262 m ahead of the base, 0.013 m to its right, turned 6 degrees to the left (start 3 of 9)"


def test_every_policy_and_every_evaluation_meets_the_same_first_observation_bit_for_bit(run):
    """Whatever happened before: a lost picture, an episode done again, another policy's pushing about."""
    clean, _, film, _ = evaluated(run, 3, against="10")
    # the picture is lost in the reset of the second turn and in its third step; r in the fourth turn; f after it
    disturbed, _, other, _ = evaluated(run, 3, {(5, 3): "redo"}, {9, 13}, against="10")
    assert disturbed.again == {"aborted": 2, "dropped by the person": 1} and len(disturbed.episodes) == 6
    scenes = {}
    for start, (_, observation) in zip((1, 1, 2, 2, 3, 3), film.seen, strict=True):
        scenes.setdefault(start, observation)
        assert np.array_equal(observation.state, scenes[start].state)
        assert np.array_equal(observation.frames["wrist"], scenes[start].frames["wrist"])
    pictures = [observation.frames["wrist"] for observation in scenes.values()]
    assert not np.array_equal(pictures[0], pictures[1])
    assert len(other.seen) > 6
    for _, observation in other.seen:
        assert any(
            np.array_equal(observation.state, known.state)
            and np.array_equal(observation.frames["wrist"], known.frames["wrist"])
            for known in scenes.values()
        )
    told = [[(r.policy, r.start, r.tool, r.object, r.probability) for r in one.episodes] for one in (clean, disturbed)]
    assert told[0] == told[1]
    # the policies take turns in being the first
    assert [(r.policy, r.start) for r in clean.episodes] == [("A", 1), ("B", 1), ("B", 2), ("A", 2), ("A", 3), ("B", 3)]
    assert clean.of("A")[0].probability != clean.of("B")[0].probability  # and are two


# Who judges


class Says:
    """A judge of a script: True at its steps, counted from 1."""

    def __init__(self, *at, probability=0.25):
        self.at, self.steps, self.probability, self.vetoed = at, 0, probability, False

    def reset(self):
        self.steps = 0

    def update(self, observation):
        self.steps += 1
        return self.steps in self.at


@pytest.mark.parametrize(
    ("world", "classifier", "ends", "verdicts"),
    [
        ((4,), (6,), 6, (4, 6)),  # the classifier votes two frames later: it is heard
        ((4,), (), 4 + LATE, (4, None)),  # it never does
        ((4,), (2,), 4, (4, 2)),  # it was early, and the world ends it
        ((), (2,), None, (None, 2)),  # it is wrong, and the episode goes on
        (None, (3, 5), 3, (None, 3)),  # a real arm: it ends the episode
    ],
)
def test_each_judge_says_when(world, classifier, ends, verdicts):
    judges = Judges(Says(*classifier), None if world is None else Says(*world))
    for _ in range(2):  # nothing is left of an episode before
        judges.reset()
        over = [judges.update(None) for _ in range(12)]
        assert (over.index(True) + 1 if any(over) else None) == ends
        assert (judges.world_at, judges.classifier_at) == verdicts
        assert judges.probability == [0.25] * 12


def test_where_the_classifier_judges_it_counts_each_frame_once(run):
    evaluation, person, _, _ = evaluated(run, 1, real=True, says=0.9)
    (result,) = evaluation.episodes
    assert (result.steps, result.reward, result.success) == (3, 1.0, True)  # three frames in a row make the vote
    assert (result.world, result.classifier, result.person, result.ended) == (None, True, None, "success")
    assert result.probability == [0.9] * 3
    assert any(said.startswith("place the object 0.2") for said in person.heard)


def test_a_person_judges_in_the_episode_in_the_reset_and_after_the_last(run):
    """f while the arm resets after the first, s in the second, f in the third's hold at the end."""
    keys = {(2, 1): "failure", (2, 4): "success", (3, 6): "failure"}
    evaluation, person, _, saved = evaluated(run, 3, keys, real=True, says=0.9)
    assert [r.classifier for r in evaluation.episodes] == [True, False, True]  # two frames are no vote
    assert [r.person for r in evaluation.episodes] == [False, True, False]
    assert [r.success for r in evaluation.episodes] == [False, True, False]
    assert evaluation.episodes[1].ended == "the success key"
    assert saved == [1, 1, 2, 3, 3]  # each verdict is kept at once
    assert person.heard[-1].startswith("that was the last episode: press s or f")
    evaluation.save(Path(run))
    assert evaluation.judge == "the person"
    assert evaluation.agreement() == ["classifier and person agree in 0 of 3; not in 1, 2, 3"]
    figures = json.loads((run / "eval.json").read_text())["summary"]["policies"]["A"]
    assert figures["successes"] == 1 and figures["classifier"] == {"said": 3, "success": 2}


def test_without_a_word_of_the_person_it_is_the_classifiers_and_that_is_said(run):
    evaluation, _, _, _ = evaluated(run, 2, {(2, 1): "failure"}, real=True, says=0.9)
    evaluation.save(Path(run))
    assert evaluation.judge == "the classifier, and the person in 1 of 2"
    assert [r.success for r in evaluation.episodes] == [False, True]


def test_the_world_overrules_a_person_who_is_shown_beside_it(run):
    evaluation, _, _, _ = evaluated(run, 1, {(1, 4): "success"})
    (result,) = evaluation.episodes
    assert (result.world, result.person, result.success) == (False, True, False)


def test_r_in_the_reset_takes_the_episode_out_and_runs_it_again(run):
    evaluation, _, film, saved = evaluated(run, 2, {(2, 1): "redo", (3, 10): "redo"})
    assert [r.start for r in evaluation.episodes] == [1, 2] and saved[1] == 0
    assert evaluation.again == {"dropped by the person": 1}
    assert [name for name, _ in film.kept] == ["1", "1", "2"]


def test_an_episode_in_which_a_person_took_over_is_not_the_policys(run):
    evaluation, person, _, _ = evaluated(run, 1, {(1, 3): "intervene"})
    assert evaluation.again == {"taken over": 1} and len(evaluation.episodes) == 1
    assert "episode dropped: a person took over, so it is not the policy's; it is run again" in person.heard
    evaluation.save(Path(run))
    assert "run again: 1 taken over" in evaluation.sentences()


def test_q_ends_it_and_the_episode_cut_off_is_no_failure(run):
    evaluation, _, _, _ = evaluated(run, 5, {(2, 4): "quit"})
    evaluation.save(Path(run))
    assert len(evaluation.episodes) == 1 and not evaluation.complete
    assert "PARTIAL: 1 of 5 episodes; resume=true goes on with the rest" in evaluation.sentences()


# Two policies


def test_mcnemar_by_hand():
    # 6 starts on which one alone succeeds, split 1 to 5: 2 * (1 + 6) / 64
    assert mcnemar(1, 5) == mcnemar(5, 1) == 0.21875
    assert mcnemar(0, 9) == 2 / 512
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0  # 2 * 42 / 64 is no probability
    assert mcnemar(0, 5) == 0.0625  # five starts can never be enough


def test_paired_interval_against_published_values_and_by_its_coverage():
    # M. Cavo et al., Blood 120 (2012), as in Fagerland, Lydersen and Laake's book of tables, chapter 8
    assert paired_interval(59, 6, 16, 80) == pytest.approx((-0.1186, -0.0046), abs=1e-4)
    low, high = paired_interval(59, 16, 6, 80)
    assert (low, high) == pytest.approx((0.0046, 0.1186), abs=1e-4)
    assert paired_interval(0, 0, 0, 0) == (-1.0, 1.0)
    low, high = paired_interval(9, 0, 0, 0)
    assert low == -high and 0.25 < high < 0.35
    # every table of 12 starts, for policies that succeed with 0.8 and 0.5, as if by two coins
    chances, n, covered = np.array([0.4, 0.4, 0.1, 0.1]), 12, 0.0
    for table in itertools.product(range(n + 1), repeat=3):
        if (last := n - sum(table)) >= 0:
            counts = np.array([*table, last])
            ways = multinomial(counts)
            low, high = paired_interval(*counts.tolist())
            covered += ways * float(np.prod(chances**counts)) * (low <= 0.3 <= high)
    assert 0.94 < covered < 0.99


def multinomial(counts):
    """In how many orders the outcomes can come."""
    ways = math.factorial(int(counts.sum()))
    for count in counts:
        ways //= math.factorial(int(count))
    return ways


def result(policy, start, success, steps):
    return Result(policy, start, [0.25, 0.0, 0.07], [0.25, 0.0, 0.0], steps, float(success), success, success, success,
                  None, "success" if success else "time out", 1.0, 0.0, [0.5])  # fmt: skip


def test_two_policies_are_compared_start_by_start():
    a = [result("A", n, won, 10) for n, won in enumerate([True, True, True, True, False, False], 1)]
    b = [result("B", n, won, 14 - n) for n, won in enumerate([True, True, False, False, True, False], 1)]
    pairs = Pairs.of(a, b)
    assert pairs == (2, 2, 1, 1, [(10, 13), (10, 12)]) and pairs.starts == 6
    said = pairs.sentences("A", "B")
    assert said[0] == "A against B on 6 starts: both succeed on 2, A alone on 2, B alone on 1, neither on 1"
    assert "difference in success +17%" in said[1] and "p = 1: chance alone may well do that" in said[1]
    assert said[2] == "where both succeed A takes 10.0 steps and B 12.5; A is quicker on 2 of these 2 starts, B on 0"
    starts = make_starts("home", [3, 3], 6, 0, EnvConfig(), WORLD)
    policies = {name: Contestant("run", name, 1, "") for name in "AB"}
    evaluation = Evaluation({}, policies, "", starts, episodes=[*b[2:], *a[:5]])  # cut short: 3, 4 and 5 are shared
    assert evaluation.pairs() == (0, 2, 1, 0, [])


def test_against_another_run_or_checkpoint(run, tmp_path, capsys):
    other = make_run(tmp_path / "other", seed=3)
    infer.main(infer.Config(run=str(run), against=f"{other}:10", episodes=1, checkpoint="10"))
    done = Evaluation.load(newest(run))
    assert [it.run for it in done.policies.values()] == [str(run), str(other)]
    assert done.policies["A"].checkpoint == done.policies["B"].checkpoint == "000010"
    assert done.policies["A"].sha256 != done.policies["B"].sha256
    assert re.search(r"B: checkpoint 000010 of \S+other, random_ee_reset: true \(1 episodes\)", capsys.readouterr().out)
    longer = make_run(tmp_path / "longer", control_time_s=0.8)
    with pytest.raises(ConfigError, match="against: .*longer was trained with another env: control_time_s 0.8 th"):
        infer.main(infer.Config(run=str(run), against=f"{longer}:last", episodes=1))
    with pytest.raises(DataError, match="000099: is not there; checkpoints of this run: 000010, 000020, or last"):
        infer.main(infer.Config(run=str(run), against="99", episodes=1))
    assert len(all_of(run)) == 1


# What is left behind


def test_the_table_is_the_seeds_and_every_judge_is_shown(run, capsys):
    infer.main(infer.Config(run=str(run), episodes=2))
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if "random_ee_reset: true (2 episodes)" in line)
    assert lines[at + 1].split()[:7] == ["episode", "steps", "reward", "result", "world", "classifier", "person"]
    assert re.match(r" +1 +6 +[01]\.00 +FAIL +no +(yes|no) +- +0\.2", lines[at + 3])
    assert any(re.search(r"0 of 2 succeed = 0% \(95 % interval 0% \.\. 66%\), judged by the world", x) for x in lines)
    assert any(line.startswith("world and classifier agree in ") for line in lines)
    folder = newest(run)
    rows = list(csv.DictReader((folder / "eval.csv").read_text().splitlines()))
    assert [row["start"] for row in rows] == ["1", "2"] and rows[0]["success"] == rows[0]["world"] == "0"
    assert rows[0]["person"] == "" and rows[0]["ended"] == "time out" and rows[0]["steps"] == "6"
    done = json.loads((folder / "eval.json").read_text())
    assert done["complete"] and done["judge"] == "the world" and done["policies"]["A"]["step"] == 20
    assert [float(rows[0][f"tool_{x}"]) for x in "xyz"] == pytest.approx(done["episodes"][0]["tool"], abs=1e-4)
    assert np.abs(np.array(done["episodes"][0]["tool"]) - done["starts"][0]["tool"]).max() < 2e-3


def test_what_was_evaluated_is_never_overwritten(run, tmp_path):
    for number in range(1, 4):  # two at a time, or one that was stopped before its first episode
        assert begin(run, None) == run / "evaluations" / f"{number:03d}"
    for name in ("1000", "999"):
        (run / "evaluations" / name).mkdir()
        (run / "evaluations" / name / "eval.json").write_text("{}")
    assert newest(run).name == "1000"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "eval.json").write_text("precious")
    with pytest.raises(DataError, match="mine: exists and is never overwritten; name another output"):
        infer.main(infer.Config(run=str(run), episodes=1, output=str(mine)))
    assert (mine / "eval.json").read_text() == "precious" and len(all_of(run)) == 2
    infer.main(infer.Config(run=str(run), episodes=1, output=str(tmp_path / "new")))
    assert len(Evaluation.load(tmp_path / "new").episodes) == 1 and len(all_of(run)) == 2
    # and one that is damaged does not stand in the way of the report
    assert "1000/eval.json: config is missing" in (tmp_path / "new" / "report.html").read_text()


def test_a_cut_short_evaluation_says_so_and_resumes_to_what_it_would_have_been(run, tmp_path, monkeypatch, capsys):
    config = infer.Config(run=str(run), episodes=2, against="10")
    infer.main(config)
    whole = Evaluation.load(newest(run))
    drive, driven = infer.drive, []

    def cut_short(*arguments):
        driven.append(1)
        if len(driven) == 3:
            raise KeyboardInterrupt
        return drive(*arguments)

    monkeypatch.setattr(infer, "drive", cut_short)
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        infer.main(config)
    assert "PARTIAL: 2 of 4 episodes" in capsys.readouterr().out
    folder = newest(run)
    assert folder.name == "002" and not Evaluation.load(folder).complete
    assert "How it went so far" in (folder / "report.html").read_text()
    assert len((folder / "eval.csv").read_text().splitlines()) == 3
    infer.main(infer.Config(run=str(run), resume=True))
    resumed = Evaluation.load(folder)
    assert newest(run) == folder and resumed.complete and len(driven) == 3 + 2
    for one, other in zip(whole.episodes, resumed.episodes, strict=True):
        one.time = other.time = 0.0
        assert one == other
    with pytest.raises(DataError, match="002: is complete; leave resume=true out"):
        infer.main(infer.Config(run=str(run), resume=True))


def test_what_never_had_an_episode_leaves_nothing(run, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "drive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        infer.main(infer.Config(run=str(run), episodes=1))
    assert list((run / "evaluations").iterdir()) == []
    with pytest.raises(DataError, match="holds no evaluation to go on with"):
        infer.main(infer.Config(run=str(run), resume=True))


@pytest.mark.slow
def test_a_kill_at_any_instant_loses_only_the_episode_in_progress(trained, run):
    infer_py = [sys.executable, "infer.py", f"run={run}"]
    command = [*infer_py, "episodes=20", "video=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    had = 0
    for instant in (0.3, 0.8):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while newest(run) is None or len(Evaluation.load(newest(run)).episodes) <= had:
            time.sleep(0.005)
            assert process.poll() is None
        time.sleep(instant)
        process.send_signal(signal.SIGKILL)
        process.wait()
        partial = Evaluation.load(newest(run))
        assert had < len(partial.episodes) < 20 and not partial.complete
        had = len(partial.episodes)
        for result in partial.episodes:
            assert VideoReader(newest(run) / "clips" / f"{partial.name(result)}.mp4").times.size == 17
        command = [*infer_py, "resume=true"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert len(Evaluation.load(newest(run)).episodes) == 20 and len(all_of(run)) == 1
    # its video is of all twenty: 7 pictures each, and a second of the verdict
    assert VideoReader(newest(run) / "video.mp4").times.size == 20 * (7 + 10)
    left = {path.name for path in newest(run).iterdir() if path.name[0] != "."}  # but for half a file of the kill
    assert left == {"eval.csv", "eval.json", "frames", "report.html", "video.mp4"}


def test_the_video_shows_the_episodes_that_count_with_action_judges_and_verdict(tmp_path):
    judges = Judges(Says(2, probability=0.75), Says(2))
    preprocess = Preprocess()
    film = Film(tmp_path, judges, 0.5, preprocess, 10.0, 4, video=True, may_wait=True)
    frame = np.full((240, 320, 3), 128, np.uint8)

    class Seen:
        frames = {"wrist": frame, "side": frame}

    class Moved:
        action = np.array([0.0, -1.0, 1.0, 0.5])

    for name, counts in (("1A", True), ("1B", False), ("2A", True)):
        film.begin("episode", "checkpoint")
        judges.reset()
        film.add(Seen, None, "policy")
        for _ in range(3):
            judges.update(None)
            film.add(Seen, Moved, "policy")
        film.keep(name, "SUCCESS", True) if counts else film.drop()
    join_clips(tmp_path, ["1A", "2A"], True)
    pictures = list(VideoReader(tmp_path / "video.mp4").frames())
    assert len(pictures) == 2 * (4 + 10) and pictures[0].shape == (480, 2 * 640 + PANEL_PX, 3)
    before, during, verdict = (pictures[index][:, -PANEL_PX:].astype(int) for index in (0, 3, 9))
    banner = verdict[445:475, 250:310].reshape(-1, 3).mean(axis=0)
    assert banner[1] > 150 > banner[0]  # green
    # the bar of z (from 246 px down) is full to the right of its middle, that of y (218) to the left
    blue = (during[:, :, 2] - during[:, :, 0]) > 80
    assert blue[255, 190:250].mean() > 0.9 and blue[255, 110:170].mean() < 0.1
    assert blue[227, 110:170].mean() > 0.9 and blue[227, 190:250].mean() < 0.1
    green = (during[:, :, 1] - during[:, :, 0]) > 60
    filled = green[352, 16:304]
    assert filled[:200].mean() > 0.9 and filled[230:].mean() < 0.1  # 0.75 of 288 px is 216, above the threshold
    assert not ((before[:, :, 1] - before[:, :, 0]) > 60)[352, 16:304].any()  # nothing was judged yet
    strip = cv2.imread(str(tmp_path / "frames" / "1A.jpg"))
    assert strip.shape[0] == 72 and strip.shape[1] == 4 * 2 * 96 + 3 * 2


def test_the_report_needs_no_other_file_and_tells_what_changed(run, monkeypatch):
    monkeypatch.setattr(WorldVerdict, "update", lambda self, observation: self.world.cube_position[1] > 0)
    infer.main(infer.Config(run=str(run), episodes=4, checkpoint="10"))
    monkeypatch.setattr(WorldVerdict, "update", lambda self, observation: True)
    infer.main(infer.Config(run=str(run), episodes=4, checkpoint="20"))
    before, now = (Evaluation.load(folder) for folder in all_of(run))
    won = sum(result.success for result in before.episodes)
    assert 0 < won < 4 and all(result.success and result.steps == 1 for result in now.episodes)
    text = (newest(run) / "report.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 4 and text.count("<polyline") == 4
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "http" not in text.replace("http://www.w3.org", "")
    assert f"A of 002 against A of 001 on 4 starts: both succeed on {won}, A of 002 alone on {4 - won}" in text
    assert "<td>checkpoint</td><td>10</td><td>20</td>" in text  # the setting that changed
    now.starts = make_starts("random", [3, 3], 6, 3, EnvConfig(), WORLD)  # of another seed
    assert "no start in common" in compared(newest(run), run, now)[1]

"""Each script's main on a tiny simulated rig, and as a process from the command line: the whole loop runs."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_record import FaultyCamera, Scripted

import infer
import record
import train_reward
import train_sac
from so101 import config as configs
from so101.data.dataset import open_dataset
from so101.data.labels import Labels, labels_path
from so101.errors import ConfigError, DataError
from so101.evaluation import Contestant, Evaluation, Judges, all_of, newest
from so101.learn.checkpoint import find_checkpoint, load_checkpoint
from so101.learn.link import Link
from so101.learn.reward import RewardConfig
from so101.learn.sac import SacConfig
from so101.learn.weights import write_safetensors
from so101.rig import open_rig
from so101.robot import teleop
from so101.runfolder import begin_run
from so101.runlog import read_metrics, read_rows
from so101.starts import make_starts

ROOT = Path(__file__).parent.parent
SMALL_SAC = SacConfig(batch_size=16, views=1, utd_ratio=2, buffer_size=300)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Demonstrations and a classifier, made once by the scripts themselves."""
    folder = tmp_path_factory.mktemp("made")
    record.main(record.Config(dataset=str(folder / "demos"), episodes=8, failures=3, steps_after_success=8))
    train_reward.main(
        train_reward.Config(
            dataset=str(folder / "demos"),
            output=str(folder / "reward"),
            reward=RewardConfig(views=1, steps=60, evaluate_every=20, held_out=0.4),
        )  # fmt: skip
    )
    return folder


def sac_config(made, output, **changes):
    settings = {
        "demonstrations": str(made / "demos"), "reward_model": str(made / "reward"), "output": str(output),
        "steps": 60, "learning_starts": 20, "checkpoint_every": 30, "evaluation_episodes": 0, "sac": SMALL_SAC,
    }  # fmt: skip
    settings |= changes
    config = train_sac.Config(**settings)
    config.env.control_time_s = 2.0
    return config


def resumed(config, eyes=None):
    """The run's learner as a start makes it, with what is recorded taken in, and the link that it listens to."""
    eyes = eyes or train_sac.make_eyes(config)
    begin_run(Path(config.output), config)
    learner = train_sac.make_learner(config, eyes.encoder, train_sac.known_demonstrations(config))
    link = Link(config.link.name, train_sac.told(config, 0))
    for name, message in link.receive():
        learner.take(name, message)
    return learner, link


def script(*arguments, cwd=ROOT, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, **kwargs
    )


@pytest.fixture
def launched(tmp_path, monkeypatch, capsys):
    """Runs a script's launch in this process, in an empty folder; a process of its own takes 1.7 s to import torch."""

    def launched(name, *arguments):
        module = importlib.import_module(name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as left:
            configs.launch(module.Config, module.main, module.__doc__)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, left.value.code or 0, printed.out, printed.err)

    return launched


def test_record_keeps_its_promises(made):
    dataset = open_dataset(made / "demos")
    labels = Labels.load(labels_path(made / "demos"))
    assert len(dataset.episodes) == 8
    failures = [e.index for e in dataset.episodes if labels.episodes[e.index].all_fail]
    assert failures == [2, 5, 7]  # spread evenly
    for episode in dataset.episodes:
        columns, label = episode.columns(), labels.episodes[episode.index]
        assert columns["complementary_info.is_intervention"].all()  # the person drove from the first tick
        assert np.abs(columns["action"][:, :3]).std(axis=0).min() > 0.05  # and did drive: no zero actions
        assert np.allclose(np.diff(columns["capture_time"]), 0.1, atol=1e-6)
        if not label.all_fail:
            # recording went on for 8 frames after the key, and next.reward tells the same as the label
            assert episode.length == label.success_start + 8
            assert columns["next.reward"].argmax() == label.success_start - 1
            assert episode.closing().state.shape == (18,)


def test_the_classifier_is_judged_on_episodes_it_never_saw(made):
    about = json.loads((made / "reward" / "reward.json").read_text())
    report = about["provenance"]["report"]
    assert not set(report["episodes"]["train"]) & set(report["episodes"]["held_out"])
    assert about["consecutive"] == 3 and 0 < about["threshold"] < 1
    assert "<svg" in (made / "reward" / "report.html").read_text()


def test_train_sac_learns_checkpoints_resumes_and_is_evaluated(made, tmp_path, capsys):
    config = sac_config(made, tmp_path / "run", evaluation_episodes=2)
    train_sac.main(config)
    printed = capsys.readouterr().out
    assert re.search(r"episode +steps +reward +result", printed) and "report.html" in printed
    run = tmp_path / "run"
    before = load_checkpoint(run, config.schema(), None)
    assert before.training_state["updates"] >= 10 and before.step >= 60
    metrics = read_metrics(run)
    assert np.isfinite([loss for loss in metrics["critic_loss"] if loss == loss]).all()
    assert newest(run) == run / "evaluations" / "001" and len(Evaluation.load(newest(run)).episodes) == 2
    assert configs.load(train_sac.Config, run / "config.json") == config
    marks = np.memmap(run / "features.marks", np.uint64)
    filled = marks.copy()

    run = run.rename(tmp_path / "moved")
    config.resume, config.steps, config.evaluation_episodes, config.output = True, 100, 0, str(run)
    train_sac.main(config)
    assert "goes on from step" in capsys.readouterr().out
    started = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["steps"] for event in started if event["kind"] == "started"] == [0, before.step]
    after = load_checkpoint(run, config.schema(), None)
    assert after.step >= 100 and after.training_state["updates"] > before.training_state["updates"]
    checkpoints = sorted((run / "checkpoints").glob("[0-9]*"))
    assert len(checkpoints) >= 2 and find_checkpoint(run) == checkpoints[-1]
    assert np.array_equal(marks[filled != 0], filled[filled != 0])  # cached features were kept, not made anew
    steps = sum(episode.length for episode in open_dataset(run / "episodes").episodes)
    assert steps == after.step


def test_a_resumed_run_starts_from_equal_weights_and_replay(made, tmp_path):
    config = sac_config(made, tmp_path / "run")
    train_sac.main(config)
    learner, _ = resumed(config)
    saved = load_checkpoint(tmp_path / "run", config.schema(), learner.trunk_hash)
    for name, tensor in learner.sac.tensors().items():
        assert tensor.equal(saved.tensors[name]), name
    assert learner.updates == saved.training_state["updates"] and learner.steps == saved.step
    online = learner.replay.pools[1]
    recorded = [episode.columns() for episode in open_dataset(tmp_path / "run" / "episodes").episodes]
    assert len(online) == learner.steps
    assert np.array_equal(learner.replay.action[online], np.concatenate([c["action"] for c in recorded]))
    assert np.array_equal(learner.replay.terminated[online], np.concatenate([c["next.done"] for c in recorded]))
    by_human = np.concatenate([c["complementary_info.is_intervention"] for c in recorded])
    assert np.array_equal(learner.replay.by_human[online], by_human)
    learner.close()


def test_redo_and_a_late_verdict_reach_replay_and_disk(made, tmp_path):
    """A person who presses r in the first episode, and f while the arm resets after the second."""
    config = sac_config(made, tmp_path / "run", steps=60)

    class Person:
        def __init__(self, operator):
            self.operator, self.episodes, self.polls = operator, 0, 0

        def hear(self, cue):
            self.operator.hear(cue)
            if cue == teleop.TRAINING:
                self.episodes, self.polls = self.episodes + 1, 0

        def poll(self):
            self.polls += 1
            pressed = self.operator.poll()
            if self.episodes == 1 and self.polls == 6:
                return ["redo"]
            return ["failure"] if self.episodes == 3 and self.polls == 1 else pressed

        def quits(self):
            return False

        def close(self):
            pass

    eyes = train_sac.make_eyes(config)
    learner, link = resumed(config, eyes)
    actor = train_sac.make_actor(config, train_sac.known_demonstrations(config), eyes, link)
    with open_rig(config.rig, 1) as rig:
        rig.teleop.keys = Person(rig.teleop.keys)
        env = rig.make_env(config.env, config.preprocess, config.reward, 1, eyes)
        learning = train_sac.run_learner(config, learner, link)
        for _ in train_sac.run_actor(config, actor, env, rig, eyes):
            next(learning)
        next(learning)
    actor.close()
    learner.close()
    recorded = open_dataset(tmp_path / "run" / "episodes").episodes
    online = learner.replay.pools[1]
    assert len(online) == learner.steps == sum(episode.length for episode in recorded)
    assert np.array_equal(learner.replay.action[online], np.concatenate([e.columns()["action"] for e in recorded]))
    # the first recorded episode is the second that began; the verdict came during the reset that followed it
    last = recorded[0].length - 1
    assert learner.replay.terminated[online[last]] and learner.replay.reward[online[last]] == 0
    labels = Labels.load(labels_path(tmp_path / "run" / "episodes"))
    assert labels.episodes[0].all_fail and list(labels.episodes) == [0]


def test_a_lost_picture_drops_an_online_episode_whole_and_an_evaluated_one_is_run_again(made, tmp_path):
    """The camera fails in the first reset, in the second episode and in the fourth: never three in a row."""
    config = sac_config(made, tmp_path / "run", steps=30)
    eyes = train_sac.make_eyes(config)
    learner, link = resumed(config, eyes)
    actor = train_sac.make_actor(config, train_sac.known_demonstrations(config), eyes, link)
    with open_rig(config.rig, 1) as rig:
        # A verdict after an episode that was dropped has nothing to correct.
        rig.teleop.keys = Scripted(rig.teleop.keys, {(3, 1): "failure"}, announced=(teleop.TRAINING,))
        rig.cameras = {"wrist": FaultyCamera({1, 10, 40})}
        env = rig.make_env(config.env, config.preprocess, config.reward, 1, eyes)
        learning = train_sac.run_learner(config, learner, link)
        for _ in train_sac.run_actor(config, actor, env, rig, eyes):
            next(learning)
        next(learning)
        rig.cameras["wrist"].fails_at = {rig.cameras["wrist"].looks + 5}
        starts = make_starts("trained", [3, 3], 1, 0, config.env, config.rig.world)
        evaluation = Evaluation({}, {"A": Contestant("run", "000030", 30, "")}, "", starts)
        driver = infer.Driver(learner.sac.policy, eyes)
        infer.evaluate(env, rig, {"A": driver}, Judges(eyes, rig.verdict), evaluation)
    actor.close()
    learner.close()
    heard = rig.teleop.keys.heard
    assert heard.count("episode dropped: camera wrist: newest frame is 0.7 s old") == 4
    assert len(evaluation.episodes) == 1 and evaluation.again == {"aborted": 1}
    recorded = open_dataset(tmp_path / "run" / "episodes").episodes
    online = learner.replay.pools[1]
    assert len(online) == learner.steps == sum(episode.length for episode in recorded) >= 30
    assert np.array_equal(learner.replay.action[online], np.concatenate([e.columns()["action"] for e in recorded]))
    assert np.array_equal(
        learner.replay.truncated[online], np.concatenate([e.columns()["next.truncated"] for e in recorded])
    )
    assert not labels_path(tmp_path / "run" / "episodes").exists()


def test_a_kill_between_an_episode_and_its_label_loses_no_verdict(tmp_path):
    folder = tmp_path / "demos"
    record.main(record.Config(dataset=str(folder), episodes=2, failures=1))
    wanted = dict(Labels.load(labels_path(folder)).episodes)
    for last in (1, 0):  # a failure, then a success, as if each had been the last one recorded
        labels = Labels.load(labels_path(folder))
        labels.set(last, None)
        labels.save(labels_path(folder))
        if last == 1:
            assert record.label_the_last(folder, labels).episodes == wanted
    columns = open_dataset(folder).episodes[0].columns()
    assert columns["next.reward"].argmax() + 1 == wanted[0].success_start


def test_an_unfinished_recording_is_finished_as_it_was_begun(made, tmp_path):
    folder = tmp_path / "demos"
    record.main(record.Config(dataset=str(folder), episodes=3, failures=1))
    begun = record.config_path(folder)
    begun.write_text(begun.read_text().replace('"episodes": 3', '"episodes": 4'))
    config = sac_config(made, tmp_path / "run", demonstrations=str(folder), steps=20)
    train_sac.main(config)
    assert len(open_dataset(folder).episodes) == 4


def test_a_run_that_never_took_a_step_does_not_stand_in_the_way(made, tmp_path):
    config = sac_config(made, tmp_path / "run", steps=20)
    begin_run(tmp_path / "run", config)
    config.env.home = [0.25, 0.0, 0.12]
    with pytest.raises(ConfigError, match="env.home"):
        train_sac.main(config)
    train_sac.main(sac_config(made, tmp_path / "run", steps=20))
    assert (tmp_path / "run" / "checkpoints" / "last").exists()


def test_a_run_keeps_its_classifier_and_moves_with_it(made, tmp_path, monkeypatch):
    train_sac.main(sac_config(made, tmp_path / "run", steps=20))
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        infer.main(infer.Config(run="moved", episodes=1, checkpoint="20"))
    assert [path.name for path in all_of(tmp_path / "moved")] == ["001", "002"]


def kill_at(arguments, started, instant, signal_number):
    """Run a script, send it a signal `instant` s after the line `started` appears; its exit code and stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not started.exists():
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()
    time.sleep(instant)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_record_killed_at_any_instant_loses_at_most_the_episode_in_progress(tmp_path):
    folder = tmp_path / "demos"
    command = ["record.py", f"dataset={folder}", "episodes=40", "failures=0"]
    rng = np.random.default_rng(0)
    had = 0
    for _ in range(2):
        resume = [f"resume={str(folder.exists()).lower()}"]
        code, _ = kill_at([*command, *resume], folder, rng.uniform(0.5, 2.0), signal.SIGKILL)
        assert code == -signal.SIGKILL
        dataset = open_dataset(folder)
        assert len(dataset.episodes) >= had
        had = len(dataset.episodes)
        for episode in dataset.episodes:
            frames = sum(1 for _ in episode.frames("wrist"))
            assert frames == episode.length == len(episode.columns()["action"])
            assert episode.closing() is not None
    done = script("record.py", f"dataset={folder}", f"episodes={had + 1}", "failures=0", "resume=true")
    assert done.returncode == 0, done.stderr
    assert len(open_dataset(folder).episodes) == had + 1


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["train_sac.py", "sac.discuont=0.9"], 2, "unknown key 'sac.discuont'; did you mean 'discount'"),
        (["train_sac.py", "steps=true"], 2, "steps"),
        (["train_sac.py", "preprocess.image_size=84"], 2, "must be a multiple of 32"),
        (["train_sac.py", "--config", "nowhere.json"], 2, "nowhere.json"),
        (["record.py", "rig.follower.port=/dev/ttyNOWHERE"], 2, "all are sim, or none is"),
        (["train_reward.py", "dataset=nowhere"], 4, "nowhere"),
        (["infer.py", "run=nowhere"], 4, "not a run folder"),
        (["infer.py", "run="], 2, "run: got no name; give the run folder that train_sac.py made"),
        (["infer.py", "starts=x.txt"], 2, "starts: got 'x.txt', must be trained, random, home, grid or a file that"),
        (["infer.py", "grid=[3]"], 2, "grid: got [3], needs the places along x and y"),
        (["train_sac.py", "seed=-1"], 2, "seed: got -1"),
        (["train_sac.py", "device=banana"], 2, "device: got 'banana', this machine has cpu"),
        (["train_sac.py", "checkpoint_every=0"], 2, "checkpoint_every"),
        (["train_sac.py", "role=learner"], 2, "role: 'learner' needs mode=parallel"),
        (["train_sac.py", "role=actor", "mode=parallel"], 2, "role=actor needs link.port and link.secret"),
        (["train_sac.py", "role=learner", "mode=parallel"], 4, "outputs/lift_demos: is not there; copy it here"),
        (["train_sac.py", "link.port=70000"], 2, "link.port"),
        (["record.py", "env.fps=0"], 2, "fps"),
        (["record.py", "env.fps=20"], 2, "must divide 50"),
        (["record.py", "env.action_scale=0"], 2, "action_scale"),
        (["record.py", "env.home=[0.34,0.14,0.24]"], 2, "must be reached with the gripper down"),
        (["record.py", 'env.locked_joints=["wrist_rol"]'], 2, "locked_joints"),
        (["record.py", "preprocess.crop=[0,0,900,900]"], 2, "must be a square inside wrist's 640x480 frame"),
        (["record.py", "rig.cameras.wrist.width=320"], 2, "sim_camera renders"),
        (["record.py", "steps_after_success=-3"], 2, "steps_after_success"),
        (["record.py", "dataset=/proc/nowhere/demos"], 1, "/proc"),
        (["label.py", "dataset=nowhere"], 4, "nowhere"),
    ],
)
def test_bad_input_is_one_clear_sentence_and_changes_nothing(tmp_path, launched, arguments, code, said):
    result = launched(arguments[0].removesuffix(".py"), *arguments[1:])
    assert result.returncode == code and said in result.stderr, result.stderr
    assert result.stderr.count("\n") <= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("stdout, code", [("> report.txt", 1), (">&- 2>&-", 0)])
def test_nowhere_to_print_is_no_traceback(made, tmp_path, stdout, code):
    """A file on a full disk takes nothing of what is printed last; who closes stdout does not want it."""
    command = f"ulimit -f 0; {sys.executable} {ROOT / 'label.py'} {made / 'demos'} --list {stdout}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr
    assert done.stderr == ("standard output: File too large; not all of it was written\n" if code else "")


def test_a_script_started_from_elsewhere_ends_with_its_sentence_and_code(tmp_path):
    result = script(ROOT / "infer.py", "run=nowhere", cwd=tmp_path)
    assert result.returncode == 4 and "nowhere is not a run folder" in result.stderr and result.stderr.count("\n") == 1


def test_a_real_port_that_is_not_there_is_a_hardware_error(tmp_path):
    calibration = tmp_path / "arm.json"
    from so101.robot.calibration import save_calibration
    from so101.sim.servos import SIM_CALIBRATION

    save_calibration(calibration, SIM_CALIBRATION)
    rig = {
        "follower": {"port": "/dev/ttyNOWHERE", "calibration": str(calibration)},
        "leader": {"port": "/dev/ttyNOWHERE", "calibration": str(calibration)},
        "cameras": {"wrist": {"source": "0"}},
    }
    (tmp_path / "rig.json").write_text(json.dumps(rig))
    (tmp_path / "record.json").write_text(json.dumps({"rig": "rig.json", "dataset": str(tmp_path / "demos")}))
    result = script("record.py", "--config", tmp_path / "record.json")
    assert result.returncode == 3 and "ttyNOWHERE" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "demos").exists()


def test_what_exists_is_never_overwritten(made, tmp_path):
    with pytest.raises(DataError, match="exists"):
        record.main(record.Config(dataset=str(made / "demos")))
    with pytest.raises(DataError, match="exists"):
        train_reward.main(train_reward.Config(dataset=str(made / "demos"), output=str(made / "reward")))
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="exists"):
        train_sac.main(sac_config(made, tmp_path / "run"))


def test_data_of_another_schema_is_refused_and_says_what_differs(made, tmp_path):
    config = sac_config(made, tmp_path / "run")
    config.env.action_scale = 0.01
    with pytest.raises(DataError, match="action_scale_m is 0.02 there, 0.01 here"):
        train_sac.main(config)
    assert not (tmp_path / "run").exists()
    config = train_reward.Config(dataset=str(made / "demos"), output=str(tmp_path / "reward"))
    config.preprocess = configs.from_dict(type(config.preprocess), {"crop": [0, 0, 480, 480]}, "test")
    with pytest.raises(DataError, match="crop"):
        train_reward.main(config)
    assert not (tmp_path / "reward").exists()


def test_a_reset_at_another_height_than_the_demonstrations_is_refused(made, tmp_path):
    config = sac_config(made, tmp_path / "run")
    config.env.home = [0.25, 0.0, 0.03]
    with pytest.raises(ConfigError, match="env.home"):
        train_sac.main(config)


def test_a_weight_file_of_another_shape_is_refused(made, tmp_path):
    import torch

    write_safetensors(tmp_path / "other.safetensors", {"embedder.0.weight": torch.zeros(3, 3)})
    with pytest.raises(DataError, match="other.safetensors"):
        train_sac.main(sac_config(made, tmp_path / "run", encoder=str(tmp_path / "other.safetensors")))


def test_a_resume_with_another_config_prints_what_differs_and_wants_it_confirmed(made, tmp_path, capsys):
    config = sac_config(made, tmp_path / "run", steps=20)
    train_sac.main(config)
    config.resume, config.steps, config.checkpoint_every = True, 40, 20  # free to change
    config.sac = SacConfig(batch_size=16, views=1, utd_ratio=2, buffer_size=300, lr=1e-3)
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"the config has changed; say changed=true if that is meant, or keep it"):
        train_sac.main(config)
    assert capsys.readouterr().out.splitlines()[1:] == ["  sac.lr: 0.0003 -> 0.001"]
    assert configs.load(train_sac.Config, tmp_path / "run" / "config.json").sac.lr == 3e-4
    config.changed = True
    train_sac.main(config)
    assert configs.load(train_sac.Config, tmp_path / "run" / "config.json").sac.lr == 1e-3
    assert (
        '"config_change_confirmed", "changes": ["  sac.lr: 0.0003 -> 0.001"]'
        in (tmp_path / "run" / "events.jsonl").read_text()
    )


def test_a_change_that_does_not_fit_the_checkpoint_leaves_the_run_as_it_was(made, tmp_path):
    config = sac_config(made, tmp_path / "run", steps=20)
    train_sac.main(config)
    config.resume, config.changed = True, True
    config.sac = SacConfig(batch_size=16, views=1, utd_ratio=2, buffer_size=300, critics=3)
    with pytest.raises(DataError, match="does not fit; use the config it was trained with"):
        train_sac.main(config)
    assert configs.load(train_sac.Config, tmp_path / "run" / "config.json").sac.critics == 2
    infer.main(infer.Config(run=config.output, episodes=1))


def test_a_run_whose_episodes_were_lost_is_refused(made, tmp_path):
    config = sac_config(made, tmp_path / "run", steps=60)
    config.env.control_time_s = 1.0
    train_sac.main(config)
    shutil.rmtree(tmp_path / "run" / "episodes")
    config.resume = True
    with pytest.raises(DataError, match="holds 0 steps, the checkpoint is of .*restore the episodes"):
        train_sac.main(config)


def test_checkpoints_are_evaluated_on_the_way_and_the_best_is_kept(made, tmp_path, capsys):
    config = sac_config(made, tmp_path / "run", steps=60, checkpoint_every=1000, evaluate_every=20, evaluate_episodes=1)
    config.env.control_time_s = 1.0
    train_sac.main(config)
    rows = [row for row in read_rows(tmp_path / "run") if row.get("evaluated_success")]
    assert [int(row["step"]) for row in rows] == [20, 40, 60][: len(rows)] and len(rows) >= 2
    assert capsys.readouterr().out.count("checkpoint 0000") == len(rows)
    best = find_checkpoint(tmp_path / "run", "best")
    scores = {row["step"]: (float(row["evaluated_success"]), -float(row["evaluated_steps"])) for row in rows}
    assert scores[str(int(best.name))] == max(scores.values())
    infer.main(infer.Config(run=config.output, episodes=1, checkpoint="best"))
    assert len(open_dataset(tmp_path / "run" / "episodes").episodes) == 6  # evaluations are no experience


@pytest.mark.parametrize("name", ["record", "label", "train_reward", "train_sac", "infer"])
def test_help_names_every_field_with_its_default(name, launched):
    result = launched(name, "--help")
    assert result.returncode == 0
    for field in importlib.import_module(name).Config.__dataclass_fields__:
        assert field.rstrip("_") in result.stdout
    assert "default" in result.stdout and max(map(len, result.stdout.splitlines())) <= 120

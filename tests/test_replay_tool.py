"""An episode recorded in the simulation, replayed: met within millimetres, through the limits, or refused in words."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_exits import ENVIRONMENT, REST, ROOT, TELLING
from test_record import Scripted

import record
from so101.config import to_dict
from so101.data import layout
from so101.data.dataset import open_dataset
from so101.env import EnvConfig
from so101.errors import DataError
from so101.rig import RigConfig, open_rig
from so101.robot.camera import CameraConfig
from so101.robot.kinematics import TIP_BELOW_TOOL, jaw_angle
from so101.robot.safety import AT_REST
from so101.schema import OPENING, TOOL_XYZ, Preprocess
from so101.sim.camera import CameraConfig as SimCameraConfig
from so101.tools import replay

TASK = {
    "rig": RigConfig(
        cameras={"wrist": CameraConfig(source="sim", width=64, height=48)},
        sim_camera=replace(SimCameraConfig(), width=64, height=48),
    ),
    "env": EnvConfig(reset_time_s=0.2),
    "preprocess": Preprocess([0, 8, 48, 48], 32),
}
SAID = re.compile(
    r"(\d+) of (\d+) actions replayed; the tool was ([\d.]+) mm from .*, ([\d.]+) mm at most, at step (\d+)"
)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay") / "demos"
    record.main(record.Config(dataset=str(folder), episodes=2, failures=1, **TASK))
    return folder


@pytest.fixture
def replayed(monkeypatch):
    """Replays an episode; returns the states (n, 18) that its control steps led to; keeps targets and rig."""

    def run(folder, episode=0, keys=None, **settings):
        run.states, run.targets = [], []

        @contextmanager
        def rigged(config, seed, flights=None):
            with open_rig(config, seed) as rig:
                run.rig = rig
                rig.teleop.keys = Scripted(rig.teleop.keys, keys or {})
                yield rig

        def stepped(env, action):
            step = step_of(env, action)
            run.states.append(step.observation.state)
            run.targets.append(env.target)
            return step

        step_of = replay.Env.step
        with monkeypatch.context() as patch:
            patch.setattr(replay, "open_rig", rigged)
            patch.setattr(replay.Env, "step", stepped)
            replay.main(replay.Config(str(folder), episode, **{**TASK, **settings}))
        return np.array(run.states)

    return run


@pytest.fixture
def edited(demos, tmp_path):
    """A copy of the recording, its schema or the columns of its first episode changed by hand."""

    def edit(schema=None, **columns):
        folder = tmp_path / "edited"
        shutil.copytree(demos, folder)
        if schema is not None:
            info = json.loads((folder / "meta/info.json").read_text())
            info["so101"] |= schema
            (folder / "meta/info.json").write_text(json.dumps(info))
        path = folder / layout.DATA_PATH.format(chunk_index=0, file_index=0)
        changed = open_dataset(folder).episodes[0].columns()
        for name, change in columns.items():
            changed[name.replace("_", ".")] = change(changed[name.replace("_", ".")].copy())
        pq.write_table(layout.data_table(changed), path)
        return folder

    return edit


@pytest.mark.parametrize("episode, furthest", [(0, 0.003), (1, 0.01)])  # episode 1 meets another cube than its own
def test_a_replay_meets_the_recorded_path_and_says_how_closely(demos, replayed, capsys, episode, furthest):
    states = replayed(demos, episode)
    recorded = open_dataset(demos).episodes[episode]
    after = np.vstack([recorded.columns()["observation.state"][1:], recorded.closing().state])
    off = np.linalg.norm(states[:, TOOL_XYZ] - after[:, TOOL_XYZ], axis=1)
    travelled = np.linalg.norm(np.diff(after[:, TOOL_XYZ], axis=0), axis=1).sum()
    assert off.max() < furthest and travelled > 0.1
    assert np.abs(states[:, OPENING] - after[:, OPENING]).mean() < 0.05
    done, of, mean, largest, step = SAID.search(capsys.readouterr().out).groups()
    assert int(done) == int(of) == recorded.length == len(states)
    assert float(largest) == pytest.approx(1000 * off.max(), abs=0.06) and int(step) == off.argmax() + 1
    assert float(mean) == pytest.approx(1000 * off.sum() / (len(off) + 1), abs=0.1)  # the start, met to 1 mm, counts


def test_the_leader_is_left_alone_and_the_arm_comes_to_rest(demos, replayed):
    replayed(demos)
    assert TASK["rig"].leader is not None and replayed.rig.teleop.leader is None
    servos = replayed.rig.arm.bus.port.servos
    assert not servos.torque_on.any() and np.abs(servos.angle[:5] - REST[:5]).max() < AT_REST


def test_actions_that_lead_out_of_the_limits_are_cut_and_counted(edited, replayed, capsys):
    """Down and out for 18 steps: 36 cm below the start, were it obeyed."""
    folder = edited(action=lambda actions: np.full_like(actions, [0, 1, -1, 0]))
    states = replayed(folder)
    targets = np.array(replayed.targets)
    assert targets[:, 2].min() == pytest.approx(TIP_BELOW_TOOL) and targets[:, 1].max() <= 0.15
    assert states[:, TOOL_XYZ][:, 2].min() > -0.005
    said = capsys.readouterr().out
    cut = re.search(r"steps that a limit cut: .*workspace (\d+)", said)
    assert int(cut[1]) >= len(states) - 6
    assert float(SAID.search(said)[4]) > 50  # and it says that this was not the recorded path


def test_a_recording_without_a_closing_observation_is_compared_as_far_as_it_goes():
    """By hand: 0 mm at the start, 5 mm (3, 4, 0) after a step, and nothing to compare the second step with."""
    recording = replay.Recording("demos episode 0", np.zeros((2, 18)), np.zeros((2, 4)))
    said = replay.summary(np.array([[0, 0, 0], [0.003, 0.004, 0], [1, 1, 1]]), recording, Counter(leash=2))
    assert said.startswith("2 of 2 actions replayed; the tool was 2.5 mm from the recorded one on average, 5.0 mm at ")
    assert said.endswith("at step 1\nsteps that a limit cut: leash 2")


def test_a_key_ends_it(demos, replayed, capsys):
    states = replayed(demos, keys={(0, 6): "quit"})  # look 1 is the reset's
    assert len(states) == 5 and capsys.readouterr().out.count("5 of ") == 1


REFUSED = {
    "another scale": ({"schema": {"action_scale_m": 0.05}}, "action_scale_m is 0.05 there, 0.02 here"),
    "another rate": ({"schema": {"fps": 30}}, "fps is 30 there, 10.0 here"),
    "other actions": ({"schema": {"action": ["x", "y", "z"]}}, r"action is \['x', 'y', 'z'\] there"),
    "three dimensions": ({"action": lambda a: a[:, :3]}, r"action has shape \(\d+, 3\), must be \(\d+, 4\)"),
    "too large": ({"action": lambda a: _set(a, 4, 3, 2.0)}, r"action of step 4: got .*2.0\], must be in \[-1, 1\]"),
    "not a number": ({"action": lambda a: _set(a, 4, 3, np.nan)}, "all finite"),
}


def _set(values, row, column, value):
    values[row, column] = value
    return values


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_something_else_is_refused_before_the_arm_moves(edited, replayed, name):
    change, said = REFUSED[name]
    with pytest.raises(DataError, match=said) as refused:
        replayed(edited(**change))
    convertible = name not in ("another scale", "another rate")  # which a conversion keeps
    assert ("python -m so101.tools.edit convert" in str(refused.value)) == convertible
    assert not hasattr(replayed, "rig")


def test_a_foreign_recording_and_an_episode_that_is_not_there_are_refused(demos, edited, replayed):
    with pytest.raises(DataError, match="episode 2: is not there; it has 2 episodes, counted from 0"):
        replayed(demos, 2)
    folder = edited()
    info = json.loads((folder / "meta/info.json").read_text())
    del info["so101"]
    (folder / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="does not say what its actions mean.*edit convert"):
        replayed(folder)


@pytest.mark.parametrize(
    "x, z, said",
    [
        (0.45, 0.07, "must lie inside the workspace"),
        (0.25, -0.01, "its fingertips in the table"),
        (0.33, 0.24, "must be reached with the gripper down"),
    ],
)
def test_a_start_that_is_out_of_bounds_is_refused(edited, replayed, x, z, said):
    folder = edited(observation_state=lambda s: _set(_set(s, 0, TOOL_XYZ.start, x), 0, TOOL_XYZ.stop - 1, z))
    with pytest.raises(DataError, match=rf"starts with the tool at \[{x}, .*{said}"):
        replayed(folder)
    assert not hasattr(replayed, "rig")


@pytest.mark.parametrize(
    "column, value, said",
    [
        (TOOL_XYZ.start, 0.03, "the tool is 30 mm and 0.00 rad from its start, at most 20 mm"),
        (replay.TURNED.start, 0.5, "0 mm and 0.50 rad from its start"),
        (replay.TURNED.stop - 1, 2 * np.pi + 0.1, None),
        (OPENING, -0.2, "starts with the gripper at 0.50, here it is at 0.30"),
    ],
)
def test_an_arm_that_stands_elsewhere_does_not_begin(demos, column, value, said):
    states = open_dataset(demos).episodes[0].columns()["observation.state"]
    stands = states[0].copy()
    stands[column] += value
    recording = replay.Recording("demos episode 0", states, np.zeros((1, 4)))
    if said is None:
        replay.require_start(stands, recording)
    else:
        with pytest.raises(DataError, match=said):
            replay.require_start(stands, recording)


def test_another_gripper_range_is_met_at_the_start_and_nothing_is_replayed(demos, replayed):
    with pytest.raises(DataError, match="starts with the gripper at 0.5., here it is at 0.9"):
        replayed(demos, env=replace(TASK["env"], gripper_range=[0.05, 0.9]))
    assert not replayed.states and not replayed.rig.arm.bus.port.servos.torque_on.any()


def test_ctrl_c_in_the_midst_leaves_the_arm_at_rest(demos, tmp_path):
    (tmp_path / "task.json").write_text(json.dumps({name: to_dict(part) for name, part in TASK.items()}))
    command = [sys.executable, "-c", TELLING, str(tmp_path / "left.json"), "so101/tools/replay.py", str(demos), "0"]
    process = subprocess.Popen(
        [*command, "--config", str(tmp_path / "task.json"), "rig.pace=5"],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while "at the start; replaying" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and errors.splitlines()[-1] == "interrupted", errors
    assert int(SAID.search(said)[1]) < int(SAID.search(said)[2])
    follower = json.loads((tmp_path / "left.json").read_text())[0]
    assert not any(follower["torque"])
    assert np.abs(np.array(follower["angle"]) - [*REST[:5], jaw_angle(REST[5])])[:5].max() < AT_REST

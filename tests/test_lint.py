"""Lint: each damage done to a real dataset is found, in its episode and frame, and a good recording is let be.

Rows and L-numbers are those of the original project's field record.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_record import labels_of, recording  # noqa: F401

import train_reward
import train_sac
from so101.data import layout
from so101.data import lint as lint_module
from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel, label_episode, labels_path
from so101.data.lint import Finding, Pictures, lint
from so101.data.video import VideoWriter
from so101.data.writer import DatasetWriter
from so101.env import HOME_SEED
from so101.errors import DataError
from so101.robot.kinematics import solve_ik
from so101.schema import STATE
from so101.tools import lint as tool
from so101.tools.lint import ROBOT, tool_pose

EPISODES, ROWS, SIZE = 4, 14, (32, 32)
STATES, VELOCITIES, TOOL = "observation.state", slice(6, 12), slice(12, 15)


def joints_at(position: np.ndarray) -> np.ndarray:
    return solve_ik(position, HOME_SEED, max_iterations=50)


def take(episode: int) -> tuple[np.ndarray, np.ndarray]:
    """A round trip of the tool and a grasp: states (ROWS + 1, 18), and the actions (ROWS, 4) that lead along them."""
    t = np.arange(ROWS)
    way = 0.8 * np.sin(2 * np.pi * t[:, None] / ROWS + [0.3 * episode, 2.0 + 0.2 * episode, 4.0])
    actions = np.column_stack([way, np.where(t < 7, 1.0, -1.0)]).astype(np.float32)
    tool_xyz = np.array([0.25, 0.002 * episode, 0.07]) + np.vstack([np.zeros(3), np.cumsum(0.02 * actions[:, :3], 0)])
    opening = 0.5 - np.clip(np.arange(ROWS + 1) - 7, 0, 2) * 0.12
    positions = np.column_stack([[joints_at(xyz) for xyz in tool_xyz], opening])
    velocities = np.diff(positions, axis=0, prepend=positions[:1]) / 0.1
    poses = np.array([tool_pose(joints) for joints in positions[:, :5]])
    return np.hstack([positions, velocities, poses]).astype(np.float32), actions


def picture(episode: int, frame: int, light: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng([episode, frame])
    return (light * (60 + 120 * rng.random((8, 8, 3)).repeat(4, 0).repeat(4, 1))).astype(np.uint8)


def record(folder: Path, episodes: int, rows: int = ROWS, light=lambda episode: 1.0) -> None:
    schema = train_sac.Config().schema()
    writer = DatasetWriter(folder, fps=10, cameras={"wrist": SIZE}, task="lift", schema=schema)
    for episode in range(episodes):
        states, actions = take(episode)
        for t in range(rows):
            frames = {"wrist": picture(episode, t, light(episode))}
            writer.add(states[t], actions[t], frames, done=t == rows - 1, reward=t >= 9, capture_time=0.1 * t)
        writer.save_episode(states[rows], {"wrist": picture(episode, rows, light(episode))}, 0.1 * rows)
        label_episode(folder, episode, EpisodeLabel(success_start=10) if rows == ROWS else EpisodeLabel(all_fail=True))
    writer.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lint") / "demos"
    record(folder, EPISODES)
    return folder


@pytest.fixture
def filmed(good, tmp_path):
    """A copy, to do damage to."""
    shutil.copytree(good, tmp_path / "demos")
    shutil.copy(labels_path(good), tmp_path)
    return tmp_path / "demos"


@pytest.fixture(scope="module")
def pictures(good):
    episodes = open_dataset(good).episodes
    return {episode.index: lint_module.look(episode, episode.closing(), ["wrist"]) for episode in episodes}


@pytest.fixture
def folder(filmed, pictures, monkeypatch):
    """A copy, to do damage to its numbers: its pictures, which stay, are not read each time (half of a test)."""
    monkeypatch.setattr(lint_module, "look", lambda episode, closing, cameras: pictures[episode.index])
    return filmed


def data_file(folder: Path, episode: int) -> Path:
    return folder / layout.DATA_PATH.format(**layout.place_of(episode))


def change(folder: Path, episode: int, **columns) -> None:
    """Rewrite columns of an episode's data file: name=function of the old values; dots in names are written __."""
    path = data_file(folder, episode)
    table = pq.read_table(path)
    values = {name: layout.to_numpy(table[name], name).copy() for name in table.column_names}
    for name, edit in columns.items():
        name = name.replace("__", ".")
        values[name] = edit(values[name])
    pq.write_table(layout.data_table(values), path)


def close_with(folder: Path, episode: int, edit) -> None:
    """Rewrite an episode's closing observation: `edit` changes its arrays in place."""
    path = folder / layout.CLOSING_PATH.format(episode_index=episode)
    with np.load(path) as stored:
        values = {name: stored[name].copy() for name in stored.files}
    edit(values)
    np.savez(path, **values)


def film(folder: Path, episode: int, frames: list[np.ndarray]) -> None:
    video = layout.VIDEO_PATH.format(video_key="observation.images.wrist", **layout.place_of(episode))
    writer = VideoWriter(folder / video, 10, *SIZE)
    for frame in frames:
        writer.add(frame)
    writer.close()


def setting(rows, entries, value):
    """A function that puts a value into some rows and entries of a column."""

    def edit(values):
        values[rows, entries] = value
        return values

    return edit


def findings(folder: Path, robot=ROBOT, **more) -> list[Finding]:
    """All but that 20 labelled successes are few, which they are."""
    return [found for found in lint(open_dataset(folder), robot, **more) if found.check != "few labels"]


def only(folder: Path, robot=ROBOT, **more) -> tuple:
    """The one finding: severity, check, episode, frame, message."""
    found, *rest = findings(folder, robot, **more)
    assert not rest, rest
    return found.severity, found.check, found.episode, found.frame, found.message


def test_a_good_recording_gives_no_finding_but_that_it_is_short(good):
    (found,) = lint(open_dataset(good), ROBOT)
    assert (found.severity, found.check) == ("warning", "few labels")
    assert "20 frames of success and 40 of failure" in found.message


@pytest.mark.slow
def test_a_simulated_recording_gives_no_finding(tmp_path):
    import record as script

    script.main(script.Config(dataset=str(tmp_path / "demos"), episodes=30))
    assert lint(open_dataset(tmp_path / "demos"), ROBOT) == []


# Actions


def test_row_9_actions_that_are_all_zero(folder):
    """All demonstrations had zero motion, and training ran on them."""
    change(folder, 1, action=setting(slice(None), slice(0, 3), 0.0))
    found = {(f.severity, f.check, f.episode, f.frame) for f in findings(folder)}
    assert ("error", "constant actions", 1, 0) in found


def test_actions_that_are_constant(folder):
    change(folder, 2, action=setting(slice(None), slice(0, 3), 0.3))
    found = next(f for f in findings(folder) if f.check == "constant actions")
    assert (found.severity, found.episode, found.frame) == ("error", 2, 0)
    assert "its 14 actions never move the tool: the first is [0.3, 0.3, 0.3, 1.0]" in found.message


def test_actions_at_their_bound(folder):
    change(folder, 0, action=setting(slice(1, None), 1, 1.0))  # 13 of 14: 93 %
    found = next(f for f in findings(folder) if f.check == "clipped actions")
    assert (found.severity, found.episode, found.frame) == ("warning", 0, 1)
    assert "delta_y is at its bound in 93% of the rows" in found.message


def test_row_11_a_gripper_action_from_0_to_2(folder):
    """The action space was [0, 2]: a policy in [-1, 1] could only close."""
    change(folder, 1, action=lambda a: np.column_stack([a[:, :3], a[:, 3] + 1]).astype(np.float32))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "action range", 1, 0)
    assert "gripper is 2, outside [-1, 1], as where the gripper was recorded in [0, 2]" in message
    assert "so101.tools.edit convert" in message


def test_an_action_of_three_entries(folder):
    change(folder, 3, action=lambda a: a[:, :3])
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "width", 3, 0)
    assert "an action has 3 entries, needed are 4: delta_x, delta_y, delta_z, gripper" in message


def test_row_21_actions_that_nothing_follows(folder):
    """Reset outside the limits: the commands went on, the arm shook where it was."""
    still = setting(slice(None), slice(0, 18), take(2)[0][0])
    change(folder, 2, observation__state=still)
    close_with(folder, 2, lambda c: c.update({STATES: take(2)[0][0]}))
    found = next(f for f in findings(folder) if f.check == "not followed")
    assert (found.severity, found.episode, found.frame) == ("error", 2, 0)
    asked = np.ptp(np.cumsum(0.02 * take(2)[1][:, :3], 0), 0).max()
    assert f"ask for {asked:.2f} m, and the tool moves 0.000 m" in found.message


# Gripper


def test_a_gripper_that_never_moves_matters_in_a_success_only(folder):
    change(folder, 1, action=setting(slice(None), 3, 1.0), observation__state=setting(slice(None), 5, 0.5))
    change(folder, 1, observation__state=setting(slice(None), 11, 0.0))
    close_with(folder, 1, lambda c: c[STATES].__setitem__(5, 0.5))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("warning", "gripper", 1, 0)
    assert "stays at 0.50, its action is from 1.00 to 1.00" in message
    change(folder, 1, action=setting(slice(7, None), 3, -1.0))  # and where it was told to, all the more
    assert "stays at 0.50, its action is from -1.00 to 1.00" in only(folder)[-1]
    label_episode(folder, 1, EpisodeLabel(all_fail=True))
    assert not [f for f in findings(folder) if f.check == "gripper"]


def test_l8_a_gripper_action_that_says_the_other_way(folder):
    """A gripper that stood still, or opened, was recorded as closing."""
    change(folder, 2, action=lambda a: a * np.float32([1, 1, 1, -1]))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "gripper", 2, 7)
    assert "in 2 of 2 ticks in which the gripper moves" in message


def test_l8_a_gripper_that_moves_unasked(folder):
    """A slow leader's closing was recorded as no action at all."""
    change(folder, 2, action=setting(slice(None), 3, 0.0))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "gripper", 2, 7)
    assert "the gripper moves by 0.24, and no action asks for it" in message


# Pictures


def test_row_29_black_frames(filmed):
    film(filmed, 1, [picture(1, t) if t < 5 else np.zeros((*SIZE, 3), np.uint8) for t in range(ROWS)])
    severity, check, episode, frame, message = only(filmed)
    assert (severity, check, episode, frame) == ("error", "flat frames", 1, 5)
    assert "9 of 15 frames are black or flat, mean 1 of 255" in message


def test_row_45_frames_stored_as_fractions(filmed):
    """Frames in 0..1 put into bytes are black, 0..255 taken for 0..1 and cut off are white."""
    film(filmed, 3, [(picture(3, t) / 255).astype(np.uint8) for t in range(ROWS)])
    severity, check, episode, frame, _ = only(filmed)
    assert (severity, check, episode, frame) == ("error", "flat frames", 3, 0)


def test_a_picture_that_freezes_while_the_arm_moves(filmed):
    film(filmed, 2, [picture(2, min(t, 6)) for t in range(ROWS)])
    (found,) = (f for f in findings(filmed) if f.check == "frozen frames")
    assert (found.severity, found.episode, found.frame) == ("error", 2, 6)
    assert "stands still for 0.7 s from here" in found.message  # frames 6 to 13; the closing frame is another


def test_a_picture_that_came_twice_is_a_warning(filmed):
    film(filmed, 2, [picture(2, t - (t in (5, 9))) for t in range(ROWS)])
    severity, check, episode, frame, message = only(filmed)
    assert (severity, check, episode, frame) == ("warning", "frozen frames", 2, 8)
    assert "(2 such places)" in message


def test_a_still_picture_of_a_still_arm_is_as_it_should_be(filmed):
    change(filmed, 2, observation__state=setting(slice(8, None), slice(0, 18), take(2)[0][8]))
    close_with(filmed, 2, lambda c: c.update({STATES: take(2)[0][8]}))
    film(filmed, 2, [picture(2, min(t, 8)) for t in range(ROWS)])
    assert not [f for f in findings(filmed) if f.check == "frozen frames"]


def test_a_camera_is_judged_by_the_numbers_of_a_live_one():
    """Row 29: std <= 0.02 of the range is flat, here as in robot/camera.py."""
    pictures = Pictures()
    for spread in (5.0, 5.2):  # 0.02 * 255 is 5.1
        frame = np.full((*SIZE, 3), 100, np.float64)
        frame[::2] += spread
        frame[1::2] -= spread
        pictures.add(frame.round(0).astype(np.uint8) if spread == 5.0 else np.rint(frame + 1e-9).astype(np.uint8))
    assert pictures.spread[0] == pytest.approx(5.0) and ROBOT.flat_std == pytest.approx(5.1)


def test_row_41_light_that_is_another_and_light_that_drifts(filmed, tmp_path):
    """Trained in the morning, 60 %; in the afternoon 27.9 %."""
    film(filmed, 3, [picture(3, t, light=0.6) for t in range(ROWS)])
    close_with(filmed, 3, lambda c: c.update({"observation.images.wrist": picture(3, ROWS, 0.6)}))
    (found,) = (f for f in findings(filmed) if f.check == "light")
    assert (found.severity, found.episode, found.frame) == ("warning", 3, 0)
    assert "camera wrist: its light is 4" in found.message  # 40 %, give or take the pictures' own
    record(tmp_path / "day", 10, rows=2, light=lambda episode: 1.1 - 0.03 * episode)
    (found,) = (f for f in findings(tmp_path / "day") if f.check == "light drift")
    assert (found.severity, found.episode, found.frame) == ("warning", 9, 0)
    change_said = float(found.message.split("changes by ")[1].split("%")[0])
    assert change_said == pytest.approx(-28, abs=4)  # 0.27 of 0.965, beside the pictures' own differences


@pytest.mark.parametrize(
    ("light", "first"), [(lambda t: 0.4 if t >= 8 else 1.0, 8), (lambda t: 1 - 0.6 * t / ROWS, 10)]
)
def test_light_that_changes_within_an_episode(filmed, light, first):
    """A lamp that goes out, and one that fades: by 43 % of the first three frames' 0.957 at frame 10."""
    film(filmed, 2, [picture(2, t, light(t)) for t in range(ROWS)])
    close_with(filmed, 2, lambda c: c.update({"observation.images.wrist": picture(2, ROWS, light(ROWS))}))
    severity, check, episode, frame, message = only(filmed)
    assert (severity, check, episode) == ("warning", "light", 2) and abs(frame - first) <= 1
    assert "from here on its light is up to" in message


def test_a_video_that_is_in_another_ones_place(filmed):
    """Two episodes' videos of one length, exchanged: 0.68 was kept of the one, 0.75 is the other's mean."""
    film(filmed, 2, [picture(2, t, light=0.9) for t in range(ROWS)])
    severity, check, episode, frame, message = only(filmed)
    assert (severity, check, episode, frame) == ("error", "other frames", 2, 0)
    off = int(message.split("mean is ")[1].split(" of 255")[0])
    assert off == pytest.approx(12, abs=2)  # a tenth of 120


def test_a_video_longer_than_its_rows(filmed):
    """In a set of another program it is damage; an episode of ours may be a part of its video (tools.edit trim)."""
    film(filmed, 0, [picture(0, t) for t in range(ROWS + 3)])
    assert not findings(filmed)
    path = filmed / "meta/info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in info.items() if name != "so101"}))
    (found,) = (f for f in findings(filmed) if f.check == "frame count")
    assert (found.severity, found.episode, found.frame) == ("warning", 0, ROWS)
    assert "the video has 17 frames for 14 rows" in found.message


def test_row_26_a_video_shorter_than_its_rows(filmed):
    film(filmed, 0, [picture(0, t) for t in range(ROWS - 2)])
    found = [f for f in findings(filmed) if f.severity == "error"]
    assert [(f.check, f.episode) for f in found] == [("unreadable", 0)]
    assert "14 rows, but only 12 frames" in found[0].message


# Time


def test_dropped_ticks(folder):
    change(folder, 1, capture_time=lambda t: t + 0.12 * (np.arange(ROWS) > 4))
    close_with(folder, 1, lambda c: c.update(capture_time=c["capture_time"] + 0.12))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("warning", "dropped ticks", 1, 4)
    assert "1 of 14 ticks took more than 1.5 periods" in message and "the longest 2.2, 0.22 s" in message


def test_a_loop_that_is_slow_at_every_tick(folder):
    change(folder, 1, capture_time=lambda t: 1.3 * t)
    close_with(folder, 1, lambda c: c.update(capture_time=1.3 * c["capture_time"]))
    severity, check, episode, _, message = only(folder)
    assert (severity, check, episode) == ("warning", "dropped ticks", 1) and "1.30 periods each" in message


@pytest.mark.parametrize("column", ["timestamp", "capture_time", "frame_index"])
def test_row_26_rows_out_of_order(folder, column):
    def swap(values):
        values[[5, 6]] = values[[6, 5]]
        return values

    change(folder, 2, **{column: swap})
    severity, check, episode, frame, _ = only(folder)
    assert (severity, check, episode, frame) == ("error", "time", 2, 5 if column == "frame_index" else 6)


# State


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(folder, value):
    change(folder, 1, observation__state=setting(3, 14, value))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "not finite", 1, 3) and "tool.z is" in message


def test_row_16_a_state_of_another_width(folder):
    change(folder, 1, observation__state=lambda s: s[:, :12])
    assert "a state of 18 entries, 12 in the rows" in only(folder)[-1]
    close_with(folder, 1, lambda c: c.update({STATES: c[STATES][:12]}))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == (
        "error",
        "width",
        1,
        0,
    ) and "12 entries, its schema" in message


@pytest.mark.parametrize(("scale", "unit"), [(180 / np.pi, "degrees"), (4096 / 2 / np.pi, "ticks")])
def test_row_17_joints_that_are_not_in_radians(folder, scale, unit):
    """A policy in degrees shook the arm."""
    change(folder, 1, observation__state=lambda s: s * np.where(np.arange(18) < 5, scale, 1).astype(np.float32))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "units", 1, 0)
    assert f"in {unit}, not in radians" in message and "so101.tools.edit convert" in message


def test_a_gripper_in_percent(folder):
    change(folder, 1, observation__state=lambda s: s * np.where(np.arange(18) == 5, 100, 1).astype(np.float32))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "units", 1, 0) and "opening is 50, must be 0" in message


def test_a_tool_pose_that_its_joints_do_not_give(folder):
    """The middle of the range for zero, or tick 2047: 17.4 degrees apart on the author's arm."""
    turned = np.where(np.arange(18) == 0, np.deg2rad(17.4), 0).astype(np.float32)
    change(folder, 1, observation__state=lambda s: s + turned)
    close_with(folder, 1, lambda c: c.update({STATES: c[STATES] + turned}))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "tool pose", 1, 0)
    assert "17 degrees from where its own joints put it, in 15 of 15 observations" in message


def test_a_tool_frame_turned_by_more_than_5_degrees(folder):
    for degrees, expected in ((4, []), (6, [("tool pose", 2, 5)])):
        change(folder, 2, observation__state=setting(5, 17, take(2)[0][5, 17] + np.deg2rad(degrees)))
        assert [(f.check, f.episode, f.frame) for f in findings(folder)] == expected


def test_row_10_locked_joints_that_move(folder):
    """Mirroring bypassed the lock: 18 episodes were lost."""
    locked = ROBOT.__class__(ROBOT.tool_pose, ROBOT.flat_std, ROBOT.max_age, locked=("wrist_flex", "wrist_roll"))
    found = findings(folder, locked)
    assert {(f.severity, f.check) for f in found} == {("error", "locked joints")}
    assert [f.episode for f in found] == list(range(EPISODES))  # wrist_flex: the tool went up and down
    flex = take(0)[0][:, 3]
    assert found[0].frame == np.abs(flex - flex[0]).argmax()
    assert f"wrist_flex was locked, and moves by {np.rad2deg(np.ptp(flex)):.1f} degrees" in found[0].message


def test_row_42_a_start_away_from_the_others(folder):
    """Reset at z 0.03 in training, 0.07 in the demonstrations: hours were lost."""
    shift_start(folder, 1, np.array([0, 0, 0.03]))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("warning", "start pose", 1, 0)
    assert "0.030 m from where most do, [0.25, 0.00" in message


def test_starts_that_are_spread_wide_are_told_of_once_if_at_all(folder):
    """env.random_ee_range_xy=0.03: five of eight episodes were to be left out."""
    for episode, x in enumerate((-0.03, -0.02, 0.02, 0.03)):
        shift_start(folder, episode, np.array([x, 0, 0]))
    severity, check, episode, _, message = only(folder)
    assert (severity, check, episode) == ("warning", "start pose", None)
    assert "half of the episodes start 0.025 m or more from the usual place" in message


def shift_start(folder, episode, offset):
    """The same motion from elsewhere, with the joints that belong to it."""
    states, _ = take(episode)
    positions = np.column_stack([[joints_at(s[TOOL] + offset) for s in states], states[:, 5]])
    velocities = np.diff(positions, axis=0, prepend=positions[:1]) / 0.1
    poses = [tool_pose(joints) for joints in positions[:, :5]]
    states = np.hstack([positions, velocities, poses]).astype(np.float32)
    change(folder, episode, observation__state=lambda s: states[:ROWS])
    close_with(folder, episode, lambda c: c.update({STATES: states[ROWS]}))


def travel(folder, episode, first, step):
    """From row `first` on the tool goes `step` m a tick, whatever its actions, which say stay."""
    states, _ = take(episode)
    for t in range(first + 1, ROWS + 1):
        joints = joints_at(states[t - 1, TOOL] + step)
        states[t, :5], states[t, 6:11] = joints, (joints - states[t - 1, :5]) / 0.1
        states[t, 12:] = tool_pose(joints)
    change(folder, episode, action=setting(slice(first, None), slice(0, 3), 0.0))
    change(folder, episode, observation__state=lambda s: states[:ROWS])
    close_with(folder, episode, lambda c: c.update({STATES: states[ROWS]}))


def test_row_26_the_motion_of_a_reset_at_the_end(folder):
    """The tool went home inside the episode, and the cutoff frames were searched for by hand."""
    travel(folder, 1, 8, np.array([0, 0, 0.015]))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "reset motion", 1, 8)
    assert "from here on the tool moves 0.09 m that no action asks for" in message  # 6 ticks of 15 mm
    assert "so101.tools.edit trim" in message


def test_row_26_the_motion_of_a_reset_at_the_start(folder):
    """The first rows are of the way down to the start."""
    states, actions = take(2)
    rows = [joints_at(states[0, TOOL] + [0, 0, 0.02 * n]) for n in (5, 4, 3, 2, 1)]
    for t, joints in enumerate(rows):
        states[t, :5], states[t, 12:] = joints, tool_pose(joints)
    states[5:, :] = np.vstack([take(2)[0]])[: ROWS - 4]
    actions[:5, :3], actions[5:] = 0, actions[: ROWS - 5].copy()
    change(folder, 2, action=lambda a: actions, observation__state=lambda s: states[:ROWS])
    close_with(folder, 2, lambda c: c.update({STATES: states[ROWS]}))
    found = {(f.severity, f.check, f.episode, f.frame) for f in findings(folder)}
    assert {("error", "reset motion", 2, 0), ("warning", "start pose", 2, 0)} <= found


def test_a_jump_that_no_servo_makes(folder):
    """Two takes in one, as where a discarded one's rows had stayed."""
    states = np.vstack([take(1)[0][:7], take(1)[0][7:]])
    states[7:, 4] += np.float32(np.pi / 2)
    states[7, 10] += 15.7
    for row in states[7:]:
        row[12:] = tool_pose(row[:5])
    change(folder, 1, observation__state=lambda s: states[:ROWS])
    close_with(folder, 1, lambda c: c.update({STATES: states[ROWS]}))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "jump", 1, 6) and "wrist_roll goes at 15.7 rad/s" in message


def test_l2_an_observation_stored_with_the_action_that_led_to_it(folder):
    for episode in range(EPISODES):
        states = take(episode)[0]
        change(folder, episode, observation__state=lambda s, states=states: states[1:])
    found = [f for f in findings(folder) if f.severity == "error"]
    assert [(f.check, f.episode, f.frame) for f in found] == [("order of rows", None, None)]
    assert "shift the actions by a row" in found[0].message


def test_an_action_scale_that_was_not_the_recorders(folder):
    """A conversion was told 0.04 where 0.02 had been recorded: the policy would go half as far as was shown."""
    path = folder / "meta/info.json"
    path.write_text(path.read_text().replace('"action_scale_m": 0.02', '"action_scale_m": 0.04'))
    severity, check, episode, _, message = only(folder)
    assert (severity, check, episode) == ("warning", "action scale", None)
    assert "the tool goes 50% of the way that actions of 0.04 m ask for" in message


def test_a_few_episodes_that_push_at_an_edge_are_no_wrong_scale():
    """A simulated recording in which some did asked for 54 % of the way together, and for 82 % at the median."""
    nothing = np.zeros(0)
    ways = [(0.8, 1.0)] * 5 + [(0.5, 5.0)] * 2  # product of the ways asked and gone, and of the way asked with itself

    def seen(number, way):
        rows = {bytes([number, row]): row for row in range(100)}
        return lint_module.Compared(number, rows, nothing, nothing, nothing, np.ones((3, 3)), np.array(way))

    episodes = [seen(number, way) for number, way in enumerate(ways)]
    assert sum(went for went, _ in ways) / sum(asked for _, asked in ways) < lint_module.REACHED
    assert list(lint_module.what_follows_actions(episodes, 1.0)) == []
    (found,) = lint_module.what_follows_actions(episodes, 2.0)
    assert found.check == "action scale" and "the tool goes 40% of the way that actions of 2 m" in found.message


def test_l1_entries_that_never_change(folder):
    """Pitch and yaw had min = max, and normalisation made 1e8 of them."""
    for episode in range(EPISODES):
        change(folder, episode, observation__state=setting(slice(None), [7, 16, 17], 0.0))
    found = [f for f in findings(folder) if f.check == "min equals max"]
    assert [(f.severity, f.episode, f.frame) for f in found] == [("warning", None, None)]
    names = ", ".join(STATE[entry] for entry in (7, 16, 17))
    assert found[0].message.startswith(f"{names}: never changes in the whole dataset")


# Episodes beside each other, and labels


def test_l14_an_episode_that_is_there_twice(folder):
    """Neighbours in both halves of a split: 98.15 % on frames that it was trained on, 92.3 % in truth."""
    shutil.copy(data_file(folder, 1), data_file(folder, 3))
    change(folder, 3, episode_index=lambda e: np.full(ROWS, 3))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("error", "twins", 3, 0)
    assert "14 of its 14 rows are those of episode 1" in message


def test_l14_the_end_of_one_episode_that_is_the_start_of_another(folder):
    first, second = take(1), take(3)
    change(
        folder, 3,
        observation__state=lambda s: np.vstack([first[0][8:14], second[0][6:14]]),
        action=lambda a: np.vstack([first[1][8:14], second[1][6:14]]),
    )  # fmt: skip
    found = [f for f in findings(folder) if f.check == "twins"]
    assert [(f.episode, f.frame) for f in found] == [(3, 0)] and "6 of its 14 rows" in found[0].message


def test_g_a_video_that_is_another_episodes(filmed):
    """235 of 758 episodes had a discarded take's frames in them."""
    film(filmed, 2, [picture(0, t) for t in range(ROWS)])
    severity, check, episode, frame, message = only(filmed)
    assert (severity, check, episode, frame) == ("error", "twins", 2, 0)
    assert "14 of its 15 pictures of camera wrist are those of episode 0" in message


def test_l14_an_episode_on_both_sides_of_a_split(folder):
    severity, check, episode, _, _ = only(folder, split={"train": [0, 1, 2], "held_out": [2, 3]})
    assert (severity, check, episode) == ("error", "split", 2)
    assert findings(folder, split={"train": [0, 1], "held_out": [2, 3]}) == []


def test_an_episode_without_a_label(folder):
    label_episode(folder, 2, None)
    severity, check, episode, _, message = only(folder)
    assert (severity, check, episode) == ("warning", "unlabelled", 2) and "label.py" in message


def test_a_dataset_without_labels(folder):
    labels_path(folder).unlink()
    severity, check, episode, _, _ = only(folder)
    assert (severity, check, episode) == ("warning", "unlabelled", None)


def test_labels_past_the_end(folder):
    label_episode(folder, 3, EpisodeLabel(success_start=40))
    severity, check, _, _, message = only(folder)
    assert (severity, check) == ("error", "labels")
    assert "demos.labels.json: episode 3: success start 40 is past the last frame, 14" in message


def test_l22_labels_that_all_begin_a_frame_late(folder):
    """Counted from 1 in the text file, taken for counted from 0."""
    for episode in range(EPISODES):
        label_episode(folder, episode, EpisodeLabel(success_start=11))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("warning", "reward", 0, 10)
    assert "each label begins 1 frame later, as where frames counted from 1" in message


def test_a_reward_that_says_otherwise_than_the_label(folder):
    label_episode(folder, 1, EpisodeLabel(all_fail=True))
    severity, check, episode, frame, message = only(folder)
    assert (severity, check, episode, frame) == ("warning", "reward", 1, 10) and "in 1 episodes" in message


def test_an_episode_labelled_skip_is_left_out(filmed):
    film(filmed, 1, [np.zeros((*SIZE, 3), np.uint8)] * ROWS)
    assert only(filmed)[1] == "flat frames"
    label_episode(filmed, 1, EpisodeLabel(skip=True))
    assert findings(filmed) == []


# Datasets of other programs


def as_foreign(filmed):
    info = json.loads((filmed / "meta/info.json").read_text())
    for name in ("so101", "closing_path"):
        info.pop(name)
    info["features"].pop("capture_time")
    (filmed / "meta/info.json").write_text(json.dumps(info))
    for episode in range(EPISODES):
        path = data_file(filmed, episode)
        pq.write_table(pq.read_table(path).drop(["capture_time"]), path)


def test_of_a_foreign_set_it_says_what_was_not_checked(filmed):
    as_foreign(filmed)
    said = [f.message for f in findings(filmed) if f.check == "not checked"]
    assert len(said) == 2
    assert "tool pose, start pose, reset motion" in said[0] and "dropped ticks" in said[1]
    assert {f.check for f in findings(filmed)} == {"not checked"}  # and its success frames agree with its reward


def test_of_a_foreign_set_degrees_and_what_was_repaired_are_seen(filmed):
    as_foreign(filmed)
    change(filmed, 1, observation__state=lambda s: (s * 180 / np.pi).astype(np.float32))
    info = json.loads((filmed / "meta/info.json").read_text())
    info["total_episodes"] = 3
    (filmed / "meta/info.json").write_text(json.dumps(info))
    found = [f for f in findings(filmed) if f.check != "not checked"]
    assert [(f.severity, f.check, f.episode, f.frame) for f in found] == [
        ("warning", "repaired", None, None),
        ("error", "units", 1, 0),
    ]


# Where it runs


def test_the_command_line_says_it_for_people_and_for_programs(filmed, capsys):
    assert tool.main(tool.Config(dataset=str(filmed))) == 0
    assert capsys.readouterr().out.endswith(f"{filmed}: 0 errors, 1 warnings\n")
    film(filmed, 1, [np.zeros((*SIZE, 3), np.uint8)] * ROWS)
    run = subprocess.run(
        [sys.executable, "-m", "so101.tools.lint", str(filmed), "--json"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 4, run.stderr
    found = json.loads(run.stdout)
    assert [(f["severity"], f["check"], f["episode"], f["frame"]) for f in found] == [
        ("error", "flat frames", 1, 0),
        ("warning", "few labels", None, None),
    ]


def test_of_one_kind_five_are_shown_and_the_rest_counted():
    lines = tool.shortened([Finding("error", "units", episode, 0, "degrees") for episode in range(8)])
    assert len(lines) == 6 and lines[0] == "error: episode 0, frame 0: degrees [units]"
    assert lines[-1] == "error: and 3 more such, of episodes 5, 6, 7 [units]"


def test_the_classifiers_own_split_is_read(folder, tmp_path):
    (tmp_path / "reward").mkdir()
    about = {"provenance": {"report": {"episodes": {"train": [0, 1], "held_out": [1, 2]}}}}
    (tmp_path / "reward" / "reward.json").write_text(json.dumps(about))
    assert tool.main(tool.Config(dataset=str(folder), reward_model=str(tmp_path / "reward"))) == 4


def test_no_training_starts_on_an_error_and_a_warning_is_told(filmed, tmp_path, capsys):
    label_episode(filmed, 3, None)
    film(filmed, 1, [np.zeros((*SIZE, 3), np.uint8)] * ROWS)
    for start in (
        lambda: train_reward.main(train_reward.Config(dataset=str(filmed), output=str(tmp_path / "reward"))),
        lambda: train_sac.known_demonstrations(train_sac.Config(demonstrations=str(filmed))),
    ):
        with pytest.raises(DataError, match="no training on it with 1 error, told above") as stopped:
            start()
        told = capsys.readouterr().err
        assert stopped.value.exit_code == 4 and "warning: episode 3: has no label" in told
        assert "error: episode 1, frame 0: camera wrist: 14 of 15 frames are black or flat" in told
    assert not (tmp_path / "reward").exists()


def test_record_says_at_once_that_its_camera_is_black_and_keeps_the_episode(recording, capsys):  # noqa: F811
    """The person can still press r; nothing is taken back for them."""
    folder = recording(episodes=1)  # the fixture's camera is a black one
    said = capsys.readouterr().out
    assert "error: episode 0, frame 0: camera wrist" in said and "are black or flat" in said
    heard = recording.person.heard
    assert "episode 0 is faulty: press r in the reset to leave it out, or skip it in label.py" in heard
    assert len(open_dataset(folder).episodes) == 1 and not labels_of(folder)[0].skip  # it was the last: no reset

"""Ticks and positions against hand-worked numbers and LeRobot's formula; files that must be refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from so101.errors import ConfigError, DataError, HardwareError
from so101.robot.calibration import Calibration, JointCalibration, Sweep, load_calibration, save_calibration
from so101.schema import JOINTS
from so101.sim.servos import SIM_CALIBRATION

# Laid out as LeRobot writes it, gripper first here: the order in the file means nothing.
LEROBOT = {
    "gripper": {"id": 6, "drive_mode": 0, "homing_offset": 1407, "range_min": 2000, "range_max": 3251},
    "shoulder_pan": {"id": 1, "drive_mode": 0, "homing_offset": -1321, "range_min": 1030, "range_max": 3460},
    "shoulder_lift": {"id": 2, "drive_mode": 0, "homing_offset": 12, "range_min": 800, "range_max": 3201},
    "elbow_flex": {"id": 3, "drive_mode": 0, "homing_offset": 5, "range_min": 850, "range_max": 3090},
    "wrist_flex": {"id": 4, "drive_mode": 0, "homing_offset": -2047, "range_min": 900, "range_max": 3240},
    "wrist_roll": {"id": 5, "drive_mode": 0, "homing_offset": 0, "range_min": 0, "range_max": 4095},
}


def with_drive_mode(mode: int) -> Calibration:
    return Calibration({name: replace(joint, drive_mode=mode) for name, joint in SIM_CALIBRATION.joints.items()})


def written(folder: Path, content: object) -> Path:
    path = folder / "arm.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("mode", [0, 1])
def test_every_tick_comes_back(mode: int) -> None:
    calibration = with_drive_mode(mode)
    for tick in range(4096):
        ticks = np.full(6, tick)
        assert (calibration.to_ticks(calibration.to_position(ticks)) == ticks).all()


def test_a_quarter_turn_is_1024_ticks() -> None:
    joint = JointCalibration(1, 0, 0, 500, 3500, zero_ticks=2000.0)
    joints = {name: replace(joint, id=index) for index, name in enumerate(JOINTS, start=1)}
    joints["elbow_flex"] = replace(joints["elbow_flex"], drive_mode=1)
    calibration = Calibration(joints)
    position = calibration.to_position(np.full(6, 2000 + 1024))
    quarter = math.pi / 2
    assert position[:5] == pytest.approx([quarter, quarter, -quarter, quarter, quarter])
    assert position[5] == pytest.approx((3024 - 500) / 3000)
    assert calibration.velocity(np.full(6, 300)) == pytest.approx(
        [0.460194, 0.460194, -0.460194, 0.460194, 0.460194, 0.1], abs=1e-6
    )
    low, high = calibration.limits()
    assert low[2] == pytest.approx(-1500 / 4096 * 2 * math.pi)  # the inverted joint's limits change places
    assert high[2] == pytest.approx(1500 / 4096 * 2 * math.pi)


@pytest.mark.parametrize(("mode", "closed", "opened"), [(0, 1420, 2671), (1, 2671, 1420)])
def test_the_gripper_is_0_closed_and_1_open(mode: int, closed: int, opened: int) -> None:
    calibration = with_drive_mode(mode)
    assert calibration.to_position(np.full(6, closed))[5] == 0.0
    assert calibration.to_position(np.full(6, opened))[5] == 1.0
    assert (calibration.limits()[0][5], calibration.limits()[1][5]) == (0.0, 1.0)


def test_positions_are_not_clipped_but_ticks_that_no_servo_has_are_refused() -> None:
    beyond = np.array([3400, 3400, 3400, 3400, 4000, 3000])
    assert (SIM_CALIBRATION.to_position(beyond) > SIM_CALIBRATION.limits()[1]).all()
    position = np.zeros(6)
    position[3] = 4.0
    with pytest.raises(HardwareError, match="wrist_flex: position 4.0000 is tick 4626"):
        SIM_CALIBRATION.to_ticks(position)
    position[3] = math.nan
    with pytest.raises(HardwareError, match="wrist_flex"):
        SIM_CALIBRATION.to_ticks(position)


def test_a_lerobot_file_means_what_lerobot_means(tmp_path: Path) -> None:
    calibration = load_calibration(written(tmp_path, LEROBOT))
    assert list(calibration.joints) == list(JOINTS)
    assert calibration.ids == [1, 2, 3, 4, 5, 6]
    assert calibration.names[4] == "wrist_flex"
    for ticks in (1100, 2047, 3000):
        position = calibration.to_position(np.full(6, ticks))
        for index, name in enumerate(JOINTS[:5]):
            middle = (LEROBOT[name]["range_min"] + LEROBOT[name]["range_max"]) / 2
            degrees = (ticks - middle) * 360 / 4095  # LeRobot's DEGREES; a turn has 4096 ticks, so 0.03 % off
            assert math.degrees(position[index]) == pytest.approx(degrees, rel=3e-4)
        assert position[5] == pytest.approx((ticks - 2000) / 1251)  # LeRobot's RANGE_0_100, over 100


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "arm.json"
    save_calibration(path, SIM_CALIBRATION)
    assert load_calibration(path) == SIM_CALIBRATION
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text())["elbow_flex"]["zero_ticks"] == 2105.0


def change(joint: str, **entries: object) -> dict[str, object]:
    return {**LEROBOT, joint: {**LEROBOT[joint], **entries}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "must hold one JSON object"),
        (
            {key: value for key, value in LEROBOT.items() if key != "wrist_roll"},
            "must hold exactly the joints",
        ),
        ({**LEROBOT, "tail": LEROBOT["gripper"]}, "must hold exactly the joints"),
        (change("elbow_flex", colour="red"), "elbow_flex: must have the keys"),
        (
            change("elbow_flex", zero_ticks=2047),
            "gripper: must have the keys .*zero_ticks|shoulder_pan: must have",
        ),
        (change("elbow_flex", range_min=3090), "elbow_flex: range_min 3090 .. range_max 3090"),
        (change("elbow_flex", range_min=3000), "elbow_flex: range_min 3000 .. range_max 3090"),
        (change("elbow_flex", range_min=-3), "elbow_flex: range_min is -3, must be 0 .. 4095"),
        (change("elbow_flex", range_max=4096), "elbow_flex: range_max is 4096"),
        (change("elbow_flex", range_max=3000.5), "elbow_flex: range_max must be a whole number, got 3000.5"),
        (change("elbow_flex", id=True), "elbow_flex: id must be a whole number, got True"),
        (
            change("elbow_flex", homing_offset=2114),
            "elbow_flex: homing_offset is 2114, must be -2047 .. 2047",
        ),
        (change("elbow_flex", drive_mode=2), "elbow_flex: drive_mode is 2, must be 0 or 1"),
        (change("elbow_flex", id=254), "elbow_flex: id is 254, must be 0 .. 253"),
        (change("elbow_flex", id=1), "shoulder_pan and elbow_flex both have id 1"),
    ],
)
def test_a_bad_file_is_refused_by_file_and_joint(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"arm\.json: .*({said})"):
        load_calibration(written(tmp_path, content))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read: No such file .* so101\.tools\.calibrate makes"):
        load_calibration(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"gripper": {')
    with pytest.raises(ConfigError, match=r"torn\.json: no usable JSON"):
        load_calibration(tmp_path / "torn.json")
    with pytest.raises(ConfigError, match="zero_ticks is nan"):
        joints = dict(SIM_CALIBRATION.joints)
        joints["wrist_flex"] = replace(joints["wrist_flex"], zero_ticks=math.nan)
        save_calibration(tmp_path / "new.json", Calibration(joints))
    assert not (tmp_path / "new.json").exists()


SPANS = np.array([2430, 2394, 2242, 2346, 3643, 1251])  # of the simulated arm's joints, in ticks


@pytest.mark.parametrize("old_offset", [-2047, 655])
def test_a_sweep_through_the_seam_is_unwrapped_and_recentred_wherever_the_seam_lies(old_offset: int) -> None:
    """Reference G6 and G7. A servo reads (encoder - offset) modulo 4096, and keeps offsets of -2047 .. 2047."""
    steps = np.linspace(0, 1, 13)[:, None]  # the widest joint moves by 304 ticks between two readings
    way = np.rint(np.concatenate([0.5 + steps[:7] / 2, 1 - steps, steps]) * SPANS).astype(int)  # from the middle
    for seam in range(4096):
        encoder = seam + 683 * np.arange(6) + way  # each joint meets its seam elsewhere
        readings = (encoder - old_offset) % 4096
        sweep = Sweep(readings[0])
        for reading in readings[1:]:
            sweep.follow(reading)
        calibration = sweep.calibration(np.full(6, old_offset), "middle_of_range")
        joints = calibration.joints.values()
        offsets = np.array([joint.homing_offset for joint in joints])
        ranges = np.array([(joint.range_min, joint.range_max) for joint in joints])
        assert (np.abs(offsets) <= 2047).all()
        now = (encoder - offsets) % 4096
        assert (now.min(axis=0) == ranges[:, 0]).all()
        assert (now.max(axis=0) == ranges[:, 1]).all()
        assert (now - now[0] == way - way[0]).all()  # no jump on the whole way
        true = (way - SPANS / 2) * 2 * math.pi / 4096
        assert np.allclose(calibration.to_position(now[20])[:5], true[20, :5])
        assert calibration.to_position(now[-1])[5] == 1.0
        clear = (readings.min(axis=0) >= 100) & (readings.max(axis=0) <= 3995) & (np.ptp(readings, axis=0) == SPANS)
        assert (offsets[clear] == old_offset).all()  # an offset that does is not worn by writing another


def test_the_zero_can_be_where_the_joints_were_held() -> None:
    sweep = Sweep(np.full(6, 50))
    for reading in (900, 1800, 900, 50, 3600, 3500):
        sweep.follow(np.full(6, reading))
    calibration = sweep.calibration(np.full(6, 10), "held_pose")
    joint = calibration.joints["elbow_flex"]
    # 3500 is 596 ticks below 0, so that the range is -596 .. 1800 and its middle 602.
    assert joint == JointCalibration(3, 0, 10 + 602 - 2047, 849, 3245, 50.0 + 2047 - 602)
    assert calibration.to_position(np.full(6, 1495))[:5] == pytest.approx(0)


def test_a_range_that_is_tiny_or_wraps_is_refused_by_joint() -> None:
    sweep = Sweep(np.array([2000] * 6))
    with pytest.raises(DataError, match="shoulder_pan: moved over 0 ticks only.* sweep again"):
        sweep.calibration(np.zeros(6), "middle_of_range")
    for turned in range(0, 4096, 455):
        sweep.follow(np.array([2000 + turned // 2] * 4 + [2000 + turned, 2400]) % 4096)
    with pytest.raises(DataError, match="wrist_roll: turned over 4095 ticks, a whole turn"):
        sweep.calibration(np.zeros(6), "middle_of_range")


def test_a_reading_too_far_from_the_last_one_ends_the_sweep() -> None:
    sweep = Sweep(np.full(6, 4000))
    sweep.follow(np.array([4000, 4000, 900, 4000, 4000, 4000]))  # 996 ticks on, through the seam
    assert sweep.here[2] == 4996
    with pytest.raises(HardwareError, match="elbow_flex: 90 degrees between two readings"):
        sweep.follow(np.array([4000, 4000, 1925, 4000, 4000, 4000]))


def test_both_habits_of_lerobot_s_zero(tmp_path: Path) -> None:
    """L21: on the author's arm they are up to 17 degrees apart."""
    path = written(tmp_path, LEROBOT)
    middle, held = load_calibration(path), load_calibration(path, "held_pose")
    assert middle.joints["shoulder_pan"].zero_ticks == 2245.0
    assert held.joints["shoulder_pan"].zero_ticks == 2047.0
    apart = middle.to_position(np.full(6, 2047)) - held.to_position(np.full(6, 2047))
    assert math.degrees(apart[0]) == pytest.approx(-17.4, abs=0.05)
    # From 0.4.3 on LeRobot writes 0 .. 4095 for wrist_roll without a sweep: then both mean the same.
    assert abs(math.degrees(apart[4])) < 0.05
    ours = tmp_path / "ours.json"
    save_calibration(ours, held)
    assert load_calibration(ours, "middle_of_range") == held  # our own file's zeros are its own


def test_lerobot_can_read_what_is_written_for_it(tmp_path: Path) -> None:
    path = tmp_path / "robots" / "so_follower" / "arm.json"
    save_calibration(path, load_calibration(written(tmp_path, LEROBOT)), lerobot=True)
    assert json.loads(path.read_text()) == LEROBOT


def test_a_calibration_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "arm.json"
    path.write_text("of great value")
    assert save_calibration(path, SIM_CALIBRATION) == tmp_path / "arm.1.json"
    assert save_calibration(path, SIM_CALIBRATION) is None  # the same once more: nothing to keep
    assert save_calibration(path, with_drive_mode(1)) == tmp_path / "arm.2.json"
    assert (tmp_path / "arm.1.json").read_text() == "of great value"
    assert load_calibration(tmp_path / "arm.2.json") == SIM_CALIBRATION
    assert load_calibration(path) == with_drive_mode(1)

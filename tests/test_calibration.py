"""Ticks and positions against hand-worked numbers and LeRobot's formula; files that must be refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from so101.errors import ConfigError, HardwareError
from so101.robot.calibration import Calibration, JointCalibration, load_calibration, save_calibration
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
        ([], "must hold exactly the joints"),
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
    with pytest.raises(ConfigError, match=r"none\.json: no such calibration file"):
        load_calibration(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"gripper": {')
    with pytest.raises(ConfigError, match=r"torn\.json: cannot be read"):
        load_calibration(tmp_path / "torn.json")
    with pytest.raises(ConfigError, match="zero_ticks is nan"):
        joints = dict(SIM_CALIBRATION.joints)
        joints["wrist_flex"] = replace(joints["wrist_flex"], zero_ticks=math.nan)
        save_calibration(tmp_path / "new.json", Calibration(joints))
    assert not (tmp_path / "new.json").exists()

"""The one file that knows real from simulated, and the simulated arm behind a real serial port."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import LiveArm

from so101.env import EnvConfig
from so101.errors import ConfigError, HardwareError
from so101.rig import ArmConfig, RigConfig, open_rig
from so101.robot.calibration import save_calibration
from so101.robot.camera import CameraConfig
from so101.robot.teleop import EVALUATION
from so101.schema import Preprocess, RewardSpec
from so101.sim.servos import SIM_CALIBRATION, SimServos

ROOT = Path(__file__).parent.parent


@pytest.fixture
def video(tmp_path):
    """A short file that OpenCV plays as if it were a camera; noise, since a flat picture is no camera's."""
    path = tmp_path / "camera.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, (64, 48))
    for number in range(20):
        writer.write(np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8))
    writer.release()
    return str(path)


def test_real_and_simulated_parts_do_not_mix():
    with pytest.raises(ConfigError, match="leader, cameras.wrist"):
        RigConfig(follower=ArmConfig(port="/dev/ttyACM0"))
    with pytest.raises(ConfigError, match="cameras: got none"):
        RigConfig(cameras={})


@pytest.mark.parametrize("name", ["", "a/b", "..", "wrist.mp4", "left wrist", "a:b", "k\u00e4mera", "wrist\n"])
def test_a_camera_s_name_is_fit_for_files_and_columns(name):
    with pytest.raises(ConfigError, match=r"cameras: got the name .*use letters, digits, _ and - only, as in wrist$"):
        RigConfig(cameras={name: CameraConfig(source="sim")})


def test_two_cameras_see_the_same_world(tmp_path):
    cameras = {"wrist": CameraConfig(source="sim"), "side_2-left": CameraConfig(source="sim")}
    with open_rig(RigConfig(cameras=cameras), 0) as rig:
        assert [camera.latest()[0].shape for camera in rig.cameras.values()] == [(480, 640, 3)] * 2


def test_a_stiff_leader_comes_to_rest_with_the_follower():
    """It would fall from where it is when it is let go at last."""
    with open_rig(RigConfig(), 0) as rig:
        rig.teleop.hear(EVALUATION)
        rig.make_env(EnvConfig(), Preprocess(), RewardSpec(), 0).reset()
        leader = rig.teleop.leader.arm.bus.port.servos
        assert leader.torque_on.all() and np.abs(leader.angle[:5] - ArmConfig().rest[:5]).max() > 1
    assert not leader.torque_on.any()
    assert np.abs(leader.angle[:5] - ArmConfig().rest[:5]).max() < 0.2


def test_a_rest_pose_that_the_arm_cannot_reach_is_refused_before_anything_moves():
    config = RigConfig(follower=ArmConfig(rest=[0, -2.5, 1.66, 0.73, 1.571, 0.05]))
    with (
        pytest.raises(ConfigError, match="rig.follower.rest: shoulder_lift is -2.500, calib"),
        open_rig(config, 0),
    ):
        pytest.fail("started")


def test_swapped_arms_stop_the_start(tmp_path, video):
    """Field record 1, 2: each port leads to the other's servos, and the follower would follow nothing."""
    live_arms = {}
    for name, offset in (("follower", 0), ("leader", 40)):
        live_arms[name] = LiveArm(SimServos(), tmp_path / name)
        for index in range(6):
            live_arms[name].servos.store(index, "Torque_Enable", 1)  # both are up, from a program that was killed
        joints = dict(SIM_CALIBRATION.joints)
        joints["elbow_flex"] = replace(joints["elbow_flex"], homing_offset=joints["elbow_flex"].homing_offset + offset)
        save_calibration(tmp_path / f"{name}.json", replace(SIM_CALIBRATION, joints=joints))
        live_arms[name].servos.store(2, "Homing_Offset", joints["elbow_flex"].homing_offset)
    rig = {
        name: ArmConfig(live_arms[other].path, str(tmp_path / f"{name}.json"))
        for name, other in (("follower", "leader"), ("leader", "follower"))
    }
    config = RigConfig(**rig, cameras={"wrist": CameraConfig(source=video, width=64, height=48)})
    with pytest.raises(HardwareError, match="leader and follower seem swapped"), open_rig(config, 0):
        pytest.fail("started")
    for arm in live_arms.values():
        arm.close()
        assert arm.servos.torque_on.all()  # a start that was refused lets nothing fall

"""The one file that knows real from simulated, and the simulated arm behind a real serial port."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from so101 import config as configs
from so101.errors import ConfigError, HardwareError
from so101.rig import ArmConfig, RigConfig, open_rig
from so101.robot.camera import Camera, CameraConfig
from so101.timing import Clock

ROOT = Path(__file__).parent.parent


@pytest.fixture
def video(tmp_path):
    """A short file that OpenCV plays as if it were a camera; blue gets brighter with time."""
    path = tmp_path / "camera.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, (64, 48))
    for number in range(20):
        writer.write(np.full((48, 64, 3), (10 + 10 * number, 0, 0), np.uint8))  # BGR
    writer.release()
    return str(path)


def test_a_camera_keeps_its_newest_frame_as_rgb_with_its_time(video):
    clock = Clock()
    camera = Camera("wrist", CameraConfig(source=video, width=64, height=48), clock)
    frame, taken = camera.latest()
    assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8
    assert frame[..., 2].mean() > frame[..., 0].mean()  # blue is the last channel
    assert 0 <= taken <= clock.now()
    camera.close()


def test_a_camera_that_stopped_is_stale_and_says_so(video):
    camera = Camera("wrist", CameraConfig(source=video, width=64, height=48, max_age=0.2), Clock())
    camera.latest()
    camera.clock.sleep_until(camera.clock.now() + 0.4)  # the file has ended meanwhile
    with pytest.raises(HardwareError, match="newest frame is .* s old"):
        camera.latest()
    camera.close()


def test_a_camera_of_another_size_or_none_at_all_is_refused(video):
    camera = Camera("wrist", CameraConfig(source=video), Clock())
    with pytest.raises(HardwareError, match=r"gives \(48, 64, 3\), config asks for \(480, 640, 3\)"):
        camera.latest()
    camera.close()
    with pytest.raises(HardwareError, match="camera wrist: cannot open"):
        Camera("wrist", CameraConfig(source="/nowhere/camera"), Clock())


def test_real_and_simulated_parts_do_not_mix():
    with pytest.raises(ConfigError, match="leader, cameras.wrist"):
        RigConfig(follower=ArmConfig(port="/dev/ttyACM0"))
    with pytest.raises(ConfigError, match="cameras: got none"):
        RigConfig(cameras={})


def test_two_cameras_see_the_same_world(tmp_path):
    cameras = {"wrist": CameraConfig(source="sim"), "second": CameraConfig(source="sim")}
    with open_rig(RigConfig(cameras=cameras), 0) as rig:
        assert [camera.latest()[0].shape for camera in rig.cameras.values()] == [(480, 640, 3)] * 2


def test_the_real_path_drives_a_served_arm_over_a_pseudo_terminal(tmp_path, video):
    """serial.Serial, calibration from a file, a real clock: what a real arm would run through."""
    from so101.robot.calibration import save_calibration
    from so101.sim.servos import SIM_CALIBRATION

    save_calibration(tmp_path / "arm.json", SIM_CALIBRATION)
    command = [sys.executable, "-u", "-m", "so101.tools.serve_sim"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline()
        port = re.search(r"/dev/\S+", line).group()
        rig_json = {
            "follower": {"port": port, "calibration": str(tmp_path / "arm.json"), "rest": [0, 0, 0, 0, 0, 0.05]},
            "leader": None,
            "cameras": {"wrist": {"source": video, "width": 64, "height": 48}},
        }
        (tmp_path / "rig.json").write_text(json.dumps(rig_json))
        config = configs.load(RigConfig, tmp_path / "rig.json")
        try:
            with open_rig(config, 0) as rig:
                before = rig.arm.read().position
                goal = before.copy()
                goal[0] += 0.2
                rig.arm.command(goal)
                rig.clock.sleep_until(rig.clock.now() + 1.0)
                assert rig.arm.read().position[0] - before[0] == pytest.approx(0.2, abs=0.02)
                arm, faults = rig.arm, rig.arm.bus.faults
            assert not faults
            with pytest.raises(Exception):  # noqa: B017  the port is closed: nothing is left open
                arm.read()
        finally:
            server.terminate()

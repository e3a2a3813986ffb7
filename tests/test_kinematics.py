"""Kinematics against two physics engines' figures (tests/data), finite differences and hand-derived poses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from so101.errors import ConfigError
from so101.robot.kinematics import URDF_LIMITS, forward, jacobian, jaw_pose, rpy, solve_ik

DATA = Path(__file__).parent / "data"
FK = json.loads((DATA / "fk_cases.json").read_text())
IK = json.loads((DATA / "ik_cases.json").read_text())
LOW, HIGH = URDF_LIMITS[:5].T
HOME = np.array([-0.00084, 0.15639, -0.16078, 1.5708, 1.5708])  # straight down over (0.25, 0, 0.07)


def jaw_frame(joints):
    """moving_jaw_link in the base frame, through gripper_link."""
    position, rotation = forward(joints, "gripper_link")
    origin, axes = jaw_pose(joints[5])
    return position + rotation @ origin, rotation @ axes


def miss(joints: np.ndarray, target: np.ndarray, frame: str = "tool") -> float:
    return float(np.linalg.norm(forward(joints, frame)[0] - target))


def tilt(joints: np.ndarray) -> float:
    """Angle between the approach direction and straight down."""
    return math.acos(np.clip(forward(joints, "gripper_link")[1][2, 2], -1, 1))


@pytest.mark.parametrize("frame", ["gripper_link", "gripper_frame_link", "moving_jaw_link"])
def test_forward_agrees_with_pinocchio_on_the_urdf(frame):
    for case in FK["cases"]:
        joints = np.array(case["q"])
        position, rotation = jaw_frame(joints) if frame == "moving_jaw_link" else forward(joints, frame)
        # The URDF's text is rounded; the engines differ from each other by 2.9e-6 m and 1.5e-5.
        np.testing.assert_allclose(position, case[frame]["pos"], atol=5e-6, err_msg=case["name"])
        np.testing.assert_allclose(rotation, case[frame]["R"], atol=3e-5, err_msg=case["name"])


def test_forward_agrees_with_mujoco_sites():
    for case in FK["cases"]:
        joints = np.array(case["q"])
        for frame, site in (
            ("gripper_frame_link", "mjcf_official_site_gripperframe"),
            ("tool", "mjcf_pick101_site_gripperframe"),
        ):
            np.testing.assert_allclose(forward(joints, frame)[0], case[site]["pos"], atol=1e-7)


def test_tool_axes_from_the_engines_site():
    # That site's x is the approach direction (tool -z), its z is the gripper's x (tool y).
    for case in FK["cases"]:
        site = np.array(case["mjcf_pick101_site_gripperframe"]["R"])
        tool = forward(np.array(case["q"]))[1]
        np.testing.assert_allclose(-tool[:, 2], site[:, 0], atol=1e-6)
        np.testing.assert_allclose(tool[:, 1], site[:, 2], atol=1e-6)


def test_working_pose_is_nearly_the_identity():
    position, rotation = forward(HOME)
    np.testing.assert_allclose(position, [0.25, 0.0, 0.07], atol=1e-5)
    # 2.79 degrees: what the gripper is rolled by when wrist_roll is 0.
    assert math.degrees(math.acos((np.trace(rotation) - 1) / 2)) < 3
    assert np.abs(rpy(rotation)).max() < math.radians(3)
    # pan turns clockwise seen from above: +30 degrees of pan is -30 degrees of yaw
    turned = rpy(forward(HOME + [math.radians(30), 0, 0, 0, 0])[1])
    assert math.degrees(turned[2] - rpy(rotation)[2]) == pytest.approx(-30, abs=1e-9)


def test_poses_measured_with_a_tape_on_the_real_arm():
    # degrees -> x and |y| in m of the fixed finger, by a tape measure: the record claims 1.5 cm of agreement
    for degrees, x, y in (
        ([1.23, 103.74, -85.41, -1.54, 92.70], 0.440, 0.010),
        ([-0.53, -98.11, 94.37, 76.09, 92.79], 0.135, 0.010),
        ([22.15, 53.19, -41.63, 79.52, 92.88], 0.280, 0.120),
    ):
        position, _ = forward(np.radians(degrees), "gripper_frame_link")
        assert position[0] == pytest.approx(x, abs=0.015)
        assert abs(position[1]) == pytest.approx(y, abs=0.015)


def test_rpy_by_hand():
    # A quarter turn about x (roll) takes y to z; about z (yaw) takes x to y.
    np.testing.assert_allclose(rpy(np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])), [math.pi / 2, 0, 0], atol=1e-12)
    np.testing.assert_allclose(rpy(np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])), [0, 0, math.pi / 2], atol=1e-12)
    # Nose down by 30 degrees about y: x -> (cos, 0, -sin)
    s, c = 0.5, math.sqrt(0.75)
    np.testing.assert_allclose(rpy(np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])), [0, math.pi / 6, 0], atol=1e-12)


def test_jaw_opens_towards_gripper_x():
    inner_tip = np.array([-0.0123, -0.0775, 0.0189])
    across = []
    for jaw in (-0.17, 0.0, 0.2, 0.7):
        joints = np.append(HOME, jaw)
        origin, axes = jaw_frame(joints)
        gripper, rotation = forward(joints, "gripper_link")
        across.append(((origin + axes @ inner_tip - gripper) @ rotation)[0])
    # from the table of the tip's x in the mesh: -10, 0, ~11.5 and 40 degrees
    np.testing.assert_allclose(across, [-0.005, 0.008, 0.024, 0.060], atol=0.0015)


def test_five_or_six_joints_are_the_same_arm():
    five, six = forward(HOME), forward(np.append(HOME, 0.7))
    assert (five[0] == six[0]).all() and (five[1] == six[1]).all()


@pytest.mark.parametrize("frame", ["tool", "gripper_link", "gripper_frame_link"])
def test_jacobian_against_finite_differences(frame):
    rng, h = np.random.default_rng(0), 1e-6
    for _ in range(20):
        joints = rng.uniform(LOW, HIGH)
        result = jacobian(joints, frame)
        rotation = forward(joints, frame)[1]
        for index in range(5):
            step = np.zeros(5)
            step[index] = h
            (ahead, turned), (behind, back) = forward(joints + step, frame), forward(joints - step, frame)
            spin = (turned - back) / (2 * h) @ rotation.T  # skew-symmetric, [w]x
            angular = [spin[2, 1], spin[0, 2], spin[1, 0]]
            np.testing.assert_allclose(result[:3, index], (ahead - behind) / (2 * h), atol=1e-8)
            np.testing.assert_allclose(result[3:, index], angular, atol=1e-8)


def test_jacobian_agrees_with_both_engines():
    for case in FK["jacobian_cases"]:
        joints = np.array(case["q"])
        for key, frame, tolerance in (
            ("J_pin_gripper_frame_link", "gripper_frame_link", 1.2e-5),
            ("J_mujoco_official_site", "gripper_frame_link", 1e-7),
            ("J_mujoco_pick101_site", "tool", 1e-7),
        ):
            np.testing.assert_allclose(jacobian(joints, frame), np.array(case[key])[:, :5], atol=tolerance)


def test_roll_never_moves_the_tool_but_does_move_the_urdf_frame():
    rng = np.random.default_rng(1)
    for _ in range(50):
        joints = rng.uniform(LOW, HIGH)
        assert np.abs(jacobian(joints)[:3, 4]).max() < 1e-17
        assert np.linalg.norm(jacobian(joints, "gripper_frame_link")[:3, 4]) == pytest.approx(0.0079, abs=1e-5)


@pytest.mark.parametrize("down_gain", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name,frame", [("A", "gripper_frame_link"), ("B", "tool")])
def test_ik_reaches_every_target_of_the_published_sets(name, frame, down_gain):
    for case in IK[name]:
        target = np.array(case["target"])
        for iterations in (10, 60):
            joints = solve_ik(
                target,
                np.zeros(5),
                frame=frame,
                low=LOW,
                high=HIGH,
                down_gain=down_gain,
                max_iterations=iterations,
            )
            assert miss(joints, target, frame) < 1e-4
            assert (joints >= LOW).all() and (joints <= HIGH).all()


def test_ik_leaves_locked_joints_alone():
    start = np.array([0, 0, 0, math.pi / 2, math.pi / 2])
    for case in IK["C"]:
        target = np.array(case["target"])
        for down_gain in (0.0, 0.5):
            joints = solve_ik(
                target, start, low=LOW, high=HIGH, locked=("wrist_flex", "wrist_roll"), down_gain=down_gain
            )
            assert (joints[3:] == start[3:]).all()
            assert miss(joints, target) < 1e-4


def test_ik_never_moves_the_roll_in_the_tool_frame():
    for case in IK["B"]:
        joints = solve_ik(np.array(case["target"]), np.array([0, 0, 0, 0, 1.3]), low=LOW, high=HIGH, max_iterations=50)
        assert joints[4] == pytest.approx(1.3, abs=1e-12)


def test_ik_turns_the_gripper_down_where_it_can():
    target = np.array([0.25, 0.0, 0.07])
    tilted = solve_ik(target, np.zeros(5), low=LOW, high=HIGH, down_gain=0.0, max_iterations=50)
    upright = solve_ik(target, np.zeros(5), low=LOW, high=HIGH, max_iterations=50)
    assert tilt(tilted) > 0.3
    assert tilt(upright) < math.radians(0.5)
    assert miss(upright, target) < 1e-4
    np.testing.assert_allclose(upright[1:4], HOME[1:4], atol=0.01)


def test_ik_tilts_no_more_than_the_target_demands():
    # No vertical pose exists at (0.33, 0, 0.15). A scan of the one free angle gives the smallest tilt.
    target = np.array([0.33, 0.0, 0.15])
    joints = solve_ik(target, HOME, low=LOW, high=HIGH, max_iterations=100)
    scan = []
    for wrist in np.linspace(-1.65, 1.65, 400):
        start = np.array([0.0, 0.3, 0.0, wrist, math.pi / 2])
        found = solve_ik(target, start, low=LOW, high=HIGH, locked=("wrist_flex",), down_gain=0.0, max_iterations=40)
        if miss(found, target) < 1e-4:
            scan.append(tilt(found))
    assert miss(joints, target) < 1e-4
    assert min(scan) > 0.1
    assert tilt(joints) < min(scan) + math.radians(1.5)


@pytest.mark.parametrize("down_gain", [0.0, 0.5, 1.0])
def test_ten_iterations_follow_a_tick_of_two_centimetres(down_gain):
    rng = np.random.default_rng(2)
    for _ in range(20):
        target, joints = np.array([0.25, 0.0, 0.07]), HOME
        for _ in range(15):
            target = np.clip(target + rng.uniform(-0.02, 0.02, 3), [0.18, -0.12, 0.006], [0.32, 0.12, 0.12])
            joints = solve_ik(target, joints, low=LOW, high=HIGH, down_gain=down_gain)
            assert miss(joints, target) < 5e-4


def test_ik_of_a_target_out_of_reach_comes_as_near_as_it_can():
    # Straight out from the shoulder the tool reaches sqrt(0.1126^2 + 0.028^2) + 0.135 + 0.1592 = 0.410 m.
    target, shoulder = np.array([0.6, 0.0, 0.1166]), np.array([0.0388 + 0.0304, 0.0, 0.1166])
    joints = solve_ik(target, HOME, low=LOW, high=HIGH, max_iterations=100)
    assert np.linalg.norm(forward(joints)[0] - shoulder) == pytest.approx(0.410, abs=0.005)


def test_ik_starts_inside_the_limits_and_stays_there():
    rest = np.array([-0.0591, -1.8415, 1.7135, 0.7210, -0.1097])  # outside the URDF's limits
    joints = solve_ik(np.array([0.2, 0.05, 0.1]), rest, low=LOW, high=HIGH, max_iterations=50)
    assert (joints >= LOW).all() and (joints <= HIGH).all()
    assert miss(joints, np.array([0.2, 0.05, 0.1])) < 1e-4


def test_wrong_names_are_refused_with_the_right_ones():
    with pytest.raises(ConfigError, match="no frame 'wrist'.*tool, gripper_link, gripper_frame_link"):
        forward(HOME, "wrist")
    with pytest.raises(ConfigError, match="no 'roll'.*shoulder_pan.*wrist_roll"):
        solve_ik(np.array([0.25, 0.0, 0.07]), HOME, locked=("roll",))

"""Where the tool is for given joint angles, how it moves with them, and which angles put it somewhere.

The SO-101 is a planar chain (lift, elbow, wrist_flex all pitch about one axis) on a turntable (pan), with a
gripper that rolls about its own axis. So everything has a closed form in plain floats, ten times faster than
a chain of 4x4 matrices. The lengths are SO-ARM100's so101_new_calib.urdf (TheRobotStudio, Apache 2.0).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from so101.errors import ConfigError
from so101.schema import ARM_JOINTS

# Points of gripper_link (m) that can be asked for, with the axes of their frame, as columns, in gripper_link.
TOOL = (0.0, 0.0, -0.0981274)  # between the fingertips, on the roll axis, so that wrist_roll never moves it
TIP_BELOW_TOOL = 0.0063  # m; the fingertips of a vertical gripper reach this far below the tool point
FRAMES = {
    # x = -y, y = x, z = z: the working pose (pan 0, straight down, wrist_roll +pi/2) comes out 2.8 degrees
    # from the identity: gripper -y (where the camera is) points away from the base, gripper x to the left.
    "tool": (TOOL, np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])),
    "gripper_link": ((0.0, 0.0, 0.0), np.eye(3)),
    # The URDF's own end effector frame: on the fixed finger, z along the approach direction.
    "gripper_frame_link": ((-0.0079, -0.000218121, -0.0981274), np.diag([-1.0, 1.0, -1.0])),
}
JAW_PIVOT = (0.0202, 0.0188, -0.0234)  # of the moving jaw in gripper_link, m
JAW_CLOSED, JAW_OPEN = math.radians(-10), math.radians(100)  # jaw angles at opening 0 and 1
ROLL_OFFSET = 0.0486795  # rad; the gripper's roll at wrist_roll = 0
DOWN = math.pi / 2  # the sum of lift, elbow and wrist_flex when the gripper points straight down
DOWN_TASK = np.array([0.0, 1.0, 1.0, 1.0, 0.0])  # how that sum changes with the joints
DIAGONAL = np.diag_indices(3)
DAMPING = 1e-6  # m^2, lambda squared near the target
ERROR_DAMPING = 0.1  # and what a squared error adds to it: far targets damp more
TURN_DAMPING = 0.3
MAX_STEP = 0.5  # rad, largest motion of a joint in one iteration
SETTLED = 1e-3  # rad; a tilt, or a motion, too small to go on turning for
POLISH = 3  # iterations kept for the position alone, when it is not reached by then

# The URDF's joint ranges, (low, high) in rad: what a whole sweep covers. A real arm's limits are its calibrated
# ranges, and the usual rest pose lies outside of these.
URDF_LIMITS = np.array(
    [
        (-1.91986, 1.91986),
        (-1.74533, 1.74533),
        (-1.69, 1.69),
        (-1.65806, 1.65806),
        (-2.74385, 2.84121),
        (-0.174533, 1.74533),
    ]
)


class Planar(NamedTuple):
    """A point of the gripper in the arm's plane, and what its Jacobian needs."""

    radius: float  # m from the pan axis, along the arm
    lateral: float  # m to the left of the arm's plane
    height: float  # m
    elbow: tuple[float, float]  # (radius, height) of the point as seen from the elbow axis
    wrist: tuple[float, float]  # and from the wrist_flex axis
    roll: tuple[float, float]  # d(lateral, upward in the gripper) / d(wrist_roll)
    pitch: float  # rad; lift + elbow + wrist_flex


def _planar(joint_rad: Sequence[float], point: tuple[float, float, float]) -> Planar:
    """Follow the chain in the arm's plane to a point (m) of gripper_link."""
    lift, elbow, wrist, roll = joint_rad[1], joint_rad[2], joint_rad[3], joint_rad[4]
    a, b, c = lift, lift + elbow, lift + elbow + wrist
    cos_roll, sin_roll = math.cos(ROLL_OFFSET - roll), math.sin(ROLL_OFFSET - roll)
    u = -sin_roll * point[0] + cos_roll * point[1]  # to the left
    v = cos_roll * point[0] + sin_roll * point[1]  # up, when the gripper is level
    extent = 0.0611 - point[2]  # along the gripper, from the wrist_flex axis
    cos_c, sin_c = math.cos(c), math.sin(c)
    wrist_r, wrist_z = extent * cos_c + v * sin_c, -extent * sin_c + v * cos_c
    cos_b, sin_b = math.cos(b), math.sin(b)
    elbow_r = 0.1349 * cos_b + 0.0052 * sin_b + wrist_r
    elbow_z = -0.1349 * sin_b + 0.0052 * cos_b + wrist_z
    cos_a, sin_a = math.cos(a), math.sin(a)
    radius = 0.0303992 + 0.028 * cos_a + 0.11257 * sin_a + elbow_r
    height = 0.1166 - 0.028 * sin_a + 0.11257 * cos_a + elbow_z
    return Planar(radius, u - 0.0001778, height, (elbow_r, elbow_z), (wrist_r, wrist_z), (v, -u), c)


def point_position(joint_rad: Sequence[float], point: tuple[float, float, float]) -> np.ndarray:
    """Position (3,) in the base frame, m, of a point (m) fixed in gripper_link; joints in rad."""
    p = _planar(joint_rad, point)
    cos, sin = math.cos(joint_rad[0]), math.sin(joint_rad[0])
    return np.array([0.0388353 + p.radius * cos + p.lateral * sin, -p.radius * sin + p.lateral * cos, p.height])


def point_jacobian(joint_rad: Sequence[float], point: tuple[float, float, float]) -> np.ndarray:
    """(3, 5), m/rad: how a point (m) fixed in gripper_link moves with the five joints, base axes."""
    p = _planar(joint_rad, point)
    cos, sin = math.cos(joint_rad[0]), math.sin(joint_rad[0])
    sin_c, cos_c = math.sin(p.pitch), math.cos(p.pitch)
    # A joint that pitches by dq moves a point at (r, z) from its axis by (z, -r) dq.
    radial = (p.height - 0.1166, p.elbow[1], p.wrist[1], p.roll[1] * sin_c)
    upward = (0.0303992 - p.radius, -p.elbow[0], -p.wrist[0], p.roll[1] * cos_c)
    sideways = p.roll[0]
    return np.array(
        [
            [
                -p.radius * sin + p.lateral * cos,
                *(r * cos for r in radial[:3]),
                radial[3] * cos + sideways * sin,
            ],
            [
                -p.radius * cos - p.lateral * sin,
                *(-r * sin for r in radial[:3]),
                -radial[3] * sin + sideways * cos,
            ],
            [0.0, *upward],
        ]
    )


def gripper_rotation(joint_rad: Sequence[float]) -> np.ndarray:
    """(3, 3): the axes of gripper_link, as columns, in the base frame. Its -z is the approach direction."""
    cos, sin = math.cos(joint_rad[0]), math.sin(joint_rad[0])
    pitch = joint_rad[1] + joint_rad[2] + joint_rad[3]
    cos_c, sin_c = math.cos(pitch), math.sin(pitch)
    cos_roll, sin_roll = math.cos(ROLL_OFFSET - joint_rad[4]), math.sin(ROLL_OFFSET - joint_rad[4])
    return np.array(
        [
            [cos_roll * sin_c * cos - sin_roll * sin, sin_roll * sin_c * cos + cos_roll * sin, -cos_c * cos],
            [-cos_roll * sin_c * sin - sin_roll * cos, -sin_roll * sin_c * sin + cos_roll * cos, cos_c * sin],
            [cos_roll * cos_c, sin_roll * cos_c, sin_c],
        ]
    )


def forward(joint_rad: np.ndarray, frame: str = "tool") -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) in m and axes (3, 3, as columns) of a frame in the base frame; 5 or 6 joints in rad.

    Raises ConfigError for a frame that does not exist.
    """
    point, axes = _frame(frame)
    joints = np.asarray(joint_rad).tolist()
    return point_position(joints, point), gripper_rotation(joints) @ axes


def jaw_angle(opening: float) -> float:
    """The jaw's angle in rad at an opening, 0 closed .. 1 open; it is linear in it (DESIGN.md, section 4)."""
    return JAW_CLOSED + opening * (JAW_OPEN - JAW_CLOSED)


def jaw_pose(jaw_angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Origin (3,) in m and axes (3, 3) of moving_jaw_link in gripper_link; a larger angle opens towards +x."""
    cos, sin = math.cos(jaw_angle), math.sin(jaw_angle)
    return np.array(JAW_PIVOT), np.array([[cos, -sin, 0.0], [0.0, 0.0, -1.0], [sin, cos, 0.0]])


def jacobian(joint_rad: np.ndarray, frame: str = "tool") -> np.ndarray:
    """(6, 5): velocity (m/rad) and angular velocity (rad/rad) of a frame's origin per joint, in base axes.

    Raises ConfigError for a frame that does not exist.
    """
    point, _ = _frame(frame)
    joints = np.asarray(joint_rad).tolist()
    cos, sin = math.cos(joints[0]), math.sin(joints[0])
    pitch_axis = (sin, cos, 0.0)
    roll_axis = gripper_rotation(joints)[:, 2]
    angular = np.array([(0.0, 0.0, -1.0), pitch_axis, pitch_axis, pitch_axis, roll_axis]).T
    return np.vstack([point_jacobian(joints, point), angular])


def rpy(rotation: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw (3,) in rad of a rotation matrix (3, 3) = Rz(yaw) Ry(pitch) Rx(roll)."""
    (r00, _, _), (r10, _, _), (r20, r21, r22) = rotation.tolist()
    return np.array([math.atan2(r21, r22), math.atan2(-r20, math.hypot(r00, r10)), math.atan2(r10, r00)])


def _frame(name: str) -> tuple[tuple[float, float, float], np.ndarray]:
    if name not in FRAMES:
        raise ConfigError(f"kinematics: there is no frame {name!r}; use one of {', '.join(FRAMES)}")
    return FRAMES[name]


def solve_ik(
    target_position: np.ndarray,
    start_rad: np.ndarray,
    *,
    frame: str = "tool",
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    locked: Sequence[str] = (),
    down_gain: float = 0.5,
    max_iterations: int = 10,
    tolerance: float = 1e-5,
) -> np.ndarray:
    """Joint angles (5,) in rad that put a frame's origin at `target_position` (3,) m.

    Damped least squares on the position (Nakamura and Hanafusa 1986); what freedom is left turns the
    gripper straight down, by `down_gain` of the remaining angle per iteration, 0 for position alone. Joints
    named in `locked` stay where `start_rad` (5,) has them; the others stay within `low` .. `high` (5,). It
    ends within `tolerance` (m), or with the nearest that `max_iterations` found: compare `forward` of it with
    the target.
    Raises ConfigError for a frame or a joint that does not exist.
    """
    point, _ = _frame(frame)
    unknown = [name for name in locked if name not in ARM_JOINTS]
    if unknown:
        raise ConfigError(f"locked joints: there is no {unknown[0]!r}; use names out of {', '.join(ARM_JOINTS)}")
    free = np.array([float(name not in locked) for name in ARM_JOINTS])
    low = np.full(5, -np.inf) if low is None else low
    high = np.full(5, np.inf) if high is None else high
    joints = np.asarray(start_rad, dtype=float)[:5]
    joints = np.where(free, np.clip(joints, low, high), joints)
    best, least, turning = joints, math.inf, down_gain > 0
    for iteration in range(max_iterations + 1):
        error = target_position - point_position(joints.tolist(), point)
        distance = math.sqrt(error @ error)
        tilt = DOWN - float(DOWN_TASK @ joints)
        turning = turning and abs(tilt) > SETTLED
        if distance < max(least, tolerance):
            best, least = joints, distance
        if iteration == max_iterations or (distance < tolerance and not turning):
            break
        if distance > tolerance and iteration >= max_iterations - POLISH:
            turning = False
        turn = down_gain * tilt if turning else 0.0
        moved = _step(joints, free * point_jacobian(joints.tolist(), point), error, turn, low, high)
        turning = turning and float(np.abs(moved - joints).max()) > SETTLED
        joints = moved
    return best


def _step(
    joints: np.ndarray,
    jacobian: np.ndarray,
    error: np.ndarray,
    turn: float,
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    """One damped step; a joint that stands at a limit and would pass it leaves its work to the others."""
    while True:
        step = _damped(jacobian, error, turn)
        stuck = ((joints <= low) & (step < 0)) | ((joints >= high) & (step > 0))
        if not stuck.any():
            return np.clip(joints + step, low, high)
        jacobian = np.where(stuck, 0.0, jacobian)


def _damped(jacobian: np.ndarray, error: np.ndarray, turn: float) -> np.ndarray:
    """Joint step (5,) for a position error (3,), plus `turn` rad of pitch in the position's null space."""
    task = DOWN_TASK * jacobian.any(axis=0)
    squared = jacobian @ jacobian.T
    squared[DIAGONAL] += DAMPING + float(error @ error) * ERROR_DAMPING
    # Both right-hand sides at once: the position step, and the part of the turn that would move the tool.
    solved = np.linalg.solve(squared, np.stack([error, jacobian @ task], axis=1))
    position_step, tool_part = (jacobian.T @ solved).T
    null = task - tool_part
    step = position_step + null * (turn / (float(task @ null) + TURN_DAMPING))
    return step * min(1.0, MAX_STEP / max(float(np.abs(step).max()), MAX_STEP))

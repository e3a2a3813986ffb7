"""What touches what in the simulated world: pure functions on numbers, measured on the SO-101's meshes.

Contacts are quasi-static: nothing has speed, things that overlap are moved apart. Lengths are metres in
gripper_link (kinematics.py) unless said otherwise; the meshes are SO-ARM100's (TheRobotStudio, Apache 2.0).
"""

import math
from typing import NamedTuple

import numpy as np

from so101.robot.kinematics import JAW_PIVOT

TIP_Z = -0.1044  # the end of the fixed finger
INNER_FACE_X = -0.0079  # of the fixed finger, at its tip
FINGER_HALF_WIDTH = 0.0048  # at the pads
FINGER_DEPTH = 0.012  # from a finger's inner face to its back, where it meets a cube

# Corners of the sections that can come near the table: the fixed finger's as (x, y, z), the jaw's as X and Y
# of its own frame and y of the gripper's.
CUBE_CORNERS = np.array([(x, y, z) for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
FIXED_CORNERS = np.array(
    [
        (x, side * half, z)
        for z, inner, outer, half in (
            (-0.1044, -0.0079, -0.0133, 0.0027),
            (-0.1000, -0.0079, -0.0148, 0.0048),
            (-0.0880, -0.0095, -0.0192, 0.0070),
        )
        for x in (inner, outer)
        for side in (-1, 1)
    ]
)
JAW_CORNERS = np.array(
    [
        (x, y, -0.0001 + side * half)
        for y, inner, outer, half in (
            (-0.0820, -0.0123, -0.0066, 0.0027),
            (-0.0775, -0.0123, -0.0046, 0.0047),
            (-0.0655, -0.0108, 0.0013, 0.0069),
        )
        for x in (inner, outer)
        for side in (-1, 1)
    ]
)

FIXED_POINTS = [tuple(point) for point in FIXED_CORNERS.tolist()]
JAW_POINTS = [tuple(point) for point in JAW_CORNERS.tolist()]

# Where a grasp holds: chosen on the even-indexed trials of tests/data/grasp_trials.json, judged on the rest.
GRASP_HEIGHT, GRASP_OFFSET, GRASP_YAW, OFFSET_LOST_TO_YAW = 0.0305, 0.01125, 0.7, 0.6

# A cube deep between the fingers meets thicker parts of them, which stop the jaw earlier: fitted on the even
# trials that held, 0.20 rad with the cube at the fingertips and 5 rad more per metre.
GRIP_DEPTH_Z, GRIP_AT_TIPS, GRIP_PER_METRE, GRIP_RANGE = -0.105, 0.0165, 5.0, (-0.03, 0.055)

# Pull of gravity on lift, elbow and wrist_flex: masses (kg) and centres of mass of the URDF's links, the jaw
# at 0 rad. With 2% more it agrees to 2% with the torques that a physics engine gave.
GRAVITY = 9.81 * 1.02
HAND_MASS = 0.079 + 0.087 + 0.012  # wrist, gripper, jaw
HAND_MOMENT = 0.079 * 0.0386 + 0.087 * 0.0863 + 0.012 * 0.1145  # kg m, about the wrist_flex axis


class Lowest(NamedTuple):
    """The corner of a finger that is lowest over the table."""

    height: float  # m over the table
    point: tuple[float, float, float]  # in gripper_link


def lowest_corners(upward: list[float], origin_height: float, jaw_angle: float) -> tuple[Lowest, Lowest]:
    """The lowest corners of the fixed finger and of the jaw, whose angle is in rad.

    `upward` (3,) is the table's upward direction in gripper_link, `origin_height` that frame's height in m.
    """
    x, y, z = upward
    cos, sin = math.cos(jaw_angle), math.sin(jaw_angle)
    heights = FIXED_CORNERS @ np.array([x, y, z])
    lowest = int(heights.argmin())
    fixed = Lowest(origin_height + float(heights[lowest]), FIXED_POINTS[lowest])
    heights = JAW_CORNERS @ np.array([x * cos + z * sin, z * cos - x * sin, y])
    lowest = int(heights.argmin())
    across, along, side = JAW_POINTS[lowest]
    point = (JAW_PIVOT[0] + across * cos - along * sin, side, JAW_PIVOT[2] + across * sin + along * cos)
    pivot_height = origin_height + x * JAW_PIVOT[0] + z * JAW_PIVOT[2]
    return fixed, Lowest(pivot_height + float(heights[lowest]), point)


def jaw_opening(jaw_angle: float) -> float:
    """Gap in m between the two pads; up to 1 mm over the smallest gap of the meshes below 0.2 rad."""
    return JAW_PIVOT[0] - INNER_FACE_X - 0.0123 * math.cos(jaw_angle) + 0.0767 * math.sin(jaw_angle)


def jaw_angle_for(opening: float) -> float:
    """The jaw angle in rad whose `jaw_opening` is this many metres."""
    reach = math.hypot(0.0767, 0.0123)
    return math.atan2(0.0123, 0.0767) + math.asin((opening - JAW_PIVOT[0] + INNER_FACE_X) / reach)


def grip_offset(cube_z: float) -> float:
    """How much earlier (rad) than at `jaw_angle_for` the jaw stops on a cube whose centre is at this z."""
    return min(max(GRIP_AT_TIPS + GRIP_PER_METRE * (cube_z - GRIP_DEPTH_Z), GRIP_RANGE[0]), GRIP_RANGE[1])


def grasp_holds(tool_height: float, offset_along_finger_width: float, yaw: float) -> bool:
    """Whether closing on a 30 mm cube holds it, for a vertical gripper.

    The tool's height over the table and the cube's offset across the fingers in m, the cube's yaw against
    them in rad. A rule fitted to physics trials: the pads must reach down far enough, meet the cube
    near its middle, and find its faces; a turned cube leaves less room beside its middle.
    """
    room = GRASP_OFFSET * (1 - OFFSET_LOST_TO_YAW * abs(yaw))
    return tool_height <= GRASP_HEIGHT and abs(offset_along_finger_width) <= room and abs(yaw) <= GRASP_YAW


def face_yaw(yaw: float) -> float:
    """A square's yaw within +-pi/4: turned by a right angle it is the same square."""
    return (yaw + math.pi / 4) % (math.pi / 2) - math.pi / 4


def square_width(side: float, yaw: float) -> float:
    """Width in m of a square of this side that is turned by `yaw`."""
    return side * (abs(math.cos(yaw)) + abs(math.sin(yaw)))


def yaw_that_fits(side: float, width: float) -> float:
    """The yaw in 0..pi/4 at which a square just fits between faces `width` m apart; 0 if they are nearer."""
    return math.pi / 4 - math.acos(min(max(width / (side * math.sqrt(2)), math.sqrt(0.5)), 1.0))


def push_out(
    centre: tuple[float, float], side: float, yaw: float, low: tuple[float, float], high: tuple[float, float]
) -> tuple[float, float] | None:
    """The shortest move (2,) along x or y that takes a turned square out of a box; None if it is out.

    Only along x or y, because a finger drags what it touches its own way (friction) instead of letting it
    slide off along the touched face. Separating axes: they are apart once their shadows on one axis are.
    """
    cos, sin = math.cos(yaw), math.sin(yaw)
    half_x, half_y = (high[0] - low[0]) / 2, (high[1] - low[1]) / 2
    away_x, away_y = centre[0] - (low[0] + high[0]) / 2, centre[1] - (low[1] + high[1]) / 2
    shortest = {(1.0, 0.0): math.inf, (-1.0, 0.0): math.inf, (0.0, 1.0): math.inf, (0.0, -1.0): math.inf}
    for x, y in ((1.0, 0.0), (0.0, 1.0), (cos, sin), (-sin, cos)):
        reach = half_x * abs(x) + half_y * abs(y)
        reach += side / 2 * (abs(x * cos + y * sin) + abs(y * cos - x * sin))
        away = away_x * x + away_y * y
        if abs(away) >= reach:
            return None
        for move in shortest:
            progress = move[0] * x + move[1] * y
            if abs(progress) > 1e-9:
                needed = (reach - math.copysign(1.0, progress) * away) / abs(progress)
                shortest[move] = min(shortest[move], needed)
    move = min(shortest, key=lambda m: shortest[m])
    return move[0] * shortest[move], move[1] * shortest[move]


def gravity_torque(joint_rad: list[float], load: float) -> tuple[float, float, float]:
    """Torque in Nm of gravity on lift, elbow and wrist_flex with `load` kg between the fingertips.

    Positive turns a joint in its positive direction: forward and down when the arm reaches forward.
    """
    a = joint_rad[1]
    b = a + joint_rad[2]
    cos_a, sin_a, cos_b, sin_b = math.cos(a), math.sin(a), math.cos(b), math.sin(b)
    wrist = (HAND_MOMENT + 0.159 * load) * math.cos(b + joint_rad[3])
    beyond_wrist, beyond_elbow = HAND_MASS + load, HAND_MASS + load + 0.104
    elbow = wrist + beyond_wrist * (0.1349 * cos_b + 0.0052 * sin_b) + 0.104 * (0.0981 * cos_b + 0.0032 * sin_b)
    lift = elbow + beyond_elbow * (0.028 * cos_a + 0.11257 * sin_a) + 0.103 * (0.0084 * cos_a + 0.0898 * sin_a)
    return GRAVITY * lift, GRAVITY * elbow, GRAVITY * wrist

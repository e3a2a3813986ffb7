"""The simulated table: a cube, two fingers that push and grasp it, the pull of gravity on the arm, the light.

The world moves nothing by itself. After each step of the servos it reads their angles, takes back what the
table or the cube is in the way of, and lets the cube follow the fingers: quasi-static, no dynamics. Whether a
grasp holds is decided by a rule fitted to a physics engine's trials (contact.grasp_holds).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from so101.config import option, require_within
from so101.errors import ConfigError
from so101.robot.kinematics import TIP_BELOW_TOOL, gripper_rotation, point_jacobian, point_position
from so101.sim import contact

LIFTED = 0.03  # m; a held cube whose bottom is above this counts as lifted
CUBE_MASS = 0.03  # kg
RELEASE = 0.002  # m; the jaw opens this much beyond the cube's width before it lets go
LEDGE = 0.002  # m; a finger that comes down on less of the cube's edge than this pushes it aside
JAW_LEDGE = 0.010  # m; and a closing jaw, which moves up to 7 mm in a substep: it sweeps the cube before it
TOUCHING = 1e-5  # m; overlaps smaller than this are let be
REACH = 0.2  # m from gripper_link to the cube's centre, over the table, beyond which nothing touches
RULE_SIZE = 0.03  # m; the grasp rule was measured with a cube of this size
CLEAR_HEIGHT = 0.115  # m; with gripper_link this high over the cube's top nothing touches, nor a held cube the table


@dataclass
class WorldConfig:
    """The cube, where it is placed at a reset, and how the light varies between resets."""

    cube_size: float = option(0.03, "edge of the cube in metres")
    center: list[float] = option([0.25, 0.0], "where the cube is placed, x y in metres")
    cube_range_xy: float = option(0.03, "placed up to this far from the center along x and y, in metres")
    cube_range_yaw: float = option(0.2, "turned by up to this much, in rad")
    brightness_range: float = option(0.15, "the light's brightness varies by up to this share")
    colour_range: float = option(0.04, "the light's red, green and blue vary by up to this share")
    lamp_range: float = option(0.25, "the lamp's direction varies by up to this slope along x and y")

    def __post_init__(self) -> None:
        if len(self.center) != 2:
            raise ConfigError(f"center: got {self.center}, needs x and y in metres")
        require_within(
            self, cube_size=(0.02, 0.045),  # m; what the gripper can hold
            cube_range_xy=(0, 0.1), cube_range_yaw=(0, math.pi), brightness_range=(0, 0.9),
            colour_range=(0, 0.9), lamp_range=(0, 1),
        )  # fmt: skip


class Light(NamedTuple):
    """The lamp: overall brightness, RGB gain (3,), direction (3,) from the table towards it, unit length."""

    brightness: float
    gain: np.ndarray
    direction: np.ndarray


class Servos(Protocol):
    """What the world reads and writes of the simulated servos: five joints and the jaw."""

    angle: np.ndarray  # (6,) rad
    load_torque: np.ndarray  # (6,) Nm, positive in the joint's positive direction


class Finger(NamedTuple):
    """One finger near the cube: its lowest corner, and where it stands over the table."""

    lowest: tuple[float, float, float]  # in gripper_link
    depth: float  # m that it reaches below the cube's top
    low: tuple[float, float]  # corners of its cross-section at the cube's height, m, in the fingers' axes
    high: tuple[float, float]


class CubeInFingers(NamedTuple):
    """The cube in the fingers' axes: x from the fixed finger's inner face to the jaw, y across."""

    place: tuple[float, float]  # m, of its centre
    yaw: float  # rad, within +-pi/4


class World:
    """One cube on a table at z = 0 under the arm of `servos`; poses in the base frame.

    After each step: `gripper_position` (3,), `gripper_rotation` (3, 3), `jaw_angle`, `cube_position` (3,) its
    centre, `cube_rotation` (3, 3), `held`. The light is `light`.
    """

    def __init__(self, config: WorldConfig, servos: Servos, rng: np.random.Generator) -> None:
        self.config, self.servos, self.rng = config, servos, rng
        self.cube_position: np.ndarray
        self.cube_rotation: np.ndarray
        self._size = config.cube_size
        self._joints: list[float] = servos.angle.tolist()
        self._update_pose()
        self.reset()

    @property
    def lifted(self) -> bool:
        """The cube is held, and its lowest corner is more than 3 cm over the table."""
        reach = self._size / 2 * float(np.abs(self.cube_rotation[2]).sum())
        return self.held and float(self.cube_position[2]) - reach > LIFTED

    def reset(self) -> None:
        """Place the cube anew, and change the light a little."""
        config, rng = self.config, self.rng
        x, y = np.array(config.center) + rng.uniform(-config.cube_range_xy, config.cube_range_xy, 2)
        self.place_cube(float(x), float(y), float(rng.uniform(-config.cube_range_yaw, config.cube_range_yaw)))
        lamp = np.array([*rng.uniform(-config.lamp_range, config.lamp_range, 2), 1.0])
        self.light = Light(
            brightness=1.0 + float(rng.uniform(-config.brightness_range, config.brightness_range)),
            gain=1.0 + rng.uniform(-config.colour_range, config.colour_range, 3),
            direction=lamp / np.linalg.norm(lamp),
        )

    def place_cube(self, x: float, y: float, yaw: float) -> None:
        """Put the cube down on the table at x, y (m), turned by `yaw` (rad); it is no longer held."""
        self.held = False
        self._rest_on_table(x, y, yaw)
        # Which fingers (fixed, jaw) were over the cube's top when last seen: coming down, they land on it.
        self._was_above = [finger.depth < TOUCHING for finger in self._fingers()[0]]

    def step(self, dt: float) -> None:
        """Carry on from the servos' new angles; `dt` (s) does not matter, as nothing here has speed."""
        angle = self.servos.angle
        before, self._joints = self._joints, angle.tolist()
        self._update_pose()
        if self.held:
            self._hold_jaw()
        if float(self.gripper_position[2]) < CLEAR_HEIGHT + self._size:
            self._keep_off_table(before)
            if not self.held:
                self._touch_cube(before)
        else:
            self._was_above = [True, True]
        if self.held:
            self._carry()
        angle[:] = self._joints
        torque = contact.gravity_torque(self._joints, CUBE_MASS if self.held else 0.0)
        self.servos.load_torque[:] = (0.0, *torque, 0.0, 0.0)

    def _update_pose(self) -> None:
        self.gripper_position = point_position(self._joints, (0.0, 0.0, 0.0))
        self.gripper_rotation = gripper_rotation(self._joints)
        self.jaw_angle = self._joints[5]

    def _set_jaw(self, angle: float) -> None:
        self._joints[5] = self.jaw_angle = angle

    # The arm against the table

    def _keep_off_table(self, before: list[float]) -> None:
        """Turn the joints back up until the lowest corner of fingers and held cube stands on the table.

        Each by its share in that corner's height (the z row of the Jacobian), which leaves the arm free to
        slide along the table. A pose that cannot be cleared so is given up for the one before.
        """
        for _ in range(8):
            lowest = min(self._lowest_corners())
            if self.held:
                heights = self._held_corners @ self.gripper_rotation[2] + self.gripper_position[2]
                corner = int(heights.argmin())
                lowest = min(lowest, contact.Lowest(float(heights[corner]), tuple(self._held_corners[corner].tolist())))
            if lowest.height > -TOUCHING:
                return
            self._raise(lowest.point, -lowest.height)
        self._joints[:5] = before[:5]
        self._update_pose()

    def _lowest_corners(self) -> tuple[contact.Lowest, contact.Lowest]:
        height = float(self.gripper_position[2])
        return contact.lowest_corners(self.gripper_rotation[2].tolist(), height, self.jaw_angle)

    def _raise(self, point: tuple[float, float, float], height: float) -> None:
        """Turn the arm's joints so that a point of gripper_link rises by `height` m, to first order."""
        upward = point_jacobian(self._joints, point)[2]
        turn = upward * (height / (float(upward @ upward) + 1e-6))
        self._joints[:5] = (np.array(self._joints[:5]) + turn).tolist()
        self._update_pose()

    # The fingers against a free cube

    def _touch_cube(self, before: list[float]) -> None:
        """Close on the cube, push it aside, or stand on it."""
        x, y, _ = (self.cube_position - self.gripper_position).tolist()
        if math.hypot(x, y) > REACH:
            return
        fingers, seen = self._fingers()
        if self._squeezed(fingers, seen):
            self._squeeze(fingers, seen)
            return
        for index, closing in enumerate((False, self._joints[5] < before[5])):
            finger = fingers[index]
            if finger.depth < TOUCHING:
                self._was_above[index] = True
                continue
            move = contact.push_out(seen.place, self._size, seen.yaw, finger.low, finger.high)
            ledge = JAW_LEDGE if closing else LEDGE
            if move is not None and self._was_above[index] and math.hypot(*move) > ledge:
                self._raise(finger.lowest, finger.depth)
                fingers, seen = self._fingers()
                continue
            self._was_above[index] = False
            if move is not None:
                self._shift_cube(*move)
                fingers, seen = self._fingers()

    def _finger_axes(self) -> tuple[float, float, float, float]:
        """The fixed finger's inner tip (x, y in m), and the horizontal direction to the jaw (x, y)."""
        (xx, _, xz), (yx, _, yz), _ = self.gripper_rotation.tolist()
        x, y, _ = self.gripper_position.tolist()
        length = max(math.hypot(xx, yx), 1e-6)
        face, tip = contact.INNER_FACE_X, contact.TIP_Z
        return x + xx * face + xz * tip, y + yx * face + yz * tip, xx / length, yx / length

    def _fingers(self) -> tuple[tuple[Finger, Finger], CubeInFingers]:
        """The fixed finger, the jaw, and the cube as they see it.

        The fingers of a tilted gripper take up more room across, from their tips to the cube's top.
        """
        tip_x, tip_y, to_jaw_x, to_jaw_y = self._finger_axes()
        x, y, _ = self.cube_position.tolist()
        x, y = x - tip_x, y - tip_y
        yaw = contact.face_yaw(self._yaw - math.atan2(to_jaw_y, to_jaw_x))
        seen = CubeInFingers((x * to_jaw_x + y * to_jaw_y, y * to_jaw_x - x * to_jaw_y), yaw)
        up_x, up_y, up_z = self.gripper_rotation[:, 2].tolist()
        cube_z = float((self.cube_position - self.gripper_position) @ self.gripper_rotation[:, 2])
        opening = contact.jaw_opening(self.jaw_angle - contact.grip_offset(cube_z))
        slope = up_y * to_jaw_x - up_x * to_jaw_y
        fixed, jaw = self._lowest_corners()
        return (
            self._finger(fixed, -contact.FINGER_DEPTH, 0.0, slope, up_z),
            self._finger(jaw, opening, opening + contact.FINGER_DEPTH, slope, up_z),
        ), seen

    def _finger(self, lowest: contact.Lowest, near: float, far: float, slope: float, up_z: float) -> Finger:
        depth = self._size - lowest.height
        at_tip = (lowest.point[2] - contact.TIP_Z) * slope
        at_top = at_tip + max(depth, 0.0) * slope / max(up_z, 0.5)
        low = min(at_tip, at_top) - contact.FINGER_HALF_WIDTH
        high = max(at_tip, at_top) + contact.FINGER_HALF_WIDTH
        return Finger(lowest.point, depth, (near, low), (far, high))

    def _squeezed(self, fingers: tuple[Finger, Finger], seen: CubeInFingers) -> bool:
        """The cube stands between the fingers, and they leave it too little room."""
        fixed, jaw = fingers
        towards_jaw, across = seen.place
        opening, reach = jaw.low[0], self._size / 2
        return (
            min(fixed.depth, jaw.depth) > TOUCHING
            and not any(self._was_above)
            and 0 < towards_jaw < opening < contact.square_width(self._size, seen.yaw)
            and fixed.low[1] - reach < across < fixed.high[1] + reach
        )

    def _squeeze(self, fingers: tuple[Finger, Finger], seen: CubeInFingers) -> None:
        """Both fingers press: the cube turns until it fits and is held, or it slips out sideways."""
        fixed, jaw = fingers
        towards_jaw, across = seen.place
        opening, scale = jaw.low[0], RULE_SIZE / self._size
        offset = across - (fixed.low[1] + fixed.high[1]) / 2
        height = RULE_SIZE - fixed.depth + TIP_BELOW_TOOL  # over a table 30 mm below the cube's top
        if not contact.grasp_holds(height, offset * scale, seen.yaw):
            room = contact.square_width(self._size, seen.yaw) / 2
            low, high = min(fixed.low[1], jaw.low[1]) - room, max(fixed.high[1], jaw.high[1]) + room
            self._shift_cube(0.0, (high if offset >= 0 else low) - across)
            return
        turned = math.copysign(min(abs(seen.yaw), contact.yaw_that_fits(self._size, opening)), seen.yaw)
        self._turn_cube(turned - seen.yaw)
        self._shift_cube(max(opening, self._size) / 2 - towards_jaw, 0.0)
        if opening <= self._size:
            self._attach()

    def _shift_cube(self, towards_jaw: float, across: float) -> None:
        _, _, x, y = self._finger_axes()
        shift = (towards_jaw * x - across * y, towards_jaw * y + across * x, 0.0)
        self.cube_position = self.cube_position + shift

    def _turn_cube(self, turn: float) -> None:
        self._rest_on_table(float(self.cube_position[0]), float(self.cube_position[1]), self._yaw + turn)

    def _rest_on_table(self, x: float, y: float, yaw: float) -> None:
        self._yaw = yaw
        self.cube_position = np.array([x, y, self._size / 2])
        cos, sin = math.cos(yaw), math.sin(yaw)
        self.cube_rotation = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])

    # A held cube

    def _attach(self) -> None:
        """The cube belongs to the gripper from here on, and keeps the jaw from closing further."""
        inverse = self.gripper_rotation.T
        self._held_position = inverse @ (self.cube_position - self.gripper_position)
        self._held_rotation = inverse @ self.cube_rotation
        self._held_corners = self._held_position + self._size / 2 * contact.CUBE_CORNERS @ self._held_rotation.T
        offset = contact.grip_offset(float(self._held_position[2]))
        self._grip_angle = contact.jaw_angle_for(self._size) + offset
        self._release_angle = contact.jaw_angle_for(self._size + RELEASE) + offset
        self._set_jaw(self._grip_angle)
        self.held = True

    def _hold_jaw(self) -> None:
        """Block the jaw at the cube's width, or let the cube drop when it has opened beyond."""
        if self.jaw_angle <= self._release_angle:
            self._set_jaw(max(self.jaw_angle, self._grip_angle))
            return
        forwards = self.cube_rotation[:, 0]
        self.place_cube(
            float(self.cube_position[0]), float(self.cube_position[1]), math.atan2(forwards[1], forwards[0])
        )

    def _carry(self) -> None:
        self.cube_position = self.gripper_position + self.gripper_rotation @ self._held_position
        self.cube_rotation = self.gripper_rotation @ self._held_rotation

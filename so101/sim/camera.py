"""The simulated wrist camera: table, cube, fingers, shadows and light, drawn with OpenCV polygons.

No 3-D engine: the table is one warped texture, the cube three shaded quads, each finger a convex outline.
It takes about 2 ms a frame on one thread; a rendered tick must not cost more than the learning beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from so101.config import option, require_within
from so101.errors import ConfigError
from so101.robot.kinematics import jaw_pose
from so101.sim.contact import CUBE_CORNERS
from so101.sim.fingers import FIXED_FINGER, FIXED_PLANES, JAW_PLANES, MOVING_JAW
from so101.sim.table import LEVELS_PER_E, PALETTE, TABLE_X, TABLE_Y, TEXEL, wood
from so101.sim.world import Light, World
from so101.timing import Clock

# The camera in gripper_link, from the pick-101 project's calibrated model (MIT licence): in front of the
# palm, tilted 22.8 degrees away from the approach direction so that the fingertips are in the picture.
POSITION = np.array([0.008, -0.065, -0.019])
PITCH = 0.398

CUBE_RGB = np.array([205.0, 32.0, 28.0])
FINGER_RGB = np.array([62.0, 76.0, 104.0])

SHADOW = round(-LEVELS_PER_E * np.log(0.54))  # levels: the table in shadow has 54% of its brightness
NEAR, FAR = 0.005, 20.0  # m: what lies outside is not drawn
AMBIENT = 0.45  # the share of the light that reaches a face turned away from the lamp
SHIFT = 4  # OpenCV draws in 1/16 px
NOISE_MARGIN = 64  # px: a frame's noise is a window of one larger picture, so 64 x 64 different ones

# The cube's corners for an edge of 2, and its faces: axis, side, corners counter-clockwise from outside.
FACES = (
    (0, -1, [0, 1, 3, 2]),
    (0, 1, [4, 6, 7, 5]),
    (1, -1, [0, 4, 5, 1]),
    (1, 1, [2, 3, 7, 6]),
    (2, -1, [0, 2, 6, 4]),
    (2, 1, [1, 5, 7, 3]),
)


@dataclass
class CameraConfig:
    """The simulated camera. The ranges are drawn from once, when the camera is made: one pose for a run."""

    width: int = option(640, "frame width in pixels")
    height: int = option(480, "frame height in pixels")
    fovy_deg: float = option(70.5, "vertical field of view in degrees")
    fovy_range_deg: float = option(0.0, "the field of view varies by up to this much, in degrees")
    pitch_range_deg: float = option(0.0, "the camera's tilt varies by up to this much, in degrees")
    position_range: float = option(0.0, "the camera's position varies by up to this much along each axis, m")
    noise: float = option(2.5, "standard deviation of the pixel noise, in grey levels of 255")

    def __post_init__(self) -> None:
        require_within(
            self, width=(1, 4096), height=(1, 4096), fovy_range_deg=(0, 70), pitch_range_deg=(0, 90),
            position_range=(0, 0.1), noise=(0, 255),
        )  # fmt: skip
        if not 10.0 <= self.fovy_deg - self.fovy_range_deg <= self.fovy_deg + self.fovy_range_deg <= 150.0:
            raise ConfigError(
                f"fovy_deg: got {self.fovy_deg} +- {self.fovy_range_deg}, must stay within 10 .. 150 degrees"
            )


class Scene(NamedTuple):
    """What the camera can see, in the base frame (m, rad)."""

    gripper_position: np.ndarray  # (3,) origin of gripper_link
    gripper_rotation: np.ndarray  # (3, 3) its axes as columns
    jaw_angle: float
    cube_position: np.ndarray  # (3,) centre
    cube_rotation: np.ndarray  # (3, 3)
    cube_size: float
    light: Light


def scene_of(world: World) -> Scene:
    """The world as it is now. What the scene holds is never changed in place, so another thread may draw it."""
    return Scene(
        world.gripper_position, world.gripper_rotation, world.jaw_angle,
        world.cube_position, world.cube_rotation, world.config.cube_size, world.light,
    )  # fmt: skip


@dataclass(frozen=True)
class CameraModel:
    """A pinhole camera fixed to gripper_link. The rows of `rotation` are right, image-down and forward."""

    width: int
    height: int
    focal_px: float
    position: np.ndarray  # (3,) in gripper_link
    rotation: np.ndarray  # (3, 3) gripper_link to camera

    def projection(self) -> np.ndarray:
        """(3, 4): a point (x, y, z, 1) in gripper_link to (u w, v w, w); w is its depth in m, u and v px."""
        pixels = np.array(
            [
                [self.focal_px, 0.0, (self.width - 1) / 2],
                [0.0, self.focal_px, (self.height - 1) / 2],
                [0.0, 0.0, 1.0],
            ]
        )
        return pixels @ self.rotation @ np.column_stack([np.eye(3), -self.position])


def camera_model(config: CameraConfig, rng: np.random.Generator) -> CameraModel:
    """The camera of a run: the nominal one, moved within the config's ranges."""
    fovy = np.radians(config.fovy_deg + config.fovy_range_deg * rng.uniform(-1, 1))
    pitch = PITCH + np.radians(config.pitch_range_deg) * rng.uniform(-1, 1)
    position = POSITION + config.position_range * rng.uniform(-1, 1, 3)
    cos, sin = np.cos(pitch), np.sin(pitch)
    rotation = np.array([[-1.0, 0.0, 0.0], [0.0, cos, sin], [0.0, sin, -cos]])
    return CameraModel(config.width, config.height, config.height / 2 / np.tan(fovy / 2), position, rotation)


def render(scene: Scene, camera: CameraModel) -> np.ndarray:
    """The picture without noise, (height, width, 3) uint8 RGB, painted back to front."""
    from_gripper = camera.projection()
    from_base = from_gripper @ _inverse(scene.gripper_position, scene.gripper_rotation)
    origin, axes = jaw_pose(scene.jaw_angle)
    cube = scene.cube_position + CUBE_CORNERS * (scene.cube_size / 2) @ scene.cube_rotation.T
    cube_in_gripper = (cube - scene.gripper_position) @ scene.gripper_rotation
    cube_in_jaw, camera_in_jaw = (cube_in_gripper - origin) @ axes, (camera.position - origin) @ axes
    fingers = (
        (FIXED_FINGER, _nearer(cube_in_gripper, camera.position, FIXED_PLANES)),
        (MOVING_JAW @ axes.T + origin, _nearer(cube_in_jaw, camera_in_jaw, JAW_PLANES)),
    )

    table = _table(from_base, camera)
    in_base = [points @ scene.gripper_rotation.T + scene.gripper_position for points, _ in fingers]
    _cast_shadows(table, [cube, *in_base], scene.light, from_base)
    gain = scene.light.brightness * scene.light.gain
    frame = cv2.applyColorMap(table, np.clip(PALETTE * gain, 0, 255).astype(np.uint8))
    for points, cube_is_nearer in fingers:
        if cube_is_nearer:
            _draw_finger(frame, points, from_gripper, gain)
    _draw_cube(frame, scene, cube, from_base, gain)
    for points, cube_is_nearer in fingers:
        if not cube_is_nearer:
            _draw_finger(frame, points, from_gripper, gain)
    return frame


def _inverse(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """(4, 4): points of the base frame to those of the frame that stands at this pose in it."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation.T
    matrix[:3, 3] = -rotation.T @ position
    return matrix


class SimCamera:
    """What `robot.camera.Camera` is to a real camera: the newest frame and its time."""

    def __init__(
        self, config: CameraConfig, scene: Callable[[], Scene], clock: Clock, rng: np.random.Generator
    ) -> None:
        cv2.setNumThreads(1)  # the polygons are small, and the learner needs the other cores
        self.config, self.scene, self.clock, self._rng = config, scene, clock, rng
        self.model = camera_model(config, rng)
        self._noise = _noise_bank(config, rng)
        wood()  # made now, so that the first frame is not late
        self._newest: tuple[np.ndarray, float] | None = None

    def latest(self) -> tuple[np.ndarray, float]:
        """The scene as it is now, (height, width, 3) uint8 RGB, and the clock's time; drawn once per time."""
        now = self.clock.now()
        if self._newest is None or self._newest[1] != now:
            self._newest = (self._add_noise(render(self.scene(), self.model)), now)
        return self._newest

    def wait_ready(self) -> None:
        """Always is."""

    def close(self) -> None:
        """Nothing to release; here because a real camera has it."""

    def _add_noise(self, frame: np.ndarray) -> np.ndarray:
        top, left = self._rng.integers(0, NOISE_MARGIN, 2)
        window = np.s_[top : top + self.config.height, left : left + self.config.width]
        brighter, darker = self._noise
        cv2.add(frame, brighter[window], dst=frame)
        cv2.subtract(frame, darker[window], dst=frame)
        return frame


def _noise_bank(config: CameraConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What noise adds and what it takes away, as bytes: fresh normal noise would cost 10 ms a frame."""
    shape = (config.height + NOISE_MARGIN, config.width + NOISE_MARGIN, 3)
    noise = np.rint(config.noise * rng.standard_normal(shape, dtype=np.float32))
    return np.clip(noise, 0, 255).astype(np.uint8), np.clip(-noise, 0, 255).astype(np.uint8)


def _project(points: np.ndarray, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 2) and depths (n,) of points (n, 3)."""
    homogeneous = points @ projection[:, :3].T + projection[:, 3]
    return homogeneous[:, :2] / homogeneous[:, 2:], homogeneous[:, 2]


def _clip(polygon: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The part of a convex polygon (n, d) where `inside` (n,), linear over the polygon, is positive."""
    kept = []
    for here, there, a, b in zip(polygon, np.roll(polygon, -1, 0), inside, np.roll(inside, -1), strict=True):
        if a > 0:
            kept.append(here)
        if (a > 0) != (b > 0):
            kept.append(here + (there - here) * (a / (a - b)))
    return np.array(kept).reshape(-1, polygon.shape[1])


def _fill(image: np.ndarray, polygon_px: np.ndarray, colour: np.ndarray | int) -> None:
    """Fill the convex polygon (n, 2), edges blended; a pixel's centre has whole coordinates."""
    corners = np.rint(polygon_px * (1 << SHIFT)).astype(np.int32)
    cv2.fillConvexPoly(image, corners, np.atleast_1d(colour).tolist(), cv2.LINE_AA, SHIFT)


def _table(from_base: np.ndarray, camera: CameraModel) -> np.ndarray:
    """The table's levels as seen, (height, width) uint8."""
    to_texel = np.array([[0.0, 1 / TEXEL, -TABLE_Y[0] / TEXEL], [1 / TEXEL, 0.0, -TABLE_X[0] / TEXEL], [0, 0, 1]])
    to_table = np.linalg.inv(from_base[:, [0, 1, 3]])  # pixel to (x, y, 1) / depth
    size = (camera.width, camera.height)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    levels = cv2.warpPerspective(wood(), to_texel @ to_table, size, flags=flags)
    # Above the horizon the same formula shows the table behind the camera: paint that part over.
    right, bottom = camera.width - 0.5, camera.height - 0.5
    picture = np.array([[-0.5, -0.5], [right, -0.5], [right, bottom], [-0.5, bottom]])
    sky = _clip(picture, 1 / FAR - picture @ to_table[2, :2] - to_table[2, 2])
    if len(sky):
        _fill(levels, sky, 0)
    return levels


def _cast_shadows(table: np.ndarray, solids: list[np.ndarray], light: Light, from_base: np.ndarray) -> None:
    """Darken the table where a convex solid (n, 3) stands between it and the lamp."""
    slope = light.direction[:2] / light.direction[2]
    mask = np.zeros_like(table)
    for points in solids:
        ground = points[:, :2] - np.maximum(points[:, 2:], 0) * slope
        outline = cv2.convexHull(ground.astype(np.float32))[:, 0].astype(float)
        outline = np.column_stack([outline, np.zeros(len(outline))])
        pixels, depth = _project(outline, from_base)
        if depth.min() < NEAR:
            outline = _clip(outline, depth - NEAR)
            pixels, _ = _project(outline, from_base)
        if len(outline) > 2:
            _fill(mask, pixels, SHADOW)
    cv2.subtract(table, cv2.blur(mask, (5, 5)), dst=table)


def _nearer(cube: np.ndarray, camera: np.ndarray, planes: np.ndarray) -> bool:
    """Whether the cube (8, 3) is in front of the finger behind `planes`, seen from `camera` (3,).

    Of two convex solids with a plane between them, the one on the camera's side may hide the other, never
    the reverse. The plane is the one that separates them best.
    """
    gaps = (cube @ planes[:, :3].T - planes[:, 3]).min(axis=0)
    best = planes[gaps.argmax()]
    return bool(camera @ best[:3] > best[3])


def _draw_finger(frame: np.ndarray, points: np.ndarray, from_gripper: np.ndarray, gain: np.ndarray) -> None:
    """One convex outline, and inside it the half that faces the camera (gripper -y), lighter."""
    pixels = _project(points, from_gripper)[0].astype(np.float32)
    _fill(frame, cv2.convexHull(pixels)[:, 0], FINGER_RGB * 0.6 * gain)
    _fill(frame, cv2.convexHull(pixels[points[:, 1] < 0])[:, 0], FINGER_RGB * gain)


def _draw_cube(frame: np.ndarray, scene: Scene, corners: np.ndarray, from_base: np.ndarray, gain: np.ndarray) -> None:
    """Lambert shading: AMBIENT, and the rest times the cosine between the face's normal and the lamp."""
    pixels, depth = _project(corners, from_base)
    if depth.min() < NEAR:
        return
    towards = scene.light.direction / np.linalg.norm(scene.light.direction)
    _fill(frame, cv2.convexHull(pixels.astype(np.float32))[:, 0], CUBE_RGB * 0.7 * gain)  # hides seams
    for axis, side, order in FACES:
        quad = pixels[order]
        (ax, ay), (bx, by) = quad[2] - quad[0], quad[3] - quad[1]
        if ax * by - ay * bx >= 0:
            continue  # turned away: its corners run the other way round
        shade = AMBIENT + (1 - AMBIENT) * max(0.0, side * float(scene.cube_rotation[:, axis] @ towards))
        _fill(frame, quad, CUBE_RGB * shade * gain)

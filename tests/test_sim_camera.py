"""The rendered wrist view against hand-worked pixels, a pinhole of its own, ray casting and optics."""

import cv2
import numpy as np
import pytest

from so101.errors import ConfigError
from so101.robot.kinematics import TOOL, forward, jaw_pose
from so101.sim.camera import CameraConfig, Scene, SimCamera, camera_model, render
from so101.sim.fingers import FIXED_FINGER, MOVING_JAW
from so101.sim.table import LEVELS_PER_E, WALL_RGB, wood
from so101.sim.world import Light
from so101.timing import SimClock

VERTICAL = np.array([-0.00084, 0.15639, -0.16078, 1.5708, 1.5708])  # tool at (0.25, 0, 0.07), straight down
AWAY = (0.25, 5.0, 0.015)  # a cube that is not in the picture


def lamp_at(*direction: float) -> Light:
    return Light(1.0, np.ones(3), np.array(direction) / np.linalg.norm(direction))


LAMP = lamp_at(0.1, -0.2, 1.0)
IN_FRONT = lamp_at(2.0, 0.0, 1.0)  # throws the fingers' shadows towards the base


def yaw(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])


def pitch(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])


def scene(tool=(0.25, 0, 0.07), jaw=1.5, cube=(0.25, 0, 0.015), cube_yaw=0.0, size=0.03, lamp=None, tilt=0.0):
    rotation = pitch(tilt) @ forward(VERTICAL, frame="gripper_link")[1]
    position = np.array(tool) - rotation @ np.array(TOOL)
    return Scene(position, rotation, jaw, np.array(cube), yaw(cube_yaw), size, lamp or LAMP)


def picture(*args, **kwargs) -> np.ndarray:
    camera = camera_model(CameraConfig(), np.random.default_rng(0))
    return render(scene(*args, **kwargs), camera).astype(int)


def is_cube(frame: np.ndarray) -> np.ndarray:
    return frame[..., 0] > 2 * frame[..., 1] + 20  # red


def is_finger(frame: np.ndarray) -> np.ndarray:
    return frame[..., 2] > frame[..., 0] + 5  # blue, which the wood is not


def pinhole(points: np.ndarray, view: Scene) -> np.ndarray:
    """Pixels (n, 2) of base-frame points, with the axes and numbers measured on pick-101's camera."""
    in_gripper = (np.atleast_2d(points) - view.gripper_position) @ view.gripper_rotation
    offset = in_gripper - (0.008, -0.065, -0.019)
    right, down = -offset[:, 0], 0.9218 * offset[:, 1] + 0.3876 * offset[:, 2]
    depth = 0.3876 * offset[:, 1] - 0.9218 * offset[:, 2]
    return np.stack([319.5 + 339.59 * right / depth, 239.5 + 339.59 * down / depth], 1)


def table_point(pixel: tuple[float, float], view: Scene) -> tuple[np.ndarray, float]:
    """Where the ray through a pixel (x, y) meets z = 0, and how many metres of depth that is (<0: never)."""
    across, down = (pixel[0] - 319.5) / 339.59, (pixel[1] - 239.5) / 339.59
    ray = view.gripper_rotation @ (-across, 0.9218 * down + 0.3876, 0.3876 * down - 0.9218)
    eye = view.gripper_position + view.gripper_rotation @ (0.008, -0.065, -0.019)
    depth = -eye[2] / ray[2]
    return eye + depth * ray, depth


def corners(view: Scene) -> np.ndarray:
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return view.cube_position + signs * view.cube_size / 2 @ view.cube_rotation.T


# Pixels worked out on pick-101's own model: (tool z, centre of the cube, its width seen from the centre).
@pytest.mark.parametrize("z, centre, width", [(0.07, (338, 258), 68), (0.02, (346, 330), 99), (0.10, (335, 233), 58)])
def test_cube_under_the_gripper_is_where_the_reference_camera_sees_it(z, centre, width):
    def seen(y: float) -> np.ndarray:  # a 2 mm cube as a marker
        rows, columns = np.nonzero(is_cube(picture(tool=(0.25, 0, z), cube=(0.25, y, 0.015), size=0.002)))
        return np.array([columns.mean(), rows.mean()])

    assert np.abs(seen(0.0) - centre).max() < 2.0
    # Half of the cube's right side is behind the fixed finger's tip at z = 0.02, so measure on the left.
    assert 2 * np.linalg.norm(seen(0.015) - seen(0.0)) == pytest.approx(width, abs=4)


# x as measured on the reference camera; row worked out for the end of the jaw's inner edge.
@pytest.mark.parametrize("jaw, x, row", [(0.0, 320, 325), (0.2, 267, 324), (0.4, 212, 329), (0.7, 119, 350)])
def test_moving_jaw_tip_is_where_the_reference_camera_sees_it(jaw, x, row):
    columns = np.nonzero(is_finger(picture(jaw=jaw, cube=AWAY))[row - 3 : row + 4, :365].any(axis=0))[0]
    assert columns.max() == pytest.approx(x, abs=3)


def test_fixed_finger_tip_is_where_the_reference_camera_sees_it():
    finger = is_finger(picture(cube=AWAY))
    rows, columns = np.nonzero(finger[:, 300:])
    assert rows.min() == pytest.approx(327, abs=8)  # the tip is a little beyond the reference's point
    tip = np.nonzero(finger[327])[0]
    assert tip.min() == pytest.approx(371, abs=4) and tip.max() >= 387


@pytest.mark.parametrize("jaw, opening_mm", [(-0.1745, 1.9), (0.0, 15.8), (0.0873, 22.1), (0.1745, 28.5)])
def test_finger_outlines_keep_the_opening_measured_on_the_meshes(jaw, opening_mm):
    origin, axes = jaw_pose(jaw)
    jaw_points = MOVING_JAW @ axes.T + origin
    near_tip = (jaw_points[:, 2] < -0.085) & (jaw_points[:, 2] > -0.104)
    inner_fixed = FIXED_FINGER[FIXED_FINGER[:, 2] < -0.095, 0].max()
    assert (jaw_points[near_tip, 0].min() - inner_fixed) * 1000 == pytest.approx(opening_mm, abs=1.5)


@pytest.mark.parametrize(
    "cube, cube_yaw, z",
    [((0.26, 0.02, 0.015), 0.2, 0.07), ((0.24, 0.0, 0.015), -0.3, 0.12), ((0.28, 0.03, 0.05), 0.1, 0.1)],
)
def test_red_blob_is_the_box_around_the_eight_projected_corners(cube, cube_yaw, z):
    view = {"tool": (0.25, 0, z), "cube": cube, "cube_yaw": cube_yaw}
    rows, columns = np.nonzero(is_cube(picture(**view)))
    blob = [columns.min(), columns.max(), rows.min(), rows.max()]
    pixels = pinhole(corners(scene(**view)), scene(**view))
    box = [pixels[:, 0].min(), pixels[:, 0].max(), pixels[:, 1].min(), pixels[:, 1].max()]
    assert blob == pytest.approx(box, abs=1.5)


@pytest.mark.parametrize("tilt", [0.0, 0.3, -0.9])
def test_every_pixel_shows_the_table_point_that_its_ray_meets(tilt):
    view = {"tool": (0.25, 0.02, 0.1), "cube": AWAY, "tilt": tilt, "lamp": IN_FRONT}
    frame = picture(**view)
    levels = cv2.GaussianBlur(wood(), (0, 0), 0.6).astype(float)  # about what interpolation does
    wanted, got = [], []
    for x, y in np.random.default_rng(1).integers((0, 60), (640, 300), (400, 2)):
        point, depth = table_point((x, y), scene(**view))
        row, column = (point[0] + 0.2) / 0.0005, (point[1] + 0.6) / 0.0005
        if 0 < depth < 0.4 and 1 < row < 1998 and 1 < column < 2398:  # farther away, texels are below a pixel
            wanted.append(levels[round(row), round(column)])
            got.append(100 * np.log(frame[y, x, 1]))
    assert LEVELS_PER_E == 100 and len(wanted) > 100
    assert np.corrcoef(wanted, got)[0, 1] > 0.9


def test_above_the_horizon_and_beyond_the_edge_is_wall_not_the_table_behind_the_camera():
    view = {"tool": (0.25, 0, 0.15), "cube": AWAY, "tilt": -1.4}
    frame, walls, tables = picture(**view), 0, 0
    for x, y in np.random.default_rng(2).integers((0, 0), (640, 300), (500, 2)):
        point, depth = table_point((x, y), scene(**view))
        if depth < 0 or not (-0.21 < point[0] < 0.82 and -0.62 < point[1] < 0.62):
            assert frame[y, x].tolist() == WALL_RGB.tolist()
            walls += 1
        elif point[0] < 0.78 and abs(point[1]) < 0.58:
            assert frame[y, x].tolist() != WALL_RGB.tolist()
            tables += 1
    assert walls > 50 and tables > 50


def test_camera_that_looks_away_from_the_table_sees_only_wall_and_fingers():
    frame = picture(tool=(0.25, 0, 0.3), cube=AWAY, tilt=-2.4)
    assert (is_finger(frame) | (frame == WALL_RGB).all(axis=-1)).mean() > 0.99


def test_cube_shrinks_as_the_gripper_rises():
    sizes = [is_cube(picture(tool=(0.25, 0, z))).sum() for z in (0.05, 0.07, 0.1, 0.15)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]


def test_a_held_cube_stays_at_its_pixels_while_the_table_moves_away():
    low = picture(tool=(0.25, 0, 0.015), jaw=0.2, cube=(0.25, 0.009, 0.015))
    high = picture(tool=(0.25, 0, 0.075), jaw=0.2, cube=(0.25, 0.009, 0.075))
    assert (is_cube(low) != is_cube(high)).sum() <= 20  # blended edges
    table = ~(is_cube(low) | is_finger(low))[:200]
    assert np.abs(low - high)[:200][table].mean() > 5

    # The joints between the wooden strips, 42 mm apart, come closer together.
    def joint_spacing_px(z: float) -> float:
        view = scene(tool=(0.25, 0, z))
        return float(np.diff(pinhole(np.array([[0.3, 0.0, 0], [0.3, 0.042, 0]]), view)[:, 0])[0])

    assert abs(joint_spacing_px(0.015)) > 1.3 * abs(joint_spacing_px(0.075))


def test_opening_the_jaw_moves_it_left_until_it_leaves_the_picture():
    rightmost = []
    for jaw in (0.0, 0.15, 0.3, 0.45, 0.6, 0.75):
        columns = np.nonzero(is_finger(picture(jaw=jaw, cube=AWAY))[:, :360].any(axis=0))[0]
        rightmost.append(columns.max())
    assert (np.diff(rightmost) < -20).all()
    assert not is_finger(picture(jaw=1.2, cube=AWAY))[:, :360].any()


@pytest.mark.parametrize("side", [1, -1])
def test_shadow_falls_away_from_the_lamp_and_as_far_as_the_cube_is_high(side):
    # A lamp at 45 degrees: the 30 mm cube's shadow ends 30 mm beyond its side, at 45 mm from its centre.
    view = {
        "tool": (0.25, 0, 0.1),
        "cube": (0.31, 0, 0.015),
        "lamp": lamp_at(0.0, side, 1.0),
    }
    lit = dict(view, lamp=IN_FRONT)
    for y, darker in ((0.035, 0.54), (0.055, 1.0), (-0.025, 1.0)):
        x_px, y_px = np.rint(pinhole(np.array([0.31, -side * y, 0.0]), scene(**view))[0]).astype(int)
        ratio = picture(**view)[y_px, x_px, 1] / picture(**lit)[y_px, x_px, 1]
        assert ratio == pytest.approx(darker, abs=0.02), y


@pytest.mark.parametrize(
    "view, lamp",
    [
        ({"tool": (0.25, 0, 0.1), "cube": (0.31, 0, 0.015), "cube_yaw": 0.4}, (0.5, 0.8, 1.0)),
        # A block behind a camera that looks at the horizon: its long shadow runs below the camera.
        ({"tool": (0.25, 0, 0.15), "tilt": -1.4, "cube": (0, 0, 0.03), "size": 0.06}, (-1.0, 0.0, 0.1)),
    ],
)
def test_a_table_point_is_dark_when_the_cube_stands_between_it_and_the_lamp(view, lamp):
    def in_shadow(pixel: tuple[float, float]) -> bool:
        start = (table_point(pixel, now)[0] - now.cube_position) @ now.cube_rotation
        ray = np.array(lamp) @ now.cube_rotation + 1e-12
        walls = np.stack([(-now.cube_size / 2 - start) / ray, (now.cube_size / 2 - start) / ray])
        return bool(max(walls.min(axis=0).max(), 0) < walls.max(axis=0).min())

    now, checked = scene(**view), np.zeros(2, int)
    shaded = picture(**view, lamp=lamp_at(*lamp))
    before = picture(**{**view, "cube": AWAY}, lamp=lamp_at(*lamp))
    clear = ~is_cube(shaded) & ~is_finger(shaded) & (shaded != WALL_RGB).any(axis=-1)
    clear = cv2.erode(clear.astype(np.uint8), np.ones((5, 5))) > 0  # edges are blended
    for x, y in np.random.default_rng(3).integers((0, 0), (640, 300), (4000, 2)):
        dark = in_shadow((x, y))
        beside = ((x - 4, y), (x + 4, y), (x, y - 4), (x, y + 4))
        if clear[y, x] and all(in_shadow(pixel) == dark for pixel in beside):  # the edge is a little soft
            assert shaded[y, x, 1] / before[y, x, 1] == pytest.approx(0.54 if dark else 1.0, abs=0.03)
            checked[int(dark)] += 1
    assert checked.min() > 30


def test_cube_behind_the_camera_is_not_in_the_picture():
    view = scene()
    behind = view.gripper_position + view.gripper_rotation @ (
        0.008,
        -0.065 - 0.3 * 0.3876,
        -0.019 + 0.3 * 0.9218,
    )
    assert not is_cube(picture(cube=behind)).any()


def test_light_scales_and_tints_the_picture():
    half = picture(lamp=LAMP._replace(brightness=0.5))
    assert half.mean() == pytest.approx(picture().mean() / 2, rel=0.02)
    dim_blue = picture(lamp=LAMP._replace(gain=np.array([1.0, 1.0, 0.5])))
    np.testing.assert_array_equal(dim_blue[..., :2], picture()[..., :2])
    assert dim_blue[..., 2].mean() == pytest.approx(picture()[..., 2].mean() / 2, rel=0.02)


def test_top_of_the_cube_is_brightest_under_a_lamp_overhead():
    view = {"lamp": lamp_at(0.0, 0.0, 1.0)}
    frame = picture(**view)
    top, far_side = np.rint(pinhole(np.array([[0.25, 0.0, 0.03], [0.265, 0.0, 0.015]]), scene(**view))).astype(int)
    # Lambert: full light from above on the top, the ambient 45% on a side.
    assert frame[far_side[1], far_side[0], 0] == pytest.approx(0.45 * frame[top[1], top[0], 0], abs=2)


def depth_of_cube(view: Scene, pixels: np.ndarray) -> np.ndarray:
    """Depth (n,) at which the rays through pixels (n, 2) enter the cube, by the slab method; inf: a miss."""
    across, down = (pixels[:, 0] - 319.5) / 339.59, (pixels[:, 1] - 239.5) / 339.59
    rays = np.stack([-across, 0.9218 * down + 0.3876, 0.3876 * down - 0.9218], 1)  # depth 1 m, in gripper_link
    start = np.array([0.008, -0.065, -0.019]) @ view.gripper_rotation.T + view.gripper_position
    start = (start - view.cube_position) @ view.cube_rotation
    rays = rays @ view.gripper_rotation.T @ view.cube_rotation
    walls = np.stack([(-view.cube_size / 2 - start) / rays, (view.cube_size / 2 - start) / rays])
    enter, leave = walls.min(axis=0).max(axis=1), walls.max(axis=0).min(axis=1)
    return np.where(enter < leave, enter, np.inf)


def test_nearer_one_of_cube_and_finger_is_painted_over_the_other():
    # A depth buffer of 4 px cells, filled with points from all over both fingers, against a ray-cast cube.
    rng, cell, checked = np.random.default_rng(5), 4, np.zeros(2, int)
    columns, rows = np.meshgrid(np.arange(640 // cell), np.arange(480 // cell))
    centres = np.stack([columns, rows], -1).reshape(-1, 2) * cell + (cell - 1) / 2
    outlines, samples = (FIXED_FINGER, MOVING_JAW), []
    for outline in outlines:
        weights = rng.dirichlet(np.ones(3), 20000)[..., None]
        samples.append((outline[rng.integers(len(outline), size=(20000, 3))] * weights).sum(axis=1))
    for _ in range(50):
        view = {
            "tool": (0.25, rng.uniform(-0.02, 0.01), rng.uniform(0.01, 0.06)),
            "jaw": rng.uniform(0.2, 0.8),
        }
        view["cube"] = (rng.uniform(0.22, 0.28), rng.uniform(-0.04, 0.04), rng.uniform(0.015, 0.04))
        view["cube_yaw"] = rng.uniform(-0.8, 0.8)
        now = scene(**view)
        origin, axes = jaw_pose(view["jaw"])
        fingers = np.concatenate([samples[0], samples[1] @ axes.T + origin])
        in_base = fingers @ now.gripper_rotation.T + now.gripper_position
        if (np.abs((in_base - now.cube_position) @ now.cube_rotation).max(axis=1) < 0.015).any():
            continue  # a finger stands in the cube: no picture is right
        pixels = np.floor((pinhole(in_base, now) + 0.5) / cell).astype(int)
        seen = (pixels >= 0).all(axis=1) & (pixels < (640 // cell, 480 // cell)).all(axis=1)
        finger = np.full((480 // cell, 640 // cell), np.inf)
        depths = 0.3876 * (fingers[:, 1] + 0.065) - 0.9218 * (fingers[:, 2] + 0.019)
        np.minimum.at(finger, (pixels[seen, 1], pixels[seen, 0]), depths[seen])
        around = cv2.erode(finger, np.ones((3, 3)))  # the nearest finger point in this cell and those beside it
        cube = depth_of_cube(now, centres).reshape(finger.shape)
        whole = cv2.dilate(np.where(np.isinf(cube), 9.0, cube), np.ones((3, 3))) < 9  # not at the cube's edge
        red = is_cube(picture(**view))[cell // 2 :: cell, cell // 2 :: cell]
        filled = cv2.dilate(np.where(np.isinf(finger), 9.0, finger), np.ones((3, 3))) < 9
        finger_first = whole & filled & (finger < cube - 0.002)
        cube_first = whole & filled & (around > cube + 0.002)
        assert not red[finger_first].any()
        assert red[cube_first].all()
        checked += finger_first.sum(), cube_first.sum()
    assert checked.min() > 200


def test_grasped_cube_hides_the_fingers_behind_it():
    view = {"tool": (0.25, -0.0085, 0.07), "jaw": 0.21, "cube": (0.2505, 0.0, 0.064)}
    red = is_cube(picture(**view))
    pixels = pinhole(corners(scene(**view)), scene(**view)).astype(np.float32)
    whole = cv2.fillConvexPoly(np.zeros(red.shape, np.uint8), cv2.convexHull(pixels).astype(int), 1)
    assert red.sum() == pytest.approx(whole.sum(), rel=0.02)


def make(seed: int, views: list[Scene], **config) -> SimCamera:
    clock = SimClock()
    calls = iter(views)
    return SimCamera(CameraConfig(**config), lambda: next(calls), clock, np.random.default_rng(seed))


def test_same_seed_gives_the_same_frames_and_other_noise_with_another():
    def frames(seed: int) -> np.ndarray:
        camera = make(seed, [scene(), scene(jaw=0.3)])
        first, _ = camera.latest()
        camera.clock.sleep_until(0.1)
        return np.stack([first, camera.latest()[0]])

    np.testing.assert_array_equal(frames(3), frames(3))
    difference = frames(3)[0].astype(int) - frames(4)[0]
    assert difference.std() == pytest.approx(2.5 * np.sqrt(2), rel=0.05)  # two independent draws of 2.5
    assert abs(difference.mean()) < 0.05


def test_noise_is_new_in_every_frame_of_a_still_scene():
    camera = make(0, [scene(), scene()])
    first, _ = camera.latest()
    camera.clock.sleep_until(0.1)
    assert (camera.latest()[0].astype(int) - first).std() == pytest.approx(2.5 * np.sqrt(2), rel=0.05)


def test_a_frame_is_drawn_once_for_each_time_and_carries_it():
    camera = make(0, [scene(), scene(tool=(0.25, 0, 0.1))])
    first, taken = camera.latest()
    assert taken == 0.0 and camera.latest()[0] is first  # a second drawing would take the next scene
    camera.clock.sleep_until(0.1)
    second, taken = camera.latest()
    assert taken == pytest.approx(0.1) and second.shape == (480, 640, 3) and second.dtype == np.uint8
    assert is_cube(second.astype(int)).sum() < is_cube(first.astype(int)).sum()
    camera.close()


def test_camera_pose_is_fixed_unless_the_config_randomises_it():
    fixed = [camera_model(CameraConfig(), np.random.default_rng(seed)) for seed in (0, 1)]
    np.testing.assert_array_equal(fixed[0].projection(), fixed[1].projection())
    ranges = CameraConfig(fovy_range_deg=5, pitch_range_deg=3, position_range=0.005)
    models = [camera_model(ranges, np.random.default_rng(seed)) for seed in range(50)]
    fovy = [2 * np.degrees(np.arctan(240 / model.focal_px)) for model in models]
    tilts = [np.degrees(np.arccos(np.clip(m.rotation[2] @ fixed[0].rotation[2], -1, 1))) for m in models]
    moves = [np.abs(model.position - fixed[0].position).max() for model in models]
    assert 65.5 <= min(fovy) < 68 and 73 < max(fovy) <= 75.5
    assert 2 < max(tilts) <= 3.0001 and 0.004 < max(moves) <= 0.005


@pytest.mark.parametrize(
    "wrong, message",
    [({"width": 0}, "width"), ({"fovy_deg": 170.0}, "fovy_deg"), ({"noise": -1.0}, "noise")],
)
def test_config_refuses_what_no_camera_has(wrong, message):
    with pytest.raises(ConfigError, match=message):
        CameraConfig(**wrong)

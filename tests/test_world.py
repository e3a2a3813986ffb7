"""The simulated table against the laws a cube obeys, and a physics engine's grasp trials (tests/data)."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from so101.errors import ConfigError
from so101.robot.kinematics import URDF_LIMITS, forward, jaw_pose, solve_ik
from so101.sim.contact import (
    grasp_holds,
    gravity_torque,
    jaw_angle_for,
    jaw_opening,
    lowest_corners,
    push_out,
    square_width,
    yaw_that_fits,
)
from so101.sim.servos import SimServos
from so101.sim.world import World, WorldConfig
from so101.timing import SUBSTEP

TRIALS = json.loads((Path(__file__).parent / "data" / "grasp_trials.json").read_text())
LOW, HIGH = URDF_LIMITS.T
HOME = np.array([-0.00084, 0.15639, -0.16078, 1.5708, 1.5708])
CORNERS = 0.015 * np.array(list(itertools.product((-1, 1), repeat=3)))  # of the cube, from its centre
OPEN, CLOSED = 0.785, -0.17


class Shafts:
    """Six joints that stand where the test puts them."""

    def __init__(self, angle: np.ndarray) -> None:
        self.angle, self.load_torque = angle.copy(), np.zeros(6)


class Bench:
    """A world whose arm a test can lead: vertical over x, y at the tool's height, with a jaw angle."""

    def __init__(self, x: float = 0.25, y: float = 0.0, z: float = 0.07, jaw: float = OPEN, **config) -> None:
        self.shafts = Shafts(np.append(self.joints(x, y, z, HOME), jaw))
        self.world = World(WorldConfig(**config), self.shafts, np.random.default_rng(0))

    @staticmethod
    def joints(x: float, y: float, z: float, start: np.ndarray) -> np.ndarray:
        return solve_ik(np.array([x, y, z]), start, max_iterations=30)

    @property
    def tool(self) -> np.ndarray:
        return forward(self.shafts.angle)[0]

    def lead(self, x: float, y: float, z: float, steps: int = 30) -> list[np.ndarray]:
        """Move the arm's joints evenly to a place; return where the cube was after each step."""
        start, goal = self.shafts.angle[:5].copy(), self.joints(x, y, z, self.shafts.angle[:5])
        path = []
        for share in np.linspace(0, 1, steps + 1)[1:]:
            self.shafts.angle[:5] = start + share * (goal - start)
            self.world.step(SUBSTEP)
            path.append(self.world.cube_position)
        return path

    def jaw_to(self, goal: float, steps: int = 30) -> None:
        """Turn the jaw towards an angle, as far as it gets."""
        for _ in range(steps):
            self.shafts.angle[5] += np.clip(goal - self.shafts.angle[5], -0.045, 0.045)
            self.world.step(SUBSTEP)

    def cube_between_fingers(self, along_x: float = 0.012, along_y: float = 0.0, yaw: float = 0.0) -> None:
        """Put the cube on the table where the gripper's axes say."""
        position, rotation = forward(self.shafts.angle, "gripper_link")
        x, y, _ = position + rotation @ [along_x, along_y, 0.0]
        self.world.place_cube(x, y, yaw + math.atan2(rotation[1, 0], rotation[0, 0]))

    def grasp(self, **place: float) -> None:
        """Come down over the cube, close, and stay there."""
        self.cube_between_fingers(**place)
        x, y, _ = self.tool
        self.lead(x, y, 0.02)
        self.jaw_to(CLOSED)


def jaw_frame(joints):
    """moving_jaw_link in the base frame, through gripper_link."""
    position, rotation = forward(joints, "gripper_link")
    origin, axes = jaw_pose(joints[5])
    return position + rotation @ origin, rotation @ axes


def lowest_tip(angle: np.ndarray) -> float:
    position, rotation = forward(angle, "gripper_link")
    return min(lowest_corners(rotation[2].tolist(), position[2], angle[5])).height


# Numbers worked by hand


def test_grasp_rule():
    assert grasp_holds(0.02, 0.0, 0.0)
    assert grasp_holds(0.03, 0.011, 0.0)
    assert not grasp_holds(0.033, 0.0, 0.0)  # the tips hardly reach below the top
    assert not grasp_holds(0.02, 0.016, 0.0)  # over the edge: half a cube less half a pad
    assert not grasp_holds(0.02, 0.0, 0.75)  # nearly on its corners
    assert not grasp_holds(0.02, -0.0105, 0.6) and grasp_holds(0.02, -0.0105, 0.0)


def test_grasp_rule_on_the_trials_that_were_kept_back():
    kept_back = TRIALS[1::2]
    said = np.array([grasp_holds(t["z"], t["dy"], t["yaw"]) for t in kept_back])
    check_precision_and_recall(said, kept_back)


def check_precision_and_recall(said: np.ndarray, trials: list[dict]) -> None:
    truth = np.array([trial["ok"] for trial in trials])
    assert (said & truth).sum() / said.sum() >= 0.8
    assert (said & truth).sum() / truth.sum() >= 0.8


def test_jaw_opening_agrees_with_the_meshes():
    # angle in degrees -> smallest gap in mm between the two finger meshes near their tips
    for degrees, millimetres in (
        (-10, 1.9),
        (-5, 8.8),
        (0, 15.8),
        (5, 22.1),
        (10, 28.5),
        (15, 34.2),
        (20, 39.6),
    ):
        assert jaw_opening(math.radians(degrees)) * 1e3 == pytest.approx(millimetres, abs=3.3)
    assert jaw_opening(jaw_angle_for(0.03)) == pytest.approx(0.03, abs=1e-12)


def test_lowest_corners_against_the_jaw_frame():
    # Straight down, the fixed finger ends 0.1044 below gripper_link; the jaw's end is checked in its frame.
    rng = np.random.default_rng(0)
    for jaw in rng.uniform(-0.17, 1.0, 20):
        joints = np.append(HOME + rng.uniform(-0.4, 0.4, 5), jaw)
        position, rotation = forward(joints, "gripper_link")
        origin, axes = jaw_frame(joints)
        fixed, moving = lowest_corners(rotation[2].tolist(), position[2], jaw)
        tips = [origin + axes @ [x, -0.082, 0.0189 + side] for x in (-0.0123, -0.0066) for side in (-0.0027, 0.0027)]
        assert moving.height <= min(tip[2] for tip in tips) + 3e-4
        assert (position + rotation @ moving.point)[2] == pytest.approx(moving.height, abs=1e-12)
        assert (position + rotation @ fixed.point)[2] == pytest.approx(fixed.height, abs=1e-12)
    upright = lowest_corners([0.0, 0.0, 1.0], 0.2, 0.0)[0]
    assert upright.height == pytest.approx(0.2 - 0.1044)


def test_push_out_by_hand():
    # A box reaches 2 mm into the left face of a 30 mm square at the origin: the square goes 2 mm right.
    assert push_out((0.0, 0.0), 0.03, 0.0, (-0.03, -0.005), (-0.013, 0.005)) == pytest.approx((0.002, 0.0))
    assert push_out((0.0, 0.0), 0.03, 0.0, (-0.03, -0.005), (-0.016, 0.005)) is None
    # Turned by 45 degrees its corner is at x = -21.2 mm; a box edge 5 mm to either side, reaching to -18 mm,
    # touches its sides at -21.2 + 0 on the axis: the corner is 3.2 mm inside.
    corner = 0.015 * math.sqrt(2)
    move = push_out((0.0, 0.0), 0.03, math.pi / 4, (-0.03, -0.005), (-0.018, 0.005))
    assert move == pytest.approx((corner - 0.018, 0.0))
    # ... but a box beside that corner misses it, though their bounding boxes overlap
    assert push_out((0.0, 0.0), 0.03, math.pi / 4, (-0.03, 0.012), (-0.018, 0.02)) is None


def test_push_out_only_just_separates():
    rng = np.random.default_rng(0)
    for _ in range(200):
        centre, yaw = rng.uniform(-0.02, 0.02, 2), rng.uniform(-0.8, 0.8)
        low, high = (-0.012, -0.005), (0.0, 0.005)
        move = push_out(tuple(centre), 0.03, yaw, low, high)
        if move is not None:
            assert push_out(tuple(centre + 1.0001 * np.array(move)), 0.03, yaw, low, high) is None
            assert push_out(tuple(centre + 0.98 * np.array(move)), 0.03, yaw, low, high) is not None


def test_a_turned_square_between_two_faces():
    assert square_width(0.03, math.pi / 4) == pytest.approx(0.03 * math.sqrt(2))
    for yaw in (0.0, 0.2, 0.6):
        assert yaw_that_fits(0.03, square_width(0.03, yaw)) == pytest.approx(yaw, abs=1e-7)
    assert yaw_that_fits(0.03, 0.02) == 0.0


def test_gravity_torques_are_those_of_the_physics_engine():
    # Reset pose: lift .49, elbow .34 Nm; tool at (.33, 0, .05): lift .74 (reference engine, URDF masses).
    lift, elbow, _ = gravity_torque(HOME.tolist(), 0.0)
    assert lift == pytest.approx(0.49, rel=0.03) and elbow == pytest.approx(0.34, rel=0.03)
    reaching = Bench.joints(0.33, 0.0, 0.05, HOME)
    assert gravity_torque(reaching.tolist(), 0.0)[0] == pytest.approx(0.74, rel=0.03)
    # A load of 30 g at the tool's radius, 0.0692 m being the lift axis's own distance from the origin.
    extra = gravity_torque(HOME.tolist(), 0.03)[0] - lift
    assert extra == pytest.approx(0.03 * 9.81 * (0.25 - 0.0692), rel=0.03)


# The world


def test_trials_of_the_physics_engine_end_the_same_way_here():
    kept_back = TRIALS[1::2]
    check_precision_and_recall(np.array([carry_out(trial) for trial in kept_back]), kept_back)


def carry_out(trial: dict) -> bool:
    """Place the arm as in a trial, close the jaw, lift by 7 cm: is the cube up?"""
    bench = Bench(0.22, 0.0, max(trial["z"], 0.0064), jaw=trial["open"])
    bench.world.place_cube(1.0, 1.0, 0.0)
    bench.world.step(SUBSTEP)
    # dx is how far the cube stands from the fixed finger's face (1 mm: what the trials left free).
    from_face = 0.001 + trial["dx"] + square_width(0.03, trial["yaw"]) / 2
    bench.cube_between_fingers(from_face - 0.0079, trial["dy"], trial["yaw"])
    bench.jaw_to(CLOSED)
    bench.lead(0.22, 0.0, bench.tool[2] + 0.07)
    return bench.world.held and bool(bench.world.cube_position[2] > 0.05)


def test_a_held_cube_moves_with_the_tool_as_one_body():
    bench = Bench()
    bench.grasp(yaw=0.15)
    assert bench.world.held and not bench.world.lifted
    seen = []
    for place in ((0.25, 0.0, 0.08), (0.2, 0.08, 0.06), (0.3, -0.1, 0.05)):
        bench.lead(*place)
        position, rotation = forward(bench.shafts.angle)
        seen.append((rotation.T @ (bench.world.cube_position - position), rotation.T @ bench.world.cube_rotation))
        np.testing.assert_allclose(bench.world.cube_rotation @ bench.world.cube_rotation.T, np.eye(3), atol=1e-9)
    for offset, turn in seen[1:]:
        np.testing.assert_allclose(offset, seen[0][0], atol=1e-9)
        np.testing.assert_allclose(turn, seen[0][1], atol=1e-9)


def test_lifted_means_held_with_the_bottom_above_three_centimetres():
    bench = Bench()
    bench.grasp()
    bench.lead(0.25, 0.0, 0.02 + 0.029)
    assert bench.world.held and not bench.world.lifted
    bench.lead(0.25, 0.0, 0.02 + 0.034)
    assert bench.world.lifted


def test_the_cube_falls_to_the_table_when_the_jaw_opens():
    bench = Bench()
    bench.grasp()
    bench.lead(0.25, 0.0, 0.09)
    above = bench.world.cube_position
    bench.jaw_to(bench.shafts.angle[5] + 0.015)  # 1.2 mm wider: still held
    assert bench.world.held
    bench.jaw_to(OPEN)
    assert not bench.world.held and not bench.world.lifted
    np.testing.assert_allclose(bench.world.cube_position, [*above[:2], 0.015], atol=2e-3)
    np.testing.assert_allclose(bench.world.cube_rotation[2], [0, 0, 1])


@pytest.mark.parametrize("height", [0.0125, 0.02, 0.028])
def test_a_cube_stops_the_jaw_where_the_trials_saw_it(height):
    bench = Bench()
    bench.cube_between_fingers()
    bench.lead(0.25, 0.0, height)
    bench.jaw_to(CLOSED)
    assert bench.world.held
    assert 0.145 <= bench.shafts.angle[5] <= 0.26
    bench.world.place_cube(0.25, 0.1, 0.0)
    bench.jaw_to(CLOSED)
    assert bench.shafts.angle[5] == pytest.approx(CLOSED)


def test_wider_cubes_stop_the_jaw_earlier():
    angles = []
    for size in (0.02, 0.025, 0.03, 0.035, 0.04):
        bench = Bench(jaw=1.0, cube_size=size)
        bench.cube_between_fingers(along_x=0.015)
        bench.lead(0.25, 0.0, 0.014)
        bench.jaw_to(CLOSED)
        assert bench.world.held
        angles.append(bench.shafts.angle[5])
    # the angles of the meshes with the cube flush; in the trials, deep in the fingers, up to 0.05 earlier
    np.testing.assert_allclose(angles, [0.058, 0.127, 0.195, 0.27, 0.36], atol=0.06)
    assert (np.diff(angles) > 0.05).all()


@pytest.mark.parametrize("along_y", [0.03, -0.03])
def test_closing_beside_the_cube_leaves_it_on_the_table(along_y):
    bench = Bench(z=0.02)
    bench.cube_between_fingers(along_y=along_y)
    before = bench.world.cube_position
    bench.jaw_to(CLOSED)
    bench.lead(0.25, 0.0, 0.09)
    assert not bench.world.held
    assert (bench.world.cube_position == before).all()


def test_a_cube_at_the_edge_of_the_fingers_slips_out_sideways():
    bench = Bench(z=0.015)
    bench.cube_between_fingers(along_y=0.0155)
    before = bench.world.cube_position
    bench.jaw_to(CLOSED)
    assert not bench.world.held
    assert bench.world.cube_position[2] == 0.015
    assert 0.001 < np.linalg.norm(bench.world.cube_position - before) < 0.03
    assert bench.shafts.angle[5] == pytest.approx(CLOSED)


def test_closing_slides_the_cube_to_the_fixed_finger_and_aligns_it():
    bench = Bench(z=0.015)
    bench.cube_between_fingers(along_x=0.03, yaw=0.35)
    yaw = []
    for _ in range(30):
        bench.jaw_to(CLOSED, steps=1)
        gripper = bench.world.gripper_rotation
        turned = gripper.T @ bench.world.cube_rotation
        yaw.append(math.atan2(turned[1, 0], turned[0, 0]))
    assert bench.world.held
    assert (np.diff(yaw) <= 1e-9).all() and yaw[0] == pytest.approx(0.35, abs=0.01) and abs(yaw[-1]) < 0.01
    inside = gripper.T @ (bench.world.cube_position - bench.world.gripper_position)
    assert inside[0] == pytest.approx(-0.0079 + 0.015, abs=5e-4)  # flush on the fixed face


@pytest.mark.parametrize("tilt", [-0.35, -0.2, 0.2, 0.35])
def test_a_tilted_gripper_grasps_too(tilt):
    bench = Bench()
    joints = bench.joints(0.24, 0.0, 0.02, HOME)
    joints[3] += tilt
    locked = ("wrist_flex", "wrist_roll")
    low, high = (
        solve_ik(np.array([0.24, 0.0, z]), joints, locked=locked, down_gain=0.0, max_iterations=60)
        for z in (0.02, 0.09)
    )
    bench.shafts.angle[:5] = high
    bench.world.step(SUBSTEP)
    tool, rotation = forward(low)
    assert 0.1 < abs(math.acos(rotation[2, 2])) < 0.5
    across = forward(low, "gripper_link")[1][:, 0]
    bench.world.place_cube(*(tool + 0.012 * across)[:2], math.atan2(across[1], across[0]))
    for end, jaw in ((low, OPEN), (low, CLOSED), (high, CLOSED)):
        start = bench.shafts.angle[:5].copy()
        for share in np.linspace(0, 1, 41)[1:]:
            bench.shafts.angle[:5] = start + share * (end - start)
            bench.jaw_to(jaw, steps=1)
    assert bench.world.lifted


def test_a_push_moves_the_cube_horizontally_and_never_vertically():
    for towards in ((1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (-1.0, 0.0)):
        x, y = np.array([0.25, 0.0]) - 0.05 * np.array(towards)
        bench = Bench(x, y, 0.015, jaw=CLOSED)
        bench.world.place_cube(0.25, 0.0, 0.1)
        path = np.array(bench.lead(0.25, 0.0, 0.015, steps=60))
        moved = path[-1] - [0.25, 0.0, 0.015]
        assert (path[:, 2] == 0.015).all()
        assert moved[:2] @ towards > 0.012  # half a cube, at least, in the direction of the push
        assert np.abs(np.diff(path, axis=0)).max() < 0.004  # never jumps


def test_a_finger_that_comes_down_on_the_cube_stops_on_its_top():
    bench = Bench(jaw=0.2)
    bench.cube_between_fingers(along_x=-0.011, yaw=0.1)  # under the fixed finger
    before = bench.world.cube_position
    bench.lead(0.25, 0.0, 0.028)  # the tip would be 8 mm inside
    assert (bench.world.cube_position == before).all()
    assert bench.tool[2] - 0.0063 == pytest.approx(0.03, abs=1e-3)


def test_a_cube_that_nothing_touches_never_moves():
    bench = Bench()
    rng = np.random.default_rng(0)
    before, turned = bench.world.cube_position.copy(), bench.world.cube_rotation.copy()
    for _ in range(500):
        bench.shafts.angle[:] = np.append(HOME + rng.uniform(-0.05, 0.05, 5), rng.uniform(CLOSED, 1.7))
        bench.world.step(SUBSTEP)
    assert (bench.world.cube_position == before).all() and (bench.world.cube_rotation == turned).all()


@pytest.mark.parametrize("holding", [False, True])
def test_nothing_goes_through_the_table_whatever_the_goal(holding):
    bench = Bench()
    if holding:
        bench.grasp()
    rng = np.random.default_rng(1)
    goal, held = bench.shafts.angle.copy(), 0
    for step in range(3000):
        if step % 20 == 0:
            anywhere = rng.uniform(LOW, HIGH)
            below = np.append(Bench.joints(*rng.uniform([0.15, -0.12, -0.1], [0.33, 0.12, 0.03]), HOME), anywhere[5])
            goal = anywhere if rng.random() < 0.4 else below
            goal[5] = CLOSED if holding else goal[5]
        bench.shafts.angle += np.clip((goal - bench.shafts.angle) * 0.2, -0.09, 0.09)
        bench.world.step(SUBSTEP)
        corners = bench.world.cube_position + CORNERS @ bench.world.cube_rotation.T
        assert lowest_tip(bench.shafts.angle) > -1e-3
        assert corners[:, 2].min() > -1e-3
        held += bench.world.held
    assert held == 3000 if holding else held < 3000


def test_the_arm_slides_along_the_table():
    bench = Bench(z=0.01)
    bench.world.place_cube(0.0, 1.0, 0.0)
    bench.lead(0.20, 0.08, -0.005, steps=60)  # 11 mm into the table
    assert lowest_tip(bench.shafts.angle) == pytest.approx(0.0, abs=5e-4)
    np.testing.assert_allclose(bench.tool[:2], [0.20, 0.08], atol=0.015)


def test_an_arm_of_real_servos_hangs_below_its_goal():
    servos = SimServos()
    servos.angle[:] = np.append(HOME, OPEN)
    servos.power_cycle()
    world = World(WorldConfig(), servos, np.random.default_rng(0))
    for index in range(6):  # goal = where the joint is, then torque on
        servos.write_memory(index, 42, servos.read_memory(index, 56, 2))
        servos.write_memory(index, 40, b"\x01")
    before = forward(servos.angle)[0][2]
    for _ in range(100):
        servos.step(SUBSTEP)
        world.step(SUBSTEP)
    # Sag at 9.4 to 18.8 Nm/rad: 1.5-2.9 degrees of lift at 0.18 m, as much again of the elbow: 5-20 mm.
    assert 0.004 < before - forward(servos.angle)[0][2] < 0.025


def test_reset_places_the_cube_in_its_range_and_varies_the_light():
    bench = Bench()
    places, yaws, lights = [], [], []
    for _ in range(300):
        bench.world.reset()
        places.append(bench.world.cube_position)
        yaws.append(math.atan2(bench.world.cube_rotation[1, 0], bench.world.cube_rotation[0, 0]))
        lights.append([bench.world.light.brightness, *bench.world.light.gain, *bench.world.light.direction])
    away = np.array(places) - [0.25, 0.0, 0.015]
    assert (away[:, 2] == 0).all()
    assert 0.028 < np.abs(away[:, :2]).max() <= 0.03 and 0.19 < np.abs(yaws).max() <= 0.2
    # uniform: standard deviation = range / sqrt(3)
    np.testing.assert_allclose(away[:, :2].std(axis=0), 0.03 / math.sqrt(3), rtol=0.1)
    lights = np.array(lights)
    assert (lights.std(axis=0) > 0.005).all()
    np.testing.assert_allclose(np.linalg.norm(lights[:, 4:], axis=1), 1)
    assert (lights[:, 6] > 0.9).all()  # from above


def test_reset_takes_a_held_cube_out_of_the_gripper():
    bench = Bench()
    bench.grasp()
    bench.lead(0.25, 0.0, 0.09)
    bench.world.reset()
    assert not bench.world.held and bench.world.cube_position[2] == 0.015
    bench.jaw_to(CLOSED)
    assert bench.shafts.angle[5] == pytest.approx(CLOSED)


def test_one_seed_repeats_bit_for_bit():
    def run(seed: int) -> list[bytes]:
        servos = Shafts(np.append(HOME, OPEN))
        world, said = World(WorldConfig(), servos, np.random.default_rng(seed)), []
        wander = np.random.default_rng(7)
        for step in range(400):
            if step % 50 == 0:
                world.reset()
                x, y, _ = world.cube_position
                goal = np.append(
                    Bench.joints(x, y - 0.012, wander.uniform(0, 0.03), HOME), wander.choice([OPEN, CLOSED])
                )
            servos.angle += 0.2 * (goal - servos.angle)
            world.step(SUBSTEP)
            said += [world.cube_position.tobytes(), world.cube_rotation.tobytes(), servos.angle.tobytes()]
        return said

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="cube_size: got 0.1"):
        WorldConfig(cube_size=0.1)
    with pytest.raises(ConfigError, match="cube_range_yaw: got -1"):
        WorldConfig(cube_range_yaw=-1)

"""The control step on the simulated arm: the real codec, servos with lag and sag, and a camera that is free."""

import contextlib

import numpy as np
import pytest

from so101.env import EnvConfig
from so101.errors import ConfigError, EpisodeAborted, SafetyStop
from so101.rig import RigConfig, open_rig
from so101.robot import safety
from so101.robot.kinematics import forward
from so101.robot.teleop import DEMONSTRATE, EVALUATION, PLACE_CUBE
from so101.schema import OPENING, TOOL_XYZ, TOOL_Z, Preprocess, RewardSpec

STILL = np.zeros(4)


class BlankCamera:
    """Nothing here looks at pictures."""

    def latest(self):
        return np.zeros((480, 640, 3), np.uint8), 0.0

    def wait_ready(self):
        pass


class Hand:
    """A person in the test's own hands: keys to press, and the leader's servos to move."""

    def __init__(self, leader):
        self.leader, self.keys, self.heard = leader, [], []

    def poll(self):
        pressed, self.keys = self.keys, []
        return pressed

    def quits(self):
        return "quit" in self.keys

    def hear(self, cue):
        self.heard.append(cue)

    def close(self):
        pass


@contextlib.contextmanager
def an_env(seed=0, **settings):
    settings = {"random_ee_reset": False, "control_time_s": 1000.0, **settings}
    with open_rig(RigConfig(), seed) as rig:
        rig.cameras = {"wrist": BlankCamera()}
        rig.teleop.hear(EVALUATION)
        env = rig.make_env(EnvConfig(**settings), Preprocess(), RewardSpec(), seed)
        yield env, rig


def servos_of(arm):
    return arm.bus.port.servos


def take_the_keys(rig):
    hand = Hand(servos_of(rig.teleop.leader.arm))
    rig.teleop.keys = hand
    return hand


def test_reset_measures_home_although_the_servos_sag():
    with an_env() as (env, _):
        observation, _ = env.reset()
        assert np.allclose(observation.state[TOOL_XYZ], [0.25, 0, 0.07], atol=1.5e-3)
        assert np.all(observation.state[6:12] == 0)  # velocities, at a reset
        assert observation.state[OPENING] == pytest.approx(0.5, abs=0.02)
        assert env.target[2] > 0.075  # the command stands higher: 1-2 cm of sag are made up for


def test_a_zero_action_holds_its_height_for_a_minute():
    with an_env() as (env, _):
        observation, _ = env.reset()
        start = observation.state[TOOL_XYZ]
        for _ in range(600):
            observation = env.step(STILL).observation
        assert np.abs(observation.state[TOOL_XYZ] - start).max() < 1e-3


def test_a_key_pressed_in_a_reset_that_fails_is_found_in_the_next():
    class LostOnce(BlankCamera):
        lost = False

        def wait_ready(self):
            if not self.lost:
                self.lost = True
                raise EpisodeAborted("camera wrist: no picture")

    with an_env() as (env, rig):
        env.cameras["wrist"] = LostOnce()
        take_the_keys(rig).keys = ["failure"]
        with pytest.raises(EpisodeAborted):
            env.reset()
        assert env.reset()[1] == {"failure"}
        assert env.step(STILL).events == frozenset()


@pytest.mark.parametrize("after", [0.0, 0.5, 1.5, 3.0, 6.0])
def test_a_quit_ends_a_reset_at_once_wherever_the_arm_is(after):
    """On the way up, on the way home, and while the cube is placed, for which the person asked 20 s."""
    with an_env(reset_time_s=20.0) as (env, rig):
        hand = take_the_keys(rig)
        servos_of(rig.arm).after(after, lambda: hand.keys.append("quit"))
        began = rig.clock.now()
        observation, events = env.reset(person_drives=True)
        assert events == {"quit"} and rig.clock.now() - began < after + 0.2
        assert (PLACE_CUBE.about("20") in hand.heard) == (after == 6.0)
        assert not rig.teleop.driving  # the leader is not let go: it comes to rest with the arm
        assert observation.state[TOOL_Z] == pytest.approx(forward(servos_of(rig.arm).angle)[0][2], abs=0.01)
    assert not servos_of(rig.arm).torque_on.any()
    assert np.abs(servos_of(rig.arm).angle[:5] - RigConfig().follower.rest[:5]).max() < safety.AT_REST


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_full_speed_is_reached_along_each_axis(axis):
    with an_env(workspace_low=[0.1, -0.15, -0.02], home=[0.22, -0.05, 0.06]) as (env, _):
        observation, _ = env.reset()
        action = STILL.copy()
        action[axis] = 1.0
        track = [env.step(action).observation.state[TOOL_XYZ][axis] for _ in range(6)]
        # 0.02 m a step at 10 Hz is 0.2 m/s; after the servos' lag of about 0.1 s the tool moves as fast
        assert (track[5] - track[2]) / 3 == pytest.approx(0.02, rel=0.12)


def test_a_blocked_arm_keeps_its_target_near_and_its_tips_off_the_table():
    with an_env(table_z=-0.05) as (env, rig):  # the config believes the table to be 5 cm lower than it is
        env.reset()
        for _ in range(40):
            step = env.step(np.array([0, 0, -1.0, 0]))
            tips, _ = forward(servos_of(rig.arm).angle)
            assert step.lag < 0.05 + 0.02
            assert tips[2] > 0.0063 - 1e-3
        assert step.observation.state[TOOL_Z] < 0.03  # it did go down to the table
        for _ in range(8):
            step = env.step(np.array([0, 0, 1.0, 0]))
        assert step.observation.state[TOOL_Z] > 0.05  # and came up at once instead of unwinding


def test_the_target_stays_in_the_box_and_the_opening_in_its_range():
    with an_env() as (env, _):
        env.reset()
        for sign in (1, -1):
            for _ in range(30):
                env.step(np.full(4, sign, float))
                assert np.all(env.target >= np.array(env.config.workspace_low) - 1e-3)
                assert np.all(env.target <= np.array(env.config.workspace_high) + 1e-3)
                assert 0.05 <= env.opening <= 0.5
        assert env.opening == 0.05


def test_no_joint_is_ever_commanded_beyond_its_limits_or_faster_than_allowed():
    rng = np.random.default_rng(3)
    with an_env() as (env, rig):
        env.reset()
        low, high = rig.arm.limits
        before = env.joints
        direction = STILL
        for step in range(200):
            if step % 8 == 0:
                direction = rng.uniform(-1.5, 1.5, 4)  # beyond [-1, 1]: must be clipped
            result = env.step(direction)
            assert np.all(np.abs(result.action) <= 1)
            assert np.all(env.joints >= low[:5]) and np.all(env.joints <= high[:5])
            assert np.abs(env.joints - before).max() <= env.config.max_joint_step + 1e-9
            before = env.joints


def test_the_action_stored_is_the_clipped_command_not_what_the_box_let_through():
    with an_env() as (env, _):
        env.reset()
        for _ in range(20):
            step = env.step(np.array([0, 2.0, 0, 0]))
        assert env.target[1] == pytest.approx(0.15, abs=1e-3)  # at the wall of the box
        assert step.action.tolist() == [0, 1, 0, 0]


def test_neither_takeover_nor_hand_back_makes_anything_jump():
    with an_env() as (env, rig):
        hand = take_the_keys(rig)
        env.reset()
        follower, leader = servos_of(rig.arm), hand.leader
        for _ in range(6):
            env.step(np.array([-0.5, 0.5, 0.3, -0.2]))
        for _ in range(10):
            env.step(STILL)
        assert np.abs(leader.angle[:5] - follower.angle[:5]).max() < 0.08  # the leader has followed
        leader_before, follower_before, target = leader.angle.copy(), follower.angle.copy(), env.target.copy()
        hand.keys = ["intervene"]
        step = env.step(np.array([1.0, 1.0, 1.0, 1.0]))  # what the policy wants counts no more
        assert step.by_human and np.abs(step.action).max() < 1e-6
        assert np.allclose(env.target, target, atol=1e-9)
        assert np.abs(follower.angle - follower_before).max() < 0.01
        assert not leader.torque_on.any()
        moved = leader.angle.copy()
        moved[0] += 0.2
        leader.move_by_hand(moved)
        for _ in range(8):
            env.step(STILL)
        follower_before = follower.angle.copy()
        leader_before = leader.angle.copy()
        hand.keys = ["intervene"]
        step = env.step(STILL)
        assert not step.by_human
        assert np.abs(follower.angle - follower_before).max() < 0.03
        assert np.abs(leader.angle - leader_before).max() < 0.25  # it comes back stiffly, a bounded step a tick
        assert leader.torque_on.all()


def test_a_leader_that_moves_faster_than_a_tick_allows_loses_nothing():
    with an_env() as (env, rig):
        hand = take_the_keys(rig)
        env.reset(person_drives=True)
        start = env.target.copy()
        moved = hand.leader.angle.copy()
        moved[0] -= 0.3  # about 6 cm at once, three ticks' worth
        before, _ = forward(hand.leader.angle)
        after, _ = forward(moved)
        hand.leader.move_by_hand(moved)
        actions = [env.step(STILL).action for _ in range(6)]
        assert np.abs(actions[0]).max() == 1.0
        assert np.allclose(env.target - start, after - before, atol=2e-3)
        assert np.allclose(np.sum(actions, axis=0)[:3] * 0.02, after - before, atol=2e-3)  # what is stored, adds up


def test_keys_end_an_episode_and_overrule_the_detector_both_ways():
    class Always:
        def reset(self):
            pass

        def update(self, observation):
            return True

    with an_env() as (env, rig):
        hand = take_the_keys(rig)
        env.reset()
        hand.keys = ["success"]
        step = env.step(STILL)
        assert step.success and step.terminated and step.reward == 1.0 and not step.truncated
        env.detector = Always()
        env.reset()
        hand.keys = ["failure"]
        step = env.step(STILL)
        assert step.terminated and not step.success and step.reward == 0.0
        env.success_ends = False
        env.reset()
        step = env.step(STILL)
        assert step.success and not step.terminated


def test_time_out_truncates_and_does_not_terminate():
    with an_env(control_time_s=0.5) as (env, _):
        env.reset()
        steps = [env.step(STILL) for _ in range(5)]
        assert [s.truncated for s in steps] == [False] * 4 + [True]
        assert not any(s.terminated for s in steps)


def test_velocity_is_the_change_of_position_over_the_measured_time():
    with an_env() as (env, rig):
        before, _ = env.reset()
        after = env.step(np.array([0, 1.0, 0, -1.0])).observation
        elapsed = after.time - before.time
        assert elapsed == pytest.approx(0.1)
        assert np.allclose(after.state[6:12], (after.state[:6] - before.state[:6]) / elapsed, atol=1e-4)
        position, _ = forward(after.state[:6].astype(float))
        assert np.allclose(after.state[TOOL_XYZ], position, atol=1e-6)


def test_a_locked_joint_never_moves():
    with an_env(locked_joints=["wrist_flex"]) as (env, _):
        env.reset()
        held = env.joints[3]
        for _ in range(10):
            env.step(np.array([1.0, 0.5, 0.5, 0]))
        assert env.joints[3] == held


@pytest.mark.parametrize("ending", ["return", "exception", "interrupt"])
def test_every_way_out_leaves_the_arm_at_rest_without_torque(ending):
    errors = {"return": None, "exception": ValueError("a bug"), "interrupt": KeyboardInterrupt()}
    caught = pytest.raises(BaseException) if errors[ending] else contextlib.nullcontext()
    with caught, an_env() as (env, rig):
        servos, leader = servos_of(rig.arm), servos_of(rig.teleop.leader.arm)
        env.reset()
        for _ in range(5):
            env.step(np.array([1.0, 0, -1.0, 0]))
        if errors[ending]:
            raise errors[ending]
    assert not servos.torque_on.any() and not leader.torque_on.any()
    assert np.abs(servos.angle[:5] - RigConfig().follower.rest[:5]).max() < safety.AT_REST


def test_an_arm_that_cannot_be_moved_is_held_and_says_so(capsys):
    with an_env() as (env, rig):
        servos = servos_of(rig.arm)
        env.reset()
        rig.clock.on_substep.append(lambda dt: servos.angle.__setitem__(1, 0.15))  # somebody leans on it
    assert servos.torque_on.all()
    assert "support it" in capsys.readouterr().err


def test_a_hot_servo_stops_the_arm_by_name():
    with an_env() as (env, rig):
        env.reset()
        servos_of(rig.arm).temperature[2] = 68
        with pytest.raises(SafetyStop, match="elbow_flex: servo at 68 deg C"):
            env.step(STILL)


def grasp(env, rig):
    """Let the scripted person grasp the cube, and take over from there."""
    rig.teleop.hear(DEMONSTRATE)
    env.reset(person_drives=True)
    while not rig.verdict.world.held:
        env.step(STILL)
    rig.teleop.hear(EVALUATION)
    rig.teleop.hand_back()
    for _ in range(2):
        env.step(np.array([0, 0, 0, -1.0]))


def test_a_gripper_that_is_opened_and_closed_in_turns_is_spared():
    """A policy after 1,000 steps did so until its servo reported an overload, which only a power cut clears."""
    with an_env(control_time_s=60.0) as (env, rig):
        env.reset()
        limits, chatter = [], np.array([0, 0, 0, 1.0])
        for tick in range(100):
            env.step(chatter if tick % 2 else -chatter)
            limits.append(rig.arm.bus.read(6, "Torque_Limit"))
        assert set(limits) == {200, 500} and limits.count(500) > limits.count(200) > 20
        for _ in range(20):
            env.step(STILL)
        assert rig.arm.bus.read(6, "Torque_Limit") == 500  # and has all of its torque again


def test_a_gripper_holds_the_cube_with_limited_torque_and_lets_go_with_all_of_it():
    """Hardware reference G11: at full torque it burns, and its servo calls 25 % for 2 s an overload."""
    with an_env() as (env, rig):
        grasp(env, rig)
        assert rig.arm.read().load[5] == pytest.approx(-0.5, abs=0.01)
        for _ in range(100):
            step = env.step(STILL)
        assert rig.verdict.world.held
        assert rig.arm.read().load[5] == pytest.approx(-0.2, abs=0.01)
        assert env.opening == 0.05 < step.observation.state[OPENING] - 0.1  # the command is remembered
        env.step(np.array([0, 0, 0, 1.0]))
        assert not rig.verdict.world.held
        assert rig.arm.bus.read(6, "Torque_Limit") == 500
    with an_env() as (env, rig):
        env.watchdog.config.grip_load = 1.0
        grasp(env, rig)
        with pytest.raises(SafetyStop, match="gripper: servo reports overload"):
            for _ in range(20):
                env.step(STILL)


def test_an_arm_that_pushes_for_seconds_stops_by_name_before_its_servo_gives_up():
    with an_env(leash=0.2) as (env, rig):
        env.reset()
        env.watchdog.config.max_current = 3.0  # which would be first
        servos = servos_of(rig.arm)
        servos.block([0])
        with pytest.raises(SafetyStop, match="shoulder_pan: servo at .* of its torque without moving; free the joint"):
            for _ in range(30):
                env.step(np.array([0, 1.0, 0, 0]))
        assert servos.error_byte(0) == 0
        servos.block([])


def test_the_leader_is_read_and_the_follower_written_before_the_wait():
    """Field record 30: 30-66 ms of lag in teleoperation, from what came between the two."""
    with an_env() as (env, rig):
        hand, log = take_the_keys(rig), []

        def listen(name, arm):
            port, write = arm.bus.port, arm.bus.port.write

            def noted(data):
                log.append((name, {0x82: "read", 0x83: "write"}.get(data[4], "other")))
                return write(data)

            port.write = noted

        listen("follower", rig.arm)
        listen("leader", rig.teleop.leader.arm)
        rig.clock.on_substep.append(lambda dt: log.append(("time", "passes")))
        env.reset()
        log.clear()
        env.step(STILL)
        wait = log.index(("time", "passes"))
        assert log[0] == ("follower", "write") and log[wait - 1] == ("leader", "write")  # the leader follows
        assert log[-1] == ("follower", "read")
        hand.keys = ["intervene"]
        env.step(STILL)
        log.clear()
        env.step(STILL)
        driven = [entry for entry in log if entry[0] != "time"]
        assert driven == [("leader", "read"), ("follower", "write"), ("follower", "read")]
        assert log[2] == ("time", "passes") == log[-2]


def test_a_servo_that_reports_a_fault_stops_the_arm_by_name_and_fault():
    with an_env() as (env, rig):
        env.reset()
        servos_of(rig.arm).condition[5] = 32
        with pytest.raises(SafetyStop, match="gripper: servo reports overload"):
            env.step(STILL)
        servos_of(rig.arm).condition[5] = 0


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"home": [0.5, 0, 0.07]}, "home: got"),
        ({"workspace_low": [0.4, -0.15, 0]}, "workspace"),
        ({"gripper_range": [0.5, 0.05]}, "gripper_range"),
    ],
)
def test_a_config_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        EnvConfig(**wrong)


def test_one_seed_repeats_an_episode_bit_for_bit():
    def run():
        with open_rig(RigConfig(), 5) as rig:
            env = rig.make_env(EnvConfig(), Preprocess(), RewardSpec(), 5)
            rig.teleop.hear(EVALUATION)
            rng = np.random.default_rng(0)
            observations = [env.reset()[0]] + [env.step(rng.uniform(-1, 1, 4)).observation for _ in range(10)]
            return observations

    for a, b in zip(run(), run(), strict=True):
        assert a.state.tobytes() == b.state.tobytes() and a.images.tobytes() == b.images.tobytes()

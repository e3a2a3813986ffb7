"""Keys over a real pseudo-terminal, the leader's states, and what the simulated person does with both alone."""

import os
import pty
import signal
import subprocess
import sys
import termios
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest
from test_env import STILL, Hand, an_env, servos_of, take_the_keys

from so101.env import EnvConfig
from so101.rig import RigConfig, open_rig
from so101.robot import teleop
from so101.robot.teleop import TeleopConfig, TerminalKeys
from so101.schema import Preprocess, RewardSpec
from so101.timing import SimClock

READER = textwrap.dedent(
    """
    import fcntl, sys, termios, time
    from contextlib import closing
    from dataclasses import dataclass
    from so101.config import launch
    from so101.robot.teleop import TerminalKeys

    @dataclass
    class Config:
        'Reads keys until q; f is a bug in the program.'

    def main(config):
        with closing(TerminalKeys()) as keys:
            print("ready", flush=True)
            while True:
                for event in keys.poll():
                    print(event, flush=True)
                    if event == "failure":
                        raise ValueError("a bug")
                    if event == "quit":
                        return
                time.sleep(0.01)

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C and Ctrl-Z come from here
    launch(Config, main, "")
    """
)


class Person:
    """A program that reads keys, at a terminal of its own, and who types there."""

    def __init__(self):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.program = subprocess.Popen(
            [sys.executable, "-c", READER],
            stdin=self.slave, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        assert self.program.stdout.readline().startswith("keys: s success")
        assert self.program.stdout.readline() == "ready\n"

    def types(self, keys):
        os.write(self.master, keys)

    def reads_key_by_key(self):
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def is_stopped(self):
        return os.waitpid(self.program.pid, os.WUNTRACED)[1] & 0xFF == 0x7F


@pytest.fixture
def person():
    person = Person()
    yield person
    person.program.kill()
    person.program.communicate()
    os.close(person.master)
    os.close(person.slave)


def test_keys_are_read_one_at_a_time_from_a_real_terminal_and_unknown_ones_ignored(person):
    for key in (b"s", b"z", b"\x1bOQ", b"\x1b[F", b"I", b"q"):  # no Enter; F2 and End send letters of their own
        person.types(key)
        time.sleep(0.03)
    assert person.program.stdout.read().split() == ["success", "intervene", "quit"]
    assert person.program.wait(5) == 0


def test_a_key_that_is_held_down_is_pressed_once(person):
    """Row 23: success was said at each step."""
    for _ in range(20):
        person.types(b"s")
        time.sleep(0.03)  # a terminal repeats at about 30 Hz
    person.types(b"q")
    assert person.program.stdout.read().split() == ["success", "quit"]


@pytest.mark.parametrize("ending, code", [(b"q", 0), (b"f", 1), (b"\x03", 130), (signal.SIGTERM, 130)])
def test_every_way_out_gives_the_terminal_back_as_it_was(person, ending, code):
    assert person.reads_key_by_key()
    if isinstance(ending, bytes):
        person.types(ending)
    else:
        person.program.send_signal(ending)
    assert person.program.wait(5) == code
    assert termios.tcgetattr(person.slave) == person.before


def test_ctrl_z_gives_the_terminal_to_the_shell_and_going_on_takes_it_back(person):
    for _ in range(2):
        person.types(b"\x1a")
        assert person.is_stopped()
        assert termios.tcgetattr(person.slave) == person.before
        person.program.send_signal(signal.SIGCONT)
        until = time.monotonic() + 5
        while not person.reads_key_by_key() and time.monotonic() < until:
            time.sleep(0.01)
    person.types(b"iq")
    assert person.program.stdout.read().split() == ["intervene", "quit"]
    assert person.program.wait(5) == 0 and termios.tcgetattr(person.slave) == person.before


@pytest.fixture
def typed(monkeypatch):
    """What is typed at the terminal of this very process; calling it types."""
    master, slave = pty.openpty()
    monkeypatch.setattr(teleop, "HELD_DOWN_S", 0.0)  # simulated seconds pass in no time
    with open(slave, closefd=False) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda keys: os.write(master, keys)
    os.close(master)
    os.close(slave)


def test_a_verdict_typed_while_the_arm_resets_is_not_lost(typed):
    with an_env() as (env, rig):
        rig.teleop.keys = TerminalKeys()
        rig.clock.on_substep.append(lambda dt: typed(b"f") if rig.clock.now() == 1.0 else None)
        _, pressed = env.reset()
        assert pressed == {"failure"}
        assert env.step(STILL).events == frozenset()  # and it is not said again
        rig.teleop.keys.close()


def test_the_look_for_the_key_to_quit_takes_no_key_away(typed, monkeypatch):
    keys = TerminalKeys()
    typed(b"\x1bOQs")  # F2 first, which sends a Q
    assert not keys.quits()
    typed(b"qp")
    assert keys.quits() and keys.quits()
    assert keys.poll() == ["success", "quit", "pause"]
    assert not keys.quits() and keys.poll() == []
    monkeypatch.setattr(teleop, "HELD_DOWN_S", 60.0)
    typed(b"q")  # the key is still down
    assert not keys.quits() and keys.poll() == []
    keys.close()


@pytest.mark.parametrize(
    "keys, ends", [({5.0: b"p"}, 5.0), ({1.0: b"p", 5.0: b"s", 9.0: b"p"}, 9.0), ({4.0: b"q"}, 4.0), ({0.5: b"q"}, 0.5)]
)
def test_paused_the_next_reset_waits_until_the_key_is_pressed_again(typed, capsys, keys, ends):
    clock = SimClock()
    clock.on_substep.append(lambda dt: typed(keys[clock.now()]) if clock.now() in keys else None)
    person = teleop.Teleop(None, TerminalKeys())
    person.paused = min(keys) > 1.0  # since the episode before, or from now on
    looks: list[float] = []
    events = person.place_object(clock, 2.0, lambda: looks.append(clock.now()))
    assert np.allclose(np.diff([0.0, *looks]), 0.1)  # somebody watches the follower all the while
    assert clock.now() == pytest.approx(ends, abs=0.1)
    assert events == {teleop.KEYS[key.decode()] for key in keys.values()}
    said = capsys.readouterr().out
    assert ("paused after this episode: press p to go on" in said) == (1.0 in keys)
    assert ("goes on" in said) == (not person.paused and b"p" in keys.values())
    person.keys.close()


def test_without_a_terminal_no_key_is_ever_pressed():
    program = "from so101.robot.teleop import TerminalKeys; k = TerminalKeys(); print(k.poll()); k.close()"
    done = subprocess.run([sys.executable, "-c", program], input="sss", capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_leader_is_limp_in_the_persons_hand_and_stiff_only_while_it_follows():
    """Row 2: the leader was locked, and the follower drove it."""
    with an_env() as (env, rig):
        hand = take_the_keys(rig)
        leader = hand.leader
        assert not leader.torque_on.any()  # opened
        for _ in range(2):  # the second time after the other states
            env.reset(person_drives=True)  # record
            for _ in range(3):
                assert env.step(STILL).by_human and not leader.torque_on.any()
            hand.keys = ["intervene"]  # there is nobody to hand back to
            assert env.step(STILL).by_human and not leader.torque_on.any()
            env.reset()  # policy
            for _ in range(12):
                assert not env.step(np.array([0.3, -0.3, 0.2, 0])).by_human and leader.torque_on.all()
            assert np.abs(leader.angle - servos_of(rig.arm).angle)[:5].max() < 0.1
            hand.keys = ["intervene"]
            for _ in range(3):
                assert env.step(STILL).by_human and not leader.torque_on.any()
            hand.keys = ["intervene"]
            assert not env.step(STILL).by_human and leader.torque_on.all()
    assert not leader.torque_on.any()  # closed, while it followed


class Grip:
    """A hand on the leader's pan joint, stronger than its servo; None lets it go."""

    def __init__(self, rig):
        self.leader, self.at = servos_of(rig.teleop.leader.arm), None
        rig.clock.on_substep.append(self.hold)

    def hold(self, dt):
        if self.at is not None:
            self.leader.angle[0] = self.at

    def pull(self, by):
        self.at = self.leader.angle[0] + by


def test_a_leader_pushed_off_its_course_takes_over_within_half_a_second_and_nothing_jumps():
    with an_env() as (env, rig):
        hand, grip = take_the_keys(rig), Grip(rig)
        env.reset()
        for _ in range(5):
            env.step(np.array([0.3, 0.3, 0, 0]))
        for _ in range(8):
            env.step(STILL)
        grip.pull(0.35)
        follower, target = servos_of(rig.arm).angle.copy(), env.target.copy()
        ticks = next(tick for tick in range(1, 20) if env.step(STILL).by_human)
        assert ticks <= 5
        assert np.abs(servos_of(rig.arm).angle - follower).max() < 0.01 and np.allclose(env.target, target, atol=1e-3)
        assert not hand.leader.torque_on.any() and teleop.YOU_DRIVE in hand.heard
        grip.pull(0.2)
        actions = [env.step(STILL).action for _ in range(6)]
        assert np.abs(actions).max() > 0.5  # and it drives


def test_a_hand_that_has_not_let_go_does_not_take_over_again_right_after_handing_back():
    with an_env() as (env, rig):
        hand, grip = take_the_keys(rig), Grip(rig)
        env.reset()
        grip.pull(0.5)
        assert any(env.step(STILL).by_human for _ in range(5))
        hand.keys = ["intervene"]
        assert not any(env.step(STILL).by_human for _ in range(15))  # still holding it where it is
        grip.at = None
        assert not any(env.step(STILL).by_human for _ in range(15))  # it comes back to the follower
        assert np.abs(hand.leader.angle - servos_of(rig.arm).angle)[:5].max() < 0.05
        grip.pull(-0.4)
        assert any(env.step(STILL).by_human for _ in range(5))


def test_each_way_to_take_over_can_be_switched_off():
    with an_env() as (env, rig):
        hand, grip = take_the_keys(rig), Grip(rig)
        rig.teleop.config = TeleopConfig(takeover="key")
        env.reset()
        grip.pull(0.5)
        assert not any(env.step(STILL).by_human for _ in range(10))
        grip.at = None
        rig.teleop.config = TeleopConfig(takeover="motion")
        env.reset()
        hand.keys = ["intervene"]
        assert not any(env.step(STILL).by_human for _ in range(5))
        grip.pull(0.5)
        assert any(env.step(STILL).by_human for _ in range(5))
        hand.keys = ["intervene"]  # hands back all the same
        assert not env.step(STILL).by_human


@pytest.mark.parametrize("sag", [0.0, 0.9])
def test_a_leader_that_only_lags_never_takes_over(sag):
    """Resets, and a policy that reverses at full speed; a leader that hangs 0.1 rad low under 0.9 Nm."""
    with an_env(5) as (env, rig):
        hand = take_the_keys(rig)
        hand.leader.load_torque[1:4] = sag
        rng = np.random.default_rng(5)
        farthest = 0.0
        for _ in range(4):
            env.reset()
            for step in range(50):
                wild = np.append(np.sign(rng.uniform(-1, 1, 3)), 0) if step % 10 < 5 else np.array([1, 1, 1, 0])
                assert not env.step(wild * (-1) ** (step // 10)).by_human
                farthest = max(farthest, np.abs(hand.leader.angle - servos_of(rig.arm).angle)[:5].max())
        assert farthest > 0.4  # it had lagged by more than a push


class Wheel(Hand):
    """Somebody at the page: keys to press, what is held, and whether he is gone."""

    def __init__(self, rig):
        super().__init__(None)
        self.held, self.gone = None, False
        rig.teleop.pendant = self

    def hand(self):
        return self.held

    def silent(self):
        return False

    def lost(self):
        gone, self.gone = self.gone, False
        self.held = None if gone else self.held
        return gone


AWAY = np.array([0.5, 0.0, 0.0, 0.0])


def test_a_key_held_on_the_page_takes_over_and_its_action_is_what_is_done():
    with an_env() as (env, rig):
        hand, wheel = take_the_keys(rig), Wheel(rig)
        env.reset()
        assert not env.step(AWAY).by_human  # nobody at the wheel
        wheel.held = STILL
        assert not env.step(AWAY).by_human  # at the wheel, but nothing is held: the policy goes on
        wheel.held = -AWAY
        target = env.target
        step = env.step(AWAY)
        assert step.by_human and step.action.tolist() == [-0.5, 0, 0, 0]
        assert env.target - target == pytest.approx([-0.01, 0, 0], abs=1e-6)  # half of 0.02 m
        assert teleop.YOU_DRIVE in wheel.heard and teleop.YOU_DRIVE in hand.heard
        wheel.held = STILL
        assert env.step(AWAY).action.tolist() == [0, 0, 0, 0] and rig.teleop.driver == "page"  # it waits, he thinks
        assert hand.leader.torque_on.all()  # the leader follows meanwhile
        wheel.held = None  # he let go of the wheel: no row of nobody is taken for a person's
        step = env.step(AWAY)
        assert not step.by_human and step.action.tolist() == [0.5, 0, 0, 0] and teleop.POLICY_DRIVES in wheel.heard
        assert not env.step(AWAY).by_human


def test_the_key_stops_the_policy_also_with_nobody_at_the_wheel_and_no_row_is_nobodys():
    with open_rig(RigConfig(leader=None), 0) as rig:
        wheel = Wheel(rig)
        env = rig.make_env(EnvConfig(random_ee_reset=False), Preprocess(), RewardSpec(), 0)
        env.reset()
        wheel.keys = ["intervene"]
        target = env.target
        assert env.step(AWAY).events == {"intervene", "redo"} and wheel.heard[-1] == teleop.UNMANNED
        for _ in range(5):
            assert env.step(AWAY).action.tolist() == [0, 0, 0, 0] and (env.target == target).all()
        servos_of(rig.arm).after(3.0, lambda: wheel.keys.append("pause"))
        began = rig.clock.now()
        assert env.reset()[1] == {"pause"} and rig.clock.now() - began > 3.0
        wheel.held, wheel.keys = STILL, ["intervene"]
        assert env.step(AWAY).action.tolist() == [0, 0, 0, 0] and rig.teleop.driver == "page"


def test_keys_pressed_before_the_place_is_told_do_not_say_that_the_object_is_there():
    with open_rig(RigConfig(leader=None), 0) as rig:
        wheel = Wheel(rig)
        env = rig.make_env(EnvConfig(random_ee_reset=False), Preprocess(), RewardSpec(), 0)
        told = []
        rig.teleop.note = lambda kind, what: told.append((rig.clock.now(), what))
        for wheel.keys, waits in ((["pause"], 45.0), (["success"], teleop.PLACE_S), ([], teleop.PLACE_S)):
            hear, wheel.heard = wheel.hear, []

            def place(cue, waits=waits, hear=hear):
                hear(cue)
                if cue.text.startswith("place the object") and waits > teleop.PLACE_S:
                    servos_of(rig.arm).after(waits, lambda: wheel.keys.append("pause"))

            wheel.hear = place
            env.reset(place="there")
            wheel.hear = hear
            asked = next(at for at, what in told if "place the object there" in what)
            assert rig.clock.now() - asked == pytest.approx(waits, abs=0.3) and not rig.teleop.paused
            told.clear()


def test_a_key_still_held_on_the_page_does_not_take_over_again_right_after_handing_back():
    with an_env() as (env, rig):
        take_the_keys(rig)
        wheel = Wheel(rig)
        env.reset()
        wheel.held = AWAY
        assert not env.step(STILL).by_human  # held since before the reset: of the episode before
        wheel.held = STILL
        env.step(STILL)
        wheel.held = AWAY
        assert env.step(STILL).by_human
        wheel.keys = ["intervene"]
        assert not any(env.step(STILL).by_human for _ in range(5))
        wheel.held = STILL
        assert not env.step(STILL).by_human
        wheel.held = AWAY
        assert env.step(STILL).by_human


def test_each_way_to_take_over_from_the_page_can_be_switched_off():
    with an_env() as (env, rig):
        take_the_keys(rig)
        wheel = Wheel(rig)
        rig.teleop.config = TeleopConfig(takeover="key")
        wheel.held = STILL
        env.reset()
        env.step(STILL)
        wheel.held = AWAY
        assert not any(env.step(STILL).by_human for _ in range(3))
        wheel.keys = ["intervene"]
        assert env.step(STILL).action.tolist() == AWAY.tolist() and rig.teleop.driver == "page"
        wheel.keys = ["intervene"]
        assert not env.step(STILL).by_human
        rig.teleop.config = TeleopConfig(takeover="motion")
        wheel.held, wheel.keys = STILL, ["intervene"]
        assert not env.step(STILL).by_human
        wheel.held = AWAY
        assert env.step(STILL).by_human


def test_a_recording_goes_from_the_leader_to_the_page_and_back_and_nothing_jumps():
    with an_env() as (env, rig):
        hand, wheel = take_the_keys(rig), Wheel(rig)
        env.reset(person_drives=True)
        drivers, targets = [], [env.target]

        def steps(count):
            for _ in range(count):
                assert env.step(STILL).by_human
                drivers.append(rig.teleop.driver[0])
                targets.append(env.target)

        for _ in range(4):
            hand.leader.angle[0] += 0.02
            steps(1)
        wheel.held = STILL
        steps(1)
        assert hand.leader.torque_on.all()
        wheel.held = AWAY
        steps(8)
        wheel.keys = ["intervene"]  # there is nobody to hand back to
        steps(1)
        wheel.held = None
        steps(2)
        assert not hand.leader.torque_on.any()
        assert "".join(drivers) == "llll" + "p" * 10 + "ll"
        jumps = np.abs(np.diff(targets, axis=0)).max(axis=1)
        assert jumps[4] < 1e-9 and jumps[5:14] == pytest.approx(0.01, abs=1e-6)  # the page's nine, half a step each
        assert jumps[14:].max() < 2e-3  # the leader lags 1 cm behind where it was led: that is no motion
        assert env.target[0] - targets[0][0] == pytest.approx(0.09, abs=0.01)


def test_who_drove_from_the_page_and_is_lost_costs_the_episode_and_the_next_one_waits():
    with an_env() as (env, rig):
        take_the_keys(rig)
        wheel = Wheel(rig)
        env.reset()
        wheel.held = STILL
        env.step(STILL)
        wheel.gone = True
        step = env.step(AWAY)  # at the wheel, but the policy drives: nothing is lost
        assert not step.by_human and step.events == frozenset() and not rig.teleop.paused
        wheel.held = AWAY
        assert env.step(STILL).by_human
        wheel.gone = True
        step = env.step(AWAY)
        assert step.action.tolist() == [0, 0, 0, 0] and step.events == {"redo"} and rig.teleop.paused
        assert wheel.heard[-1] == teleop.LOST
        stood, seen, began = rig.arm.commanded.tolist(), [], rig.clock.now()
        servos_of(rig.arm).after(8.9, lambda: seen.append(rig.arm.commanded.tolist()))
        servos_of(rig.arm).after(9.0, lambda: wheel.keys.append("pause"))
        assert env.reset()[1] == {"pause"} and seen == [stood]  # not even home, with nobody there
        assert rig.clock.now() - began > 9.0 + env.config.reset_time_s


def test_who_quits_after_the_page_was_lost_is_brought_nowhere_first():
    with an_env() as (env, rig):
        take_the_keys(rig)
        wheel = Wheel(rig)
        env.reset()
        for wheel.held in (STILL, AWAY):
            env.step(STILL)
        wheel.gone = True
        assert "redo" in env.step(AWAY).events
        stood = rig.arm.commanded.tolist()
        servos_of(rig.arm).after(3.0, lambda: wheel.keys.append("quit"))
        assert "quit" in env.reset()[1] and rig.arm.commanded.tolist() == stood


def test_without_a_leader_a_recording_begins_when_somebody_takes_the_wheel():
    """Three episodes in which nobody drives would end record.py."""
    with open_rig(RigConfig(leader=None), 0) as rig:
        wheel = Wheel(rig)
        env = rig.make_env(EnvConfig(random_ee_reset=False), Preprocess(), RewardSpec(), 0)
        env.reset()  # a policy's episode waits for nobody
        shown = []
        env.screen = SimpleNamespace(show=lambda env, observation, step: shown.append(observation))
        servos_of(rig.arm).after(20.0, lambda: setattr(wheel, "held", STILL))
        began = rig.clock.now()
        observation, pressed = env.reset(person_drives=True)
        assert pressed == frozenset() and rig.clock.now() - began == pytest.approx(20.0, abs=0.3)
        assert teleop.NOBODY_DRIVES in wheel.heard and rig.teleop.driver == "page"
        assert len(shown) == 2 and shown[0].time < shown[1].time - 10 and shown[1] is observation
        assert not observation.state[6:12].any() and env.step(STILL).by_human
        wheel.held = None
        servos_of(rig.arm).after(12.0, lambda: wheel.keys.append("quit"))
        assert env.reset(person_drives=True)[1] == {"quit"} and not rig.teleop.driving


def test_keys_of_the_page_and_of_the_terminal_are_one():
    with an_env() as (env, rig):
        hand, wheel = take_the_keys(rig), Wheel(rig)
        env.reset()
        hand.keys, wheel.keys = ["success"], ["end", "success"]
        assert env.step(STILL).events == {"success", "end"}
        wheel.keys = ["pause"]
        env.step(STILL)
        assert rig.teleop.paused and teleop.PAUSED in wheel.heard and teleop.PAUSED in hand.heard
        hand.keys = ["pause"]
        env.step(STILL)
        assert not rig.teleop.paused and wheel.heard[-1] == teleop.GOES_ON
        wheel.keys = ["failure"]
        assert env.reset()[1] == {"failure"} and rig.teleop.afterwards == {"failure"}
        assert env.reset()[1] == rig.teleop.afterwards == frozenset()
        wheel.keys = ["quit"]
        assert rig.teleop.quits() and env.reset()[1] == {"quit"}


@pytest.fixture
def training():
    with open_rig(RigConfig(), 1) as rig:
        env = rig.make_env(EnvConfig(), Preprocess(), RewardSpec(), 1, rig.verdict)
        yield env, rig


def test_the_simulated_person_helps_only_after_it_has_watched_and_then_succeeds(training):
    env, rig = training
    rig.teleop.hear(teleop.TRAINING)
    env.reset()
    steps = [env.step(np.zeros(4)) for _ in range(RigConfig().operator.explore_steps)]
    assert not any(step.by_human for step in steps)
    steps = []
    while not (steps and steps[-1].terminated) and len(steps) < 30:
        steps.append(env.step(np.zeros(4)))
    assert steps[0].by_human and steps[-1].success
    assert np.abs([step.action for step in steps[1:]]).mean() > 0.1  # what it did is what is stored


def test_the_simulated_person_keeps_its_hands_off_an_evaluation(training):
    env, rig = training
    rig.teleop.hear(teleop.EVALUATION)
    env.reset()
    assert not any(env.step(np.zeros(4)).by_human for _ in range(60))


def test_a_deliberate_failure_never_succeeds_and_says_so():
    with open_rig(RigConfig(), 2) as rig:
        env = rig.make_env(EnvConfig(), Preprocess(), RewardSpec(), 2, rig.verdict, success_ends=False)
        for _ in range(8):  # each way to fail, twice
            rig.teleop.hear(teleop.DEMONSTRATE_FAILURE)
            env.reset(person_drives=True)
            steps = [env.step(np.zeros(4))]
            while not (steps[-1].terminated or steps[-1].truncated):
                steps.append(env.step(np.zeros(4)))
            assert "failure" in steps[-1].events and not any(step.success for step in steps)


def test_most_demonstrations_succeed_and_are_recorded_through_the_leader():
    with open_rig(RigConfig(), 3) as rig:
        env = rig.make_env(EnvConfig(), Preprocess(), RewardSpec(), 3, rig.verdict)
        succeeded = 0
        for _ in range(10):
            rig.teleop.hear(teleop.DEMONSTRATE)
            env.reset(person_drives=True)
            for _ in range(40):
                step = env.step(np.zeros(4))
                assert step.by_human
                if step.terminated:
                    break
            succeeded += step.success
        assert succeeded >= 9

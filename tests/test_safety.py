"""Starting, watching and stopping: what the watchdog tolerates, and that every close ends at rest, or held and said."""

import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest

from so101 import signals
from so101.errors import ConfigError, SafetyStop
from so101.robot import safety
from so101.robot.arm import Arm, Reading
from so101.robot.bus import ServoBus, ServoError
from so101.robot.kinematics import JAW_CLOSED, JAW_OPEN, forward
from so101.robot.safety import SafetyConfig, Watchdog
from so101.schema import JOINTS
from so101.sim.servos import SIM_CALIBRATION, SimPort, SimServos
from so101.timing import SimClock
from so101.tools import goto

REST = np.array([0.0, -1.80, 1.66, 0.73, 1.571, 0.05])
POSE = np.array([0.2, -0.1, 0.2, 1.2, 1.5, 0.4])
CALM = Reading(
    position=POSE,
    velocity=np.zeros(6),
    load=np.zeros(6),
    voltage=np.full(6, 7.4),
    temperature=np.full(6, 30.0),
    status=np.zeros(6, int),
    current=np.zeros(6),
)
HELD = (
    "It holds with reduced torque: support it, then press Ctrl-C to release it. In 30 s this program leaves it holding;"
)


def but(joint: str, **values: float) -> Reading:
    """A calm reading, but for one joint."""
    changed = {field: getattr(CALM, field).copy() for field in values}
    for field, value in values.items():
        changed[field][JOINTS.index(joint)] = value
    return CALM._replace(**changed)


def watch(config: SafetyConfig, readings: list[Reading], commanded: np.ndarray = POSE) -> list[list[str]]:
    """What a watchdog says to readings that come at 10 Hz."""
    clock = SimClock()
    watchdog = Watchdog(config, clock)
    said = []
    for reading in readings:
        said.append(watchdog.check(reading, commanded))
        clock.sleep_until(clock.now() + 0.1)
    return said


def test_a_calm_arm_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert watch(SafetyConfig(), [CALM] * 100) == [[]] * 100
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "reading, said",
    [
        (but("elbow_flex", current=2.6), "elbow_flex: servo at 2.60 A; look for what blocks the joint before going on"),
        (but("gripper", voltage=4.2), "gripper: servo at 4.2 V; check the supply and its cable before going on"),
        (but("shoulder_pan", voltage=8.9), "shoulder_pan: servo at 8.9 V; check that the supply fits the servos"),
    ],
)
def test_a_peak_of_one_tick_is_no_fault_and_half_a_second_is(reading: Reading, said: str) -> None:
    """Hardware reference G12: a 7.4 V arm on a 5 A supply sags at each fast start."""
    assert watch(SafetyConfig(), [reading, CALM] * 20) == [[]] * 40
    assert watch(SafetyConfig(), [reading] * 5) == [[]] * 5
    with pytest.raises(SafetyStop, match=said):
        watch(SafetyConfig(), [reading] * 6)


def test_heat_is_warned_of_once_and_stops_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    warm, hot = but("gripper", temperature=56), but("gripper", temperature=66)
    watch(SafetyConfig(), [CALM, warm, CALM] + [warm] * 20)
    assert capsys.readouterr().err == "gripper: servo at 56 deg C; let it rest soon\n"
    with pytest.raises(SafetyStop, match="gripper: servo at 66 deg C; let it cool before going on"):
        watch(SafetyConfig(), [hot])


def test_a_fault_that_a_servo_reports_stops_but_its_voltage_bit_is_left_to_our_limits() -> None:
    with pytest.raises(SafetyStop, match="wrist_flex: servo reports overheat, overload; support the arm and switch"):
        watch(SafetyConfig(), [but("wrist_flex", status=37)])
    assert watch(SafetyConfig(), [but("wrist_flex", status=1)] * 10) == [[]] * 10


def test_each_limit_takes_each_action(capsys: pytest.CaptureFixture[str]) -> None:
    troubled = {
        "temperature": but("wrist_roll", temperature=70),
        "voltage": but("wrist_roll", voltage=3.0),
        "current": but("wrist_roll", current=2.7),
        "stall": but("wrist_roll", load=0.9),
    }
    for limit, reading in troubled.items():
        ticks = [reading] * 15
        capsys.readouterr()
        assert watch(SafetyConfig(**{f"{limit}_action": "warn"}), ticks)[-1] == []
        warned = capsys.readouterr().err
        assert warned.count("wrist_roll: servo at") == 1 + (limit == "temperature")  # warn_temperature as well
        assert watch(SafetyConfig(**{f"{limit}_action": "hold"}), ticks)[-1] == ["wrist_roll"]
        assert capsys.readouterr().err == warned  # the same sentence
        with pytest.raises(SafetyStop, match="wrist_roll: servo at"):
            watch(SafetyConfig(**{f"{limit}_action": "stop"}), ticks)


def test_a_stall_is_a_hard_push_for_a_second_without_coming_nearer() -> None:
    goal = POSE + [0, 0.5, 0, 0, 0, 0]
    pushing = but("shoulder_lift", load=-0.8)
    assert watch(SafetyConfig(), [pushing] * 10, goal) == [[]] * 10
    with pytest.raises(SafetyStop, match="shoulder_lift: servo at 80% of its torque without moving; free the joint"):
        watch(SafetyConfig(), [pushing] * 11, goal)
    creeping = [but("shoulder_lift", load=-0.8, position=POSE[1] + 0.004 * tick) for tick in range(100)]
    assert watch(SafetyConfig(), creeping, goal) == [[]] * 100  # 0.04 rad/s towards the goal
    yielding = [but("shoulder_lift", load=-0.8, position=POSE[1] - 0.03 * tick) for tick in range(11)]
    with pytest.raises(SafetyStop, match="shoulder_lift"):
        watch(SafetyConfig(), yielding, goal)  # it moves, but away: something stronger pushes back
    assert watch(SafetyConfig(), [but("shoulder_lift", load=-0.6)] * 100, goal) == [[]] * 100


def test_a_gripper_that_has_gripped_is_told_to_hold_and_nobody_is_bothered(capsys: pytest.CaptureFixture[str]) -> None:
    gripping = but("gripper", load=-0.5)
    assert watch(SafetyConfig(), [gripping] * 11, POSE - [0, 0, 0, 0, 0, 0.3]) == [[]] * 10 + [["gripper"]]
    assert capsys.readouterr().err == ""


def test_what_happened_before_a_pause_does_not_count() -> None:
    clock = SimClock()
    watchdog = Watchdog(SafetyConfig(), clock)
    for _ in range(5):
        watchdog.check(but("gripper", current=2.6), POSE)
        clock.sleep_until(clock.now() + 3.0)  # a reset


def test_limits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_voltage: got 4"):
        SafetyConfig(max_voltage=4.0)
    with pytest.raises(ConfigError, match="grip_load"):
        SafetyConfig(grip_load=0.0)


class ListenedPort(SimPort):
    """Keeps what was written, and where the arm was then."""

    def __init__(self, servos: SimServos) -> None:
        super().__init__(servos)
        self.sent: list[tuple[bytes, np.ndarray]] = []

    def write(self, data: bytes) -> int:
        self.sent.append((data, self.servos.angle.copy()))
        return super().write(data)

    def torque_offs(self) -> list[tuple[int, np.ndarray]]:
        """(servo id, the arm's angles (6,) then) of each order to let go."""
        return [(data[2], angle) for data, angle in self.sent if data[4] == 3 and data[5] == 40 and data[6] == 0]


def make(pose: np.ndarray = POSE) -> tuple[Arm, SimServos, SimClock]:
    servos, clock = SimServos(), SimClock()
    servos.angle[:] = [*pose[:5], JAW_CLOSED + pose[5] * (JAW_OPEN - JAW_CLOSED)]
    clock.on_substep.append(servos.step)
    return Arm(ServoBus(ListenedPort(servos), names=SIM_CALIBRATION.names, clock=clock), SIM_CALIBRATION), servos, clock


@contextmanager
def running(arm: Arm, clock: SimClock) -> Iterator[None]:
    """As the rig does it: started safely, closed safely on every way out."""
    with ExitStack() as stack:
        stack.callback(safety.safe_close, arm, clock, REST)
        safety.safe_start(arm)
        arm.bus.port.sent.clear()
        yield


def interrupt_after(clock: SimClock, seconds: float, number: signal.Signals = signal.SIGINT) -> None:
    """One signal, when so much simulated time has passed."""
    due = clock.now() + seconds
    clock.on_substep.append(lambda dt: signal.raise_signal(number) if due <= clock.now() < due + 0.019 else None)


class GoneReader(io.StringIO):
    """What stderr is once the other end of its pipe, or the terminal, is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("blocked", [False, True])
def test_nobody_there_to_read_what_is_said_leaves_the_arm_as_safe(
    blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`record.py 2>&1 | tee log`, and one Ctrl-C for both: an outage on the way to rest is told to nobody."""
    arm, servos, clock = make()
    with pytest.raises(ValueError, match="the first error"), running(arm, clock):
        monkeypatch.setattr(sys, "stderr", GoneReader())
        servos.block([1] if blocked else [])
        arm.bus.reopen = arm.bus.port.open
        clock.on_substep.append(lambda dt: servos.present.__setitem__(3, not 1.0 < clock.now() < 1.5))
        raise ValueError("the first error")
    if blocked:
        assert servos.torque_on.all()
        assert arm.bus.sync_read("Torque_Limit", range(1, 7)) == {**dict.fromkeys(range(1, 7), 500), 6: 200}
    else:
        assert not servos.torque_on.any() and np.abs(servos.angle[:5] - REST[:5]).max() < safety.AT_REST


def test_a_bug_on_the_way_to_rest_leaves_the_arm_held(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arm, servos, clock = make()
    with running(arm, clock):
        monkeypatch.setattr(safety, "solve_ik", lambda *arguments, **options: 1 / 0)
    assert "ZeroDivisionError: division by zero. It holds with reduced torque" in capsys.readouterr().err
    assert arm.bus.sync_read("Torque_Limit", range(1, 7)) == {**dict.fromkeys(range(1, 7), 500), 6: 200}


def test_it_is_only_said_to_hold_with_reduced_torque_where_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    """The gripper holds its cube already, and nothing else can be told to."""
    arm, servos, clock = make()
    with running(arm, clock):
        arm.hold(["gripper"])
        arm.bus.port.unplug()
    said = capsys.readouterr().err
    assert "It may still hold: support it, and cut its power" in said and "reduced torque" not in said


def test_of_two_signals_at_once_the_second_does_not_cut_the_way_out_short() -> None:
    """Ctrl-C reaches a whole pipeline, and its parent passes it on."""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)  # raises nothing
    time.sleep(signals.BOUNCE)
    with signals.signals_held() as came:
        with signals.signals_held():
            signal.raise_signal(signal.SIGHUP)
        assert came == [signal.SIGHUP]
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGHUP]
        came.clear()
    time.sleep(signals.BOUNCE)
    with pytest.raises(KeyboardInterrupt), signals.signals_held():
        signal.raise_signal(signal.SIGTERM)


def test_what_hangs_while_it_holds_the_signals_is_left_with_one_that_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An encoder that waits for a disk: on the way out the program waits for it, and the arm for the program."""
    monkeypatch.setattr(signals, "HUNG_S", 1.0)
    monkeypatch.setattr(signals, "BOUNCE", 0.05)
    disk_is_back, released, began = threading.Event(), [], time.monotonic()
    encoder = threading.Thread(target=disk_is_back.wait, daemon=True)
    encoder.start()
    for after in (0.1, 0.6, 1.3):
        threading.Timer(after, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt), ExitStack() as stack:
        stack.callback(lambda: released.append(time.monotonic() - began))
        with signals.signals_held():
            encoder.join()
    assert 1.25 < released[0] < 3  # not at the second, which came half a second after the first
    disk_is_back.set()


def test_a_servo_that_lost_its_power_while_nobody_looked_is_found_out() -> None:
    """It is back before the next look, so that no reply was lost: limp, without a load, and far from its goal."""
    arm, servos, clock = make()
    with pytest.raises(SafetyStop, match="shoulder_lift: limp though it was switched on"), running(arm, clock):
        watchdog = Watchdog(SafetyConfig(), clock)
        watchdog.guard(arm)
        servos.store(1, "Torque_Enable", 0)
        clock.sleep_until(clock.now() + 2.0)
        watchdog.guard(arm)


def test_the_leader_s_heat_counts_but_not_the_hand_that_holds_it(capsys: pytest.CaptureFixture[str]) -> None:
    clock = SimClock()
    watchdog = Watchdog(SafetyConfig(), clock, "leader ", stalls=False)
    for _ in range(50):
        clock.sleep_until(clock.now() + 0.1)
        assert watchdog.check(but("shoulder_lift", load=0.9), POSE + 1) == []
    with pytest.raises(SafetyStop, match="leader elbow_flex: servo at 66 deg C"):
        watchdog.check(but("elbow_flex", temperature=66), POSE)


def test_torque_goes_off_joint_by_joint_and_only_at_rest() -> None:
    """Field record 32: an arm let go while it is up falls, and wears its gears."""
    arm, servos, clock = make()
    with running(arm, clock):
        pass
    offs = arm.bus.port.torque_offs()
    assert [servo_id for servo_id, _ in offs] == [1, 2, 3, 4, 5, 6]
    assert all(np.abs(angle[:5] - REST[:5]).max() < safety.AT_REST for _, angle in offs)
    assert not servos.torque_on.any()


def test_an_arm_that_is_blocked_is_held_with_reduced_torque_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arm, servos, clock = make()
    with running(arm, clock):
        servos.block([1])
        began = clock.now()
    said = capsys.readouterr().err
    assert re.search(r"shoulder_lift: 0\.3\d rad behind its command; free what blocks the arm\. It holds", said)
    assert HELD in said and "`python -m so101.tools.release port=simulated` frees it then" in said
    assert servos.torque_on.all() and not arm.bus.port.torque_offs()
    limits = arm.bus.sync_read("Torque_Limit", range(1, 7))
    assert limits == {**dict.fromkeys(range(1, 7), 500), 6: 200}
    assert np.abs(servos.angle[:5] - arm.goals()[:5]).max() < 0.06  # it does not push on
    assert clock.now() - began > 30


def torque_limits(arm: Arm) -> set[int]:
    """What the joints of the arm were told since it started, in 0.1 %."""
    limits = [data for data, _ in arm.bus.port.sent if data[4:6] == b"\x03\x30" and data[2] < 6]
    return {int.from_bytes(data[6:8], "little") for data in limits}


@pytest.mark.parametrize("joint", [1, 2, 3])
def test_a_blocked_joint_that_comes_free_lies_down_after_all(joint: int, capsys: pytest.CaptureFixture[str]) -> None:
    """By itself: at half its torque and half its speed, and only then is it let go."""
    arm, servos, clock = make()
    with running(arm, clock):
        servos.block([joint])
        servos.after(12, lambda: servos.block([]))
    said = capsys.readouterr().err
    assert f"Once the joint is free it goes on to rest by itself, slowly\n{JOINTS[joint]} has come free" in said
    assert not servos.torque_on.any() and np.abs(servos.angle[:5] - REST[:5]).max() < safety.AT_REST
    assert all(np.abs(angle[:5] - REST[:5]).max() < safety.AT_REST for _, angle in arm.bus.port.torque_offs())
    assert torque_limits(arm) == {500} and 12 < clock.now() < 22


def test_a_joint_that_a_hand_frees_from_a_sagging_arm_is_felt(capsys: pytest.CaptureFixture[str]) -> None:
    """An arm stretched out: gravity takes 0.11 rad off each goal, as much as one step of the look leads on."""
    arm, servos, clock = make()
    with running(arm, clock):
        servos.load_torque[1] = 0.11 * 9.4
        servos.block([1])
        servos.after(12, lambda: servos.block([]))
    assert "shoulder_lift has come free" in capsys.readouterr().err
    assert not servos.torque_on.any() and clock.now() < 25


def test_a_joint_that_is_blocked_again_and_again_is_held_after_three_more_tries(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arm, servos, clock = make()
    with running(arm, clock):
        servos.block([1])
        at = servos.angle[1]

        def creep(dt: float) -> None:
            """It comes loose each 8 s, and jams 0.2 rad later."""
            nonlocal at
            if abs(servos.angle[1] - at) > 0.2:
                at = servos.angle[1]
                servos.block([1])
            elif round(servos.now / dt) % 400 == 0:
                servos.block([])

        clock.on_substep.append(creep)
    said = capsys.readouterr().err
    assert said.count("shoulder_lift has come free: once more to rest, slowly") == safety.TRIES == 3
    assert said.count(HELD) == 4 and said.count("Once the joint is free it goes on") == 3
    assert servos.torque_on.all() and not arm.bus.port.torque_offs()
    assert torque_limits(arm) == {500}
    assert np.abs(servos.angle[:5] - arm.goals()[:5]).max() < 0.06  # it does not push on


def test_the_look_for_a_joint_that_came_free_pushes_with_less_than_half_of_its_torque() -> None:
    arm, servos, clock = make()
    loads = []
    with running(arm, clock):
        servos.block([1])
        clock.on_substep.append(lambda dt: loads.append(abs(arm.read().load[1])) if 10 < clock.now() < 20 else None)
    assert 0.4 < max(loads) < 0.46
    assert np.mean(np.array(loads) > 0.2) < 0.65


def bug(*arguments: Any) -> None:
    raise ZeroDivisionError("a bug")


def test_a_servo_with_an_overload_is_not_taken_for_a_joint_that_came_free(capsys: pytest.CaptureFixture[str]) -> None:
    """It follows slowly, with a fifth of its torque: too little to lie down with."""
    arm, servos, clock = make()
    with running(arm, clock):
        servos.overload(1)
    said = capsys.readouterr().err
    assert "shoulder_lift: 0.3" in said and HELD in said and "free it goes on" not in said
    assert servos.torque_on.all() and said.count("closing the arm") == 1


@pytest.mark.parametrize("broken", ["lean", "read", "hold"])
def test_a_bug_while_the_arm_holds_is_told_and_the_hold_goes_on_until_a_ctrl_c(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that fails on the last path lets go of an arm, or leaves it without the person's Ctrl-C."""
    arm, servos, clock = make()
    still = []
    with pytest.raises(KeyboardInterrupt), running(arm, clock):
        servos.block([1])
        if broken == "hold":
            monkeypatch.setattr(arm, "hold", bug)
        else:
            servos.after(5, lambda: monkeypatch.setattr(arm, broken, bug))
        servos.after(14.5, lambda: still.append(servos.torque_on.all()))
        interrupt_after(clock, 15)
    said = capsys.readouterr().err
    assert said.count("ZeroDivisionError: a bug") == 1 and still == [True]
    assert ("Once the joint is free" in said) == (broken != "hold")  # nothing looks then
    assert ("It may hold with all its torque: support it" if broken == "hold" else "It holds on") in said
    assert "interrupted again: the arm was released where it was" in said and not servos.torque_on.any()


def test_a_bug_at_one_servo_keeps_no_other_from_being_told() -> None:
    arm, servos, clock = make()
    safety.safe_start(arm)
    arm._id = lambda name, of=arm._id: 1 / 0 if name == "elbow_flex" else of(name)  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        arm.set_torque(False)
    assert servos.torque_on.tolist() == [False, False, True, False, False, False]


def test_a_held_arm_is_released_by_one_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    arm, servos, clock = make()
    with pytest.raises(KeyboardInterrupt), running(arm, clock):
        servos.block([1])
        interrupt_after(clock, 15)
    assert not servos.torque_on.any()
    assert "interrupted again: the arm was released where it was" in capsys.readouterr().err
    assert clock.now() < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_interrupt_releases_the_arm_at_once(number: signal.Signals) -> None:
    """Field record 34: Ctrl-C ignored."""
    arm, servos, clock = make()
    with pytest.raises(KeyboardInterrupt), running(arm, clock):
        interrupt_after(clock, 1.0, number)
        raise KeyboardInterrupt
    offs = arm.bus.port.torque_offs()
    assert [servo_id for servo_id, _ in offs] == [1, 2, 3, 4, 5, 6]
    assert clock.now() < 1.2 and np.abs(offs[0][1][:5] - REST[:5]).max() > 0.5  # it was on its way


def test_the_first_interrupt_of_a_close_that_nothing_led_to_lets_it_come_to_rest() -> None:
    arm, servos, clock = make()
    with pytest.raises(KeyboardInterrupt), running(arm, clock):
        interrupt_after(clock, 1.0)
    assert not servos.torque_on.any()
    assert np.abs(servos.angle[:5] - REST[:5]).max() < safety.AT_REST


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_close_never_hides_the_error_that_led_to_it(interrupted: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Field record 32: an overload at shutdown masked a recording that was safe."""
    arm, servos, clock = make()
    with pytest.raises(ValueError, match="the first error"), running(arm, clock):
        clock.on_substep.append(lambda dt: servos.present.__setitem__(3, servos.now < 3.3))  # lost on the way
        if interrupted:
            interrupt_after(clock, 5.0)
        raise ValueError("the first error")
    said = capsys.readouterr().err
    assert "servo 4 (wrist_flex): no valid reply" in said and "1 servos could not be told to hold" in said
    on = [True] * 6 if not interrupted else [False, False, False, True, False, False]
    assert servos.torque_on.tolist() == on
    if interrupted:
        assert "interrupted again: torque may still be on in 1 servos; support the arm and cut its power" in said


def test_a_servo_that_refuses_at_rest_is_reported_and_the_others_released(capsys: pytest.CaptureFixture[str]) -> None:
    arm, servos, clock = make(REST)
    with running(arm, clock):
        arm.bus.port.fault = lambda reply: b"" if reply[2] == 2 and len(reply) == 6 else reply  # no acknowledgement
    said = capsys.readouterr().err
    assert "closing the arm: torque may still be on in 1 servos" in said and "servo 2 (shoulder_lift)" in said
    assert not servos.torque_on.any()  # and in truth it did obey


def test_an_arm_of_which_nothing_answers_is_said_to_hold_without_a_wait(capsys: pytest.CaptureFixture[str]) -> None:
    arm, servos, clock = make()
    with running(arm, clock):
        arm.bus.port.unplug()
    assert "It may still hold: support it, and cut its power" in capsys.readouterr().err
    assert servos.torque_on.all() and clock.now() < 5


def test_a_joint_without_torque_keeps_the_others_still(capsys: pytest.CaptureFixture[str]) -> None:
    arm, servos, clock = make()
    with running(arm, clock):
        servos.power_cycle([2])
    assert "elbow_flex lost its torque. " + HELD in capsys.readouterr().err
    assert servos.torque_on.tolist() == [True, True, False, True, True, True]


def test_an_arm_without_any_torque_closes_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    arm, servos, clock = make()
    with running(arm, clock):
        servos.power_cycle()
    assert capsys.readouterr().err == "" and clock.now() < 1


def test_a_start_that_fails_leaves_no_torque_on() -> None:
    arm, servos, clock = make()
    arm.bus.port.fault = lambda reply: b"" if reply[2] == 5 and servos.torque_on[3] else reply
    with pytest.raises(ServoError), running(arm, clock):
        pytest.fail("started")
    assert not servos.torque_on.any()


@pytest.mark.parametrize("packets", range(0, 120, 3))
def test_an_interrupted_start_leaves_the_arm_limp_where_it_was(packets: int) -> None:
    arm, servos, clock = make()
    replies = iter(range(1000))

    def interrupting(reply: bytes) -> bytes:
        if next(replies) == packets:
            signal.raise_signal(signal.SIGINT)
        return reply

    arm.bus.port.fault = interrupting
    with pytest.raises(KeyboardInterrupt), running(arm, clock):
        while True:
            clock.sleep_until(clock.now() + 0.1)
            arm.read()
    assert not servos.torque_on.any()


def test_an_arm_that_still_holds_is_told_of_and_taken_over_without_a_move(capsys: pytest.CaptureFixture[str]) -> None:
    """DESIGN 5: after SIGKILL the arm holds, and the next start says so."""
    arm, servos, clock = make()
    safety.safe_start(arm)
    assert capsys.readouterr().err == ""
    arm.set_torque(False, ["gripper"])  # killed in the middle of letting go, say
    clock.sleep_until(1.0)
    before = servos.angle.copy()
    again = Arm(arm.bus, SIM_CALIBRATION)
    with running(again, clock):
        said = capsys.readouterr().err
        clock.sleep_until(2.0)
        assert servos.angle == pytest.approx(before, abs=2e-3)
        assert servos.torque_on.all()
    joints = "shoulder_pan, shoulder_lift, elbow_flex, wrist_flex, wrist_roll"
    assert said.startswith(f"the arm still holds, from a program that was killed or lost its power ({joints}); it goes")
    assert not servos.torque_on.any()


def test_an_arm_that_holds_is_not_dropped_by_a_start_that_fails() -> None:
    arm, servos, clock = make()
    safety.safe_start(arm)
    servos.store(1, "P_Coefficient", 32)
    arm.bus.port.sent.clear()
    refused = pytest.raises(
        SafetyStop, match="shoulder_lift: holding, and would fall .* -m so101.tools.release port=simulated`"
    )
    with refused, running(Arm(arm.bus, SIM_CALIBRATION), clock):
        pytest.fail("started")
    assert servos.torque_on.all() and not arm.bus.port.torque_offs()


def test_easing_against_something_stops_before_it_pushes_with_all_it_has() -> None:
    arm, servos, clock = make()
    safety.safe_start(arm)
    servos.block([0])
    with pytest.raises(SafetyStop, match=r"shoulder_pan: 0\.3\d rad behind its command; free what blocks the arm"):
        safety.ease_to(arm, clock, POSE + [1.0, 0, 0, 0, 0, 0])
    assert arm.read().load[0] < 0.97


@pytest.mark.parametrize(
    "pose, goal, tool",
    [
        ("home", None, [0.25, 0, 0.07]),
        ("rest", REST, None),
        ([0.5, -0.5, 0.6, 1.2, 1.57, 0.3], [0.5, -0.5, 0.6, 1.2, 1.57, 0.3], None),
    ],
)
def test_goto_goes_there_and_says_where_it_is(
    pose: Any, goal: Any, tool: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    goto.main(goto.Config(pose=pose))
    said = capsys.readouterr()
    numbers = [[float(word) for word in re.findall(r"-?\d+\.\d+", line)] for line in said.out.splitlines()]
    measured = np.array([row[0] for row in numbers[:6]])
    assert said.err == "" and numbers[6] == pytest.approx(forward(measured)[0], abs=2e-3)
    if goal is not None:
        assert [float(said) for said in re.findall(r"goal (-?\d+\.\d+)", said.out)] == pytest.approx(goal, abs=1e-3)
        assert measured == pytest.approx(goal, abs=0.06)  # it sags
    if tool is not None:
        assert numbers[6] == pytest.approx(tool, abs=0.02)
    off = int(re.search(r"(\d+) mm from its goal: up to 30 is the arm's own weight", said.out)[1])  # type: ignore[index]
    if goal is not None:
        assert off == pytest.approx(1000 * np.linalg.norm(forward(measured)[0] - forward(np.array(goal))[0]), abs=2)


def test_goto_takes_no_more_than_its_weight_for_weight() -> None:
    assert "doctor" not in goto.about(0.03) and "look for what blocks a joint" in goto.about(0.0301)


def test_goto_refuses_a_pose_that_the_arm_has_not() -> None:
    with pytest.raises(ConfigError, match=r"pose: gripper is 1\.500, calibrated for 0\.000 \.\. 1\.000"):
        goto.main(goto.Config(pose=[0, 0, 0, 0, 0, 1.5]))
    with pytest.raises(ConfigError, match=r"pose: the fingertips would come to -0\.\d+ m on the way there, the table"):
        goto.main(goto.Config(pose=[0, 0.9, 0, 0.5, 1.57, 0.5]))
    with pytest.raises(ConfigError, match="pose: got 2 values, needs one for each of shoulder_pan,"):
        goto.Config(pose=[0, 1])

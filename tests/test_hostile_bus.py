"""The bus against everything that field reports tell of: damaged replies, lost servos, pulled plugs, latched faults.

In simulated time where that shows it, and on a pseudo-terminal, through the real serial.Serial.
"""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from test_env import Hand, servos_of
from test_record import FaultyCamera

from so101.env import TIP_BELOW_TOOL, EnvConfig
from so101.rig import RigConfig, open_rig
from so101.robot.arm import Arm
from so101.robot.bus import ServoBus, ServoError
from so101.robot.camera import CameraConfig
from so101.robot.feetech import REGISTERS, SYNC_WRITE
from so101.robot.kinematics import JAW_CLOSED, JAW_OPEN, forward
from so101.robot.ports import REPLY_TIMEOUT_S, open_port
from so101.schema import Preprocess, RewardSpec
from so101.sim.camera import CameraConfig as SimCameraConfig
from so101.sim.script import Event, play
from so101.sim.servos import MAX_SPEED, SIM_CALIBRATION, Faults, SimPort, SimServos
from so101.timing import Clock, Rate, SimClock
from tests.conftest import LiveArm

IDS = [1, 2, 3, 4, 5, 6]
NAMES = SIM_CALIBRATION.names
EVERYONE = ", ".join(f"servo {servo_id} ({name})" for servo_id, name in NAMES.items())
RATE = 0.02  # of the replies are damaged
# What half an encoder tick is of a position: what a perfect reading is off at most.
HALF_TICK = np.array([math.pi / 4096] * 5 + [0.5 / 1251]) + 1e-9
GOAL = REGISTERS["Goal_Position"].address


def simulated() -> tuple[SimServos, SimPort, ServoBus, SimClock]:
    """An arm in simulated time, in which the bus waits too."""
    servos, clock = SimServos(), SimClock()
    clock.on_substep.append(servos.step)
    port = SimPort(servos)
    return servos, port, ServoBus(port, names=NAMES, reopen=port.open, clock=clock), clock


def live(arm: LiveArm) -> ServoBus:
    """A bus on the arm's pseudo-terminal."""

    def open_it() -> object:
        return open_port(arm.path, "follower.port")

    return ServoBus(open_it(), names=NAMES, reopen=open_it)


def true_position(servos: SimServos) -> np.ndarray:
    return np.append(servos.angle[:5], (servos.angle[5] - JAW_CLOSED) / (JAW_OPEN - JAW_CLOSED))


def goal_ticks(servos: SimServos) -> list[int]:
    return [int.from_bytes(servos.read_memory(index, GOAL, 2), "little") for index in range(6)]


def wave(arm: Arm, start: np.ndarray) -> Callable[[float], np.ndarray]:
    """Each joint to and fro around `start` at its own pace."""
    low, high = arm.limits
    paces = np.array([1.0, 1.3, 1.7, 2.1, 2.6, 3.1])
    return lambda t: np.clip(start + 0.2 * np.sin(paces * t), low, high)


def damage(port: SimPort, seed: int, clock: SimClock, timeout: float) -> list[bytes]:
    """Damage 1 in 50 of its replies, let those that do not come cost `timeout` s; the goals that go over its line."""
    port.fault = Faults(np.random.default_rng(seed), RATE)
    goals: list[bytes] = []
    read, write = port.read, port.write

    def slow_read(size: int) -> bytes:
        if len(data := read(size)) < size:
            clock.sleep_until(clock.now() + timeout)
        return data

    def listen(data: bytes) -> int:
        if data[4] == SYNC_WRITE and data[5] == GOAL:
            goals.append(data)
        return write(data)

    port.read, port.write = slow_read, listen  # type: ignore[method-assign]
    return goals


def ticks_of(packets: list[bytes]) -> np.ndarray:
    """The goals (n, 6) in ticks that these SYNC WRITEs carry: six times an id and two bytes, and a checksum."""
    return np.array([np.frombuffer(data[7:-1], np.dtype([("id", "u1"), ("goal", "<u2")]))["goal"] for data in packets])


@pytest.mark.parametrize(
    "count, fps, timeout",
    [
        (2_000, 25.0, 0.0),
        pytest.param(10_000, 25.0, 0.0, marks=pytest.mark.slow),
        (1_000, 10.0, REPLY_TIMEOUT_S),
    ],
)
def test_control_steps_at_1_in_50_damaged_replies(
    count: int, fps: float, timeout: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Field record, row 31: at this rate the original's loop, with one retry, ended within seconds.

    Policy and person, whose hand never rests, take turns of 50 ticks.
    """
    size = {"width": 64, "height": 48}
    config = RigConfig(cameras={"wrist": CameraConfig(source="sim", **size)}, sim_camera=SimCameraConfig(**size))
    task = EnvConfig(fps=fps, control_time_s=1e6, locked_joints=["wrist_roll"])
    rng, action = np.random.default_rng(0), np.zeros(4)
    steps, truth = [], []
    with open_rig(config, 0) as rig:
        assert rig.teleop.leader is not None and isinstance(rig.clock, SimClock)
        servos, leader = servos_of(rig.arm), rig.teleop.leader.arm
        rig.cameras = {"wrist": FaultyCamera((), (48, 64))}
        hand = rig.teleop.keys = Hand(servos_of(leader))
        env = rig.make_env(task, Preprocess(crop=[0, 8, 48, 48], image_size=32), RewardSpec(), 0)
        env.reset()
        sent, led = (damage(arm.bus.port, seed, rig.clock, timeout) for seed, arm in enumerate((rig.arm, leader)))
        for tick in range(count):
            if tick % 50 == 0:
                hand.keys = ["intervene"]
            if tick % 10 == 0:
                action = rng.uniform(-1.5, 1.5, 4)
            if env.teleop.driving:
                reach = [0.02, 0.02, 0.02, 0.02, 0, 0.2]
                hand.leader.move_by_hand(hand.leader.angle + rng.uniform(-1, 1, 6) * reach)
            steps.append(env.step(action))
            truth.append(true_position(servos))
        goals, led_goals, buses = ticks_of(sent), ticks_of(led), (rig.arm.bus, leader.bus)
        faults, outages = buses[0].faults + buses[1].faults, sum(bus.outages for bus in buses)

    assert len(goals) == count and sum(step.by_human for step in steps) == count / 2
    for ticks in (goals, led_goals):
        joints = SIM_CALIBRATION.joints.values()
        assert (ticks >= [joint.range_min for joint in joints]).all()
        assert (ticks <= [joint.range_max for joint in joints]).all()
    positions = np.array([SIM_CALIBRATION.to_position(ticks) for ticks in goals])
    assert np.abs(np.diff(positions[:, :5], axis=0)).max() <= task.max_joint_step + 2 * HALF_TICK[0]
    assert np.ptp(goals[:, 4]) == 0  # the locked joint
    low, high = task.gripper_range
    assert (positions[:, 5] >= low - HALF_TICK[5]).all() and (positions[:, 5] <= high + HALF_TICK[5]).all()
    tools = np.array([forward(position)[0] for position in positions])
    assert (tools >= np.array(task.workspace_low) - 2e-3).all()
    assert (tools <= np.array(task.workspace_high) + 2e-3).all()
    assert tools[:, 2].min() > task.table_z + TIP_BELOW_TOOL - 2e-3
    states = np.array([step.observation.state for step in steps])
    assert np.isfinite(states).all() and (np.abs(states[:, :6] - truth) <= HALF_TICK + 1e-6).all()
    periods = np.diff([step.observation.time for step in steps])
    late = np.array([step.late > 0 for step in steps])
    if timeout:
        assert periods.min() > 0.02 and late.mean() < 0.03
    else:
        assert late.sum() <= outages and (np.abs(periods - 1 / fps) > 1e-6).sum() <= 2 * outages
    assert faults.total() > count / 10
    assert set(faults) == {"no reply", "truncated", "checksum", "noise", "unexpected"}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 * outages + 2  # a line when one begins, a line when it ends; and the counts of each line


def test_three_hundred_ticks_on_a_real_port_at_1_in_50_damaged_replies(live_arm: LiveArm) -> None:
    arm, servos = Arm(live(live_arm), SIM_CALIBRATION), live_arm.servos
    arm.connect()
    arm.configure()
    arm.set_torque(True)
    live_arm.port.fault = Faults(np.random.default_rng(1), RATE)
    path, clock = wave(arm, arm.read().position), Clock()
    rate = Rate(clock, 0.02)
    a_tick_s_motion = MAX_SPEED * rate.period
    for _ in range(300):
        goal = path(clock.now())
        arm.command(goal)
        rate.wait()
        before = true_position(servos)
        position = arm.read().position
        after = true_position(servos)
        assert (position >= np.minimum(before, after) - a_tick_s_motion).all()
        assert (position <= np.maximum(before, after) + a_tick_s_motion).all()
        assert goal_ticks(servos) == SIM_CALIBRATION.to_ticks(goal).tolist()
    assert sum(arm.bus.faults.values()) > 15
    arm.bus.close()


def test_a_servo_that_loses_its_power_and_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    servos, port, bus, clock = simulated()
    arm = Arm(bus, SIM_CALIBRATION)
    arm.set_torque(True)
    play(Event(fault="vanish", ids=[4], seconds=0.5), port)
    clock.sleep_until(0.1)
    assert bus.sync_read("Present_Position", IDS) == {1: 2071, 2: 1996, 3: 2105, 4: 2018, 5: 2084, 6: 1534}
    assert clock.now() == pytest.approx(0.7)  # pauses of 0.2 and 0.4 s
    assert capsys.readouterr().err == (
        "servo 4 (wrist_flex): no valid reply to SYNC READ Present_Position in 4 attempts: no reply; check its power "
        "and the cable that leads to it; trying again for 3 s\n"
        "SYNC READ Present_Position: answered again after 0.6 s\n"
    )
    assert bus.report() == (
        "servo line simulated: bad answers: 8, asked for again or mended (no reply 8); outages: 1, 0.6 s in all"
    )
    assert servos.torque_on.tolist() == [True, True, True, False, True, True]
    assert bus.read(4, "Goal_Position") == 0  # nothing it was told before is left


def test_a_servo_whose_data_wire_alone_is_loose_keeps_its_torque(capsys: pytest.CaptureFixture[str]) -> None:
    servos, port, bus, clock = simulated()
    Arm(bus, SIM_CALIBRATION).set_torque(True)
    play(Event(fault="mute", ids=[5, 6], seconds=0.1), port)
    clock.sleep_until(0.02)
    bus.write(6, "Acceleration", 9)
    assert bus.read(6, "Acceleration") == 9
    assert servos.torque_on.all()
    assert capsys.readouterr().err.startswith("servo 6 (gripper): no valid reply to WRITE Acceleration in 4 attempts")


def test_a_dead_supply_names_all_six_servos(capsys: pytest.CaptureFixture[str]) -> None:
    """Field record, row 31."""
    _, port, bus, clock = simulated()
    play(Event(fault="vanish", seconds=0.3), port)
    clock.sleep_until(0.02)
    bus.sync_read("Present_Load", IDS)
    begun, ended = capsys.readouterr().err.splitlines()
    assert begun == (
        f"{EVERYONE}: no valid reply to SYNC READ Present_Load in 4 attempts: no reply; check the power supply, and "
        f"the cable before the first of them; trying again for 3 s"
    )
    assert ended == "SYNC READ Present_Load: answered again after 0.6 s"


def test_an_adapter_that_is_pulled_out_and_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    _, port, bus, clock = simulated()
    bus.write(1, "Goal_Position", 2000)
    play(Event(fault="unplug", seconds=0.5), port)
    clock.sleep_until(0.02)
    bus.sync_write("Goal_Position", {1: 2100})  # not acknowledged, and yet not lost
    assert bus.read(1, "Goal_Position") == 2100
    assert capsys.readouterr().err == (
        "SYNC WRITE Goal_Position: the port failed (simulated: Input/output error); check its USB cable; "
        "trying again for 3 s\n"
        "SYNC WRITE Goal_Position: answered again after 0.6 s\n"
    )


def test_patience_ends_and_a_shutdown_is_not_held_up_by_each_servo(capsys: pytest.CaptureFixture[str]) -> None:
    _, port, bus, clock = simulated()
    play(Event(fault="unplug"), port)
    clock.sleep_until(0.02)
    with pytest.raises(ServoError) as caught:
        bus.sync_read("Present_Load", IDS)
    assert str(caught.value) == (
        "SYNC READ Present_Load: the port failed, and cannot be opened again: no such port; given up after 3 s"
    )
    assert clock.now() == pytest.approx(3.02)
    for servo_id in IDS:
        with pytest.raises(ServoError, match="WRITE Torque_Enable: the port failed, and cannot be opened again"):
            bus.write(servo_id, "Torque_Enable", 0)
    assert clock.now() == pytest.approx(3.02)
    assert capsys.readouterr().err.count("\n") == 1  # the error is the other end of the story
    assert bus.report() == "servo line simulated: outages: 1, 3.0 s in all"
    port.plug_in()
    assert bus.read(1, "Lock") == 1
    play(Event(fault="mute", ids=[1], seconds=0.1), port)
    clock.sleep_until(clock.now() + 0.02)
    assert bus.read(1, "Lock") == 1  # patient again
    assert bus.outages == 2


def test_a_question_whether_a_servo_is_there_does_not_wait() -> None:
    _, port, bus, clock = simulated()
    play(Event(fault="vanish", ids=[3]), port)
    clock.sleep_until(0.02)
    with pytest.raises(ServoError, match=r"servo 3 \(elbow_flex\): no valid reply to PING in 4 attempts: no reply"):
        bus.ping(3)
    with pytest.raises(ServoError, match="no valid reply to READ P_Coefficient"):
        bus.write_eprom(3, "P_Coefficient", 16)
    assert clock.now() == pytest.approx(0.02)
    assert bus.outages == 0


@pytest.mark.parametrize(
    ("delay", "why"),
    [
        (250, "checksum 0x00, expected 0xfe: ff ff 01 00 00 00 fc"),  # at once: they garble each other
        (0, "6 bytes more than the whole answer: ff ff 01 02 00 fc ff ff 01 02 00 fc"),  # in turn
    ],
)
def test_two_servos_of_one_id(delay: int, why: str) -> None:
    _, port, bus, clock = simulated()
    play(Event(fault="register", ids=[2], register="ID", value=1), port)
    play(Event(fault="register", ids=[2], register="Return_Delay_Time", value=delay), port)
    clock.sleep_until(0.02)
    with pytest.raises(ServoError) as caught:
        bus.ping(1)
    assert str(caught.value) == (
        f"servo 1 (shoulder_pan): no valid reply to PING in 4 attempts: {why}; two servos with this id, or a damaged "
        f"line: connect one servo at a time"
    )


def test_a_wrong_baud_is_silence_and_a_foreign_talker_noise() -> None:
    _, port, bus, clock = simulated()
    play(Event(fault="register", ids=[3], register="Baud_Rate", value=4), port)
    clock.sleep_until(0.02)
    with pytest.raises(ServoError, match="servo 3 .* no reply; check its power and the cable that leads to it"):
        bus.ping(3)
    port.baudrate = 115_200
    assert bus.ping(3) == 777
    with pytest.raises(ServoError, match="servo 1 .* no reply"):
        bus.ping(1)
    port.baudrate = 1_000_000
    port.fault = lambda reply: b"\x07" * len(reply)
    bus.reopen = None
    with pytest.raises(ServoError) as caught:
        bus.read(1, "Lock")
    assert str(caught.value) == (
        "servo 1 (shoulder_pan): no valid reply to READ Lock in 4 attempts: no packet header among the bytes: "
        "07 07 07 07 07 07 07; another program may be using the port, or the servo has another baud rate"
    )


def test_status_bits_are_kept_and_the_servo_still_read() -> None:
    _, port, bus, clock = simulated()
    play(Event(fault="voltage", ids=[2], value=12.4, seconds=1), port)
    play(Event(fault="temperature", ids=[3], value=75), port)
    play(Event(fault="overload", ids=[4]), port)
    clock.sleep_until(0.02)
    assert [bus.ping(servo_id) for servo_id in IDS] == [777] * 6
    assert bus.sync_read("Present_Voltage", IDS)[2] == 124
    assert bus.status == {1: 0, 2: 1, 3: 4, 4: 32, 5: 0, 6: 0}
    clock.sleep_until(1.1)
    bus.sync_read("Lock", IDS)
    assert bus.status[2] == 0


def test_a_stalled_joint_latches_an_overload_until_its_torque_is_switched() -> None:
    """Field record, row 32: a sustained load on the wrist, and a torque-off that was taken for refused."""
    servos, port, bus, clock = simulated()
    Arm(bus, SIM_CALIBRATION).set_torque(True)
    bus.write(4, "P_Coefficient", 16)
    play(Event(fault="block", ids=[4], seconds=4), port)
    clock.sleep_until(0.1)
    bus.write(4, "Goal_Position", 2018 + 400)  # 0.61 rad away: more than full PWM
    clock.sleep_until(1.9)
    assert bus.read(4, "Present_Load") == 970
    assert bus.read(4, "Present_Current") * 0.0065 == pytest.approx(2.7 * 0.97, abs=0.01)
    assert bus.status[4] == 0
    clock.sleep_until(2.3)  # Protection_Time is 2 s
    assert bus.read(4, "Present_Load") == 200  # Protective_Torque is 20 %
    assert bus.status[4] == 32
    bus.write(4, "Torque_Enable", 0)  # acknowledged with the bit set, which is no refusal
    assert not servos.torque_on[3]
    clock.sleep_until(4.2)
    bus.write(4, "Torque_Enable", 1)
    clock.sleep_until(6.0)
    assert bus.read(4, "Present_Position") == 2018 + 400
    assert bus.status[4] == 0


def test_an_overloaded_shoulder_sinks_under_the_arm_s_weight() -> None:
    servos, port, bus, clock = simulated()
    Arm(bus, SIM_CALIBRATION).set_torque(True)
    servos.load_torque[1] = 0.74  # Nm, stretched out; 20 % of the stall torque of 3.5 Nm hold 0.70
    clock.sleep_until(1.0)
    held = servos.angle[1]
    assert held < 0.05  # P 32
    play(Event(fault="overload", ids=[2]), port)
    clock.sleep_until(2.0)
    sunk = servos.angle[1]
    clock.sleep_until(3.0)
    assert servos.angle[1] - sunk == pytest.approx(sunk - held, rel=0.2)  # at a constant speed: no rest to find
    assert sunk > held + 0.01


def test_replies_slower_than_the_timeout_are_never_taken_for_another_s(live_arm: LiveArm) -> None:
    bus = live(live_arm)
    assert bus.port.timeout == 0.05
    live_arm.port.delay = 0.07
    for _ in range(3):
        assert bus.read(1, "Present_Voltage") == 74
        assert bus.read(1, "Present_Temperature") == 25
        assert bus.read(1, "Torque_Enable") == 0
    assert bus.outages == 0
    bus.close()


def test_a_real_port_that_is_pulled_out_and_put_back(live_arm: LiveArm, capsys: pytest.CaptureFixture[str]) -> None:
    bus = live(live_arm)
    bus.write(1, "Goal_Position", 2000)
    live_arm.play(fault="unplug", seconds=0.4)
    while not bus.outages:
        bus.sync_write("Goal_Position", {1: 2100})
        assert bus.read(1, "Goal_Position") == 2100
    begun, ended = capsys.readouterr().err.splitlines()
    path = re.escape(live_arm.path)
    assert re.fullmatch(rf"(SYNC WRITE|READ) Goal_Position: the port failed \({path}: .*; trying again for 3 s", begun)
    assert re.fullmatch(r"(SYNC WRITE|READ) Goal_Position: answered again after 0\.\d s", ended)
    bus.close()


def test_a_real_port_that_is_gone_for_good(live_arm: LiveArm) -> None:
    bus = live(live_arm)
    bus.patience = 0.3
    live_arm.port.unplug()
    with pytest.raises(ServoError, match="READ Lock: the port failed, and cannot be opened again: follower.port: "):
        while True:
            bus.read(1, "Lock")
    assert bus.outages == 1


@pytest.mark.parametrize(("ids", "named"), [([4], "servo 4 (wrist_flex)"), (IDS, EVERYONE)])
def test_vanished_servos_on_a_real_port(
    live_arm: LiveArm, ids: list[int], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bus = live(live_arm)
    port = bus.port
    live_arm.play(fault="vanish", ids=ids, seconds=0.6)
    while not bus.outages:
        bus.sync_read("Present_Position", IDS)
    begun, ended = capsys.readouterr().err.splitlines()
    assert begun.startswith(f"{named}: no valid reply to SYNC READ Present_Position in 4 attempts: no reply; check ")
    assert re.fullmatch(r"SYNC READ Present_Position: answered again after \d\.\d s", ended)
    assert (bus.port is port) == (ids == [4])  # where others answered, the adapter is well
    assert port.is_open == (bus.port is port)
    bus.close()

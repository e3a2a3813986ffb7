"""The arm on simulated servos: what it refuses, what it sets, and that it never jumps."""

import math
import signal
from collections.abc import Callable

import numpy as np
import pytest

from so101.errors import HardwareError, SafetyStop
from so101.robot.arm import Arm
from so101.robot.bus import ServoBus, ServoError
from so101.robot.kinematics import JAW_CLOSED, JAW_OPEN
from so101.schema import JOINTS
from so101.sim.servos import SIM_CALIBRATION, Faults, SimPort, SimServos
from so101.timing import SimClock

POSE = np.array([0.2, -0.5, 0.6, 1.2, 1.5, 0.4])
ANGLE = np.append(POSE[:5], JAW_CLOSED + 0.4 * (JAW_OPEN - JAW_CLOSED))


class RecordingPort(SimPort):
    """Keeps the instructions that were written."""

    def __init__(self, servos: SimServos) -> None:
        super().__init__(servos)
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.sent.append(data)
        return super().write(data)


def make() -> tuple[Arm, SimServos]:
    servos = SimServos()
    servos.angle[:] = ANGLE
    return Arm(ServoBus(RecordingPort(servos), names=SIM_CALIBRATION.names), SIM_CALIBRATION), servos


def run(servos: SimServos, seconds: float) -> None:
    for _ in range(round(seconds / 0.02)):
        servos.step(0.02)


def test_connect_moves_and_writes_nothing() -> None:
    arm, servos = make()
    arm.connect()
    run(servos, 1)
    assert (servos.angle == ANGLE).all()
    assert all(packet[4] in (1, 2, 0x82) for packet in arm.bus.port.sent)  # PING, READ, SYNC READ


def same_baud(servos: SimServos, code: int) -> None:
    for index in range(6):
        servos.store(index, "Baud_Rate", code)


def never_calibrated(servos: SimServos) -> None:
    for index in range(6):
        for register, value in (("Homing_Offset", 0), ("Min_Position_Limit", 0), ("Max_Position_Limit", 4095)):
            servos.store(index, register, value)


SILENT = (
    "simulated: no motor answers, though the USB adapter is there. Plug in the arm's power supply (USB does not feed "
    "the motors), check the cable from the board to the first motor, and on a Waveshare board set both jumpers to B "
    "(USB). If all that is well, this is another device's port (python -m so101.tools.ports lists them), or the motors "
    "have another speed than 1000000 baud (python -m so101.tools.setup port=simulated finds and changes it, motor by "
    "motor)"
)


MISHAPS: dict[str, tuple[Callable[[SimServos], object], str]] = {
    "no power": (lambda servos: servos.present.__setitem__(slice(6), [False] * 6), SILENT),
    "another baud": (lambda servos: same_baud(servos, 1), SILENT),
    "missing servo": (
        lambda servos: servos.present.__setitem__(2, False),
        "simulated: elbow_flex (id 3) does not answer, and wrist_flex behind it does, so the cables are good: its "
        "motor has another id or speed, or is broken. Connect it alone and run python -m so101.tools.setup "
        "port=simulated joint=elbow_flex",
    ),
    "loose cable": (
        lambda servos: servos.present.__setitem__(slice(3, 6), [False] * 3),
        "simulated: wrist_flex (id 4) does not answer, nor does anything behind it (wrist_roll, gripper): check "
        "the cable from elbow_flex to wrist_flex; if it is good, connect wrist_flex's motor alone and run python "
        "-m so101.tools.setup port=simulated joint=wrist_flex",
    ),
    "duplicate id": (
        lambda servos: servos.store(2, "ID", 5),
        "wrist_roll: replies collide: two motors have the same id, a cable is damaged, or this is another "
        "device's port. Leave one motor connected, and give each its id with python -m so101.tools.setup "
        "port=simulated",
    ),
    "12 V": (
        lambda servos: servos.voltage.__setitem__(2, 12.1),
        "elbow_flex gets 12.1 V, and is made for 4.0 .. 8.0: unplug the power now; 7.4 V motors take a 5 V supply, "
        "only the 12 V kind takes 12",
    ),
    "USB alone": (
        lambda servos: servos.voltage.__setitem__(2, 4.3),
        "elbow_flex gets 4.3 V, so it answers, but its motor has no power: switch the arm's supply on (5 V, 5 A "
        "for 7.4 V motors), and check its plug",
    ),
    "uncalibrated": (
        never_calibrated,
        "simulated: this arm has never been calibrated; run `python -m so101.tools.calibrate` first",
    ),
    "another arm's calibration": (
        lambda servos: (servos.store(2, "Homing_Offset", -790), servos.store(4, "Max_Position_Limit", 3900)),
        "simulated: this calibration is not the one in the servos of elbow_flex, wrist_roll: elbow_flex's "
        "Homing_Offset is -790 in the servo, -803 in the calibration. Give the file that was made for this arm, or "
        "calibrate it again with python -m so101.tools.calibrate",
    ),
}


@pytest.mark.parametrize(("mishap", "said"), MISHAPS.values(), ids=MISHAPS)
def test_what_is_wrong_with_an_arm_is_said_at_connect(mishap: Callable[[SimServos], object], said: str) -> None:
    """Nothing is waited for: a bus that outlasts an outage does not take any of these for one."""
    arm, servos = make()
    clock = SimClock()
    bus = ServoBus(arm.bus.port, names=SIM_CALIBRATION.names, reopen=arm.bus.port.open, clock=clock)
    mishap(servos)
    with pytest.raises(HardwareError) as caught:
        Arm(bus, SIM_CALIBRATION).connect()
    assert str(caught.value) == said
    assert clock.now() < 0.2 and not bus.outages


def test_a_port_that_is_pulled_out_or_another_device_s_is_not_taken_for_silent_servos() -> None:
    arm, _ = make()
    arm.bus.port.unplug()
    with pytest.raises(HardwareError, match=r"the port failed \(simulated: Input/output error\); check its USB cable"):
        arm.connect()
    arm, _ = make()
    arm.bus.port.fault = lambda reply: b"Temperature: 21.5 C\r\n"  # a talkative thermometer
    with pytest.raises(HardwareError, match="shoulder_pan: replies collide: .* or this is another device's port"):
        arm.connect()


def test_connecting_takes_two_transactions() -> None:
    arm, _ = make()
    arm.connect()
    assert len(arm.bus.port.sent) == 2


def test_a_servo_that_reports_a_condition_connects(capsys: pytest.CaptureFixture[str]) -> None:
    arm, servos = make()
    servos.voltage[:] = 8.4  # a full battery: the servos, made for 8.0 V, set their voltage bit
    servos.temperature[5] = 66
    arm.connect()
    assert arm.bus.status == dict.fromkeys(range(1, 7), 1)
    assert capsys.readouterr().err == (
        "each of the six servos on simulated gets 8.4 V, and is made for 4.0 .. 8.0: check the supply and its plug\n"
        "gripper is at 66 C and stops at 70: let it cool\n"
    )


def test_a_complaint_of_several_servos_is_one_line_that_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    """No two servos measure quite the same; and a trouble that stops the start names all that have it."""
    arm, servos = make()
    servos.voltage[:] = [7.4, 8.5, 8.3, 7.9, 8.4, 7.4]
    arm.connect()
    assert capsys.readouterr().err == (
        "each of shoulder_lift, elbow_flex, wrist_roll gets 8.3 .. 8.5 V, and is made for 4.0 .. 8.0: check the supply "
        "and its plug\n"
    )
    servos.voltage[:] = 12.1
    with pytest.raises(
        HardwareError, match=r"^each of the six servos on simulated gets 12.1 V, .*: unplug the power now;"
    ):
        arm.connect()
    assert capsys.readouterr().err == ""


def test_other_parts_are_warned_of_and_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arm, servos = make()
    arm.connect()
    assert capsys.readouterr().err == ""
    servos.store(1, "Firmware_Minor_Version", 9)
    servos.store(4, "Model_Number", 778)
    arm.connect()
    assert capsys.readouterr().err == (
        "wrist_roll is model 778, not an STS3215 (777): settings may mean other things\n"
        "simulated: firmware differs: 3.10 in id 1, 3, 4, 5, 6; 3.9 in id 2. That works; should replies be lost, "
        "update all with Feetech's FD program\n"
    )


def eprom_writes(sent: list[bytes]) -> list[bytes]:
    return [packet for packet in sent if packet[4] == 3 and packet[5] < 40]


def test_configure_sets_what_outlasts_the_power_and_wears_no_eprom() -> None:
    """Hardware reference B: LeRobot writes 6 x 8 EPROM values at each connect."""
    arm, servos = make()
    servos.store(2, "Phase", 12 | 16)  # multi-turn feedback: its position runs past 4095
    servos.store(3, "Phase", 4)  # speed 0 means stop: it would not move
    arm.connect()
    arm.configure()
    servos.power_cycle()
    bus, ids = arm.bus, range(1, 7)
    for register, value, grippers in [
        ("P_Coefficient", 16, 16), ("I_Coefficient", 0, 0), ("D_Coefficient", 32, 32), ("Return_Delay_Time", 0, 0),
        ("Operating_Mode", 0, 0), ("Phase", 12, 12), ("Max_Torque_Limit", 1000, 500),
        ("Protection_Current", 500, 250), ("Overload_Torque", 80, 25),
    ]:  # fmt: skip
        assert bus.sync_read(register, ids) == {**dict.fromkeys(ids, value), 6: grippers}
    port = arm.bus.port
    assert len(eprom_writes(port.sent)) == 2 * 6 + 2 + 3  # delay and P of six, two phases, three of the gripper
    port.sent.clear()
    arm.connect()
    arm.configure()
    assert eprom_writes(port.sent) == []


def test_torque_comes_on_at_full_strength_and_speed() -> None:
    # A limit of EPROM acts after a power cycle only, and a killed program may have left anything in SRAM.
    arm, servos = make()
    for servo_id in range(1, 7):
        for register, value in (("Torque_Limit", 100), ("Acceleration", 1), ("Goal_Velocity", 5), ("Goal_Time", 900)):
            arm.bus.write(servo_id, register, value)
    arm.configure()
    arm.set_torque(True)
    ids = range(1, 7)
    assert arm.bus.sync_read("Torque_Limit", ids) == {**dict.fromkeys(ids, 1000), 6: 500}
    assert arm.bus.sync_read("Acceleration", ids) == dict.fromkeys(ids, 254)
    assert arm.bus.sync_read("Goal_Velocity", ids) == dict.fromkeys(ids, 0)
    assert arm.bus.sync_read("Goal_Time", ids) == dict.fromkeys(ids, 0)


def test_an_arm_that_holds_is_not_dropped_for_a_setting() -> None:
    arm, servos = make()
    arm.configure()
    arm.set_torque(True)
    arm.configure()  # nothing to write, so nothing to refuse
    servos.store(1, "P_Coefficient", 32)
    servos.store(4, "P_Coefficient", 32)
    arm.bus.port.sent.clear()
    with pytest.raises(SafetyStop, match=r"shoulder_lift, wrist_roll: holding, .* so101.tools.release port=simulated`"):
        arm.configure()
    assert servos.torque_on.all()
    assert not [packet for packet in arm.bus.port.sent if packet[4] == 3]


def test_a_reading_is_in_rad_and_si_units() -> None:
    arm, servos = make()
    arm.configure()
    arm.set_torque(True)
    reading = arm.read()
    assert reading.position == pytest.approx(POSE, abs=8e-4)
    assert reading.voltage == pytest.approx([7.4] * 6)
    assert reading.temperature == pytest.approx([25.0] * 6)
    assert (reading.status == 0).all()
    arm.command(POSE + [0.3, 0, 0, 0, 0, 0.3])
    run(servos, 0.06)
    before = servos.angle.copy()
    run(servos, 0.02)
    moving, speed = arm.read(), (servos.angle - before) / 0.02
    assert moving.velocity[0] == pytest.approx(speed[0], abs=2e-3)
    assert moving.velocity[5] == pytest.approx(speed[5] / (JAW_OPEN - JAW_CLOSED), abs=1e-3)
    assert moving.load[0] > 0.1
    assert moving.current[0] == pytest.approx(2.7 * moving.load[0], rel=0.02)
    assert all(field.shape == (6,) for field in moving)


def test_a_command_is_reached_and_read_back() -> None:
    arm, servos = make()
    arm.configure()
    arm.set_torque(True)
    goal = np.array([-0.5, 0.1, -0.2, 0.9, -1.0, 0.9])
    arm.bus.port.sent.clear()
    arm.command(goal)
    assert len(arm.bus.port.sent) == 1
    assert arm.goals() == pytest.approx(goal, abs=8e-4)
    run(servos, 2)
    assert arm.read().position == pytest.approx(goal, abs=8e-4)


def test_commands_up_to_the_limits_pass_and_beyond_are_refused_by_name() -> None:
    arm, _ = make()
    low, high = arm.limits
    arm.command(low.astype(np.float32))
    arm.command(high + 1e-6)
    assert arm.bus.read(2, "Goal_Position") == 3186
    arm.bus.port.sent.clear()
    for joint, name in enumerate(JOINTS):
        for value in (low[joint] - 0.01, high[joint] + 0.01, math.nan, math.inf):
            position = POSE.copy()
            position[joint] = value
            with pytest.raises(SafetyStop, match=f"{name} commanded at"):
                arm.command(position)
    assert arm.bus.port.sent == []


def test_torque_comes_on_where_the_arm_is() -> None:
    # Goals hold 0 after power-up, and the last program's goal after that: neither may be gone to.
    arm, servos = make()
    servos.step(0.02)
    arm.set_torque(True)
    run(servos, 1)
    assert servos.angle == pytest.approx(ANGLE, abs=8e-4)  # half a tick
    arm.set_torque(False)
    servos.move_by_hand(np.zeros(6))
    run(servos, 0.1)
    arm.set_torque(True)
    run(servos, 1)
    assert servos.angle == pytest.approx(np.zeros(6), abs=8e-4)


def test_a_pose_outside_the_limits_is_refused_before_any_torque() -> None:
    arm, servos = make()
    servos.angle[3] = arm.limits[1][3] + 0.2
    with pytest.raises(SafetyStop, match=r"wrist_flex found at 2\.\d+, range .* by hand"):
        arm.set_torque(True)
    assert not servos.torque_on.any()
    servos.angle[3] = arm.limits[1][3] + 0.03  # leaning on its stop
    arm.set_torque(True)
    assert servos.torque_on.all()


def test_torque_of_some_joints() -> None:
    arm, servos = make()
    arm.set_torque(True)
    arm.set_torque(False, ["gripper", "wrist_roll"])
    assert servos.torque_on.tolist() == [True] * 4 + [False] * 2


def test_a_servo_that_refuses_does_not_keep_the_others_on() -> None:
    arm, servos = make()
    arm.set_torque(True)
    servos._eprom[1][5] = servos._memory[1][5] = 99  # servo 2 is gone
    with pytest.raises(ServoError, match=r"torque may still be on in 1 servos.*servo 2 \(shoulder_lift\)"):
        arm.set_torque(False)
    assert servos.torque_on.tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("do", [Arm.hold, lambda arm: arm.set_torque(False)])
def test_a_port_that_is_gone_is_said_once_and_not_six_times(do: Callable[[Arm], object]) -> None:
    arm, servos = make()
    arm.set_torque(True)
    arm.bus.port.unplug()
    with pytest.raises(ServoError, match="6 servos") as told:
        do(arm)
    assert str(told.value).count("the port failed (simulated: ") == 1
    arm.bus.port.plug_in()
    arm.bus.port.open()
    servos.present[:] = [False] * 6
    with pytest.raises(
        ServoError, match=r"servo 1 \(shoulder_pan\), servo 2 .*, servo 6 \(gripper\): no valid"
    ) as told:
        do(arm)
    assert str(told.value).count("no valid reply") == 1


def test_a_held_joint_pushes_no_further_and_obeys_what_leads_back() -> None:
    """Hardware reference G11: a gripper that holds on at full torque burns its motor."""
    arm, servos = make()
    arm.configure()
    arm.set_torque(True)
    servos.block([1, 5])
    arm.command(POSE + [0, 0.3, 0, 0, 0, -0.35])
    run(servos, 0.5)
    load = arm.read().load
    assert load[5] == pytest.approx(-0.5, abs=0.01)  # all that it may
    assert load[1] == pytest.approx(0.80, abs=0.01)  # 0.3 rad x P 16 x 0.1668
    arm.hold(["shoulder_lift", "gripper"])
    run(servos, 0.1)
    assert arm.goals() == pytest.approx(POSE + [0, 0.05, 0, 0, 0, -0.05], abs=1e-3)
    assert arm.commanded == pytest.approx(arm.goals(), abs=1e-3)
    load = arm.read().load
    assert load[5] == pytest.approx(-0.2, abs=0.01)
    assert load[1] == pytest.approx(0.133, abs=0.01)
    arm.command(POSE + [0.2, 0.25, 0, 0, 0, -0.3])  # they would push on, the others move
    assert arm.goals() == pytest.approx(POSE + [0.2, 0.05, 0, 0, 0, -0.05], abs=1e-3)
    arm.command(POSE + [0.2, 0.25, 0, 0, 0, 0.2])  # the gripper is opened
    assert arm.goals() == pytest.approx(POSE + [0.2, 0.05, 0, 0, 0, 0.2], abs=1e-3)
    assert arm.bus.read(6, "Torque_Limit") == 500
    assert list(arm.held) == ["shoulder_lift"]
    arm.command(POSE)
    assert arm.bus.read(2, "Torque_Limit") == 1000 and not arm.held


def test_a_servo_that_cannot_be_told_to_hold_does_not_keep_the_others_from_it() -> None:
    arm, servos = make()
    arm.configure()
    arm.set_torque(True)
    servos.present[2] = False
    with pytest.raises(ServoError, match=r"1 servos could not be told to hold. servo 3 \(elbow_flex\)"):
        arm.hold()
    assert sorted(arm.held) == sorted(set(JOINTS) - {"elbow_flex"})


def test_a_servo_that_lost_its_power_is_found_limp_after_the_outage() -> None:
    """Field record 31: the line comes back, and one joint of the arm does not hold any more."""
    clock, servos = SimClock(), SimServos()
    servos.angle[:] = ANGLE
    clock.on_substep.append(servos.step)
    port = SimPort(servos)
    arm = Arm(ServoBus(port, names=SIM_CALIBRATION.names, reopen=port.open, clock=clock), SIM_CALIBRATION)
    arm.configure()
    arm.set_torque(True)
    port.unplug()
    servos.after(1.0, port.plug_in)
    assert arm.read().position == pytest.approx(POSE, abs=2e-3)  # the adapter alone was gone: all hold
    assert arm.bus.outages == 1
    servos.power_cycle([3])
    port.unplug()
    servos.after(1.0, port.plug_in)
    with pytest.raises(SafetyStop, match="wrist_flex: limp though it was switched on, so the servo lost"):
        arm.read()
    arm.read()  # told once; closing the arm needs to read on


@pytest.mark.parametrize("joint", range(6))
def test_no_interrupt_leaves_a_part_of_the_arm_stiff(joint: int) -> None:
    """Field record 32 and 34: Ctrl-C between two servos."""
    arm, servos = make()
    arm.configure()
    arm.set_torque(True)

    def interrupting(reply: bytes) -> bytes:
        if reply[2] == joint + 1:
            signal.raise_signal(signal.SIGINT)
        return reply

    arm.bus.port.fault = interrupting
    with pytest.raises(KeyboardInterrupt):
        arm.set_torque(False)
    assert not servos.torque_on.any() and not arm.driven


def test_it_all_works_on_a_bad_line() -> None:
    servos = SimServos()
    servos.angle[:] = ANGLE
    port = SimPort(servos, Faults(np.random.default_rng(0), 0.02), echo=True)
    arm = Arm(ServoBus(port, names=SIM_CALIBRATION.names), SIM_CALIBRATION)
    arm.connect()
    arm.configure()
    arm.set_torque(True)
    for _ in range(200):
        arm.command(POSE)
        run(servos, 0.02)
        assert arm.read().position == pytest.approx(POSE, abs=2e-3)
    assert sum(arm.bus.faults.values()) > 10

"""The arm on simulated servos: what it refuses, what it sets, and that it never jumps."""

import math
from dataclasses import replace

import numpy as np
import pytest

from so101.errors import HardwareError, SafetyStop
from so101.robot.arm import Arm
from so101.robot.bus import ServoBus, ServoError
from so101.robot.calibration import Calibration
from so101.robot.kinematics import JAW_CLOSED, JAW_OPEN
from so101.schema import JOINTS
from so101.sim.servos import SIM_CALIBRATION, Faults, SimPort, SimServos

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


def make(calibration: Calibration = SIM_CALIBRATION) -> tuple[Arm, SimServos]:
    servos = SimServos()
    servos.angle[:] = ANGLE
    return Arm(ServoBus(RecordingPort(servos), names=calibration.names), calibration), servos


def run(servos: SimServos, seconds: float) -> None:
    for _ in range(round(seconds / 0.02)):
        servos.step(0.02)


def changed(joint: str, **values: int) -> Calibration:
    return Calibration({**SIM_CALIBRATION.joints, joint: replace(SIM_CALIBRATION.joints[joint], **values)})


def test_connect_moves_and_writes_nothing() -> None:
    arm, servos = make()
    arm.connect()
    run(servos, 1)
    assert (servos.angle == ANGLE).all()
    assert all(packet[4] in (1, 2) for packet in arm.bus.port.sent)  # PING, READ


def test_another_arm_s_calibration_is_refused_with_both_values() -> None:
    arm, _ = make(changed("elbow_flex", homing_offset=-790))
    with pytest.raises(HardwareError, match="elbow_flex: Homing_Offset is -803 in the servo, -790 in the calib"):
        arm.connect()
    arm, _ = make(changed("wrist_roll", range_max=3900))
    with pytest.raises(HardwareError, match="wrist_roll: Max_Position_Limit is 3895 in the servo, 3900 in the"):
        arm.connect()


def test_all_silent_servos_are_named() -> None:
    # A loose cable behind servo 3: all that follow are gone.
    arm, _ = make()
    arm.bus.port.fault = lambda reply: b"" if reply[2] > 3 else reply
    with pytest.raises(ServoError) as caught:
        arm.connect()
    message = str(caught.value)
    assert message.startswith("3 of 6 servos do not answer; check the power, and the cable before the first")
    assert all(name in message for name in ("wrist_flex", "wrist_roll", "gripper"))
    assert "elbow_flex" not in message


def test_a_servo_that_reports_a_condition_connects() -> None:
    arm, servos = make()
    servos.voltage[:] = 12.0
    arm.connect()
    assert arm.bus.status == dict.fromkeys(range(1, 7), 1)


def test_configure_sets_what_outlasts_the_power_and_writes_it_once() -> None:
    arm, servos = make()
    arm.configure()
    servos.power_cycle()
    bus = arm.bus
    ids = range(1, 7)
    for register, value in [("P_Coefficient", 16), ("I_Coefficient", 0), ("D_Coefficient", 32)]:
        assert bus.sync_read(register, ids) == dict.fromkeys(ids, value)
    assert bus.sync_read("Return_Delay_Time", ids) == dict.fromkeys(ids, 0)
    assert bus.sync_read("Max_Torque_Limit", ids) == {**dict.fromkeys(ids, 1000), 6: 500}

    for servo_id in ids:
        bus.write(servo_id, "Torque_Limit", 100)  # as a program that was killed may have left it
        bus.write(servo_id, "Torque_Enable", 1)
    arm.bus.port.sent.clear()
    arm.configure()
    written = {packet[5] for packet in arm.bus.port.sent if packet[4] == 3}
    assert min(written) > 40  # no EPROM, and no torque switched off under a load
    assert servos.torque_on.all()
    assert bus.sync_read("Torque_Limit", ids) == {**dict.fromkeys(ids, 1000), 6: 500}
    assert bus.sync_read("Acceleration", ids) == dict.fromkeys(ids, 254)


def test_the_gripper_s_limit_holds_without_a_power_cycle() -> None:
    arm, _ = make()
    arm.configure()
    assert arm.bus.read(6, "Torque_Limit") == 500


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

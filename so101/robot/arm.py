"""Arm: six named joints in rad and opening, on a bus. One read and one write a tick.

Refuses, by joint name, whatever does not fit: another arm's calibration, a pose or a command outside the
calibrated ranges.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from so101.errors import HardwareError, SafetyStop
from so101.robot.bus import ServoBus, ServoError
from so101.robot.calibration import Calibration
from so101.schema import JOINTS

COMMAND_TOLERANCE = 1e-4  # rad or opening; under a tenth of a tick, above what float32 loses
POSE_TOLERANCE = 0.05  # rad or opening; a joint resting on its stop reads a little beyond its range

# EPROM settings for every joint, as LeRobot has them: P 16 is half the factory's stiffness.
SETTINGS = {
    "Return_Delay_Time": 0,
    "Operating_Mode": 0,
    "P_Coefficient": 16,
    "I_Coefficient": 0,
    "D_Coefficient": 32,
}
GRIPPER_MAX_TORQUE = 500  # 0.1 %; a gripper that holds on at full torque burns its motor


class Reading(NamedTuple):
    """What the six servos said in one read; each field is (6,), in the order of schema.JOINTS."""

    position: np.ndarray  # rad; the gripper's opening
    velocity: np.ndarray  # rad/s; openings/s. The servo's own estimate
    load: np.ndarray  # fraction of the motor's full PWM, signed
    voltage: np.ndarray  # V
    temperature: np.ndarray  # C
    status: np.ndarray  # int, feetech.STATUS_BITS
    current: np.ndarray  # A


class Arm:
    """The SO-101 behind a bus. Making one sends nothing; `connect` first."""

    def __init__(self, bus: ServoBus, calibration: Calibration) -> None:
        self.bus, self.calibration = bus, calibration
        self._ids = calibration.ids
        self._low, self._high = calibration.limits()

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest position, (6,) each."""
        return self._low, self._high

    def connect(self) -> None:
        """Check that all six servos answer and were calibrated with this calibration. Moves nothing.

        Raises ServoError listing every silent servo, HardwareError listing every setting that differs.
        """
        silent = self._collect(self.bus.ping, JOINTS)
        if silent:
            raise ServoError(
                f"{len(silent)} of {len(JOINTS)} servos do not answer; check the power, and the cable "
                f"before the first of them. " + "; ".join(silent)
            )
        differing = []
        for name in JOINTS:
            joint = self.calibration.joints[name]
            wanted = {
                "Homing_Offset": joint.homing_offset,
                "Min_Position_Limit": joint.range_min,
                "Max_Position_Limit": joint.range_max,
            }
            for register, value in wanted.items():
                stored = self.bus.read(joint.id, register)
                if stored != value:
                    differing.append(f"{name}: {register} is {stored} in the servo, {value} in the calibration")
        if differing:
            raise HardwareError(
                f"this calibration is not the one in the servos: {'; '.join(differing)}. Give the file "
                f"that was made for this arm, or calibrate it again with so101.tools.calibrate"
            )

    def configure(self) -> None:
        """Bring the servos' settings to ours. EPROM is written only where it differs.

        Call it with torque off: a servo whose EPROM has to be written goes limp.
        """
        for name, servo_id in zip(JOINTS, self._ids, strict=True):
            settings = dict(SETTINGS)
            if name == "gripper":
                settings["Max_Torque_Limit"] = GRIPPER_MAX_TORQUE
            for register, value in settings.items():
                self.bus.write_eprom(servo_id, register, value)
            # The servo copies this limit at power-up only, and a program that was killed may have left
            # the working copy lower.
            self.bus.write(servo_id, "Torque_Limit", self.bus.read(servo_id, "Max_Torque_Limit"))
            self.bus.write(servo_id, "Maximum_Acceleration", 254)
            self.bus.write(servo_id, "Acceleration", 254)

    def read(self) -> Reading:
        """Everything the servos measure, in one transaction."""
        servos = self.bus.sync_read_span("Present_Position", "Present_Current", self._ids)

        def column(register: str) -> np.ndarray:
            return np.array([servos[servo_id][register] for servo_id in self._ids])

        return Reading(
            position=self.calibration.to_position(column("Present_Position")),
            velocity=self.calibration.velocity(column("Present_Velocity")),
            load=column("Present_Load") / 1000,
            voltage=column("Present_Voltage") / 10,
            temperature=column("Present_Temperature").astype(float),
            status=column("Status"),
            current=column("Present_Current") * 0.0065,
        )

    def command(self, position: np.ndarray) -> None:
        """Send goals (6,) in one write. SafetyStop for one that is not finite or outside the limits."""
        self._require_inside("commanded", position, COMMAND_TOLERANCE, JOINTS)
        ticks = self.calibration.to_ticks(np.clip(position, self._low, self._high))
        self.bus.sync_write("Goal_Position", dict(zip(self._ids, ticks.tolist(), strict=True)))

    def goals(self) -> np.ndarray:
        """The goals (6,) that the servos hold."""
        goals = self.bus.sync_read("Goal_Position", self._ids)
        return self.calibration.to_position(np.array([goals[servo_id] for servo_id in self._ids]))

    def set_torque(self, on: bool, joints: Sequence[str] = JOINTS) -> None:
        """Switch the torque of `joints`.

        On: each goal is first set to where the joint is, so that nothing jumps; a pose outside the limits
        is refused (SafetyStop) before any joint is switched. Off: every servo is tried, and those that
        failed are reported together at the end (ServoError).
        """
        if on:
            ticks = self.bus.sync_read("Present_Position", self._ids)
            present = self.calibration.to_position(np.array([ticks[servo_id] for servo_id in self._ids]))
            self._require_inside("found", present, POSE_TOLERANCE, joints)
            for name in joints:
                servo_id = self.calibration.joints[name].id
                self.bus.write(servo_id, "Goal_Position", ticks[servo_id])
                self.bus.write(servo_id, "Torque_Enable", 1)
            return
        failed = self._collect(lambda servo_id: self.bus.write(servo_id, "Torque_Enable", 0), joints)
        if failed:
            raise ServoError(
                f"torque may still be on in {len(failed)} servos; support the arm and cut its power. "
                + "; ".join(failed)
            )

    def _collect(self, do: Callable[[int], object], joints: Sequence[str]) -> list[str]:
        """Do it for every joint's servo, whatever happens to the others; the failures' messages."""
        failures = []
        for name in joints:
            try:
                do(self.calibration.joints[name].id)
            except ServoError as error:
                failures.append(str(error))
        return failures

    def _require_inside(self, verb: str, position: np.ndarray, tolerance: float, joints: Sequence[str]) -> None:
        inside = (position >= self._low - tolerance) & (position <= self._high + tolerance)  # NaN: False
        refused = [
            f"{name} {verb} at {value:.3f}, range {low:.3f} .. {high:.3f}"
            for name, value, low, high, ok in zip(JOINTS, position, self._low, self._high, inside, strict=True)
            if name in joints and not ok
        ]
        if refused:
            advice = ". Move it back by hand with torque off, or calibrate again" if verb == "found" else ""
            raise SafetyStop(f"outside the calibrated range (rad, and opening): {'; '.join(refused)}{advice}")

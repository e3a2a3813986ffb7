"""Arm: six named joints in rad and opening, on a bus. One read and one write a tick.

Refuses, by joint name, whatever does not fit: another arm's calibration, a pose or a command outside the
calibrated ranges.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from so101.errors import HardwareError, SafetyStop, tell
from so101.robot.bus import ServoBus, ServoError, together
from so101.robot.calibration import Calibration, explain_differences
from so101.robot.ports import command
from so101.robot.probe import firmware_mix, read_chain, shared_complaints
from so101.schema import ARM_JOINTS, JOINTS
from so101.signals import signals_held

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
# A gripper that holds on at full torque burns its motor: half the torque, 1.6 A, and an overload from 25 % on.
GRIPPER_SETTINGS = {"Max_Torque_Limit": 500, "Protection_Current": 250, "Overload_Torque": 25}
# Bits of Phase: without the first a servo stands still at speed 0, with the second it counts ticks past 4095.
SPEED_0_IS_MAX, MULTI_TURN = 0x08, 0x10
VOLATILE = {"Maximum_Acceleration": 254, "Acceleration": 254, "Goal_Velocity": 0, "Goal_Time": 0}  # 0: the highest

HOLD_PAST = 0.05  # rad or opening that a held joint's goal is past the joint: it pushes on with 13 % of its PWM
HOLD_TORQUE, GRIP_TORQUE = 500, 200  # 0.1 %; an outstretched arm needs 300, and a gripper overloads at 250


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
    """The SO-101 behind a bus. Making one sends nothing; `connect` first.

    `driven` names the joints that were given torque here, `commanded` (6,) are the goals last sent, `held` has
    for each joint that holds the goal that it may not pass, and from which side (+1, -1).
    """

    def __init__(self, bus: ServoBus, calibration: Calibration) -> None:
        self.bus, self.calibration = bus, calibration
        self.driven: set[str] = set()
        self.commanded = np.zeros(6)
        self._ids = calibration.ids
        self._low, self._high = calibration.limits()
        self.held: dict[str, tuple[float, float]] = {}
        self._outages = bus.outages
        # Who looks on, the flight recorder say.
        self.on_read: Callable[[Reading], object] = lambda reading: None
        self.on_command: Callable[[np.ndarray], object] = lambda goals: None

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest position, (6,) each."""
        return self._low, self._high

    def connect(self) -> None:
        """Check that all six servos answer, are well supplied and hold this calibration. Moves nothing.

        What is odd but no danger (another model, mixed firmware, a hot motor) is only told, on stderr. Raises
        HardwareError for a gap in the chain, two motors with one id, a wrong supply and another arm's calibration.
        """
        chain = read_chain(self.bus, self._ids)
        named = {self.bus.names.get(state.id, name): state for name, state in chain.items()}
        if unsupplied := {name: state for name, state in named.items() if not state.supplied}:
            raise HardwareError("; ".join(shared_complaints(unsupplied, self.bus.port.name)))
        for said in shared_complaints(named, self.bus.port.name):
            tell(said)
        if mix := firmware_mix(chain.values()):
            tell(f"{self.bus.port.name}: {mix}")
        if foreign := explain_differences(self.calibration, {state.id: state.stored for state in chain.values()}):
            raise HardwareError(f"{self.bus.port.name}: {foreign}")

    def configure(self) -> None:
        """Bring the servos' settings to ours. EPROM is written only where it differs, and so is not worn.

        A servo goes limp while its EPROM is written, so one that holds and needs it is a SafetyStop, before
        anything was written.
        """
        found, holding = self._eprom(), self.holding()
        changes = []
        for name in JOINTS:
            has = found[self._id(name)]
            wanted = SETTINGS | {"Phase": (has["Phase"] | SPEED_0_IS_MAX) & ~MULTI_TURN}
            if name == "gripper":
                wanted |= GRIPPER_SETTINGS
            changes += [(name, register, value) for register, value in wanted.items() if has[register] != value]
        loaded = [name for name in holding if any(name == changed for changed, _, _ in changes)]
        if loaded:
            raise SafetyStop(
                f"{', '.join(loaded)}: holding, and would fall while their settings are written; support the arm, "
                f"run `{command('release', self.bus.port.name)}`, and start again"
            )
        with signals_held():
            for name, register, value in changes:
                self.bus.write_eprom(self._id(name), register, value)
            for register, value in VOLATILE.items():
                for servo_id, stored in self.bus.sync_read(register, self._ids).items():
                    if stored != value:
                        self.bus.write(servo_id, register, value)

    def read(self) -> Reading:
        """Everything the servos measure, in one transaction.

        After an outage of the line also `require_torque`.
        """
        servos = self.bus.sync_read_span("Present_Position", "Present_Current", self._ids)
        if self._outages != self.bus.outages:
            self._outages = self.bus.outages
            self.require_torque()

        def column(register: str) -> np.ndarray:
            return np.array([servos[servo_id][register] for servo_id in self._ids])

        reading = Reading(
            position=self.calibration.to_position(column("Present_Position")),
            velocity=self.calibration.velocity(column("Present_Velocity")),
            load=column("Present_Load") / 1000,
            voltage=column("Present_Voltage") / 10,
            temperature=column("Present_Temperature").astype(float),
            status=column("Status"),
            current=column("Present_Current") * 0.0065,
        )
        self.on_read(reading)
        return reading

    def require_torque(self) -> None:
        """SafetyStop, naming them, where driven joints are limp: a servo that lost its power comes back so."""
        lost = self.driven - set(self.holding())
        limp = [self.bus.names.get(self._id(name), name) for name in JOINTS if name in lost]
        if limp:
            raise SafetyStop(
                f"{', '.join(limp)}: limp though it was switched on, so the servo lost its power for a moment; "
                f"support the arm, and look for a loose cable or a weak supply"
            )

    def command(self, position: np.ndarray) -> None:
        """Send goals (6,) in one write. SafetyStop for one that is not finite or outside the limits.

        A held joint stays where it is until its goal leads back; then it gets its full torque again.
        """
        self._require_inside("commanded", position, COMMAND_TOLERANCE, JOINTS)
        goals = np.clip(position, self._low, self._high)
        freed = []
        for name, (end, push) in self.held.items():
            joint = JOINTS.index(name)
            if (goals[joint] - end) * push > 0:
                goals[joint] = end
            else:
                freed.append(name)
        ticks = self.calibration.to_ticks(goals)
        self.bus.sync_write("Goal_Position", dict(zip(self._ids, ticks.tolist(), strict=True)))
        self.commanded = goals
        self.on_command(goals)
        for name in freed:
            self._set_torque_limit(name, self.bus.read(self._id(name), "Max_Torque_Limit"))
            del self.held[name]

    def hold(self, joints: Sequence[str] = JOINTS) -> None:
        """Let joints push no further: their goals come back to just past where they are, at reduced torque.

        Every servo is tried, and those that failed are reported together at the end (ServoError).
        """
        failed = self._collect(self._hold, [name for name in joints if name not in self.held])
        if failed:
            raise ServoError(f"{len(failed)} servos could not be told to hold. " + together(failed))

    def spare(self, name: str, weak: bool) -> None:
        """Let a joint go on with the torque of a hold, or with all of it again."""
        hold = GRIP_TORQUE if name == "gripper" else HOLD_TORQUE
        self._set_torque_limit(name, hold if weak else self.bus.read(self._id(name), "Max_Torque_Limit"))

    def lean(self, name: str, goal: float) -> None:
        """Send a held joint another goal (rad), at the reduced torque that it holds with."""
        joint = JOINTS.index(name)
        goals = self.commanded.copy()
        goals[joint] = np.clip(goal, self._low[joint], self._high[joint])
        self.bus.write(self._id(name), "Goal_Position", int(self.calibration.to_ticks(goals)[joint]))
        self.commanded = goals
        self.on_command(goals)

    def loosen(self) -> None:
        """Joints of the arm that hold may be commanded again: from where they are now, at their reduced torque."""
        self.held = {name: held for name, held in self.held.items() if name not in ARM_JOINTS}
        self.hold(ARM_JOINTS)
        for name in ARM_JOINTS:
            del self.held[name]

    def goals(self) -> np.ndarray:
        """The goals (6,) that the servos hold."""
        goals = self.bus.sync_read("Goal_Position", self._ids)
        return self.calibration.to_position(np.array([goals[servo_id] for servo_id in self._ids]))

    def holding(self) -> list[str]:
        """The joints whose servos have torque, whoever gave it."""
        torque = self.bus.sync_read("Torque_Enable", self._ids)
        return [name for name in JOINTS if torque[self._id(name)]]

    def set_torque(self, on: bool, joints: Sequence[str] = JOINTS) -> None:
        """Switch the torque of `joints`; a Ctrl-C waits until all of them are switched.

        On: each goal is first set to where the joint is, so that nothing jumps, then the torque is unlimited
        as far as EPROM allows; a pose outside the limits is refused (SafetyStop) before any joint is switched.
        Off: every servo is tried, and those that failed are reported together at the end (ServoError).
        """
        with signals_held():
            if on:
                self._drive(joints)
                return
            failed = self._collect(self._release, joints)
        if failed:
            raise ServoError(
                f"torque may still be on in {len(failed)} servos; support the arm and cut its power. "
                + together(failed)
            )

    def _id(self, name: str) -> int:
        return self.calibration.joints[name].id

    def _eprom(self) -> dict[int, dict[str, int]]:
        """What the servos store, {servo id: {register: value}}, in one transaction."""
        return self.bus.sync_read_span("Firmware_Major_Version", "Overload_Torque", self._ids)

    def _drive(self, joints: Sequence[str]) -> None:
        ticks = self.bus.sync_read("Present_Position", self._ids)
        present = self.calibration.to_position(np.array([ticks[servo_id] for servo_id in self._ids]))
        self._require_inside("found", present, POSE_TOLERANCE, joints)
        # The servo copies its limit from EPROM at power-up only, and a hold may have left the copy lower.
        full = self.bus.sync_read("Max_Torque_Limit", self._ids)
        for name in joints:
            servo_id, joint = self._id(name), JOINTS.index(name)
            self.bus.write(servo_id, "Goal_Position", ticks[servo_id])
            self._set_torque_limit(name, full[servo_id])
            self.bus.write(servo_id, "Torque_Enable", 1)
            self.commanded[joint] = present[joint]
            self.held.pop(name, None)
            self.driven.add(name)

    def _release(self, name: str) -> None:
        self.bus.write(self._id(name), "Torque_Enable", 0)
        self.driven.discard(name)

    def _hold(self, name: str) -> None:
        servo_id, joint = self._id(name), JOINTS.index(name)
        present_ticks = self.bus.read(servo_id, "Present_Position")
        present = self.calibration.to_position(np.full(6, present_ticks))[joint]
        past = np.clip(self.commanded[joint] - present, -HOLD_PAST, HOLD_PAST)
        self._set_torque_limit(name, GRIP_TORQUE if name == "gripper" else HOLD_TORQUE)
        self.lean(name, present + past)
        self.held[name] = (float(self.commanded[joint]), float(np.sign(past)))

    def _set_torque_limit(self, name: str, permille: int) -> None:
        self.bus.write(self._id(name), "Torque_Limit", permille)

    def _collect(self, do: Callable[[str], object], joints: Sequence[str]) -> list[str]:
        """Do it for every joint, whatever happens to the others; the failures' messages. A bug is raised at the end."""
        failures: list[str] = []
        bug: Exception | None = None
        for name in joints:
            try:
                do(name)
            except ServoError as error:
                failures.append(str(error))
            except Exception as error:
                bug = error
        if bug is not None:
            raise bug
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

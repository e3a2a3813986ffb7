"""Six STS3215 servos and the serial port in front of them, byte for byte.

`SimPort` stands where `serial.Serial` would: everything above it is the code that drives the real arm.
The motion is first order with a speed limit (the step response that BAM's identified model of this servo
gives at P 16 and 7.4 V), with the sag of a controller that has no integral part. Acceleration, Goal_Time,
D and I are stored but do not shape it. What can go wrong with the line or a servo is in sim/script.py.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import numpy as np

from so101.robot import feetech
from so101.robot.arm import MULTI_TURN
from so101.robot.calibration import Calibration, JointCalibration
from so101.robot.feetech import BROADCAST_ID, REGISTERS, TICKS_PER_TURN, decode_value, encode_value
from so101.robot.kinematics import JAW_CLOSED, JAW_OPEN
from so101.schema import JOINTS

# The jaw's angle is linear in the gripper's opening, 0 .. 1.

TIME_CONSTANT = 0.09  # s
MAX_SPEED = 4.5  # rad/s
DUTY_PER_RAD = 0.1668  # PWM fraction per rad of error and unit of P_Coefficient (BAM, STS3215)
MAX_DUTY = 0.97
STIFFNESS_PER_P = 9.4 / 16  # Nm/rad per unit of P_Coefficient, at 7.4 V
STALL_CURRENT = 2.7  # A, at full PWM
AMBIENT = 25.0  # C
HEATING, COOLING = 0.2, 1 / 600  # C/s at full PWM squared; 1/s. Half PWM for good ends 30 C above ambient

# Ranges of about +-107, 105.5, 98.5, 103 and 160 degrees. As on a real arm, no offset is zero, and no
# joint's zero is the middle of its range or tick 2047: who confuses them is off by degrees.
SIM_CALIBRATION = Calibration(
    {
        "shoulder_pan": JointCalibration(1, 0, -412, 850, 3280, 2071.0),
        "shoulder_lift": JointCalibration(2, 0, 655, 792, 3186, 1996.0),
        "elbow_flex": JointCalibration(3, 0, -803, 975, 3217, 2105.0),
        "wrist_flex": JointCalibration(4, 0, 733, 853, 3199, 2018.0),
        "wrist_roll": JointCalibration(5, 0, -61, 252, 3895, 2084.0),
        "gripper": JointCalibration(6, 0, -290, 1420, 2671, 2045.5),
    }
)

FACTORY = {
    "Firmware_Major_Version": 3,
    "Firmware_Minor_Version": 10,
    "Model_Number": feetech.MODEL_STS3215,
    "Return_Delay_Time": 250,
    "Response_Status_Level": 1,
    "Max_Temperature_Limit": 70,
    "Max_Voltage_Limit": 80,
    "Min_Voltage_Limit": 40,
    "Max_Torque_Limit": 1000,
    "Phase": 12,
    "Unloading_Condition": 44,
    "LED_Alarm_Condition": 47,
    "P_Coefficient": 32,
    "D_Coefficient": 32,
    "Minimum_Startup_Force": 16,
    "CW_Dead_Zone": 1,
    "CCW_Dead_Zone": 1,
    "Protection_Current": 500,
    "Angular_Resolution": 1,
    "Protective_Torque": 20,
    "Protection_Time": 200,
    "Overload_Torque": 80,
    "Over_Current_Protection_Time": 200,
}
MEMORY_SIZE = 256
EPROM_SIZE = 40
OVERLOAD = 32  # the bit in feetech.STATUS_BITS
BAUDS = (1_000_000, 500_000, 250_000, 128_000, 115_200, 76_800, 57_600, 38_400)  # by Baud_Rate code
WRITABLE = {entry.address + byte for entry in REGISTERS.values() if not entry.read_only for byte in range(entry.size)}


class SimServos:
    """The six servos of one arm: their memory, their shafts, and what the world does to them.

    For the world: `angle` (6,) rad is where the joints are (the gripper's entry is the jaw's angle,
    JAW_CLOSED .. JAW_OPEN), and may be corrected after a step (a jaw that met a cube), which then shows
    as position error and load; `load_torque` (6,) Nm is what pulls on each joint; `torque_on` (6,) tells
    which are driven. `voltage` (6,) V and `condition` (6,) bits of feetech.STATUS_BITS can be set too, and
    `present`, which servos are on the line. `now` is the s that `step` has let pass, `ordered_at` what it was
    when a goal was last written.

    `factory` makes servos as they come in the box: all with id 1, no homing offset, limits 0 .. 4095.
    A load above Overload_Torque for Protection_Time latches an overload: Protective_Torque is all that the
    servo gives until its torque is switched off and on (no document says what clears it; this is the
    cautious reading).
    """

    def __init__(self, calibration: Calibration = SIM_CALIBRATION, factory: bool = False) -> None:
        joints = [calibration.joints[name] for name in JOINTS]
        self.angle = np.zeros(6)
        self.load_torque = np.zeros(6)
        self.torque_on = np.zeros(6, dtype=bool)
        self.voltage = np.full(6, 7.4)
        self.condition = np.zeros(6, dtype=int)
        self.temperature = np.full(6, AMBIENT)
        # How each servo is built into the arm: the encoder tick at angle 0, and rad per tick. Unlike
        # homing offsets this is metal, and no register changes it.
        self._rad_per_tick = np.array([2 * math.pi / TICKS_PER_TURN * (1 - 2 * j.drive_mode) for j in joints])
        self._encoder_at_zero = np.array([joint.zero_ticks + joint.homing_offset for joint in joints])
        jaw = joints[5]
        closed_ticks, open_ticks = (jaw.range_min, jaw.range_max)[:: 1 - 2 * jaw.drive_mode]
        self._rad_per_tick[5] = (JAW_OPEN - JAW_CLOSED) / (open_ticks - closed_ticks)
        self._encoder_at_zero[5] = closed_ticks + jaw.homing_offset - JAW_CLOSED / self._rad_per_tick[5]
        ends = np.array([[joint.range_min, joint.range_max] for joint in joints]).T
        offsets = np.array([joint.homing_offset for joint in joints])
        stops = (ends + offsets - self._encoder_at_zero) * self._rad_per_tick
        self._stops = self._stop_low, self._stop_high = stops.min(axis=0), stops.max(axis=0)

        self.now = self.ordered_at = 0.0
        self.present = [True] * 6
        self._agenda: list[tuple[float, int, Callable[[], object]]] = []  # a heap
        self._order = count()  # of what falls due at the same time
        self._latched: set[int] = set()  # overloaded
        self._strained, self._straining = np.zeros(6), False  # s that the load has been above Overload_Torque
        self._overload_duty, self._protection_time = np.ones(6), np.ones(6)
        self._goal, self._delayed_goal = np.zeros(6), np.zeros(6)  # rad, within the position limits
        self._delayed_torque = np.zeros(6, dtype=bool)
        self._goal_speed = np.zeros(6)  # rad/s
        self._offset = np.zeros(6)  # ticks
        self._p_gain = np.zeros(6)
        self._stiffness = np.zeros(6)  # Nm/rad
        self._max_duty = np.zeros(6)
        self._before, self._dt = self.angle.copy(), 1.0  # at the start of the last step, and its length
        self._eprom = [self._factory_eprom(None if factory else joint) for joint in joints]
        self._memory = [bytearray(MEMORY_SIZE) for _ in JOINTS]
        self._pending: list[tuple[int, bytes] | None] = [None] * 6  # what REG WRITE left for ACTION
        self.power_cycle()

    @staticmethod
    def _factory_eprom(joint: JointCalibration | None) -> bytearray:
        eprom = bytearray(EPROM_SIZE)
        own = (
            {"ID": 1, "Max_Position_Limit": TICKS_PER_TURN - 1}
            if joint is None
            else {
                "ID": joint.id,
                "Homing_Offset": joint.homing_offset,
                "Min_Position_Limit": joint.range_min,
                "Max_Position_Limit": joint.range_max,
            }
        )
        for name, value in {**FACTORY, **own}.items():
            address = REGISTERS[name].address
            eprom[address : address + REGISTERS[name].size] = encode_value(name, value)
        return eprom

    def power_cycle(self, indices: Iterable[int] = range(6)) -> None:
        """Switch the supply off and on: only what EPROM keeps survives, and the torque is off."""
        for index in indices:
            memory = self._memory[index] = bytearray(MEMORY_SIZE)
            memory[:EPROM_SIZE] = self._eprom[index]
            torque_limit, lock = REGISTERS["Torque_Limit"].address, REGISTERS["Lock"].address
            memory[torque_limit : torque_limit + 2] = memory[16:18]
            memory[lock] = 1
            memory[REGISTERS["Maximum_Acceleration"].address] = 254
            self._pending[index] = None
            self._latched.discard(index)
            self._apply(index)
            self._delayed_goal[index], self._delayed_torque[index] = self._goal[index], False
            self._before[index] = self.angle[index]

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        """Call `do` in the step that completes `seconds` from now."""
        heapq.heappush(self._agenda, (self.now + seconds - 1e-9, next(self._order), do))  # now is a sum of dt

    def step(self, dt: float) -> None:
        """Let `dt` seconds pass. Orders take effect one step after they came."""
        self.now += dt
        while self._agenda and self._agenda[0][0] <= self.now:
            heapq.heappop(self._agenda)[2]()
        driven = self.torque_on & self._delayed_torque
        goal = self._within_protective_reach(self._delayed_goal) if self._latched else self._delayed_goal
        aim = goal + self.load_torque / self._stiffness
        farthest = self._goal_speed * dt
        motion = (aim - self.angle) * (1 - math.exp(-dt / TIME_CONSTANT))
        motion = np.minimum(np.maximum(motion, -farthest), farthest)
        self._before[:], self._dt = self.angle, dt
        # Without torque the gears' friction holds a joint where it is, until a hand moves it.
        np.copyto(self.angle, self._within_stops(self.angle + motion), where=driven)
        duty = self._duty()
        self.temperature += dt * (HEATING * duty * duty - COOLING * (self.temperature - AMBIENT))
        if self._straining or duty.dot(duty) > self._overload_squared:  # cheap, and false in ordinary motion
            self._strain(duty, dt)
        self._delayed_goal[:], self._delayed_torque[:] = self._goal, self.torque_on

    def move_by_hand(self, angle: np.ndarray) -> None:
        """Put the joints without torque at `angle` (6,) rad, as far as their stops let them."""
        np.copyto(self.angle, self._within_stops(angle), where=~self.torque_on)

    def overload(self, index: int) -> None:
        """Latch an overload in servo `index`."""
        self._latched.add(index)
        self._apply(index)

    def block(self, indices: Sequence[int]) -> None:
        """Something holds these joints (and no others) where they are."""
        self._stop_low, self._stop_high = (stops.copy() for stops in self._stops)
        self._stop_low[indices] = self._stop_high[indices] = self.angle[indices]

    def store(self, index: int, register: str, value: int) -> None:
        """Servo `index` holds another value of any register, EPROM or read-only ones too: another's setting."""
        entry, data = REGISTERS[register], encode_value(register, value)
        self._memory[index][entry.address : entry.address + entry.size] = data
        if entry.eprom:
            self._eprom[index][entry.address : entry.address + entry.size] = data
        self._apply(index)

    def listening(self, baudrate: int) -> dict[int, list[int]]:
        """The servos (0..5) that understand `baudrate`, by the id that they answer to."""
        servos: dict[int, list[int]] = {}
        for index, memory in enumerate(self._memory):
            code = memory[6]
            if self.present[index] and code < len(BAUDS) and BAUDS[code] == baudrate:
                servos.setdefault(memory[5], []).append(index)
        return servos

    def id_of(self, index: int) -> int:
        """The id that servo `index` answers to."""
        return self._memory[index][REGISTERS["ID"].address]

    def read_memory(self, index: int, address: int, size: int) -> bytes:
        """Bytes of servo `index` (0..5), measurements as of now."""
        self._measure(index)
        return bytes(self._memory[index][address : address + size])

    def write_memory(self, index: int, address: int, data: bytes) -> None:
        """Write into servo `index`. Read-only bytes stay; locked EPROM changes until the power goes."""
        memory = self._memory[index]
        unlocked = memory[REGISTERS["Lock"].address] == 0
        if address <= REGISTERS["Goal_Position"].address < address + len(data):
            self.ordered_at = self.now
        for at, byte in enumerate(data, start=address):
            if at in WRITABLE:
                memory[at] = byte
                if at < EPROM_SIZE and unlocked:
                    self._eprom[index][at] = byte
        self._apply(index)

    def hold_back(self, index: int, address: int, data: bytes) -> None:
        """Keep a REG WRITE for `release`."""
        self._pending[index] = (address, data)

    def release(self, index: int) -> None:
        """ACTION: do what was held back, if anything was."""
        if (held := self._pending[index]) is not None:
            self.write_memory(index, *held)
        self._pending[index] = None

    def error_byte(self, index: int) -> int:
        """The conditions of servo `index`, as its replies report them."""
        memory = self._memory[index]
        bits = int(self.condition[index])
        if not memory[15] <= round(self.voltage[index] * 10) <= memory[14]:
            bits |= 1
        if index in self._latched:
            bits |= OVERLOAD
        return bits | 4 if self.temperature[index] > memory[13] else bits

    def _strain(self, duty: np.ndarray, dt: float) -> None:
        """Count how long each servo's load has been above its Overload_Torque, and latch where it was too long."""
        self._strained = np.where(np.abs(duty) > self._overload_duty, self._strained + dt, 0.0)
        self._straining = bool(self._strained.any())
        too_long = (self._strained > 0) & (self._strained >= self._protection_time - 1e-9)
        for index in np.flatnonzero(too_long).tolist():
            self.overload(index)

    def _within_protective_reach(self, goal: np.ndarray) -> np.ndarray:
        """The goals (6,), those of overloaded servos so near that they cannot push harder than they may."""
        reach = np.full(6, np.inf)
        for index in self._latched:
            reach[index] = self._max_duty[index] / (DUTY_PER_RAD * self._p_gain[index])
        return np.minimum(np.maximum(goal, self.angle - reach), self.angle + reach)

    def _within_stops(self, angle: np.ndarray) -> np.ndarray:
        return np.minimum(np.maximum(angle, self._stop_low), self._stop_high)

    def _duty(self) -> np.ndarray:
        """PWM fraction (6,), signed like the angle's error."""
        duty = DUTY_PER_RAD * self._p_gain * (self._delayed_goal - self.angle)
        return np.minimum(np.maximum(duty, -self._max_duty), self._max_duty) * self.torque_on

    def _get(self, index: int, name: str) -> int:
        entry = REGISTERS[name]
        return decode_value(name, self._memory[index][entry.address : entry.address + entry.size])

    def _put(self, index: int, name: str, value: int) -> None:
        entry = REGISTERS[name]
        self._memory[index][entry.address : entry.address + entry.size] = encode_value(name, value)

    def _apply(self, index: int) -> None:
        """Turn the registers of servo `index` into what `step` works with."""
        low, high = self._get(index, "Min_Position_Limit"), self._get(index, "Max_Position_Limit")
        goal = self._get(index, "Goal_Position")
        if low or high:
            goal = min(max(goal, low), high)
        rad_per_tick = float(self._rad_per_tick[index])
        self._offset[index] = offset = self._get(index, "Homing_Offset")
        at_zero = float(self._encoder_at_zero[index])
        turns = (round(float(self.angle[index]) / rad_per_tick + at_zero) - offset) // TICKS_PER_TURN
        self._goal[index] = (goal + offset + TICKS_PER_TURN * turns - at_zero) * rad_per_tick
        speed = abs(self._get(index, "Goal_Velocity") * rad_per_tick)
        self._goal_speed[index] = min(speed, MAX_SPEED) if speed else MAX_SPEED
        memory = self._memory[index]  # below, one byte each
        self._p_gain[index] = gain = max(1, memory[21])
        self._stiffness[index] = STIFFNESS_PER_P * gain
        torque_on = memory[40] == 1
        if torque_on and not self.torque_on[index]:
            self._latched.discard(index)
        self.torque_on[index] = torque_on
        protective = memory[34] / 100 if index in self._latched else MAX_DUTY
        self._max_duty[index] = min(MAX_DUTY, self._get(index, "Torque_Limit") / 1000, protective)
        self._overload_duty[index], self._protection_time[index] = memory[36] / 100, memory[35] / 100
        self._overload_squared = min(self._overload_duty.tolist()) ** 2

    def _measure(self, index: int) -> None:
        """Bring the measured registers of servo `index` up to date."""
        angle, rad_per_tick = float(self.angle[index]), float(self._rad_per_tick[index])
        encoder = round(angle / rad_per_tick + float(self._encoder_at_zero[index])) % TICKS_PER_TURN
        speed = (angle - float(self._before[index])) / rad_per_tick / self._dt
        duty = 0.0
        if self.torque_on[index]:
            limit = float(self._max_duty[index])
            error = (float(self._delayed_goal[index]) - angle) * math.copysign(1.0, rad_per_tick)
            duty = min(max(DUTY_PER_RAD * float(self._p_gain[index]) * error, -limit), limit)
        memory = self._memory[index]
        position = encoder - int(self._offset[index])
        multi_turn = memory[REGISTERS["Phase"].address] & MULTI_TURN
        self._put(index, "Present_Position", position if multi_turn else position % TICKS_PER_TURN)
        fastest = 32767  # all that the register holds; a hand in a simulation has no inertia
        self._put(index, "Present_Velocity", min(max(round(speed), -fastest), fastest))
        self._put(index, "Present_Load", round(duty * 1000))
        memory[62] = round(float(self.voltage[index]) * 10)
        memory[63] = round(float(self.temperature[index]))
        memory[65] = self.error_byte(index)
        memory[66] = abs(speed) > 1
        memory[67:69] = memory[42:44]  # the goal once more
        self._put(index, "Present_Current", round(abs(duty) * STALL_CURRENT / 0.0065))


class SimPort:
    """A serial port with `servos` on its other end; has what pyserial's Serial has, as far as a bus goes.

    Replies are there at once, and reads never wait: simulated time does not pass while bytes travel.
    `fault` turns each reply into what is delivered (see `Faults`); `echo` is an adapter on one data wire,
    which hears its own bytes. Servos set to another baud than `baudrate` hear noise, and stay silent.
    `delay` (s) is for who serves the port in real time: how long the replies are to be kept back.
    """

    name = "simulated"

    def __init__(self, servos: SimServos, fault: Callable[[bytes], bytes] | None = None, echo: bool = False) -> None:
        self.servos, self.fault, self.echo = servos, fault, echo
        self.timeout, self.delay, self.baudrate = 0.0, 0.0, BAUDS[0]
        self.plugged = True
        self._received = b""  # by the servos
        self._answered = bytearray()
        self._open = True

    @property
    def in_waiting(self) -> int:
        """How many bytes can be read."""
        self._require_open()
        return len(self._answered)

    def write(self, data: bytes) -> int:
        """Give bytes to the servos; an instruction may come in pieces."""
        self._require_open()
        if self.echo:
            self._answered += data
        self._received += data
        packet, end = feetech.find_instruction(self._received)
        while packet is not None:
            for reply in filter(None, self._obey(packet)):
                self._answered += reply if self.fault is None else self.fault(reply)
            self._received = self._received[end:]
            packet, end = feetech.find_instruction(self._received)
        self._received = self._received[end:]
        return len(data)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer when fewer are there."""
        self._require_open()
        data = bytes(self._answered[:size])
        del self._answered[:size]
        return data

    def reset_input_buffer(self) -> None:
        """Forget what was not read."""
        self._answered.clear()

    def close(self) -> None:
        """From here on everything but `open` raises OSError."""
        self._open = False

    def open(self) -> "SimPort":
        """This port with nothing in its buffers, for a bus's `reopen`. OSError while it is unplugged."""
        if not self.plugged:
            raise OSError("no such port")
        self._received, self._open = b"", True
        self._answered.clear()
        return self

    def unplug(self) -> None:
        """The adapter leaves the computer; the servos keep their power."""
        self.plugged = self._open = False

    def plug_in(self) -> None:
        """The adapter comes back; who had it open has to open it again."""
        self.plugged = True

    def _require_open(self) -> None:
        if not self._open:
            raise OSError("the port is closed" if self.plugged else "Input/output error")

    def _obey(self, packet: feetech.Packet) -> list[bytes]:
        """The replies, in the order in which servos send them. An id that nobody has stays silent."""
        servos, (servo_id, code, params) = self.servos, packet
        listening = servos.listening(self.baudrate)
        if code == feetech.SYNC_READ and len(params) >= 2:
            what = params[:2]
            return [self._obey_all(listening[each], feetech.READ, what) for each in params[2:] if each in listening]
        if code == feetech.SYNC_WRITE and len(params) >= 2:
            stride = 1 + params[1]
            for at in range(2, len(params) - params[1], stride):
                for index in listening.get(params[at], ()):
                    servos.write_memory(index, params[0], params[at + 1 : at + stride])
            return []
        if servo_id == BROADCAST_ID:
            replies = [self._obey_all(indices, code, params) for _, indices in sorted(listening.items())]
            # Nobody answers a broadcast but a PING, which each id answers in its turn.
            return replies if code == feetech.PING else []
        return [self._obey_all(listening[servo_id], code, params)] if servo_id in listening else []

    def _obey_all(self, indices: Sequence[int], code: int, params: bytes) -> bytes:
        """What the servos of one id answer: all at once, so that two of them garble each other."""
        first, *others = sorted(indices, key=self._return_delay) if len(indices) > 1 else indices
        heard = self._obey_one(first, code, params)
        for nth, index in enumerate(others, start=1):
            reply = self._obey_one(index, code, params)
            late = nth + (self._return_delay(index) - self._return_delay(first)) // 5  # bytes of 10 us
            if late >= len(heard):
                heard += reply
                continue
            length = max(len(heard), late + len(reply))
            low_wins = zip(heard.ljust(length, b"\xff"), (b"\xff" * late + reply).ljust(length, b"\xff"), strict=True)
            heard = bytes(a & b for a, b in low_wins)
        return heard

    def _return_delay(self, index: int) -> int:
        return self.servos.read_memory(index, REGISTERS["Return_Delay_Time"].address, 1)[0]

    def _obey_one(self, index: int, code: int, params: bytes) -> bytes:
        """Let servo `index` do it; its reply, empty where it gives none."""
        servos = self.servos
        if code == feetech.READ and len(params) == 2:
            return self._reply(index, servos.read_memory(index, params[0], params[1]))
        if code == feetech.WRITE and params:
            servos.write_memory(index, params[0], params[1:])
        elif code == feetech.REG_WRITE and params:
            servos.hold_back(index, params[0], params[1:])
        elif code == feetech.ACTION:
            servos.release(index)
        quiet = servos.read_memory(index, REGISTERS["Response_Status_Level"].address, 1) == b"\x00"
        return b"" if quiet and code != feetech.PING else self._reply(index, b"")

    def _reply(self, index: int, params: bytes) -> bytes:
        return feetech.status_packet(self.servos.id_of(index), self.servos.error_byte(index), params)


FAULTS = ("drop", "truncate", "corrupt", "late", "noise", "echo", "garbage")


class Faults:
    """A bad line: of all replies a fraction `rate` is hit, by one of `kinds` at random.

    drop: nothing comes. truncate: the end is missing. corrupt: one bit is flipped. late: it comes in front
    of the next reply. noise: up to eight bytes precede it. echo: it comes twice. garbage: as many random bytes.
    """

    def __init__(self, rng: np.random.Generator, rate: float, kinds: Sequence[str] = FAULTS) -> None:
        self.rng, self.rate, self.kinds = rng, rate, list(kinds)
        self._late = b""

    def __call__(self, reply: bytes) -> bytes:
        """What is delivered instead of `reply`."""
        kind = self.rng.choice(self.kinds) if self.rng.random() < self.rate else "none"
        if kind == "late":
            self._late += reply
            return b""
        before, self._late = self._late, b""
        if kind == "drop":
            reply = b""
        elif kind == "truncate":
            reply = reply[: self.rng.integers(len(reply))]
        elif kind == "corrupt":
            damaged = bytearray(reply)
            damaged[self.rng.integers(len(reply))] ^= 1 << int(self.rng.integers(8))
            reply = bytes(damaged)
        elif kind == "noise":
            reply = self.rng.bytes(int(self.rng.integers(1, 9))) + reply
        elif kind == "echo":
            reply += reply
        elif kind == "garbage":
            reply = self.rng.bytes(len(reply))
        return before + reply

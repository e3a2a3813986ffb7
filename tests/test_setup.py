"""Motors out of the box, set up by the real tool as a person drives it, plugging motors and pressing Enter."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from so101.errors import HardwareError
from so101.robot.bus import ServoBus
from so101.robot.feetech import status_packet
from so101.schema import JOINTS
from so101.sim.servos import SimPort, SimServos
from so101.tools.setup import _only_motor, _to_full_speed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no pseudo-terminals")

COLLISION = (
    "replies collide: two motors have the same id, a cable is damaged, or this is another device's port. Leave one "
    "motor connected, and give each its id with python -m so101.tools.setup port="
)


class Person:
    """Reads what the tool says, plugs in what it asks for (or something else), and presses Enter."""

    def __init__(self, live_arm, *words: str) -> None:
        self.servos = live_arm.servos
        self.process = subprocess.Popen(
            [sys.executable, "-m", "so101.tools.setup", f"port={live_arm.path}", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._too_late = threading.Timer(30, self.process.kill)
        self._too_late.start()

    def listen(self) -> list[str]:
        """What is said up to the next request, which is the last line."""
        lines = []
        for line in self.process.stdout:
            lines.append(line.rstrip("\n"))
            if lines[-1].startswith("Connect "):
                break
        return [line for line in lines if line]

    def plug(self, *joints: str) -> None:
        """Connect these motors, and no others, and press Enter."""
        connected = [name in joints for name in JOINTS]
        self.servos.power_cycle(i for i, here in enumerate(connected) if here and not self.servos.present[i])
        self.servos.present[:] = connected
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def leave(self) -> tuple[int, str]:
        """Close the terminal; exit code and stderr."""
        self.process.stdin.close()
        error = self.process.stderr.read()
        return self.process.wait(), error

    def close(self) -> None:
        self._too_late.cancel()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()


@pytest.fixture
def person(live_arm, request) -> Iterator[Person]:
    """In front of an arm of factory motors, none of them connected; with the words of the command line."""
    for index in range(6):
        live_arm.servos.store(index, "ID", 1)
        live_arm.servos.store(index, "Homing_Offset", 0)
        live_arm.servos.present[index] = False
    person = Person(live_arm, *getattr(request, "param", ()))
    yield person
    person.close()


def ids(servos) -> list[int]:
    """What the servos hold when they have lost their power: what was really stored."""
    servos.power_cycle()
    return [servos.id_of(index) for index in range(6)]


@pytest.mark.parametrize("person", [["arm=leader"]], indirect=True)
def test_from_a_box_of_motors_to_a_chain(person, live_arm) -> None:
    """One motor has another speed, one other firmware, one another model, one a 12 V supply: told, not refused."""
    servos = person.servos
    servos.store(JOINTS.index("elbow_flex"), "Baud_Rate", 1)
    servos.store(JOINTS.index("gripper"), "Firmware_Minor_Version", 9)
    servos.store(JOINTS.index("wrist_roll"), "Model_Number", 778)
    servos.voltage[JOINTS.index("shoulder_lift")] = 12.1
    said = person.listen()
    gears = {}
    while "Connect only" in said[-1]:
        joint, gear = said[-1].removeprefix("Connect only the motor for the leader's ").split(" (gear ")
        gears[joint] = gear.split(")")[0]
        person.plug(joint)
        answer = person.listen()
        said += answer
    assert gears == {
        "gripper": "1/147", "wrist_roll": "1/147", "wrist_flex": "1/147",
        "elbow_flex": "1/191", "shoulder_lift": "1/345", "shoulder_pan": "1/191",
    }  # fmt: skip
    person.plug(*JOINTS)
    said += person.listen()
    code, error = person.leave()
    assert (code, error) == (0, "")
    state = "model 777, firmware 3.10, 7.4 V, 25 C, torque off"
    assert f"wrist_flex: id 1, {state}, at 1000000 baud; now id 4 at 1000000 baud" in said
    assert f"elbow_flex: id 1, {state}, at 500000 baud; now id 3 at 1000000 baud" in said
    assert f"shoulder_pan: id 1, {state}; left as it is" in said
    too_much = (
        "gets 12.1 V, and is made for 4.0 .. 8.0: unplug the power now; 7.4 V motors take a 5 V supply, only the "
        "12 V kind takes 12"
    )
    assert f"warning: this motor {too_much}" in said
    assert f"warning: shoulder_lift {too_much}" in said
    assert "warning: this motor is model 778, not an STS3215 (777): settings may mean other things" in said
    assert (
        "warning: firmware differs: 3.10 in id 1, 2, 3, 4, 5; 3.9 in id 6. That works; should replies be lost, update "
        "all with Feetech's FD program"
    ) in said
    assert said[-2:] == [
        "chain: all six motors answer",
        f"The leader's motors are set up. Next: python -m so101.tools.calibrate port={live_arm.path} arm=leader "
        "output=calibrations/leader.json",
    ]
    assert ids(servos) == [1, 2, 3, 4, 5, 6]
    assert [servos.read_memory(index, 6, 1) for index in range(6)] == [b"\0"] * 6  # all at 1 Mbaud
    assert [servos.read_memory(index, 55, 1) for index in range(6)] == [b"\1"] * 6  # and locked


def test_each_mistake_is_named_and_can_be_mended(person, live_arm) -> None:
    """G 2 of the record of LeRobot's pains: two motors, the same motor twice; then it goes on."""
    person.listen()
    person.plug("gripper", "wrist_roll")  # both still have id 1
    assert person.listen()[-2] == f"gripper: {COLLISION}{live_arm.path}"
    assert ids(person.servos) == [1] * 6
    person.plug("gripper")
    assert person.listen()[0].startswith("gripper: id 1, ")
    person.plug("gripper")
    assert person.listen()[0] == (
        "wrist_roll: this is still gripper's motor (id 6): unplug it and connect the next one"
    )
    person.plug("gripper", "wrist_roll")
    assert person.listen()[0] == "wrist_roll: 2 motors answer, with ids 1, 6: leave only one connected"
    assert ids(person.servos) == [1] * 5 + [6]
    code, error = person.leave()
    assert (code, error) == (3, "2 motors answer, with ids 1, 6: leave only one connected\n")


@pytest.mark.parametrize("person", [["joint=elbow_flex"]], indirect=True)
def test_the_chain_s_first_gap_is_named(person, live_arm) -> None:
    """G 3: a replaced motor, and a chain in which a cable, a motor and at last nothing is missing."""
    for index in range(6):
        if index != 2:
            person.servos.store(index, "ID", index + 1)
    person.listen()
    person.plug("elbow_flex")
    assert person.listen()[0].endswith("now id 3 at 1000000 baud")
    person.plug("shoulder_pan", "shoulder_lift")
    assert person.listen()[-2] == (
        f"chain: {live_arm.path}: elbow_flex (id 3) does not answer, nor does anything behind it (wrist_flex, "
        "wrist_roll, gripper): check the cable from shoulder_lift to elbow_flex; if it is good, connect elbow_flex's "
        f"motor alone and run python -m so101.tools.setup port={live_arm.path} joint=elbow_flex"
    )
    person.plug("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_roll", "gripper")
    assert person.listen()[-2] == (
        f"chain: {live_arm.path}: wrist_flex (id 4) does not answer, and wrist_roll behind it does, so the cables are "
        "good: its motor has another id or speed, or is broken. Connect it alone and run "
        f"python -m so101.tools.setup port={live_arm.path} joint=wrist_flex"
    )
    person.plug(*JOINTS)
    assert "chain: all six motors answer" in person.listen()
    assert person.leave() == (0, "")


def test_nobody_there_to_press_enter_is_the_exit_code_of_the_other_tools_too(person) -> None:
    """As in calibrate and bounds: 2, and 3 only where a motor was not as it should be."""
    person.listen()
    assert person.leave() == (
        2, "the input ended, and a person has to press Enter here; run this in a terminal\n"
    )  # fmt: skip


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("obeyed", [False, True])
def test_a_fault_at_any_step_of_the_change_of_speed_leaves_the_motor_locked(step: int, obeyed: bool) -> None:
    """Torque off, unlock, new speed, read back, lock: all tries of one of them are lost, there or on the way back."""
    servos = SimServos()
    servos.store(5, "Baud_Rate", 1)
    port = SimPort(servos)
    port.baudrate, write, lost, steps = 500_000, port.write, [], [b""]

    def failing(data: bytes) -> int:
        if data != steps[-1]:
            steps.append(data)
        if len(steps) - 2 != step or len(lost) > 3:
            return write(data)
        lost.append(data)
        if obeyed:
            write(data)
            port.reset_input_buffer()
        return len(data)

    port.write = failing  # type: ignore[method-assign]
    with suppress(HardwareError):
        _to_full_speed(port, ServoBus(port), 6)
    assert bool(lost) == (step < 5)
    assert servos.read_memory(5, 55, 1) == b"\1"


class LateMotor:
    """A port in its own time, and on it a motor that answers a PING of all 3 ms later for each id, as LeRobot allows.

    A reply that comes when the port has another speed is noise.
    """

    def __init__(self, servo_id: int | None, baud: int) -> None:
        self.servo_id, self.baud = servo_id, baud
        self.now = self.timeout = 0.0
        self.baudrate, self.in_waiting = 1_000_000, 0
        self.replies: list[tuple[float, bytes]] = []

    def write(self, request: bytes) -> None:
        if self.baudrate == self.baud and self.servo_id is not None:
            self.replies.append((self.now + 0.003 * self.servo_id, status_packet(self.servo_id, 0)))

    def read(self, size: int) -> bytes:
        self.now += self.timeout if size else 0
        if not self.replies or self.replies[0][0] > self.now or not size:
            return b""
        _, reply = self.replies.pop(0)
        return reply if self.baudrate == self.baud else b"\x13\x37"


@pytest.mark.parametrize("baud", [1_000_000, 500_000, 38_400, 19_200])
@pytest.mark.parametrize("servo_id", [1, 60, 110, 200, 253])
def test_any_id_is_found_at_any_speed(servo_id: int, baud: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A reply that is late for the quick scan is no collision either, when it comes as noise at a later speed."""
    port = LateMotor(servo_id, baud)
    assert (_only_motor(port), port.baudrate) == ((baud, servo_id), baud)
    assert capsys.readouterr().out == (
        "no clear answer yet; listening on for motors with high ids, which takes 10 seconds\n" if servo_id > 60 else ""
    )
    assert port.now < 12


def test_no_power_is_named() -> None:
    with pytest.raises(HardwareError) as caught:
        _only_motor(LateMotor(None, 0))
    assert str(caught.value) == (
        "no motor answers, though the USB adapter is there. Plug in the arm's power supply (USB does not feed the "
        "motors), check the cable from the board to the first motor, and on a Waveshare board set both jumpers to B "
        "(USB)"
    )


def test_what_cannot_be_set_up_is_said_before_any_cable_is_pulled(tmp_path) -> None:
    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "so101.tools.setup", *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return result.returncode, result.stderr

    missing = "command line: port is missing: serial port of the arm; python -m so101.tools.ports lists them\n"
    assert run() == (2, missing)
    code, error = run("port=x", "joint=elbow")
    assert (code, error.split(", must be one of")[0]) == (2, "command line: joint: got 'elbow'")
    code, error = run(f"port={tmp_path}/ttyACM0")
    assert (code, error.split(". ")[0]) == (3, f"port: '{tmp_path}/ttyACM0' is not there")

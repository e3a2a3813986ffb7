"""Scripted events of the simulated arm: what each does and undoes, and what is said of one that makes no sense."""

import pytest

from so101.errors import ConfigError
from so101.robot.bus import ServoBus
from so101.robot.kinematics import jaw_angle
from so101.sim.script import play, read_event
from so101.sim.servos import SimPort, SimServos


def make() -> tuple[SimServos, SimPort, ServoBus]:
    servos = SimServos()
    port = SimPort(servos)
    return servos, port, ServoBus(port, retries=0)


def run(servos: SimServos, seconds: float) -> None:
    for _ in range(round(seconds / 0.02)):
        servos.step(0.02)


@pytest.mark.parametrize(
    ("line", "register", "during", "afterwards"),
    [
        ('{"fault": "voltage", "ids": [2], "value": 12.1, "after": 1, "seconds": 1}', "Present_Voltage", 121, 74),
        ('{"fault": "voltage", "ids": [2], "value": 3.9, "after": 1, "seconds": 1}', "Status", 1, 0),
        ('{"fault": "temperature", "ids": [2], "value": 71, "after": 1, "seconds": 1}', "Status", 4, 0),
        ('{"fault": "overload", "ids": [2], "after": 1, "seconds": 1}', "Status", 32, 32),  # latched
        (
            '{"fault": "register", "register": "Firmware_Minor_Version", "value": 9, "after": 1, "seconds": 1}',
            "Firmware_Minor_Version",
            9,
            10,
        ),
    ],
)
def test_a_fault_comes_and_goes(line: str, register: str, during: int, afterwards: int) -> None:
    servos, port, bus = make()
    before = bus.read(2, register)
    play(read_event(line), port)
    run(servos, 0.98)
    assert bus.read(2, register) == before
    run(servos, 0.04)
    assert bus.read(2, register) == during
    run(servos, 1.0)
    assert bus.read(2, register) == afterwards


def test_a_bad_line_comes_and_goes() -> None:
    servos, port, bus = make()
    play(read_event('{"fault": "replies", "value": 1, "kinds": ["noise"], "seconds": 0.1}'), port)
    play(read_event('{"fault": "echo", "after": 0.2}'), port)
    run(servos, 0.04)
    bus.ping(1)
    assert bus.faults.pop("noise") == 2
    run(servos, 0.2)
    bus.ping(1)
    assert port.echo
    assert not bus.faults


def test_a_blocked_joint_stays_and_goes_on_when_it_is_free() -> None:
    servos, port, bus = make()
    play(read_event('{"fault": "block", "ids": [1], "seconds": 1}'), port)
    run(servos, 0.02)
    for servo_id in (1, 2):
        bus.write(servo_id, "Goal_Position", 2300)
        bus.write(servo_id, "Torque_Enable", 1)
    run(servos, 0.9)
    assert servos.angle[0] == 0
    assert bus.read(2, "Present_Position") == 2300
    run(servos, 1.0)
    assert bus.read(1, "Present_Position") == 2300


def test_a_hand_moves_limp_joints_on_a_straight_line() -> None:
    servos, port, bus = make()
    bus.write(3, "Torque_Enable", 1)
    bus.write(3, "Goal_Position", 2105)
    play(read_event('{"move": {"shoulder_pan": 0.5, "elbow_flex": 0.5, "gripper": 1.0}, "seconds": 1}'), port)
    run(servos, 0.5)
    assert servos.angle[0] == pytest.approx(0.25)
    run(servos, 0.5)
    assert servos.angle.tolist() == pytest.approx([0.5, 0, 0, 0, 0, jaw_angle(1.0)])


def test_motors_are_plugged_one_for_another() -> None:
    servos, port, bus = make()
    bus.write(1, "Acceleration", 7)
    play(read_event('{"plug": ["gripper"]}'), port)
    run(servos, 0.02)
    assert servos.present == [False] * 5 + [True]
    play(read_event('{"plug": ["shoulder_pan", "gripper"]}'), port)
    run(servos, 0.02)
    assert bus.read(1, "Acceleration") == 0  # it was without power


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"script: not JSON \(.*\): \{"),
        ("[1]", r"script: must be one JSON object a line: \[1\]"),
        ("{}", "script: an event is one fault, one move, one plug or one cube"),
        ('{"fault": "vanisch"}', 'script: fault: got "vanisch", must be null or one of "vanish", "mute", '),
        ('{"fault": "voltage"}', "script: value: the fault 'voltage' needs one"),
        ('{"fault": "register", "value": 1}', "script: register: got None, and the fault register needs the name"),
        (
            '{"fault": "register", "register": "ID", "value": 999}',
            "script: value: got 999.0, must be 0 or more and at most 255",
        ),
        ('{"fault": "mute", "ids": [7]}', r"script: ids: got 7, the motors are 1 \.\. 6"),
        ('{"move": {"elbow": 1}}', "script: joint 'elbow': must be one of shoulder_pan, "),
        ('{"fault": "replies", "value": 1, "kinds": ["loss"]}', "script: kinds: got 'loss', must be of drop, "),
        ('{"fault": "mute", "id": [1]}', "script: unknown key 'id'; did you mean 'ids'"),
    ],
)
def test_a_line_that_makes_no_sense_is_explained(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_event(line)

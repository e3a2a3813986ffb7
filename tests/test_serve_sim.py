"""The simulated arm on a pseudo-terminal, as another program meets it: through pyserial."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serial

from so101.robot.arm import Arm
from so101.robot.bus import ServoBus, ServoError
from so101.sim.servos import SIM_CALIBRATION

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no pseudo-terminals")


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server with words on its command line."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "so101.tools.serve_sim", *words]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def server(start: Start) -> "subprocess.Popen[str]":
    return start()


def port_of(server: "subprocess.Popen[str]") -> str:
    assert server.stdout is not None
    return server.stdout.readline().strip()


def tell(server: "subprocess.Popen[str]", **event: Any) -> None:
    assert server.stdin is not None
    server.stdin.write(json.dumps(event) + "\n")
    server.stdin.flush()


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_there(bus: ServoBus, servo_id: int) -> bool:
    try:
        return bus.ping(servo_id) == 777
    except ServoError:
        return False


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_arm_behind_a_real_serial_port(server: "subprocess.Popen[str]", stop: signal.Signals) -> None:
    path = port_of(server)
    with serial.Serial(path, 1_000_000, timeout=0.05) as port:
        arm = Arm(ServoBus(port, names=SIM_CALIBRATION.names), SIM_CALIBRATION)
        arm.connect()
        arm.configure()
        arm.set_torque(True)
        start = arm.read().position
        goal = np.clip(start + 0.1, *arm.limits)
        arm.command(goal)
        assert (np.abs(arm.read().position - goal) > 0.01).any()  # it takes its time
        time.sleep(0.6)
        assert arm.read().position == pytest.approx(goal, abs=2e-3)
        assert not arm.bus.faults
    with serial.Serial(path, 1_000_000, timeout=0.05) as port:  # a program may leave, and another come
        bus = ServoBus(port, retries=1)
        assert bus.read(1, "Torque_Enable") == 1
        with pytest.raises(ServoError, match="servo 7: no valid reply to PING in 2 attempts: no reply"):
            bus.ping(7)
    server.send_signal(stop)
    assert server.wait(5) == 0
    assert not Path(path).parent.exists()
    assert server.stderr is not None
    assert server.stderr.read() == ""


def test_the_port_s_loss_is_a_servo_error(server: "subprocess.Popen[str]") -> None:
    with serial.Serial(port_of(server), 1_000_000, timeout=0.05) as port:
        bus = ServoBus(port)
        assert bus.ping(1) == 777
        server.kill()
        server.wait(5)
        with pytest.raises(ServoError, match="the port failed"):
            bus.read(1, "Present_Position")


def test_another_process_scripts_faults_and_the_hand(start: Start) -> None:
    server = start("leader=true")
    with (
        serial.Serial(port_of(server), 1_000_000, timeout=0.05) as follower,
        serial.Serial(port_of(server), 1_000_000, timeout=0.05) as leader,
    ):
        follows, leads = ServoBus(follower, retries=0), ServoBus(leader)
        tell(server, fault="vanish", ids=[4], seconds=0.8)
        tell(server, arm="leader", move={"shoulder_pan": 0.5}, seconds=0.2)
        until(lambda: not is_there(follows, 4))
        until(lambda: is_there(follows, 4))
        until(lambda: leads.read(1, "Present_Position") == 2071 + round(0.5 * 4096 / (2 * np.pi)))
        assert follows.read(1, "Present_Position") == 2071


def test_an_unplugged_adapter_comes_back_under_its_path(server: "subprocess.Popen[str]") -> None:
    path = port_of(server)
    with serial.Serial(path, 1_000_000, timeout=0.05) as port:
        bus = ServoBus(port, reopen=lambda: serial.Serial(path, 1_000_000, timeout=0.05))
        bus.write(2, "Acceleration", 9)
        tell(server, fault="unplug", seconds=0.3)
        until(lambda: not os.path.exists(path))
        assert bus.read(2, "Acceleration") == 9  # the servos kept their power
        assert bus.outages == 1
        bus.close()


def test_motors_from_the_box_are_plugged_in_one_after_the_other(start: Start) -> None:
    server = start("factory=true")
    with serial.Serial(port_of(server), 1_000_000, timeout=0.05) as port:
        bus = ServoBus(port, retries=0)
        assert bus.read(1, "Max_Position_Limit") == 4095
        assert bus.write_eprom(1, "ID", 6)
        tell(server, plug=["wrist_roll"])
        until(lambda: is_there(bus, 1))
        assert not is_there(bus, 6)
        tell(server, plug=["wrist_roll", "gripper"])
        until(lambda: is_there(bus, 6))
        assert is_there(bus, 1)
        port.baudrate = 115_200
        assert not is_there(bus, 1)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"arm": "leader", "fault": "mute"}, "script: there is no leader; start with leader=true\n"),
        ({"fault": "voltage"}, "script: value: the fault 'voltage' needs one\n"),
    ],
)
def test_a_line_that_is_not_understood_ends_it(server: "subprocess.Popen[str]", event: Any, said: str) -> None:
    port_of(server)
    tell(server, **event)
    assert server.wait(5) == 2
    assert server.stderr is not None
    assert server.stderr.read() == said


def test_a_fault_rate_that_is_none_is_refused() -> None:
    command = [sys.executable, "-m", "so101.tools.serve_sim", "fault_rate=2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert result.returncode == 2
    assert "fault_rate: got 2.0, must be 0 or more and at most 1" in result.stderr

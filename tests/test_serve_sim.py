"""The simulated arm on a pseudo-terminal, as another program meets it: through pyserial."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import serial

from so101.robot.arm import Arm
from so101.robot.bus import ServoBus, ServoError
from so101.sim.servos import SIM_CALIBRATION

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no pseudo-terminals")


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "so101.tools.serve_sim"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def port_of(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    return server.stdout.readline().strip()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_arm_behind_a_real_serial_port(server: subprocess.Popen[str], stop: signal.Signals) -> None:
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
    assert server.stderr is not None
    assert server.stderr.read() == ""


def test_the_port_s_loss_is_a_servo_error(server: subprocess.Popen[str]) -> None:
    with serial.Serial(port_of(server), 1_000_000, timeout=0.05) as port:
        bus = ServoBus(port)
        assert bus.ping(1) == 777
        server.kill()
        server.wait(5)
        with pytest.raises(ServoError, match="the port failed"):
            bus.read(1, "Present_Position")


def test_a_fault_rate_that_is_none_is_refused() -> None:
    command = [sys.executable, "-m", "so101.tools.serve_sim", "fault_rate=2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert result.returncode == 2
    assert "fault_rate: got 2.0, must be 0 .. 1" in result.stderr

"""Serial ports found, opened and told apart; each way that fails, in the words that a person reads."""

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from so101.errors import HardwareError
from so101.robot.bus import ServoBus
from so101.robot.feetech import PING, find_instruction
from so101.robot.ports import PortInfo, command, list_ports, open_port, permission_advice, stable_path
from so101.robot.probe import BAUDS, hear

grp = pytest.importorskip("grp")  # not on Windows
pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no pseudo-terminals")


def start(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "so101.tools.ports", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    try:
        return process.communicate(timeout=20)
    finally:
        process.kill()


def test_an_open_port_is_this_program_s_alone(live_arm) -> None:
    with open_port(live_arm.path, "follower.port") as port:
        assert (port.baudrate, port.timeout, port.exclusive) == (1_000_000, 0.05, True)
        assert ServoBus(port).ping(4) == 777
        with pytest.raises(HardwareError) as caught:
            open_port(live_arm.path, "leader.port")
    if Path("/proc").exists():
        assert str(caught.value) == (
            f"leader.port: {live_arm.path!r} is in use by this very program (is the same port given twice?); "
            f"close that first"
        )
    open_port(live_arm.path, "leader.port").close()


def test_another_program_on_the_port_is_named(live_arm) -> None:
    with open_port(live_arm.path, "port"):
        process = start("wiggle=true", f'ports=["{live_arm.path}"]')
        said, error = finish(process)
    assert process.returncode == 3
    assert error == "none of these ports leads to an arm that can be moved by hand: see above\n"
    if Path("/proc").exists():
        name = Path(sys.orig_argv[0]).name
        assert f"port: {live_arm.path!r} is in use by '{name} " in said
        assert f"' (pid {os.getpid()}); close that first\n" in said


def test_a_missing_port_says_what_is_there(tmp_path) -> None:
    """Row 3 of the field record: after a reboot the port has another name."""
    with pytest.raises(HardwareError) as caught:
        open_port(str(tmp_path / "ttyACM7"), "follower.port")
    there = "; ".join(str(port) for port in list_ports())
    assert str(caught.value) == f"follower.port: '{tmp_path}/ttyACM7' is not there. " + (
        f"This machine has: {there}. python -m so101.tools.ports wiggle=true tells which of them is which arm"
        if there
        else "This machine has no serial port: plug in the arm's USB cable (one that carries data)"
    )


def test_a_command_is_the_shell_s_own_words() -> None:
    assert command("release", "/dev/ttyACM0") == "python -m so101.tools.release port=/dev/ttyACM0"
    said = command("setup", "/tmp/my arm's", "joint=gripper")
    assert shlex.split(said) == ["python", "-m", "so101.tools.setup", "port=/tmp/my arm's", "joint=gripper"]


def test_an_example_in_a_tool_s_help_is_a_line_of_its_own() -> None:
    """What is not indented is prose to --help, and runs on."""
    for path in (Path(__file__).parent.parent / "so101" / "tools").glob("*.py"):
        described = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
        assert not [line for line in described.splitlines() if line.startswith("python ")], path.name


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root may open everything: be nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_port_without_permission_names_group_and_udev_rule(live_arm) -> None:
    device = os.path.realpath(live_arm.path)
    if os.geteuid() == 0:
        os.chown(device, 0, grp.getgrnam("tty").gr_gid)
    os.chmod(device, 0o060)
    group = grp.getgrgid(os.stat(device).st_gid).gr_name
    with as_somebody_else(), pytest.raises(HardwareError) as caught:
        open_port(device, "follower.port")
    assert str(caught.value) == (
        f"follower.port: {device!r} may not be opened by this user. It belongs to the group {group}: run "
        f"'sudo usermod -aG {group} $USER', log out and in again; or write the udev rule "
        f'\'SUBSYSTEM=="tty", ATTRS{{idVendor}}=="1a86", MODE="0666"\' into /etc/udev/rules.d/99-so101.rules, '
        f"and replug the arm"
    )
    assert permission_advice(live_arm.path) in str(caught.value)


@pytest.mark.parametrize("what", ["file", "folder", "null"])
def test_what_is_no_serial_port_is_said_to_be_none(tmp_path, what: str) -> None:
    device = {"file": tmp_path / "file", "folder": tmp_path, "null": Path("/dev/null")}[what]
    (tmp_path / "file").touch()
    with pytest.raises(HardwareError) as caught:
        open_port(str(device), "port")
    assert str(caught.value) == (
        f"port: '{device}' is not a serial port; python -m so101.tools.ports lists those that are"
    )


def test_by_id_only_where_a_serial_number_makes_it_one_adapter_s_own(tmp_path) -> None:
    """Row 3 of the field record, and two adapters of a kind without serial numbers, which share one by-id link."""
    device = tmp_path / "ttyACM0"
    device.touch()
    for folder in ("by-id", "by-path"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "usb").symlink_to(device)
    assert stable_path(str(device), True, tmp_path) == str(tmp_path / "by-id" / "usb")
    assert stable_path(str(device), False, tmp_path) == str(tmp_path / "by-path" / "usb")
    assert stable_path(str(tmp_path / "ttyACM1"), True, tmp_path) is None


def test_a_port_s_line_has_vendor_product_and_serial_number() -> None:
    port = PortInfo("/dev/ttyACM0", "/dev/serial/by-id/usb-1a86", "QinHeng", "USB Single Serial", "5A46", 0x1A86)
    assert str(port) == "/dev/ttyACM0, QinHeng USB Single Serial, serial number 5A46"
    assert port.path == "/dev/serial/by-id/usb-1a86"
    assert str(PortInfo("COM3", None, "", "", "", None)) == "COM3"


def test_a_wiggled_joint_tells_which_port_its_arm_is_on(live_arm) -> None:
    """Nothing is written: what the servos hold afterwards is what they held before."""
    before = [live_arm.servos.read_memory(index, 0, 56) for index in range(6)]
    process = start("wiggle=true", f'ports=["{live_arm.path}"]')
    assert process.stdout is not None
    while "Now move any joint" not in process.stdout.readline():
        pass
    live_arm.servos.angle[4] -= 0.2
    said, error = finish(process)
    assert (said, error) == (
        f'wrist_roll moved: it is the arm on {live_arm.path}\nin its config: "port": "{live_arm.path}"\n',
        "",
    )
    assert process.returncode == 0
    assert [live_arm.servos.read_memory(index, 0, 56) for index in range(6)] == before


def test_a_stiff_arm_is_not_to_be_wiggled(live_arm) -> None:
    with open_port(live_arm.path, "port") as port:
        ServoBus(port).write(3, "Torque_Enable", 1)
    process = start(live_arm.path, "wiggle=true")
    said, _ = finish(process)
    assert process.returncode == 3
    assert said == (
        f"{live_arm.path}\n{live_arm.path}: elbow_flex's torque is on, so it must not be moved by hand; free the arm "
        f"with python -m so101.tools.release port={live_arm.path} first\n"
    )


def test_a_ping_to_all_is_heard_at_each_motor_s_own_speed(live_arm) -> None:
    """Three motors at 1 Mbaud, one at 115200; of the two that share an id only noise or doubled replies are heard."""
    live_arm.servos.store(1, "Baud_Rate", 4)
    live_arm.servos.store(5, "ID", 5)
    with open_port(live_arm.path, "port") as port:
        ids, noise = hear(port, 1_000_000)
        assert set(ids) - {5} == {1, 3, 4}
        assert noise or ids.count(5) == 2
        assert hear(port, 115_200) == ([2], False)
        assert hear(port, 57_600) == ([], False)


def test_nothing_that_is_asked_could_move_a_servo(live_arm) -> None:
    sent = bytearray()
    write = live_arm.port.write

    def record(data: bytes) -> int:
        sent.extend(data)
        return write(data)

    live_arm.port.write = record
    with open_port(live_arm.path, "port") as port:
        for baud in BAUDS[:2]:
            hear(port, baud)
    packet, end = find_instruction(bytes(sent))
    assert packet is not None
    assert (packet.code, end) == (PING, len(sent) // 2)

"""The doctor on arms with known ailments: what it says of each, and that it leaves no trace in a servo."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from so101.config import load
from so101.errors import ConfigError
from so101.rig import RigConfig
from so101.robot.bus import ServoBus
from so101.robot.calibration import Calibration, JointCalibration, save_calibration
from so101.robot.camera import require_lasting_names
from so101.robot.probe import Wired, swapped
from so101.schema import JOINTS
from so101.sim.servos import SIM_CALIBRATION, SimPort, SimServos
from so101.timing import Clock
from so101.tools.doctor import Check, Config, arms, check_dataset, examine, jitter, machine, main, watch

OTHER = Calibration(
    {
        name: JointCalibration(j.id, 0, j.homing_offset + 7, 900, 3000, 2000.0)
        for name, j in SIM_CALIBRATION.joints.items()
    }
)


def run(*words: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code and findings by name of the real process; of several with one name the last."""
    command = [sys.executable, "-m", "so101.tools.doctor", "--json", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["exit_code"] == result.returncode
    assert {finding["level"] for finding in report["findings"]} <= {"good", "warning", "bad"}
    assert all(finding["then"] for finding in report["findings"] if finding["level"] != "good")
    return result.returncode, {finding["what"]: finding for finding in report["findings"]}


@pytest.fixture
def rig(live_arm, tmp_path) -> Path:
    """A rig file with the live arm, its calibration, and a camera that is not there."""
    save_calibration(tmp_path / "follower.json", SIM_CALIBRATION)
    follower = {"port": live_arm.path, "calibration": str(tmp_path / "follower.json")}
    cameras = {"wrist": {"source": str(tmp_path / "video9")}}
    path = tmp_path / "rig.json"
    path.write_text(json.dumps({"follower": follower, "leader": None, "cameras": cameras}))
    return path


def test_the_simulated_rig_is_well() -> None:
    code, found = run()
    hardware = [name for name in found if name.startswith(("follower", "leader", "camera"))]
    assert code == 0
    assert len(hardware) == 2 * (1 + 6 + 1) + 1
    assert {found[name]["level"] for name in hardware} == {"good"}
    assert found["leader gripper"]["found"] == "id 6, model 777, firmware 3.10, 7.4 V, 25 C, torque off"
    assert {"torch device cpu", "disk of outputs", "clock", "config"} <= set(found)


def test_each_ailment_has_its_line(live_arm, rig) -> None:
    """Firmware mix, 12 V, 4 V, an overload, torque that was left on, a hot motor; and nothing is changed by asking."""
    servos = live_arm.servos
    servos.store(1, "Firmware_Minor_Version", 9)
    servos.store(3, "Torque_Enable", 1)
    servos.voltage[:] = [7.4, 12.1, 4.3, 7.4, 7.4, 7.4]
    servos.condition[4] = 32
    servos.temperature[5] = 66
    before = [servos.read_memory(index, 0, 56) for index in range(6)]
    code, found = run(f"rig={rig}")
    assert code == 3
    assert [servos.read_memory(index, 0, 56) for index in range(6)] == before

    def line(joint: str) -> tuple[str, str, str]:
        finding = found[f"follower {joint}"]
        return finding["level"], finding["found"].split("; ", 1)[-1], finding["then"]

    again = "mend that, then run this again"
    assert line("shoulder_lift") == (
        "bad",
        "gets 12.1 V, and is made for 4.0 .. 8.0: unplug the power now; 7.4 V motors take a 5 V supply, only the "
        "12 V kind takes 12",
        again,
    )
    assert line("elbow_flex") == (
        "bad",
        "gets 4.3 V, so it answers, but its motor has no power: switch the arm's supply on (5 V, 5 A for 7.4 V "
        "motors), and check its plug",
        again,
    )
    assert line("wrist_flex") == (
        "warning",
        "id 4, model 777, firmware 3.10, 7.4 V, 25 C, torque on",
        f"support the arm, then python -m so101.tools.release port={live_arm.path}",
    )
    assert line("wrist_roll") == ("bad", "reports overload: support the arm, and switch its power off and on", again)
    assert line("gripper") == ("warning", "is at 66 C and stops at 70: let it cool", again)
    assert found["follower firmware"]["found"] == (
        "firmware differs: 3.10 in id 1, 3, 4, 5, 6; 3.9 in id 2. That works; should replies be lost, update all with "
        "Feetech's FD program"
    )
    assert found["follower calibration"]["level"] == "good"
    assert (found["camera wrist"]["level"], found["camera wrist"]["then"]) == ("bad", "python -m so101.tools.camera")


def look(rig: Path, until: str = "") -> dict[str, Check]:
    """The findings on the arms of a rig, by name, up to the one named `until`."""
    found = {}
    for finding in arms(load(RigConfig, rig)):
        found[finding.what] = finding
        if finding.what == until:
            break
    return found


def test_a_silent_motor_is_looked_for_at_other_speeds(live_arm, rig) -> None:
    """Wrong baud, wrong id, and of two motors with one id: each by its own line."""
    live_arm.servos.store(3, "Baud_Rate", 1)
    live_arm.servos.store(4, "ID", 9)
    live_arm.servos.store(0, "ID", 2)
    found = look(rig)
    assert found["follower shoulder_lift"].found == (
        "id 2: replies collide: two motors have the same id, a cable is damaged, or this is another device's port. "
        f"Leave one motor connected, and give each its id with python -m so101.tools.setup port={live_arm.path}"
    )
    setup = f"python -m so101.tools.setup port={live_arm.path} arm=follower"
    assert found["follower shoulder_lift"].then == found["follower motor 9"].then == setup
    assert found["follower chain"].found.startswith("shoulder_pan (id 1) does not answer, and shoulder_lift behind it")
    assert found["follower motor 9"].found == "answers as id 9 at 1000000 baud; joints have ids 1 .. 6 at 1000000"
    assert found["follower motor 4"].found == "answers as id 4 at 500000 baud; joints have ids 1 .. 6 at 1000000"
    assert "follower motor 3" not in found


def test_no_power_and_no_port(live_arm, rig) -> None:
    """Row 31 of the field record: all six silent is the supply, not six broken motors."""
    live_arm.servos.present[:] = [False] * 6
    chain = look(rig, until="follower chain")["follower chain"]
    assert (chain.level, chain.exit_code) == ("bad", 3)
    assert chain.found.startswith("no motor answers, though the USB adapter is there. Plug in the arm's power supply")
    assert chain.then == f"python -m so101.tools.setup port={live_arm.path} arm=follower"
    live_arm.close()
    port = look(rig)["follower port"]
    assert (port.level, port.exit_code, port.then) == ("bad", 3, "python -m so101.tools.ports")
    assert port.found.startswith(f"follower.port: {live_arm.path!r} is not there. This machine has")


def test_a_rig_that_does_not_load(tmp_path, capsys) -> None:
    rig = tmp_path / "rig.json"
    rig.write_text('{"folower": {}}')
    assert main(Config(rig=str(rig))) == 2
    said = f"bad      config: {rig}: unknown key 'folower'; did you mean 'follower'?\n{'':9}next: mend that, then run"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, code, what",
    [
        (["rig=nope.json"], 2, "config"),
        (["dataset=nope"], 4, "dataset"),
        (["rig=nope.json", "dataset=nope"], 2, "config"),
    ],
)
def test_what_cannot_be_read_is_a_line_of_the_json_and_an_exit_code(
    words: list[str], code: int, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As every other program has it: 2 for a config, 4 for data."""
    assert main(Config(json=True, **dict(word.split("=") for word in words))) == code
    report = json.loads(capsys.readouterr().out)
    bad = [finding for finding in report["findings"] if finding["level"] == "bad"]
    assert report["exit_code"] == code and bad[0]["what"] == what and bad[0]["exit_code"] == code
    assert "nope" in bad[0]["found"] and ("cannot be read" in bad[0]["found"] or "no such folder" in bad[0]["found"])


def test_no_name_is_no_dataset() -> None:
    with pytest.raises(ConfigError, match="^dataset: got no name; give the folder that holds meta/info.json"):
        Config(dataset="")


@pytest.mark.skipif(not Path("/proc").exists(), reason="only Linux tells who has a file open")
def test_a_port_that_another_program_has_names_it(live_arm, rig) -> None:
    """Opened as that program does it, for itself alone; it is what has to end, and another port would not help."""
    hold = "import serial, sys; port = serial.Serial(sys.argv[1], exclusive=True); print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, live_arm.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "1\n"
        found = look(rig, until="follower port")["follower port"]
        other.stdin.write("\n")
    said = f"'{Path(sys.executable).name} -c import serial, sys;"
    assert (found.level, found.exit_code) == ("bad", 3)
    assert f"{live_arm.path!r} is in use by " in found.found
    assert said in found.found and f"(pid {other.pid})" in found.found
    assert found.then.startswith(f"end {said}") and found.then.endswith(f"' (pid {other.pid}), then run this again")
    assert look(rig, until="follower port")["follower port"].level == "good"  # and then it is free


def test_a_port_given_to_both_arms_is_not_blamed_on_another_program(live_arm, rig) -> None:
    content = json.loads(rig.read_text())
    rig.write_text(json.dumps({**content, "leader": content["follower"]}))
    found = look(rig)["leader port"]
    assert "is in use by this very program" in found.found or not Path("/proc").exists()
    assert found.then == "give each arm its own port in the config" or not Path("/proc").exists()


def test_the_calibration_of_another_arm(live_arm, rig) -> None:
    save_calibration(rig.with_name("follower.json"), OTHER)
    found = look(rig)["follower calibration"]
    assert (found.level, found.then) == (
        "bad",
        f"python -m so101.tools.calibrate port={live_arm.path} arm=follower output={rig.with_name('follower.json')}",
    )
    assert found.found == (
        f"{rig.parent}/follower.json: this calibration is not the one in the servos of {', '.join(JOINTS)}: "
        "shoulder_pan's Homing_Offset is -412 in the servo, -405 in the calibration. Give the file that was made for "
        "this arm, or calibrate it again with python -m so101.tools.calibrate"
    )


def test_cameras_that_a_start_refuses_are_bad_here_too(live_arm, rig, monkeypatch) -> None:
    content = json.loads(rig.read_text())
    content["cameras"]["side"] = content["cameras"]["wrist"]
    rig.write_text(json.dumps(content))
    config = load(RigConfig, rig)
    with pytest.raises(ConfigError) as refused:
        require_lasting_names(config.cameras)
    monkeypatch.setattr("so101.tools.doctor.arms", lambda rig: [])
    found = {finding.what: finding for finding in examine(Config(rig=str(rig)))}
    assert (found["cameras"].level, found["cameras"].found) == ("bad", str(refused.value))
    assert "is the same camera as cameras." in found["cameras"].found


def test_disk_space_is_measured_where_the_data_goes(tmp_path, monkeypatch) -> None:
    """In outputs, which leads to another disk here, and where the dataset is to be, though it is not there yet."""
    work, disk = tmp_path / "work", tmp_path / "disk"
    (work / "outputs").mkdir(parents=True)
    disk.mkdir()
    free = {work / "outputs": 6e9, disk: 4e8, work: 1e12}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[Path(path)]))
    monkeypatch.chdir(work)
    found = {finding.what: finding for finding in machine(["outputs", f"{disk}/demos/cube"])}
    assert (found["disk of outputs"].level, found["disk of outputs"].found) == ("good", "6.0 GB free")
    assert (found[f"disk of {disk}/demos/cube"].level, found[f"disk of {disk}/demos/cube"].found) == (
        "bad",
        "0.4 GB free",
    )


def arm_with(held: Calibration, file: Calibration, volts: float = 7.4) -> Wired:
    servos = SimServos(held)
    servos.voltage[:] = volts
    return ServoBus(SimPort(servos)), file


def test_leader_and_follower_swapped() -> None:
    """Row 3 of the field record: after a reboot each port led to the other arm."""
    mine, other = SIM_CALIBRATION, OTHER
    advice = "exchange the two ports in the config (python -m so101.tools.ports wiggle=true tells which is which)"
    assert swapped(arm_with(mine, mine), arm_with(other, other)) is None
    assert swapped(arm_with(other, mine), arm_with(mine, other)) == (
        f"leader and follower seem swapped: the follower's port leads to the other's servos; {advice}"
    )
    assert swapped(arm_with(mine, mine, 12.1), arm_with(other, other, 5.0)) is None
    assert swapped(arm_with(mine, mine, 5.0), arm_with(other, other, 12.1)) == (
        "leader and follower seem swapped: the follower's port leads to an arm with 5.0 V, the leader's to one with "
        f"12.1 V, which is a follower's supply; {advice}"
    )
    third = Calibration({**mine.joints, "gripper": JointCalibration(6, 0, 5, 1000, 2500, 2000.0)})
    assert swapped(arm_with(third, mine), arm_with(other, other)) is None  # calibrated anew, but not the leader
    assert swapped(arm_with(mine, third), arm_with(mine, mine)) is None  # simulated arms are alike; one file is wrong


class SleepyClock(Clock):
    """A machine that wakes its programs 3 ms late, and one time in twenty 8 ms."""

    def __init__(self) -> None:
        self.time, self.sleeps = 0.0, 0

    def now(self) -> float:
        return self.time

    def sleep_until(self, deadline: float) -> None:
        self.sleeps += 1
        self.time = max(self.time, deadline) + (0.008 if self.sleeps % 20 == 0 else 0.003)


def test_the_clock_s_lateness_is_the_99th_percentile() -> None:
    assert jitter(SleepyClock()) == pytest.approx(0.008)


def test_a_camera_s_rate_and_the_age_of_its_frames() -> None:
    """25 frames a second, each there 20 ms after it was taken: the newest is 20 .. 60 ms old, 40 ms on average."""
    clock = SleepyClock()

    class Steady:
        def latest(self) -> tuple[np.ndarray, float]:
            return np.zeros((2, 2, 3), np.uint8), (clock.now() - 0.02) // 0.04 * 0.04

    fps, age = watch(Steady(), clock, 2.0)
    assert fps == pytest.approx(25)
    assert age == pytest.approx(0.04, abs=0.002)


def test_a_dataset_that_is_none(tmp_path) -> None:
    assert [finding.level for finding in check_dataset(str(tmp_path))] == ["bad"]

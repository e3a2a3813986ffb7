"""The calibration tool on a simulated arm behind a real serial port, with a person who reads and obeys its prompts."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import LiveArm

from so101.config import parse
from so101.errors import ConfigError, DataError, HardwareError
from so101.rig import ArmConfig, open_arm
from so101.robot.bus import ServoError
from so101.robot.calibration import Calibration, JointCalibration, load_calibration, save_calibration
from so101.robot.kinematics import forward
from so101.schema import JOINTS
from so101.sim.servos import SIM_CALIBRATION, SimServos
from so101.tools.ask import until_enter
from so101.tools.calibrate import Config, main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no pseudo-terminals")

REST = np.array([0.0, -1.80, 1.66, 0.73, 1.571, 0.0])
# The simulated arm with its zeros in the middle of its stops, and encoders that pass their seam in five joints.
SEAMS = {"shoulder_pan": -1321, "shoulder_lift": -1053, "elbow_flex": 1500, "wrist_flex": 2047, "wrist_roll": 655}
ARM = Calibration(
    {
        name: replace(
            joint,
            homing_offset=SEAMS.get(name, joint.homing_offset),
            zero_ticks=(joint.range_min + joint.range_max) / 2,
        )
        for name, joint in SIM_CALIBRATION.joints.items()
    }
)


class Servos(SimServos):
    """Count what is written to EPROM."""

    eprom_writes = 0

    def write_memory(self, index: int, address: int, data: bytes) -> None:
        self.eprom_writes += address < 40
        super().write_memory(index, address, data)


class Person(io.StringIO):
    """Stands where stdout and stdin are: presses Enter after each of `prompts`, and acts on the others' words."""

    def __init__(self, *prompts: str, **acts: Callable[[], object]) -> None:
        super().__init__()
        self.acts = dict.fromkeys(prompts, self.press) | acts
        self._stdin, self._keyboard = os.pipe()

    def write(self, text: str) -> int:
        for cue, act in self.acts.items():
            if cue.replace("_", " ") in text:
                act()
        return super().write(text)

    def press(self, line: str = "") -> None:
        os.write(self._keyboard, f"{line}\n".encode())

    def run(self, monkeypatch: pytest.MonkeyPatch, program: Callable[[], int | None]) -> int | None:
        with monkeypatch.context() as patch, os.fdopen(self._stdin) as stdin, os.fdopen(self._keyboard, "wb"):
            patch.setattr(sys, "stdout", self)
            patch.setattr(sys, "stdin", stdin)
            return program()


def calibrate(person: Person, monkeypatch: pytest.MonkeyPatch, *words: object) -> int | None:
    return person.run(monkeypatch, lambda: main(parse(Config, [str(word) for word in words], "")))


def sweeper(arm: LiveArm, share: np.ndarray | float = 1.0) -> Person:
    """A person who sweeps the first `share` of each joint's range, a bit with every reply of the servos."""
    low, high = (stop.copy() for stop in (arm.servos._stop_low, arm.servos._stop_high))
    middle, high = (low + high) / 2, low + share * (high - low)
    way: Iterator[np.ndarray | None] = iter([])

    def hold() -> None:
        arm.servos.move_by_hand(middle)
        person.press()

    def sweep() -> None:
        nonlocal way
        # All six reply with what they read at the first one's turn: a stop is held for more than six replies.
        way = iter([*np.linspace(middle, low, 40), *[low] * 7, *np.linspace(low, high, 80), *[high] * 7, None])

    def fault(reply: bytes) -> bytes:
        for pose in islice(way, 1):
            person.press() if pose is None else arm.servos.move_by_hand(pose)
        return reply

    arm.port.fault = fault
    person = Person("goes limp", "to keep this", middle_pose=hold, Move_every=sweep)
    return person


@pytest.fixture
def arm(tmp_path: Path) -> Iterator[LiveArm]:
    servos = Servos(ARM)
    servos.angle[:] = REST
    live = LiveArm(servos, tmp_path / "port")
    yield live
    live.close()


def test_a_sweep_through_the_seam_gives_the_true_angles_and_the_second_one_wears_no_eprom(
    arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference G6, G7; L21: angles are those of the metal, whatever the encoders' seams and offsets were."""
    for index, offset in enumerate([0, 2047, -2047, 655, -1, 0]):  # as somebody else left them
        arm.servos.store(index, "Homing_Offset", offset)
    output = tmp_path / "calibrations" / "my_follower.json"
    words = [f"port={arm.path}", f"output={output}"]
    assert calibrate(sweeper(arm), monkeypatch, *words) == 0
    assert 0 < arm.servos.eprom_writes <= 18
    written = arm.servos.eprom_writes
    person = sweeper(arm)
    assert calibrate(person, monkeypatch, *words) == 0
    assert arm.servos.eprom_writes == written
    assert "the servos hold all this already" in person.getvalue()
    assert "warning" not in person.getvalue()
    kept = json.loads((output.parent / "my_follower.servos.1.json").read_text())
    assert kept["elbow_flex"] == {
        "id": 3, "drive_mode": 0, "homing_offset": -2047, "range_min": 975, "range_max": 3217
    }  # fmt: skip
    assert sorted(path.name for path in output.parent.iterdir()) == ["my_follower.json", "my_follower.servos.1.json"]

    with ExitStack() as stack:
        real = open_arm("follower", ArmConfig(port=arm.path, calibration=str(output)), stack)
        real.connect()
        low, high = arm.servos._stop_low, arm.servos._stop_high
        for share in np.linspace(0, 1, 40):
            arm.servos.move_by_hand(low + share * (high - low))
            position = real.read().position
            assert position[:5] == pytest.approx(arm.servos.angle[:5], abs=1.01 * 2 * np.pi / 4096)
            assert position[5] == pytest.approx(share, abs=1.01 / 1251)


def test_a_reply_that_is_lost_ends_no_sweep_and_a_silent_arm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    person, began = Person(there=lambda: person.press()), time.monotonic()

    def look() -> str:
        if time.monotonic() - began < 0.5:
            raise ServoError("no valid reply")
        return "there"

    assert person.run(monkeypatch, lambda: until_enter(look)) is None
    assert set(person.getvalue().split()) == {"there"}
    began = time.monotonic() + 100
    with pytest.raises(ServoError, match="no valid reply"):
        Person().run(monkeypatch, lambda: until_enter(look))
    assert 1 < time.monotonic() - (began - 100) < 2


def test_a_joint_that_was_not_moved_is_named_and_the_sweep_goes_on(
    arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = sweeper(arm)
    person.acts |= {"Move_every": person.press, "hardly_moved": person.acts["Move_every"]}
    assert calibrate(person, monkeypatch, f"port={arm.path}", f"output={tmp_path}/arm.json") == 0
    assert f"{', '.join(JOINTS)}: hardly moved; move it from stop to stop too" in person.getvalue()
    assert load_calibration(tmp_path / "arm.json").joints["gripper"].range_max > 0


def test_ranges_unlike_the_other_arm_s_are_refused_and_nothing_is_written(
    arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 4: a leader of 2129 ticks mirrored onto a follower of 4095 was 30 degrees off."""
    save_calibration(tmp_path / "leader.json", ARM)
    person = sweeper(arm, share=np.array([0.8, 1, 1, 1, 0.92, 1]))
    words = [f"port={arm.path}", f"output={tmp_path}/arm.json", f"compare={tmp_path}/leader.json"]
    with pytest.raises(
        DataError, match=r"leader\.json: ranges differ by more than 5%: shoulder_pan 171 degrees here, 214"
    ):
        calibrate(person, monkeypatch, *words)
    assert "warning: shoulder_pan: swept 78% of the usual range; was it moved to both stops?" in person.getvalue()
    assert "warning: wrist_roll" not in person.getvalue()
    assert arm.servos.eprom_writes == 0
    assert not (tmp_path / "arm.json").exists()


def test_a_middle_far_from_where_the_joint_was_held_is_told(
    arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L21: stops found on one side only move the zero; the pose that was held tells."""
    person = sweeper(arm)
    person.acts["middle_pose"] = lambda: (arm.servos.move_by_hand(np.array([0.4, 0, 0, 0, 0, 0.8])), person.press())
    calibrate(person, monkeypatch, f"port={arm.path}", f"output={tmp_path}/arm.json", "zero=held_pose")
    assert "warning: shoulder_pan: the middle of its range is -23 degrees from where it was held" in person.getvalue()
    joint = load_calibration(tmp_path / "arm.json").joints["shoulder_pan"]
    assert joint.zero_ticks - (joint.range_min + joint.range_max) / 2 == pytest.approx(0.4 * 4096 / 2 / np.pi, abs=1)


def test_a_servo_that_reads_otherwise_after_its_offset_was_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stubborn(Servos):
        def write_memory(self, index: int, address: int, data: bytes) -> None:
            super().write_memory(index, address, data)
            if address == 31 and index == 2:
                self._encoder_at_zero[2] += 300  # as if the offset did not mean what it is held to mean

    live = LiveArm(Stubborn(ARM), tmp_path / "port")
    live.servos.store(2, "Homing_Offset", 0)
    with pytest.raises(HardwareError, match="elbow_flex: reads 300 ticks off what its new offset should make it read"):
        calibrate(sweeper(live), monkeypatch, f"port={live.path}", f"output={tmp_path}/arm.json")
    live.close()


def test_a_file_is_compared_with_the_servos_and_written_when_asked_for(
    arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference G9: a table of what differs instead of a calibration that is silently taken or redone."""
    path = tmp_path / "arm.json"
    save_calibration(path, ARM)
    words = [f"port={arm.path}", f"file={path}"]
    person = Person()
    assert calibrate(person, monkeypatch, *words) == 0
    assert person.getvalue() == f"the servos hold the ranges and offsets of {path}; test=ruler tests its zero\n"

    arm.servos.store(0, "Homing_Offset", -1300)
    arm.servos.store(3, "Max_Position_Limit", 4095)
    arm.servos.store(3, "Phase", 12 | 16)  # as LeRobot 0.5 found it on new servos: it counts turns
    assert calibrate(person := Person(), monkeypatch, *words) == 1
    table = [line.split() for line in person.getvalue().splitlines()]
    assert table[2:4] == [
        ["shoulder_pan", "Homing_Offset", "-1300", "-1321"],
        ["wrist_flex", "Max_Position_Limit", "4095", "3199"],
    ]
    assert "write=true writes the file to the servos" in person.getvalue()
    assert arm.servos.eprom_writes == 0

    person = Person("goes limp")
    assert calibrate(person, monkeypatch, *words, "write=true") == 0
    said = person.getvalue()
    assert said.index(f"what the servos hold is in {tmp_path}/arm.servos.1.json") < said.index("3 settings written")
    assert arm.servos.eprom_writes == 3
    assert calibrate(Person(), monkeypatch, *words) == 0
    # And the way back is the same: the kept file is one of LeRobot's.
    assert load_calibration(tmp_path / "arm.servos.1.json").joints["wrist_flex"].range_max == 4095


def test_another_arm_s_file_is_not_written(arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joints = {**ARM.joints, "elbow_flex": replace(ARM.joints["elbow_flex"], homing_offset=0)}
    save_calibration(tmp_path / "other.json", Calibration(joints))
    person = Person("goes limp")
    with pytest.raises(
        HardwareError, match="elbow_flex: stands outside its range in this calibration, which is another"
    ):
        calibrate(person, monkeypatch, f"port={arm.path}", f"file={tmp_path}/other.json", "write=true")
    assert arm.servos.eprom_writes == 0


# The original author's follower, as LeRobot up to 0.4.2 wrote it.
AUTHOR = {
    name: {"id": servo_id, "drive_mode": 0, "homing_offset": offset, "range_min": low, "range_max": high}
    for servo_id, (name, offset, low, high) in enumerate(
        [
            ("shoulder_pan", -1321, 1030, 3460),
            ("shoulder_lift", -1053, 827, 3225),
            ("elbow_flex", 899, 925, 3161),
            ("wrist_flex", 0, 954, 3305),
            ("wrist_roll", 0, 33, 4009),
            ("gripper", 0, 1452, 2958),
        ],
        start=1,
    )
}


@pytest.fixture
def lerobot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_LEROBOT_CALIBRATION", str(tmp_path / "calibration"))
    folder = tmp_path / "calibration" / "robots"
    for name in ("so101_follower", "so_follower"):
        (folder / name).mkdir(parents=True)
    return folder


def test_lerobot_s_files_are_found_under_both_names_and_their_zero_is_asked_for(
    lerobot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L21, reference B: the folder's name changed in 0.4.3, and its zero is the middle or the pose that was held."""
    words = ["file=black", f"output={tmp_path}/ours.json"]
    with pytest.raises(ConfigError, match=r"so101_follower/black\.json: cannot be read: No such file"):
        calibrate(Person(), monkeypatch, *words)
    (lerobot / "so_follower" / "black.json").write_text(json.dumps(AUTHOR))
    with pytest.raises(ConfigError, match="The second is off the first by shoulder_pan -17.4 degrees, wrist_flex -7.3"):
        calibrate(Person(), monkeypatch, *words)
    person = Person()
    calibrate(person, monkeypatch, *words, "zero=middle_of_range")
    assert "wrist_roll has no range" not in person.getvalue()
    assert load_calibration(tmp_path / "ours.json").joints["shoulder_pan"].zero_ticks == 2245
    calibrate(Person(), monkeypatch, *words, "zero=held_pose")
    assert load_calibration(tmp_path / "ours.json").joints["shoulder_pan"].zero_ticks == 2047
    assert load_calibration(tmp_path / "ours.1.json").joints["shoulder_pan"].zero_ticks == 2245

    forced = {**AUTHOR, "wrist_roll": {**AUTHOR["wrist_roll"], "range_min": 0, "range_max": 4095}}
    (lerobot / "so101_follower" / "black.json").write_text(json.dumps(forced))
    with pytest.raises(ConfigError, match=r"so101_follower/black\.json and .*so_follower/black\.json differ"):
        calibrate(Person(), monkeypatch, *words)
    words[0] = f"file={lerobot}/so101_follower/black.json"
    person = Person()
    assert calibrate(person, monkeypatch, *words, "zero=middle_of_range") == 0
    assert person.getvalue().splitlines()[0] == (
        f"note: {words[0].removeprefix('file=')}: wrist_roll has no range of its own (LeRobot from 0.4.3 on writes "
        "0 .. 4095 for it, without a sweep): its 0 is where it was held by eye, and its stops are unknown, so that it "
        "can be driven into them; sweep this arm for both"
    )
    # A roll of 0 .. 4095 against the range of a real one, 340 degrees:
    with pytest.raises(DataError, match=r"wrist_roll 360 degrees here, 320 there \(LeRobot from 0\.4\.3 on"):
        save_calibration(tmp_path / "leader.json", replaced_ranges(AUTHOR, wrist_roll=(252, 3895)))
        calibrate(Person(), monkeypatch, words[0], f"compare={tmp_path}/leader.json")  # ranges need no zero


def test_a_file_alone_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "black.json").write_text(json.dumps(AUTHOR))
    person = Person()
    assert calibrate(person, monkeypatch, f"file={tmp_path}/black.json") == 0
    rows = [line.split() for line in person.getvalue().splitlines()]
    assert rows[0] == ["joint", "id", "offset", "min", "zero", "max", "degrees", "usual"]
    # 2430 ticks of 360 / 4096 degrees, and of the model -1.92 .. 1.92 rad
    assert rows[2] == ["shoulder_pan", "1", "-1321", "1030", "2245", "3460", "214", "220"]
    assert len(rows) == 2 + 6 + 1
    assert person.getvalue().splitlines()[-1].startswith("port= of the arm compares this with its servos")

    save_calibration(tmp_path / "same.json", replaced_ranges(AUTHOR))
    calibrate(person := Person(), monkeypatch, f"file={tmp_path}/black.json", f"compare={tmp_path}/same.json")
    assert person.getvalue().startswith(f"the ranges are those of {tmp_path}/same.json\n")


def replaced_ranges(content: dict[str, dict[str, int]], **ranges: tuple[int, int]) -> Calibration:
    joints = {}
    for name, entry in content.items():
        low, high = ranges.get(name, (entry["range_min"], entry["range_max"]))
        joints[name] = JointCalibration(entry["id"], 0, entry["homing_offset"], low, high, (low + high) / 2)
    return Calibration(joints)


def test_export_writes_what_every_version_of_lerobot_finds(
    lerobot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lerobot / "so_follower" / "black.json").write_text("{}")
    save_calibration(tmp_path / "ours.json", SIM_CALIBRATION)
    person = Person()
    assert calibrate(person, monkeypatch, f"file={tmp_path}/ours.json", "export=black") == 0
    for name in ("so101_follower", "so_follower"):
        content = json.loads((lerobot / name / "black.json").read_text())
        assert content["elbow_flex"] == {
            "id": 3, "drive_mode": 0, "homing_offset": -803, "range_min": 975, "range_max": 3217
        }  # fmt: skip
    assert (lerobot / "so_follower" / "black.1.json").read_text() == "{}"
    assert "so_follower/black.json: written; what was there is now " in person.getvalue()


# Poses (degrees) that the original author measured with a tape: x and |y| in m, of the base frame.
TAPE = [
    ([1.23, 103.74, -85.41, -1.54, 92.70], (0.440, 0.010)),
    ([-0.53, -98.11, 94.37, 76.09, 92.79], (0.135, 0.010)),
    ([22.15, 53.19, -41.63, 79.52, 92.88], (0.280, 0.120)),
]


@pytest.mark.parametrize("elbow_off_deg", [0.0, -12.5])
def test_the_ruler_finds_an_elbow_12_degrees_off(
    live_arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elbow_off_deg: float
) -> None:
    """Row 35, against the tape of the original author: x within 1.5 cm (his |y| in the third pose is 1.9 cm off)."""
    path = tmp_path / "arm.json"
    elbow = SIM_CALIBRATION.joints["elbow_flex"]
    wrong = replace(elbow, zero_ticks=elbow.zero_ticks - elbow_off_deg * 4096 / 360)
    save_calibration(path, Calibration({**SIM_CALIBRATION.joints, "elbow_flex": wrong}))
    tape = iter(TAPE)

    def measure() -> None:
        degrees, (x, y) = next(tape)
        live_arm.servos.move_by_hand(np.append(np.radians(degrees), 0))
        z = forward(np.radians(degrees))[0][2]
        person.press(
            "what?" if degrees is TAPE[0][0] else f"{100 * x - 3.9:.1f} {-100 * min(y, 0.11):.1f}, {100 * z:.1f}"
        )

    person = Person("goes limp", Put_the_arm=measure, Three_numbers=lambda: person.press("40.1 1 -2.1"))
    words = [f"port={live_arm.path}", f"file={path}", "test=ruler"]
    assert calibrate(person, monkeypatch, *words) == (1 if elbow_off_deg else 0)
    assert person.getvalue().count("good") == (0 if elbow_off_deg else 4)  # each pose, and all of them
    assert ("failed: 3 of 3 poses are more than 1.5 cm off" in person.getvalue()) == bool(elbow_off_deg)


def test_the_mirror_names_the_joint_that_the_two_arms_disagree_on(
    live_arm: LiveArm, arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 4 and L21: between the author's arms pan was 12 degrees off, and nothing said so."""
    save_calibration(tmp_path / "leader.json", SIM_CALIBRATION)
    words = [f"port={arm.path}", f"compare={tmp_path}/leader.json", f"compare_port={live_arm.path}", "test=mirror"]
    for off_deg, code in ((0, 0), (12, 1)):
        pan = ARM.joints["shoulder_pan"]
        joints = {**ARM.joints, "shoulder_pan": replace(pan, zero_ticks=pan.zero_ticks - off_deg * 4096 / 360)}
        path = tmp_path / f"follower{off_deg}.json"
        save_calibration(path, Calibration(joints))
        live_arm.servos.move_by_hand(REST)
        arm.servos.move_by_hand(REST + np.radians([1, -1, 2, -2, 3, 0]))
        person = Person("goes limp", "same pose")
        assert calibrate(person, monkeypatch, *words, f"file={path}") == code
    assert "failed: the arms differ in shoulder_pan by +13.0 degrees. Calibrate both again" in person.getvalue()


def test_what_is_missing_is_said_and_a_person_is_needed(
    arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, missing in (
        ([], "port"),
        (["port=/dev/ttyACM0"], "output"),
        (["file=a.json", "write=true"], "port"),
        (["test=ruler", "port=/dev/ttyACM0"], "file"),
        (["test=mirror", "port=/dev/ttyACM0", "file=a.json", "compare=b.json"], "compare_port"),
    ):
        with pytest.raises(
            ConfigError, match=f": {missing}: is missing; as in `python -m .* port=/dev/ttyACM0 "
        ) as error:
            parse(Config, words, "")
        assert error.value.exit_code == 2
    command = [sys.executable, "-m", "so101.tools.calibrate", f"port={arm.path}", f"output={tmp_path}/arm.json"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert result.stdout == "The follower goes limp now: hold it or lay it down, and press Enter.\n"
    assert result.stderr == "the input ended, and a person has to press Enter here; run this in a terminal\n"


def test_the_table_is_redrawn_in_place_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(["a\n1", "a\n2", "a\n3"])
    person = Person()
    person.isatty = lambda: True
    person.acts["2"] = person.press  # seen after the third look
    monkeypatch.setattr("so101.tools.ask.REDRAW_EVERY", 0.0)
    person.run(monkeypatch, lambda: until_enter(lambda: next(looks)))
    up = "\x1b[{}A\x1b[J"
    assert person.getvalue() == f"a\n1\n{up.format(2)}a\n2\n{up.format(3)}a\n3\n"  # Enter went one line down


def test_a_silent_servo_is_named_before_anything_goes_limp(
    arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm.servos.present[3:] = [False] * 3
    with pytest.raises(HardwareError, match=r"wrist_flex \(id 4\) does not answer, nor does anything behind it"):
        calibrate(Person(), monkeypatch, f"port={arm.path}", f"output={tmp_path}/arm.json")

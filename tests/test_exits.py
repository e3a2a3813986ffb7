"""Every way out of record.py, as a real process: what the last bytes on the servos' line were, and where the arm is.

On the pseudo-terminal this process is the arm and listens to each byte; in the simulation the program tells at its
end how it left the servos. The number of instants is small by default; `-m slow` makes it 50 of each.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import LiveArm

from so101.data.dataset import open_dataset
from so101.errors import HardwareError
from so101.rig import ArmConfig
from so101.robot.calibration import save_calibration
from so101.robot.kinematics import jaw_angle
from so101.robot.safety import AT_REST
from so101.sim.servos import SIM_CALIBRATION, SimServos
from so101.tools import release

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no pseudo-terminals")
ROOT = Path(__file__).parent.parent
REST = np.array(ArmConfig().rest)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
IDS = [1, 2, 3, 4, 5, 6]
LONGEST_S = 9.0  # from the first byte to the end of the second episode
STARTED = b"\x03\x28\x01"  # WRITE, Torque_Enable, on


class Listened(LiveArm):
    """An arm at rest that keeps what was written to it: (bytes, torque of its joints (6,) before)."""

    def __init__(self, link: Path) -> None:
        servos = SimServos()
        servos.angle[:] = [*REST[:5], jaw_angle(REST[5])]
        self.sent: list[bytes] = []
        super().__init__(servos, link)
        write = self.port.write

        def listen(data: bytes) -> int:
            self.sent.append(data)
            return write(data)

        self.port.write = listen  # type: ignore[method-assign]

    def is_at_rest_and_limp(self) -> bool:
        """Whether it lies where it may, and the last that it was told, joint by joint, was to let go."""
        told = [(data[2], data[4:7]) for data in self.sent[-6:]]
        let_go = told == [(servo_id, b"\x03\x28\x00") for servo_id in IDS]
        unused = not any(STARTED in data for data in self.sent)  # interrupted before it was ever switched on
        lies = np.abs(self.servos.angle[:5] - REST[:5]).max() < AT_REST
        return bool(lies and not self.servos.torque_on.any() and (let_go or unused))


class Workplace:
    """A follower, a leader in a moving hand, and a camera, all as real as a pseudo-terminal and a file can be."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.dataset = folder, folder / "demos"
        self.follower, self.leader = Listened(folder / "follower"), Listened(folder / "leader")
        save_calibration(folder / "arm.json", SIM_CALIBRATION)
        writer = cv2.VideoWriter(str(folder / "camera.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 30, (64, 48))
        for noise in np.random.default_rng(0).integers(0, 255, (10, 48, 64, 3), np.uint8):
            writer.write(noise)
        writer.release()
        arms = {
            name: {"port": str(folder / name), "calibration": str(folder / "arm.json")}
            for name in ("follower", "leader")
        }
        config = {
            "dataset": str(self.dataset),
            "episodes": 1000,
            "resume": True,
            "rig": {**arms, "cameras": {"wrist": {"source": str(folder / "camera.avi"), "width": 64, "height": 48}}},
            "env": {"reset_time_s": 0.1, "control_time_s": 0.8},
            "preprocess": {"crop": [0, 8, 48, 48], "image_size": 32},
        }
        (folder / "record.json").write_text(json.dumps(config))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._wave()

    def _wave(self) -> None:
        """The person's hand never rests."""
        servos = self.leader.servos
        servos.move_by_hand(servos.angle + [0.02 * np.cos(servos.now), 0, 0, 0, 0, 0])
        servos.after(0.1, self._wave)

    def record(self) -> "subprocess.Popen[bytes]":
        """record.py, from its first byte on the line on."""
        self.follower.sent.clear()
        with open(self.folder / "errors.txt", "w") as errors:
            process = subprocess.Popen(
                [sys.executable, "record.py", "--config", str(self.folder / "record.json")],
                cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip
        self.processes.append(process)
        while not self.follower.sent:
            assert process.poll() is None, self.errors()
            time.sleep(0.01)
        return process

    def errors(self) -> str:
        """What record.py has said on stderr."""
        return (self.folder / "errors.txt").read_text()

    def end(self, process: "subprocess.Popen[bytes]") -> tuple[int, str]:
        """Its exit code, and what it said on stderr, without a traceback."""
        code = process.wait(60)
        assert "Traceback" not in self.errors(), self.errors()
        return code, self.errors()

    def finished(self) -> int:
        """How many episodes there are, each of which reads back."""
        if not self.dataset.exists():
            return 0
        episodes = open_dataset(self.dataset).episodes
        for episode in episodes:
            frames = sum(1 for _ in episode.frames("wrist"))
            assert frames == episode.length == len(episode.columns()["action"])
        return len(episodes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()  # one of a scenario that failed
            process.wait()
        self.follower.close()
        self.leader.close()


def wait_for(happened: Callable[[], object], process: "subprocess.Popen[bytes]") -> None:
    while not happened():
        assert process.poll() is None
        time.sleep(0.01)


def interrupted(place: Workplace, instants: list[tuple[float, signal.Signals]]) -> None:
    """After each signal the arm is at rest, and limp joint by joint."""
    for instant, number in instants:
        process = place.record()
        time.sleep(instant)
        process.send_signal(number)
        code, errors = place.end(process)
        assert code == 130 and errors.splitlines()[-1] == "interrupted", (instant, errors)
        assert place.follower.is_at_rest_and_limp(), (instant, errors, place.follower.sent[-8:])
        assert not place.leader.servos.torque_on.any(), (instant, errors)
        place.finished()


def killed(place: Workplace, instants: list[float]) -> None:
    """After each kill the arm holds, the next start says so and goes on, and each finished episode reads back."""
    had, servos = 0, place.follower.servos
    for instant, number in [*((instant, signal.SIGKILL) for instant in instants), (LONGEST_S / 2, signal.SIGINT)]:
        held = servos.torque_on.any()
        process = place.record()
        time.sleep(instant)
        process.send_signal(number)
        _, errors = place.end(process)
        assert ("the arm still holds, from a program that was killed" in errors) == held, (instant, errors)
        assert place.finished() >= had
        had = place.finished()
    assert place.follower.is_at_rest_and_limp(), errors


def overheated(place: Workplace) -> None:
    """A safety stop brings the arm to rest as well, and has its exit code."""
    process = place.record()
    wait_for(place.dataset.exists, process)
    place.follower.play(fault="temperature", ids=[3], value=68)
    code, errors = place.end(process)
    assert code == 5, errors
    assert errors.endswith("elbow_flex: servo at 68 deg C; let it cool before going on\n")
    assert place.follower.is_at_rest_and_limp(), errors


def blocked(place: Workplace) -> None:
    """An arm that cannot come to rest is held with half its torque until somebody presses Ctrl-C."""
    process = place.record()
    wait_for(place.dataset.exists, process)
    servos = place.follower.servos
    process.send_signal(signal.SIGTERM)
    servos.block([1])
    wait_for(
        lambda: "It holds with reduced torque: support it, then press Ctrl-C to release it" in place.errors(), process
    )
    assert "shoulder_lift: 0.3" in place.errors()
    assert servos.torque_on.all()
    limits = [int.from_bytes(servos.read_memory(index, 48, 2), "little") for index in range(6)]
    assert limits == [500] * 5 + [200]
    process.send_signal(signal.SIGINT)
    code, errors = place.end(process)
    assert code == 130 and "interrupted again: the arm was released where it was" in errors
    assert not servos.torque_on.any()


def unplugged(place: Workplace) -> None:
    """An adapter that is pulled out for good ends the program in words, within its patience."""
    process = place.record()
    wait_for(place.dataset.exists, process)
    place.follower.play(fault="unplug")
    code, errors = place.end(process)
    assert code == 3, errors
    assert "It may still hold: support it, and cut its power" in errors
    place.finished()


SCENARIOS: dict[str, Callable[[Workplace], None]] = {
    "SIGINT": lambda place: interrupted(place, [(instant, signal.SIGINT) for instant in (0.2, 2.4)]),
    "SIGTERM": lambda place: interrupted(place, [(instant, signal.SIGTERM) for instant in (1.1, 5.0)]),
    "SIGKILL": lambda place: killed(place, [0.6, 5.5]),
    "a hot servo": overheated,
    "a blocked joint": blocked,
    "an adapter pulled out": unplugged,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[None]"]]:
    """All scenarios at the same time: each of them mostly waits for its arm."""
    folder = tmp_path_factory.mktemp("workplaces")

    def play(number: int, scenario: Callable[[Workplace], None]) -> None:
        place = Workplace(folder / str(number))
        try:
            scenario(place)
        finally:
            place.close()

    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {name: pool.submit(play, number, scenario) for number, (name, scenario) in enumerate(SCENARIOS.items())}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_way_out_of_record_on_the_pseudo_terminal(name: str, outcomes: dict[str, "Future[None]"]) -> None:
    """Field record 32, 34: an arm left up, and torque left on in the servos behind the one that complained."""
    outcomes[name].result()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_fifty_random_instants_on_the_pseudo_terminal(number: signal.Signals, tmp_path: Path) -> None:
    def play(seed: int) -> None:
        instants = np.random.default_rng([number, seed]).uniform(0, LONGEST_S, 10).tolist()
        place = Workplace(tmp_path / str(seed))
        try:
            if number == signal.SIGKILL:
                killed(place, instants)
            else:
                interrupted(place, [(instant, number) for instant in instants])
        finally:
            place.close()

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(play, range(5)))


# Runs record.py, and at its end tells how it left its simulated servos: the follower's, then the leader's.
TELLING = """
import atexit, json, runpy, sys
import so101.rig
from so101.sim.servos import SimServos

left, script = sys.argv.pop(1), sys.argv.pop(1)
arms = []

class Kept(SimServos):
    def __init__(self):
        super().__init__()
        arms.append(self)

def tell():
    told = [{"angle": arm.angle.tolist(), "torque": arm.torque_on.tolist()} for arm in arms]
    open(left, "w").write(json.dumps(told))

so101.rig.SimServos = Kept
atexit.register(tell)
runpy.run_path(script, run_name="__main__")
"""


def interrupted_in_the_simulation(folder: Path, instant: float, number: signal.Signals) -> None:
    folder.mkdir()
    command = [sys.executable, "-c", TELLING, folder / "left.json", "record.py", f"dataset={folder / 'demos'}"]
    with open(folder / "errors.txt", "w") as stderr:
        process = subprocess.Popen(
            [*command, "episodes=1000"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=stderr
        )
    try:
        wait_for((folder / "demos.record.json").exists, process)
        time.sleep(instant)
        process.send_signal(number)
        code, errors = process.wait(60), (folder / "errors.txt").read_text()
    finally:
        process.kill()
        process.wait()
    assert code == 130 and "Traceback" not in errors, errors
    follower, leader = json.loads((folder / "left.json").read_text())
    assert not any(follower["torque"]) and not any(leader["torque"]), errors
    assert np.abs(np.array(follower["angle"]) - [*REST[:5], jaw_angle(REST[5])])[:5].max() < AT_REST, errors
    if (folder / "demos").exists():
        for episode in open_dataset(folder / "demos").episodes:
            assert sum(1 for _ in episode.frames("wrist")) == episode.length


@pytest.mark.parametrize("instants", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_random_instants_in_the_simulation(instants: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(instants)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(interrupted_in_the_simulation, tmp_path / f"{number}-{nth}", rng.uniform(0, 2), number)
            for number in (signal.SIGINT, signal.SIGTERM)
            for nth in range(instants)
        ]
    for run in runs:
        run.result()


def test_release_frees_an_arm_from_any_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm = Listened(tmp_path / "arm")
    for index in range(6):
        arm.servos.store(index, "Torque_Enable", 1)
    arm.servos.overload(3)
    release.main(release.Config(port=arm.path, wait_s=0))
    assert not arm.servos.torque_on.any()
    said = capsys.readouterr().out.splitlines()
    assert said == ["support the arm: it goes limp in 0 s", "1 shoulder_pan: released", "2 shoulder_lift: released",
                    "3 elbow_flex: released", "4 wrist_flex: released", "5 wrist_roll: released",
                    "6 gripper: released"]  # fmt: skip
    for index in range(6):
        arm.servos.store(index, "Torque_Enable", 1)
    arm.servos.present[1] = False
    with pytest.raises(HardwareError, match=r"1 of 6 servos were not released; cut the arm's power. servo 2 \(should"):
        release.main(release.Config(port=arm.path, wait_s=0))
    assert arm.servos.torque_on.tolist() == [False, True, False, False, False, False]
    assert "2 shoulder_lift: failed" in capsys.readouterr().out
    arm.close()

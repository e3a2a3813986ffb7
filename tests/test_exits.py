"""Every way out of what moves an arm, as a real process: the last bytes on the servos' lines, and where the arm is.

On the pseudo-terminal this process is the arm and listens to each byte; in the simulation the program tells at its
end how it left the servos. The number of instants is small by default; `-m slow` makes it 50 of each.
"""

import fcntl
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
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
            rest = data  # what is not acknowledged may come in one piece with what follows it
            while rest:
                size = 4 + rest[3]
                self.sent.append(rest[:size])
                rest = rest[size:]
            return write(data)

        self.port.write = listen  # type: ignore[method-assign]

    def was_let_go(self) -> bool:
        """Whether the last that it was told, joint by joint, was to let go."""
        last = itertools.takewhile(lambda data: data[4:7] == b"\x03\x28\x00", reversed(self.sent))
        let_go = {data[2] for data in last} == set(IDS)  # where replies are late, some more than once
        unused = not any(STARTED in data for data in self.sent)  # interrupted before it was ever switched on
        return bool(not self.servos.torque_on.any() and (let_go or unused))

    def is_at_rest_and_limp(self) -> bool:
        """Whether it also lies where it may."""
        return bool(self.was_let_go() and np.abs(self.servos.angle[:5] - REST[:5]).max() < AT_REST)


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
        rig = {**arms, "cameras": {"wrist": {"source": str(folder / "camera.avi"), "width": 64, "height": 48}}}
        env = {"reset_time_s": 0.1, "control_time_s": 0.8}
        preprocess = {"crop": [0, 8, 48, 48], "image_size": 32}
        task = {"rig": rig, "env": env, "preprocess": preprocess}
        record = {"dataset": str(self.dataset), "episodes": 1000, **task}
        for name, config in {"record": record, "teleoperate": task, "goto": {"rig": rig, "env": env}}.items():
            (folder / f"{name}.json").write_text(json.dumps(config))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._wave()

    def _wave(self) -> None:
        """The person's hand never rests."""
        servos = self.leader.servos
        servos.move_by_hand(servos.angle + [0.02 * np.cos(servos.now), 0, 0, 0, 0, 0])
        servos.after(0.1, self._wave)

    def record(self, *settings: str, before: str = "", terminal: int | None = None) -> "subprocess.Popen[bytes]":
        """record.py, from its first byte on the line on; see `start`. What an earlier one left it goes on with."""
        resume = f"resume={str(self.dataset.exists()).lower()}"
        return self.start("record", resume, *settings, before=before, terminal=terminal)

    def start(
        self, name: str, *settings: str, before: str = "", terminal: int | None = None
    ) -> "subprocess.Popen[bytes]":
        """record, or one of the tools, from its first byte on the line on.

        `before` is done in its process first. `terminal` is the end of a pseudo-terminal that is to be its own.
        """
        self.follower.sent.clear()
        self.leader.sent.clear()
        module = name if name == "record" else f"so101.tools.{name}"
        run = f"{before}\nimport runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        screen = subprocess.DEVNULL if terminal is None else terminal
        with open(self.folder / "errors.txt", "w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", run, "--config", str(self.folder / f"{name}.json"), *settings],
                cwd=ROOT, env=ENVIRONMENT, stdin=screen, stdout=screen, stderr=errors,
                start_new_session=terminal is not None,
            )  # fmt: skip
        self.processes.append(process)
        self.wait_for(lambda: self.follower.sent, process)
        return process

    def errors(self) -> str:
        """What record.py has said on stderr."""
        return (self.folder / "errors.txt").read_text()

    def end(self, process: "subprocess.Popen[bytes]", bug: str = "", record: str = "") -> tuple[int, str]:
        """Its exit code, and what it said on stderr, with a traceback only for a `bug` (its last line).

        Its very last line must name the one flight record that it left, whose diagnosis says `record`; "": none.
        """
        code, errors = process.wait(60), self.errors()
        records = list(self.folder.glob("demos.flight/*"))
        assert len(records) == bool(record), records
        if record:
            errors, _, last = errors.removesuffix("\n").rpartition("\n")
            assert last == f"flight record: {records[0]} (diagnosis.txt says what it was)"
            assert record in " ".join((records[0] / "diagnosis.txt").read_text().split())
            errors += "\n"
        assert errors.endswith(f"{bug}\n") if bug else "Traceback" not in errors, errors
        return code, errors

    def require_safe(self) -> None:
        """The follower is at rest, and both arms were told to let go."""
        assert self.follower.is_at_rest_and_limp(), (self.errors(), self.follower.sent[-8:])
        assert self.leader.was_let_go(), (self.errors(), self.leader.sent[-8:])

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

    def wait_for(self, happened: Callable[[], object], process: "subprocess.Popen[bytes]") -> None:
        """Return when it has happened, while the process runs."""
        while not happened():
            assert process.poll() is None, self.errors()
            time.sleep(0.01)


def interrupted(place: Workplace, instants: list[tuple[float, signal.Signals]]) -> None:
    """After each signal the arm is at rest, and limp joint by joint."""
    for instant, number in instants:
        process = place.record()
        time.sleep(instant)
        process.send_signal(number)
        code, errors = place.end(process)
        assert code == 130 and errors.splitlines()[-1] == "interrupted", (instant, errors)
        place.require_safe()
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
    place.require_safe()


def overheated(place: Workplace) -> None:
    """A safety stop brings the arm to rest as well, and has its exit code."""
    process = place.record()
    place.wait_for(place.dataset.exists, process)
    place.follower.play(fault="temperature", ids=[3], value=68)
    code, errors = place.end(process, record="the follower's elbow_flex was too hot: it read 68 deg C, allowed is 65")
    assert code == 5, errors
    assert errors.endswith("elbow_flex: servo at 68 deg C; let it cool before going on\n")
    place.require_safe()


def blocked(place: Workplace) -> None:
    """An arm that cannot come to rest is held with half its torque until somebody presses Ctrl-C."""
    process = place.record()
    place.wait_for(place.dataset.exists, process)
    servos = place.follower.servos
    process.send_signal(signal.SIGTERM)
    servos.block([1])
    place.wait_for(
        lambda: "It holds with reduced torque: support it, then press Ctrl-C to release it" in place.errors(), process
    )
    assert "shoulder_lift: 0.3" in place.errors()
    assert servos.torque_on.all()
    limits = [int.from_bytes(servos.read_memory(index, 48, 2), "little") for index in range(6)]
    assert limits == [500] * 5 + [200]
    process.send_signal(signal.SIGINT)
    code, errors = place.end(process)
    assert code == 130 and "interrupted again: the arm was released where it was" in errors
    assert place.follower.was_let_go(), place.follower.sent[-8:]
    assert place.leader.was_let_go(), place.leader.sent[-8:]


def unplugged(place: Workplace) -> None:
    """An adapter that is pulled out for good ends the program in words, within its patience."""
    process = place.record()
    place.wait_for(place.dataset.exists, process)
    place.follower.play(fault="unplug")
    code, errors = place.end(process, record="the follower's USB adapter was pulled out or failed")
    assert code == 3, errors
    assert "It may still hold: support it, and cut its power" in errors
    assert place.leader.was_let_go()
    place.finished()


def finished_by_itself(place: Workplace) -> None:
    """All its episodes reached: exit code 0."""
    code, errors = place.end(place.record("episodes=2", "failures=0"))
    assert code == 0 and place.finished() == 2, errors
    place.require_safe()


TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"  # keys and hang-ups come from here


def quit_with_a_key(place: Workplace) -> None:
    master, slave = os.openpty()
    process = place.record(before=TERMINAL, terminal=slave)
    place.wait_for(lambda: place.finished() == 1, process)
    os.write(master, b"q")
    code, errors = place.end(process)
    os.close(slave)
    os.close(master)
    assert code == 0 and place.finished() >= 1, errors
    place.require_safe()


def ctrl_c_typed(name: str) -> Callable[[Workplace], None]:
    """As a person does it: the terminal makes a signal of the key, and afterwards is as it was before."""

    def scenario(place: Workplace) -> None:
        master, slave = os.openpty()
        try:
            before = termios.tcgetattr(slave)
            begin = place.record if name == "record" else functools.partial(place.start, name)
            process = begin(before=TERMINAL, terminal=slave)
            place.wait_for(place.follower.servos.torque_on.all, process)
            assert termios.tcgetattr(slave) != before  # keys come one by one, without Enter
            os.write(master, b"\x03")
            code, errors = place.end(process)
            assert code == 130 and errors.splitlines()[-1] == "interrupted", errors
            assert termios.tcgetattr(slave) == before
        finally:
            os.close(slave)
            os.close(master)
        place.require_safe()

    return scenario


def terminal_lost(place: Workplace) -> None:
    """A window that is closed, an SSH line that breaks: what is said after that nobody hears."""
    master, slave = os.openpty()
    process = place.record(before=TERMINAL, terminal=slave)
    os.close(slave)
    place.wait_for(lambda: place.finished() == 1, process)
    os.close(master)
    process.wait(60)
    place.require_safe()
    assert place.finished() >= 1
    code, errors = place.end(process)
    assert code == 130 and errors.splitlines()[-1] == "interrupted", errors


def a_bug(place: Workplace) -> None:
    """What nobody foresaw keeps its traceback, and costs the episode in progress only."""
    process = place.record(before="from so101.env import Env; Env._verdict = None")
    words = "a mistake in the program, not in the arm: env.py, line"
    code, _ = place.end(process, bug="TypeError: 'NoneType' object is not callable", record=words)
    assert code == 1 and place.finished() == 0
    place.require_safe()


def interrupted_twice(place: Workplace) -> None:
    """On the way to rest a second Ctrl-C releases the arm where it is."""
    process = place.record()
    place.wait_for(place.dataset.exists, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert place.follower.servos.torque_on.all()
    process.send_signal(signal.SIGINT)
    code, errors = place.end(process)
    assert code == 130 and "interrupted again: the arm was released where it was" in errors, errors
    assert place.follower.was_let_go(), place.follower.sent[-8:]
    assert place.leader.was_let_go(), place.leader.sent[-8:]
    place.finished()


def bounced(place: Workplace) -> None:
    """Two within BOUNCE are one."""
    process = place.record()
    place.wait_for(place.dataset.exists, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.15)
    process.send_signal(signal.SIGINT)
    code, errors = place.end(process)
    assert code == 130 and "interrupted again" not in errors, errors
    place.require_safe()


def camera_died(place: Workplace) -> None:
    """No picture any more: the take is dropped, and the next reset waits for a while (30 s; here 1)."""
    process = place.record(before="from so101.robot.camera import Camera; Camera.wait_ready.__defaults__ = (1.0,)")
    place.wait_for(lambda: place.finished() == 1, process)
    os.unlink(place.folder / "camera.avi")
    code, errors = place.end(process, record="camera wrist gave no good frames any more; the newest frame used")
    assert code == 3 and "camera wrist: no good frame for " in errors.splitlines()[-1], errors
    place.require_safe()
    assert place.finished() >= 1


def disk_lost(place: Workplace) -> None:
    """The dataset's folder takes no more files. Who is root may write anywhere, so a file lies in the way instead."""
    process = place.record()
    place.wait_for(lambda: place.finished() == 1, process)
    time.sleep(1)  # until the linter has read it too
    data, away = place.dataset / "data", place.dataset / "away"
    data.rename(away)
    data.write_text("")
    code, errors = place.end(process)
    assert code == 1 and "make room on the disk, or mend it, and resume" in errors.splitlines()[-1], errors
    place.require_safe()
    data.unlink()
    away.rename(data)
    assert place.finished() >= 1


def tool_interrupted(name: str, number: signal.Signals) -> Callable[[Workplace], None]:
    def scenario(place: Workplace) -> None:
        process = place.start(name)
        place.wait_for(place.follower.servos.torque_on.all, process)
        time.sleep(1.5)
        process.send_signal(number)
        code, errors = place.end(process)
        assert code == 130 and errors.splitlines()[-1] == "interrupted", errors
        place.require_safe()

    return scenario


SCENARIOS: dict[str, Callable[[Workplace], None]] = {
    "SIGINT": lambda place: interrupted(place, [(instant, signal.SIGINT) for instant in (0.2, 2.4)]),
    "SIGTERM": lambda place: interrupted(place, [(instant, signal.SIGTERM) for instant in (1.1, 5.0)]),
    "SIGKILL": lambda place: killed(place, [0.6, 5.5]),
    "a hot servo": overheated,
    "a blocked joint": blocked,
    "an adapter pulled out": unplugged,
    "all episodes": finished_by_itself,
    "the q key": quit_with_a_key,
    "Ctrl-C typed at record": ctrl_c_typed("record"),
    "Ctrl-C typed at teleoperate": ctrl_c_typed("teleoperate"),
    "a lost terminal": terminal_lost,
    "a bug": a_bug,
    "a second Ctrl-C": interrupted_twice,
    "a bounced Ctrl-C": bounced,
    "a dead camera": camera_died,
    "a lost disk": disk_lost,
    "teleoperate": tool_interrupted("teleoperate", signal.SIGINT),
    "goto": tool_interrupted("goto", signal.SIGTERM),
}


AT_A_TIME = 8  # with 15 of them the arms, all threads of this one process, answer too late for their programs


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[None]"]]:
    """The scenarios, AT_A_TIME of them at the same time: each mostly waits for its arm."""
    folder = tmp_path_factory.mktemp("workplaces")

    def play(number: int, scenario: Callable[[Workplace], None]) -> None:
        place = Workplace(folder / str(number))
        try:
            scenario(place)
        finally:
            place.close()

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {name: pool.submit(play, number, scenario) for number, (name, scenario) in enumerate(SCENARIOS.items())}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_way_out_on_the_pseudo_terminal(name: str, outcomes: dict[str, "Future[None]"]) -> None:
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
        while not (folder / "demos.record.json").exists():
            assert process.poll() is None, (folder / "errors.txt").read_text()
            time.sleep(0.01)
        time.sleep(instant)
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)  # faulthandler tells where it hangs
        code, errors = process.wait(), (folder / "errors.txt").read_text()
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


@pytest.mark.parametrize("instants", [2, pytest.param(25, marks=pytest.mark.slow)])
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["alternate", "parallel"])
def test_ctrl_c_typed_while_a_policy_is_trained(mode: str, tmp_path: Path) -> None:
    demos, reward, run = tmp_path / "demos", tmp_path / "reward", tmp_path / "run"
    for words in (
        ["record.py", f"dataset={demos}", "episodes=8", "failures=3", "steps_after_success=8"],
        ["train_reward.py", f"dataset={demos}", f"output={reward}", "reward.views=1", "reward.steps=60"],
    ):
        subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    words = [f"demonstrations={demos}", f"reward_model={reward}", f"output={run}", "rig.operator=null"]
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    with subprocess.Popen(
        [sys.executable, "train_sac.py", f"mode={mode}", *words],
        cwd=ROOT, env=ENVIRONMENT, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert any("the policy starts" in line for line in process.stdout)
        time.sleep(1)
        assert termios.tcgetattr(slave) != before
        os.write(master, b"\x03")
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.splitlines()[-1]) == (130, "interrupted"), errors
    assert "Traceback" not in errors and termios.tcgetattr(slave) == before
    if mode == "parallel":
        assert (run / "learner.log").read_text().endswith("ended\n")
    os.close(slave)
    os.close(master)


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
    arm.play(after=0.2, fault="unplug")
    with pytest.raises(HardwareError, match="^6 of 6 servos were not released; cut the arm's power. WRITE") as told:
        release.main(release.Config(port=arm.path, wait_s=0.5))
    assert str(told.value).count("the port failed") == 1
    arm.close()

"""The simulated workplace as another program meets it: arms through pyserial, the camera through OpenCV."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serial

from so101.config import load
from so101.data.dataset import open_dataset
from so101.env import EnvConfig, straight_down_at
from so101.rig import ArmConfig, RigConfig, open_rig
from so101.robot.arm import Arm
from so101.robot.bus import ServoBus, ServoError
from so101.robot.camera import Camera
from so101.robot.kinematics import URDF_LIMITS, forward, jaw_angle
from so101.robot.ports import holders
from so101.schema import Preprocess, RewardSpec
from so101.sim.camera import SimCamera
from so101.sim.servos import SIM_CALIBRATION, SimServos
from so101.timing import SUBSTEP, Clock
from so101.tools.serve_sim import Config, Table

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
    path = port_of(server)
    with serial.Serial(path, 1_000_000, timeout=0.05) as port:
        bus = ServoBus(port)
        assert bus.ping(1) == 777
        # who has the port is told to be ended: that is this program, and not the arm itself
        assert list(holders(path)) == [os.getpid()] or not Path("/proc").exists()
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
        assert server.stderr is not None
        x, y, z = forward(np.array([0.5, *ArmConfig().rest[1:]]))[0] * 100
        assert server.stderr.readline() == (
            f"leader: between its fingertips a tape measures x {x - 3.9:.1f}, y {abs(y):.1f}, z {z:.1f} cm\n"
        )


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


def test_a_line_that_is_not_understood_is_told_and_the_arm_stays(server: "subprocess.Popen[str]") -> None:
    assert server.stdin is not None and server.stderr is not None
    with serial.Serial(port_of(server), 1_000_000, timeout=0.05) as port:
        bus = ServoBus(port, retries=0)
        for typed, said in [
            ('{"fault": "vanish"', "script: not JSON ("),
            ('{"fault": "vanisch"}', 'script: fault: got "vanisch", must be null or one of "vanish", '),
            ('{"fault": "voltage"}', "script: value: the fault 'voltage' needs one"),
            ('{"arm": "leader", "fault": "mute"}', "script: there is no leader; start with leader=true"),
            ('{"cube": null}', "script: there is no cube; start with camera=true"),
        ]:
            server.stdin.write(typed + "\n")
            server.stdin.flush()
            line = server.stderr.readline()
            assert line.startswith(said) and line.endswith(". Nothing was done; --help tells what a line may say\n")
            assert is_there(bus, 4)
        tell(server, fault="mute", ids=[4])  # and the next one counts
        until(lambda: not is_there(bus, 4))
    server.terminate()
    assert server.wait(5) == 0


def test_ctrl_c_typed_at_its_terminal_ends_it(tmp_path: Path) -> None:
    master, slave = os.openpty()
    before, folder = termios.tcgetattr(slave), tmp_path / "arm"
    with subprocess.Popen(
        [sys.executable, "-m", "so101.tools.serve_sim", f"folder={folder}"],
        stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert port_of(process) == str(folder / "follower")
        time.sleep(0.3)
        os.write(master, b"\x03")
        assert process.wait(5) == 0 and not folder.exists()
        said = process.stderr.read().splitlines()
        assert len(said) == 1 and said[0].startswith("Type what happens, ")  # to a person only
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)


def test_a_fault_rate_that_is_none_is_refused() -> None:
    command = [sys.executable, "-m", "so101.tools.serve_sim", "fault_rate=2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert result.returncode == 2
    assert "fault_rate: got 2.0, must be 0 or more and at most 1" in result.stderr


# ---- the table and the camera

HOME = np.array([0.25, 0.0, 0.07])
ROOT = Path(__file__).parent.parent


def cube_in(frame: np.ndarray) -> np.ndarray:
    """Where the cube is in a picture: the mean column and row of what is red, in px."""
    red = frame.astype(int)
    rows, columns = np.nonzero(red[..., 0] > 2 * red[..., 1] + 20)
    assert len(rows) > 200, "the cube is not in the picture"
    return np.array([columns.mean(), rows.mean()])


class Follower:
    """A follower's servos with torque, and the table under it; the test is the program that gives the goals."""

    def __init__(self, **config: Any) -> None:
        self.servos = SimServos()
        self.servos.angle[:] = [*straight_down_at(HOME, URDF_LIMITS.T), jaw_angle(0.5)]
        self.table = Table(Config(camera=True, **config), self.servos)
        for servo in range(6):
            self.servos.store(servo, "Goal_Position", self.ticks(servo))
            self.servos.store(servo, "Torque_Enable", 1)

    def ticks(self, servo: int) -> int:
        return int.from_bytes(self.servos.read_memory(servo, 56, 2), "little")  # Present_Position

    def order(self) -> None:
        """What a control step does: every servo gets a goal, here the one that it has."""
        for servo in range(6):
            self.servos.write_memory(servo, 42, self.servos.read_memory(servo, 42, 2))  # Goal_Position

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / SUBSTEP)):
            self.servos.step(SUBSTEP)
            self.table.step(SUBSTEP)

    def moved(self, seconds: float) -> bool:
        """Whether the cube is put down anew within so many seconds."""
        before = self.table.world.cube_position
        self.run(seconds)
        return bool((self.table.world.cube_position != before).any())


def test_the_cube_is_put_back_once_when_the_arm_waits_over_the_table_after_an_episode() -> None:
    follower = Follower()
    world, light = follower.table.world, follower.table.world.light
    assert not follower.moved(2.0)  # nobody has been at work yet
    for _ in range(20):  # an episode: goals at 10 Hz, even where they ask for nothing
        follower.order()
        assert not follower.moved(0.1)
    assert not follower.moved(0.38) and follower.moved(0.1)  # half a second after the last of them
    assert world.light is not light and follower.table.scene.light is world.light
    assert np.abs(world.cube_position[:2] - [0.25, 0]).max() <= 0.03
    assert not follower.moved(5.0)  # once: who waits longer, for a learner say, finds it where it was


@pytest.mark.parametrize("why", ["gripper closed", "over the cube", "limp", "place=false"])
def test_the_cube_stays_where_it_is_while_the_arm_may_still_need_it(why: str) -> None:
    follower = Follower(place=why != "place=false")
    if why == "gripper closed":
        follower.servos.angle[5] = jaw_angle(0.1)
        follower.servos.store(5, "Goal_Position", follower.ticks(5))
    elif why == "over the cube":
        follower.servos.angle[:5] = straight_down_at(np.array([0.18, 0.1, 0.03]), URDF_LIMITS.T)
        for servo in range(5):
            follower.servos.store(servo, "Goal_Position", follower.ticks(servo))
    follower.order()
    if why == "limp":
        follower.servos.store(1, "Torque_Enable", 0)
    assert not follower.moved(3.0)


def test_a_push_is_in_the_scene_that_the_camera_draws() -> None:
    """The arm sweeps through the cube and comes back: from the same pose the camera sees it further to the left."""
    follower = Follower(place=False)
    camera = SimCamera(Config().sim_camera, lambda: follower.table.scene, Clock(), np.random.default_rng(0))
    follower.table.world.place_cube(0.25, 0.035, 0.0)
    follower.run(SUBSTEP)
    before = cube_in(camera.latest()[0])
    for y, z in [(0.0, 0.016), (0.06, 0.016), (0.06, 0.07), (0.0, 0.07)]:
        start, goal = follower.servos.angle[:5].copy(), straight_down_at(np.array([0.25, y, z]), URDF_LIMITS.T)
        for servo in range(6):
            follower.servos.store(servo, "Torque_Enable", 0)
        for share in np.linspace(0, 1, 40):
            follower.servos.angle[:5] = start + share * (goal - start)
            follower.table.step(SUBSTEP)
    after = cube_in(camera.latest()[0])
    assert follower.table.world.cube_position[1] > 0.055
    assert after[0] < before[0] - 40  # px; y is to the left


def test_the_stream_is_a_camera_and_rig_json_names_all_of_it(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "sim_arm"
    server = start("leader=true", "camera=true", f"folder={folder}", "place=false")
    follower, leader, stream = (port_of(server) for _ in range(3))
    rig = load(RigConfig, folder / "rig.json")
    assert rig.leader is not None
    assert [rig.follower.port, rig.leader.port, rig.cameras["wrist"].source] == [follower, leader, stream]
    assert Path(rig.follower.calibration or "").is_file() and rig.follower.calibration == rig.leader.calibration
    with closing(Camera("wrist", rig.cameras["wrist"], Clock())) as camera:
        tell(server, cube=[0.28, 0.05, 0.2])
        until(lambda: cube_in(camera.latest()[0])[0] < 300)
        tell(server, cube=[0.28, -0.05, 0.2])
        until(lambda: cube_in(camera.latest()[0])[0] > 340)
        first, taken = camera.latest()
        until(lambda: camera.latest()[1] != taken)
        assert (camera.latest()[0] != first).any()  # a sensor's noise: no two frames are alike
        until(lambda: camera.rate == pytest.approx(30, rel=0.1))
        assert camera.report() == "" and camera.outages == 0
    server.terminate()
    assert server.wait(5) == 0 and not folder.exists()
    assert server.stderr is not None and server.stderr.read() == ""


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "so101.tools.serve_sim", f"folder={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert result.returncode == 4 and "exists already; name another with folder=" in result.stderr


@pytest.mark.slow
def test_the_control_loop_pushes_the_cube_through_the_ports_and_sees_it_on_the_stream(
    start: Start, tmp_path: Path
) -> None:
    """All real but the metal: packets, pseudo-terminals, the safe start and end, HTTP, JPEG, the rate."""
    server = start("camera=true", "place=false", f"folder={tmp_path / 'arm'}")
    port_of(server), port_of(server)
    config, spec = EnvConfig(random_ee_reset=False, reset_time_s=0.6), Preprocess()
    with open_rig(load(RigConfig, tmp_path / "arm" / "rig.json"), 0) as rig:
        env = rig.make_env(config, spec, RewardSpec(), 0)
        tell(server, cube=[0.25, 0.035, 0.0])
        seen = []
        for turn in range(2):
            observation, _ = env.reset()
            seen.append(cube_in(observation.frames["wrist"]))
            for y, z, ticks in [(0, -1, 4), (1, 0, 4), (0, 0, 2)] if turn == 0 else []:
                for _ in range(ticks):
                    env.step(np.array([0.0, y, z, 1.0]))
        assert seen[1][0] < seen[0][0] - 40


@pytest.mark.slow
def test_a_recording_at_the_served_workplace_finds_the_cube_placed_anew_each_time(start: Start, tmp_path: Path) -> None:
    server = start("leader=true", "camera=true", f"folder={tmp_path / 'arm'}")
    port_of(server), port_of(server), port_of(server)
    for second in range(90):  # a hand that never rests
        tell(server, after=second, arm="leader", move={"shoulder_pan": 0.2 * (-1) ** second}, seconds=1)
    words = [f"rig={tmp_path / 'arm' / 'rig.json'}", f"dataset={tmp_path / 'demos'}", "episodes=3", "failures=0"]
    words += ["env.control_time_s=3", "env.reset_time_s=1"]
    recorded = subprocess.run(
        [sys.executable, "record.py", *words],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert recorded.returncode == 0, recorded.stderr
    episodes = open_dataset(tmp_path / "demos").episodes
    places = [cube_in(episode.frame("wrist", 0)) for episode in episodes]
    assert len(places) == 3 and all(np.abs(a - b).max() > 4 for a, b in zip(places, places[1:], strict=False))
    driven = [
        sys.executable, "-m", "so101.tools.teleoperate", words[0], "seconds=3", "env.reset_time_s=1",
    ]  # fmt: skip
    result = subprocess.run(driven, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "30 ticks: mean 1" in result.stdout, result.stderr

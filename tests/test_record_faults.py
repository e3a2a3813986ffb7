"""Each fault at each phase of an episode: what is on the disk afterwards, how the arms are left, and what was said.

In simulated time, with short takes and small pictures. One episode is finished before anything fails.
"""

import contextlib
import itertools
import re
import shutil
from typing import NamedTuple

import numpy as np
import pytest
from test_record import FaultyCamera, Scripted, labels_of, recording  # noqa: F401  (a fixture)

import record
import train_sac
from so101.actor import Actor
from so101.data import layout, writer
from so101.data.dataset import open_dataset
from so101.data.labels import labels_path
from so101.data.writer import DatasetWriter
from so101.env import EnvConfig
from so101.errors import HardwareError, SafetyStop, UserError
from so101.learn.link import Link
from so101.learn.sac import make_policy
from so101.rig import RigConfig, open_rig
from so101.robot import safety
from so101.robot.camera import CameraConfig
from so101.robot.feetech import REGISTERS
from so101.robot.safety import AT_REST
from so101.robot.teleop import TRAINING, YOU_DRIVE
from so101.runlog import RunLog
from so101.schema import Preprocess
from so101.sim.camera import CameraConfig as SimCameraConfig
from so101.sim.operator import OperatorConfig
from so101.sim.script import Event, play
from so101.timing import SUBSTEP

RESET, IN_THE_TAKE = (1, 0), (1, 5)  # (take, look), see Scripted
TAKE_STEPS = 8
SMALL = {
    "rig": RigConfig(
        cameras={"wrist": CameraConfig(source="sim", width=64, height=48)},
        sim_camera=SimCameraConfig(width=64, height=48),
        operator=OperatorConfig(interventions=False),
    ),
    "env": EnvConfig(control_time_s=TAKE_STEPS / 10, reset_time_s=0.1),
    "preprocess": Preprocess(crop=[0, 8, 48, 48], image_size=32),
}


class Fault(NamedTuple):
    """What happens to an arm, or to the camera; and what it leads to at each phase.

    `error` None is a fault that is outlasted. `said` is in the error, or else on stderr. `left` is how the follower
    may be left. `slow` is what is noticed after a while only, when the take in progress may be finished.
    """

    event: Event | None
    error: type[UserError] | None = None
    said: str = ""
    left: tuple[str, ...] = ("at rest",)
    arm: str = "follower"
    slow: bool = False


def replies(kind):
    return Event(fault="replies", value=0.05, kinds=[kind])


FAULTS = {
    "replugged": Fault(Event(fault="unplug", seconds=0.5), said="the port failed .simulated: Input/output error"),
    "mute for a moment": Fault(Event(fault="mute", ids=[4], seconds=0.5), said="servo 4 .wrist_flex.: no valid reply"),
    "replies dropped": Fault(replies("drop"), said="bad answers: .*no reply"),
    "replies late": Fault(replies("late"), said="bad answers: .*no reply"),
    "replies truncated": Fault(replies("truncate"), said="bad answers: .*truncated"),
    "replies corrupted": Fault(replies("corrupt"), said="bad answers: .*checksum"),
    "replies echoed": Fault(replies("echo"), said="bad answers: .*unexpected"),
    "lost picture": Fault(None, said="episode dropped: camera wrist: newest frame is 0.7 s old"),
    "unplugged": Fault(
        Event(fault="unplug"), HardwareError, "the port failed, and cannot be opened again", ("unheard",)
    ),
    "power lost for a moment": Fault(
        Event(fault="vanish", ids=[4], seconds=0.5), SafetyStop, "wrist_flex: limp though it was switched on", ("held",)
    ),
    "overload": Fault(  # its servo may be too weak for the way to rest
        Event(fault="overload", ids=[3]), SafetyStop, "elbow_flex: servo reports overload", ("at rest", "held")
    ),
    "heat": Fault(Event(fault="temperature", ids=[2], value=68), SafetyStop, "shoulder_lift: servo at 68 deg C"),
    "low voltage": Fault(Event(fault="voltage", value=3.9), SafetyStop, "servo at 3.9 V; check the supply", slow=True),
    "blocked": Fault(
        Event(fault="block", ids=[2, 3, 4]), SafetyStop, "what blocks|free the joint", ("held",), slow=True
    ),
    "leader's power lost for a moment": Fault(
        Event(fault="vanish", ids=[4], seconds=0.5), said="servo 4 .wrist_flex.: no valid reply", arm="leader"
    ),
    "leader unplugged": Fault(Event(fault="unplug"), HardwareError, "cannot be opened again", arm="leader"),
}
UNNOTICED = [("close", "lost picture"), ("close", "leader's power lost for a moment")]  # nobody looks there then
PHASES = ["reset", "recording", "intervention", "save", "close"]
ALIKE = ["replies truncated", "replies echoed", "replies corrupted"]  # to the program, as dropped ones


def port_of(rig, arm):
    return (rig.arm if arm == "follower" else rig.teleop.leader.arm).bus.port


def servos_of(rig, arm):
    return port_of(rig, arm).servos


def strike(rig, fault):
    """Let it happen, now."""
    if fault.event is None:
        camera = rig.cameras["wrist"]
        camera.fails_at.add(camera.looks + 1)
    else:
        play(fault.event, port_of(rig, fault.arm))
        rig.clock.sleep_until(rig.clock.now() + SUBSTEP)


def strike_while_saving(fault, rig_of, monkeypatch):
    """Between the second and the third of the four files of an episode."""
    moved, move = itertools.count(1), writer._move

    def move_and_strike(*paths):
        move(*paths)
        if next(moved) == 2:
            strike(rig_of(), fault)

    monkeypatch.setattr(writer, "_move", move_and_strike)


def strike_while_closing(fault, rig, saved):
    """As soon as time passes after the file `saved` appeared: what moves then is on its way to rest."""
    waiting = iter([True])

    def look(dt):
        if saved.exists() and next(waiting, False):
            play(fault.event, port_of(rig, fault.arm))

    rig.clock.on_substep.append(look)


class Blind:
    """In place of the encoder."""

    def see(self, observation):
        return observation


def make_actor(folder, config):
    """An actor without a learner, which acts at random."""
    episodes = DatasetWriter(folder, fps=10, cameras=config.rig.frame_sizes, task="online", schema=config.schema())
    starts = np.array([config.env.home])
    log, policy = RunLog(folder.parent), make_policy(config.sac, 1, 4)
    return Actor(Link("actor"), episodes, log, policy, Blind(), config.reward, starts, config.steps, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A dataset of one episode, to go on with."""
    folder = tmp_path_factory.mktemp("finished") / "demos"
    record.main(record.Config(dataset=str(folder), episodes=1, failures=1, **SMALL))
    return folder


@pytest.fixture
def intervention(tmp_path):
    """The policy drives, and from the second step of the first episode on a person, who holds the leader."""

    def run(keys, episodes, resume, **settings):
        config = train_sac.Config(steps=TAKE_STEPS * (episodes - 1), **settings)
        with open_rig(config.rig, 0) as rig:
            run.rig, hand = rig, servos_of(rig, "leader")

            def push():
                hand.move_by_hand(hand.angle + [0.05, 0.03, 0, 0, 0, 0])

            keys = {**{(1, look): push for look in range(4, TAKE_STEPS + 2)}, (1, 3): "intervene", **keys}
            run.person = rig.teleop.keys = Scripted(rig.teleop.keys, keys, announced=(TRAINING,))
            rig.cameras = {"wrist": FaultyCamera((), (48, 64))}
            env = rig.make_env(config.env, config.preprocess, config.reward, 0)
            with contextlib.closing(make_actor(tmp_path / "demos", config)) as actor:
                config.steps += actor.steps
                for _ in train_sac.run_actor(config, actor, env, rig, actor.eyes):
                    pass

    return run


def require_whole(folder):
    """The episodes: each reads back, and nothing is left of a take that was not finished."""
    episodes = open_dataset(folder).episodes
    for episode in episodes:
        assert sum(1 for _ in episode.frames("wrist")) == episode.length == len(episode.columns()["action"])
        assert episode.closing() is not None
    assert not any((folder / ".staging").iterdir())
    return episodes


def at_rest(rig):
    servos = servos_of(rig, "follower")
    away = np.abs(servos.angle - np.array([0.0, -1.80, 1.66, 0.73, 1.571, 0.0]))
    return bool(not servos.torque_on.any() and away[:5].max() < AT_REST)


def how_left(rig, said):
    """In which of the ways that are safe the follower was left."""
    servos, limit = servos_of(rig, "follower"), REGISTERS["Torque_Limit"].address
    if at_rest(rig):
        return "at rest"
    if "It holds with reduced torque: support it, then press Ctrl-C to release it" in said:
        limits = [int.from_bytes(servos.read_memory(index, limit, 2), "little") for index in range(6)]
        assert all(limit <= 500 for limit, on in zip(limits, servos.torque_on, strict=True) if on)
        return "held"
    return "unheard" if "It may still hold: support it, and cut its power" in said else "unsafe"


@pytest.mark.parametrize(
    "phase, name",
    [
        pytest.param(*row, marks=[pytest.mark.slow] if row[1] in ALIKE else [])
        for row in itertools.product(PHASES, FAULTS)
        if row not in UNNOTICED
    ],
)
def test_what_a_fault_at_each_phase_leaves_behind(
    phase, name, recording, intervention, finished, tmp_path, capsys, monkeypatch  # noqa: F811
):  # fmt: skip
    """Row 32: an overload at shutdown made a whole recording look failed."""
    fault, folder, run = FAULTS[name], tmp_path / "demos", intervention if phase == "intervention" else recording
    monkeypatch.setattr(safety, "EASE_PERIOD", 0.1)  # half the ticks on the way to home and to rest
    shutil.copytree(finished, folder)
    shutil.copy(labels_path(finished), labels_path(folder))
    keys = {(take, TAKE_STEPS + 1): "failure" for take in (1, 2, 3)}  # a verdict on each take's last step
    if phase == "save":
        strike_while_saving(fault, lambda: run.rig, monkeypatch)
    elif phase == "close":
        last = folder / layout.CLOSING_PATH.format(episode_index=1)
        keys[RESET] = lambda: strike_while_closing(fault, run.rig, last)
    else:
        keys[RESET if phase == "reset" else IN_THE_TAKE] = lambda: strike(run.rig, fault)
    goes_on = fault.error is None or phase == "close"
    wanted = (3 if phase == "save" else 2) if goes_on else 9
    with contextlib.nullcontext() if goes_on else pytest.raises(fault.error, match=fault.said) as told:
        run(keys, episodes=wanted, resume=True, **SMALL)

    said, rig, saved = capsys.readouterr().err, run.rig, len(require_whole(folder))
    heard = run.person.heard
    if goes_on:
        assert saved == wanted
        assert run.person.take == wanted - 1 + (fault.event is None and phase != "close")
    else:
        assert told.value.exit_code == (5 if fault.error is SafetyStop else 3)
        assert str(told.value) not in said.splitlines()  # launch says it
        assert saved == 1 + (phase == "save") or (fault.slow and saved == 2)
    if phase == "intervention":
        assert YOU_DRIVE.text in heard
    else:
        assert set(labels_of(folder)) == set(range(saved))
    assert how_left(rig, said) in fault.left
    lines = said.splitlines()
    unheard = fault.arm == "leader" and fault.error is not None
    assert any(line.startswith("releasing the leader: ") for line in lines) == unheard
    assert not servos_of(rig, "leader").torque_on.any()
    # once, and in plain words
    begun = [line for line in lines if line.endswith("; trying again for 3 s")]
    ended = [line for line in lines if ": answered again after " in line]
    assert len(begun) == rig.arm.bus.outages + rig.teleop.leader.arm.bus.outages
    others = [line for line in lines if line not in begun + ended]
    assert len(others) == len(set(others))
    if fault.error is None:
        assert len(ended) == len(begun)
        told = heard if fault.event is None else lines
        assert sum(re.search(fault.said, line) is not None for line in told) == 1
    elif phase == "close" and "at rest" not in fault.left:
        assert re.search(fault.said, said)


def test_an_episode_that_cannot_be_saved_takes_no_other_with_it(recording, tmp_path):  # noqa: F811
    place = tmp_path / "demos" / layout.DATA_PATH.format(**layout.place_of(1))

    def obstruct():
        place.write_text("somebody else's")

    with pytest.raises(UserError, match="The 1 episodes saved are whole, the one in progress is lost"):
        recording({(2, 5): obstruct}, episodes=9, **SMALL)
    assert len(require_whole(tmp_path / "demos")) == 1
    assert at_rest(recording.rig) and not servos_of(recording.rig, "leader").torque_on.any()

"""Each fault at each phase of an episode: what is on the disk afterwards, and which arm still has torque."""

import numpy as np
import pytest
from test_env import STILL, an_env, servos_of, take_the_keys
from test_record import labels_of, recording  # noqa: F401  (a fixture)

from so101.data import layout
from so101.data.dataset import open_dataset
from so101.errors import EpisodeAborted, HardwareError, SafetyStop, UserError
from so101.robot.safety import AT_REST
from so101.sim.script import Event, play

RESET, IN_THE_TAKE = (3, 0), (3, 6)  # of the third take: (take, look), see Scripted
OVERLOAD = Event(fault="overload", ids=[3])
HOT = Event(fault="temperature", ids=[2], value=68)
SILENT = Event(fault="mute")


def port_of(rig, arm):
    return (rig.arm if arm == "follower" else rig.teleop.leader.arm).bus.port


def at_rest(rig):
    away = np.abs(servos_of(rig.arm).angle - np.array([0.0, -1.80, 1.66, 0.73, 1.571, 0.0]))
    return not servos_of(rig.arm).torque_on.any() and away[:5].max() < AT_REST


def require_two_whole_episodes(folder):
    """What was finished before the fault reads back, labels included, and of the take in progress nothing is left."""
    episodes = open_dataset(folder).episodes
    assert len(episodes) == 2 and set(labels_of(folder)) == {0, 1}
    for episode in episodes:
        assert sum(1 for _ in episode.frames("wrist")) == episode.length == len(episode.columns()["action"])
        assert episode.closing() is not None
    assert not any((folder / ".staging").iterdir())


@pytest.mark.parametrize("phase", [RESET, IN_THE_TAKE], ids=["reset", "recording"])
@pytest.mark.parametrize(
    "arm, fault, error, said",
    [
        ("follower", OVERLOAD, SafetyStop, "elbow_flex"),
        ("follower", HOT, SafetyStop, "shoulder_lift: servo at 68 deg C"),
        ("follower", SILENT, HardwareError, "servo 1"),
        ("leader", SILENT, HardwareError, "servo 1"),
    ],
    ids=["overload", "heat", "silent follower", "silent leader"],
)
def test_a_fault_of_an_arm_ends_the_recording_with_what_was_finished(
    recording, tmp_path, capsys, phase, arm, fault, error, said  # noqa: F811
):  # fmt: skip
    def fail():
        play(fault, port_of(recording.rig, arm))

    with pytest.raises(error, match=said) as told:
        recording({phase: fail}, episodes=9)
    assert told.value.exit_code == (5 if error is SafetyStop else 3)
    require_two_whole_episodes(tmp_path / "demos")
    follower, leader = servos_of(recording.rig.arm), servos_of(recording.rig.teleop.leader.arm)
    warned = capsys.readouterr().err
    if fault is SILENT and arm == "follower":
        assert follower.torque_on.all() and not leader.torque_on.any()
        assert "may still hold: support it" in warned
    elif arm == "leader":  # nobody can tell it to let go: that is said, and the follower is safe all the same
        assert at_rest(recording.rig) and "releasing the leader" in warned
    else:
        held = follower.torque_on.all() and "It holds with reduced torque: support it" in warned
        assert at_rest(recording.rig) or (fault is OVERLOAD and held)  # its servo may be too weak for the way to rest
        assert not leader.torque_on.any()


def test_a_lost_picture_in_the_reset_costs_no_episode_and_no_take(recording):  # noqa: F811
    folder = recording(camera_fails_at={1}, episodes=2)
    require_two_whole_episodes(folder)
    assert recording.person.heard.count("episode dropped: camera wrist: newest frame is 0.7 s old") == 1
    assert at_rest(recording.rig) and not servos_of(recording.rig.teleop.leader.arm).torque_on.any()


@pytest.mark.parametrize(
    "arm, fault, error",
    [("follower", HOT, SafetyStop), ("leader", SILENT, HardwareError), (None, None, EpisodeAborted)],
    ids=["heat", "silent leader", "camera"],
)
def test_a_fault_in_an_intervention_leaves_both_arms_safe(arm, fault, error, capsys):
    class Lost:
        def latest(self):
            raise EpisodeAborted("camera wrist: newest frame is 0.7 s old")

    with pytest.raises(error), an_env() as (env, rig):
        hand = take_the_keys(rig)
        env.reset()
        env.step(STILL)
        hand.keys = ["intervene"]
        assert env.step(STILL).by_human
        if arm is None:
            env.cameras = {"wrist": Lost()}
        else:
            play(fault, port_of(rig, arm))
        for _ in range(5):
            env.step(STILL)
    assert at_rest(rig)
    assert not hand.leader.torque_on.any()  # limp in the hand, whatever its line says
    assert ("releasing the leader" in capsys.readouterr().err) == (arm == "leader")


def test_an_episode_that_cannot_be_saved_takes_no_other_with_it(recording, tmp_path):  # noqa: F811
    place = tmp_path / "demos" / layout.DATA_PATH.format(**layout.place_of(2))

    def obstruct():
        place.write_text("somebody else's")

    with pytest.raises(UserError, match="2 episodes saved are whole, the one in progress is lost"):
        recording({IN_THE_TAKE: obstruct}, episodes=9)
    require_two_whole_episodes(tmp_path / "demos")
    assert at_rest(recording.rig) and not servos_of(recording.rig.teleop.leader.arm).torque_on.any()


@pytest.mark.parametrize("fault", [OVERLOAD, SILENT], ids=["overload", "silent"])
def test_a_fault_while_closing_hides_no_success(recording, tmp_path, capsys, fault):  # noqa: F811
    """Row 32: an overload at shutdown made a whole recording look failed."""
    last = tmp_path / "demos" / layout.CLOSING_PATH.format(episode_index=1)

    def watch():
        rig, done = recording.rig, []

        def fail(dt):
            if last.exists() and not done:  # the last episode is saved: what moves now is the way to rest
                done.append(True)
                play(fault, port_of(rig, "follower"))

        rig.clock.on_substep.append(fail)

    folder = recording({(1, 0): watch}, episodes=2)  # raises nothing
    require_two_whole_episodes(folder)
    said = capsys.readouterr()
    assert f"{folder}: 2 episodes" in said.out
    if fault is SILENT:
        assert "closing the arm: " in said.err and "may still hold: support it" in said.err
    else:
        assert at_rest(recording.rig)
    assert not servos_of(recording.rig.teleop.leader.arm).torque_on.any()

"""Recording as the person meets it: takes kept, dropped, done again, left out, paused; and takes that must not be."""

import re
from contextlib import contextmanager

import numpy as np
import pytest

import record
import train_sac
from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel, Labels, label_episode, labels_path
from so101.env import EnvConfig
from so101.errors import DataError, EpisodeAborted, UserError
from so101.rig import open_rig
from so101.robot import teleop


class Scripted:
    """The simulated person, and in addition keys pressed at set looks: {(take, look): event}.

    Takes count every beginning from 1. Look 1 is the one at the end of a take's reset, 2 its first step, and 0
    the announcement of the take, before its reset. Instead of pressing a key, something may be done: a call.
    """

    def __init__(self, person, keys, moves=True, announced=(teleop.DEMONSTRATE, teleop.DEMONSTRATE_FAILURE)):
        self.person, self.keys, self.moves, self.announced = person, keys, moves, announced
        self.take, self.look, self.heard = 0, 0, []

    def hear(self, cue):
        self.heard.append(cue.text)
        self.person.hear(cue)
        if cue in self.announced:
            self.take, self.look = self.take + 1, 0
            self.press()

    def poll(self):
        self.look += 1
        if self.look > 1 and not self.moves:
            return ["end"] if self.look > 12 else []
        return self.person.poll() + self.press()

    def quits(self):
        return False  # its keys are pressed when it is looked at

    def press(self):
        key = self.keys.get((self.take, self.look))
        if callable(key):
            return key() or []
        return [key] if key else []

    def close(self):
        self.person.close()


class FaultyCamera:
    """A camera whose picture, a black one, is lost at given looks, counted from 1 over all takes."""

    def __init__(self, fails_at, size=(480, 640)):
        self.fails_at, self.size, self.looks = set(fails_at), size, 0

    def latest(self):
        self.looks += 1
        if self.looks in self.fails_at:
            raise EpisodeAborted("camera wrist: newest frame is 0.7 s old")
        return np.zeros((*self.size, 3), np.uint8), 0.0

    def wait_ready(self):
        pass


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """Records with keys and a camera that fail as told; returns the folder and the person."""

    def run(keys=None, camera_fails_at=(), moves=True, **settings):
        @contextmanager
        def rigged(config, seed, page=None, flights=None):
            with open_rig(config, seed, page) as rig:
                run.rig, run.person = rig, Scripted(rig.teleop.keys, keys or {}, moves)
                rig.teleop.keys = run.person
                rig.cameras = {"wrist": FaultyCamera(camera_fails_at, config.frame_sizes["wrist"])}
                yield rig

        monkeypatch.setattr(record, "open_rig", rigged)
        settings = {"dataset": str(tmp_path / "demos"), "failures": 0, "steps_after_success": 2, **settings}
        record.main(record.Config(**settings))
        return tmp_path / "demos"

    return run


def labels_of(folder):
    return Labels.load(labels_path(folder)).episodes


def test_a_take_done_again_leaves_nothing_and_the_total_is_reached(recording):
    folder = recording({(2, 6): "redo"}, episodes=2)
    assert recording.person.take == 3
    assert len(open_dataset(folder).episodes) == len(labels_of(folder)) == 2
    assert not any((folder / ".staging").iterdir())
    assert recording.person.heard.count("recording episode 1") == 2  # the number is of what is kept


def test_a_finished_episode_is_left_out_with_a_key_in_the_reset_and_recorded_again(recording, capsys):
    """Nothing on the disk is taken back: the label says skip, and the total counts what is kept."""
    folder = recording({(2, 1): "redo"}, episodes=2)
    assert len(open_dataset(folder).episodes) == 3
    labels = labels_of(folder)
    assert [labels[index].skip for index in range(3)] == [True, False, False]
    assert labels[0].success_start is not None  # what was seen in it stays known
    assert re.search(f"episode 0: left out, in {labels_path(folder)}", capsys.readouterr().out)
    # and a resume counts the same way, to the same total
    record.main(record.Config(dataset=str(folder), episodes=2, failures=0, resume=True))
    assert f"{folder}: holds 2 episodes already" in capsys.readouterr().out
    recording(episodes=3, resume=True)
    assert len(open_dataset(folder).episodes) == 4


def test_a_success_told_late_counts_from_the_last_frame(recording):
    folder = recording({(1, 7): "end", (2, 1): "success"}, episodes=2)
    first = open_dataset(folder).episodes[0]
    assert first.length < 15 and not first.columns()["next.reward"].any()
    assert labels_of(folder)[0].success_start == first.length  # its closing observation, and no frame before


def test_a_label_given_meanwhile_by_label_py_is_kept(recording, tmp_path):
    def label():
        label_episode(tmp_path / "demos", 0, EpisodeLabel(success_start=3))

    folder = recording({(2, 6): label}, episodes=3)
    assert labels_of(folder)[0].success_start == 3 and len(labels_of(folder)) == 3


def test_a_refused_resume_leaves_the_recording_as_it_was_begun(recording):
    folder = recording(episodes=2)
    begun = record.config_path(folder).read_text()
    with pytest.raises(DataError, match="action_scale_m"):
        recording(episodes=5, resume=True, env=EnvConfig(action_scale=0.01))
    assert record.config_path(folder).read_text() == begun
    assert record.unfinished(folder) is None


def test_a_resume_of_what_is_not_there_begins_nothing(recording, tmp_path):
    """A slip in the folder's name began a new dataset beside the old one, silently."""
    recording(episodes=1)
    with pytest.raises(DataError, match=r"demo: is not there, so there is nothing to resume; name the dataset that is"):
        recording(dataset=str(tmp_path / "demo"), episodes=2, resume=True)
    assert sorted(path.name for path in tmp_path.glob("demo*")) == [
        "demos", "demos.labels.json", "demos.record.json", "demos.report.html"
    ]  # fmt: skip


def test_a_recording_ended_before_its_first_episode_can_be_begun_again(recording, capsys):
    folder = recording({(1, 1): "quit"}, episodes=2)
    assert capsys.readouterr().out.endswith(f"{folder}: 0 episodes\n")
    assert len(open_dataset(recording(episodes=1)).episodes) == 1


def test_a_short_recording_has_its_share_of_deliberate_failures():
    assert [record.Config(episodes=episodes).failures for episodes in (1, 10, 70)] == [0, 1, 12]


def test_who_ends_a_recording_that_a_training_asked_for_ends_the_training(recording, monkeypatch):
    """The policy's random first actions would move the arm next."""
    folder = recording({(2, 1): "quit"}, episodes=3)
    monkeypatch.setattr(record, "main", lambda config: None)  # ended again, at once
    with pytest.raises(UserError, match="the recording was ended before its last episode; start again"):
        train_sac.make_missing(train_sac.Config(demonstrations=str(folder)))


def test_an_impatient_second_press_does_not_reach_back_to_a_good_episode(recording):
    folder = recording({(2, 6): "redo", (3, 1): "redo"}, episodes=2)
    assert not any(label.skip for label in labels_of(folder).values())
    assert len(open_dataset(folder).episodes) == 2


def test_a_lost_picture_costs_one_take_and_the_recording_goes_on(recording):
    """Row 29: a camera that fell silent ended the session."""
    folder = recording(camera_fails_at={10}, episodes=2)
    assert "episode dropped: camera wrist: newest frame is 0.7 s old" in recording.person.heard
    episodes = open_dataset(folder).episodes
    assert recording.person.take == 3 and len(episodes) == 2
    assert all(sum(1 for _ in episode.frames("wrist")) == episode.length for episode in episodes)


def test_a_camera_lost_for_good_ends_it_after_three_takes_with_what_was_finished(recording, tmp_path):
    with pytest.raises(EpisodeAborted) as told:
        recording(camera_fails_at=range(60, 9999), episodes=9)
    assert told.value.exit_code == 3
    finished = len(open_dataset(tmp_path / "demos").episodes)
    assert finished >= 1 and len(labels_of(tmp_path / "demos")) == finished
    assert recording.person.take == finished + 3
    assert not recording.rig.arm.bus.port.servos.torque_on.any()


def test_a_take_in_which_nobody_moves_the_leader_is_refused(recording, tmp_path):
    """Row 9: all actions of all demonstrations were zero, and nothing said so."""
    with pytest.raises(EpisodeAborted, match="its 12 actions never move the tool; move the leader, and"):
        recording(moves=False, episodes=2)
    assert recording.person.take == 3 and not open_dataset(tmp_path / "demos").episodes


def test_pause_in_a_take_keeps_the_take_and_makes_the_next_reset_wait(recording):
    folder = recording({(1, 8): "pause", (2, 40): "pause"}, episodes=2)
    assert len(open_dataset(folder).episodes) == 2
    heard = recording.person.heard
    paused, goes_on = heard.index(teleop.PAUSED.text), heard.index(teleop.GOES_ON.text)
    assert heard.index("recording episode 0") < paused < goes_on < heard.index("recording episode 1")


def test_actions_differ_and_the_writer_stops_before_the_reset(recording):
    """Row 26: frames of the reset's motion lay inside episodes."""
    folder = recording(episodes=2)
    for episode in open_dataset(folder).episodes:
        columns = episode.columns()
        assert np.ptp(columns["action"], axis=0)[:3].min() > 0.2
        speed = np.abs(np.diff(columns["observation.state"][:, 12:15], axis=0)).max()
        assert speed < 0.035  # m a tick; the reset's easing alone is faster


def test_who_says_success_and_then_quits_keeps_the_episode(recording):
    """The rows after success are for the classifier's sake: without them it is a success all the same."""
    folder = recording({(1, 8): "success", (1, 9): "quit"}, episodes=3, steps_after_success=12)
    (only,) = open_dataset(folder).episodes
    label = labels_of(folder)[0]
    assert label.success_start is not None and label.success_start < only.length
    assert only.columns()["next.reward"][-1] == 1 and recording.person.take == 1

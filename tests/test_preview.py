"""The preview of a classifier: what the page is told, what a mark leaves on the disk, what a training makes of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import MISSING, Chromium
from label_data import files_of, stored
from test_reward_script import QUICK, SMALL, STARTS, film
from test_serve_sim import Start, port_of, start, tell, until
from test_web import Client, serving, wait_for

import train_reward
from so101.config import parse
from so101.data.corrections import CORRECTION, Corrections
from so101.data.dataset import open_dataset
from so101.errors import ConfigError, DataError
from so101.learn.reward import StateGuard, SuccessClassifier, SuccessDetector, read_reward_file
from so101.schema import STATE, TOOL_Z, Preprocess, describe
from so101.tools import preview
from so101.tools.lint import require_clean
from so101.web.judge import Judge
from so101.web.preview_page import DatasetPreview, LivePreview, Look, Queue

__all__ = ["start"]  # a fixture
ROOT = Path(__file__).parent.parent
SIZES = {"wrist": (48, 64)}
SCHEMA = describe(SMALL, ["wrist"], 10, 0.02, 0.5)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8)


def state(height: float = 0.1) -> np.ndarray:
    values = np.zeros(len(STATE), np.float32)
    values[TOOL_Z] = height
    return values


# ---- the queue on the disk


def test_a_mark_is_on_the_disk_with_its_label_and_no_pixel_of_it_is_lost(tmp_path: Path) -> None:
    queue = Corrections(tmp_path / "queue", SCHEMA, SIZES)
    assert not (tmp_path / "queue").exists()  # only looking makes nothing
    assert [queue.add(state(), {"wrist": picture(n)}, success=n == 1) for n in range(2)] == [0, 1]
    dataset = open_dataset(tmp_path / "queue")  # while the page is still open
    assert stored(tmp_path / "queue") == {"0": {"all_fail": True}, "1": {"success_start": 0}}
    for number, episode in enumerate(dataset.episodes):
        assert (episode.length, episode.observations, episode.task) == (1, 2, CORRECTION)
        np.testing.assert_array_equal(episode.frame("wrist", 1), picture(number))
        np.testing.assert_array_equal(episode.columns()["observation.state"][0], state())
    require_clean(dataset)  # two frames of one pose of the arm are no twins, and standing still is no fault
    queue.leave_out(1, success=True)
    assert stored(tmp_path / "queue")["1"] == {"success_start": 0, "skip": True}
    queue.close()


def test_a_kill_between_a_frame_and_its_label_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("so101.data.corrections.label_episode", lambda *label: None)
        queue = Corrections(tmp_path / "queue", SCHEMA, SIZES)
        for success in (True, False):
            queue.add(state(), {"wrist": picture(0)}, success)
        queue.close()
    assert stored(tmp_path / "queue") == {}
    again = Corrections(tmp_path / "queue", SCHEMA, SIZES)
    assert again.add(state(), {"wrist": picture(1)}, success=True) == 2
    again.close()
    assert stored(tmp_path / "queue") == {
        "0": {"success_start": 0}, "1": {"all_fail": True}, "2": {"success_start": 0},
    }  # fmt: skip


def test_other_episodes_are_not_added_to(made: Path, tmp_path: Path) -> None:
    queue = Corrections(made / "demos", SCHEMA, SIZES)
    before = files_of(made / "demos")
    with pytest.raises(DataError, match="demos: holds other episodes than corrections; name another folder for them"):
        queue.add(state(), {"wrist": picture(0)}, success=True)
    assert files_of(made / "demos") == before


# ---- through a dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films of a red block, `other` with a label that is wrong, and a classifier of the first."""
    folder = tmp_path_factory.mktemp("made")
    film(folder / "demos", 0)
    film(folder / "other", 1, dim=0.8, wrong=3)
    train(folder, "reward")
    return folder


def train(folder: Path, output: str, **more: Any) -> dict[str, Any]:
    """What training on the first film gave, as reward.json tells it."""
    config = train_reward.Config(str(folder / "demos"), str(folder / output), preprocess=SMALL, reward=QUICK, **more)
    train_reward.main(config)
    return read_reward_file(folder / output).provenance


@pytest.fixture
def client(made: Path, tmp_path: Path) -> Iterator[Client]:
    queue = Corrections(tmp_path / "queue", SCHEMA, SIZES)
    judge = Judge(made / "reward", open_dataset(made / "other"))
    page = DatasetPreview("reward", open_dataset(made / "other"), SMALL, judge, Queue(queue, "train again"))
    with serving(page.routes()) as client:
        wait_for(lambda: client.get("api/judged?first=0&since=0")["waiting"] == 0)
        yield client
    judge.close()
    queue.close()


def post(client: Client, path: str, **body: Any) -> Any:
    content = json.dumps(body).encode()
    return json.loads(client.raw("POST", f"/{client.token}/api/{path}", content, Origin=f"http://{client.host}")[1])


def test_scores_are_those_of_counting_frame_by_frame(client: Client) -> None:
    """Episode 3 is labelled a success that it does not show: its 6 frames from 9 on are what recall misses."""
    stored_threshold = client.get("api/about")["threshold"]
    answers = {one["episode"]: one for one in client.get("api/judged?first=0&since=0")["judged"]}
    truth = {index: [index in (0, 2, 3, 4) and frame >= STARTS for frame in range(15)] for index in range(6)}
    assert len(answers[0]["probability"]) == len(truth[0]) == len(answers[0]["allowed"])
    for moved in (0.02, 0.9999):
        scores = client.get(f"api/scores?threshold={moved}")
        assert (scores["frames"], scores["episodes"]) == (90, 6)
        for name, threshold in (("stored", stored_threshold), ("moved", moved)):
            found = right = wanted = fits = 0
            missed = false = 0
            for index, answer in answers.items():
                row, fired = 0, []
                for frame, p in enumerate(answer["probability"]):
                    found += p > threshold
                    wanted += truth[index][frame]
                    right += p > threshold and truth[index][frame]
                    fits += (p > threshold) == truth[index][frame]
                    row = row + 1 if p > threshold and answer["allowed"][frame] == "1" else 0
                    fired += [frame] if row >= 3 else []
                false += bool(fired) and (not any(truth[index]) or fired[0] < STARTS - 2)
                missed += any(truth[index]) and not [frame for frame in fired if frame >= STARTS - 2]
            assert scores[name]["precision"] == (right / found if found else None)
            assert scores[name]["recall"] == right / wanted and scores[name]["accuracy"] == fits / 90
            assert (scores[name]["false_episodes"], scores[name]["missed_episodes"]) == (false, missed)
    assert client.get("api/scores?threshold=2")["error"].startswith(
        "threshold: got '2', must be a number within 0 .. 1"
    )


def test_a_frame_is_marked_once_and_taken_back_and_nothing_else_changes(
    client: Client, made: Path, tmp_path: Path
) -> None:
    before = files_of(made)
    about = post(client, "mark", episode=3, frame=12, success=False)
    assert about["marks"] == [{"place": [3, 12], "success": False, "episode": 0}]
    assert "marked already" in post(client, "mark", episode=3, frame=12, success=False)["error"]
    queued, source = open_dataset(tmp_path / "queue").episodes[0], open_dataset(made / "other").episodes[3]
    np.testing.assert_array_equal(queued.frame("wrist", 1), source.frame("wrist", 12))
    np.testing.assert_array_equal(queued.columns()["observation.state"][0], source.columns()["observation.state"][12])
    assert post(client, "undo")["marks"] == [] and stored(tmp_path / "queue") == {"0": {"all_fail": True, "skip": True}}
    assert "nothing is marked" in post(client, "undo")["error"]
    assert post(client, "mark", episode=3, frame=12, success=True)["marks"][0]["episode"] == 1
    for wrong in ({"episode": 6, "frame": 0}, {"episode": 0, "frame": 15}, {"episode": 0, "frame": -1}):
        assert "there is no frame" in post(client, "mark", **wrong, success=True)["error"]
    assert "a mark needs episode, frame, success" in post(client, "mark", frame=1)["error"]
    assert "must be true or false" in post(client, "mark", episode=0, frame=0, success=1)["error"]
    assert files_of(made) == before  # neither classifier nor dataset nor labels


def test_what_was_marked_is_trained_on_and_what_a_held_out_episode_shows_is_not(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A blue block is not what the demonstrations call success; a person says that it is, 12 times."""
    plain = read_reward_file(made / "reward").provenance["report"]
    blue = [np.array(picture(90 + n) // 4 + 60, np.uint8) for n in range(12)]
    for frame in blue:
        frame[12:36, 20:44] = (40, 40, 190)
    held_out = open_dataset(made / "demos").episodes[plain["episodes"]["held_out"][0]]
    queue = Corrections(tmp_path / "queue", SCHEMA, SIZES)
    for number, frame in enumerate(blue):
        queue.add(state(0.1 + number / 1000), {"wrist": frame}, success=True)
    queue.add(held_out.columns()["observation.state"][4], {"wrist": held_out.frame("wrist", 4)}, success=True)
    queue.leave_out(queue.add(state(), {"wrist": picture(0)}, success=False), success=False)
    queue.close()
    provenance = train(made, "corrected", corrections=str(tmp_path / "queue"))
    told, report = provenance["corrections"], provenance["report"]
    assert (told["frames"], told["successes"], told["left_out"]) == (24, 24, 2)  # two of each, none of the skipped
    assert (
        "12 of 13 marks are taken along (24 frames, 24 of them success); 1 are of held-out episodes"
        in capsys.readouterr().out
    )
    assert report["episodes"]["held_out"] == plain["episodes"]["held_out"]
    assert report["frames"]["held_out"] == plain["frames"]["held_out"]
    assert report["frames"]["train"] == plain["frames"]["train"] + 24
    before, after = (probabilities(made / name, blue) for name in ("reward", "corrected"))
    assert np.median(before) < 0.5 < np.median(after)
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        train(made, "third", corrections=str(tmp_path / "nowhere"))


def probabilities(classifier: Path, frames: list[np.ndarray]) -> np.ndarray:
    """What a classifier says of single frames."""
    from so101.images import preprocess
    from so101.web.judge import open_eyes

    eyes = open_eyes(classifier, SCHEMA)
    views = [preprocess(frame, SMALL)[None].copy() for frame in frames]
    return np.array([eyes.detector.probability(eyes.features(preview.Eyesight(view, state()))) for view in views])


# ---- live


def test_live_looks_are_told_all_kept_while_the_picture_stands_and_marked_with_the_arms_state(tmp_path: Path) -> None:
    guard = StateGuard((0.05, 0.2), (0.0, 0.3))
    detector = SuccessDetector(SuccessClassifier(size=1), 0.6, guard, 3)
    queue = Corrections(tmp_path / "queue", SCHEMA, SIZES)
    page = LivePreview("reward", ["wrist"], detector, SMALL, 10, Queue(queue, "train again"))

    def show(number: int, seen: np.ndarray | None) -> None:
        view = picture(number)[None, :32, :32]
        page.show(
            Look(number, number / 30, {"wrist": picture(number)}, view, seen, number / 200, True, number % 3 == 0)
        )

    with serving(page.routes()) as client:
        about = client.get("api/about")
        assert (about["live"], about["threshold"], about["fps"], about["guard"]["height"]) == (
            True,
            0.6,
            10,
            [0.05, 0.2],
        )
        lines = page.live(None).parts  # type: ignore[arg-type]
        assert json.loads(next(lines)) == {"passed": [], "trouble": "", "guarded": ""}
        for number in (1, 2, 3):
            show(number, state())
        assert json.loads(next(lines))["passed"] == [
            [1, 0.005, True, False], [2, 0.01, True, False], [3, 0.015, True, True]
        ]  # fmt: skip
        shown = json.loads(next(lines))
        assert shown["number"] == 3 and [kind.partition(";")[0] for kind in (shown["cameras"] + shown["views"])] == [
            "data:image/jpeg", "data:image/png",
        ]  # fmt: skip
        np.testing.assert_array_equal(client.picture("api/view?frame=2&camera=wrist"), picture(2)[:32, :32])
        assert post(client, "hold", on=True)["held"] == [1, 2, 3]
        for number in range(4, 100):
            show(number, state(number / 100))
        jpeg = client.picture("api/frame?frame=2&camera=wrist").astype(int)
        assert min(range(100), key=lambda number: np.abs(jpeg - picture(number)).mean()) == 2
        assert post(client, "mark", frame=2, success=True)["marks"][0]["place"] == 2
        assert post(client, "hold", on=False)["held"] == []
        assert "frame 1 is gone: the last 90 are kept" in post(client, "mark", frame=1, success=True)["error"]
        page.guarded = "arm=false leaves the arm out"
        show(100, None)
        assert "not known here: arm=false leaves the arm out" in post(client, "mark", frame=100, success=True)["error"]
        page.tell("camera wrist: lost")
        assert json.loads(next(lines))["passed"][-1][0] == 100
        page.close()
        assert [json.loads(line) for line in lines][-1] == {"over": True}
    queue.close()
    np.testing.assert_array_equal(open_dataset(tmp_path / "queue").episodes[0].frame("wrist", 1), picture(2))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dataset=a", "rig.follower.port=b", "rig.leader=null"], "dataset: got 'a' and a rig; name one of the two"),
        (["rig.leader=null"], "rig: the simulated world stands still without a script; .*serve_sim camera=true"),
    ],
)
def test_what_cannot_be_shown_is_refused(words: list[str], said: str) -> None:
    real = ['rig.cameras={"wrist": {"source": "0"}}'] if len(words) == 3 else []
    with pytest.raises(ConfigError, match=said):
        parse(preview.Config, [*words, *real], "")


def test_other_cameras_than_the_classifiers_are_refused(made: Path) -> None:
    rig = {"follower": {"port": "nowhere"}, "leader": None, "cameras": {"gripper": {"source": "0"}}}
    config = parse(preview.Config, [str(made / "reward"), f"rig={json.dumps(rig)}"], "")
    with pytest.raises(DataError, match=r"cameras is \['wrist'\] there, \['gripper'\] here"):
        preview.main(config)


class Watched:
    """The program, and the address that it printed."""

    def __init__(self, *words: object) -> None:
        command = [sys.executable, "-u", "-m", "so101.tools.preview", *map(str, words), "open=false"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = ""
        while not self.address.startswith("http"):
            line = self.process.stdout.readline()
            assert line, self.process.communicate()[1]
            self.address = line.strip()

    def end(self) -> str:
        """Stop it as a person does; what it said on stderr."""
        self.process.send_signal(signal.SIGINT)
        said = self.process.communicate(timeout=30)[1]
        assert self.process.returncode == 130, said
        return said


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    started: list[Watched] = []

    def begin(*words: object) -> Watched:
        started.append(Watched(*words))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()
        each.process.communicate()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of whole camera frames, of random weights, whose guard wants the tool low."""
    import torch

    from so101.learn.resnet10 import load_resnet10, trunk_hash
    from so101.learn.reward import save_reward

    torch.manual_seed(0)
    detector = SuccessDetector(SuccessClassifier(), 0.0, StateGuard((0.0, 0.1), (0.0, 1.0)), 3)
    folder = tmp_path_factory.mktemp("seeing") / "reward"
    schema = describe(Preprocess(), ["wrist"], 10, 0.02, 0.5)
    save_reward(folder, detector, schema, trunk_hash(load_resnet10(None)), {"config": {"encoder": None}})
    return folder


HIGH = {
    "shoulder_pan": 0, "shoulder_lift": -0.4, "elbow_flex": -0.16, "wrist_flex": 1.57, "wrist_roll": 1.57,
    "gripper": 0.5,
}  # fmt: skip
LOW = HIGH | {"shoulder_lift": 0.156}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="this system has no pseudo-terminals")
def test_live_the_arm_is_read_and_not_moved_and_without_it_the_guard_is_not_judged(
    start: Start, watch: Callable[..., Watched], seeing: Path, tmp_path: Path
) -> None:
    import urllib.request

    server = start("camera=true", f"folder={tmp_path / 'arm'}")
    port_of(server), port_of(server)
    rig = tmp_path / "arm" / "rig.json"

    def looks(address: str, wanted: Callable[[list[Any]], bool]) -> tuple[list[list[Any]], dict[str, Any]]:
        found: list[list[Any]] = []
        with urllib.request.urlopen(address + "api/live") as stream:
            for line in stream:
                told = json.loads(line)
                found += told.get("passed", [])
                if found and "passed" in told and wanted(found[-1]):
                    return found, told
        raise AssertionError("the stream ended")

    program = watch(seeing, f"rig={rig}", f"corrections={tmp_path / 'queue'}")
    tell(server, move=HIGH, seconds=0.3)
    looks(program.address, lambda look: look[2] is False)
    tell(server, move=LOW, seconds=0.3)
    found, told = looks(program.address, lambda look: look[2] is True)
    assert told["guarded"] == "" and [look[0] for look in found] == list(range(found[0][0], found[-1][0] + 1))
    began, first = time.monotonic(), found[-1][0]
    found, _ = looks(program.address, lambda look: time.monotonic() - began > 3)
    counted = [look for look in found if look[3] and look[0] > first]
    print(f"{(found[-1][0] - first) / 3:.1f} looks a second, of which the vote counts {len(counted) / 3:.1f}")
    assert len(counted) / 3 < 11
    assert program.end() == "interrupted\n" and not (tmp_path / "queue").exists()
    plain = watch(seeing, f"rig={rig}", "arm=false")
    assert looks(plain.address, lambda look: look[2] is None)[1]["guarded"] == "arm=false leaves the arm out"
    plain.end()
    gone = watch(seeing, f"rig={rig}", f"rig.follower.port={tmp_path / 'gone'}")
    assert "gone" in looks(gone.address, lambda look: look[2] is None)[1]["guarded"]
    assert "the state guard is not judged: " in gone.end()


# ---- in the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


def shown(browser: Chromium) -> int:
    return int(browser.run("return Number(document.getElementById('frames').dataset.shown ?? -1)"))


def slide(browser: Chromium, threshold: float) -> None:
    browser.run("const s = document.getElementById('threshold'); s.value = arguments[0]; s.oninput()", threshold)


@pytest.mark.browser
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_page_goes_through_a_dataset_moves_the_threshold_and_marks(
    browser: Chromium, watch: Callable[..., Watched], made: Path, tmp_path: Path
) -> None:
    program = watch(made / "reward", f"dataset={made / 'other'}", f"corrections={tmp_path / 'queue'}")
    browser.open(program.address)
    browser.wait("return document.querySelectorAll('#episodes .episode').length === 6")
    judged = "return [...document.querySelectorAll('#episodes .state')].every(e => e.textContent !== '…')"
    browser.wait(judged, seconds=20)
    said = browser.run("return [...document.querySelectorAll('#episodes .state')].map(e => e.textContent)")
    # The vote completes with the third frame of the block; episode 3 is the wrong label, which the classifier misses.
    assert said == ["found at 11", "none, rightly", "found at 11", "missed", "found at 11", "none, rightly"]
    for key in ("Down", "Down", *["Right"] * 10):
        browser.press(key)
    browser.wait("return document.getElementById('where').textContent.startsWith('episode 2, frame 10 of 14')")
    until(lambda: shown(browser) == 10)
    frame = open_dataset(made / "other").episodes[2].frame("wrist", 10)
    pixel = browser.run(
        "return [...document.querySelector('#frames canvas').getContext('2d').getImageData(32, 20, 1, 1).data]"
    )
    assert np.abs(np.array(pixel[:3]) - frame[20, 32]).max() < 30  # a JPEG of it
    assert browser.text("#judgement").endswith("2 of 3 in a row") and browser.text("#verdict") == "no success"
    browser.press("Right")
    browser.wait("return document.getElementById('verdict').textContent === 'success'")
    before = browser.text("#scores")
    slide(browser, 1)  # nothing is a success any more
    browser.wait("return document.querySelectorAll('#episodes .wrong').length === 4")
    assert browser.text("#verdict") == "no success" and "1.000 on trial (stored: " in browser.text("#threshold-said")
    browser.wait("return document.getElementById('scores').textContent !== arguments[0]", before)
    cells = browser.run("return [...document.querySelectorAll('#scores tr:last-child td')].map(e => e.textContent)")
    assert cells == ["episodes, missed", "1", "4"]
    assert browser.text("#mark-says") == "wrong: this is no success"  # the stored threshold decides what it said
    browser.press("w")
    browser.wait("return document.getElementById('count').textContent === '1 frame marked'")
    assert stored(tmp_path / "queue") == {"0": {"all_fail": True}}
    assert f"corrections={tmp_path / 'queue'}" in browser.text("#retrain")
    assert "agrees with the classifier" in browser.text("#note")
    browser.press("Right", "w")
    browser.wait("return document.getElementById('count').textContent === '2 frames marked'")
    browser.press("u")
    browser.wait("return document.getElementById('count').textContent === '1 frame marked'")
    assert stored(tmp_path / "queue")["1"] == {"all_fail": True, "skip": True}
    browser.open(program.address + "#3/9")  # another place, and the marks are still known
    browser.wait("return document.getElementById('where')?.textContent.startsWith('episode 3, frame 9 ')")
    assert browser.text("#count") == "1 frame marked" and browser.errors() == []
    browser.press("Home", " ")
    browser.wait("return document.getElementById('where').textContent.startsWith('episode 3, frame 14 ')")
    program.end()
    browser.wait("return !document.getElementById('problem').hidden")
    assert "does not answer" in browser.text("#problem")


@pytest.mark.browser
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_page_shows_a_live_stream_stops_it_and_marks_what_was_seen(
    browser: Chromium, start: Start, watch: Callable[..., Watched], seeing: Path, tmp_path: Path
) -> None:
    server = start("camera=true", f"folder={tmp_path / 'arm'}")
    port_of(server), port_of(server)
    tell(server, move=LOW, seconds=0.3)
    program = watch(seeing, f"rig={tmp_path / 'arm' / 'rig.json'}", f"corrections={tmp_path / 'queue'}")
    browser.open(program.address)
    browser.wait("return document.getElementById('verdict').textContent === 'success'", seconds=20)  # threshold 0
    assert browser.text("#judgement").endswith("allows itvote3 of 3 in a row")
    before = int(browser.run("return document.getElementById('frames').dataset.pictures"))
    time.sleep(2)
    after = int(browser.run("return document.getElementById('frames').dataset.pictures"))
    print(f"{(after - before) / 2:.1f} pictures a second in the browser")
    slide(browser, 0.99)
    browser.wait("return document.getElementById('verdict').textContent === 'no success'")
    tell(server, move=HIGH, seconds=0.2)
    browser.wait("return document.getElementById('judgement').textContent.includes('forbids it')")
    time.sleep(1.5)  # some looks at the new place
    browser.press(" ")
    browser.wait("return document.getElementById('where').textContent.startsWith('stopped at ')")
    place = int(browser.text("#where").split()[2].rstrip(","))
    until(lambda: shown(browser) == place)
    browser.press("Left", "Left")
    until(lambda: shown(browser) == place - 2)
    time.sleep(4)  # as long as 90 looks take
    browser.press("w")
    browser.wait("return document.getElementById('count').textContent === '1 frame marked'")
    queued = open_dataset(tmp_path / "queue").episodes[0]
    assert queued.frame("wrist", 1).shape == (480, 640, 3) and stored(tmp_path / "queue") == {"0": {"all_fail": True}}
    tool = queued.columns()["observation.state"][0][TOOL_Z]
    assert 0.1 < tool < 0.4  # where the arm was, lifted
    browser.press(" ")
    until(lambda: shown(browser) > place + 5)
    assert browser.errors() == []
    program.end()
    browser.wait("return document.getElementById('problem').textContent.includes('has ended')")

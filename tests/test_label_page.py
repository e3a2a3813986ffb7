"""The label page in a real Chromium: by typing and clicking, with the files on the disk looked at after each."""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chromium import MISSING, Chromium
from label_data import files_of, make, make_foreign, save_sure_classifier, shade, stored

from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel, Labels, label_episode
from so101.learn.reward import StateGuard

pytestmark = [pytest.mark.browser, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

ROOT = Path(__file__).parents[1]
IMAGE = {"crop": [0, 80, 480, 480], "image_size": 128}
LATENCY_MS = 100.0  # from a key to its frame, as a person's eye allows; 15 to 30 measured


class Page:
    """label.py in its own process, and the browser that looks at it."""

    def __init__(self, browser: Chromium, *words: str) -> None:
        self.browser = browser
        command = [sys.executable, "label.py", *words, "open=false"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.address = next(line.strip() for line in self.process.stdout if line.startswith("http"))
        self.browser.errors()

    def load(self, place: str = "") -> None:
        self.browser.open(self.address + place)
        self.browser.wait("return document.body.dataset.shown || document.querySelector('#said').textContent")

    def press(self, *keys: str) -> None:
        """Type, and wait until the frame is shown and every label that was asked for is answered."""
        for key in keys:
            self.browser.press(key)
        self.settle()

    def settle(self) -> None:
        self.browser.run("await work; await showing")

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        self.browser.click(*self.browser.place(selector, across, down))
        self.settle()

    @property
    def shown(self) -> str:
        return str(self.browser.run("return document.body.dataset.shown"))

    @property
    def said(self) -> str:
        return self.browser.text("#said")

    @property
    def problem(self) -> str:
        return self.browser.text("#problem")

    def pixel(self, x: int, y: int, canvas: str = "#frames canvas") -> list[int]:
        script = "return [...document.querySelector(arguments[0]).getContext('2d').getImageData(%d, %d, 1, 1).data]"
        return list(self.browser.run(script % (x, y), canvas))[:3]

    def states(self) -> list[str]:
        return list(self.browser.run("return [...document.querySelectorAll('.state')].map(e => e.textContent)"))

    def total(self, name: str) -> int:
        return int(self.browser.text(f"#total-{name} b"))

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "lift", cameras={"wrist": (480, 640)}, image=IMAGE)


@pytest.fixture
def serve(browser: Chromium) -> Iterator[Callable[..., Page]]:
    """label.py on a dataset, ended when the test ends, however it does."""
    pages: list[Page] = []

    def start(*words: object) -> Page:
        pages.append(Page(browser, *map(str, words)))
        pages[-1].load()
        return pages[-1]

    yield start
    for page in pages:
        page.end()


@pytest.fixture
def page(serve: Callable[..., Page], folder: Path) -> Iterator[Page]:
    before = files_of(folder)
    page = serve(folder)
    yield page
    assert page.browser.errors() == [], "the page's console"
    assert files_of(folder) == before, "the dataset itself is never changed"


def test_keys_that_go_somewhere(page: Page) -> None:
    for keys, wanted in (
        (["Right"], "0/1"),
        (["."], "0/2"),
        (["Left"], "0/1"),
        ([","], "0/0"),
        (["Left"], "0/0"),
        (["End"], "0/9"),
        (["Right"], "0/9"),
        (["Home"], "0/0"),
        (["Shift+Right"], "0/9"),
        (["Shift+Left"], "0/0"),
        (["Right", "Right", "Right", "Shift+,"], "0/0"),
        (["Shift+."], "0/9"),
        (["Down"], "1/0"),
        (["Down", "Right"], "2/1"),
        (["Down"], "2/0"),
        (["Up"], "1/0"),
        (["Up", "Up"], "0/0"),
    ):
        page.press(*keys)
        assert page.shown == wanted, keys


def test_the_frame_is_the_one_that_is_said_with_the_crop_on_it(page: Page) -> None:
    page.press("Down", "Right", "Right", "Right")
    grey = shade(1, 3)
    assert page.pixel(320, 400) == pytest.approx([grey] * 3, abs=4)
    assert page.pixel(320, 100) == pytest.approx([0] * 3, abs=4)  # the upper half is black, and inside the crop
    outside = page.pixel(40, 400)
    assert outside == pytest.approx([(grey + ink) / 2 for ink in (20, 24, 28)], abs=5)  # darkened by half
    assert page.pixel(80, 300) == pytest.approx([255, 210, 63], abs=3)  # the crop's left edge, column 80
    assert page.pixel(64, 100, "#views canvas") == pytest.approx([grey] * 3, abs=4)
    assert (
        page.browser.run("const c = document.querySelector('#frames canvas'); return [c.width, c.clientWidth]")
        == [640] * 2
    )
    assert page.browser.run("const c = document.querySelector('#views canvas'); return [c.width, c.clientWidth]") == [
        128,
        256,
    ]


def test_every_key_that_labels_is_on_the_disk_at_once(page: Page, folder: Path) -> None:
    for keys, wanted in (
        (["Right", "Right", "Right", "s"], {"success_start": 3}),
        (["End", "x"], {"success_start": 3, "exclude": [9]}),
        (["Left", "Left", "x"], {"success_start": 3, "exclude": [7, 9]}),
        (["x"], {"success_start": 3, "exclude": [9]}),
        (["k"], {"success_start": 3, "exclude": [9], "skip": True}),
        (["k"], {"success_start": 3, "exclude": [9]}),
        (["f"], {"all_fail": True}),
        (["Home", "Right", "[", "Right", "Right", "]"], {"ranges": [[1, 4]]}),
        (["End", "[", "Left", "Left", "]"], {"ranges": [[1, 4], [7, None]]}),  # from its end to its start
        (["Home", "["], {"ranges": [[1, 4], [7, None]]}),
        (["]"], {"ranges": [[0, 4], [7, None]]}),
        (["Left", "s"], {"success_start": 0}),
        (["Right", "Right", "]"], {"ranges": [[0, 3]]}),  # closes the success that had no end
        (["Delete"], None),
        (["k"], {"skip": True}),
        (["k"], None),
    ):
        page.press(*keys)
        assert stored(folder).get("0") == wanted, keys
    assert page.problem == ""


def test_a_key_that_cannot_be_meant_says_so_and_changes_nothing(page: Page, folder: Path) -> None:
    for key, said in (("x", "nothing to exclude"), ("]", "Open a range first"), ("u", "nothing to undo")):
        page.press(key)
        assert said in page.said and stored(folder) == {}
    page.press("Right", "[", "Right")
    assert page.said == "" and stored(folder) == {}  # a range that is open is nothing yet
    page.press("f", "f")
    assert "labelled so already" in page.said


def test_the_list_the_totals_and_the_next_unlabelled(page: Page, folder: Path) -> None:
    assert page.states() == ["unlabelled"] * 3
    page.press("Right", "Right", "Right", "Right", "s", "n")
    assert page.shown == "1/0" and page.states() == ["from 4", "unlabelled", "unlabelled"]
    page.press("f", "n")
    assert page.shown == "2/0"
    assert [page.total(name) for name in ("labelled", "positive", "negative")] == [2, 6, 14]
    assert page.browser.text("#total-negative") == "14 negative, 400 to 600 wanted"
    assert page.browser.run("return document.querySelector('#total-negative').title") == "386 to go"
    bar = "const i = document.querySelector('#total-negative i'); return [i.style.width, i.style.background]"
    assert page.browser.run(bar) == ["3.5%", "var(--blue)"]  # 14 of 400
    page.browser.run("wanted = [{name: 'negative', have: 623, goal: '400 to 600', missing: 0}]; showLabels()")
    assert page.browser.text("#total-negative").endswith("wanted: enough")
    assert page.browser.run(bar) == ["100%", "var(--success)"]
    page.press("n")
    assert page.shown == "2/0"
    page.press("Up", "Up", "p")
    assert page.shown == "2/0"
    page.press("k")
    assert page.states()[2] == "skip" and page.total("labelled") == 3 and page.total("negative") == 14
    page.press("n")
    assert "Every episode is labelled" in page.said


def test_undo_takes_back_many_steps_across_episodes(page: Page, folder: Path) -> None:
    history: list[dict[str, Any]] = [stored(folder)]
    for keys in (
        ["Right", "s"],
        ["x"],
        ["Down", "f"],
        ["Down", "k"],
        ["Up", "Right", "[", "Right", "]"],
        ["Up", "Delete"],
    ):
        page.press(*keys)
        history.append(stored(folder))
    assert history[-1] == {"1": {"ranges": [[1, 3]]}, "2": {"skip": True}}
    for wanted in reversed(history[:-1]):
        page.press("u")
        assert stored(folder) == wanted
    assert page.shown == "0/1"  # where the first one was made
    page.press("u")
    assert "nothing to undo" in page.said


def test_clicking_does_what_typing_does(page: Page, folder: Path) -> None:
    page.click(".episode:nth-child(2)")
    assert page.shown == "1/0"
    page.click("#ribbon", across=0.45)
    assert page.shown == "1/4"
    page.click("[data-key='s']")
    assert stored(folder) == {"1": {"success_start": 4}}
    start, end = page.browser.place("#ribbon", 0.15), page.browser.place("#ribbon", 0.85)
    page.browser.click(*start, to=end)
    page.settle()
    assert page.shown == "1/8"
    page.press(" ")  # the button that was clicked has no focus: space plays, and does not label
    page.browser.wait("return document.body.dataset.shown == '1/9'")
    assert stored(folder) == {"1": {"success_start": 4}}
    page.click("[data-key='u']")
    assert stored(folder) == {}
    page.click("#help-button")
    assert page.browser.run("return document.querySelector('#help').open")
    page.browser.press("s")  # behind the open help no key labels
    page.browser.press("Escape")
    page.browser.press("?")
    keys = page.browser.text("#keys")
    assert "success from here" in keys and "next unlabelled" in keys and "undo" in keys
    page.browser.press("?")
    assert not page.browser.run("return document.querySelector('#help').open") and stored(folder) == {}


def test_playing_shows_every_frame_at_the_datasets_rate_and_pauses(page: Page) -> None:
    page.browser.run(
        "window.seen = []; new MutationObserver(() => seen.push([document.body.dataset.shown, performance.now()]))"
        ".observe(document.body, {attributes: true})"
    )
    page.browser.press(" ")
    page.browser.wait("return document.body.dataset.shown == '0/9'")
    seen = page.browser.run("return seen")
    assert [place for place, _ in seen] == [f"0/{frame}" for frame in range(1, 10)]
    assert (seen[-1][1] - seen[0][1]) / 8 == pytest.approx(100, abs=25)  # ms a frame at 10 Hz
    page.browser.press(" ")  # from the end it begins anew
    page.browser.wait("return document.body.dataset.shown == '0/3'")
    page.press(" ")
    place = page.shown
    time.sleep(0.35)
    assert page.shown == place != "0/9"


def test_a_reload_shows_what_was_saved_where_it_was(page: Page, folder: Path) -> None:
    page.press("Down", "Right", "Right", "s")
    page.browser.wait("return location.hash == '#1/2'")
    page.browser.run("location.reload()")
    page.browser.wait("return document.body.dataset.shown == '1/2'")
    assert page.states() == ["unlabelled", "from 2", "unlabelled"]
    assert page.total("positive") == 8


def test_a_server_that_is_killed_leaves_the_last_label_whole_and_the_page_says_so(page: Page, folder: Path) -> None:
    page.browser.run(  # labels as fast as they are answered, each told apart by its frame
        "window.last = null; window.on = true; (async () => { for (let i = 0; on; i = (i + 1) % 10) {"
        " at = {episode: 1, frame: i}; change(successFrom); await work;"
        " if (document.querySelector('#saved').textContent.startsWith('saved')) last = i; else on = false; } })()"
    )
    page.browser.wait("return last >= 5")
    os.kill(page.process.pid, signal.SIGKILL)
    page.process.wait()
    page.browser.wait("return !on")
    acknowledged = page.browser.run("return last")
    start = Labels.load(folder.with_name("lift.labels.json")).episodes[1].success_start
    assert start in (acknowledged, (acknowledged + 1) % 10)  # the one that was answered, or the one on its way
    assert "The server does not answer" in page.problem and page.browser.text("#saved") == "not saved"
    page.press("f")
    assert "Not saved" in page.problem and page.states()[1] == f"from {acknowledged}"


def test_two_windows_and_a_recorder_keep_each_others_labels(page: Page, folder: Path) -> None:
    browser, first = page.browser, page.browser.here()
    second = browser.window()
    page.load()
    page.press("Right", "s")
    browser.switch(first)
    page.press("Down", "f")
    assert stored(folder) == {"0": {"success_start": 1}, "1": {"all_fail": True}}
    label_episode(folder, 2, EpisodeLabel(success_start=7))
    browser.wait("return document.querySelectorAll('.state')[2].textContent == 'from 7'")  # without a key
    # Stale: what the page knows of episode 1 is not what the file says by now.
    label_episode(folder, 1, EpisodeLabel(success_start=5))
    page.press("k")
    if "elsewhere meanwhile" in page.problem:  # else it had looked at the file just before
        assert stored(folder)["1"] == {"success_start": 5} and page.states()[1] == "from 5"
        page.press("k")
        assert page.problem == ""
    assert stored(folder)["1"] == {"success_start": 5, "skip": True}
    browser.switch(second)
    browser.close()
    browser.switch(first)
    for answered in ("u", "u"):  # what was changed elsewhere is not undone
        page.press(answered)
    assert stored(folder)["1"]["success_start"] == 5


def test_an_undo_of_what_was_changed_elsewhere_is_refused(page: Page, folder: Path) -> None:
    page.press("f", "Down", "f")
    label_episode(folder, 1, EpisodeLabel(success_start=5))
    page.browser.wait("return document.querySelectorAll('.state')[1].textContent == 'from 5'")
    page.press("u")
    assert "changed elsewhere" in page.said and stored(folder)["1"] == {"success_start": 5}
    page.press("u")
    assert stored(folder) == {"1": {"success_start": 5}}


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_a_full_disk_is_told_and_nothing_is_shown_as_saved(page: Page, folder: Path) -> None:
    import resource

    page.press("f")
    soft, hard = resource.prlimit(page.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(page.process.pid, resource.RLIMIT_FSIZE, (20, hard))
    page.press("Down", "f")
    assert "Not saved" in page.problem and "File too large" in page.problem
    assert page.states() == ["all fail", "unlabelled", "unlabelled"] and page.browser.text("#saved") == "not saved"
    assert stored(folder) == {"0": {"all_fail": True}}
    resource.prlimit(page.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
    page.press("f")
    assert page.problem == "" and page.browser.text("#saved").startswith("saved")
    assert stored(folder) == {"0": {"all_fail": True}, "1": {"all_fail": True}}
    page.press("u", "u")
    assert stored(folder) == {}


def test_what_is_recorded_meanwhile_joins_the_list(serve: Callable[..., Page], folder: Path) -> None:
    page = serve(folder)
    page.press("Down", "f")
    make(
        folder, episodes=1, cameras={"wrist": (480, 640)}, image=IMAGE
    )  # as record.py does, in another process's place
    label_episode(folder, 3, EpisodeLabel(success_start=5))
    page.browser.wait("return document.querySelectorAll('.state').length == 4")
    assert page.shown == "1/0" and page.states() == ["unlabelled", "all fail", "unlabelled", "from 5"]
    page.press("Down", "Down", "End", "x")
    assert page.shown == "3/9" and stored(folder)["3"] == {"success_start": 5, "exclude": [9]}
    assert stored(folder)["1"] == {"all_fail": True}


def test_a_key_is_answered_by_its_frame_at_once(page: Page) -> None:
    """Measured in the page, from the key's event to the frame on the canvas, first looks and ones at random."""
    times = page.browser.run(
        "const times = []; for (const [key, count] of [['ArrowRight', 9], ['ArrowDown', 1], ['End', 1], ['Home', 1]])"
        " for (let i = 0; i < count; i++) { const start = performance.now();"
        " document.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true})); await showing;"
        " times.push(performance.now() - start); await new Promise((go) => setTimeout(go, 60)); } return times"
    )
    print("ms from key to frame:", [round(value) for value in times])
    assert page.shown == "1/0" and statistics.median(times) < LATENCY_MS


def test_keys_that_are_faster_than_saving_are_all_meant_where_they_were_pressed(page: Page, folder: Path) -> None:
    page.browser.delay(300)
    try:
        for key in ("f", "Right", "[", "Right", "Right", "]", "Right", "Right", "Right", "[", "Right", "Right", "]"):
            page.browser.press(key)
        assert "to go" in page.browser.text("#saved")
        page.settle()
    finally:
        page.browser.delay(0)
    assert stored(folder) == {"0": {"ranges": [[1, 4], [6, 9]]}} and page.problem == ""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_server_that_is_held_up_is_told_with_what_is_not_saved(page: Page, folder: Path) -> None:
    asks = "return !window.dispatchEvent(new Event('beforeunload', {cancelable: true}))"  # whether to leave
    assert not page.browser.run(asks)
    page.process.send_signal(signal.SIGSTOP)
    for key in ("f", "Down", "f"):
        page.browser.press(key)
    assert page.browser.text("#saved") == "saving … 2 to go" and page.browser.run(asks)
    page.process.send_signal(signal.SIGCONT)
    page.settle()
    assert page.browser.text("#saved").startswith("saved") and not page.browser.run(asks)
    assert stored(folder) == {"0": {"all_fail": True}, "1": {"all_fail": True}}
    page.process.send_signal(signal.SIGSTOP)
    page.browser.press("Down")
    page.browser.press("f")
    page.browser.wait("return document.querySelector('#problem').textContent", seconds=12)
    page.browser.wait("return document.querySelector('#saved').textContent == 'not saved'")
    assert page.problem.startswith("Not saved: episode 2. The server does not answer: it was held up, for 10 s")
    assert page.browser.run(asks)
    page.process.send_signal(signal.SIGCONT)
    page.browser.wait("return document.querySelector('#saved').textContent == 'saved'")  # it had arrived after all
    page.browser.wait("return !document.querySelector('#problem').textContent")
    assert stored(folder)["2"] == {"all_fail": True} and page.states() == ["all fail"] * 3


def test_a_dataset_that_is_recorded_anew_shows_its_own_frames(
    serve: Callable[..., Page], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = serve(folder)
    page.press("Right", "[", "Right")
    assert page.pixel(320, 400) == pytest.approx([shade(0, 2)] * 3, abs=4)
    shutil.rmtree(folder)
    page.browser.wait("return document.querySelector('#problem').textContent.includes('no such folder')")
    page.press("s")
    assert "Not saved: episode 0" in page.problem and stored(folder) == {}
    monkeypatch.setattr("label_data.shade", lambda episode, frame: 200 - 10 * frame)
    make(folder, episodes=2, cameras={"wrist": (480, 640)}, image=IMAGE)
    page.browser.wait("return document.querySelectorAll('.state').length == 2")
    page.settle()
    assert page.shown == "0/2" and page.pixel(320, 400) == pytest.approx([180] * 3, abs=4)
    page.press("]")
    assert "Open a range first" in page.said  # what was open was on the frames of before
    page.press("s")
    assert stored(folder) == {"0": {"success_start": 2}} and page.problem == ""


def test_an_empty_dataset_takes_every_key_and_shows_what_is_recorded(
    browser: Chromium, serve: Callable[..., Page], tmp_path: Path
) -> None:
    folder = make(tmp_path / "lift", episodes=0)
    page = serve(folder)
    assert page.said == "This dataset has no episode yet."
    for key in ("s", "n", " ", "End", "Right", "Down", "x", "[", "]", "u", "Delete", "d"):
        page.press(key)
        assert page.said == "This dataset has no episode yet." and page.problem == ""
    page.click("#ribbon")
    make(folder, episodes=1)
    browser.wait("return document.body.dataset.shown == '0/0'")
    page.press("Right", "s")
    assert stored(folder) == {"0": {"success_start": 1}} and browser.errors() == []


def test_keyboards_of_other_countries(page: Page, folder: Path) -> None:
    def type_(key: str, code: str, **more: bool) -> None:
        event = {"key": key, "code": code, "bubbles": True, **more}
        page.browser.run("document.dispatchEvent(new KeyboardEvent('keydown', arguments[0]))", event)
        page.settle()

    page.press("Right")
    type_("[", "Digit5", altKey=True)  # a German Mac
    page.press("Right")
    type_("]", "Digit6", altKey=True)
    assert stored(folder) == {"0": {"ranges": [[1, 3]]}}
    type_("ы", "KeyS")  # Cyrillic, on the key that is S
    assert stored(folder) == {"0": {"success_start": 2}}
    page.press("f")
    type_("х", "BracketLeft")
    type_("ъ", "BracketRight")
    assert stored(folder) == {"0": {"ranges": [[2, 3]]}}
    type_("ü", "BracketLeft")  # a Latin letter is itself
    type_("s", "KeyS", altKey=True)
    type_("s", "KeyS", ctrlKey=True)
    assert stored(folder) == {"0": {"ranges": [[2, 3]]}}


def test_curves_of_an_episode_that_was_left_do_not_come_late(page: Page) -> None:
    page.browser.wait("return document.querySelectorAll('.curve').length")
    count = page.browser.run(
        "const plain = window.fetch; const go = (ms) => new Promise((done) => setTimeout(done, ms));"
        "window.fetch = async (path, options) => {"
        " if (path.includes('curves?episode=0')) await go(400); return plain(path, options); };"
        "return document.querySelectorAll('.curve').length"
    )
    page.press("Down")
    page.press("Up", "Down")
    time.sleep(0.8)
    assert page.browser.run("return document.querySelectorAll('.curve').length") == count > 0


def test_a_thousand_episodes_are_no_slower(page: Page) -> None:
    """The list is laid out for itself: 275 ms for each drawing otherwise, and 4 so."""
    page.browser.wait("return document.querySelectorAll('.curve').length")
    script = (
        "document.querySelector('nav').style.contain = arguments[0]; const times = []; for (let i = 0; i < 7; i++) {"
        " const start = performance.now(); drawPlace(); times.push(performance.now() - start); } return times"
    )
    page.browser.run("episodes = Array.from({length: 1000}, () => episodes[0]); listEpisodes(); showLabels()")
    spent, without = page.browser.run(script, ""), page.browser.run(script, "none")
    print("ms to draw:", [round(value) for value in spent], "otherwise:", [round(value) for value in without])
    assert statistics.median(spent) < statistics.median(without) / 4


@pytest.mark.parametrize("judged", [False, True])
def test_the_desk_never_stands_on_the_frame(
    browser: Chromium, serve: Callable[..., Page], folder: Path, tmp_path: Path, judged: bool
) -> None:
    words = []
    if judged:
        reward = save_sure_classifier(tmp_path / "reward", open_dataset(folder).schema or {})
        words = [f"reward_model={reward}"]
    page = serve(folder, *words)
    try:
        for width, height in ((1280, 720), (1366, 768), (1440, 900), (960, 540), (640, 500)):
            browser.size(width, height)
            browser.wait("return Math.abs(outerWidth - arguments[0]) < 2", width)
            time.sleep(0.1)
            top, bottom, ratio, desk, end = browser.run(
                "const box = (id) => document.querySelector(id).getBoundingClientRect(), f = box('#frames canvas');"
                "return [f.top, f.bottom, f.width / f.height, box('#desk').top, box('#stage').bottom]"
            )
            assert bottom <= desk < end and bottom - top >= 96, (width, height)
            assert page.browser.run("return document.documentElement.scrollWidth") <= width
            assert ratio == pytest.approx(4 / 3, abs=0.02)
            browser.screenshot(tmp_path / f"{width}_{height}.png")
        page.press("Right")
        assert page.shown == "0/1"
    finally:
        browser.size(1440, 900)


FAR_AWAY = """
import asyncio, sys
port, seconds = int(sys.argv[1]), float(sys.argv[2])

async def carry(source, sink):
    later = asyncio.get_running_loop().call_later
    while content := await source.read(65536):
        later(seconds, sink.write, content)
    later(seconds, sink.close)

async def meet(reader, writer):
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))

async def main():
    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@contextmanager
def far_away(port: int, seconds: float) -> Iterator[int]:
    """The near end of a tunnel to `port`: what goes in, either way, comes out so much later."""
    command = [sys.executable, "-c", FAR_AWAY, str(port), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def test_a_tunnel_of_60_ms_costs_a_round_trip_and_what_was_fetched_ahead_none(
    serve: Callable[..., Page], folder: Path
) -> None:
    """The browser believes to be at the server's own port, as it does at the near end of `ssh -L`."""
    page = serve(folder)
    port = int(page.address.split(":")[2].split("/")[0])
    near = f"localhost:{port}"
    with (
        far_away(port, 0.03) as entrance,
        Chromium(f"--host-resolver-rules=MAP {near} 127.0.0.1:{entrance}") as browser,
    ):
        browser.open(page.address.replace(f"127.0.0.1:{port}", near))
        browser.wait("return document.body.dataset.shown")
        script = (
            "const times = []; for (const key of arguments[0]) { const start = performance.now();"
            " document.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true})); await showing;"
            " times.push(performance.now() - start); await new Promise((go) => setTimeout(go, arguments[1])); }"
            " return times"
        )
        read_ahead = browser.run(script, ["ArrowRight"] * 6, 400)
        anew = browser.run(script, ["ArrowDown", "End"], 400)
        print("ms, fetched ahead:", [round(t) for t in read_ahead], "anew:", [round(t) for t in anew])
        assert statistics.median(read_ahead) < 50 and min(anew) > 60 and max(anew) < 400
        start = time.monotonic()
        browser.press("s")
        browser.wait("return document.querySelector('#saved').textContent.startsWith('saved')")
        assert time.monotonic() - start < 1.0 and stored(folder) == {"1": {"success_start": 9}}


# ---- other datasets


def test_the_classifier_and_the_work_list(
    browser: Chromium, serve: Callable[..., Page], folder: Path, tmp_path: Path
) -> None:
    """A classifier that sees success everywhere differs exactly where the label says failure."""
    schema = open_dataset(folder).schema
    assert schema is not None
    save_sure_classifier(tmp_path / "reward", schema)
    label_episode(folder, 0, EpisodeLabel(success_start=3))
    label_episode(folder, 1, EpisodeLabel(ranges=[[0, 2], [3, 9]]))
    page = serve(folder, f"reward_model={tmp_path / 'reward'}")
    browser.wait("return [...judged.keys()].length == 3")
    items = "return [...document.querySelectorAll('#differences li')].map(e => e.textContent)"
    seen = "classifier sees success"
    assert browser.run(items) == [  # the longest first
        f"episode 0, frames 0 to 2{seen}",
        *sorted([f"episode 1, frame 2{seen}", f"episode 1, frame 9{seen}"], key=browser.run(items).index),
    ]
    assert "classifier 0." in browser.text("#where")
    page.press("Down", "d")
    assert page.shown == "0/0" and page.said == seen
    page.press("d")
    first = page.shown
    page.press("d")
    assert {first, page.shown} == {"1/2", "1/9"}
    page.press("d")
    assert page.shown == "0/0"
    page.press("s")  # mended: success from 0, and the list is shorter by it
    assert len(browser.run(items)) == 2 and stored(folder)["0"] == {"success_start": 0}
    page.press("d")
    assert page.shown in ("1/2", "1/9")
    page.press("Up", "Up")
    page.click("#differences li:nth-child(2)")
    assert page.shown in ("1/2", "1/9")
    page.press("n", "f")  # an episode that gets its label is judged at once
    assert browser.run(items)[0] == f"episode 2, frames 0 to 9{seen}"
    height = browser.run("return document.querySelector('#ribbon').clientHeight")
    assert height > 100  # the curve stands over the labels
    assert browser.errors() == []


def test_what_the_state_guard_forbids_is_told_as_that(
    browser: Chromium, serve: Callable[..., Page], folder: Path, tmp_path: Path
) -> None:
    guard = StateGuard((0.25, 0.65), (-1.0, 2.0))  # the tool's height is row / 10
    save_sure_classifier(tmp_path / "reward", open_dataset(folder).schema or {}, guard=guard)
    label_episode(folder, 0, EpisodeLabel(success_start=4))
    page = serve(folder, f"reward_model={tmp_path / 'reward'}")
    browser.wait("return [...judged.keys()].length == 3")
    items = set(browser.run("return [...document.querySelectorAll('#differences li')].map(e => e.textContent)"))
    forbidden = "episode 0, frames 7 to 9classifier sees success, its state guard forbids it"
    assert items == {"episode 0, frame 3classifier sees success", forbidden}
    page.press("End")
    assert browser.text("#where").endswith(", the state guard forbids it") and browser.errors() == []


def test_a_damaged_video_is_told_in_its_place(browser: Chromium, serve: Callable[..., Page], folder: Path) -> None:
    video = sorted(folder.glob("videos/*/*/*.mp4"))[1]
    video.write_bytes(b"damaged")
    page = serve(folder)
    page.press("Down")
    assert page.shown == "1/0" and "not a readable video" in browser.text("#frames .trouble")
    assert video.name in browser.text("#frames .trouble")
    page.press("k", "Down", "Right")
    assert stored(folder) == {"1": {"skip": True}}
    assert browser.run("return document.querySelector('#frames .trouble').hidden")
    assert page.pixel(320, 400) == pytest.approx([shade(2, 1)] * 3, abs=4)


def test_to_look_at_only_shows_curves_and_changes_nothing(
    browser: Chromium, serve: Callable[..., Page], folder: Path
) -> None:
    label_episode(folder, 0, EpisodeLabel(success_start=3))
    everything = files_of(folder.parent)
    page = serve(folder, "--view")
    assert browser.text("#saved") == "read-only" and page.states()[0] == "from 3"
    names = "return [...document.querySelectorAll('.legend b')].map(e => e.textContent)"
    assert browser.run(names)[:3] == ["action", "next.reward", "complementary_info.is_intervention"]
    page.press("Right", "Right", "Right")
    legend = browser.text(".curve .legend")
    assert "delta_x -0.1" in legend and "gripper -0.1" in legend  # row 3: 3 / 10 - 0.4
    browser.run("curves[0].entries[0].values[3] = 1234567; drawCurves()")
    assert "delta_x 1234567" in browser.text(".curve .legend")
    page.click(".curve canvas", across=0.75)
    assert page.shown == "0/7"
    for key in ("s", "f", "k", "[", "]", "x", "u", "Delete"):
        page.press(key)
        assert "Nothing can be changed here" in page.said
    assert not browser.run("return document.querySelector('[data-key=s]')")
    assert files_of(folder.parent) == everything and browser.errors() == []


def test_a_foreign_dataset_with_two_cameras_and_no_crop_that_fits(
    browser: Chromium, serve: Callable[..., Page], tmp_path: Path
) -> None:
    folder = make_foreign(tmp_path / "theirs", {"front": (84, 84), "side": (48, 64)})
    before = files_of(folder)
    page = serve(folder)
    figures = browser.run("return [...document.querySelectorAll('#frames canvas')].map(c => [c.width, c.height])")
    assert figures == [[84, 84], [64, 48]]
    problems = browser.run("return [...document.querySelectorAll('#views .trouble')].map(e => e.textContent)")
    assert "does not fit a 84x84 frame" in problems[0] and len(problems) == 2
    page.press("End")
    assert page.shown == "0/8" and page.pixel(40, 70) == pytest.approx([shade(0, 8)] * 3, abs=4)
    page.press("s")
    assert stored(folder) == {"0": {"success_start": 8}} and files_of(folder) == before
    assert "next.reward" not in browser.text("#curves") and browser.errors() == []
    serve(folder, "--view", "preprocess.crop=null")
    assert "record anew to train" in browser.text("#views .trouble")
    page = serve(folder, "preprocess.crop=null", "preprocess.image_size=64")
    assert browser.run("return document.querySelector('#views .trouble').hidden")
    assert page.pixel(32, 50, "#views canvas") == pytest.approx([shade(0, 0)] * 3, abs=4)

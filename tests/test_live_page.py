"""The live page: over real sockets with the real control step, and in a real Chromium with the real scripts."""

import http.client
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from chromium import MISSING, Chromium
from test_env import servos_of
from test_web import Client, serving

import record
import train_reward
import train_sac
from so101.config import save
from so101.data.dataset import open_dataset
from so101.data.labels import load_labels
from so101.data.writer import DatasetWriter
from so101.env import Env, EnvConfig
from so101.errors import ConfigError, EpisodeAborted
from so101.learn.reward import RewardConfig
from so101.learn.sac import SacConfig
from so101.rig import Rig, RigConfig, describe_task, open_rig
from so101.robot.teleop import DROPPED, LOST, NOTHING_HELD, Teleop, TeleopConfig, TerminalKeys
from so101.runlog import RunLog, read_metrics
from so101.schema import OPENING, TOOL_XYZ, Preprocess, RewardSpec
from so101.web import live_page as live
from so101.web.live_page import CAMERA, CURVES, HEAD, STATE, VIEW, Curves, LivePage

ROOT = Path(__file__).parents[1]
STILL = np.zeros(4)


class Watching:
    """One page's connection, and what it brings."""

    def __init__(self, client: Client, who: str = "") -> None:
        self.wire = http.client.HTTPConnection(client.host, timeout=10)
        self.wire.request("GET", f"/{client.token}/api/live" + (f"?who={who}" if who else ""))
        self.answer = self.wire.getresponse()
        assert self.answer.status == 200

    def part(self) -> tuple[int, int, bytes]:
        kind, index, length = HEAD.unpack(self.answer.read(HEAD.size))
        return kind, index, self.answer.read(length)

    def state(self, wanted: Callable[[dict[str, Any]], Any] = bool) -> dict[str, Any]:
        """The next state that is as wanted; pictures before it are kept."""
        self.pictures: dict[tuple[int, int], np.ndarray] = {}
        while True:
            kind, index, content = self.part()
            if kind != STATE:
                bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
                self.pictures[kind, index] = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
            elif wanted(state := json.loads(content)):
                return state  # type: ignore[no-any-return]

    def close(self) -> None:
        self.wire.close()


def send(client: Client, path: str, **body: Any) -> tuple[int, Any]:
    """A POST as the page's own script makes it, which has just seen the newest state."""
    signed = json.dumps({"seen": time.monotonic(), **body}).encode()
    status, content = client.raw("POST", f"/{client.token}/{path}", signed, Origin=f"http://{client.host}")
    return status, json.loads(content)


@pytest.fixture
def page() -> LivePage:
    return LivePage("teleoperate")


@pytest.fixture
def client(page: LivePage) -> Iterator[Client]:
    with serving(page.routes()) as client:
        yield client
        page.close()


@contextmanager
def driven(page: LivePage, leader: bool = False, **settings: Any) -> Iterator[tuple[Env, Rig]]:
    """The control step on a simulated arm with nobody but the page, in no time until the pace is set."""
    config = RigConfig(operator=None, pace=1.0) if leader else RigConfig(operator=None, leader=None, pace=1.0)
    with open_rig(config, 0, page) as rig:
        rig.clock.pace = None  # type: ignore[attr-defined]
        settings = {"random_ee_reset": False, "reset_time_s": 0.0, **settings}
        yield rig.make_env(EnvConfig(**settings), Preprocess(), RewardSpec(), 0), rig


class Beats:
    """The sign of life of a page that holds something, ten times a second."""

    def __init__(self, client: Client, hand: list[float]) -> None:
        self.own = Client(SimpleNamespace(server_port=int(client.host.split(":")[1]), token=client.token))  # type: ignore[arg-type]
        self.hand, self.number, self._stop = hand, 0, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._beat()
        self._thread.start()

    def _beat(self) -> None:
        self.number += 1
        assert send(self.own, "api/hand", who="me", number=self.number, hand=self.hand)[0] == 200
        self.last = time.monotonic()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self._beat()

    def stop(self) -> float:
        """Die without a word; when the last one was sent, s."""
        self._stop.set()
        self._thread.join()
        self.own.wire.close()
        return self.last


def test_the_page_shows_what_the_control_step_saw(page: LivePage, client: Client) -> None:
    page.judge = SimpleNamespace(probability=0.75, threshold=0.5, vetoed=True)
    with driven(page) as (env, rig):
        send(client, "api/hand", who="me", number=1, hand=[0.5, 0, 0, 0])
        env.reset(person_drives=True)
        steps = [env.step(STILL) for _ in range(3)]
        page.facts("record", 3, 70, "episode", {"success": np.int64(2), "rate": np.float32(np.nan)})
        watching = Watching(client)
        state = watching.state()
        seen = steps[-1].observation
        shot = watching.pictures[CAMERA, 0]
        assert shot.shape == (480, 640, 3)
        assert np.abs(shot.astype(int) - seen.frames["wrist"]).mean() < 4  # JPEG of a picture with noise of 2.5
        assert np.array_equal(watching.pictures[VIEW, 0], seen.images[0])  # exactly what the network gets
        assert state["tool"] == pytest.approx(seen.state[TOOL_XYZ], abs=1e-4)
        assert state["opening"] == pytest.approx(seen.state[OPENING], abs=1e-4)
        assert state["action"] == [0.5, 0, 0, 0] and state["ticks"] == ["-", "b", "b", "b"]
        assert (state["driver"], state["recording"], state["paused"], state["leader"]) == ("page", True, False, False)
        assert (state["probability"], state["threshold"], state["vetoed"], state["wheel"]) == (0.75, 0.5, True, "me")
        assert state["left"] == 9.7  # of ten seconds, after three ticks of 0.1
        assert state["temperature"] == env.watchdog.newest.temperature.tolist() and len(state["load"]) == 6
        assert state["lag"] == pytest.approx(steps[-1].lag) and state["lag"] > 0.005
        assert state["periods"] == pytest.approx([0.1] * 3) and state["overruns"] == 0
        assert state["facts"] == {
            "label": "record", "done": 3, "total": 70, "unit": "episode", "info": {"success": 2, "rate": None},
        }  # fmt: skip
        assert ["reset", "resetting: place the cube, 0 seconds"] in state["told"]
        assert watching.state()["ticks"] == [] and watching.pictures == {}  # nothing new: no picture comes twice
        page.judge.probability = float("nan")
        env.step(STILL)
        after = watching.state(lambda state: state["ticks"])
        assert after["ticks"] == ["b"] and after["told"] == [] and after["probability"] is None
        watching.close()


def test_a_pause_before_the_first_frame_is_shown_as_one(page: LivePage, client: Client) -> None:
    """On a real arm an evaluation waits there until the object is placed: p does not pause then, it goes on."""
    teleop = Teleop(None, TerminalKeys(), TeleopConfig(), page)
    page.connect({}, teleop)
    assert not Watching(client).state()["paused"]
    teleop.paused = True
    assert Watching(client).state()["paused"]


def test_no_tick_and_no_line_is_lost_between_two_parts_and_who_comes_later_gets_the_last_minute(
    page: LivePage, client: Client
) -> None:
    with driven(page) as (env, _):
        send(client, "api/hand", who="me", number=1, hand=[0, 0, 0, 0])
        early = Watching(client)
        env.reset(person_drives=True)
        for number in range(40):  # far faster than the page is told
            env.step(STILL)
            page.tell("said", str(number))
        page.close()
        ticks, told = [], []
        while not (state := early.state()).get("over"):
            ticks += state["ticks"]
            told += [words for kind, words in state["told"] if kind == "said"]
        assert ticks == ["-"] + ["b"] * 40 and told == [str(number) for number in range(40)]


def test_a_key_reaches_the_control_step_once_however_often_it_is_pressed(page: LivePage, client: Client) -> None:
    for _ in range(100):  # while the classifier is trained, say, and nobody looks
        assert send(client, "api/press", event="success") == (200, {})
    send(client, "api/press", event="redo")
    assert page.poll() == ["success", "redo"] and page.poll() == []
    with driven(page) as (env, _):
        send(client, "api/hand", who="me", number=1, hand=[0, 0, 0, 0])
        env.reset(person_drives=True)
        send(client, "api/press", event="end")
        assert env.step(STILL).events == {"end"} and env.step(STILL).events == frozenset()
        send(client, "api/press", event="failure")
        step = env.step(STILL)
        assert step.terminated and not step.success
        send(client, "api/press", event="success")  # while the arm resets, of the episode before
        assert env.reset(person_drives=True)[1] == {"success"}
        send(client, "api/press", event="quit")
        assert page.quits() and env.reset(person_drives=True)[1] == {"quit"} and not page.quits()
    status, answer = send(client, "api/press", event="explode")
    assert status == 422 and answer["error"].startswith("event: got 'explode', must be one of success, failure")
    assert send(client, "api/press", event=["success"])[0] == 422 == client_error(client, "api/press", [])


def client_error(client: Client, path: str, body: Any) -> int:
    return client.raw("POST", f"/{client.token}/{path}", json.dumps(body).encode(), Origin=f"http://{client.host}")[0]


def test_what_is_held_is_the_action_and_the_arm_goes_there(page: LivePage, client: Client) -> None:
    with driven(page) as (env, _):
        send(client, "api/hand", who="me", number=1, hand=[0, 0, 0, 0])
        start = env.reset(person_drives=True)[0].state[TOOL_XYZ]
        target = env.target.copy()
        for number in range(2, 12):
            send(client, "api/hand", who="me", number=number, hand=[0, 0.5, 0, -1])
            step = env.step(np.ones(4))
            assert step.by_human and step.action.tolist() == [0, 0.5, 0, -1]
        # ten ticks of half of 0.02 m to the left; the gripper shuts to the least of its range
        assert env.target - target == pytest.approx([0, 0.1, 0], abs=1e-6) and env.opening == 0.05
        assert step.observation.state[TOOL_XYZ] - start == pytest.approx([0, 0.1, 0], abs=0.02)
        for number in range(12, 18):  # the box ends at 0.15
            send(client, "api/hand", who="me", number=number, hand=[0, 1, 0, 0])
            edges = [page._state["edge"].tolist(), env.step(STILL) and page._state["edge"].tolist()]
        assert edges == [[0, 1, 0], [0, 1, 0]] and env.target[1] == 0.15
        send(client, "api/hand", who="me", number=20, hand=None)
        assert page.hand() is None
        step = env.step(np.ones(4))  # nobody drives: it holds, and the rows of nobody are left out
        assert step.by_human and step.action.tolist() == [0, 0, 0, 0] and step.events == {"redo"}


def test_without_a_sign_of_life_the_arm_stands_still_within_the_heartbeat_and_after_two_seconds_the_episode_is_dropped(
    page: LivePage, client: Client
) -> None:
    """The dead man's handle, in real time: a laptop is shut while a key is held."""
    with driven(page) as (env, rig):
        send(client, "api/hand", who="me", number=0, hand=[0, 0, 0, 0])
        env.reset(person_drives=True)
        rig.clock.pace = 1.0  # type: ignore[attr-defined]
        env.rate.restart()
        beats = Beats(client, [0.3, 0, 0, 0])
        for _ in range(8):
            env.step(STILL)
        died, moved, tools, events = beats.stop(), [], [], frozenset[str]()
        while "redo" not in events:
            began, before = time.monotonic(), env.target
            step = env.step(STILL)
            events = step.events
            tools.append(step.observation.state[TOOL_XYZ])
            if (env.target != before).any():
                moved.append(began - died)
        assert moved and max(moved) <= live.HEARTBEAT_S == 0.3
        assert began - died > live.LOST_S == 2.0 and began - died < 2.0 + 3 * (time.monotonic() - began)
        assert np.ptp(tools[-10:], axis=0).max() < 1e-3  # it stands
        assert rig.teleop.paused and page.hand() is None
        assert LOST.text in [words for _, _, words in page._told]
        assert env.step(STILL).events == frozenset()  # said once


def test_a_stall_of_the_line_is_over_as_soon_as_it_goes_on(page: LivePage, client: Client) -> None:
    with driven(page) as (env, rig):
        send(client, "api/hand", who="me", number=1, hand=[0.3, 0, 0, 0])
        env.reset(person_drives=True)
        assert env.step(STILL).action[0] == pytest.approx(0.3)
        page._wheel = ("me", page._wheel[1] - 1.0, page._wheel[2])  # type: ignore[index]  # a second of silence
        assert env.step(STILL).action[0] == 0
        send(client, "api/hand", who="me", number=2, hand=[0.3, 0, 0, 0])
        step = env.step(STILL)
        assert step.action[0] == pytest.approx(0.3) and not step.events and not rig.teleop.paused


def test_what_a_stalled_line_brings_late_moves_nothing_and_means_nothing(page: LivePage, client: Client) -> None:
    """A tunnel that hangs keeps what was sent, and brings it when it goes on: a key that was held 20 s ago, say."""
    with driven(page) as (env, rig):
        send(client, "api/hand", who="me", number=1, hand=[0, 0, 0, 0])
        env.reset(person_drives=True)
        signs = ((0.5, 0.3, 0.3), (1.5, 0.7, 0.3), (20.0, 0.7, 0.3), (0.0, 0.7, 0.7))
        for number, (age, hand, taken) in enumerate(signs, 2):
            seen = time.monotonic() - age
            status, answer = send(client, "api/hand", who="me", number=number, hand=[hand, 0, 0, 0], seen=seen)
            assert status == 200 and ("late" in answer) == (taken != hand), age
            assert env.step(STILL).action[0] == pytest.approx(taken), age
        page._wheel = ("me", page._wheel[1] - 1.0, page._wheel[2])  # type: ignore[index]  # a second of silence
        send(client, "api/hand", who="me", number=200, hand=[1, 0, 0, 0], seen=time.monotonic() - 1.1)
        assert env.step(STILL).action[0] == 0 and page.silent()  # no sign of life
    for event in ("success", "pause", "intervene"):
        status, answer = send(client, "api/press", event=event, seen=time.monotonic() - 2.5)
        assert status == 422 and answer["error"] == "it came 2.5 s after what you saw; look, and press again"
    send(client, "api/press", event="quit", seen=time.monotonic() - 20)  # to end is right at any time
    assert page.poll() == ["quit"]
    for seen in (None, "1", True, 10**400, -1, time.monotonic() + 5):
        status, answer = send(client, "api/hand", who="me", number=300, hand=None, seen=seen)
        assert status == 422 and "must be `now` of the newest state" in answer["error"], seen


def test_a_page_lost_just_before_the_end_of_its_episode_costs_it_and_a_short_stall_does_not(
    page: LivePage, client: Client
) -> None:
    """Its last rows would be nobody's: up to two seconds of zeros, as what a person did."""
    with driven(page, control_time_s=0.5) as (env, rig):
        for stall, events in ((0.4, frozenset()), (3.0, {"redo"})):
            send(client, "api/hand", who="me", number=1 + int(stall), hand=[0, 0, 0, 0])
            env.reset(person_drives=True)
            for number in range(4):
                send(client, "api/hand", who="me", number=10 + int(stall) + number, hand=[0.3, 0, 0, 0])
                assert not env.step(STILL).truncated
            page._wheel = ("me", page._wheel[1] - 0.4, page._wheel[2])  # type: ignore[index]  # the heartbeat is over
            said = {"who": "me", "number": 90, "hand": [0, 0, 0, 0]}
            speaks = threading.Timer(stall, send, (client, "api/hand"), said)
            speaks.start()
            step = env.step(STILL)
            speaks.cancel() if events else speaks.join()
            assert step.truncated and step.events == events and rig.teleop.paused == bool(events)
        assert "time out" in (told := [words for _, _, words in page._told]) and told.count("time out") == 1
        assert told[-1] == LOST.text


def test_who_drives_from_the_page_and_holds_nothing_is_waited_for(
    page: LivePage, client: Client, tmp_path: Path
) -> None:
    """Three such episodes in a row end a recording with a leader, which may be broken."""
    with driven(page, control_time_s=0.5) as (env, rig):
        writer = DatasetWriter(
            tmp_path / "demos", fps=10, cameras={"wrist": (480, 640)}, task="lift",
            schema=describe_task(RigConfig(), env.config, Preprocess()), codec="h264", may_wait=True,
        )  # fmt: skip
        with closing(writer):
            for number in range(4):
                beats = Beats(client, [0, 0, 0, 0])
                if number:  # it waits
                    servos_of(rig.arm).after(5.0, lambda: page._pressed.append("pause"))
                observation, _ = env.reset(person_drives=True)
                took = record.record_episode(env, writer, record.Config(), observation, {"wrist": record.Pictures()})
                beats.stop()
                page._wheel, page._heard = None, ("", -1)
                assert took == (None, False, False) and rig.teleop.paused
        assert not (tmp_path / "demos" / "data").exists() or not open_dataset(tmp_path / "demos").episodes
    assert [words for _, _, words in page._told].count(NOTHING_HELD.text) == 4


def test_a_recording_that_ends_itself_asks_who_is_there_before_the_arm_moves(page: LivePage, client: Client) -> None:
    """A person said success, and was lost while the last rows were recorded."""
    with driven(page) as (env, rig):
        send(client, "api/hand", who="me", number=1, hand=[0, 0, 0, 0])
        env.reset(person_drives=True)
        env.step(STILL)
        page._wheel = ("me", page._wheel[1] - 0.5, page._wheel[2])  # type: ignore[index]
        env.step(STILL)
        stood, seen = rig.arm.commanded.tolist(), []
        servos = servos_of(rig.arm)
        servos.after(20.0, lambda: seen.append(rig.arm.commanded.tolist()))

        def goes_on() -> None:
            while LOST.text not in [words for _, _, words in page._told] or not seen:
                time.sleep(0.01)
            send(client, "api/press", event="pause")

        person = threading.Thread(target=goes_on)
        person.start()
        assert "redo" in env.reset()[1] and seen == [stood]
        person.join()


def test_one_page_drives_and_another_one_only_after_it_let_go_or_was_silent(
    page: LivePage, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert send(client, "api/hand", who="a", number=1, hand=[1, 0, 0, 0])[0] == 200
    status, answer = send(client, "api/hand", who="b", number=1, hand=[0, 1, 0, 0])
    assert (status, answer["error"]) == (422, "another page drives; let go of the wheel there first")
    assert send(client, "api/hand", who="b", number=2, hand=None)[0] == 422  # nor lets it go for the other
    assert page.hand().tolist() == [1, 0, 0, 0]  # type: ignore[union-attr]
    send(client, "api/hand", who="a", number=2, hand=None)
    assert send(client, "api/hand", who="b", number=3, hand=[0, 1, 0, 0])[0] == 200
    monkeypatch.setattr(live, "LOST_S", 0.0)
    assert page.hand() is None  # also before the loop has noticed: a reset asks for nothing
    assert send(client, "api/hand", who="a", number=3, hand=[1, 0, 0, 0])[0] == 200
    assert page.lost() and not page.lost()


def test_a_sign_that_was_overtaken_on_its_way_tells_nothing(page: LivePage, client: Client) -> None:
    for number, hand, now in (
        (5, [1, 0, 0, 0], [1, 0, 0, 0]), (7, [0, 0, 0, 0], [0, 0, 0, 0]), (6, [1, 0, 0, 0], [0, 0, 0, 0]),
        (9, None, None), (8, [1, 0, 0, 0], None), (10, [0, 1, 0, 0], [0, 1, 0, 0]),
    ):  # fmt: skip
        assert send(client, "api/hand", who="me", number=number, hand=hand)[0] == 200
        held = page.hand()
        assert (None if held is None else held.tolist()) == now, number


@pytest.mark.parametrize(
    "body",
    [
        {"who": "me", "number": 1, "hand": [0, 0, 0]}, {"who": "me", "number": 1, "hand": [2, 0, 0, 0]},
        {"who": "me", "number": 1, "hand": ["1", 0, 0, 0]}, {"who": "me", "number": 1, "hand": [True, 0, 0, 0]},
        {"who": "me", "number": 1.5, "hand": None}, {"who": 1, "number": 1, "hand": None}, {}, [],
        {"who": "me", "number": 1, "hand": [10**400, 0, 0, 0]},
    ],
)  # fmt: skip
def test_what_is_no_hand_is_refused_in_words(page: LivePage, client: Client, body: Any) -> None:
    path = f"/{client.token}/api/hand"
    status, content = client.raw("POST", path, json.dumps(body).encode(), Origin=f"http://{client.host}")
    assert status == 422 and "must be" in json.loads(content)["error"] and page.hand() is None
    for text in (b'{"who": "me", "number": 1, "hand": [NaN, 0, 0, 0]}', b'{"hand": [1e999, 0, 0, 0]}'):
        assert client.raw("POST", path, text, Origin=f"http://{client.host}")[0] in (400, 422)
    assert page.hand() is None


def test_who_has_no_token_and_any_other_site_gets_nothing(page: LivePage, client: Client) -> None:
    body = json.dumps({"who": "me", "number": 1, "hand": [1, 0, 0, 0]}).encode()
    own, port = f"http://{client.host}", client.host.partition(":")[2]
    for path in ("api/live", "api/about", "api/curves", ""):
        assert client.raw("GET", f"/x{client.token[1:]}/{path}")[0] == 403
        assert client.raw("GET", f"/{client.token}/{path}", Host=f"evil.example:{port}")[0] == 403
    for path in ("api/hand", "api/press", "api/seen"):
        assert client.raw("POST", f"/x/{path}", body, Origin=own)[0] == 403
        assert client.raw("POST", f"/{client.token}/{path}", body)[0] == 403
        assert client.raw("POST", f"/{client.token}/{path}", body, Origin="http://evil.example")[0] == 403
        assert client.raw("POST", f"/{client.token}/{path}", body, Origin=own, Host=f"evil.example:{port}")[0] == 403
    assert page.hand() is None and page.poll() == []


def test_the_last_twenty_outcomes_are_those_of_finished_episodes_with_the_persons_last_word(page: LivePage) -> None:
    env: Any = SimpleNamespace(
        detector=None, left=0.0, edge=np.zeros(3),
        teleop=SimpleNamespace(driver="policy", recording=False, paused=False, afterwards=frozenset(), leader=None),
        watchdog=SimpleNamespace(newest=None), rate=SimpleNamespace(period=0.1, busy=0.0, overruns=0),
    )  # fmt: skip
    blank: Any = SimpleNamespace(state=np.zeros(18), frames={}, images=np.zeros((1, 2, 2, 3), np.uint8), time=0.0)

    def step(success: bool = False, terminated: bool = False, *events: str) -> None:
        said = SimpleNamespace(
            action=STILL, lag=0.0, success=success, terminated=terminated, truncated=False, events=frozenset(events)
        )
        page.show(env, blank, said)  # type: ignore[arg-type]

    def reset(*pressed: str) -> None:
        env.teleop.afterwards = frozenset(pressed)
        page.show(env, blank, None)

    reset("success")  # of nothing
    for ends, pressed, outcome in (
        (lambda: step(True, True), (), "success"),
        (lambda: step(False, True, "failure"), (), "failure"),
        (lambda: [step(True, False, "success"), step(), step()], (), "success"),  # a recording goes on after it
        (lambda: [step(True, False, "success"), step(False, True, "failure")], (), "failure"),
        (lambda: step(), (), "unlabelled"),  # time ran out, and nobody said how it ended
        (lambda: step(), ("success",), "success"),
        (lambda: step(True, True), ("failure",), "failure"),
        (lambda: step(True, True), ("redo",), None),  # left out
        (lambda: step(True, False, "redo"), (), None),
        (lambda: [step(), page.hear(DROPPED.about("a camera was lost"))], ("success",), None),
        (lambda: [step(), page.hear(NOTHING_HELD)], ("success",), None),
    ):
        before = list(page._outcomes)
        ends()  # type: ignore[no-untyped-call]
        reset(*pressed)
        assert list(page._outcomes) == before + ([] if outcome is None else [outcome])
    env.detector = SimpleNamespace()
    step()  # a classifier looked, and saw no success
    reset()
    assert page._outcomes[-1] == "failure"
    for _ in range(30):
        step(True, True)
        reset()
    assert page._copy(0, 0)["outcomes"] == ["success"] * 20


class Real:
    """A real camera's newest frame, or what is wrong with it."""

    def __init__(self) -> None:
        self.frame, self.lost = np.full((48, 64, 3), 90, np.uint8), ""

    def latest(self) -> tuple[np.ndarray, float]:
        if self.lost:
            raise EpisodeAborted(self.lost)
        return self.frame, 0.0

    def wait_ready(self) -> None:
        pass


def test_real_cameras_are_shown_between_the_ticks_and_a_lost_one_is_not_taken_for_a_still_scene(
    page: LivePage, client: Client
) -> None:
    wrist, side = Real(), Real()
    page.connect({"wrist": wrist, "side": side})
    watching = Watching(client)
    assert watching.state()["cameras"] == {"wrist": "", "side": ""}  # before any tick
    assert set(watching.pictures) == {(CAMERA, 0), (CAMERA, 1)}
    side.frame = np.full((48, 64, 3), 200, np.uint8)
    assert watching.part()[:2] == (CAMERA, 1)  # that one alone
    side.lost = "camera side: no good frame for 0.6 s: look at its cable"
    state = watching.state(lambda state: state["cameras"]["side"])
    assert state["cameras"] == {"wrist": "", "side": side.lost} and not watching.pictures
    watching.close()


def shown(page: LivePage, frame: np.ndarray) -> float:
    """Seconds that the control loop spends on showing a frame."""
    env: Any = SimpleNamespace(
        detector=None, left=0.0, edge=np.zeros(3),
        teleop=SimpleNamespace(driver="policy", recording=False, paused=False, afterwards=frozenset(), leader=None),
        watchdog=SimpleNamespace(newest=None), rate=SimpleNamespace(period=0.1, busy=0.0, overruns=0),
    )  # fmt: skip
    seen: Any = SimpleNamespace(state=np.zeros(18), frames={"wrist": frame}, images=frame[None, :64, :64], time=0.0)
    began = time.perf_counter()
    page.show(env, seen, None)
    return time.perf_counter() - began


def test_a_picture_is_encoded_once_however_many_watch(
    page: LivePage, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []

    def count(name: str) -> None:
        encode = getattr(live, name)
        monkeypatch.setattr(live, name, lambda *rest: (encoded.append(name), encode(*rest))[1])

    count("as_jpeg")
    count("as_png")
    watching = [Watching(client) for _ in range(3)]
    for number in range(3):
        shown(page, np.full((64, 64, 3), number, np.uint8))
        for one in watching:
            one.state(lambda state: state["ticks"])
            assert set(one.pictures) == {(CAMERA, 0), (VIEW, 0)}
    assert sorted(encoded) == ["as_jpeg"] * 3 + ["as_png"] * 3
    for one in watching:
        one.close()


def test_a_watcher_that_does_not_read_holds_nobody_up(page: LivePage, client: Client) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)  # 60 KB as a JPEG
    stalled, took = Watching(client), []
    for number in range(120):
        took.append(shown(page, np.roll(noise, number)))
        time.sleep(0.002)
    reads = Watching(client)
    took.append(shown(page, np.zeros((240, 320, 3), np.uint8)))
    reads.state(lambda state: state["ticks"])
    assert (CAMERA, 0) in reads.pictures or reads.part()
    assert sorted(took)[len(took) // 2] < 1e-3
    page.close()
    while not reads.state().get("over"):
        pass
    stalled.close()


def test_no_more_pictures_are_on_their_way_than_the_page_says_have_come(page: LivePage, client: Client) -> None:
    camera = Real()
    page.connect({"wrist": camera})
    watching = Watching(client, who="me")

    def pictures(seconds: float) -> int:
        """How many come while each look finds a new one."""
        count, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            camera.frame = camera.frame.copy()
            count += watching.part()[0] == CAMERA
        return count

    assert pictures(0.5) == live.UNDERWAY == 4
    assert send(client, "api/seen", who="me", count=3) == (200, {})
    assert pictures(0.5) == 4  # one is still on its way, and the page may have five
    assert watching.state(lambda state: state["behind"])["behind"] == pytest.approx(0.5, abs=0.3)
    send(client, "api/seen", who="somebody else", count=1000)
    assert pictures(0.2) == 0
    assert client_error(client, "api/seen", {"who": "me", "count": "1"}) == 422
    watching.close()
    page.close()
    until = time.monotonic() + 5
    while page._watchers and time.monotonic() < until:
        time.sleep(0.01)
    assert page._watchers == {}


def test_a_slow_line_gets_fewer_pictures_and_a_quick_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watcher, came = live._Watcher(), 0

    def way(seconds: float) -> int:
        """So many pictures fit; all come after so long."""
        nonlocal came
        count = 0
        while watcher.may_send():
            watcher.sent()
            count += 1
        now[0] += seconds
        came += count
        watcher.saw(came)
        assert watcher.behind == pytest.approx(seconds)
        return count

    assert [way(0.3) for _ in range(5)] == [4, 5, 6, 7, 8]  # 150 ms each way is no queue
    assert [way(0.7) for _ in range(5)] == [9, 4, 2, 1, 1]  # 0.4 s more is one
    assert [way(0.3) for _ in range(70)] == [*range(1, 60), *[60] * 11]


def test_curves_are_those_of_the_metrics_file_however_it_grows(tmp_path: Path) -> None:
    log, curves, rng = RunLog(tmp_path), Curves(tmp_path / "metrics.csv"), np.random.default_rng(0)

    def agree() -> None:
        columns = read_metrics(tmp_path)
        wanted = {}
        for name in CURVES:
            pairs = zip(columns.get("step", []), columns.get(name, []), strict=False)
            points = [pair for pair in pairs if np.isfinite(pair).all()]
            if points:
                wanted[name] = points
        assert {name: list(map(tuple, points)) for name, points in curves.read().items()} == wanted

    assert curves.read() == {}  # no file yet
    for step in range(60):
        if step % 3:
            log.metrics(step=step, success=1, success_last_20=float(rng.uniform()), actor="a, b")
        else:
            log.metrics(step=step, q=float(rng.normal()), entropy=float("nan") if step == 30 else -1.5)
        if step == 20:
            log.metrics(step=step, episode_steps=12)  # a new column: the file is written anew
        if step % 4 == 0:
            agree()
    agree()
    whole = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(whole + b"60,0.")  # half a row
    before = curves.read()
    (tmp_path / "metrics.csv").write_bytes(whole + b"60,what,,,,,\n\xff,1,\x00,,,,\n")  # damaged: holes in the curves
    assert curves.read() == before
    (tmp_path / "metrics.csv").unlink()
    assert curves.read() == before  # what was read stays
    (tmp_path / "metrics.csv").write_bytes(whole + b"60,0.25,,,,,\n")
    after = curves.read()
    assert list(before["q"]) == list(after["q"][:-1])
    assert tuple(after["q"][-1]) == (60, 0.25)
    RunLog(tmp_path).forget("step", above=30)  # a kill undid the rest
    agree()
    for step in range(31, 1500):
        log.metrics(step=step, q=step / 2)
    points = curves.read()["q"]
    assert len(points) <= live.MOST_POINTS and tuple(points[-1]) == (1499, 749.5) and len(points) > 100


def test_the_page_is_there_while_the_script_runs_and_says_when_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with live.live_page(False, 0, "infer") as nothing:
        assert nothing is None
    assert capsys.readouterr().out == ""
    with live.live_page(True, 0, "infer") as page:
        assert page is not None
        said = capsys.readouterr().out
        found = re.search(r"^http://(127\.0\.0\.1:(\d+))/(\S+)/$", said, re.MULTILINE)
        assert found is not None
        client = Client(SimpleNamespace(server_port=int(found[2]), token=found[3]))  # type: ignore[arg-type]
        about = client.get("api/about")
        assert about["script"] == "infer" and about["keys"]["success"] == "s" and about["curves"] is False
        assert client.get("api/curves") == {}
        for name, kind in (("", "text/html"), ("live.js", "text/javascript"), ("live.css", "text/css")):
            client.wire.request("GET", f"/{client.token}/{name}")
            answer = client.wire.getresponse()
            assert answer.status == 200 and answer.headers["Content-Type"].startswith(kind) and answer.read()
        watching = Watching(client)
        assert watching.state()["ticks"] == []
        with (
            pytest.raises(ConfigError, match=f"port: {found[2]} cannot"),
            live.live_page(True, int(found[2]), "x"),
        ):
            pass
    assert watching.state(lambda state: state.get("over")) == {"over": True} and watching.answer.read() == b""
    client.wire.close()
    with pytest.raises(OSError):
        client.get("api/about")


# ---- in a real browser, with the real scripts


class Program:
    """A script in its own process with its page."""

    def __init__(self, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words), "page=true"], cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said: list[str] = []
        self.address = ""
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("http"):
                self.address = line.strip()
                break
        assert self.address, "".join(self.said)
        self._reader = threading.Thread(target=lambda: self.said.extend(self.process.stdout or ()))
        self._reader.start()

    def ends(self, seconds: float = 60.0) -> int:
        code = self.process.wait(seconds)
        self._reader.join()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def start(*words: object) -> Program:
        programs.append(Program(*words))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


@pytest.fixture
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


ALONE = ("rig.operator=null", "rig.leader=null")
TOOL = "return state.tool?.[arguments[0]]"


def tool(browser: Chromium, axis: int) -> float:
    return float(browser.run(TOOL, axis))


def take_the_wheel(browser: Chromium) -> None:
    browser.wait("return state.told && document.querySelector('#told').textContent.includes('press d')", seconds=30)
    browser.press("d")
    browser.wait("return document.querySelector('#driver').textContent.startsWith('you drive, ')")


def stands(browser: Chromium) -> bool:
    """Whether the tool does not move for half a second."""
    before = browser.run("return state.tool")
    time.sleep(0.5)
    return bool(np.abs(np.subtract(before, browser.run("return state.tool"))).max() < 1e-3)


def until_it_stands(browser: Chromium) -> None:
    until = time.monotonic() + 5
    while not stands(browser):
        assert time.monotonic() < until, "the arm goes on"


@pytest.mark.browser
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_driving_with_the_keys_the_buttons_and_a_gamepad(
    browser: Chromium, start: Callable[..., Program], tmp_path: Path
) -> None:
    program = start("-m", "so101.tools.teleoperate", *ALONE, "seconds=120")
    browser.open(program.address)
    take_the_wheel(browser)
    # a canvas, not blank, and fed at about the ten frames a second that the simulation makes
    count = "return Number(document.querySelector('#cameras canvas').dataset.pictures)"
    first = browser.wait(count)
    time.sleep(2)
    assert browser.run(count) - first > 8
    assert browser.run("const c = document.querySelector('#cameras canvas'); return [c.width, c.height]") == [640, 480]
    assert browser.run("const c = document.querySelector('#views canvas'); return [c.width, c.height]") == [128, 128]

    begin = tool(browser, 0)
    browser.hold("Up")
    browser.wait(f"{TOOL} > arguments[1]", 0, begin + 0.03)
    assert browser.run("return state.action") == [0.5, 0, 0, 0] and browser.text("#held") == "away"
    browser.release()
    until_it_stands(browser)
    assert browser.run("return state.action") == [0, 0, 0, 0] and browser.text("#held") == "nothing held"
    for key, axis, sign in (("Down", 0, -1), ("Left", 1, 1), ("Right", 1, -1), ("a", 2, 1), ("z", 2, -1)):
        begin = tool(browser, axis)
        browser.hold(key)
        browser.wait(f"{TOOL} * arguments[2] > arguments[1] * arguments[2] + 0.01", axis, begin, sign)
        browser.release()
    for key, wanted in (("c", -1), ("o", 1)):
        browser.hold(key)
        browser.wait("return state.action[3] === arguments[0]", wanted)
        browser.release()
    until_it_stands(browser)

    # typing for the browser, and a key that repeats, are nothing; a slider that has the focus does not swallow a key
    browser.run("document.querySelector('#speed').focus()")
    begin = tool(browser, 1)
    browser.hold("Left")
    browser.wait(f"{TOOL} > arguments[1] + 0.01", 1, begin)
    browser.run("window.dispatchEvent(new Event('blur'))")  # another window comes to the front, and no release is told
    until_it_stands(browser)
    browser.release()
    assert browser.run("return document.querySelector('#speed').value") == "50"
    browser.run(
        "for (const more of [{ctrlKey: true}, {metaKey: true}, {altKey: true}, {repeat: true}])"
        " document.dispatchEvent(new KeyboardEvent('keydown', {key: 'q', code: 'KeyQ', ...more}))"
    )

    for times, words in enumerate(("paused after this episode: press p to go on", "goes on"), 1):
        browser.click(*browser.place("#press-pause"))
        browser.wait("return document.querySelector('#last-line').textContent === arguments[0]", words)
        assert browser.text("#press-pause span") == ("go on" if times == 1 else "pause")
    assert browser.run("return document.querySelector('#press-intervene').disabled")

    pad = (
        "window.pad = {connected: true, mapping: 'standard', index: 0, axes: [0, 0, 0, 0],"
        " buttons: Array.from({length: 17}, () => ({pressed: false, value: 0}))};"
        "navigator.getGamepads = () => [null, pad]"
    )
    browser.run(pad)
    begin = tool(browser, 1)
    browser.run("pad.axes = [-1, 0.1, 0, 0]")  # the left stick to the left, and not quite straight
    browser.wait(f"{TOOL} > arguments[1] + 0.01", 1, begin)
    assert browser.run("return state.action") == [0, 0.5, 0, 0]
    browser.run("pad.axes = [0, 0, 0, 0]; pad.buttons[7] = {pressed: true, value: 1}")
    browser.wait("return state.action[3] === -1")
    browser.run("pad.buttons[7] = {pressed: false, value: 0}; pad.buttons[9] = {pressed: true, value: 1}")
    browser.wait("return state.paused")
    time.sleep(0.3)
    assert browser.run("return state.paused")  # held down it is pressed once
    assert "left stick" in browser.text("#pad")
    assert browser.errors() == []

    driving, second = browser.here(), browser.window()
    browser.open(program.address)
    browser.wait("return state.wheel")
    browser.press("d")
    browser.wait("return document.querySelector('#problem').textContent === arguments[0]",
                 "You do not drive: another page drives; let go of the wheel there first")  # fmt: skip
    assert not browser.run("return wheel")
    assert re.fullmatch(r"another page drives, \d+ s left, then pause", browser.text("#driver"))
    browser.switch(driving)
    browser.run("pad.axes = [1, 0, 0, 0]")
    browser.wait("return state.action[1] < 0")
    with suppress(AssertionError, http.client.HTTPException, OSError):
        browser.open("chrome://crash")  # the tab dies with the stick held
    browser.switch(second)
    until_it_stands(browser)
    browser.wait("return document.querySelector('#driver').textContent.startsWith('nobody drives')")
    assert "the page was lost while it drove" in browser.text("#told")
    browser.wait("return !state.wheel")
    browser.press("d")
    browser.wait("return state.wheel === me")
    browser.click(*browser.place("#press-quit"))
    browser.wait(
        "return document.querySelector('#problem').textContent.startsWith('teleoperate has ended')", seconds=30
    )
    assert program.ends() == 0 and "ticks: mean" in "".join(program.said)
    assert browser.run("return [wheel, document.querySelector('#driver').textContent]") == [False, "ended"]
    assert browser.errors() == []


@pytest.mark.browser
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_a_program_that_is_gone_or_was_started_anew_is_told(browser: Chromium, start: Callable[..., Program]) -> None:
    program = start("-m", "so101.tools.teleoperate", *ALONE)
    port = program.address.split(":")[2].split("/")[0]
    browser.open(program.address)
    browser.wait("return state.tool", seconds=30)
    program.kill()
    browser.wait("return document.querySelector('#problem').textContent.startsWith('The program does not answer')")
    start("-m", "so101.tools.teleoperate", *ALONE, f"page_port={port}")
    browser.wait("return document.querySelector('#problem').textContent.startsWith('The program was started anew')")
    assert browser.run("return over")


@pytest.mark.browser
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_an_episode_is_recorded_from_the_page(browser: Chromium, start: Callable[..., Program], tmp_path: Path) -> None:
    folder = tmp_path / "demos"
    program = start(
        "record.py", *ALONE, f"dataset={folder}", "episodes=1", "failures=0", "steps_after_success=5",
        "env.reset_time_s=0.3", "env.control_time_s=60",
    )  # fmt: skip
    browser.open(program.address)
    take_the_wheel(browser)
    begin = tool(browser, 0)
    browser.hold("Up")
    browser.wait(f"{TOOL} > arguments[1] + 0.04", 0, begin)
    browser.release()
    browser.hold("c")
    browser.wait("return state.opening < 0.2")
    browser.release()
    browser.press("s")
    assert program.ends() == 0, "".join(program.said)
    episodes = open_dataset(folder).episodes
    columns = episodes[0].columns()
    label = load_labels(folder, open_dataset(folder).observations).episodes[0]  # type: ignore[union-attr]
    assert len(episodes) == 1 and label.success_start is not None and episodes[0].length == label.success_start + 5
    assert columns["complementary_info.is_intervention"].all()
    away = columns["action"][:, 0]
    assert (away == 0.5).sum() >= 4 and set(np.unique(away)) == {0.0, 0.5} and (columns["action"][:, 3] == -1).any()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations and a classifier."""
    folder = tmp_path_factory.mktemp("made")
    record.main(record.Config(dataset=str(folder / "demos"), episodes=8, failures=3, steps_after_success=8))
    reward = RewardConfig(views=1, steps=60, evaluate_every=20, held_out=0.4)
    train_reward.main(train_reward.Config(dataset=str(folder / "demos"), output=str(folder / "reward"), reward=reward))
    return folder


@pytest.mark.browser
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_training_and_evaluation_show_reward_curves_outcomes_and_buffers(
    browser: Chromium, start: Callable[..., Program], made: Path
) -> None:
    config = train_sac.Config(
        demonstrations=str(made / "demos"), reward_model=str(made / "reward"), output=str(made / "run"), steps=1000,
        learning_starts=10, evaluation_episodes=0, sac=SacConfig(batch_size=16, views=1, utd_ratio=2, buffer_size=500),
    )  # fmt: skip
    config.env.control_time_s, config.env.reset_time_s, config.rig.pace = 1.0, 0.1, 10.0
    save(config, made / "sac.json")
    program = start("train_sac.py", "--config", made / "sac.json")
    browser.open(program.address)
    browser.wait("return state.threshold && document.querySelectorAll('#curves .curve').length >= 3", seconds=60)
    threshold = json.loads((made / "reward" / "reward.json").read_text())["threshold"]
    assert browser.run("return state.threshold") == pytest.approx(threshold, abs=1e-4)
    browser.wait(
        r"return /^\d\.\d{3} \(success above \d\.\d{3}\)$/.test(document.querySelector('#probability').textContent)"
    )
    assert browser.run("return document.querySelector('#threshold').style.left") == f"{100 * threshold:g}%"
    browser.wait(r"return /replay \d+\+\d+/.test(document.querySelector('#facts').textContent)")
    assert re.search(r"success \d+/\d+ *alone", browser.text("#facts"))
    browser.wait(r"return /\d+ of the last \d+ succeeded/.test(document.querySelector('#outcomes').textContent)")
    assert browser.run("return document.querySelectorAll('#outcomes i').length === state.outcomes.length")
    shown = browser.run("return document.querySelector('#curve-episode_steps b + span b').textContent")
    assert 1 <= float(shown) <= 10  # an episode has ten steps at most
    browser.press("p")
    browser.wait("return document.querySelector('#driver').textContent === 'paused: press p to go on'", seconds=30)
    browser.press("p")
    browser.wait("return document.querySelector('#driver').textContent.startsWith('policy drives, ')", seconds=30)
    browser.press("d")
    time.sleep(0.3)
    browser.hold("Right")
    browser.wait("return document.querySelector('#driver').textContent.startsWith('you drive, ')", seconds=30)
    browser.release()
    browser.press("q")
    browser.wait("return over", seconds=60)
    assert program.ends() == 0, "".join(program.said)
    assert "Traceback" not in "".join(program.said) and browser.errors() == []
    helped = [
        e.columns()["complementary_info.is_intervention"].any()
        for e in open_dataset(made / "run" / "episodes").episodes
    ]
    assert any(helped)

    program = start("infer.py", f"run={made / 'run'}", "episodes=25")
    browser.open(program.address)
    browser.wait("return typeof state.probability === 'number'", seconds=60)
    browser.wait("return state.outcomes.length === 20", seconds=60)
    assert re.search(r"success \d+/\d+", browser.text("#facts")) and browser.text("#outcomes").endswith(
        "of the last 20 succeeded"
    )
    assert program.ends() == 0, "".join(program.said)
    assert browser.errors() == []


class Tunnel:
    """A line to the page as through SSH: `delay` s each way, and `rate` bytes a second towards the page.

    The same port on another address of this machine, since the server knows its port.
    """

    ADDRESS = "127.0.0.2"

    def __init__(self, port: int, delay: float, rate: float) -> None:
        self.port, self.delay, self.rate = port, delay, rate
        self._free_at, self._lock = 0.0, threading.Lock()  # when the line has sent all that it got
        self._listening = socket.create_server((self.ADDRESS, port))
        self._ends: list[socket.socket] = [self._listening]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self.port))
                self._ends += [near, far]
                for source, sink, rate in ((near, far, np.inf), (far, near, self.rate)):
                    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()
                    threading.Thread(target=self._take, args=(source, waiting, rate), daemon=True).start()
                    threading.Thread(target=self._give, args=(waiting, sink), daemon=True).start()

    def _take(self, source: socket.socket, waiting: "queue.Queue[tuple[float, bytes]]", rate: float) -> None:
        content = b"x"
        while content:
            with suppress(OSError):
                content = b""
                content = source.recv(65536)
            now = time.monotonic()
            if np.isfinite(rate):
                with self._lock:
                    self._free_at = max(now, self._free_at) + len(content) / rate
                    now = self._free_at
            waiting.put((now + self.delay, content))

    def _give(self, waiting: "queue.Queue[tuple[float, bytes]]", sink: socket.socket) -> None:
        content = b"x"
        while content:
            at, content = waiting.get()
            time.sleep(max(0.0, at - time.monotonic()))
            with suppress(OSError):
                sink.sendall(content)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.mark.browser
@pytest.mark.skipif(MISSING is not None or sys.platform != "linux", reason=f"{MISSING or 'needs 127.0.0.2'}")
@pytest.mark.parametrize("rate", [5e6, 0.4e6])
def test_through_a_tunnel_of_150_ms_each_way_driving_is_steady_and_the_picture_stays_fresh(
    start: Callable[..., Program], rate: float
) -> None:
    """The slower line takes 0.4 MB/s, where the simulation's ten pictures a second are 0.75."""
    program = start("-m", "so101.tools.teleoperate", *ALONE, "seconds=120")
    port = int(program.address.split(":")[2].split("/")[0])
    tunnel = Tunnel(port, 0.15, rate)
    with Chromium(f"--host-resolver-rules=MAP localhost {Tunnel.ADDRESS}") as browser:
        browser.open(program.address.replace("127.0.0.1", "localhost"))
        take_the_wheel(browser)
        browser.run(
            "window.seen = []; const before = show;"
            "show = (now) => { if (now.ticks) seen.push([now.action[1], now.behind]); before(now); }"
        )
        for key, ahead in (("Left", 0.5), ("Right", -0.5)):
            browser.run("seen.length = 0")
            browser.hold(key)
            time.sleep(2.5)
            actions = [action for action, _ in browser.run("return seen")]
            browser.release()
            first = actions.index(ahead)
            assert first < 12 and set(actions[first:]) == {ahead}, actions  # no tick in which it was taken for let go
            until_it_stands(browser)
        behind = [late for _, late in browser.run("return seen") if late is not None]
        assert min(behind) > 0.3 and np.median(behind) < 1.2, behind
        assert "lost" not in browser.text("#told") and browser.errors() == []
        browser.press("q")
        browser.wait("return over", seconds=30)
    tunnel.close()
    assert program.ends() == 0

"""The server of the pages, and what it does for the label page: over real sockets, without a browser."""

import gzip
import http.client
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from label_data import SMALL, files_of, full, make, make_foreign, save_sure_classifier, shade, stored

from so101.data.dataset import open_dataset
from so101.data.labels import EpisodeLabel, label_episode
from so101.errors import ConfigError, DataError
from so101.learn.eyes import Eyes
from so101.schema import Preprocess
from so101.web.label_page import LabelPage, _plain, why_read_only
from so101.web.server import (
    MOST_BYTES,
    PATIENCE,
    STRANGER_PATIENCE,
    Request,
    Server,
    Stream,
    _Handler,
    as_json,
    to_json,
)


class Client:
    """A browser's side of the wire: one kept-alive connection."""

    def __init__(self, server: Server) -> None:
        self.host, self.token = f"127.0.0.1:{server.server_port}", server.token
        self.wire = http.client.HTTPConnection(self.host, timeout=10)

    def raw(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.wire.request(method, path, body, named)
        answer = self.wire.getresponse()
        return answer.status, answer.read()

    def get(self, path: str) -> Any:
        status, content = self.raw("GET", f"/{self.token}/{path}")
        return json.loads(content) if content[:1] in b"{[" else (status, content)

    def post(self, **values: Any) -> Any:
        if "recorded" not in values:
            rows = self.get("api/episodes").get("episodes", [])
            values["recorded"] = dict(enumerate(row["recorded"] for row in rows)).get(values["episode"])
        body = json.dumps(values).encode()
        return json.loads(self.raw("POST", f"/{self.token}/api/label", body, Origin=f"http://{self.host}")[1])

    def picture(self, path: str) -> np.ndarray:
        status, content = self.raw("GET", f"/{self.token}/{path}")
        assert status == 200, content
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


@contextmanager
def serving(routes: Any) -> Iterator[Client]:
    with Server(routes) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        client = Client(server)
        yield client
        client.wire.close()
        server.shutdown()
        thread.join()


def page_of(folder: Path, spec: Preprocess | None = None, read_only: str | None = None) -> LabelPage:
    return LabelPage(open_dataset(folder), spec or Preprocess(**SMALL), None, read_only)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "lift")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "lift"))


@pytest.fixture
def client(folder: Path) -> Iterator[Client]:
    with serving(page_of(folder).routes()) as client:
        yield client


# ---- the server: who is let in


@pytest.fixture
def wire(capfd: pytest.CaptureFixture[str]) -> Iterator[Client]:
    def broken(request: Request) -> Any:
        raise ZeroDivisionError("one by nought")

    routes = {
        "GET echo": lambda request: as_json(request.query),
        "POST echo": lambda request: as_json(request.body),
        "GET broken": broken,
    }
    with serving(routes) as client:
        yield client
    said = "".join(capfd.readouterr())
    assert client.token not in said  # no log has the address


def test_only_who_knows_the_token_gets_anything(wire: Client) -> None:
    assert wire.get("echo?a=1") == {"a": "1"}
    for path in ("/echo", "/", "/x/echo", f"/{wire.token[:-1]}/echo", f"/{wire.token}x/echo", "/%C3%A9/echo", "//echo"):
        status, content = wire.raw("GET", path)
        assert status == 403 and b"token" in content, path
    assert wire.token not in wire.raw("GET", "/")[1].decode()
    assert len(wire.token) >= 32


def test_another_site_in_the_same_browser_gets_nothing(wire: Client) -> None:
    """DNS rebinding shows as a foreign Host, a forged form or fetch as a foreign or missing Origin."""
    path, own = f"/{wire.token}/echo", f"http://{wire.host}"
    port = wire.host.partition(":")[2]
    assert wire.raw("GET", path, Host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}", "127.0.0.1:1"):
        assert wire.raw("GET", path, Host=host)[0] == 403, host
    assert wire.raw("POST", path, b"[1]", Origin=own) == (200, b"[1]")
    for origin in ("null", "http://evil.example", f"https://{wire.host}", f"http://localhost:{port}"):
        assert wire.raw("POST", path, b"[1]", Origin=origin)[0] == 403, origin
    assert wire.raw("POST", path, b"[1]")[0] == 403


def test_a_body_is_json_of_limited_size(wire: Client) -> None:
    path, own = f"/{wire.token}/echo", f"http://{wire.host}"
    assert wire.raw("POST", path, b"{broken", Origin=own)[0] == 400
    assert wire.raw("POST", path, b'{"a": 1, "a": 2}', Origin=own)[0] == 400
    assert wire.raw("POST", path, b"\xff", Origin=own)[0] == 400
    for length in (str(MOST_BYTES + 1), "-1", "x", "9" * 5000):
        assert wire.raw("POST", path, b"", Origin=own, Content_Length=length)[0] in (413, 400), length[:9]
    assert wire.raw("POST", path, b"[" * 100_000, Origin=own)[0] == 400
    assert wire.get("echo?a=2") == {"a": "2"}


def test_nothing_but_the_routes_can_be_asked_for(wire: Client) -> None:
    for path in ("..", "../server.py", "%2e%2e/server.py", "static/label.html", "/etc/passwd", "echo/", "Echo", ""):
        assert wire.raw("GET", f"/{wire.token}/{path}")[0] == 404, path
    assert wire.raw("PUT", f"/{wire.token}/echo")[0] == 501


def test_a_bug_is_told_and_the_next_request_answered(wire: Client) -> None:
    assert "ZeroDivisionError: one by nought" in wire.get("broken")["error"]
    assert wire.get("echo?a=1") == {"a": "1"}


def test_it_listens_on_this_machine_only_and_a_taken_port_is_told() -> None:
    with Server({}) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert server.address == f"http://127.0.0.1:{server.server_port}/{server.token}/"
        with pytest.raises(ConfigError, match=f"port: {server.server_port} cannot be had"):
            Server({}, server.server_port)


def test_a_browser_is_opened_where_there_is_a_screen_and_over_ssh_the_tunnel_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    doorways: list[tuple[str, int]] = []

    def serve_forever() -> None:
        if wanted:
            (way,) = tmp_path.iterdir()
            doorways.append((way.read_text(), way.stat().st_mode & 0o777))
            assert wait_for(lambda: opened) == [way.as_uri()]

    with Server({}) as server:
        monkeypatch.setattr(server, "serve_forever", serve_forever)
        wanted = False
        server.run(open_browser=True)  # no screen
        monkeypatch.setenv("DISPLAY", ":0")
        server.run(open_browser=False)
        assert opened == []
        wanted = True
        server.run(open_browser=True)
        ((leads_to, mode),) = doorways
        assert f"url={server.address}" in leads_to and (os.name != "posix" or mode == 0o600)
        assert server.token not in opened[0]  # it is the browser's command line, and every user can read that
        assert list(tmp_path.iterdir()) == []
        assert "ssh" not in capsys.readouterr().out
        monkeypatch.setenv("SSH_CONNECTION", "192.0.2.7 50000 192.0.2.9 22")
        wanted = False
        server.run(open_browser=True)
        assert len(opened) == 1
        port = server.server_port
        assert f"ssh -N -L {port}:127.0.0.1:{port} " in capsys.readouterr().out


def test_a_connection_without_the_token_is_soon_closed(wire: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _Handler.timeout == STRANGER_PATIENCE < PATIENCE
    monkeypatch.setattr(_Handler, "timeout", 0.1)
    host, port = wire.host.split(":")
    assert wire.get("echo?a=1") == {"a": "1"}
    kept = wire.wire.sock
    for sent in (b"", b"GET /x HTTP/1.1\r\n", f"GET /x HTTP/1.1\r\nHost: {wire.host}\r\n\r\n".encode()):
        with socket.create_connection((host, int(port)), timeout=5) as idle:
            idle.sendall(sent)
            while idle.recv(4096):
                pass
    assert wire.get("echo?a=2") == {"a": "2"} and wire.wire.sock is kept  # after longer than that


def test_an_address_that_is_none_is_refused_without_a_traceback(
    wire: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    assert wire.raw("GET", "http://[", Host=wire.host)[0] == 400
    assert capfd.readouterr() == ("", "")


def test_large_text_is_compressed_for_who_takes_it() -> None:
    with serving({"GET large": lambda request: as_json(["unlabelled"] * 5000)}) as client:
        client.wire.request("GET", f"/{client.token}/large", headers={"Accept-Encoding": "gzip, br"})
        answer = client.wire.getresponse()
        content = answer.read()
        assert answer.headers["Content-Encoding"] == "gzip" and len(content) < 2000
        assert json.loads(gzip.decompress(content)) == ["unlabelled"] * 5000
        assert client.get("large") == ["unlabelled"] * 5000


def test_a_stream_comes_as_it_is_made_and_ends_with_its_connection(capfd: pytest.CaptureFixture[str]) -> None:
    go_on, left = threading.Event(), threading.Event()

    def parts() -> Iterator[bytes]:
        try:
            yield b"first"
            assert go_on.wait(5)
            yield b"second"
        finally:
            left.set()

    def endless() -> Iterator[bytes]:
        left.clear()
        try:
            while True:
                yield b"x" * 100_000
        finally:
            left.set()

    def broken() -> Iterator[bytes]:
        yield b"first"
        raise ZeroDivisionError("one by nought")

    routes = {
        f"GET {make.__name__}": lambda request, make=make: Stream(make(), "text/plain")
        for make in (parts, endless, broken)
    }
    with serving(routes) as client:
        client.wire.request("GET", f"/{client.token}/parts")
        answer = client.wire.getresponse()
        assert answer.read(5) == b"first"  # before the second is made
        assert answer.headers["Cache-Control"] == "no-store" and answer.headers["Content-Length"] is None
        go_on.set()
        assert answer.read() == b"second" and left.wait(5)
        with socket.create_connection(("127.0.0.1", int(client.host.split(":")[1]))) as wire:
            wire.sendall(f"GET /{client.token}/endless HTTP/1.1\r\nHost: {client.host}\r\n\r\n".encode())
            assert wire.recv(1000)
        assert left.wait(5)  # who goes away ends it, and that is no error
        assert capfd.readouterr() == ("", "")
        client.wire.request("GET", f"/{client.token}/broken")
        assert client.wire.getresponse().read() == b"first"
        assert wait_for(lambda: "one by nought" in capfd.readouterr().err)  # the terminal shows where it is
        client.wire.request("GET", f"/{client.token}/parts")
        assert client.wire.getresponse().read() == b"firstsecond"


def test_beside_a_program_it_serves_while_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with Server({"GET echo": lambda request: as_json(request.query)}) as server:
        client = Client(server)
        with pytest.raises(ZeroDivisionError), server.beside(open_browser=False):
            assert client.get("echo?a=1") == {"a": "1"}
            assert server.address in capsys.readouterr().out
            raise ZeroDivisionError
        client.wire.close()
        assert "page" not in [thread.name for thread in threading.enumerate() if thread.is_alive()]


def test_json_has_plain_numbers_and_null_for_what_is_none() -> None:
    values = {
        "array": np.array([1 / 3, np.nan, -np.inf], np.float32), "number": np.int64(3), "flag": np.bool_(True),
        "plain": [float("nan"), 0.123456, "NaN"], "whole": np.arange(3),
    }  # fmt: skip
    assert json.loads(to_json(values), parse_constant=lambda name: 1 / 0) == {
        "array": [0.3333, None, None], "number": 3, "flag": 1, "plain": [None, 0.123456, "NaN"], "whole": [0, 1, 2],
    }  # fmt: skip


# ---- the label page


def test_the_page_and_its_files_come_uncached_and_closed_to_other_sites(client: Client) -> None:
    for name, kind in (("", "text/html"), ("label.js", "text/javascript"), ("style.css", "text/css")):
        client.wire.request("GET", f"/{client.token}/{name}")
        answer = client.wire.getresponse()
        assert answer.status == 200 and len(answer.read()) > 1000
        headers = dict(answer.getheaders())
        assert headers["Content-Type"].startswith(kind) and headers["Cache-Control"] == "no-store"
        assert headers["Content-Security-Policy"].startswith("default-src 'self'")


def test_frames_are_those_recorded_and_the_view_is_what_the_network_gets(client: Client, folder: Path) -> None:
    for episode, frame in ((0, 0), (2, 7), (1, 8), (1, 9), (0, 1)):  # 9 is the closing one
        where = f"?episode={episode}&camera=wrist&frame={frame}"
        shown, view = client.picture("api/frame" + where), client.picture("api/view" + where)
        assert shown.shape == (48, 64, 3)
        assert abs(int(shown[40, 30, 0]) - shade(episode, frame)) <= 3 and shown[5].max() <= 4
        recorded = open_dataset(folder).episodes[episode].frame("wrist", frame)
        wanted = cv2.resize(recorded[0:48, 8:56], (32, 32), interpolation=cv2.INTER_AREA)
        assert np.array_equal(view, wanted)
    for where, said in (
        ("episode=0&camera=wrist&frame=10", "no frame 10"),
        ("episode=0&camera=wrist&frame=-1", "no frame -1"),
        ("episode=3&camera=wrist&frame=0", "episode 3: the dataset has 3"),
        ("episode=0&camera=side&frame=0", "camera 'side': the dataset has wrist"),
        ("episode=0&camera=wrist&frame=x", "frame: got 'x'"),
        ("episode=0&camera=wrist", "frame: got None"),
    ):
        assert said in client.get(f"api/frame?{where}")["error"]


def test_a_label_goes_into_the_file_and_shows_frame_by_frame(client: Client, folder: Path) -> None:
    before = files_of(folder)
    answer = client.post(episode=0, before=None, label=full(success_start=4, exclude=[6, 2]))
    assert stored(folder) == {"0": {"success_start": 4, "exclude": [6, 2]}}
    row = answer["episodes"][0]
    assert (row["frames"], row["text"]) == ("000011x111", "from 4 without [6, 2]")
    assert [row["frames"] for row in answer["episodes"][1:]] == ["-" * 10] * 2
    answer = client.post(episode=0, before=row["label"], label=full(ranges=[[2, 3], [8, None]], skip=True))
    assert answer["episodes"][0]["frames"] == "0010000011" and stored(folder)["0"]["skip"]
    answer = client.post(episode=0, before=answer["episodes"][0]["label"], label=full(skip=True))
    assert answer["episodes"][0]["frames"] == "-" * 10
    client.post(episode=0, before=full(skip=True), label=None)
    assert stored(folder) == {}
    assert files_of(folder) == before  # nothing is written inside the dataset
    assert sorted(path.name for path in folder.parent.iterdir()) == ["lift", "lift.labels.json"]


@pytest.mark.parametrize(
    "body, said",
    [
        ({"label": {"success_start": 10}}, "success start 10 is past the last frame, 9"),
        ({"label": {"success_start": 1, "all_fail": True}}, "got success_start and all_fail"),
        ({"label": {"sucess_start": 1}}, "must be null or the fields of a label"),
        ({"label": {"success_start": "1"}}, "success_start has '1'"),
        ({"label": [1]}, "must be null or the fields"),
        ({"label": {"all_fail": True}, "episode": 3}, "episode 3: the dataset has 3"),
        ({"label": {"all_fail": True}, "episode": "0"}, "episode '0'"),
        ({"label": {"all_fail": True}, "frames": 1}, "and nothing else"),
        ({"label": {"all_fail": True}, "recorded": "1.2.3"}, "episode 1: was recorded anew meanwhile; look at it"),
    ],
)
def test_what_is_no_label_is_refused_in_words(client: Client, folder: Path, body: dict[str, Any], said: str) -> None:
    assert said in client.post(**{"episode": 1, "before": None, **body})["error"]
    assert stored(folder) == {}


def test_labels_that_others_give_meanwhile_are_kept(client: Client, folder: Path) -> None:
    client.get("api/episodes")
    label_episode(folder, 1, EpisodeLabel(success_start=5))  # a recorder, or a second tab
    client.post(episode=0, before=None, label=full(all_fail=True))
    assert stored(folder) == {"0": {"all_fail": True}, "1": {"success_start": 5}}
    error = client.post(episode=1, before=None, label=full(all_fail=True))["error"]
    assert "was labelled from 5 elsewhere meanwhile, and that is kept" in error
    assert stored(folder)["1"] == {"success_start": 5}


def test_what_a_recorder_appends_appears(client: Client, folder: Path) -> None:
    first = client.get("api/episodes")
    assert client.get(f"api/episodes?version={first['version']}") == {"version": first["version"]}
    make(folder, episodes=1)
    label_episode(folder, 3, EpisodeLabel(success_start=5))
    now = client.get(f"api/episodes?version={first['version']}")
    assert len(now["episodes"]) == 4 and now["episodes"][3]["text"] == "from 5"
    assert client.picture("api/frame?episode=3&camera=wrist&frame=0").shape == (48, 64, 3)


def test_a_dataset_that_is_recorded_anew_is_seen_anew_and_not_labelled_unseen(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "api/frame?episode=1&camera=wrist&frame=3"
    first = client.get("api/episodes")
    assert client.picture(where)[40, 30, 0] == pytest.approx(shade(1, 3), abs=3)
    make(folder, episodes=1)  # what was there stays what it was
    grown = client.get("api/episodes")
    assert [row["recorded"] for row in grown["episodes"][:3]] == [row["recorded"] for row in first["episodes"]]
    shutil.rmtree(folder)
    assert "no such folder" in client.get("api/episodes")["error"]
    monkeypatch.setattr("label_data.shade", lambda episode, frame: 200 - 10 * frame)
    make(folder, episodes=4)
    old = grown["episodes"][1]["recorded"]
    error = client.post(episode=1, before=None, label=full(success_start=3), recorded=old)["error"]
    assert "episode 1: was recorded anew meanwhile" in error and stored(folder) == {}
    now = client.get(f"api/episodes?version={grown['version']}")
    assert now["episodes"][1]["recorded"] != old
    assert client.picture(where)[40, 30, 0] == pytest.approx(170, abs=3)
    client.post(episode=1, before=None, label=full(success_start=3))
    assert stored(folder) == {"1": {"success_start": 3}}
    shutil.rmtree(folder)
    make(folder, image={"crop": [0, 8, 48, 48], "image_size": 64})
    assert "made anew with another rate, camera or schema" in client.get("api/episodes")["error"]


def test_a_label_that_is_refused_as_the_dataset_is_gone_is_not_saved(client: Client, folder: Path) -> None:
    rows = client.get("api/episodes")["episodes"]
    info = folder / "meta" / "info.json"
    text = info.read_text()
    for torn in (text[:100], None):
        info.unlink() if torn is None else info.write_text(torn)
        answer = client.post(episode=1, before=None, label=full(all_fail=True), recorded=rows[1]["recorded"])
        assert "info.json" in answer["error"] and stored(folder) == {}


def test_a_label_that_the_disk_does_not_take_is_told_and_the_file_stays(client: Client, folder: Path) -> None:
    client.post(episode=0, before=None, label=full(success_start=4))
    path = folder.with_name("lift.labels.json")
    before = path.read_bytes()
    resource = pytest.importorskip("resource", reason="this system has no limit of a file's size")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # as a full disk: a write fails in its midst
    try:
        error = client.post(episode=1, before=None, label=full(all_fail=True))["error"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error == f"{path}: File too large"
    assert path.read_bytes() == before
    assert client.post(episode=1, before=None, label=full(all_fail=True))["episodes"][1]["text"] == "all fail"


def test_a_label_file_that_someone_broke_is_told_and_never_replaced(client: Client, folder: Path) -> None:
    path = folder.with_name("lift.labels.json")
    path.write_text("{")
    assert "lift.labels.json: no usable JSON" in client.get("api/episodes")["problem"]
    assert "no usable JSON" in client.post(episode=0, before=None, label=full(all_fail=True))["error"]
    assert path.read_text() == "{"
    path.write_text('{"dataset": "lift", "episodes": {"1": {"success_start": 50}, "7": {"skip": true}}}')
    rows = client.get("api/episodes")["episodes"]
    assert "success start 50 is past the last frame, 9" in rows[1]["problem"]


def test_a_damaged_video_is_named_and_the_other_episodes_go_on(client: Client, folder: Path) -> None:
    video = sorted(folder.glob("videos/*/*/*.mp4"))[1]
    video.write_bytes(b"no video at all")
    error = client.get("api/frame?episode=1&camera=wrist&frame=0")["error"]
    assert str(video) in error and "not a readable video" in error
    assert client.picture("api/frame?episode=0&camera=wrist&frame=0").shape == (48, 64, 3)
    assert client.post(episode=1, before=None, label=full(all_fail=True))["episodes"][1]["text"] == "all fail"


def test_curves_are_the_columns_with_their_names(client: Client) -> None:
    curves = {curve["name"]: curve["entries"] for curve in client.get("api/curves?episode=1")}
    assert {"action", "observation.state", "next.reward", "complementary_info.is_intervention"} <= set(curves)
    assert not {"index", "timestamp", "episode_index"} & set(curves)
    assert [entry["name"] for entry in curves["action"]] == ["delta_x", "delta_y", "delta_z", "gripper"]
    assert curves["observation.state"][12]["name"] == "tool.x"
    assert curves["observation.state"][12]["values"] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert curves["complementary_info.is_intervention"][0]["values"] == [0.0] * 6 + [1.0] * 3
    values = np.array([2047.0, 2049.0, 123456789.0, np.float32(0.1), 0.12345678, np.inf, np.nan])
    assert _plain(values) == [2047.0, 2049.0, 123456789.0, 0.1, 0.1234568, None, None]


def test_a_foreign_dataset_is_shown_and_labelled_and_a_crop_that_does_not_fit_is_told(tmp_path: Path) -> None:
    folder = make_foreign(tmp_path / "theirs", {"front": (84, 84), "side": (48, 64)})
    before = files_of(folder)
    with serving(page_of(folder, Preprocess()).routes()) as client:
        front, side = client.get("api/about")["cameras"]
        assert "crop [0, 80, 480, 480] does not fit a 84x84 frame" in front["problem"] and side["problem"]
        assert "needs crop=null" in client.get("api/view?episode=0&camera=front&frame=0")["error"]
        assert client.picture("api/frame?episode=1&camera=front&frame=8").shape == (84, 84, 3)
        assert "no frame 9" in client.get("api/frame?episode=1&camera=side&frame=9")["error"]
        curves = {curve["name"]: curve["entries"] for curve in client.get("api/curves?episode=0")}
        assert "next.reward" not in curves and curves["action"][3]["name"] == "motor_3"
        assert curves["observation.state"][0]["values"][1:4] == [0.1, None, 0.3]
        answer = client.post(episode=1, before=None, label=full(success_start=8))
        assert answer["episodes"][1]["frames"] == "000000001"
        assert "past the last frame, 8" in client.post(episode=0, before=None, label=full(success_start=9))["error"]
    with serving(page_of(folder, Preprocess(crop=None, image_size=64)).routes()) as client:
        front, side = client.get("api/about")["cameras"]
        assert front["problem"] is None and "not square" in side["problem"]
        assert client.picture("api/view?episode=0&camera=front&frame=0").shape == (64, 64, 3)
    assert files_of(folder) == before


def test_to_look_at_only_takes_no_label(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_read_only(folder, view=False) is None
    with serving(page_of(folder, read_only=why_read_only(folder, view=True)).routes()) as client:
        assert client.get("api/about")["read_only"].startswith("opened to look at only")
        assert "to look at only" in client.post(episode=0, before=None, label=full(all_fail=True))["error"]
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    assert f"{tmp_path} cannot be written" in str(why_read_only(folder, view=False))
    assert not folder.with_name("lift.labels.json").exists()


# ---- the classifier


def wait_for(ask: Callable[[], Any]) -> Any:
    for _ in range(2000):
        if answer := ask():
            return answer
        threading.Event().wait(0.005)
    raise AssertionError("did not come")


def test_the_judge_says_of_each_frame_what_the_live_classifier_would(folder: Path, tmp_path: Path) -> None:
    from so101.web.judge import Judge

    dataset = open_dataset(folder)
    assert dataset.schema is not None
    reward = save_sure_classifier(tmp_path / "reward", dataset.schema, threshold=0.5)
    sorted(folder.glob("videos/*/*/*.mp4"))[2].write_bytes(b"damaged")
    page = LabelPage(dataset, Preprocess(**SMALL), Judge(reward, dataset), None)
    with serving(page.routes()) as client:
        assert client.get("api/about")["threshold"] == 0.5
        first = wait_for(lambda: client.get("api/judged?first=1&since=0")["judged"])[0]
        assert first["episode"] == 1  # the one that is looked at
        wait_for(lambda: client.get("api/judged?first=1&since=0")["waiting"] == 0)
        answers = {one["episode"]: one for one in client.get("api/judged?first=1&since=0")["judged"]}
        assert len(client.get("api/judged?first=1&since=2")["judged"]) == 1
    assert "not a readable video" in answers[2]["error"]
    eyes = Eyes(None, reward, dataset.schema, 0, 0, 0, "cpu")
    for episode in dataset.episodes[:2]:
        for index in range(episode.observations):
            small = cv2.resize(episode.frame("wrist", index)[0:48, 8:56], (32, 32), interpolation=cv2.INTER_AREA)
            p = eyes.detector.probability(eyes.encoder.encode(small[None])[0])
            assert abs(answers[episode.index]["probability"][index] - p) < 2e-4
            assert answers[episode.index]["success"][index] == str(int(p > 0.5))


def test_the_judge_takes_a_few_frames_at_once_names_the_guard_and_judges_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from so101.learn.reward import StateGuard
    from so101.web import judge as module

    dataset = open_dataset(folder)
    assert dataset.schema is not None
    guard = StateGuard((0.25, 0.65), (-1.0, 2.0))  # the tool's height is row / 10
    reward = save_sure_classifier(tmp_path / "reward", dataset.schema, guard=guard)
    read: list[int] = []  # frames before each batch

    def preprocess(frame: np.ndarray, spec: Preprocess) -> np.ndarray:
        read[-1] += 1
        return plain(frame, spec)

    def run_trunk(pixels: torch.Tensor) -> torch.Tensor:
        read.append(0)
        return trunk(pixels)

    plain = module.preprocess
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "preprocess", preprocess)
    judge = module.Judge(reward, dataset)
    trunk = judge._eyes.encoder.run_trunk
    monkeypatch.setattr(judge._eyes.encoder, "run_trunk", run_trunk)
    read.append(0)
    recorded = {0: "a"}
    wait_for(lambda: judge.answers(dataset.episodes[:1], recorded, 0, 0)["waiting"] == 0)
    assert read == [4, 4, 2, 0]
    (answer,) = judge.answers(dataset.episodes[:1], recorded, 0, 0)["judged"]
    assert answer["success"] == "ggg1111ggg" and answer["recorded"] == "a"
    recorded = {0: "b"}
    wait_for(lambda: judge.answers(dataset.episodes[:1], recorded, 0, 1)["judged"])
    assert judge.answers(dataset.episodes[:1], recorded, 0, 1)["judged"][0]["recorded"] == "b"


def test_a_classifier_without_its_encoders_name_is_refused(folder: Path, tmp_path: Path) -> None:
    from so101.web.judge import Judge

    dataset = open_dataset(folder)
    reward = save_sure_classifier(tmp_path / "reward", dataset.schema or {})
    about = json.loads((reward / "reward.json").read_text())
    for wrong in (None, [], {"encoder": 3}):
        (reward / "reward.json").write_text(json.dumps({**about, "provenance": {"config": wrong}}))
        with pytest.raises(DataError, match=r"reward\.json: provenance\.config must hold the encoder's name"):
            Judge(reward, dataset)


def test_a_classifier_of_another_schema_is_refused_by_what_differs(folder: Path, tmp_path: Path) -> None:
    from so101.web.judge import Judge

    dataset = open_dataset(folder)
    other = {**(dataset.schema or {}), "gripper_step": 0.25}
    reward = save_sure_classifier(tmp_path / "reward", other)
    with pytest.raises(DataError, match="gripper_step is 0.25 there, 0.5 here"):
        Judge(reward, dataset)
    with pytest.raises(DataError, match="no usable reward classifier"):
        Judge(tmp_path / "nowhere", dataset)
    foreign = open_dataset(make_foreign(tmp_path / "theirs", {"front": (84, 84)}))
    with pytest.raises(DataError, match="says nothing of its states"):
        Judge(reward, foreign)

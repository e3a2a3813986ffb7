"""A small HTTP server for the pages of this machine's own browser.

It listens on 127.0.0.1 only, and answers only under a path that begins with a random token, to a Host that is
this server, and to a POST only from a page of its own: another program, another user or another site in the
same browser gets nothing. What is served is a table of routes, so that no path on the disk can be asked for.
"""

import gzip
import hmac
import json
import os
import re
import secrets
import sys
import tempfile
import threading
import traceback
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from getpass import getuser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import cv2
import numpy as np

from so101.errors import ConfigError, DataError, UserError
from so101.files import parse_json

STATIC = Path(__file__).parent / "static"
KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
MOST_BYTES = 1 << 20  # of a POST's body
LARGE_BYTES = 8192  # from here on text is worth compressing: the labels of 1000 episodes are 300 KB, and then 20
PATIENCE = 300  # s without a request, after which a kept-alive connection is closed
STRANGER_PATIENCE = 5  # s, where it has not shown the token: 1000 such connections would leave no room for the page's
HEADERS = {
    "Cache-Control": "no-store",  # the address holds the token, and must not end up in a cache on the disk
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Request:
    """What a route is called with: the query's last value of each name, and a POST's JSON."""

    query: dict[str, str]
    body: Any = None

    def number(self, name: str) -> int:
        """A whole number of the query. Raises DataError where there is none."""
        try:
            return int(self.query.get(name, ""))
        except ValueError:
            raise DataError(f"{name}: got {self.query.get(name)!r}, must be a whole number") from None


class Answer(NamedTuple):
    """What a route gives back."""

    content: bytes
    kind: str


class Stream(NamedTuple):
    """What a route gives back that goes on: parts as they come, until it ends or the browser goes away."""

    parts: Iterator[bytes]
    kind: str


Route = Callable[[Request], Answer | Stream]


def as_json(value: Any) -> Answer:
    """An answer of plain values, none of them NaN."""
    return Answer(json.dumps(value, allow_nan=False).encode(), "application/json")


def as_jpeg(rgb: np.ndarray, quality: int) -> Answer:
    """A picture (H, W, 3) uint8 RGB."""
    return _encoded(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, quality])


def as_png(rgb: np.ndarray) -> Answer:
    """The same without loss."""
    return _encoded(".png", rgb, [cv2.IMWRITE_PNG_COMPRESSION, 1])


def _encoded(suffix: str, rgb: np.ndarray, options: list[int]) -> Answer:
    content = cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)[1]
    return Answer(content.tobytes(), {".jpg": "image/jpeg", ".png": "image/png"}[suffix])


def to_json(values: Any) -> bytes:
    """JSON, with numpy's arrays and numbers as plain ones of 4 decimals; NaN and infinity, which it lacks, as null."""
    text = json.dumps(values, default=lambda value: np.round(np.asarray(value, np.float64), 4).tolist())
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda name: None))
    return text.encode()


def static(name: str) -> Route:
    """The route of a file in static/."""
    path = STATIC / name
    return lambda request: Answer(path.read_bytes(), KINDS[path.suffix])


class Server(ThreadingHTTPServer):
    """Serves `routes`, such as {"GET api/frame": function}; "GET " is the page itself. Use it in a `with`.

    A route's UserError or OSError goes to the page as {"error": what it says}.
    """

    daemon_threads = True  # a connection that is kept alive does not hold up the end of the program

    def __init__(self, routes: Mapping[str, Route], port: int = 0) -> None:
        """Port 0 takes a free one. Raises ConfigError where the port cannot be had."""
        self.routes, self.token = routes, secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"page_port: {port} cannot be had: {error}; 0 takes a free one") from None
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def address(self) -> str:
        """Where the page is, token included."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def run(self, open_browser: bool) -> None:
        """Say where the page is, open it where there is a screen to open it on, and serve until Ctrl-C.

        Raises ConfigError where it should be opened and the home folder cannot be written.
        """
        with self.shown(open_browser):
            print("Ctrl-C ends it", flush=True)
            self.serve_forever()

    @contextmanager
    def beside(self, open_browser: bool) -> Iterator[None]:
        """The same in a thread, while the program does something else."""
        with self.shown(open_browser):
            thread = threading.Thread(target=self.serve_forever, name="page", daemon=True)
            thread.start()
            try:
                yield
            finally:
                self.shutdown()

    @contextmanager
    def shown(self, open_browser: bool) -> Iterator[None]:
        """Say where the page is, and open it where that is wanted and there is a screen to open it on."""
        print(self.address, flush=True)
        remote = os.environ.get("SSH_CONNECTION", "").split()
        if len(remote) == 4:
            port = self.server_port
            place = f"{getuser()}@{remote[2]}" + ("" if remote[3] == "22" else f" -p {remote[3]}")
            print(f"from your own machine, first: ssh -N -L {port}:127.0.0.1:{port} {place}", flush=True)
        elif open_browser and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
            with _doorway(self.address) as doorway:
                threading.Thread(target=webbrowser.open, args=(doorway.as_uri(),), daemon=True).start()
                yield
                return
        yield

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the midst of an answer is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


@contextmanager
def _doorway(address: str) -> Iterator[Path]:
    """A page that leads to `address`, in a file that only this user can read.

    The browser's command line, which every user of the machine sees, then has no token. It lies in the home folder
    under a plain name, as a browser that is a snap reads neither /tmp nor hidden files.
    """
    try:
        descriptor, name = tempfile.mkstemp(".html", "so101_page_", Path.home())
    except OSError as error:
        raise ConfigError(f"open: {Path.home()}: {error.strerror}; say open=false, and open the address") from None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">\n')
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


class _Refused(Exception):
    """A request that no route gets to see: status, and why."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive: through a tunnel each new connection would cost a round trip more
    disable_nagle_algorithm = True  # else the second packet of an answer waits 40 ms for the first one's receipt
    wbufsize = -1
    timeout = STRANGER_PATIENCE
    server: Server

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a log would hold the token."""

    def _serve(self, method: str) -> None:
        status, headers = 200, dict(HEADERS)
        try:
            answer = self._route(method)
        except _Refused as refusal:
            status, why = refusal.args
            answer, headers = (
                as_json({"error": why}),
                {**HEADERS, "Connection": "close"},
            )  # its body may still be unread
        except UserError as error:
            status, answer = 422, as_json({"error": str(error)})
        except OSError as error:  # a full disk, a folder that may not be written
            status, answer = 507, as_json({"error": f"{error.filename or 'disk'}: {error.strerror or error}"})
        except Exception as error:  # a bug: the page must not wait for ever, the terminal shows where it is
            traceback.print_exc()
            status, answer = 500, as_json({"error": f"a bug, see the terminal: {type(error).__name__}: {error}"})
        self.send_response(status)
        if isinstance(answer, Stream):
            self._stream(answer, headers)
            return
        content = answer.content
        if (
            len(content) > LARGE_BYTES
            and "image" not in answer.kind
            and "gzip" in self.headers.get("Accept-Encoding", "")
        ):
            content, headers["Content-Encoding"] = gzip.compress(content, 1), "gzip"
        headers |= {"Content-Type": answer.kind, "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, answer: Stream, headers: dict[str, str]) -> None:
        """Its length is not known, so the end of the connection is its end."""
        for name, value in (headers | {"Content-Type": answer.kind, "Connection": "close"}).items():
            self.send_header(name, value)
        self.end_headers()
        for part in answer.parts:
            self.wfile.write(part)
            self.wfile.flush()

    def _route(self, method: str) -> Answer | Stream:
        host, server = self.headers.get("Host", ""), self.server
        if host not in server.hosts:
            raise _Refused(403, f"Host {host!r} is not this server; through a tunnel both ends need the same port")
        try:
            address = urlsplit(self.path)
        except ValueError:
            raise _Refused(400, "this is no address") from None
        token, _, name = address.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), server.token.encode()):
            raise _Refused(403, "the address needs the token that was printed when the server started")
        self.connection.settimeout(PATIENCE)
        route = server.routes.get(f"{method} {name}")
        if route is None:
            raise _Refused(404, "there is nothing here")
        query = dict(parse_qsl(address.query))
        return route(Request(query) if method == "GET" else Request(query, self._body(host)))

    def _body(self, host: str) -> Any:
        if self.headers.get("Origin") != f"http://{host}":
            raise _Refused(403, "only a page of this server may change something")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > MOST_BYTES:
            raise _Refused(413, f"a body must say its length, at most {MOST_BYTES} bytes")
        try:
            return parse_json(self.rfile.read(int(length)).decode())
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"no usable JSON: {error}") from None

"""A real Chromium for the tests of the pages, driven through chromedriver's own protocol (W3C WebDriver) by HTTP."""

import base64
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = None if BROWSER and DRIVER else "needs chromium and chromedriver (apt-get install chromium chromium-driver)"
KEYS = {
    "Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015", "Home": "\ue011", "End": "\ue010",
    "Delete": "\ue017", "Escape": "\ue00c", "Shift": "\ue008",
}  # fmt: skip


class Chromium:
    """One browser, in a `with`. Keys and clicks are the browser's own, as from a keyboard and a mouse."""

    def __init__(self, *more: str, width: int = 1440, height: int = 900) -> None:
        """`more` are command line arguments of Chromium's."""
        command = [str(DRIVER), "--port=0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self._process.stdout is not None
        found = None
        while found is None:
            found = re.search(r"started successfully on port (\d+)", self._process.stdout.readline())
        self._http = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"]
        arguments += more
        options = {"args": arguments, "binary": BROWSER}
        self._session = ""
        # "none": `open` waits itself. One load in 40 chromedriver 150 waits for ever for a page that is there.
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}, "pageLoadStrategy": "none"}
        try:
            made = self._ask("POST", "session", capabilities={"alwaysMatch": wanted})
        except BaseException:
            self._stop()
            raise
        self._session = f"session/{made['sessionId']}/"

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._stop()

    def _stop(self) -> None:
        self._http.close()
        os.killpg(self._process.pid, signal.SIGKILL)  # with the browser, which outlives a driver that hangs
        self._process.communicate()

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        where = f"/{self._session}{path}".rstrip("/")
        self._http.request(method, where, json.dumps(body) if method == "POST" else None)
        value = json.loads(self._http.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{path}: {value['error']}: {value['message']}")
        return value

    def open(self, address: str) -> None:
        """Load a page, and wait until it is loaded; the page that is shown already is loaded again."""
        self.run("window.left = true")
        self._ask("POST", "url", url=address)
        if self.run("return window.left && location.href == arguments[0]", address):  # only another #place
            self._ask("POST", "refresh")
        self.wait("return !window.left && document.readyState == 'complete'")

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns, awaited where it is a promise."""
        return self._ask("POST", "execute/sync", script=script, args=list(arguments))

    def press(self, *keys: str) -> None:
        """Press and release keys one after the other: a character, a name of KEYS, or `Shift+Left`."""
        actions = []
        for key in keys:
            held = [KEYS["Shift"]] if key.startswith("Shift+") else []
            name = key.removeprefix("Shift+")
            pressed = [*held, KEYS.get(name, name)]
            actions += [{"type": "keyDown", "value": one} for one in pressed]
            actions += [{"type": "keyUp", "value": one} for one in reversed(pressed)]
        self._ask("POST", "actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def hold(self, key: str) -> None:
        """Press a key and keep it down."""
        actions = [{"type": "keyDown", "value": KEYS.get(key, key)}]
        self._ask("POST", "actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def release(self) -> None:
        """Let go of all that is held."""
        self._ask("DELETE", "actions")

    def click(self, x: float, y: float, to: tuple[float, float] | None = None) -> None:
        """Click at a place of the page in CSS pixels, or drag from there to another."""
        moves = [(x, y), *([to] if to else [])]
        steps = [{"type": "pointerMove", "x": round(a), "y": round(b), "duration": 0} for a, b in moves]
        actions = [steps[0], {"type": "pointerDown", "button": 0}, *steps[1:], {"type": "pointerUp", "button": 0}]
        self._ask("POST", "actions", actions=[{"type": "pointer", "id": "mouse", "actions": actions}])

    def place(self, selector: str, across: float = 0.5, down: float = 0.5) -> tuple[float, float]:
        """A point of the first element that a CSS selector finds, as a share of its width and height."""
        box = self.run(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'nearest'});"
            "const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]",
            selector,
        )
        return box[0] + across * box[2], box[1] + down * box[3]

    def text(self, selector: str) -> str:
        """What an element says."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def wait(self, script: str, *arguments: Any, seconds: float = 10.0) -> Any:
        """Run a script until what it returns is true, and return that."""
        end = time.monotonic() + seconds
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < end, f"did not come true in {seconds} s: {script} {arguments}"
            time.sleep(0.02)
        return value

    def size(self, width: int, height: int) -> None:
        """Give the window another size."""
        self._ask("POST", "window/rect", width=width, height=height)

    def window(self) -> str:
        """Open another window, go there, and return its name. (A tab that is not in front takes no keys.)"""
        name = self._ask("POST", "window/new", type="window")["handle"]
        self.switch(name)
        return str(name)

    def here(self) -> str:
        """The name of the window that takes the keys."""
        return str(self._ask("GET", "window"))

    def switch(self, name: str) -> None:
        """Go to another window."""
        self._ask("POST", "window", handle=name)

    def delay(self, milliseconds: float) -> None:
        """Let every answer come so much later."""
        conditions = {"offline": False, "latency": milliseconds, "throughput": -1}
        self._ask("POST", "chromium/network_conditions", network_conditions=conditions)

    def close(self) -> None:
        """Close the window; `switch` to another one."""
        self._ask("DELETE", "window")

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self._ask("GET", "screenshot")))

    def errors(self) -> list[str]:
        """What the page's console was told of errors since it was asked last; refused requests are not meant."""
        told = self._ask("POST", "se/log", type="browser")
        severe = [entry["message"] for entry in told if entry["level"] == "SEVERE"]
        return [message for message in severe if "Failed to load resource" not in message]

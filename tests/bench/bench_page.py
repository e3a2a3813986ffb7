"""What watching costs the program that is watched: CPU share of one core, and late ticks, with 0, 1 and 2 pages open.

    python tests/bench/bench_page.py                   about a minute
    python tests/bench/bench_page.py seconds=60

The program controls a simulated arm at 10 Hz in real time and has a camera of 640x480 at 30 frames/s; each page is a
process of its own. What is measured is CPU time, so that a busy machine does not change it. Wanted: under 10 % for two
pages, and no control tick: as few late ones as without a page.
"""

import http.client
import itertools
import json
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import numpy as np

from so101.env import Env, EnvConfig
from so101.rig import RigConfig, open_rig
from so101.robot.arm import Arm
from so101.robot.bus import ServoBus
from so101.schema import Preprocess, RewardSpec
from so101.sim.servos import SIM_CALIBRATION, SimPort
from so101.timing import SUBSTEP, Clock, Rate
from so101.web.live_page import CAMERA, HEAD, STATE, LivePage
from so101.web.server import Server

FPS, CAMERA_FPS, WANTED = 10, 30, 0.10
SEEN_S = 0.1  # as in live.js


class RealTime(Clock):
    """The machine's clock, and servos that have moved on whenever somebody has waited."""

    def __init__(self, servos: object) -> None:
        super().__init__()
        self.servos, self.moved = servos, 0.0

    def sleep_until(self, deadline: float) -> None:
        super().sleep_until(deadline)
        while self.moved + SUBSTEP <= self.now():
            self.servos.step(SUBSTEP)  # type: ignore[attr-defined]
            self.moved += SUBSTEP


class Film:
    """A camera's thread: pictures of the simulated one, over and over at its rate."""

    def __init__(self, pictures: list[np.ndarray], clock: Clock) -> None:
        self._pictures, self._clock, self._newest = itertools.cycle(pictures), clock, (pictures[0], clock.now())
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        rate = Rate(self._clock, 1 / CAMERA_FPS)
        while True:
            rate.wait()
            self._newest = next(self._pictures), self._clock.now()

    def latest(self) -> tuple[np.ndarray, float]:
        return self._newest

    def wait_ready(self) -> None:
        """Always is."""


def main(seconds: float) -> None:
    """Print the table."""
    page = LivePage("bench")
    with Server(page.routes()) as server, open_rig(RigConfig(leader=None, pace=1000.0), 0) as rig:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = rig.make_env(EnvConfig(control_time_s=1e6), Preprocess(), RewardSpec(), 0)
        pictures = [env.reset()[0].frames["wrist"]]
        while len(pictures) < 60:
            pictures.append(
                env.step(np.array([0.0, 0.3 * (-1) ** (len(pictures) // 20), 0.0, 0.0])).observation.frames["wrist"]
            )
        port = rig.arm.bus.port
        assert isinstance(port, SimPort)
        clock = RealTime(port.servos)
        bus = ServoBus(port, names=SIM_CALIBRATION.names, reopen=port.open, clock=clock)
        rig.arm, rig.clock, rig.page = Arm(bus, SIM_CALIBRATION), clock, page
        rig.arm.configure()
        rig.cameras = {"wrist": Film(pictures, Clock())}
        page.connect(rig.cameras)
        env = rig.make_env(EnvConfig(control_time_s=1e6), Preprocess(), RewardSpec(), 0)
        print(f"{'pages':>5}{'CPU %':>8}{'for them':>10}{'wanted':>8}{'pictures/s':>16}{'late':>6}{'p99 ms':>8}")
        alone = 0.0
        for pages in (0, 1, 2):
            share, late, periods, seen = measure(env, server.address, pages, seconds)
            alone = share if pages == 0 else alone
            cost = "" if pages == 0 else f"{100 * (share - alone):.1f}"
            wanted = f"< {100 * WANTED:.0f}" if pages == 2 else ""
            rates = " ".join(f"{count / seconds:.1f}" for count in seen)
            p99 = 1000 * np.percentile(periods, 99)
            print(f"{pages:5d}{100 * share:8.1f}{cost:>10}{wanted:>8}{rates:>16}{late:6d}{p99:8.1f}", flush=True)


def measure(env: Env, address: str, pages: int, seconds: float) -> tuple[float, int, np.ndarray, list[int]]:
    """CPU share of this process, ticks that came late, their periods (s), and the pictures that each page got."""
    env.reset()
    command = [sys.executable, __file__, "watch", address, str(seconds)]
    watchers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(pages)]
    for watcher in watchers:
        assert watcher.stdout is not None and watcher.stdout.readline() == "watches\n"
    env.rate.restart()
    before, times = env.rate.overruns, [time.perf_counter()]
    began, busy = time.perf_counter(), time.process_time()
    for tick in range(round(seconds * FPS)):
        env.step(np.array([0.2 * np.sin(tick / 10), 0.2 * np.cos(tick / 10), 0, 0]))
        times.append(time.perf_counter())
    share = (time.process_time() - busy) / (time.perf_counter() - began)
    seen = [int(watcher.communicate()[0]) for watcher in watchers]
    return share, env.rate.overruns - before, np.diff(times), seen


def watch(address: str, seconds: float) -> None:
    """What a browser does: take what comes, and say how many pictures came. Prints how many the camera's were."""
    where = urlsplit(address)
    stream, signs = (http.client.HTTPConnection(where.netloc, timeout=10) for _ in range(2))
    who = str(time.perf_counter_ns())
    stream.request("GET", f"{where.path}api/live?who={who}")
    answer = stream.getresponse()
    print("watches", flush=True)
    began = told = time.monotonic()
    camera = count = 0
    while time.monotonic() - began < seconds:
        kind, _, length = HEAD.unpack(answer.read(HEAD.size))
        answer.read(length)
        camera, count = camera + (kind == CAMERA), count + (kind != STATE)
        if time.monotonic() - told > SEEN_S:
            told = time.monotonic()
            body = json.dumps({"who": who, "count": count})
            signs.request("POST", f"{where.path}api/seen", body, {"Origin": f"http://{where.netloc}"})
            signs.getresponse().read()
    print(camera)


if __name__ == "__main__":
    if sys.argv[1:2] == ["watch"]:
        watch(sys.argv[2], float(sys.argv[3]))
    else:
        main(float(sys.argv[1].removeprefix("seconds=")) if sys.argv[1:] else 20.0)

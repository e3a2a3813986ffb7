"""The control loop keeps its period while a camera streams and an episode is encoded beside it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from so101.data.dataset import open_dataset
from so101.robot.calibration import save_calibration
from so101.sim.servos import SIM_CALIBRATION

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="this system has no pseudo-terminals"),
]
ROOT = Path(__file__).parent.parent
EPISODE_S, EPISODES, SIZE = 20, 2, (640, 480)

BARE_LOOP = """
import time
due = time.monotonic()
while True:
    due += 0.1
    time.sleep(due - time.monotonic())
    print(time.monotonic(), flush=True)
"""


@pytest.fixture
def arms() -> Iterator[list[str]]:
    """A follower's and a leader's port; the leader is in a hand that never rests."""
    command = [sys.executable, "-u", "-m", "so101.tools.serve_sim", "leader=true"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        ports = [server.stdout.readline().strip() for _ in range(2)]
        for second in range(120):
            turn = {"shoulder_pan": 0.3 * (-1) ** second}
            server.stdin.write(json.dumps({"after": second, "arm": "leader", "move": turn, "seconds": 1}) + "\n")
        server.stdin.flush()
        yield ports
        server.terminate()


def test_at_10_hz_the_period_is_as_good_as_that_of_a_bare_sleeping_loop(arms: list[str], tmp_path: Path) -> None:
    """Field record 27: ticks that took 0.13 s. The 99th percentile of the error may be 2 ms above the bare loop's."""
    save_calibration(tmp_path / "arm.json", SIM_CALIBRATION)
    video = cv2.VideoWriter(str(tmp_path / "camera.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 30, SIZE)
    for picture in np.random.default_rng(0).integers(0, 255, (30, SIZE[1] // 8, SIZE[0] // 8, 3), np.uint8):
        video.write(cv2.resize(picture, SIZE))
    video.release()
    rig = {
        name: {"port": port, "calibration": str(tmp_path / "arm.json")}
        for name, port in zip(("follower", "leader"), arms, strict=True)
    }
    camera = {"source": str(tmp_path / "camera.avi"), "width": SIZE[0], "height": SIZE[1]}
    config = {
        "dataset": str(tmp_path / "demos"), "episodes": EPISODES, "failures": 0,
        "rig": {**rig, "cameras": {"wrist": camera}},
        "env": {"control_time_s": EPISODE_S, "reset_time_s": 0.5},
    }  # fmt: skip
    (tmp_path / "record.json").write_text(json.dumps(config))
    with subprocess.Popen([sys.executable, "-c", BARE_LOOP], stdout=subprocess.PIPE, text=True) as bare:
        recorded = subprocess.run(
            [sys.executable, "record.py", "--config", str(tmp_path / "record.json")],
            cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        bare.terminate()
        slept = np.diff([float(line) for line in bare.communicate()[0].splitlines()])
    assert recorded.returncode == 0, recorded.stderr
    episodes = open_dataset(tmp_path / "demos").episodes
    ticks = np.concatenate([np.diff(episode.columns()["capture_time"]) for episode in episodes])
    assert len(ticks) == EPISODES * (10 * EPISODE_S - 1)
    ours, theirs = (1e3 * np.quantile(np.abs(periods - 0.1), 0.99) for periods in (ticks, slept))
    print(f"p99 of the period's error: {ours:.2f} ms over {len(ticks)} ticks, a bare loop beside it {theirs:.2f} ms")
    assert ours <= theirs + 2

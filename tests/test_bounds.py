"""The box that a waved leader makes, and whether a config takes it."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import LiveArm
from test_calibrate_tool import Person

from so101.config import option, parse
from so101.env import HOME_SEED, EnvConfig
from so101.errors import ConfigError, DataError
from so101.robot.calibration import save_calibration
from so101.robot.kinematics import solve_ik
from so101.sim.servos import SIM_CALIBRATION
from so101.tools.bounds import Config, main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no pseudo-terminals")
CORNERS = np.array([[0.15, -0.1, 0.01], [0.15, 0.12, 0.01], [0.3, 0.12, 0.03], [0.3, -0.1, 0.15], [0.2, 0.0, 0.15]])


def wave(
    arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: np.ndarray, *words: str
) -> tuple[str, dict[str, list[float]]]:
    """What a person sees who holds the tool at each of `points` (N, 3) in turn, and the file that comes of it."""
    save_calibration(tmp_path / "leader.json", SIM_CALIBRATION)
    low, high = (ends[:5] for ends in SIM_CALIBRATION.limits())
    poses = [np.append(solve_ik(point, HOME_SEED, low=low, high=high, max_iterations=100), 0.0) for point in points]
    way: Iterator[np.ndarray | None] = iter([])

    def start() -> None:
        nonlocal way
        arm.servos.move_by_hand(poses[0])
        way = iter([pose for pose in poses for _ in range(7)] + [None])  # as long as all six replies to a read

    def fault(reply: bytes) -> bytes:
        for pose in islice(way, 1):
            person.press() if pose is None else arm.servos.move_by_hand(pose)
        return reply

    arm.port.fault = fault
    person = Person("goes limp", Wave_the_tool=start)
    words = (
        f"leader.port={arm.path}",
        f"leader.calibration={tmp_path}/leader.json",
        f"output={tmp_path}/box.json",
        *words,
    )
    person.run(monkeypatch, lambda: main(parse(Config, list(words), "")))
    return person.getvalue(), json.loads((tmp_path / "box.json").read_text())


@dataclass
class Script:
    env: EnvConfig = option(EnvConfig(), "the task")


def test_the_box_is_what_the_tool_was_waved_through_and_a_config_takes_it(
    live_arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, box = wave(live_arm, tmp_path, monkeypatch, CORNERS)
    assert box["workspace_low"] == pytest.approx([0.15, -0.1, 0.01], abs=1.5e-3)  # a tick at each joint
    assert box["workspace_high"] == pytest.approx([0.3, 0.12, 0.15], abs=1.5e-3)
    assert f"use it with env={tmp_path}/box.json" in text
    assert "note" not in text
    env = parse(Script, ["env.fps=20", f"env={tmp_path}/box.json"], "").env
    assert (env.fps, env.workspace_low) == (20, box["workspace_low"])
    (tmp_path / "config.json").write_text('{"env": {"include": "box.json", "home": [0.2, 0, 0.08]}}')
    assert parse(Script, ["--config", str(tmp_path / "config.json")], "").env.workspace_high == box["workspace_high"]

    with pytest.raises(DataError, match=r"box\.json exists and is not overwritten"):
        wave(live_arm, tmp_path, monkeypatch, CORNERS)


def test_a_margin_and_a_home_outside(live_arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, box = wave(live_arm, tmp_path, monkeypatch, CORNERS, "margin=0.055")
    assert box["workspace_high"] == pytest.approx([0.245, 0.065, 0.095], abs=1.5e-3)
    assert "the usual home [0.25, 0.0, 0.07] lies outside" in text


def test_a_box_without_height_is_refused(live_arm: LiveArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"thinner than 0\.02 m; wave the leader farther"):
        wave(live_arm, tmp_path, monkeypatch, CORNERS * [1, 1, 0] + [0, 0, 0.05])
    assert not (tmp_path / "box.json").exists()


def test_without_an_arm_it_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match=r"leader is missing: the arm to wave: leader\.port=/dev/"):
        parse(Config, [], "")

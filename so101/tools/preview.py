"""Show in the browser what a reward classifier says, of a dataset's frames or of the cameras of this workplace.

    python -m so101.tools.preview                                               outputs/lift_demos, frame by frame
    python -m so101.tools.preview outputs/cube_reward dataset=outputs/run/episodes
    python -m so101.tools.preview outputs/cube_reward rig=configs/rig.json      live

Where the classifier is wrong, mark the frame: it goes to REWARD_MODEL.corrections with the truth as its label, and
`python train_reward.py ... corrections=FOLDER` trains on it too. Nothing else is written, no label is changed, and the
arm is only read, for the state guard: it gets no torque and nothing moves. arm=false leaves it alone.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from so101.config import launch, option, require_within
from so101.data.corrections import Corrections
from so101.data.dataset import open_dataset
from so101.errors import ConfigError, EpisodeAborted, HardwareError, tell
from so101.images import preprocess
from so101.learn.eyes import Eyes
from so101.learn.reward import read_reward_file
from so101.rig import ArmConfig, RigConfig, open_arm
from so101.robot.arm import Arm
from so101.robot.camera import Camera, require_lasting_names
from so101.schema import Preprocess, require_same
from so101.timing import Clock
from so101.tools.lint import tool_pose
from so101.web.judge import Judge, open_eyes
from so101.web.preview_page import DatasetPreview, LivePreview, Look, Queue, retrain_command
from so101.web.server import Server

LOOK_S = 0.002  # between two looks whether a camera has a new frame
LOST_S = 0.1  # the same while one is lost


@dataclass
class Config:
    """What to look at, and with which classifier."""

    reward_model: str = option("outputs/lift_reward", "folder of the classifier", positional=True)
    dataset: str | None = option(None, "dataset to go through; null: outputs/lift_demos, or live where a rig is named")
    rig: RigConfig | None = option(None, "the workplace, whose cameras are shown live")
    arm: bool = option(True, "live: read where the follower is, for the state guard")
    corrections: str | None = option(None, "dataset for the marked frames; null: <reward_model>.corrections")
    page_port: int = option(0, "port of the page; 0: any that is free")
    open: bool = option(True, "open the page in a browser, where there is a screen")

    def __post_init__(self) -> None:
        require_within(self, page_port=(0, 65_535))
        if self.rig is not None and self.dataset is not None:
            raise ConfigError(f"dataset: got {self.dataset!r} and a rig; name one of the two")
        if self.rig is not None and self.rig.simulated:
            raise ConfigError(
                "rig: the simulated world stands still without a script; `python -m so101.tools.serve_sim camera=true` "
                "serves one that can be looked at, and its rig.json"
            )


def main(config: Config) -> None:
    """Serve the page until Ctrl-C. Raises DataError for a classifier that does not fit, HardwareError for a camera."""
    classifier = Path(config.reward_model)
    about = read_reward_file(classifier)
    spec = Preprocess(**about.schema["image"])
    folder = Path(config.corrections or classifier.with_name(f"{classifier.name}.corrections"))
    retrain = retrain_command(classifier, about.provenance, folder)
    with ExitStack() as stack:
        if config.rig is None:
            dataset = open_dataset(Path(config.dataset or "outputs/lift_demos"))
            corrections = Corrections(folder, about.schema, dataset.cameras)
            stack.callback(corrections.close)
            judge = Judge(classifier, dataset)
            stack.callback(judge.close)
            trained_on = about.provenance.get("dataset") == str(dataset.folder)
            split = about.provenance.get("report", {}).get("episodes", {}) if trained_on else {}
            queue = Queue(corrections, retrain)
            page = DatasetPreview(classifier.name, dataset, spec, judge, queue, split.get("held_out", ()))
            stack.enter_context(Server(page.routes(), config.page_port)).run(config.open)
            return
        eyes = open_eyes(classifier, about.schema)
        require_same({"cameras": about.schema["cameras"]}, {"cameras": list(config.rig.cameras)}, str(classifier))
        for height, width in config.rig.frame_sizes.values():
            preprocess(np.zeros((height, width, 3), np.uint8), spec)  # a crop that does not fit
        corrections = Corrections(folder, about.schema, config.rig.frame_sizes)
        stack.callback(corrections.close)
        live = LivePreview(
            classifier.name, list(config.rig.cameras), eyes.detector, spec, about.schema["fps"],
            Queue(corrections, retrain),
        )  # fmt: skip
        stack.callback(live.close)
        clock = Clock()
        cameras = open_cameras(config.rig, clock, stack)
        arm = open_follower(config.rig.follower, config.arm, live, stack)
        server = stack.enter_context(Server(live.routes(), config.page_port))
        with server.beside(config.open):
            print("Ctrl-C ends it", flush=True)
            look_on(live, eyes, cameras, arm, spec, clock)


def open_cameras(rig: RigConfig, clock: Clock, stack: ExitStack) -> dict[str, Camera]:
    """The rig's cameras, each with a good frame; `stack` closes them. Raises HardwareError."""
    require_lasting_names(rig.cameras)
    cameras = {}
    for name, camera in rig.cameras.items():
        cameras[name] = Camera(name, camera, clock)
        stack.callback(cameras[name].close)
    return cameras


def open_follower(config: ArmConfig, wanted: bool, page: LivePreview, stack: ExitStack) -> Arm | None:
    """The follower, to be read only; None where it is not wanted or not there, which is told and shown."""
    page.guarded = "arm=false leaves the arm out"
    if wanted:
        try:
            arm = open_arm("follower", config, stack)
            arm.connect()
            page.guarded = ""
            return arm
        except HardwareError as error:
            page.guarded = str(error)
            tell(f"the state guard is not judged: {error}")
    return None


class Eyesight(NamedTuple):
    """What the classifier looks at."""

    images: np.ndarray  # (cameras, S, S, 3) uint8
    state: np.ndarray  # (18,)


def next_frames(page: LivePreview, cameras: Mapping[str, Camera], after: float) -> dict[str, tuple[np.ndarray, float]]:
    """Each camera's newest frame with its time, as soon as one of them is newer than `after` (s).

    A camera that is lost is told on the page, and comes back by itself.
    """
    while True:
        try:
            taken = {name: camera.latest() for name, camera in cameras.items()}
            if max(when for _, when in taken.values()) > after:
                return taken
        except EpisodeAborted as error:
            page.tell(str(error))
            time.sleep(LOST_S)
        time.sleep(LOOK_S)


def look_on(
    page: LivePreview, eyes: Eyes, cameras: Mapping[str, Camera], arm: Arm | None, spec: Preprocess, clock: Clock
) -> None:
    """Judge the newest frames as they come, as many as the classifier can, until Ctrl-C."""
    detector, before, counted_at = eyes.detector, None, -np.inf
    newest = -np.inf
    for number in count(1):
        taken = next_frames(page, cameras, newest)
        newest = max(when for _, when in taken.values())
        state = None
        if arm is not None:
            try:
                position, now = arm.read().position, clock.now()
                velocity = np.zeros(6) if before is None else (position - before[0]) / (now - before[1])
                state = np.concatenate([position, velocity, tool_pose(position[:5])]).astype(np.float32)
                before = position, now
            except HardwareError as error:
                arm, page.guarded = None, str(error)
                tell(f"from here on the state guard is not judged: {error}")
        frames = {name: frame for name, (frame, _) in taken.items()}
        views = np.stack([preprocess(frame, spec) for frame in frames.values()])
        probability = detector.probability(eyes.features(Eyesight(views, np.zeros(0) if state is None else state)))
        allowed = True if detector.guard is None else None if state is None else detector.guard.allows(state)
        counted = newest - counted_at >= 0.95 / page.fps
        counted_at = newest if counted else counted_at
        page.show(Look(number, newest, frames, views, state, probability, allowed, counted))


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")

"""Say what is wrong with a dataset, where, and what to do: before labelling, before training, after editing.

    python -m so101.tools.lint outputs/lift_demos
    python -m so101.tools.lint outputs/lift_demos reward_model=outputs/lift_reward --json

It reads, and changes nothing. The exit code is 0 where there is nothing worse than a warning, and 4 with errors.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from so101.config import launch, option
from so101.data.dataset import Dataset, open_dataset
from so101.data.labels import labels_path
from so101.data.lint import Finding, Robot, lint
from so101.errors import EXIT_DONE, ConfigError, DataError, tell
from so101.files import read_json
from so101.robot.camera import FLAT_STD, CameraConfig
from so101.robot.kinematics import forward, rpy
from so101.runlog import Progress
from so101.schema import ARM_JOINTS

SHOWN = 5  # findings of one kind; a wrong zero shows in every episode


def tool_pose(joints: np.ndarray) -> np.ndarray:
    """Five joints in rad -> the tool's x y z in m, and roll, pitch, yaw in rad, (6,)."""
    position, axes = forward(joints)
    return np.concatenate([position, rpy(axes)])


_passed: set[tuple[object, ...]] = set()
ROBOT = Robot(tool_pose, FLAT_STD, CameraConfig.max_age)


@dataclass
class Config:
    """What the command line can set."""

    dataset: str = option(help="folder of the dataset", positional=True)
    json: bool = option(False, "print one JSON list of findings instead of lines")
    reward_model: str | None = option(None, "folder of a classifier: are its training and held-out episodes apart?")
    locked_joints: list[str] = option([], "joints that were to stand still (env.locked_joints), by name")

    def __post_init__(self) -> None:
        if unknown := [name for name in self.locked_joints if name not in ARM_JOINTS]:
            raise ConfigError(f"locked_joints: got {unknown[0]!r}, the joints are {', '.join(ARM_JOINTS)}")


def main(config: Config) -> int:
    """Print what is found; 4 where an error is among it."""
    dataset = open_dataset(config.dataset)
    split = None
    if config.reward_model is not None:
        path = Path(config.reward_model) / "reward.json"
        report = (read_json(path, DataError).get("provenance") or {}).get("report") or {}
        split = report.get("episodes")
        if split is None:
            raise DataError(f"{path}: does not say which episodes were held out; train the classifier anew")
    robot = replace(ROBOT, locked=tuple(config.locked_joints))
    if config.json:
        findings = lint(dataset, robot, split)
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        with Progress("lint", len(dataset.episodes), "episode") as progress:
            findings = lint(dataset, robot, split, progress.update)
        for line in shortened(findings):
            print(line)
        errors = sum(finding.severity == "error" for finding in findings)
        print(f"{dataset.folder}: {errors} errors, {len(findings) - errors} warnings")
    return DataError.exit_code if any(finding.severity == "error" for finding in findings) else EXIT_DONE


def require_clean(dataset: Dataset, locked: Sequence[str] = ()) -> None:
    """Tell what is wrong with a dataset before training starts on it. Raises DataError where that is an error.

    A dataset that this process has passed already, none of its files being another since, is not read again.
    """
    files = [labels_path(dataset.folder), *sorted(dataset.folder.rglob("*"))]
    now = (*locked, *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()))
    if now in _passed:
        return
    with Progress("lint", len(dataset.episodes), "episode") as progress:
        findings = lint(dataset, replace(ROBOT, locked=tuple(locked)), progress=progress.update)
    for line in shortened(findings):
        tell(line)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError(
            f"{dataset.folder}: no training on it with {len(errors)} error{'s' * (len(errors) > 1)}, told above; mend "
            f"them, or leave the episodes out by labelling them skip"
        )
    _passed.add(now)


def shortened(findings: Sequence[Finding]) -> list[str]:
    """A line for each finding, errors first, and of each kind no more than SHOWN."""
    kinds: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        kinds[finding.severity, finding.check].append(finding)
    lines = []
    for (severity, check), found in sorted(kinds.items(), key=lambda kind: kind[0][0]):
        lines += [str(finding) for finding in found[:SHOWN]]
        if more := found[SHOWN:]:
            where = ", ".join(dict.fromkeys(str(finding.episode) for finding in more))
            lines.append(f"{severity}: and {len(more)} more such, of episodes {where} [{check}]")
    return lines


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")

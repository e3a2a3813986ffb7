"""Make new datasets out of recorded ones. What is there is never changed, and no folder is written over.

    python -m so101.tools.edit merge NEW SOURCE SOURCE ...      several into one
    python -m so101.tools.edit filter NEW SOURCE ...            those episodes that are wanted
    python -m so101.tools.edit split NEW SOURCE ...             into several, NEW_train and NEW_test say
    python -m so101.tools.edit trim NEW SOURCE ...              rows cut off at either end
    python -m so101.tools.edit export NEW SOURCE ...            for other software: labels filled in, v3.0 or v2.1
    python -m so101.tools.edit convert NEW SOURCE               an old recording, or another program's, to this schema

Each lists its settings with --help. Labels come along: the new dataset has its own label file beside it.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from so101.config import launch, option, require_within, to_dict
from so101.data.convert import Habits, ToolPose, convert, require_said, transitions
from so101.data.dataset import Closing, Episode
from so101.data.edit import Columns, Piece, Source, Version, derive, open_source, require_new
from so101.data.video import Codec
from so101.episodes import observed_success
from so101.errors import EXIT_DONE, ConfigError, DataError
from so101.images import preprocess
from so101.robot.kinematics import FRAMES, rpy
from so101.runlog import Progress
from so101.schema import IMAGE_MULTIPLE, Preprocess, describe
from so101.tools.lint import tool_pose

# The original project's gripperframe: our tool's point; x along the approach, z where gripper_link has its x.
GRIPPERFRAME = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])  # its axes, as columns, in gripper_link

CHOICE = "0-4,7 of each source (4 included), or NAME:0-4,7 NAME:3- by the name of its folder, or the end of its path"


@dataclass
class Choice:
    """Which episodes of which sources become one new dataset; all settings hold together."""

    new: str = option(help="folder of the new dataset; must not exist", positional=True)
    sources: list[str] = option(help="folders of the datasets to take from, in this order", positional=True)
    episodes: str = option("0-", f"which: {CHOICE}")
    without: str = option("", "which of these to leave out, said in the same way")
    keep: Literal["all", "labelled", "success", "failure"] = option(
        "all", "by label, or by next.reward where a source has no label file; skipped ones only with all"
    )
    drop_skipped: bool = option(False, "leave out what is labelled skip")
    task: str | None = option(None, "only episodes of this task; null: of any")
    min_rows: int = option(1, "leave shorter episodes out")
    max_rows: int | None = option(None, "leave longer episodes out; null: none is too long")
    codec: Codec | None = option(None, "encode anew the videos that have another codec; null: all must have the same")

    def __post_init__(self) -> None:
        require_within(self, min_rows=(1, 1_000_000))
        if self.max_rows is not None:
            require_within(self, max_rows=(self.min_rows, 1_000_000))


@dataclass
class Trim(Choice):
    """Which rows stay of which episodes."""

    rows: dict[str, str] = option(
        {},
        "by episode: rows.3=10:80 keeps rows 10 to 79, rows.3=10: those from 10 on; the next one's observation closes",
    )


@dataclass
class Split(Choice):
    """Which episodes go into which new dataset."""

    into: dict[str, str] = option(
        {}, "into.train=0.8 into.test=0.2, shares drawn at random, or into.train=0-7,9 into.test=8, by number"
    )
    seed: int = option(0, "of the draw")


@dataclass
class Export(Choice):
    """What other software is to get."""

    to: Version = option("v3.0", "layout: v3.0 for LeRobot 0.4, v2.1 for 0.3, without closing observations")
    labels: bool = option(True, "fill next.reward from the labels; false: as it was recorded")


@dataclass(kw_only=True)
class Convert(Habits):
    """How a recording of another schema is to be read. A habit that is not said is asked for, with what is seen."""

    new: str = option(help="folder of the new dataset; must not exist", positional=True)
    source: str = option(help="folder of the dataset to convert", positional=True)
    episodes: str = option("0-", "which: 0-4,7 (4 included)")
    without: str = option("", "which of these to leave out, said in the same way")
    codec: Codec | None = option(None, "encode anew the videos that have another codec; null: all must have the same")
    preprocess: Preprocess = option(Preprocess(), "what the networks will see of a frame; frames stay as they are")


def merge(config: Choice) -> None:
    """Put the chosen episodes of all sources into one dataset."""
    make("merge", config, config.new, choose(config, open_all(config)))


def filter_(config: Choice) -> None:
    """As merge: with one source, the chosen ones of it."""
    make("filter", config, config.new, choose(config, open_all(config)))


def trim(config: Trim) -> None:
    """Cut rows off the named episodes; the others stay whole."""
    if len(config.sources) > 1 or not config.rows:
        raise ConfigError("trim: takes one source, and rows.EPISODE=START:END at least once")
    pieces = {str(piece.episode.index): piece for piece in choose(config, open_all(config))}
    for name, said in config.rows.items():
        if name not in pieces:
            raise ConfigError(f"rows.{name}: there is no episode {name} among those chosen: {', '.join(pieces)}")
        span = re.fullmatch(r"(\d*):(\d*)", said)
        length = pieces[name].end
        start, end = (int(span[1] or 0), int(span[2] or length)) if span else (0, 0)
        if not 0 <= start < end <= length:
            raise ConfigError(f"rows.{name}: got {said!r}, must be START:END within its rows, 0:{length}")
        pieces[name] = replace(pieces[name], start=start, end=end)
    make("trim", config, config.new, list(pieces.values()))


def split(config: Split) -> None:
    """Share the chosen episodes out; no episode goes into two."""
    parts = share(config, choose(config, open_all(config)))
    for name in parts:
        require_new(Path(f"{config.new}_{name}"))
    for name, pieces in parts.items():
        make("split", config, f"{config.new}_{name}", pieces)


def export(config: Export) -> None:
    """A copy for other software, whose next.reward says what the labels say; skipped episodes are left out."""
    sources = open_all(config)
    bare = [str(source.folder) for source in sources if source.labels is None]
    if config.labels and bare:
        raise DataError(f"{bare[0]}: has no label file; label it, or say labels=false to keep its next.reward as it is")
    pieces = choose(replace(config, drop_skipped=config.labels or config.drop_skipped), sources)
    make("export", config, config.new, pieces, version=config.to, fill_rewards=config.labels)


def convert_(config: Convert) -> None:
    """Map an old recording to this schema, by what is said of its habits."""
    source = open_source(config.source, foreign=True)
    chosen = numbers("episodes", config.episodes, [source]) - numbers("without", config.without, [source])
    episodes = [episode for episode in source.dataset.episodes if (0, episode.index) in chosen]
    dataset = replace(source.dataset, episodes=episodes)
    if not episodes:
        raise DataError(f"{config.source}: none of its {len(source.dataset.episodes)} episodes is left to convert")
    require_said(dataset, config)
    crop = replace(config.preprocess, image_size=IMAGE_MULTIPLE)  # frames too small to train on can be looked at
    for camera in dataset.cameras:
        preprocess(episodes[0].frame(camera, 0), crop)  # refuses one that does not fit
    for note in dataset.notes:
        print(f"{config.source}: {note}")
    assert config.action_scale is not None and config.gripper_step is not None  # said, see above
    require_within(config, action_scale=(1e-6, 1.0), gripper_step=(1e-6, 1.0))
    scales = config.action_scale, config.gripper_step
    schema = describe(config.preprocess, list(dataset.cameras), dataset.fps, *scales)
    pose = TOOL_POSES[config.tool_pose or ""]
    pieces = [Piece(source, episode, 0, transitions(episode)) for episode in episodes]

    def read(piece: Piece) -> tuple[Columns, Closing]:
        return convert(piece.episode, config, pose)

    make("convert", config, config.new, pieces, schema=schema, read=read)
    print(f"look it over: python -m so101.tools.lint {config.new}")


def open_all(config: Choice) -> list[Source]:
    """The sources; what is found damaged in them is printed."""
    sources = [open_source(folder) for folder in config.sources]
    for source in sources:
        for note in source.dataset.notes:
            print(f"{source.folder}: {note}")
    return sources


def make(command: str, config: Any, new: str, pieces: list[Piece], **how: Any) -> None:
    """Make one new dataset, with a progress bar, and say what was made."""
    made = {"command": command, "settings": to_dict(config)}
    with Progress(command, len(pieces), "episode") as progress:
        summary = derive(new, pieces, made, codec=config.codec, progress=progress.update, **how)
    print(summary)
    labelled = sum(piece.label is not None for piece in pieces)
    if 0 < labelled < len(pieces):
        print(f"{new}: {len(pieces) - labelled} episodes have no label, and are not trained on before they do")


def choose(config: Choice, sources: list[Source]) -> list[Piece]:
    """The chosen episodes, whole. Raises ConfigError where one is named that is not there."""
    chosen = numbers("episodes", config.episodes, sources) - numbers("without", config.without, sources)
    return [
        Piece(source, episode, 0, episode.length)
        for place, source in enumerate(sources)
        for episode in source.dataset.episodes
        if (place, episode.index) in chosen and _is_wanted(config, source, episode)
    ]


def _is_wanted(config: Choice, source: Source, episode: Episode) -> bool:
    label = source.labels.episodes.get(episode.index) if source.labels else None
    if config.drop_skipped and label is not None and label.skip or config.task not in (None, episode.task):
        return False
    if not config.min_rows <= episode.length <= (config.max_rows or episode.length):
        return False
    if config.keep == "all":
        return True
    success = observed_success(episode, source.labels)
    if success is None or config.keep == "labelled":
        return success is not None
    return bool(success.any()) == (config.keep == "success")


def numbers(key: str, said: str, sources: list[Source]) -> set[tuple[int, int]]:
    """What a choice of episodes means: {(source, episode)}.

    Raises ConfigError for a source or an episode that is not there.
    """
    counts = [len(source.dataset.episodes) for source in sources]
    paths = [source.folder.absolute().parts for source in sources]
    names = [path[-1] for path in paths]
    found = set()
    for word in said.split():
        name, colon, ranges = word.rpartition(":")
        tail = Path(name).parts
        places = [place for place, path in enumerate(paths) if not colon or path[-len(tail) :] == tail]
        if not places:
            raise ConfigError(f"{key}: got {name!r}, the sources are {', '.join(names)}")
        if colon and len(places) > 1:
            several = ", ".join(str(sources[place].folder) for place in places)
            raise ConfigError(f"{key}: got {name!r}, which is each of {several}; say more of its path")
        for part in ranges.split(","):
            span = re.fullmatch(r"(\d+)(-(\d*))?", part)
            if span is None:
                raise ConfigError(f"{key}: got {part!r}, must be a number, 3-7 or 3-, with commas between")
            for place in places:
                start = int(span[1])
                end = start + 1 if not span[2] else int(span[3]) + 1 if span[3] else counts[place]
                if not start <= end <= counts[place]:
                    raise ConfigError(f"{key}: got {part!r}, {names[place]} has the episodes 0-{counts[place] - 1}")
                found |= {(place, number) for number in range(start, end)}
    return found


def share(config: Split, pieces: list[Piece]) -> dict[str, list[Piece]]:
    """Each part's episodes, in the order they had. Raises ConfigError for parts that overlap or are empty."""
    if len(config.into) < 2:
        raise ConfigError("into: needs two names at least, as in into.train=0.8 into.test=0.2")
    drawn = ["." in said for said in config.into.values()]
    if any(drawn) and not all(drawn):
        raise ConfigError("into: got shares and episode numbers, must be all shares (0.8) or all numbers (0-7,9)")
    if all(drawn):
        picks = draw(config, len(pieces))
    else:
        sources = list({id(piece.source): piece.source for piece in pieces}.values())
        keys = [(sources.index(piece.source), piece.episode.index) for piece in pieces]
        chosen = {name: numbers(f"into.{name}", said, sources) for name, said in config.into.items()}
        picks = {name: [keys.index(key) for key in keys if key in found] for name, found in chosen.items()}
    taken = [index for indices in picks.values() for index in indices]
    if twice := sorted({index for index in taken if taken.count(index) > 1}):
        raise ConfigError(
            f"into: episode {pieces[twice[0]].episode.index} is in two parts; what is tested would be trained"
        )
    if empty := [name for name, indices in picks.items() if not indices]:
        raise ConfigError(f"into.{empty[0]}: gets none of the {len(pieces)} episodes")
    if left := len(pieces) - len(taken):
        print(f"{left} episodes go into none of {', '.join(picks)}")
    return {name: [pieces[index] for index in sorted(indices)] for name, indices in picks.items()}


def draw(config: Split, count: int) -> dict[str, list[int]]:
    """Each part's share of `count` episodes, drawn with the seed; ConfigError for shares that are none."""
    try:
        shares = [float(said) for said in config.into.values()]
    except ValueError as error:
        raise ConfigError(f"into: {error}; a share is a number such as 0.8") from None
    if not (all(0 < one < 1 for one in shares) and sum(shares) < 1 + 1e-9):
        raise ConfigError(f"into: got the shares {shares}, each must be above 0, and all of them together at most 1")
    order = np.random.default_rng(config.seed).permutation(count).tolist()
    ends = np.round(np.cumsum(shares) * count).astype(int).tolist()
    return {name: order[a:b] for name, a, b in zip(config.into, [0, *ends], ends, strict=False)}


def from_gripperframe(joints: np.ndarray, given: np.ndarray | None) -> np.ndarray:
    """A pose (6,) of the original project's gripperframe -> ours: the same point, other axes."""
    assert given is not None  # see require_said
    axes = rotation(given[3:]) @ GRIPPERFRAME.T @ FRAMES["tool"][1]
    return np.concatenate([given[:3], rpy(axes)])


def rotation(angles: np.ndarray) -> np.ndarray:
    """Rz(yaw) Ry(pitch) Rx(roll), (3, 3), of roll, pitch, yaw (3,) in rad: what kinematics.rpy takes apart."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    axes: np.ndarray = about_z @ about_y @ about_x
    return axes


TOOL_POSES: dict[str, ToolPose] = {
    "kept": lambda joints, given: np.asarray(given),
    "gripperframe": from_gripperframe,
    "recomputed": lambda joints, given: tool_pose(joints),
}
COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "merge": (Choice, merge),
    "filter": (Choice, filter_),
    "split": (Split, split),
    "trim": (Trim, trim),
    "export": (Export, export),
    "convert": (Convert, convert_),
}


def start() -> None:
    """Give the command line to the command that its first word names."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in ("-h", "--help"):
        print(__doc__)
        sys.exit(EXIT_DONE)
    if word not in COMMANDS:
        print(f"edit: got {word!r}, must begin with one of {', '.join(COMMANDS)} (--help shows them)", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    sys.argv[:2] = [f"so101.tools.edit {word}"]
    config, command = COMMANDS[word]
    launch(config, command, f"{command.__doc__}\n\n{config.__doc__}")


if __name__ == "__main__":
    start()

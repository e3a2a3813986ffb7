"""Label a dataset, or look at it: a page in the browser, or from the command line.

    python label.py                                           the page for outputs/lift_demos
    python label.py FOLDER reward_model=outputs/lift_reward   and what a classifier says
    python label.py FOLDER --view                             only to look, at the curves too
    python label.py FOLDER --list                             a table of the labels, no browser
    python label.py FOLDER --set 3=41                         episode 3: success from frame 41 on
    python label.py FOLDER --import notes.txt one_based=true end_inclusive=true every=3
    python label.py FOLDER --extract frames every=3           JPEG files, cropped=true if wanted

Frames count from 0, and a range ends before its second number. Labels go to <dataset>.labels.json
beside the dataset, which itself is never changed. Over SSH the page prints the tunnel to open.
"""

import re
import time
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import cv2

from so101.config import launch, option, require_within
from so101.data.dataset import Dataset, Episode, open_dataset, require_outside
from so101.data.label_import import import_labels
from so101.data.labels import EpisodeLabel, Labels, frames_wanted, labels_path, load_labels
from so101.data.lock import alone_in
from so101.errors import ConfigError, DataError
from so101.files import new_folder
from so101.images import preprocess
from so101.reports.dataset import write_dataset_report
from so101.runlog import Progress
from so101.schema import Preprocess
from so101.web.label_page import LabelPage, why_read_only
from so101.web.server import Server

EXTRACT_QUALITY = 95  # of a JPEG


@dataclass
class Config:
    """What to label, and how."""

    dataset: str = option("outputs/lift_demos", "the dataset's folder", positional=True)
    reward_model: str | None = option(None, "folder of a reward classifier, to see where it and the labels differ")
    view: bool = option(False, "only look: nothing can be changed")
    preprocess: Preprocess | None = option(
        None, "the crop that is drawn and the network's image, in the dataset's own place; null: its own, or the usual"
    )
    page_port: int = option(0, "port of the page; 0: any that is free")
    open: bool = option(True, "open the page in a browser, where there is a screen")
    list: bool = option(False, "print the table of labels, and no page")
    set: str | None = option(
        None, "EPISODE=LABEL: 41, 40-48,60- or all_fail, and then `without 42,43` if wanted; skip; none: unlabelled"
    )
    import_: str | None = option(None, "file of labels: text NN: 34-  NN: 40-48, 60-  NN: all fail, JSON or CSV")
    one_based: bool | None = option(None, "whether the file counts its first image as 1; must be said")
    end_inclusive: bool | None = option(None, "whether a range's last image is still success; must be said")
    every: int = option(1, "import, extract: there is an image of every n-th frame only")
    multiplied: bool | None = option(None, "import: the numbers are images' numbers times `every` already")
    reset_is_failure: bool = option(False, "import: frames from `env reset start` on count as failure")
    named: str | None = option(None, "import: the dataset's name in the file, where it has labels of several")
    extract: str | None = option(None, "folder of JPEG files to make, which must not exist")
    cropped: bool = option(False, "extract: cropped and resized as for the network")

    def __post_init__(self) -> None:
        require_within(self, every=(1, 1_000_000), page_port=(0, 65_535))
        asked = [name for name in ("view", "list", "set", "import_", "extract") if getattr(self, name)]
        if len(asked) > 1:
            raise ConfigError(f"got {' and '.join(asked).replace('_', '')}; do one after the other")


def main(config: Config) -> None:
    """Do what is asked for, or serve the page until Ctrl-C."""
    dataset = open_dataset(config.dataset)
    if config.extract:
        extract(config, dataset, Path(config.extract))
    elif config.list or config.set or config.import_:
        change(config, dataset)
    else:
        serve(config, dataset)


def serve(config: Config, dataset: Dataset) -> None:
    """The page, until Ctrl-C."""
    began, read_only = time.time(), why_read_only(dataset.folder, config.view)
    if not read_only:
        load_labels(dataset.folder, dataset.observations)  # a file that is damaged, or another dataset's, ends here
    judge = None
    if config.reward_model:
        from so101.web.judge import Judge  # here, as it takes torch, which is 2 s that only a classifier is worth

        judge = Judge(Path(config.reward_model), dataset)
    page = LabelPage(dataset, network_image(config, dataset), judge, read_only)
    try:
        with Server(page.routes(), config.page_port) as server:
            print(f"{dataset.folder}: {len(dataset.episodes)} episodes; {read_only or f'labels in {page.labels_file}'}")
            server.run(config.open)
    except KeyboardInterrupt:  # how it ends
        if not read_only:
            write_dataset_report(dataset.folder, "label.py", began, config)
        raise


def network_image(config: Config, dataset: Dataset) -> Preprocess:
    """The config's, else the dataset's own, else the usual one."""
    stored = (dataset.schema or {}).get("image", {})
    return config.preprocess or Preprocess(**stored)


def change(config: Config, dataset: Dataset) -> None:
    """Apply what is asked for, check every label against the frames there are, print the table."""
    path = labels_path(dataset.folder)
    with alone_in(path.parent):
        labels = load_labels(dataset.folder, dataset.observations) or Labels(
            path.name.removesuffix(".labels.json"), path
        )
        if config.import_:
            take_in(config, dataset, labels)
        elif config.set:
            set_label(config.set, labels)
        table = label_table(dataset, labels)  # refuses what does not fit, so that it is never saved
        if not config.list:
            labels.save(path)
            print(f"saved {path}")
    print("\n".join(table))


def set_label(said: str, labels: Labels) -> None:
    """Give an episode the label of EPISODE=LABEL. Raises ConfigError for what is no label."""
    number, equals, spec = (part.strip() for part in said.partition("="))
    form, without, frames = (part.strip() for part in spec.partition("without"))
    if not (equals and re.fullmatch(r"\d+", number) and (form or without)):
        raise ConfigError(f"set: got {said!r}, must be EPISODE=LABEL, as in 3=41 or 3=none")
    episode = int(number)
    old = labels.episodes.get(episode)
    try:
        label: EpisodeLabel | None
        if form == "none" and not without:
            label = None
        elif form == "skip":  # the label given before is kept with it
            label = replace(old, skip=True) if old else EpisodeLabel(skip=True)
        elif form:
            text = f"{episode}: {form.replace('_', ' ')}"
            label = import_labels(text, "set", one_based=False, end_inclusive=False)[episode]
        else:
            label = old or EpisodeLabel()
        if label is not None and without:
            label = replace(label, exclude=[int(frame) for frame in re.split(r"[,\s]+", frames.strip("[] "))])
    except (DataError, ValueError) as error:
        raise ConfigError(f"set: got {said!r}: {error}") from None
    labels.set(episode, label)


def take_in(config: Config, dataset: Dataset, labels: Labels) -> None:
    """Put the labels of a file on their episodes. Raises ConfigError or DataError, also for one that is labelled."""
    if config.one_based is None or config.end_inclusive is None:
        raise ConfigError("import: say one_based=true or false, and end_inclusive=true or false, as well")
    file = Path(str(config.import_))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    new = import_labels(
        text,
        str(file),
        one_based=config.one_based,
        end_inclusive=config.end_inclusive,
        every=config.every,
        multiplied=config.multiplied,
        reset_is_failure=config.reset_is_failure,
        dataset=config.named,
        observations=dataset.observations,
        into=labels.dataset,
    )
    for episode, label in new.items():
        old = labels.episodes.get(episode)
        if old is not None and old != label:
            raise DataError(
                f"{file}: episode {episode} is already labelled {old}; take that away first with "
                f"--set {episode}=none, or correct the file"
            )
        labels.set(episode, label)


def label_table(dataset: Dataset, labels: Labels) -> list[str]:
    """One line for each episode, and the totals. Raises DataError for a label that fits no episode."""
    labels.check([episode.observations for episode in dataset.episodes])
    lines = ["episode  frames  positive  negative  label"]
    positives = negatives = unlabelled = 0
    for episode in dataset.episodes:
        success = labels.success(episode.index, episode.length)
        label = str(labels.episodes.get(episode.index, "-"))
        yes = no = 0
        if success is not None:
            success = success[: episode.observations]  # a foreign dataset keeps no closing observation
            yes, no = int(success.sum()), int((~success).sum())
        lines.append(f"{episode.index:7d}  {episode.observations:6d}  {yes:8d}  {no:8d}  {label}")
        positives, negatives = positives + yes, negatives + no
        unlabelled += episode.index not in labels.episodes
    lines.append(f"{len(dataset.episodes)} episodes, {unlabelled} unlabelled")
    return [*lines, *map(str, frames_wanted(positives, negatives))]


def extract(config: Config, dataset: Dataset, folder: Path) -> None:
    """Write every n-th frame of each camera as JPEG; the name has the episode and the frame, counted from 0.

    Raises DataError where the folder exists or lies inside the dataset, or the crop does not fit.
    """
    require_outside(folder)
    spec = network_image(config, dataset)
    with new_folder(folder) as aside, Progress("extract", len(dataset.episodes), "episode") as progress:
        for episode in dataset.episodes:
            extract_episode(config, dataset, episode, spec, aside)
            progress.update(episode.index + 1)
        count = len(list(aside.iterdir()))
    print(f"{folder}: {count} pictures")


def extract_episode(config: Config, dataset: Dataset, episode: Episode, spec: Preprocess, folder: Path) -> None:
    """The pictures of one episode, its closing observation included where it falls on an n-th frame."""
    closing = episode.closing()
    for camera in dataset.cameras:
        frames = chain(episode.frames(camera), [closing.frames[camera]] if closing else [])
        for index, frame in islice(enumerate(frames), 0, None, config.every):
            shown = preprocess(frame, spec) if config.cropped else frame
            pixels = cv2.cvtColor(shown, cv2.COLOR_RGB2BGR)
            jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, EXTRACT_QUALITY])[1]
            (folder / f"episode_{episode.index:06d}_{camera}_frame_{index:06d}.jpg").write_bytes(jpeg.tobytes())


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")

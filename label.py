"""Label a dataset: say from which frame on each episode shows success. Prints the table of its labels.

Actions: `episode=3` with `success_start=41`, `ranges=[[40,48],[60,null]]`, `all_fail=true`, `skip=true` or
`unlabel=true`; or `import_file=notes.txt one_based=true end_inclusive=true every=3`. Frames count from 0, and
a range ends before its second number. Labels go to <dataset>.labels.json beside the dataset, which itself is
never changed.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from so101.config import launch, option
from so101.data.dataset import Dataset, open_dataset
from so101.data.labels import EpisodeLabel, Labels, import_labels, labels_path, load_labels
from so101.errors import ConfigError, DataError

WANTED = 200  # positive frames that a reward classifier needs at least


@dataclass
class Config:
    """What to label, and how."""

    dataset: str = option("outputs/lift_demos", "the dataset's folder")
    episode: int | None = option(None, "the episode to label, 0 for the first")
    success_start: int | None = option(None, "its first frame of success, which lasts to the end")
    ranges: list[list[int | None]] | None = option(None, "its ranges of success, [[start, end], ...]; null: the end")
    all_fail: bool = option(False, "it shows no success")
    exclude: list[int] = option([], "frames to count as failure whatever the label says")
    skip: bool = option(False, "leave the episode out of everything; a label given before is kept with it")
    unlabel: bool = option(False, "take the episode's label away")
    import_file: str | None = option(None, "text file of labels: NN: 34-  NN: 40-48, 60-  NN: all fail  00: 119 05: 39")
    one_based: bool | None = option(None, "whether the file counts its first image as 1; must be said")
    end_inclusive: bool | None = option(None, "whether a range's last image is still success; must be said")
    every: int = option(1, "the file counts images taken from every n-th frame")


def main(config: Config) -> None:
    """Apply the action, if there is one, check every label against the frames there are, print the table."""
    dataset = open_dataset(config.dataset)
    path = labels_path(dataset.folder)
    labels = load_labels(dataset.folder, len(dataset.episodes)) or Labels(path.name.removesuffix(".labels.json"), path)
    changed = apply_import(config, labels) if config.import_file else apply_label(config, labels)
    table = label_table(dataset, labels)  # refuses what does not fit, so that it is never saved
    if changed:
        labels.save(path)
        print(f"saved {path}")
    print("\n".join(table))


def apply_label(config: Config, labels: Labels) -> bool:
    """Put the config's label on its episode; whether there was one. Raises ConfigError or DataError."""
    form = config.success_start is not None or config.ranges is not None or config.all_fail
    given = form or config.exclude or config.skip
    if config.episode is None and (given or config.unlabel):
        raise ConfigError("a label without an episode: say episode=N as well")
    if config.episode is None:
        return False
    if bool(given) == config.unlabel:
        raise ConfigError(f"episode={config.episode}: say its label, as in success_start=41, or unlabel=true")
    old = labels.episodes.get(config.episode)
    try:
        if config.unlabel:
            label = None
        elif old and not form:  # skip and exclude are added to the label that is there
            label = replace(old, skip=config.skip or old.skip, exclude=config.exclude or old.exclude)
        else:
            label = EpisodeLabel(config.success_start, config.ranges, config.all_fail, config.exclude, config.skip)
    except DataError as error:
        raise DataError(f"episode {config.episode}: {error}") from None
    labels.set(config.episode, label)
    return True


def apply_import(config: Config, labels: Labels) -> bool:
    """Put the labels of a hand-written file on their episodes. Raises ConfigError or DataError."""
    if config.one_based is None or config.end_inclusive is None:
        raise ConfigError("import_file: say one_based=true or false, and end_inclusive=true or false, as well")
    if config.episode is not None:
        raise ConfigError("import_file and episode: do one after the other")
    file = Path(str(config.import_file))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    new = import_labels(
        text, str(file), one_based=config.one_based, end_inclusive=config.end_inclusive, every=config.every
    )
    for episode, label in new.items():
        old = labels.episodes.get(episode)
        if old is not None and old != label:
            raise DataError(
                f"{file}: episode {episode} is already labelled {old}; unlabel it first, or correct the file"
            )
        labels.set(episode, label)
    return True


def label_table(dataset: Dataset, labels: Labels) -> list[str]:
    """One line for each episode, and the totals. Raises DataError for a label that fits no episode."""
    beyond = sorted(set(labels.episodes) - set(range(len(dataset.episodes))))
    if beyond:
        raise DataError(f"{labels.path}: episode {beyond[0]}: the dataset has only {len(dataset.episodes)}")
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
    lines.append(f"{len(dataset.episodes)} episodes, {unlabelled} unlabelled; {negatives} negative frames")
    missing = max(0, WANTED - positives)
    lines.append(f"{positives} positive frames of {WANTED} wanted" + (f", {missing} to go" if missing else ": enough"))
    return lines


if __name__ == "__main__":
    launch(Config, main, __doc__ or "")

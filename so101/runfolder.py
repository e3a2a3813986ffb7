"""The folder of a training run: begun whole, and taken up again only as it was begun."""

import shutil
from pathlib import Path
from typing import Any

from so101 import config as configs
from so101.data.dataset import open_dataset
from so101.errors import ConfigError, DataError
from so101.files import new_folder, read_json
from so101.learn.checkpoint import find_checkpoint
from so101.runlog import RunLog

# What a person may change between two parts of a run without changing what is learned.
FREE = (
    "output", "resume", "changed", "steps", "evaluation_episodes", "evaluate_every", "evaluate_episodes",
    "checkpoint_every", "mode", "role", "link", "device", "page", "page_port",
)  # fmt: skip


def check_run(folder: Path, config: Any) -> None:
    """Refuse a run folder that exists, or with resume=true one that was begun with another config.

    A change is printed; config.changed says that it is meant.
    """
    if not folder.exists() or ((folder / "config.json").exists() and not begun(folder)):
        if config.resume:  # right after a kill that came before all else; wrong with a name that is mistyped
            print(f"{folder}: holds nothing to resume, so the run begins here")
        return
    if not config.resume:
        raise DataError(f"{folder}: exists and is never overwritten; name another with output=, or resume=true")
    before = configs.flat(configs.to_dict(configs.load(type(config), folder / "config.json")))
    now = configs.flat(configs.to_dict(config))
    said = [
        f"  {key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in {**before, **now}
        if key.partition(".")[0] not in FREE and before.get(key) != now.get(key)
    ]
    if not said:
        return
    if before["reward_model"] != now["reward_model"]:
        raise ConfigError(
            f"reward_model: {folder} keeps the classifier that it began with, {before['reward_model']}, not "
            f"{now['reward_model']}; what was learned from one is nothing to go on from with another. Begin a new run, "
            f"or keep it: {resume_command(folder)}"
        )
    print(f"{folder}: the config differs from what the run was begun with:", *said, sep="\n")
    if not config.changed:
        raise ConfigError(
            f"{folder}: the config has changed; say changed=true if that is meant, or keep it: {resume_command(folder)}"
        )
    RunLog(folder, mend=False).event("config_change_confirmed", changes=said)


def resume_command(folder: Path) -> str:
    """What to type to go on with a run as it was begun."""
    return f"python train_sac.py --config {folder / 'config.json'} output={folder} resume=true"


def begin_run(folder: Path, config: Any) -> None:
    """Make the run folder with its config and its classifier, whole or not at all, where there is none."""
    if folder.exists():
        return
    with new_folder(folder) as aside:
        configs.save(config, aside / "config.json")
        shutil.copytree(config.reward_model, aside / "reward")


def begun(folder: Path) -> bool:
    """Whether a run folder holds anything that was learned or recorded."""
    return (folder / "checkpoints" / "last").exists() or recorded_steps(folder) > 0


def require_episodes(folder: Path, missing: int) -> None:
    """Refuse a run whose last checkpoint has seen over `missing` steps more than are recorded: episodes were lost."""
    if (folder / "checkpoints" / "last").exists():
        step, recorded = read_json(find_checkpoint(folder) / "schema.json", DataError)["step"], recorded_steps(folder)
        if step > recorded + missing:
            held = f"{folder / 'episodes'}: holds {recorded} steps, the checkpoint is of {step}"
            raise DataError(f"{held}; restore the episodes, or begin a new run")


def recorded_steps(folder: Path) -> int:
    """Environment steps of a run's recorded episodes."""
    episodes = folder / "episodes"
    return sum(episode.length for episode in open_dataset(episodes).episodes) if episodes.exists() else 0

"""Actor and learner as processes of their own, really started and really killed; and runs taken up after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_scripts import SMALL_SAC, made, resumed, sac_config  # noqa: F401  (a fixture)

import train_sac
from so101 import config as configs
from so101.data.dataset import open_dataset
from so101.learn.checkpoint import load_checkpoint
from so101.learn.replay import ViewEncoder
from so101.runlog import read_rows

ROOT = Path(__file__).parent.parent


def start(made, folder, log, **changes):  # noqa: F811
    """train_sac.py as a process, with its config in a file; what it prints goes to `log`."""
    config = sac_config(made, folder, **changes)
    path = log.with_suffix(".json")
    configs.save(config, path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, ROOT / "train_sac.py", "--config", path],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
        )


def wait_for(what, process, log, seconds=120.0):
    """The first true value of what(), while the process runs."""
    until = time.monotonic() + seconds
    while not (value := what()):
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.02)
    return value


def learner_of(process):
    """The pid of the learner that a run in mode=parallel spawned, None while there is none."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in map(int, children):
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    return None


def steps_of(folder):
    return max((int(row["step"]) for row in read_rows(folder)), default=0)


def require_whole(made, config):  # noqa: F811
    """What a learner makes of the run's folder is what its episodes say, and its log says each of them once."""
    config.resume, config.mode, config.role = True, "alternate", "both"
    learner, _ = resumed(config)
    episodes = open_dataset(Path(config.output) / "episodes").episodes
    columns = [episode.columns() for episode in episodes]
    online = learner.replay.pools[1]
    assert len(online) == learner.steps == sum(episode.length for episode in episodes)
    for name, stored in (
        ("action", "action"), ("terminated", "next.done"), ("truncated", "next.truncated"),
        ("by_human", "complementary_info.is_intervention"), ("reward", "next.reward"),
    ):  # fmt: skip
        assert np.array_equal(getattr(learner.replay, name)[online], np.concatenate([c[stored] for c in columns])), name
    rows = [int(row["episode"]) for row in read_rows(config.output) if row.get("episode")]
    assert rows == list(range(len(episodes)))
    updates = [int(row["updates"]) for row in read_rows(config.output) if row.get("updates")]
    assert updates == sorted(set(updates))  # none is told twice: those that a kill undid are gone
    learner.close()
    return learner


# A ring that has come round would have to encode again what an episode that was never finished wrote over.
LARGE = replace(SMALL_SAC, buffer_size=10_000)
PARALLEL = {"mode": "parallel", "steps": 120, "checkpoint_every": 40, "resume": True}


def test_a_run_in_two_processes_outlives_its_learner(made, tmp_path):  # noqa: F811
    folder, log = tmp_path / "run", tmp_path / "run.log"
    process = start(made, folder, log, **PARALLEL, evaluate_every=60, evaluate_episodes=1)
    wait_for(lambda: steps_of(folder) > 30, process, log)
    before = learner_of(process)
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: learner_of(process) not in (None, before), process, log)
    assert process.wait(120) == 0, log.read_text()
    said = log.read_text()
    assert "the learner was killed (signal 9); it is started again from its last checkpoint" in said
    assert "Traceback" not in said + (folder / "learner.log").read_text()
    config = sac_config(made, folder, **PARALLEL)
    learner = require_whole(made, config)
    assert learner.steps >= 120 and learner.updates >= 2 * 100 - 8  # it had caught up but for a pass
    assert (folder / "link.secret").stat().st_mode & 0o077 == 0
    evaluated = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if "evaluated" in line]
    best = (folder / "checkpoints" / "best").read_text().strip()
    assert evaluated and best in {event["checkpoint"] for event in evaluated}


def test_two_actors_on_other_machines_feed_one_learner(made, tmp_path):  # noqa: F811
    """Three run folders, as on three machines, with nothing in common but a port and a secret that was copied."""
    place = {"mode": "parallel", "steps": 150, "checkpoint_every": 50}
    folders = [tmp_path / name for name in ("learner", "left", "right")]
    logs = [folder.with_suffix(".log") for folder in folders]
    learner = start(made, folders[0], logs[0], **place, role="learner")
    port = wait_for(
        lambda: json.loads(path.read_text())["port"] if (path := folders[0] / "link.json").exists() else 0,
        learner,
        logs[0],
    )
    secret = tmp_path / "copied.secret"
    secret.write_text((folders[0] / "link.secret").read_text())
    secret.chmod(0o600)
    actors = [
        start(
            made, folder, log, **place, role="actor", seed=seed,
            link=train_sac.LinkConfig(port=port, secret=str(secret), name=folder.name),
        )
        for seed, (folder, log) in enumerate(zip(folders[1:], logs[1:], strict=True))
    ]  # fmt: skip
    codes = [process.wait(180) for process in (*actors, learner)]
    assert codes == [0, 0, 0], "\n".join(log.read_text() for log in logs)
    rows = [(row["actor"], int(row["episode"])) for row in read_rows(folders[0]) if row.get("episode")]
    lengths = {f.name: [e.length for e in open_dataset(f / "episodes").episodes] for f in folders[1:]}
    assert sorted(rows) == [(name, number) for name in ("left", "right") for number in range(len(lengths[name]))]
    assert steps_of(folders[0]) == sum(map(sum, lengths.values())) >= 150 and all(lengths.values())
    assert not (folders[0] / "episodes").exists() and not (folders[1] / "checkpoints").exists()
    assert "copy checkpoints/ from the learner's run folder here" in logs[1].read_text()


def kill_and_compare(made, tmp_path, kills):  # noqa: F811
    """Kill a run at random instants; each time, what a resume starts from is what was saved."""
    folder, log, rng = tmp_path / "run", tmp_path / "run.log", np.random.default_rng(kills)
    config = sac_config(made, folder, steps=10_000, resume=True, sac=LARGE)
    for _ in range(kills):
        had = steps_of(folder)
        process = start(made, folder, log, steps=10_000, resume=True, sac=LARGE)
        saved = folder / "checkpoints" / "last"
        wait_for(lambda had=had, saved=saved: saved.exists() if kills == 1 else steps_of(folder) > had, process, log)
        time.sleep(rng.uniform(0, 3))
        process.kill()
        process.wait()
        encoded, run_trunk = [], ViewEncoder.run_trunk

        def counting(self, pixels, encoded=encoded, run_trunk=run_trunk):
            encoded.append(pixels)
            return run_trunk(self, pixels)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ViewEncoder, "run_trunk", counting)
            learner = require_whole(made, config)
        # Read back, not encoded again: but for the observation that the kill came between, if one.
        assert len(encoded) <= 1
        if not saved.exists():
            continue
        saved = load_checkpoint(folder, config.schema(), learner.trunk_hash)
        assert all(tensor.equal(saved.tensors[name]) for name, tensor in learner.sac.tensors().items())
        assert learner.sac.log_temperature.equal(saved.tensors["log_temperature"])
        state, stored = learner.sac.training_state(), saved.training_state
        assert state["generator"].equal(stored["sac"]["generator"])
        for name in ("critic", "actor", "temperature"):
            moments, kept = state[name]["state"], stored["sac"][name]["state"]
            assert moments.keys() == kept.keys()
            assert all(moments[i][key].equal(kept[i][key]) for i in kept for key in kept[i])
        assert learner.updates == stored["updates"] and learner.replay.rng_state() == stored["replay"]
    assert steps_of(folder) > 30


def test_a_run_killed_at_a_random_instant_goes_on_from_what_was_saved(made, tmp_path):  # noqa: F811
    kill_and_compare(made, tmp_path, kills=1)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_instants_goes_on_from_what_was_saved(made, tmp_path):  # noqa: F811
    kill_and_compare(made, tmp_path, kills=20)


@pytest.mark.slow
def test_either_side_killed_at_random_instants_goes_on(made, tmp_path):  # noqa: F811
    folder, log, rng = tmp_path / "run", tmp_path / "run.log", np.random.default_rng(1)
    config = sac_config(made, folder, **PARALLEL | {"steps": 10_000, "sac": LARGE})
    for kill in range(10):
        had = steps_of(folder)
        process = start(made, folder, log, **PARALLEL | {"steps": 10_000, "sac": LARGE})
        wait_for(lambda had=had: steps_of(folder) > had, process, log)
        time.sleep(rng.uniform(0, 3))
        learner = learner_of(process)
        if kill % 2:
            os.kill(learner, signal.SIGKILL)
            had = steps_of(folder)
            wait_for(lambda had=had: steps_of(folder) > had + 20, process, log)
            learner = learner_of(process)
        process.kill()
        process.wait()
        until = time.monotonic() + 30  # left alone, the learner saves and ends
        while Path(f"/proc/{learner}").exists() and "Z" not in Path(f"/proc/{learner}/stat").read_text().split()[2]:
            assert time.monotonic() < until
            time.sleep(0.05)
        require_whole(made, config)

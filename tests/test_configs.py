"""The configs that come with the project: each loads, and what two of them share is one fact."""

import json
from pathlib import Path

import pytest

import infer
import record
import train_reward
import train_sac
from so101.config import ConfigError, from_dict, load, parse, to_dict
from so101.env import EnvConfig
from so101.learn.reward import RewardConfig
from so101.rig import ArmConfig, RigConfig, describe_task
from so101.robot.camera import CameraConfig
from so101.schema import Preprocess

CONFIGS = Path(__file__).parent.parent / "configs"
MEANING = {
    "camera": CameraConfig,
    "evaluate": infer.Config,
    "follower": ArmConfig,
    "grasp_only": EnvConfig,
    "leader": ArmConfig,
    "preprocess": Preprocess,
    "reach_and_grasp": EnvConfig,
    "record_negative": record.Config,
    "record_positive": record.Config,
    "reward": train_reward.Config,
    "reward_v2": RewardConfig,
    "reward_v5": RewardConfig,
    "rig": RigConfig,
    "sim_demos_only": train_sac.Config,
    "train": train_sac.Config,
    "workspace": EnvConfig,
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_config_loads_as_what_it_is(path: Path) -> None:
    loaded = load(MEANING[path.stem], path)  # type: ignore[var-annotated]
    for name, value in json.loads(path.read_text()).items():
        if not isinstance(value, str | dict):
            assert getattr(loaded, name) == value


def test_what_is_recorded_is_what_is_trained_and_run() -> None:
    """Rows 8, 13 and 42 of the field record: two configs that disagreed on crop, units or start pose."""
    recorded = load(record.Config, CONFIGS / "record_negative.json")
    trained = load(train_sac.Config, CONFIGS / "train.json")
    reward = load(train_reward.Config, CONFIGS / "reward.json")
    assert (recorded.rig, recorded.env) == (trained.rig, trained.env)
    assert recorded.preprocess == trained.preprocess == reward.preprocess
    assert recorded.dataset == trained.demonstrations == reward.dataset
    assert reward.output == trained.reward_model
    assert trained.output == load(infer.Config, CONFIGS / "evaluate.json").run
    assert trained.schema() == describe_task(recorded.rig, recorded.env, recorded.preprocess)
    assert all(record.is_failure(index, recorded) for index in range(25, 35))


def test_the_user_s_numbers() -> None:
    """From the user's documents and the final config of the field record, section 3."""
    trained = load(train_sac.Config, CONFIGS / "train.json")
    env, sac = trained.env, trained.sac
    assert (env.fps, env.control_time_s, env.reset_time_s, env.action_scale) == (10, 10, 2, 0.02)
    assert (env.workspace_low, env.workspace_high) == ([0.10, -0.15, -0.02], [0.35, 0.15, 0.25])
    assert (env.home, env.gripper_range) == ([0.25, 0.0, 0.07], [0.05, 0.5])
    assert (sac.batch_size, sac.discount, sac.temperature_init, sac.lr) == (256, 0.97, 0.01, 3e-4)
    assert trained.preprocess == Preprocess([0, 80, 480, 480], 128)
    assert load(EnvConfig, CONFIGS / "reach_and_grasp.json").control_time_s == 30


def test_a_config_and_an_override_compose() -> None:
    config = parse(record.Config, ["--config", str(CONFIGS / "record_positive.json"), "rig.follower.port=/dev/x"], "")
    assert config.rig.follower.port == "/dev/x"
    assert config.rig.follower.rest == load(ArmConfig, CONFIGS / "follower.json").rest
    with pytest.raises(ConfigError, match="leader"):
        parse(record.Config, ["--config", str(CONFIGS / "record_positive.json"), "rig.leader=null"], "")


def test_no_config_names_a_machine() -> None:
    for path in CONFIGS.glob("*.json"):
        assert not any(word in path.read_text() for word in ("/home", "/Users", "C:\\", "ttyACM", "ttyUSB"))


@pytest.mark.parametrize("script", [train_reward, train_sac])
def test_an_encoder_is_found_from_wherever_one_stands(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = script.Config(encoder="weights.safetensors")
    assert config.encoder == str(tmp_path / "weights.safetensors")
    monkeypatch.chdir("/")
    assert from_dict(script.Config, to_dict(config), "there").encoder == str(tmp_path / "weights.safetensors")

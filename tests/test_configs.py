"""Every YAML of configs/ loads with the settings of the script it is for, and says what it is for."""

from pathlib import Path

import pytest

import collect
import rl_train
import teleop_eval
import train_resnet
import train_vlm
from common import config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

SETTINGS = {
    "demo_collect": collect.Config,
    "demo_real_collect": collect.Config,
    "demo_real_resnet": train_resnet.TrainConfig,
    "demo_real_teleop": teleop_eval.Config,
    "demo_resnet": train_resnet.TrainConfig,
    "demo_rl": rl_train.Config,
    "demo_trend_collect": collect.Config,
    "demo_trend_oracle": rl_train.Config,
    "demo_trend_rl": rl_train.Config,
    "demo_trend_vlm": train_vlm.TrainConfig,
    "maniskill_ppo_mlp_qwentrend_collect": rl_train.Config,
    "maniskill_ppo_mlp_qwentrend_reward": rl_train.Config,
    "maniskill_ppo_mlp_resnet_reward": rl_train.Config,
    "maniskill_sac_mlp_resnet_reward_async": rl_train.Config,
    "pickcube_collect": collect.Config,
    "pickcube_near_collect": collect.Config,
    "pickcube_poor_collect": collect.Config,
    "pickcube_resnet": train_resnet.TrainConfig,
    "pickcube_rl": rl_train.Config,
    "qwen3vl_sft_qwentrend": train_vlm.TrainConfig,
    "realworld_collect_dataset": collect.Config,
    "realworld_collect_fixed_pose": collect.Config,
    "realworld_sac_collect": collect.Config,
    "realworld_sac_demo": rl_train.Config,
    "realworld_teleop": teleop_eval.Config,
    "reward_training": train_resnet.TrainConfig,
}


def test_every_config_is_known_here():
    """A new YAML gets its place in SETTINGS, or is a part for others in a folder of its own."""
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_config_loads_and_is_written_back(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DUALVIEW_SFT_DATA_ROOT", "data")
    cfg = config.from_yaml(SETTINGS[name], CONFIGS / f"{name}.yaml")
    config.save(cfg, tmp_path / "config.yaml")
    assert config.from_yaml(SETTINGS[name], tmp_path / "config.yaml") == cfg


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_config_opens_with_its_purpose(path):
    assert path.read_text().startswith("# ")


def test_the_demo_fits_together():
    """What one step writes is what the next one reads, and the cameras are the same ones."""
    collected = config.from_yaml(collect.Config, CONFIGS / "demo_collect.yaml")
    trained = config.from_yaml(train_resnet.TrainConfig, CONFIGS / "demo_resnet.yaml")
    learned = config.from_yaml(rl_train.Config, CONFIGS / "demo_rl.yaml")
    run = collected.runner.logger.log_path
    assert learned.algorithm.prior_data == f"{run}/collected_data"
    assert learned.reward.model.model_path == f"{trained.runner.logger.log_path}/checkpoint"
    for key in ("task", "max_episode_steps", "control_freq", "observe_time", "control_mode", "cameras"):
        recorded = vars(collected.env.eval)[key]
        assert vars(learned.env.train)[key] == vars(learned.env.eval)[key] == recorded
    size = collected.env.eval.cameras.main_images
    assert trained.actor.model.image_size == [3, size.height, size.width]


def test_the_demo_learns_from_the_learned_reward_alone():
    learned = config.from_yaml(rl_train.Config, CONFIGS / "demo_rl.yaml")
    assert learned.reward.use_reward_model
    assert learned.reward.reward_mode == "terminal"
    assert (learned.reward.env_reward_weight, learned.reward.reward_weight) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["demo_trend_rl", "demo_trend_oracle"])
def test_the_trend_demo_fits_together(name):
    collected = config.from_yaml(collect.Config, CONFIGS / "demo_trend_collect.yaml")
    trained = config.from_yaml(train_vlm.TrainConfig, CONFIGS / "demo_trend_vlm.yaml")
    learned = config.from_yaml(rl_train.Config, CONFIGS / f"{name}.yaml")
    assert learned.algorithm.prior_data == f"{collected.runner.logger.log_path}/collected_data"
    if name == "demo_trend_rl":
        assert learned.reward.model.model_path == f"{trained.runner.logger.log_path}/checkpoint"
    for key in ("task", "max_episode_steps", "control_freq", "observe_time", "control_mode", "cameras"):
        recorded = vars(collected.env.eval)[key]
        assert vars(learned.env.train)[key] == vars(learned.env.eval)[key] == recorded
    (buffer,) = learned.reward.model.history_buffers.values()
    assert buffer.history_size == trained.data.video_nframes
    # the learned reward alone pays
    assert learned.reward.reward_mode == "history_buffer"
    assert (learned.reward.env_reward_weight, learned.reward.reward_weight) == (0.0, 1.0)
    assert learned.reward.model.gt_success_bonus == 0.0


def test_the_collecting_config_keeps_the_guides_values():
    cfg = config.from_yaml(rl_train.Config, CONFIGS / "maniskill_ppo_mlp_qwentrend_collect.yaml")
    assert (cfg.env.train.num_envs, cfg.env.eval.num_envs) == (1024, 256)
    data = cfg.env.eval.data_collection
    assert (data.enabled, data.only_success, data.gae_gamma, data.gae_lambda) == (True, False, 0.8, 0.9)
    assert (cfg.algorithm.gamma, cfg.algorithm.gae_lambda) == (0.8, 0.9)
    assert cfg.env.eval.cameras.extra_view_images.width == 224


@pytest.mark.parametrize("name", ["maniskill_ppo_mlp_resnet_reward", "maniskill_sac_mlp_resnet_reward_async"])
def test_configs_of_the_guide_keep_its_values(name):
    cfg = config.from_yaml(rl_train.Config, CONFIGS / f"{name}.yaml")
    assert cfg.env.train.num_envs == 128
    assert cfg.env.train.max_episode_steps == 50
    assert cfg.reward.reward_mode == "terminal"
    assert cfg.reward.reward_threshold == 0.5
    assert cfg.algorithm.gamma == 0.8
    assert cfg.actor.model.hidden_dims == (256, 256, 256)
    assert cfg.runner.async_rollout == (cfg.algorithm.name == "sac")

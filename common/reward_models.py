"""Every kind of reward model behind one door.

All that is asked of a model: `score(data)`, `views` (the keys of data it looks at), `window` (frames per
verdict) and `meta` (what its checkpoint says of itself). A model of frames (`resnet`, `vlm`) takes
(B, H, W, 3) uint8 and returns success_prob (B,); a model of windows (`history_vlm`, `history_oracle`) takes
(B, K, ...) and returns label_prob (B, L). A model that is told the task has an attribute `task`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from common.history import HistoryBufferConfig
from common.qwen_checkpoint import load_history_vlm, load_vlm
from common.qwen_reward import HistoryVLMRewardConfig, VLMRewardConfig
from common.resnet_reward import ResNetRewardConfig, ResNetRewardModel, load_resnet
from common.runtime import UserError
from common.trend import LABELS, trend_labels
from common.vlm_api import ApiConfig, load_served


@dataclass
class HistoryOracleConfig:
    """The label rule itself pays: a perfect trend model, for tasks whose geometry is known."""

    model_type: Literal["history_oracle"] = "history_oracle"
    delta_threshold: float = 0.05  # m of success_distance, within which a window is unclear
    reward_parser_name: str = "qwentrend_reward_parser"
    reward_parser_params: dict[str, Any] = field(default_factory=dict)
    history_buffers: dict[str, HistoryBufferConfig] = field(
        default_factory=lambda: {"history_window": HistoryBufferConfig(history_keys=["success_distance"])}
    )
    interval_reward: float = 0.0
    gt_success_bonus: float = 0.0
    infer_micro_batch_size: int = 1024


class HistoryOracle:
    """Says what `common.trend` would label a window: what a learned trend model can reach at best."""

    views = ("success_distance",)
    labels = LABELS
    window = None  # any length

    def __init__(self, cfg: HistoryOracleConfig):
        self.delta_threshold = cfg.delta_threshold
        self.meta = {"score_source": "success_distance", "delta_threshold": cfg.delta_threshold}

    def score(self, data: dict[str, Tensor]) -> Tensor:
        """success_distance (B, K) in m -> one-hot label_prob (B, 3) float32."""
        distance = data["success_distance"].cpu()
        label = torch.from_numpy(
            trend_labels((distance[:, 0] - distance[:, -1]).numpy(), self.delta_threshold)
        )
        return torch.nn.functional.one_hot(label, len(LABELS)).float()


class Ensemble:
    """Several classifiers that answer as one, so that a policy has to find what all of them (`min`), or most
    (`mean`), take for success.

    By `min` its threshold is the strictest member's, and nothing passes that this member refuses; the mean of
    scores has none. UserError where they know different pictures.
    """

    window = 1

    def __init__(self, models: list[ResNetRewardModel], combine: Literal["min", "mean"], names: list[str]):
        self.models, self.combine = models, combine
        self.views, self.meta = models[0].views, dict(models[0].meta)
        for model, name in zip(models, names, strict=True):
            for key in ("views", "frame_size", "render"):
                if model.meta.get(key) != self.meta.get(key):
                    raise UserError(
                        f"{name} and {names[0]} cannot judge together, for they were trained with another "
                        f"{key}: {model.meta.get(key)} and {self.meta.get(key)}"
                    )
        thresholds = [model.threshold for model in models]
        self.meta |= {"threshold": None, "threshold_rule": None}
        if combine == "min" and None not in thresholds:
            strictest = models[thresholds.index(max(thresholds))].meta
            self.meta |= {key: strictest.get(key) for key in ("threshold", "threshold_rule")}
            self.meta["strictest_of"] = len(models)

    def score(self, frames: dict[str, Tensor]) -> Tensor:
        """As one model's."""
        scores = torch.stack([model.score(frames) for model in self.models])  # (models, B)
        return scores.amin(0) if self.combine == "min" else scores.mean(0)


def load_resnets(section: ResNetRewardConfig, device: torch.device | None) -> ResNetRewardModel | Ensemble:
    """The model of `section.model_path`, or the ensemble of all it names."""
    if not isinstance(section.model_path, list):
        return load_resnet(section, device)
    models = [load_resnet(replace(section, model_path=path), device) for path in section.model_path]
    return Ensemble(models, section.ensemble, section.model_path)


RewardModelConfig = ResNetRewardConfig | VLMRewardConfig | HistoryVLMRewardConfig | HistoryOracleConfig
OF_WINDOWS = (HistoryVLMRewardConfig, HistoryOracleConfig)

REWARD_MODELS: dict[str, Callable[[Any, torch.device | None], Any]] = {
    "resnet": load_resnets,
    "vlm": load_vlm,
    "history_vlm": load_history_vlm,
    "buffered_vlm": load_history_vlm,  # its name in newer RLinf
    "history_oracle": lambda cfg, _: HistoryOracle(cfg),
}


def load_reward_model(
    section: RewardModelConfig, api: ApiConfig | None = None, device: torch.device | None = None
) -> Any:
    """The reward model that `section.model_type` names, ready to score; with `api` it is asked elsewhere."""
    if api is not None:
        return load_served(section, api)
    return REWARD_MODELS[section.model_type](section, device)

"""Section `reward`: who judges, how scores become verdicts, what they pay, what is kept and checked."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from common.audit import AuditConfig
from common.envs import Render
from common.link import LinkConfig
from common.link_keys import parse_address
from common.qwen_reward import VLMConfig
from common.resnet_reward import ResNetRewardConfig
from common.reward_models import OF_WINDOWS, HistoryOracleConfig, RewardModelConfig
from common.vlm_api import ApiConfig


@dataclass
class RewardConfig:
    use_reward_model: bool = False
    reward_mode: Literal["per_step", "terminal", "history_buffer"] = "terminal"
    reward_threshold: float | Literal["auto"] = "auto"  # auto: the one stored with the model
    reward_weight: float = 1.0
    env_reward_weight: float = 0.0
    # How scores become verdicts (common.rewards.Decision), of per_step frames alone:
    hold_k: int = 1  # a success needs so many votes for it ...
    hold_n: int = 1  # ... among the episode's last so many
    leave_threshold: float | None = None  # once a success, so high a score keeps it one; null: the threshold
    # [low, high]: scores between them pay nothing (no success, in the audit too) and do not vote
    abstain_band: list[float] | None = None
    standalone_realworld: bool = False  # at an arm: the verdict pays and ends episodes inside the env ...
    require_in_zone: bool = False  # ... where only frames with the gripper at the target pose vote for it
    use_reward_prob: bool = False  # teleop_eval.py: show the probability beside the verdict
    # potential: on top of the env reward, pay gamma * Phi(s') - Phi(s), Phi being the score (of windows: what
    # their reward would be), so that a wrong model of frames cannot move the optimum; null: pay the verdicts
    shaping: Literal["potential"] | None = None
    history_reward_assign: bool = False  # pay a window's reward to each of its steps, not to the last alone
    shuffle_scores: bool = False  # for a control run: each score is swapped for one drawn from those so far
    keep_hard: int = 0  # frames that the model gets wrong in training, kept in RUN/hard; 0: none
    hard_truth: Literal["known", "ask"] = "known"  # ask: the env does not know; collect.py --review will
    # A resnet that learns from its hard frames (keep_hard) during SAC:
    refresh_every: int = 0  # env steps between two refreshes; 0: never
    refresh_steps: int = 100  # optimizer steps of each
    refresh_config: str | None = None  # the YAML of train_resnet.py by which it learned before
    refresh_data: str | None = None  # folder with the train.pt and val.pt that it learned from
    refresh_memory: int = 20_000  # judged frames kept to be paid again; 64x64 pixels are 12 kB each
    audit: AuditConfig | None = None  # an alarm for when the model is fooled; null: none
    verdict_every: int = 1  # env steps of SAC between two asks of the model: larger batches, later verdicts
    # inline, worker, or tcp://host:port of a reward server; auto: worker on the CPU, except for terminal
    placement: str = "auto"
    link: LinkConfig = field(default_factory=LinkConfig)
    model: RewardModelConfig = field(default_factory=ResNetRewardConfig)
    api: ApiConfig | None = None  # ask a served vision-language model instead of loading one here

    def __post_init__(self):
        if self.reward_threshold != "auto" and not 0 <= self.reward_threshold <= 1:
            raise ValueError(f"reward_threshold must lie in [0, 1] or be 'auto', got {self.reward_threshold}")
        if self.verdict_every < 1:
            raise ValueError(f"verdict_every must be at least 1, got {self.verdict_every}")
        if self.api is not None and not isinstance(self.model, VLMConfig):
            raise ValueError(f"reward.api serves vlm and history_vlm, not {self.model.model_type}")
        self._check_decision()
        if self.shaping is not None:
            self._check_shaping()
        self._check_placement()
        if self.audit is not None:
            self._check_audit()
        if self.refresh_every:
            self._check_refresh()
        if self.keep_hard < 0 or (self.keep_hard and (not self.use_reward_model or self.of_windows)):
            raise ValueError("keep_hard is a number of frames, 0 or more, and wants a reward model of frames")
        elsewhere = self.is_oracle or self.linked or self.api is not None
        if self.use_reward_model and not self.model_files and not elsewhere:
            raise ValueError("use_reward_model is on but model.model_path names no checkpoint")
        if self.use_reward_model and self.of_windows != isinstance(self.model, OF_WINDOWS):
            judges = "windows" if isinstance(self.model, OF_WINDOWS) else "single frames"
            raise ValueError(
                f"reward_mode {self.reward_mode} does not go with model_type {self.model.model_type}, which "
                f"judges {judges}; history_buffer is for models of windows, and they for it"
            )
        if self.use_reward_model and self.reward_threshold == "auto" and self._is_mean:
            raise ValueError(
                "reward.model.ensemble mean: the members' thresholds are none of the mean of their "
                "scores; set reward.reward_threshold to a number"
            )
        if self.history_reward_assign and not self.of_windows:
            raise ValueError("history_reward_assign is for reward_mode history_buffer; frames have no past")

    def _check_refresh(self) -> None:
        if not self.keep_hard or self.hard_truth != "known":
            raise ValueError("refresh_every learns from keep_hard frames, and from hard_truth: known")
        if self.refresh_config is None or self.refresh_data is None:
            raise ValueError(
                "refresh_every wants refresh_config, a YAML of train_resnet.py, and refresh_data"
            )
        if self.linked or not isinstance(self.model, ResNetRewardConfig):
            raise ValueError("refresh_every is for a resnet in this process or its worker")
        if not isinstance(self.model.model_path, str):
            raise ValueError("refresh_every is for one model, not for several that judge as one")
        if self.shuffle_scores or self.shaping is not None:
            raise ValueError(
                "refresh_every pays verdicts again: set shuffle_scores to false, shaping to null"
            )
        if self.hold_n > 1 or self.leave_threshold is not None:
            raise ValueError(
                "refresh_every pays frames again one by one: set hold_n to 1 and leave_threshold to null"
            )
        if self.refresh_steps < 1 or self.refresh_memory < 1:
            raise ValueError("refresh_steps and refresh_memory must be at least 1")

    def _check_audit(self) -> None:
        if not self.use_reward_model or self.of_windows:
            raise ValueError(
                "reward.audit compares verdicts on success with the truth: it wants a reward model of frames"
            )
        if self.audit.action == "lower" and (self.env_reward_weight == 0 or self.standalone_realworld):
            raise ValueError(
                "reward.audit.action lower leaves nothing to learn from where the model alone pays; "
                "set env_reward_weight, or choose warn or stop"
            )

    def _check_decision(self) -> None:
        if not 1 <= self.hold_k <= self.hold_n:
            raise ValueError(
                f"hold_k of hold_n steps needs 1 <= hold_k <= hold_n, got {self.hold_k} of {self.hold_n}"
            )
        if self.leave_threshold is not None and not 0 <= self.leave_threshold <= 1:
            raise ValueError(f"leave_threshold must lie in [0, 1], got {self.leave_threshold}")
        band = self.abstain_band
        if band is not None and not (len(band) == 2 and 0 <= band[0] < band[1] <= 1):
            raise ValueError(f"abstain_band must be [low, high] with 0 <= low < high <= 1, got {band}")
        if band is not None and self.leave_threshold is not None:
            raise ValueError(
                "leave_threshold keeps a success at a score at which abstain_band takes it away: set one of "
                "them to null"
            )
        if band is not None and not self.hold_k == self.hold_n > 1:
            raise ValueError(
                "abstain_band keeps scores out of the votes that hold_k of hold_n steps cast, so it "
                f"wants hold_k = hold_n above 1, got {self.hold_k} of {self.hold_n}"
            )
        if self._remembers and self.reward_mode != "per_step" and not self.standalone_realworld:
            raise ValueError(
                "hold_k, hold_n, leave_threshold and abstain_band judge one frame after another, which is "
                f"reward_mode per_step, not {self.reward_mode}"
            )
        if self.require_in_zone and not self.standalone_realworld:
            raise ValueError("require_in_zone goes with standalone_realworld: true")

    @property
    def _remembers(self) -> bool:
        """Whether a verdict depends on the scores before; with an abstain_band it does."""
        return self.hold_n > 1 or self.leave_threshold is not None

    def _check_shaping(self) -> None:
        if not self.use_reward_model or self.standalone_realworld or self.reward_mode == "terminal":
            raise ValueError(
                "shaping pays differences of the reward model's score from step to step: it needs "
                "use_reward_model true, reward_mode per_step or history_buffer, standalone_realworld false"
            )
        if self.env_reward_weight == 0:
            raise ValueError("shaping alone has no optimum, it adds to the env reward: set env_reward_weight")
        if self._remembers:
            raise ValueError(
                "hold_k, hold_n, leave_threshold and abstain_band make verdicts, and shaping pays the scores "
                "themselves: set them to 1, 1, null and null"
            )
        if self.of_windows:
            extra = (self.history_reward_assign, self.model.interval_reward, self.model.gt_success_bonus)
            if any(extra):
                raise ValueError(
                    "history_reward_assign, interval_reward and gt_success_bonus are no differences of a "
                    "score, which is all that shaping pays: set them to false, 0 and 0"
                )

    def _check_placement(self) -> None:
        if self.placement in ("auto", "inline", "worker"):
            return
        try:
            parse_address(self.placement)
        except ValueError:
            raise ValueError(
                f"placement must be auto, inline, worker or tcp://host:port, got '{self.placement}'"
            ) from None
        if self.is_oracle:
            raise ValueError("history_oracle judges distances, not pictures; keep it here: placement inline")

    @property
    def linked(self) -> bool:
        """Whether a server judges, which `common.reward_link` runs."""
        return self.placement.startswith("tcp://")

    @property
    def of_windows(self) -> bool:
        """Whether windows are judged, not frames."""
        return self.use_reward_model and self.reward_mode == "history_buffer"

    @property
    def is_oracle(self) -> bool:
        return isinstance(self.model, HistoryOracleConfig)

    @property
    def _is_mean(self) -> bool:
        """Whether several classifiers judge by the mean of their scores."""
        return isinstance(vars(self.model).get("model_path"), list) and self.model.ensemble == "mean"

    @property
    def model_files(self) -> dict[str, str]:
        """Key -> path of what the model is made from; nothing where it is served."""
        if self.api is not None or self.linked:
            return {}
        files = {}
        for key in ("model_path", "lora_path"):
            path = vars(self.model).get(key)
            if isinstance(path, list):
                files |= {f"reward.model.{key}.{i}": member for i, member in enumerate(path)}
            elif path:
                files[f"reward.model.{key}"] = path
        return files

    @property
    def model_name(self) -> str:
        """What errors call the model: its path (the adapter's, or an ensemble's last, where there is one), or
        where it is served."""
        if self.linked:
            return f"at {self.placement}"
        return [self.model.model_type, *self.model_files.values()][-1]

    @property
    def render(self) -> Render:
        """Which single frames the reward needs."""
        if not self.use_reward_model:
            return Render.NONE
        return Render.IF_DONE if self.reward_mode == "terminal" else Render.ALWAYS

    @property
    def in_worker(self) -> bool:
        if self.placement == "auto":
            slow = self.reward_mode != "terminal" and not self.is_oracle
            return slow and (self.api is not None or not torch.cuda.is_available())
        return self.placement == "worker"

"""Qwen3-VL as a reward model: what it says of a window's trend, or how far it holds the task to be done.

A label is scored by **one forward pass**: the probability of each label's first token at the place where the
answer begins. It needs no parser, nothing is invalid, and a sum of the three (the label mass) far below 1
tells that the model would rather say something else. `generate` is there for parity with RLinf.

Models are read from folders, and written to them, by common/qwen_checkpoint.py.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.history import HistoryBufferConfig
from common.prompts import AskedAboutTask, InputBuilderParams
from common.qwen_inputs import QwenInputs, check_frames
from common.runtime import UserError

MIN_LABEL_MASS = 0.5  # mean of a batch, below which the model would rather say something else
MIN_FOR_MASS = 32  # windows in a batch whose mean label mass tells something


@dataclass
class VLMConfig:
    """What both kinds share."""

    model_path: str | None = None  # folder of a Qwen3-VL, or of one that train_vlm.py trained whole
    lora_path: str | None = None  # folder of an adapter that train_vlm.py trained
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    inference_mode: Literal["label_logits", "generate"] = "label_logits"
    input_builder_name: str = "qwentrend_input_builder"  # or file.py:name of your own
    input_builder_params: InputBuilderParams = field(default_factory=InputBuilderParams)
    reward_parser_name: str = "qwentrend_reward_parser"  # or file.py:name of your own
    reward_parser_params: dict[str, Any] = field(default_factory=dict)
    infer_micro_batch_size: int = 64  # samples scored at once
    max_new_tokens: int = 16  # of generate
    do_sample: bool = False  # of generate; a reward should not depend on luck
    temperature: float = 0.0  # of generate, where do_sample
    use_chat_template: bool = True
    device: str = "auto"

    def __post_init__(self):
        if self.infer_micro_batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError("infer_micro_batch_size and max_new_tokens must be at least 1")
        if self.do_sample and self.temperature <= 0:
            raise ValueError("do_sample needs a temperature above 0")


@dataclass
class VLMRewardConfig(VLMConfig):
    """`reward.model` for single frames: the model writes a number between 0 and 1."""

    model_type: Literal["vlm"] = "vlm"
    inference_mode: Literal["generate"] = "generate"
    input_builder_name: str = "base_vlm_input_builder"
    reward_parser_name: str = "base_vlm_reward_parser"
    views: list[str] = field(default_factory=lambda: ["main_images", "extra_view_images"])


@dataclass
class HistoryVLMRewardConfig(VLMConfig):
    """`reward.model` for windows: the model says a trend."""

    model_type: Literal["history_vlm", "buffered_vlm"] = "history_vlm"  # the latter: newer RLinf's name
    history_buffers: dict[str, HistoryBufferConfig] = field(
        default_factory=lambda: {"history_window": HistoryBufferConfig()}
    )
    interval_reward: float = 0.0  # of steps without a window
    gt_success_bonus: float = 0.0  # the simulator's own word; above 0 the reward is not learned alone


# ----------------------------------------------------------------------------------------------------
# Models

Answer = Callable[[dict[str, Tensor], list[str]], Tensor]  # of a piece's frames and tasks, one row each


class _Qwen(AskedAboutTask):
    """A loaded model, its inputs, and batches that fit the memory."""

    def __init__(self, cfg: VLMConfig, model: nn.Module, inputs: QwenInputs, parser: Any, meta: dict):
        self.cfg, self.model, self.inputs, self.parser, self.meta = cfg, model, inputs, parser, meta
        self.views, self.window = inputs.views, inputs.num_frames
        self._own_task = cfg.input_builder_params.default_task_description
        self.micro_batch = cfg.infer_micro_batch_size
        self._halved = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _in_batches(self, answer: Answer, frames: dict[str, Tensor], tasks: list[str]) -> Tensor:
        """`answer(frames, tasks)` on pieces of at most `micro_batch`; halves them once where memory ends."""
        self.model.eval()
        out, start = [], 0
        while start < len(tasks):
            piece = slice(start, start + self.micro_batch)
            try:
                out.append(answer({view: frames[view][piece] for view in self.views}, tasks[piece]))
                start += self.micro_batch
            except torch.OutOfMemoryError as error:
                if self._halved or self.micro_batch == 1:
                    raise UserError(
                        f"out of GPU memory while scoring {self.micro_batch} samples at once; lower "
                        "reward.model.infer_micro_batch_size"
                    ) from error
                self._halved, self.micro_batch = True, self.micro_batch // 2
                warnings.warn(
                    f"out of GPU memory: infer_micro_batch_size goes down to {self.micro_batch}", stacklevel=2
                )
                torch.cuda.empty_cache()
        return torch.cat(out)

    def _generate(self, frames: dict[str, Tensor], tasks: list[str]) -> list[str]:
        inputs = self._questions(frames, tasks)
        del inputs["position_ids"]  # generate makes its own, step by step
        sampling = {"do_sample": True, "temperature": self.cfg.temperature} if self.cfg.do_sample else {}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        tokens = self.model.generate(**inputs, max_new_tokens=self.cfg.max_new_tokens, **(sampling or greedy))
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return self.inputs.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def _questions(self, frames: dict[str, Tensor], tasks: list[str]) -> dict[str, Tensor]:
        # frames travel as bytes and are cut into patches over there
        on_device = {view: images.to(self.device, non_blocking=True) for view, images in frames.items()}
        return self.inputs.questions(on_device, tasks)


class HistoryVLMRewardModel(_Qwen):
    """Windows in, probabilities of the labels out.

    Also around a model that is being trained: validation asks exactly what RL will ask.
    """

    def __init__(self, cfg: VLMConfig, model: nn.Module, inputs: QwenInputs, parser: Any, meta: dict):
        super().__init__(cfg, model, inputs, parser, meta)
        self.labels = tuple(parser.labels)
        spelt = {label: inputs.answer_ids(label) for label in self.labels}
        first = [ids[0] for ids in spelt.values()]
        if len(set(first)) != len(first) and cfg.inference_mode == "label_logits":
            raise UserError(
                f"in this tokenizer labels begin with the same token ({spelt}), so one forward pass cannot "
                "tell them apart; set inference_mode: generate, or use other labels"
            )
        self.label_tokens = torch.tensor(first)
        self._warned = False

    @torch.inference_mode()
    def score(self, frames: dict[str, Tensor], tasks: list[str] | None = None) -> Tensor:
        """(B, L) float32 on the CPU: `label_prob`; with `inference_mode: generate` a row is one-hot, or zeros
        where the answer was none of the labels.

        frames: view -> (B, K, H, W, 3) uint8, time rising; tasks: one per window, else `task` for all.
        UserError where frames are not as the model knows them.
        """
        if self.cfg.inference_mode == "label_logits":
            return self.label_prob(frames, tasks)
        return self._of_windows(self._said, frames, tasks)

    @torch.inference_mode()
    def label_prob(self, frames: dict[str, Tensor], tasks: list[str] | None = None) -> Tensor:
        """(B, L) float32 on the CPU: the probability of each label's first token, out of all that could be
        said; in every inference_mode."""
        label_prob = self._of_windows(self._label_prob, frames, tasks)
        if not self._warned and self.meta and len(label_prob) >= MIN_FOR_MASS:
            mass = float(label_prob.sum(1).mean())
            if mass < MIN_LABEL_MASS:
                self._warned = True
                warnings.warn(
                    f"the labels have only {mass:.2f} of the probability between them: is the model trained "
                    "for this question?",
                    stacklevel=2,
                )
        return label_prob

    def _of_windows(self, answer: Answer, frames: dict[str, Tensor], tasks: list[str] | None) -> Tensor:
        check_frames(frames, self.views)
        met = {view: frames[view].shape[1] for view in self.views}
        if set(met.values()) != {self.window}:
            raise UserError(f"the reward model judges windows of {self.window} frames, got {met}")
        self._check_size(frames)
        count = len(frames[self.views[0]])
        if not count:
            return torch.zeros(0, len(self.labels))
        return self._in_batches(answer, frames, [self.task] * count if tasks is None else tasks)

    def _label_prob(self, frames: dict[str, Tensor], tasks: list[str]) -> Tensor:
        inputs = self._questions(frames, tasks)
        logits = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        return logits.log_softmax(1)[:, self.label_tokens.to(logits.device)].exp().cpu()

    def _said(self, frames: dict[str, Tensor], tasks: list[str]) -> Tensor:
        label = torch.tensor([self.parser.parse(text) for text in self._generate(frames, tasks)])
        return torch.where((label >= 0)[:, None], torch.eye(len(self.labels))[label.clamp(min=0)], 0.0)

    def _check_size(self, frames: dict[str, Tensor]) -> None:
        for view, expected in self.meta.get("frame_size", {}).items():
            if view in frames and list(frames[view].shape[2:4]) != list(expected):
                met = "x".join(map(str, frames[view].shape[2:4]))
                raise UserError(
                    f"{view} are {met}, but the reward model was trained on {expected[0]}x{expected[1]} "
                    "frames; render that size, or train it on the new one"
                )


class VLMRewardModel(_Qwen):
    """The current images in, a number between 0 and 1 out, as the model writes it."""

    @torch.inference_mode()
    def score(self, frames: dict[str, Tensor], tasks: list[str] | None = None) -> Tensor:
        """success_prob (B,) float32 on the CPU of frames: view -> (B, H, W, 3) uint8. An answer that cannot
        be read counts as the parser's `invalid_score`."""
        windows = {view: images[:, None] for view, images in frames.items()}
        check_frames(windows, self.views)
        count = len(windows[self.views[0]])
        if not count:
            return torch.zeros(0)
        return self._in_batches(self._said, windows, [self.task] * count if tasks is None else tasks)

    def _said(self, frames: dict[str, Tensor], tasks: list[str]) -> Tensor:
        score = torch.tensor([self.parser.parse(text) for text in self._generate(frames, tasks)])
        return torch.where(score.isnan(), self.parser.invalid_score, score).float()

"""Qwen3-VL as a reward model: what it says of a window's trend, or how far it holds the task to be done.

A label is scored by **one forward pass**: the probability of each label's first token at the place where the
answer begins. It needs no parser, nothing is invalid, and a sum of the three (the label mass) far below 1
tells that the model would rather say something else. `generate` is there for parity with RLinf.

**Checkpoint**: a folder that appears whole or not at all, written by train_vlm.py.
- a PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`), to be named by `lora_path` beside the
  base model's `model_path`; or a whole model with its processor, to be named by `model_path`.
- `reward.json`: `template` of the prompt, `input_builder_name`, `views`, `window`, `frame_size`, `labels`,
  `base` (a hash of the base model's config), and what the trainer knows: cameras, labels' threshold, metrics.
- `golden.safetensors`: a few windows and their label_prob in fp32, scored again at every load.
"""

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.fast_vision import use_fast_vision
from common.files import load_json, save_json, whole_folder
from common.history import HistoryBufferConfig
from common.prompts import (
    INPUT_BUILDERS,
    TEMPLATES,
    TREND_TEMPLATE,
    InputBuilderParams,
    look_up,
    make_parser,
)
from common.qwen_inputs import QwenInputs
from common.runtime import UserError, pick_device

GOLDEN_TOLERANCE = {"fp32": 0.02, "bf16": 0.1}  # of a label's probability
PROMPT_VERSION = 1  # of how `common.qwen_inputs` writes a prompt down; another one is another question
MIN_LABEL_MASS = 0.5  # mean of a batch, below which the model would rather say something else


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


class _Qwen:
    """A loaded model, its inputs, and batches that fit the memory."""

    def __init__(self, cfg: VLMConfig, model: nn.Module, inputs: QwenInputs, parser: Any, meta: dict):
        self.cfg, self.model, self.inputs, self.parser, self.meta = cfg, model, inputs, parser, meta
        self.views, self.window = inputs.views, inputs.num_frames
        self._own_task = cfg.input_builder_params.default_task_description
        self._env_task = ""
        self.micro_batch = cfg.infer_micro_batch_size
        self._halved = False

    @property
    def task(self) -> str:
        """The task in words: the config's, else what the env says of itself."""
        return self._env_task if self._own_task is None else self._own_task

    @task.setter
    def task(self, task: str) -> None:
        self._env_task = task

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _in_batches(self, answer, frames: dict[str, Tensor], tasks: list[str]) -> Tensor:
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
        """(B, L) float32 on the CPU: the probability of each label, out of all that could be said.

        frames: view -> (B, K, H, W, 3) uint8, time rising; tasks: one per window, else `task` for all. With
        `inference_mode: generate` a row is one-hot, or zeros where the answer was none of the labels.
        """
        count = len(frames[self.views[0]]) if self.views[0] in frames else 0
        tasks = [self.task] * count if tasks is None else tasks
        if any(frames[view].shape[1] != self.window for view in self.views if view in frames):
            met = {view: frames[view].shape[1] for view in self.views if view in frames}
            raise UserError(f"the reward model judges windows of {self.window} frames, got {met}")
        self._check_size(frames)
        if not count:
            return torch.zeros(0, len(self.labels))
        answer = self._label_prob if self.cfg.inference_mode == "label_logits" else self._said
        label_prob = self._in_batches(answer, frames, tasks)
        if not self._warned and self.meta and len(label_prob) >= 32:
            mass = float(label_prob.sum(1).mean())
            if mass < MIN_LABEL_MASS:
                self._warned = True
                warnings.warn(
                    f"the labels have only {mass:.2f} of the probability between them: is the model trained "
                    "for this question?",
                    stacklevel=2,
                )
        return label_prob

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
        count = len(frames[self.views[0]])
        return self._in_batches(self._said, windows, [self.task] * count if tasks is None else tasks)

    def _said(self, frames: dict[str, Tensor], tasks: list[str]) -> Tensor:
        score = torch.tensor([self.parser.parse(text) for text in self._generate(frames, tasks)])
        return torch.where(score.isnan(), self.parser.invalid_score, score).float()


# ----------------------------------------------------------------------------------------------------
# Loading and saving


def load_base(cfg: VLMConfig, device: torch.device) -> tuple[nn.Module, Any]:
    """(model, processor) of the folder `cfg.model_path`. Raises UserError if it is no complete Qwen3-VL."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    if cfg.model_path is None:
        raise UserError("model_path is not set; give the folder of a Qwen3-VL")
    path = Path(cfg.model_path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; model_path must be the folder of a Qwen3-VL")
    family = load_json(path / "config.json").get("model_type")
    if family != "qwen3_vl":
        raise UserError(f"{path} holds a model of the family '{family}', not qwen3_vl")
    disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=torch.bfloat16 if _in_bf16(cfg, device) else torch.float32,
            attn_implementation=_attention(cfg.attn_implementation, device),
            local_files_only=True,
        )
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    # transformers documents no list of what an incomplete folder may raise; its messages run over many lines
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path} is no complete Qwen3-VL folder ({type(error).__name__}: {reason})"
        ) from error
    processor.tokenizer.padding_side = "left"
    use_fast_vision(model)
    return model.to(device), processor


def _in_bf16(cfg: VLMConfig, device: torch.device) -> bool:
    return cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")


def _attention(asked: str, device: torch.device) -> str:
    from transformers.utils import is_flash_attn_2_available

    if asked not in ("auto", "flash_attention_2"):
        return asked
    if device.type == "cuda" and is_flash_attn_2_available():
        return "flash_attention_2"
    if asked == "flash_attention_2":
        warnings.warn("flash_attention_2 is not available here; sdpa takes its place", stacklevel=2)
    return "sdpa"


def load_history_vlm(
    cfg: HistoryVLMRewardConfig, device: torch.device | None = None
) -> HistoryVLMRewardModel:
    """The model of windows, ready to score. Raises UserError where files, prompt or windows do not fit."""
    sizes = {buffer.history_size for buffer in cfg.history_buffers.values()}
    views = next(iter(cfg.history_buffers.values())).history_keys if cfg.history_buffers else []
    asked = {"views": tuple(views), "window": next(iter(sizes), 5)}
    model = _load(HistoryVLMRewardModel, cfg, asked, device)
    if model.meta:
        _check_golden(model, Path(cfg.lora_path or cfg.model_path))
    return model


def load_vlm(cfg: VLMRewardConfig, device: torch.device | None = None) -> VLMRewardModel:
    """The model of single frames, ready to score."""
    return _load(VLMRewardModel, cfg, {"views": tuple(cfg.views), "window": 1}, device)


def _load(kind: type[_Qwen], cfg: VLMConfig, asked: dict[str, Any], device: torch.device | None) -> Any:
    device = device or pick_device(cfg.device)
    meta = _read_meta(cfg)
    if meta:
        _check_meta(meta, cfg, asked)
        asked = {"views": tuple(meta["views"]), "window": meta["window"]}
    params = cfg.input_builder_params
    standard = TEMPLATES.get(cfg.input_builder_name, TREND_TEMPLATE)
    template = meta.get("template") or params.template or standard
    model, processor = load_base(cfg, device)
    if cfg.lora_path is not None:
        if meta and meta["base"] != _hash_of(model):
            raise UserError(f"{cfg.lora_path} was trained on another base model than {cfg.model_path}")
        model = _with_adapter(model, cfg)
    builder = look_up(cfg.input_builder_name, INPUT_BUILDERS, "input_builder_name")
    inputs = QwenInputs(processor, builder, asked["views"], asked["window"], template, cfg.use_chat_template)
    parser = make_parser(cfg.reward_parser_name, cfg.reward_parser_params)
    return kind(cfg, model.eval(), inputs, parser, meta)


def _with_adapter(base: nn.Module, cfg: VLMConfig) -> nn.Module:
    from peft import PeftModel

    path = Path(cfg.lora_path)
    if not (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is no adapter (adapter_config.json is missing); give train_vlm.py's checkpoint"
        )
    try:
        return PeftModel.from_pretrained(base, path, local_files_only=True)
    except (RuntimeError, ValueError, OSError) as error:  # shapes or modules of another model
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} does not fit {cfg.model_path}: {reason}") from error


def _read_meta(cfg: VLMConfig) -> dict[str, Any]:
    """reward.json of what was trained; {} for weights that train_vlm.py did not write."""
    folder = Path(cfg.lora_path or cfg.model_path or "")
    return load_json(folder / "reward.json") if (folder / "reward.json").is_file() else {}


def _check_meta(meta: dict[str, Any], cfg: VLMConfig, asked: dict[str, Any]) -> None:
    """UserError where the config asks another question than the model was trained on."""
    where = cfg.lora_path or cfg.model_path
    params = cfg.input_builder_params
    differences = [
        (name, ours, meta.get(name))
        for name, ours in (
            ("prompt_version", PROMPT_VERSION),
            ("input_builder_name", cfg.input_builder_name),
            ("template", params.template),
            ("window", asked["window"]),
            ("views", list(asked["views"])),
            ("use_chat_template", cfg.use_chat_template),
        )
        if ours is not None and ours != meta.get(name)
    ]
    if differences:
        told = "; ".join(f"{name}: trained with {theirs}, here {ours}" for name, ours, theirs in differences)
        raise UserError(f"{where} was trained for another question: {told}")


def _hash_of(model: nn.Module) -> str:
    """16 hex digits that tell one architecture and vocabulary from another."""
    config = model.config.to_dict()
    sizes = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "depth", "num_heads", "patch_size", "out_hidden_size",
    )  # fmt: skip
    parts = ("text_config", "vision_config")
    shape = {part: {size: config[part].get(size) for size in sizes} for part in parts}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def save_vlm(
    folder: str | Path,
    model: nn.Module,
    processor: Any,
    inputs: QwenInputs,
    meta: dict[str, Any],
    golden_windows: dict[str, Tensor],
    cfg: VLMConfig | None = None,
) -> None:
    """Write the checkpoint folder (format above), replacing an older one of that name in one step.

    `meta` is what only the trainer knows; golden_windows: view -> (n, K, H, W, 3) uint8, n small, of the task
    `meta["golden_task"]`.
    """
    from peft import PeftModel

    cfg = cfg or HistoryVLMRewardConfig()
    parser = make_parser(cfg.reward_parser_name, cfg.reward_parser_params)
    scorer = HistoryVLMRewardModel(replace(cfg, inference_mode="label_logits"), model, inputs, parser, {})
    scorer.task = meta.get("golden_task", "")
    golden = {f"frames.{view}": golden_windows[view].contiguous() for view in inputs.views}
    golden["label_prob"] = scorer.score(golden_windows)
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if not isinstance(model, PeftModel):
            processor.save_pretrained(temporary)
        written = {
            "model_type": "history_vlm",
            "prompt_version": PROMPT_VERSION,
            "template": inputs.template,
            "input_builder_name": cfg.input_builder_name,
            "use_chat_template": inputs.use_chat_template,
            "views": list(inputs.views),
            "window": inputs.num_frames,
            "labels": list(scorer.labels),
            "parser": asdict(parser),
            "base": _hash_of(model),
            **meta,
        }
        save_json(written, temporary / "reward.json")
        save_file(golden, temporary / "golden.safetensors")


def _check_golden(model: HistoryVLMRewardModel, path: Path) -> None:
    if not (path / "golden.safetensors").is_file():
        raise UserError(f"{path} lacks golden.safetensors; is it a checkpoint of train_vlm.py?")
    golden = load_file(path / "golden.safetensors")
    frames = {view: golden[f"frames.{view}"] for view in model.views}
    cfg, model.cfg = model.cfg, replace(model.cfg, inference_mode="label_logits")
    label_prob = model.score(frames, [model.meta.get("golden_task", "")] * len(golden["label_prob"]))
    model.cfg = cfg
    error = float((label_prob - golden["label_prob"]).abs().max())
    allowed = GOLDEN_TOLERANCE["bf16" if _in_bf16(cfg, model.device) else "fp32"]
    if not error <= allowed:  # also where it is nan
        raise UserError(
            f"{path} scores its golden windows {error:.3f} off what was written beside them (at most "
            f"{allowed} allowed): weights, base model or preprocessing have changed; train it again"
        )

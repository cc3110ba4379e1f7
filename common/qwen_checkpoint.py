"""Folders of a Qwen3-VL: the base model, and what train_vlm.py makes of it.

A **checkpoint** appears whole or not at all:
- a PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`), to be named by `lora_path` beside the
  base model's `model_path`; or a whole model with its processor, to be named by `model_path`.
- `reward.json`: `template` of the prompt, `prompt_version`, `input_builder_name`, `use_chat_template`,
  `views`, `window`, `frame_size` (height, width of each view), `labels`, `base` (a hash of the base model's
  shape), `precision` of the scores below, and what the trainer knows: `tasks` (their texts), cameras, labels'
  threshold, metrics.
- `golden.safetensors`: `frames.{view}`, a few windows of the task `golden_task`, and `label_prob` (n, L),
  their scores when they were saved. They are scored again at every load.

Weights are read from safetensors files alone, and no code from a folder is run.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.fast_vision import use_fast_vision
from common.files import load_json, save_json, whole_folder
from common.prompts import INPUT_BUILDERS, TEMPLATES, TREND_TEMPLATE, look_up, make_parser
from common.qwen_inputs import QwenInputs
from common.qwen_reward import (
    HistoryVLMRewardConfig,
    HistoryVLMRewardModel,
    VLMConfig,
    VLMRewardConfig,
    VLMRewardModel,
)
from common.runtime import UserError, pick_device

GOLDEN_TOLERANCE = {"fp32": 0.02, "bf16": 0.1}  # of a label's probability
PROMPT_VERSION = 1  # of how `common.qwen_inputs` writes a prompt down; another one is another question
FROM_FOLDER = {"local_files_only": True, "trust_remote_code": False}  # no downloads, no code of others

# ----------------------------------------------------------------------------------------------------
# Loading


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
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    disable_progress_bar()
    try:
        model, told = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            attn_implementation=_attention(cfg.attn_implementation, device, bf16),
            use_safetensors=True,
            output_loading_info=True,
            **FROM_FOLDER,
        )
        processor = AutoProcessor.from_pretrained(path, **FROM_FOLDER)
    # transformers documents no list of what an incomplete folder may raise; its messages run over many lines
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path} is no complete Qwen3-VL folder ({type(error).__name__}: {reason})"
        ) from error
    if lacking := sorted(told["missing_keys"]):  # transformers would fill them with noise
        raise UserError(f"{path} lacks {len(lacking)} of the model's weights, such as {lacking[0]}")
    processor.tokenizer.padding_side = "left"
    use_fast_vision(model)
    return model.to(device), processor


def _attention(asked: str, device: torch.device, bf16: bool) -> str:
    """`bf16`: the weights are. Flash attention takes no fp32, and without autocast fp32 weights make it."""
    from transformers.utils import is_flash_attn_2_available

    if asked not in ("auto", "flash_attention_2"):
        return asked
    if bf16 and device.type == "cuda" and is_flash_attn_2_available():
        return "flash_attention_2"
    if asked == "flash_attention_2":
        warnings.warn(
            "flash_attention_2 is not available here (it needs a GPU and bf16 weights); sdpa takes its place",
            stacklevel=2,
        )
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


def _load(
    kind: type[HistoryVLMRewardModel] | type[VLMRewardModel],
    cfg: VLMConfig,
    asked: dict[str, Any],
    device: torch.device | None,
) -> Any:
    device = device or pick_device(cfg.device)
    builder = look_up(cfg.input_builder_name, INPUT_BUILDERS, "input_builder_name")
    parser = make_parser(cfg.reward_parser_name, cfg.reward_parser_params)
    meta = read_meta(cfg)
    if meta:
        check_meta(meta, cfg, asked, parser)
        asked = {"views": tuple(meta["views"]), "window": meta["window"]}
    params = cfg.input_builder_params
    standard = TEMPLATES.get(cfg.input_builder_name, TREND_TEMPLATE)
    template = meta.get("template") or params.template or standard
    if cfg.lora_path is not None:
        _check_adapter(Path(cfg.lora_path))
    model, processor = load_base(cfg, device)  # which takes long
    if cfg.lora_path is not None:
        if meta and meta["base"] != _hash_of(model):
            raise UserError(f"{cfg.lora_path} was trained on another base model than {cfg.model_path}")
        model = _with_adapter(model, cfg)
    inputs = QwenInputs(processor, builder, asked["views"], asked["window"], template, cfg.use_chat_template)
    return kind(cfg, model.eval(), inputs, parser, meta)


def _check_adapter(path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():  # PEFT would look for it on the network
            raise UserError(f"{path} is no adapter ({name} is missing); give train_vlm.py's checkpoint")


def _with_adapter(base: nn.Module, cfg: VLMConfig) -> nn.Module:
    from peft import PeftModel

    path = Path(cfg.lora_path)
    try:
        with renamed_calls_unsaid():
            return PeftModel.from_pretrained(base, path, local_files_only=True)
    # shapes or modules of another model, torn files
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} does not fit {cfg.model_path}: {reason}") from error


@contextlib.contextmanager
def renamed_calls_unsaid() -> Iterator[None]:
    """PEFT still calls what transformers has renamed since, and a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def read_meta(cfg: VLMConfig) -> dict[str, Any]:
    """reward.json of what was trained; {} for weights that train_vlm.py did not write."""
    folder = cfg.lora_path or cfg.model_path
    if folder is None or not (Path(folder) / "reward.json").is_file():
        return {}
    return load_json(Path(folder) / "reward.json")


def check_meta(meta: dict[str, Any], cfg: VLMConfig, asked: dict[str, Any], parser: Any) -> None:
    """UserError where the config asks another question than the model was trained on, or knows other answers.

    asked: `views` and `window`.
    """
    where = cfg.lora_path or cfg.model_path
    if meta.get("model_type") != "history_vlm":
        raise UserError(f"{where} holds a reward model of the type {meta.get('model_type')}, not history_vlm")
    params = cfg.input_builder_params
    differences = [
        (name, ours, meta.get(name))
        for name, ours in (
            ("prompt_version", PROMPT_VERSION),
            ("template", params.template),
            ("window", asked["window"]),
            ("views", list(asked["views"])),
            ("use_chat_template", cfg.use_chat_template),
        )
        if ours is not None and ours != meta.get(name)
    ]
    ours, theirs = cfg.input_builder_name, meta.get("input_builder_name")
    if INPUT_BUILDERS.get(ours, ours) != INPUT_BUILDERS.get(theirs, theirs):  # one has two names
        differences.append(("input_builder_name", ours, theirs))
    if differences:
        told = "; ".join(f"{name}: trained with {theirs}, here {ours}" for name, ours, theirs in differences)
        raise UserError(f"{where} was trained for another question: {told}")
    if (labels := list(parser.labels)) != meta["labels"]:
        raise UserError(
            f"{where} was trained to answer {', '.join(meta['labels'])}; {cfg.reward_parser_name} knows "
            f"{', '.join(labels)}"
        )


def _precision_of(model: nn.Module) -> str:
    """What it computes in, here and now."""
    weight = next(model.parameters())
    bf16 = weight.dtype == torch.bfloat16 or torch.is_autocast_enabled(weight.device.type)
    return "bf16" if bf16 else "fp32"


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


def _check_golden(model: HistoryVLMRewardModel, path: Path) -> None:
    if not (path / "golden.safetensors").is_file():
        raise UserError(f"{path} lacks golden.safetensors; is it a checkpoint of train_vlm.py?")
    try:
        golden = load_file(path / "golden.safetensors")
    except SafetensorError as error:
        raise UserError(f"{path / 'golden.safetensors'} cannot be read: {error}") from error
    frames = {view: golden[f"frames.{view}"] for view in model.views}
    tasks = [model.meta["golden_task"]] * len(golden["label_prob"])
    error = float((model.label_prob(frames, tasks) - golden["label_prob"]).abs().max())
    either = {_precision_of(model.model), model.meta.get("precision")}
    allowed = GOLDEN_TOLERANCE["bf16" if "bf16" in either else "fp32"]
    if not error <= allowed:  # also where it is nan
        raise UserError(
            f"{path} scores its golden windows {error:.3f} off what was written beside them (at most "
            f"{allowed} allowed): weights, base model or preprocessing have changed; train it again"
        )


# ----------------------------------------------------------------------------------------------------
# Saving


def save_vlm(
    folder: str | Path, scorer: HistoryVLMRewardModel, meta: dict[str, Any], golden_windows: dict[str, Tensor]
) -> None:
    """Write the checkpoint folder (format above), replacing an older one of that name in one step.

    `scorer`: around the model that was trained. `meta` is what only the trainer knows; golden_windows:
    view -> (n, K, H, W, 3) uint8, n small, of the task `meta["golden_task"]`.
    """
    from peft import PeftModel

    inputs = scorer.inputs
    golden = {f"frames.{view}": golden_windows[view].contiguous() for view in inputs.views}
    num_golden = len(golden_windows[inputs.views[0]])
    golden["label_prob"] = scorer.label_prob(golden_windows, [meta["golden_task"]] * num_golden)
    with whole_folder(folder) as temporary:
        scorer.model.save_pretrained(temporary)
        if not isinstance(scorer.model, PeftModel):
            inputs.processor.save_pretrained(temporary)
        written = {
            "model_type": "history_vlm",
            "prompt_version": PROMPT_VERSION,
            "template": inputs.template,
            "input_builder_name": scorer.cfg.input_builder_name,
            "use_chat_template": inputs.use_chat_template,
            "views": list(inputs.views),
            "window": inputs.num_frames,
            "labels": list(scorer.labels),
            "base": _hash_of(scorer.model),
            "precision": _precision_of(scorer.model),
            **meta,
        }
        save_json(written, temporary / "reward.json")
        save_file(golden, temporary / "golden.safetensors")

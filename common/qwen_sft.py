"""Teaching a Qwen3-VL to answer: which weights learn, and what a wrong answer costs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import load_json
from common.history import HistoryBufferConfig
from common.prompts import INPUT_BUILDERS, InputBuilderParams, look_up, make_parser
from common.qwen_checkpoint import load_base, load_history_vlm, renamed_calls_unsaid
from common.qwen_inputs import NO_LABEL, QwenInputs
from common.qwen_reward import HistoryVLMRewardConfig, HistoryVLMRewardModel
from common.windows import WindowSet

# The language model's linears alone. Not lm_head: it shares its weights with the embedding, and an adapter on
# it gives other numbers once it is merged.
LANGUAGE_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class ModelConfig:
    model_type: Literal["qwen3_vl"] = "qwen3_vl"
    model_path: str | None = None  # folder of a Qwen3-VL, or of one that this script trained whole
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU; learning weights stay fp32
    input_builder_name: str = "qwentrend_input_builder"  # or file.py:name of your own, in RL the same
    device: str = "auto"
    is_lora: bool = True  # false: all weights learn
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_vision: bool = False  # adapters in the vision tower too
    gradient_checkpointing: bool = False  # a third more time, far less memory
    infer_micro_batch_size: int = 64  # windows scored at once in validation

    def __post_init__(self):
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}")


class Pupil:
    """The model that learns, how questions reach it, and the online scorer around it."""

    def __init__(self, section: ModelConfig, windows: WindowSet, device: torch.device):
        """Raises UserError where `section` names no input builder or no complete Qwen3-VL."""
        # Weights that learn are fp32: a step of AdamW is often too small for bf16 to show. Base weights below
        # an adapter stay as they are, so that they may be bf16.
        self.computes_in_bf16 = section.precision == "bf16" or (
            section.precision == "auto" and device.type == "cuda"
        )
        reads_bf16 = self.computes_in_bf16 and section.is_lora
        scorer_cfg = scorer_config(section, windows, "bf16" if reads_bf16 else "fp32")
        builder = look_up(scorer_cfg.input_builder_name, INPUT_BUILDERS, "input_builder_name")
        self.model, processor = load_base(scorer_cfg, device)
        if section.is_lora:
            rank, alpha, dropout = section.lora_rank, section.lora_alpha, section.lora_dropout
            self.model = add_lora(self.model, rank, alpha, dropout, section.lora_vision)
        else:
            self.model.requires_grad_(True)
        if section.gradient_checkpointing:
            with renamed_calls_unsaid():
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.inputs = QwenInputs(processor, builder, windows.views, windows.window_size, windows.template)
        parser = make_parser(scorer_cfg.reward_parser_name, scorer_cfg.reward_parser_params)
        self.scorer = HistoryVLMRewardModel(scorer_cfg, self.model, self.inputs, parser, {})
        self.device = device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.computes_in_bf16)


def scorer_config(section: ModelConfig, windows: WindowSet, precision: str) -> HistoryVLMRewardConfig:
    """`reward.model` of the RL run that will use what is trained here."""
    buffer = HistoryBufferConfig(history_size=windows.window_size, history_keys=list(windows.views))
    return HistoryVLMRewardConfig(
        model_path=section.model_path,
        precision=precision,
        attn_implementation=section.attn_implementation,
        input_builder_name=section.input_builder_name,
        infer_micro_batch_size=section.infer_micro_batch_size,
        input_builder_params=InputBuilderParams(template=windows.template),
        history_buffers={"history_window": buffer},
    )


def load_scorer(
    section: ModelConfig, checkpoint: str, windows: WindowSet, device: torch.device
) -> HistoryVLMRewardModel:
    """The model of a checkpoint folder, as an RL run loads it, to be asked what the windows ask.

    An adapter's base model is `section.model_path`, or the one that the adapter was trained on.
    """
    reward = scorer_config(section, windows, section.precision)
    adapter = Path(checkpoint) / "adapter_config.json"
    if adapter.is_file():
        reward.lora_path = checkpoint
        reward.model_path = section.model_path or load_json(adapter)["base_model_name_or_path"]
    else:
        reward.model_path = checkpoint
    return load_history_vlm(reward, device)


def add_lora(model: nn.Module, rank: int, alpha: int, dropout: float, vision: bool) -> nn.Module:
    """The model with a fresh adapter, which alone learns; its weights are fp32 whatever the model's are.

    `vision`: on the linears of the vision tower and its mergers too.
    """
    from peft import LoraConfig, get_peft_model

    target = "all-linear" if vision else LANGUAGE_LINEARS  # PEFT leaves lm_head out of all-linear
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target, task_type="CAUSAL_LM"
    )
    with renamed_calls_unsaid():
        return get_peft_model(model, lora)


def answer_loss(learner: nn.Module, inputs: dict[str, Any], labels: Tensor, tail_weight: float) -> Tensor:
    """Cross-entropy in nats of the answers, averaged over samples (0-d).

    labels (B, S): the answer's tokens, at the end of the padded text, NO_LABEL before. Within a sample the
    first token of the answer, which tells the labels apart, has weight 1 and each later one `tail_weight`;
    the mean over tokens that transformers takes would weigh a label by how many tokens it is spelt with.
    """
    length = int((labels != NO_LABEL).sum(1).max())
    target = labels[:, -length:]  # (B, length)
    # The token at place t is predicted at t - 1. Logits elsewhere would be 600 kB per token at the real size.
    logits = learner(**inputs, logits_to_keep=length + 1, use_cache=False).logits[:, :-1].float()
    cross_entropy = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=NO_LABEL, reduction="none")
    return weighted_mean(cross_entropy, target != NO_LABEL, tail_weight)


def weighted_mean(cross_entropy: Tensor, is_answer: Tensor, tail_weight: float) -> Tensor:
    """0-d: mean over samples of the mean over answer tokens; both (B, length). See `answer_loss`."""
    is_first = is_answer & (is_answer.cumsum(1) == 1)
    weight = torch.where(is_first, 1.0, tail_weight) * is_answer
    return ((cross_entropy * weight).sum(1) / weight.sum(1)).mean()

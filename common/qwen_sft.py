"""Teaching a Qwen3-VL to answer: which weights learn, and what a wrong answer costs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_LABEL = -100  # in `labels`: not a token of the answer
# The language model's linears alone. Not lm_head: it shares its weights with the embedding, and an adapter on
# it gives other numbers once it is merged.
LANGUAGE_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def add_lora(model: nn.Module, rank: int, alpha: int, dropout: float, vision: bool) -> nn.Module:
    """The model with a fresh adapter, which alone learns; its weights are fp32 whatever the model's are.

    `vision`: on the linears of the vision tower and its mergers too.
    """
    from peft import LoraConfig, get_peft_model

    target = "all-linear" if vision else LANGUAGE_LINEARS  # PEFT leaves lm_head out of all-linear
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target, task_type="CAUSAL_LM"
    )
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

"""A tiny Qwen3-VL with random weights, made offline in a second, in a folder laid out like a released one.

    python benchmarks/tiny_qwen.py FOLDER [--seed 0]

For tests, demos and machines without the weights: everything that loads, trains and scores a Qwen3-VL runs on
it unchanged. It knows nothing until it is trained, and all of it must learn (`is_lora: false`). The tokenizer
is a byte-level BPE fitted to this project's own prompts, so they cost few tokens; any text survives it.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.files import save_json, whole_folder  # noqa: E402  the checkout is not installed
from common.prompts import SCORE_TEMPLATE, TREND_TEMPLATE  # noqa: E402
from common.runtime import UserError, run_script  # noqa: E402
from common.scenes import TASK_DESCRIPTIONS  # noqa: E402
from common.trend import LABELS  # noqa: E402

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
NUM_TOKENS = 640  # 256 bytes, the words of our prompts, the special ones
# The released template's shape for one turn: role lines, and each picture or video between its two marks.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_qwen(folder: str | Path, seed: int = 0, hidden: int = 64, layers: int = 2) -> Path:
    """Write the folder, whole or not at all, and return it. The same seed gives the same bytes.

    hidden: width of text and vision, a multiple of 32; layers: of each. UserError if the folder exists.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists; remove it or name another")
    tokenizer = _tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen3VLConfig(
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden // 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [hidden // 4 - 2 * (hidden // 12), hidden // 12, hidden // 12],
                "mrope_interleaved": True,
            },
            "initializer_range": 0.1,  # 0.02, the default, never leaves chance at this width
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": layers,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
            "initializer_range": 0.1,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    with whole_folder(folder) as temporary:
        disable_progress_bar()
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        pixels = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
        pixels |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        save_json(
            {
                **pixels,
                "size": {"longest_edge": 16777216, "shortest_edge": 65536},
                "processor_class": "Qwen3VLProcessor",
                "image_processor_type": "Qwen2VLImageProcessorFast",
            },
            temporary / "preprocessor_config.json",
        )
        save_json(
            {
                **pixels,
                "size": {"longest_edge": 25165824, "shortest_edge": 4096},
                "processor_class": "Qwen3VLProcessor",
                "video_processor_type": "Qwen3VLVideoProcessor",
            },
            temporary / "video_preprocessor_config.json",
        )
        save_json({"chat_template": CHAT_TEMPLATE}, temporary / "chat_template.json")
    return folder


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    texts = [TREND_TEMPLATE, SCORE_TEMPLATE, *TASK_DESCRIPTIONS.values(), "system\nuser\nassistant\n"]
    texts += [f"<{tenth / 10:.1f} seconds>" for tenth in range(20)]
    texts += [label for label in LABELS for _ in range(50)]  # whole words, each of one token
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=262144,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_tiny_qwen(args.folder, args.seed)
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    print(f"{args.folder}: a random Qwen3-VL of {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)

"""What a Qwen3-VL is given: all frames, the processor's own pixels, one prompt for training and scoring."""

import pytest
import torch
from torch import Tensor

from benchmarks.tiny_qwen import make_tiny_qwen
from common.files import load_json, save_json
from common.prompts import (
    TREND_TEMPLATE,
    Part,
    base_vlm_input_builder,
    fill,
    qwentrend_input_builder,
)
from common.qwen_inputs import NO_LABEL, QwenInputs
from common.runtime import UserError
from common.trend import LABELS

VIEWS = ("main_images", "extra_view_images")
TASK = "Push the cube."


@pytest.fixture(scope="module")
def processor(tiny_qwen):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_qwen)


def make_inputs(processor, builder=qwentrend_input_builder, num_frames=5, template=TREND_TEMPLATE, **kwargs):
    return QwenInputs(processor, builder, VIEWS, num_frames, template, **kwargs)


def noise(batch: int, size: tuple[int, int] = (64, 64), num_frames: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, num_frames, *size, 3)
    return {view: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for view in VIEWS}


def count(inputs: dict[str, Tensor], token: int) -> int:
    return int((inputs["input_ids"] == token).sum())


# --- Frames


@pytest.mark.parametrize(
    ("num_frames", "size", "vision_tokens"),
    [(5, (128, 128), 96), (5, (224, 224), 294), (5, (256, 256), 384), (5, (64, 64), 24), (3, (64, 96), 24)],
)
def test_every_frame_is_shown(processor, num_frames, size, vision_tokens):
    """(K + 1) // 2 temporal patches per view, a token for 32 x 32 pixels of each."""
    inputs = make_inputs(processor, num_frames=num_frames).questions(noise(1, size, num_frames), [TASK])
    assert count(inputs, processor.video_token_id) == vision_tokens
    grid = [(num_frames + 1) // 2, size[0] // 16, size[1] // 16]
    assert inputs["video_grid_thw"].tolist() == [grid, grid]
    assert inputs["pixel_values_videos"].shape == (4 * vision_tokens, 3 * 2 * 16 * 16)
    assert int((inputs["mm_token_type_ids"] == 2).sum()) == vision_tokens


def test_each_frame_changes_the_pixels(processor):
    """A processor that is told the env's frame rate drops the middle one of five."""
    build, frames = make_inputs(processor), noise(1)
    before = build.questions(frames, [TASK])["pixel_values_videos"]
    for index in range(5):
        changed = {view: images.clone() for view, images in frames.items()}
        changed["main_images"][:, index] = 0
        after = build.questions(changed, [TASK])["pixel_values_videos"]
        rows = (after != before).any(1).nonzero().squeeze(1)
        assert rows.tolist() == list(range(16 * (index // 2), 16 * (index // 2 + 1)))  # patches of its pair


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_own_patches_are_the_processors(processor, size, monkeypatch):
    build, frames = make_inputs(processor), noise(3, size)
    theirs = build._processed(frames, [TASK] * 3)
    monkeypatch.setattr(build, "_processed", lambda frames, tasks: pytest.fail("the slow way was taken"))
    ours = build._patches(frames)
    assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])
    assert torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"])


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (16, 16)])
def test_frames_of_any_size(processor, size):
    """Sides that are no multiple of 32 are resized, by the processor: only the first question is asked of it
    where they need not be."""
    build, frames = make_inputs(processor), noise(2, size)
    theirs = build._processed(frames, [TASK] * 2)
    for _ in range(2):  # the second time by what the first found out
        ours = build.questions(frames, [TASK] * 2)
        for name in (
            "input_ids",
            "attention_mask",
            "mm_token_type_ids",
            "pixel_values_videos",
            "video_grid_thw",
        ):
            assert torch.equal(ours[name].long() if "pixel" not in name else ours[name], theirs[name]), name


def test_views_of_two_sizes(processor):
    frames = {**noise(2, (64, 64)), "extra_view_images": noise(2, (32, 96))["main_images"]}
    build = make_inputs(processor)
    ours, theirs = build.questions(frames, [TASK] * 2), build._processed(frames, [TASK] * 2)
    assert ours["video_grid_thw"].tolist() == [[3, 4, 4], [3, 2, 6]] * 2
    assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])


def test_other_pixel_settings_of_a_checkpoint_are_followed(tmp_path):
    """Means that differ per channel, as CLIP's do."""
    from transformers import AutoProcessor

    folder = make_tiny_qwen(tmp_path / "tiny")
    settings = load_json(folder / "video_preprocessor_config.json")
    settings |= {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.25, 0.27]}
    save_json(settings, folder / "video_preprocessor_config.json")
    build = make_inputs(AutoProcessor.from_pretrained(folder))
    ours, theirs = build.questions(noise(2), [TASK] * 2), build._processed(noise(2), [TASK] * 2)
    assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])


def test_images_show_the_last_frame(processor):
    build = make_inputs(processor, base_vlm_input_builder)
    frames = noise(2)
    inputs = build.questions(frames, [TASK] * 2)
    assert "pixel_values_videos" not in inputs
    assert inputs["image_grid_thw"].tolist() == [[1, 16, 16]] * 4  # 256 x 256 is the smallest image there is
    assert count(inputs, processor.image_token_id) == 4 * 64
    alike = {view: images[:, -1:] for view, images in frames.items()}
    again = make_inputs(processor, base_vlm_input_builder).questions(alike, [TASK] * 2)
    assert torch.equal(again["pixel_values"], inputs["pixel_values"])


def test_images_and_videos_in_one_question(processor):
    def both(task, views, num_frames, template):
        return [
            Part("image", views[0]),
            Part("video", views[1]),
            Part("text", fill(template, task, num_frames)),
        ]

    inputs = make_inputs(processor, both).questions(noise(2), [TASK] * 2)
    assert inputs["image_grid_thw"].tolist() == [[1, 16, 16]] * 2
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 4]] * 2
    assert count(inputs, processor.image_token_id) == 2 * 64
    assert count(inputs, processor.video_token_id) == 2 * 12


# --- Text


def test_the_text_and_its_marks(processor):
    build = make_inputs(processor, template="{task}?")
    question = build.questions(noise(1), [TASK])["input_ids"][0]
    text = processor.tokenizer.decode(question)
    frame = "<|vision_start|>" + 4 * "<|video_pad|>" + "<|vision_end|>"
    video = f"<0.2 seconds>{frame}<1.2 seconds>{frame}<2.0 seconds>{frame}"
    assert text == f"<|im_start|>user\n{video}{video}{TASK}?<|im_end|>\n<|im_start|>assistant\n"
    bare = make_inputs(processor, template="{task}?", use_chat_template=False).questions(noise(1), [TASK])
    assert processor.tokenizer.decode(bare["input_ids"][0]) == f"{video}{video}{TASK}?"


def test_training_and_scoring_ask_the_same(processor):
    tasks = [TASK, "A much longer task, in more words than the first one has.", TASK]
    build, frames = make_inputs(processor), noise(3)
    questions = build.questions(frames, tasks)
    lessons, labels = build.lessons(frames, tasks, ["positive", "unclear", "negative"])
    assert torch.equal(questions["pixel_values_videos"], lessons["pixel_values_videos"])
    for row, answer in enumerate(("positive", "unclear", "negative")):
        asked = questions["input_ids"][row][questions["attention_mask"][row].bool()]
        taught = lessons["input_ids"][row][lessons["attention_mask"][row].bool()]
        tail = torch.tensor(
            [*build.answer_ids(answer), processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]
        )
        assert torch.equal(taught, torch.cat([asked, tail]))
        learned = labels[row][labels[row] != NO_LABEL]
        assert torch.equal(learned, tail) and torch.equal(labels[row, -len(tail) :], tail)


def test_texts_are_padded_on_the_left(processor):
    build = make_inputs(processor)
    inputs = build.questions(noise(2), [TASK, TASK + " And then some."])
    assert inputs["attention_mask"][1].all()
    num_pad = int((inputs["attention_mask"][0] == 0).sum())
    assert num_pad > 0 and not inputs["attention_mask"][0, :num_pad].any()
    assert set(inputs["input_ids"][0, :num_pad].tolist()) == {processor.tokenizer.pad_token_id}
    alone = build.questions(noise(1), [TASK])["input_ids"][0]
    assert torch.equal(inputs["input_ids"][0, num_pad:], alone)


def test_the_tiny_tokenizer_tells_the_labels_apart_and_keeps_any_text(processor):
    tokenizer = processor.tokenizer
    assert len({tokenizer.encode(label)[0] for label in LABELS}) == 3
    for text in ("Grüße, 世界 🤖\n\t{}", fill(TREND_TEMPLATE, TASK, 5)):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(fill(TREND_TEMPLATE, TASK, 5))) < 90


# --- What is refused


def test_unfit_frames(processor):
    build, frames = make_inputs(processor), noise(2)
    with pytest.raises(UserError, match="looks at extra_view_images, which is not among the frames"):
        build.questions({"main_images": frames["main_images"]}, [TASK] * 2)
    for unfit in (
        frames["main_images"].float() / 255,
        frames["main_images"][..., :1],
        frames["main_images"][0],
    ):
        with pytest.raises(UserError, match="main_images must be uint8 RGB"):
            build.questions({**frames, "main_images": unfit}, [TASK] * 2)

"""Qwen3-VL as a reward model: scores against transformers' own forward, checkpoints, and what is refused."""

import pickle
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.tiny_qwen import make_tiny_qwen
from common import qwen_checkpoint
from common.files import load_json, save_json
from common.history import HistoryBufferConfig
from common.prompts import (
    BaseVLMRewardParser,
    InputBuilderParams,
    QwenTrendRewardParser,
    base_vlm_input_builder,
    qwentrend_input_builder,
)
from common.qwen_checkpoint import _attention, load_history_vlm, load_vlm, save_vlm
from common.qwen_inputs import VIDEO_FPS, QwenInputs
from common.qwen_reward import (
    HistoryVLMRewardConfig,
    HistoryVLMRewardModel,
    VLMConfig,
    VLMRewardConfig,
    VLMRewardModel,
)
from common.qwen_sft import add_lora, answer_loss
from common.runtime import UserError
from common.trend import LABELS

VIEWS = ("main_images", "extra_view_images")
TASK = "push the cube"
CPU = torch.device("cpu")
NUM = 12  # windows
LABEL = torch.arange(NUM) % 3  # what they show, by their shade
META = {"frame_size": {view: [32, 32] for view in VIEWS}, "golden_task": TASK, "step": 7}


def windows() -> dict[str, Tensor]:
    """NUM windows (5, 32, 32, 3), a shade of grey for each label, with noise."""
    generator = torch.Generator().manual_seed(0)
    shade = torch.tensor([30, 120, 210])[LABEL][:, None, None, None, None]
    shape = (NUM, 5, 32, 32, 3)
    return {view: (shade + torch.randint(-20, 20, shape, generator=generator)).byte() for view in VIEWS}


def make_cfg(base: Path | str | None, lora: Path | None = None, window: int = 5, **more):
    buffer = HistoryBufferConfig(history_size=window, history_keys=list(more.pop("views", VIEWS)))
    template = more.pop("template", "{task}?")
    return HistoryVLMRewardConfig(
        model_path=None if base is None else str(base),
        lora_path=None if lora is None else str(lora),
        precision=more.pop("precision", "fp32"),
        input_builder_params=InputBuilderParams(template=template),
        history_buffers={"history_window": buffer},
        **more,
    )


def load(base: Path | None, lora: Path | None = None, **more) -> HistoryVLMRewardModel:
    return load_history_vlm(make_cfg(base, lora, **more), CPU)


@pytest.fixture(scope="module")
def trained(tiny_qwen) -> HistoryVLMRewardModel:
    """All weights fitted to `windows` for two seconds: says their labels."""
    model = load(tiny_qwen)
    model.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=2e-3)
    frames, answers = windows(), [LABELS[label] for label in LABEL]
    for _ in range(25):
        lessons, labels = model.inputs.lessons(frames, [TASK] * NUM, answers)
        answer_loss(model.model, lessons, labels, tail_weight=1.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.task = TASK
    return model


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> Path:
    """Its checkpoint. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    save_vlm(folder, trained, META, {view: frames[:4] for view, frames in windows().items()})
    return folder


@pytest.fixture(scope="module")
def adapted(whole) -> HistoryVLMRewardModel:
    """The trained model with an adapter that changes its mind."""
    model = load(whole)
    model.model = add_lora(model.model, rank=4, alpha=8, dropout=0.0, vision=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    model.model.eval()
    return model


@pytest.fixture(scope="module")
def adapter(adapted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "checkpoint"
    save_vlm(folder, adapted, META, {view: frames[:4] for view, frames in windows().items()})
    return folder


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def edit_json(path: Path, **changes) -> None:
    save_json({**load_json(path), **changes}, path)


class Double(nn.Module):
    """In place of the network: the same logits for all, or `texts` in turn; fails above `limit` samples."""

    def __init__(
        self, tokenizer, logits: Tensor | None = None, texts: tuple[str, ...] = (), limit: int = 999
    ):
        super().__init__()
        self.tokenizer, self.texts, self.limit = tokenizer, list(texts), limit
        self.logits = nn.Parameter(torch.zeros(len(tokenizer)) if logits is None else logits)
        self.batches: list[int] = []

    def forward(self, input_ids, **_):
        self.batches.append(len(input_ids))
        if len(input_ids) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), 1, -1))

    def generate(self, input_ids, **settings):
        self.settings = settings
        answers = [
            [*self.tokenizer.encode(self.texts.pop(0)), self.tokenizer.eos_token_id] for _ in input_ids
        ]
        length = max(map(len, answers))
        padded = [ids + [self.tokenizer.pad_token_id] * (length - len(ids)) for ids in answers]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def doubled(trained: HistoryVLMRewardModel, meta: dict | None = None, **more) -> HistoryVLMRewardModel:
    """The windows' model around a `Double`; keywords: VLMConfig's, the rest the double's."""
    double = Double(
        trained.inputs.tokenizer, more.pop("logits", None), more.pop("texts", ()), more.pop("limit", 999)
    )
    return HistoryVLMRewardModel(
        VLMConfig(**more), double, trained.inputs, QwenTrendRewardParser(), meta or {}
    )


# --- Scores


def plain_label_prob(folder: Path, kind: str, frames: dict[str, Tensor], tasks: list[str]) -> Tensor:
    """By a model that transformers alone loads and asks, a window at a time, all logits worked out."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    metadata = {"fps": VIDEO_FPS, "frames_indices": list(range(5)), "total_num_frames": 5}
    rows = []
    for row, task in enumerate(tasks):
        content = [{"type": kind}, {"type": kind}, {"type": "text", "text": f"{task}?"}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
        shown = [frames[view][row].numpy() for view in VIEWS]
        if kind == "video":
            pictures = {"videos": shown, "video_metadata": [metadata] * 2, "do_sample_frames": False}
        else:
            pictures = {"images": [video[-1] for video in shown]}
        inputs = processor(text=[text], **pictures, return_tensors="pt")
        with torch.no_grad():
            prob = plain(**inputs).logits[0, -1].softmax(0)
        rows.append(prob[[processor.tokenizer.encode(label)[0] for label in LABELS]])
    return torch.stack(rows)


TASKS = [TASK, "pick up the cube and put it on the plate", TASK, ""]  # of several lengths


def test_label_prob_is_that_of_a_plain_forward(trained, whole):
    frames = {view: images[:4] for view, images in windows().items()}
    label_prob = trained.score(frames, TASKS)
    assert (label_prob.dtype, label_prob.device) == (torch.float32, CPU)
    assert label_prob.max(1).values.min() > 0.5  # it has something to say
    expected = plain_label_prob(whole, "video", frames, TASKS)
    torch.testing.assert_close(label_prob, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize(
    ("main", "extra"),
    [((64, 96), (64, 96)), ((64, 96), (96, 32)), ((40, 72), (40, 72))],
    ids=["oblong", "two sizes", "to be resized"],
)
def test_pictures_of_other_sizes_give_the_plain_forwards_numbers(trained, whole, kind, main, extra):
    generator = torch.Generator().manual_seed(2)
    frames = {
        view: torch.randint(0, 256, (4, 5, *size, 3), dtype=torch.uint8, generator=generator)
        for view, size in zip(VIEWS, (main, extra), strict=True)
    }
    builder = {"video": qwentrend_input_builder, "image": base_vlm_input_builder}[kind]
    inputs = QwenInputs(trained.inputs.processor, builder, VIEWS, 5, "{task}?")
    model = HistoryVLMRewardModel(trained.cfg, trained.model, inputs, trained.parser, {})
    expected = plain_label_prob(whole, kind, frames, TASKS)
    torch.testing.assert_close(model.score(frames, TASKS), expected, atol=1e-6, rtol=1e-3)


def test_generate_says_the_likeliest_label(trained):
    told = HistoryVLMRewardModel(
        replace(trained.cfg, inference_mode="generate"), trained.model, trained.inputs, trained.parser, {}
    )
    told.task = TASK
    said, label_prob = told.score(windows()), trained.score(windows())
    assert torch.equal(said, torch.eye(3)[label_prob.argmax(1)])
    assert torch.equal(said.argmax(1), LABEL)
    assert torch.equal(told.label_prob(windows()), label_prob)


def test_an_answer_that_is_no_label_is_a_row_of_zeros(trained):
    texts = ("negative", "I cannot say", "positive", "positive or negative")
    model = doubled(trained, texts=texts, inference_mode="generate", infer_micro_batch_size=3)
    frames = {view: images[:4] for view, images in windows().items()}
    assert model.score(frames).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert model.model.settings["do_sample"] is False
    assert model.model.settings["max_new_tokens"] == 16


def test_sampling_is_passed_on(trained):
    model = doubled(trained, texts=("unclear",), inference_mode="generate", do_sample=True, temperature=0.5)
    model.score({view: images[:1] for view, images in windows().items()})
    assert (model.model.settings["do_sample"], model.model.settings["temperature"]) == (True, 0.5)


def test_micro_batches_change_nothing(trained):
    tasks = [TASK, "a much longer task than the other one"] * (NUM // 2)
    at_once = trained.score(windows(), tasks)
    pieces = HistoryVLMRewardModel(
        replace(trained.cfg, infer_micro_batch_size=5), trained.model, trained.inputs, trained.parser, {}
    )
    torch.testing.assert_close(pieces.score(windows(), tasks), at_once, atol=1e-5, rtol=1e-4)
    batches = doubled(trained, infer_micro_batch_size=5)
    batches.score(windows())
    assert batches.model.batches == [5, 5, 2]
    assert trained.score({view: images[:0] for view, images in windows().items()}).shape == (0, 3)


def test_the_task_is_the_configs_else_the_envs(tiny_qwen):
    cfg = make_cfg(tiny_qwen)
    cfg.input_builder_params.default_task_description = "what the config says"
    for model, task in ((load_history_vlm(cfg, CPU), "what the config says"), (load(tiny_qwen), "the env's")):
        model.task = "the env's"
        assert model.task == task
        frames = {view: images[:2] for view, images in windows().items()}
        assert torch.equal(model.score(frames), model.score(frames, [task] * 2))


def test_a_task_that_it_was_not_trained_on_is_told(trained):
    """Once, in one line with both texts."""
    model = doubled(trained, meta={"tasks": ["pull the cube", TASK]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.task = TASK
        doubled(trained, meta={"step": 7}).task = "stack the cubes"  # an older checkpoint tells none
    message = "the task is 'stack the cubes', but the reward model was trained on 'pull the cube' and others"
    with pytest.warns(UserWarning, match=message) as told:
        model.task = "stack the cubes"
        model.task = "stack the cubes"
    assert len(told) == 1


def test_memory_that_ends_halves_the_batches_once(trained):
    model = doubled(trained, limit=4, infer_micro_batch_size=8)
    with pytest.warns(UserWarning, match="infer_micro_batch_size goes down to 4"):
        label_prob = model.score(windows())
    assert label_prob.shape == (NUM, 3)
    assert model.model.batches == [8, 4, 4, 4]
    model.score(windows())
    assert model.model.batches[4:] == [4, 4, 4]  # for good
    model.model.limit = 3
    with pytest.raises(
        UserError, match=r"while scoring 4 samples at once; lower reward.model.infer_micro_batch_size"
    ):
        model.score(windows())


def test_one_sample_too_many_for_the_memory(trained):
    with pytest.raises(UserError, match="while scoring 1 samples"):
        doubled(trained, limit=0, infer_micro_batch_size=1).score(windows())


def test_a_small_label_mass_is_told_once(trained):
    many = {view: images.repeat(3, 1, 1, 1, 1) for view, images in windows().items()}
    vocabulary = len(trained.inputs.tokenizer)
    model = doubled(trained, meta={"step": 7})
    with pytest.warns(UserWarning, match="labels have only 0.01 of the probability"):
        label_prob = model.score(many)
    torch.testing.assert_close(label_prob, torch.full((36, 3), 1 / vocabulary))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.score(many)
        doubled(trained, meta={"step": 7}).score(windows())  # too few to tell
        sure = torch.zeros(vocabulary)
        sure[trained.label_tokens] = 20.0
        label_prob = doubled(trained, meta={"step": 7}, logits=sure).score(many)
    torch.testing.assert_close(label_prob, torch.full((36, 3), 1 / 3), atol=1e-5, rtol=0)


# --- A number for single frames


def test_a_number_is_read_or_counts_as_invalid_score(trained):
    inputs = QwenInputs(trained.inputs.processor, base_vlm_input_builder, VIEWS, 1, "{task}?")
    texts = ("0.8", "it is done", "25%", "7", "1 or 0")
    model = VLMRewardModel(
        VLMRewardConfig(), Double(inputs.tokenizer, texts=texts), inputs, BaseVLMRewardParser(0.1), {}
    )
    prob = model.score({view: images[:5, -1] for view, images in windows().items()})
    torch.testing.assert_close(prob, torch.tensor([0.8, 0.1, 0.25, 0.1, 0.1]))
    with pytest.raises(UserError, match="extra_view_images, which is not among the frames: main_images"):
        model.score({"main_images": windows()["main_images"][:5, -1]})
    assert model.score({view: images[:0, -1] for view, images in windows().items()}).shape == (0,)


def test_single_frames_are_scored_by_a_loaded_model(tiny_qwen):
    cfg = VLMRewardConfig(
        model_path=str(tiny_qwen),
        max_new_tokens=2,
        views=["main_images"],
        reward_parser_params={"invalid_score": 0.3},
    )
    model = load_vlm(cfg, CPU)
    model.task = TASK
    prob = model.score({"main_images": windows()["main_images"][:2, -1]})
    assert prob.tolist() == pytest.approx([0.3, 0.3])  # it babbles
    assert model.views == ("main_images",)
    assert "How far is the task completed?" in model.inputs.text(TASK)


# --- Builders and parsers of the user's own


OWN = """
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.prompts import Part


def second_camera(task, views, num_frames, template):
    return [Part("text", f"Closer to '{task}' after {num_frames}? "), Part("video", views[1])]


@dataclass  # which looks its module up by name where annotations are texts
class YesNo:
    yes: float = 1.0
    labels: ClassVar = ("yes", "no")

    def parse(self, text):
        return self.labels.index(text) if text in self.labels else -1

    def reward(self, label_prob):
        return self.yes * label_prob[:, 0]
"""


@pytest.fixture
def own(tmp_path) -> dict[str, str]:
    (tmp_path / "own.py").write_text(OWN)
    return {
        "input_builder_name": f"{tmp_path / 'own.py'}:second_camera",
        "reward_parser_name": f"{tmp_path / 'own.py'}:YesNo",
    }


def test_a_builder_and_a_parser_of_ones_own(whole, tiny_qwen, own, tmp_path):
    model = load(tiny_qwen, **own, reward_parser_params={"yes": 2.0})
    assert (model.labels, model.parser.yes) == (("yes", "no"), 2.0)
    video = "<|video_pad|>"
    asked = f"<|im_start|>user\nCloser to '{TASK}' after 5? {video}<|im_end|>\n<|im_start|>assistant\n"
    assert model.inputs.text(TASK) == asked
    frames = windows()
    label_prob = model.score(frames)
    assert label_prob.shape == (NUM, 2)
    blind = model.score({**frames, "main_images": torch.zeros_like(frames["main_images"])})
    assert torch.equal(blind, label_prob)
    dark = model.score({**frames, "extra_view_images": torch.zeros_like(frames["main_images"])})
    assert not torch.allclose(dark, label_prob, atol=1e-4)

    save_vlm(tmp_path / "checkpoint", model, META, frames)
    again = load(tmp_path / "checkpoint", **own)
    assert torch.equal(again.score(frames), label_prob)
    with pytest.raises(
        UserError, match=r"input_builder_name: trained with .*own.py:second_camera, here qwentrend"
    ):
        load(tmp_path / "checkpoint", reward_parser_name=own["reward_parser_name"])
    with pytest.raises(
        UserError, match=r"trained to answer positive, negative, unclear; .*YesNo knows yes, no"
    ):
        load(whole, reward_parser_name=own["reward_parser_name"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere.py:second_camera",
            "input_builder_name: 'nowhere.py:second_camera' names the file nowhere.py",
        ),
        ("third_camera", "input_builder_name: nothing is called 'third_camera'"),
    ],
)
def test_a_builder_that_is_not_there(tiny_qwen, name, message):
    with pytest.raises(UserError, match=message):
        load(tiny_qwen, input_builder_name=name)


def test_labels_that_begin_alike(trained):
    parser = SimpleNamespace(labels=("xa", "xb", "no"), parse=lambda text: -1)
    with pytest.raises(UserError, match=r"labels begin with the same token .*inference_mode: generate"):
        HistoryVLMRewardModel(VLMConfig(), trained.model, trained.inputs, parser, {})
    model = HistoryVLMRewardModel(
        VLMConfig(inference_mode="generate"), trained.model, trained.inputs, parser, {}
    )
    assert model.labels == ("xa", "xb", "no")


# --- Checkpoints


def test_a_whole_model_comes_back(trained, whole):
    model = load(whole, template=None)
    model.task = TASK
    assert torch.equal(model.score(windows()), trained.score(windows()))
    assert model.inputs.template == "{task}?"
    meta = model.meta
    assert (meta["model_type"], meta["step"], meta["precision"]) == ("history_vlm", 7, "fp32")
    assert (meta["views"], meta["window"], meta["labels"]) == (list(VIEWS), 5, list(LABELS))
    assert (meta["template"], meta["use_chat_template"]) == ("{task}?", True)
    golden = load_file(whole / "golden.safetensors")
    assert golden["frames.main_images"].shape == (4, 5, 32, 32, 3)
    assert torch.equal(golden["label_prob"], trained.score({v: f[:4] for v, f in windows().items()}))


def test_an_adapter_comes_back(adapted, adapter, whole):
    assert not (adapter / "model.safetensors").exists()
    model, base = load(whole, adapter), load(whole)
    for each in (model, adapted, base):
        each.task = TASK
    torch.testing.assert_close(model.score(windows()), adapted.score(windows()), atol=1e-6, rtol=1e-5)
    assert (model.score(windows()) - base.score(windows())).abs().max() > 0.1  # and it counts


def test_newer_rlinfs_names_are_the_same_question(whole):
    model = load(whole, input_builder_name="vlm_trend_input_builder", model_type="buffered_vlm")
    assert model.meta["input_builder_name"] == "qwentrend_input_builder"


def test_bf16_reads_a_checkpoint_of_fp32_and_the_reverse(trained, whole, tmp_path):
    model = load(whole, precision="bf16")
    model.task = TASK
    assert next(model.model.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(model.score(windows()), trained.score(windows()), atol=0.1, rtol=0)
    # golden scores off by what bf16 may do to them: too much in fp32, unless bf16 wrote them
    folder = copied(whole, tmp_path)
    golden = load_file(folder / "golden.safetensors")
    save_file({**golden, "label_prob": golden["label_prob"] + 0.05}, folder / "golden.safetensors")
    with pytest.raises(UserError, match=r"golden windows 0.050 off .*at most 0.02 allowed"):
        load(folder)
    edit_json(folder / "reward.json", precision="bf16")
    load(folder)


def test_a_golden_check_of_a_model_that_generates_reads_probabilities(whole):
    model = load(whole, inference_mode="generate")
    assert model.cfg.inference_mode == "generate"
    assert set(model.score(windows(), [TASK] * NUM).flatten().tolist()) == {0.0, 1.0}


def test_attention_that_is_not_available_gives_way(whole):
    with pytest.warns(UserWarning, match="flash_attention_2 is not available here .*; sdpa takes its place"):
        model = load(whole, attn_implementation="flash_attention_2")
    assert model.model.config._attn_implementation == "sdpa"


def test_flash_attention_is_for_weights_in_bf16(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    gpu = torch.device("cuda")
    assert _attention("auto", gpu, bf16=True) == "flash_attention_2"
    assert _attention("auto", gpu, bf16=False) == _attention("auto", CPU, bf16=True) == "sdpa"
    assert _attention("eager", gpu, bf16=True) == "eager"
    with pytest.warns(UserWarning, match="bf16 weights"):
        assert _attention("flash_attention_2", gpu, bf16=False) == "sdpa"


# --- Loading that is refused


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"template": "Now {task}!"}, r"template: trained with \{task\}\?, here Now \{task\}!$"),
        (
            {"views": VIEWS[::-1]},
            r"views: trained with \['main_images', 'extra_view_images'\], here \['extra",
        ),
        ({"views": VIEWS[:1]}, r"views: trained with .* here \['main_images'\]$"),
        ({"window": 3}, "window: trained with 5, here 3$"),
        ({"use_chat_template": False}, "use_chat_template: trained with True, here False$"),
        (
            {"input_builder_name": "base_vlm_input_builder"},
            "trained with qwentrend_input_builder, here base_vlm",
        ),
    ],
)
def test_another_question(whole, asked, message):
    with pytest.raises(UserError, match="was trained for another question: .*" + message):
        load(whole, **asked)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"prompt_version": 0}, "prompt_version: trained with 0, here 1"),
        ({"model_type": "resnet"}, "a reward model of the type resnet, not history_vlm"),
    ],
)
def test_another_checkpoint(whole, tmp_path, written, message):
    folder = copied(whole, tmp_path)
    edit_json(folder / "reward.json", **written)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_single_frames_are_not_for_a_model_of_windows(whole):
    cfg = VLMRewardConfig(model_path=str(whole), views=list(VIEWS))
    with pytest.raises(UserError, match="window: trained with 5, here 1"):
        load_vlm(cfg, CPU)


def test_an_adapter_on_another_base(adapter, tiny_qwen, tmp_path):
    wide = make_tiny_qwen(tmp_path / "wide", hidden=96)
    with pytest.raises(UserError, match=f"{adapter} was trained on another base model than {wide}"):
        load(wide, adapter)
    # of the same shape, with other weights
    with pytest.raises(UserError, match=r"golden windows .* base model or preprocessing have changed"):
        load(tiny_qwen, adapter)


def without(name: str):
    return lambda folder: (folder / name).unlink()


def cut(name: str):
    def torn(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return torn


def change_weights(folder: Path) -> None:
    (path,) = [*folder.glob("model.safetensors"), *folder.glob("adapter_model.safetensors")]
    weights = load_file(path)
    for name, weight in weights.items():
        if name.endswith(("lora_B.weight", "q_proj.weight")):
            weights[name] = weight.flip(0).contiguous()
    save_file(weights, path, metadata={"format": "pt"})


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_family(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="qwen2_5_vl")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_weights, "scores its golden windows .* off what was written beside them"),
        (without("golden.safetensors"), "lacks golden.safetensors"),
        (cut("golden.safetensors"), "golden.safetensors cannot be read"),
        (without("model.safetensors"), "is no complete Qwen3-VL folder .*model.safetensors"),
        (cut("model.safetensors"), "is no complete Qwen3-VL folder .*SafetensorError"),
        (drop_a_weight, r"lacks 1 of the model's weights, such as .*layers.1.mlp.up_proj.weight"),
        (another_family, "holds a model of the family 'qwen2_5_vl', not qwen3_vl"),
        (without("config.json"), "has no config.json; model_path must be the folder of a Qwen3-VL"),
        (without("tokenizer.json"), "is no complete Qwen3-VL folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_model(whole, tmp_path, damage, message):
    folder = copied(whole, tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message) as refusal:
        load(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_weights, "scores its golden windows .* off what was written beside them"),
        (without("adapter_config.json"), "is no adapter .adapter_config.json is missing"),
        (without("adapter_model.safetensors"), "is no adapter .adapter_model.safetensors is missing"),
        (cut("adapter_model.safetensors"), "does not fit .*"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_adapter(adapter, whole, tmp_path, damage, message):
    folder = copied(adapter, tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message) as refusal:
        load(whole, folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"lora": "nowhere"}, "nowhere is no adapter"),
        ({"input_builder_name": "third_camera"}, "nothing is called 'third_camera'"),
        ({"reward_parser_params": {"yes": 1}}, "reward_parser_params of qwentrend_reward_parser"),
    ],
)
def test_what_costs_nothing_is_checked_before_the_base_is_loaded(tiny_qwen, monkeypatch, asked, message):
    monkeypatch.setattr(qwen_checkpoint, "load_base", lambda *_: pytest.fail("loaded the base"))
    with pytest.raises(UserError, match=message):
        load(tiny_qwen, **asked)


def test_no_model_is_named(adapter, tmp_path):
    for lora in (None, adapter):
        with pytest.raises(UserError, match="model_path is not set; give the folder of a Qwen3-VL"):
            load(None, lora)
    with pytest.raises(UserError, match=r"nowhere has no config\.json"):
        load(tmp_path / "nowhere")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "was here")


def test_pickled_weights_are_not_read(tiny_qwen, adapter, whole, tmp_path):
    mark = tmp_path / "mark"
    folder = copied(tiny_qwen, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(load_file(tiny_qwen / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is no complete Qwen3-VL folder"):
        load(folder)  # honest weights, all the same
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError, match="is no complete Qwen3-VL folder"):
        load(folder)
    pickled = copied(adapter, tmp_path / "adapter")
    (pickled / "adapter_model.safetensors").unlink()
    (pickled / "adapter_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        load(whole, pickled)
    assert not mark.exists()


def test_code_in_a_folder_is_not_run(whole, adapter, tmp_path):
    mark = tmp_path / "mark"
    base, lora = copied(whole, tmp_path), copied(adapter, tmp_path / "adapter")
    for folder in (base, lora):
        for name in ("evil", "modeling_qwen3_vl", "processing_qwen3_vl"):
            (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    autos = (
        "Config",
        "ModelForImageTextToText",
        "Processor",
        "Tokenizer",
        "ImageProcessor",
        "VideoProcessor",
    )
    for path in base.glob("*config.json"):
        edit_json(path, auto_map={f"Auto{auto}": "evil.Evil" for auto in autos})
    model = load(base, lora)  # by transformers' own code
    assert type(model.inputs.processor).__name__ == "Qwen3VLProcessor"
    assert not mark.exists() and "evil" not in sys.modules


# --- Frames that are refused


def with_view(view: str, frames: Tensor) -> dict[str, Tensor]:
    return {**windows(), view: frames}


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (
            {"main_images": windows()["main_images"]},
            "looks at extra_view_images, which is not among the frames",
        ),
        (
            {"extra_view_images": windows()["main_images"]},
            "looks at main_images, which is not among the frames",
        ),
        (with_view("main_images", torch.rand(NUM, 5, 32, 32, 3)), "main_images must be uint8 RGB"),
        (
            {view: frames[:, :3] for view, frames in windows().items()},
            r"windows of 5 frames, got \{'main_images': 3, 'extra_view_images': 3\}",
        ),
        (
            with_view("extra_view_images", torch.zeros(NUM, 5, 64, 32, 3, dtype=torch.uint8)),
            "extra_view_images are 64x32, but the reward model was trained on 32x32 frames",
        ),
    ],
    ids=["second view missing", "first view missing", "floats", "window", "size"],
)
def test_unfit_frames(trained, frames, message):
    model = doubled(trained, meta=META)
    with pytest.raises(UserError, match=message):
        model.score(frames)
    assert model.model.batches == []
    model.score(windows())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"infer_micro_batch_size": 0}, "must be at least 1"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"do_sample": True}, "do_sample needs a temperature above 0"),
    ],
)
def test_unfit_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        VLMConfig(**setting)

"""From questions and frames to what a Qwen3-VL takes: one way, for training and for scoring.

The text comes from the model's own chat template, pictures through its own processor, with two corrections:
`do_sample_frames=False`, without which a processor that is told a frame rate drops frames of a short window,
and bare `<|video_pad|>` marks, because the processor adds the wrapper that the stock template has as well.

Prompts repeat, so their token ids and positions are made once. Videos that need no resizing are cut into
patches here, a batch at a time, on the frames' own device; for each size a video of noise is cut both ways
first, and bits that differ from the processor's leave the work to the processor.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.prompts import InputBuilder, Part
from common.runtime import UserError

NO_LABEL = -100  # in `labels`: not a token of the answer
# Frames per second that the text says the videos have. A constant, so that the prompt does not depend on
# the env: Qwen3-VL's own training videos are sampled at 2.
VIDEO_FPS = 2.0
WRAPPED_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
TEXT, IMAGE, VIDEO = range(3)  # values of mm_token_type_ids


@dataclass
class _Prompt:
    ids: Tensor  # (S,) int64
    kinds: Tensor  # (S,) int64: TEXT, IMAGE or VIDEO
    positions: Tensor  # (3, S) int64: time, height, width

    def with_answer(self, answer: list[int]) -> "_Prompt":
        count = torch.arange(len(answer))
        return _Prompt(
            torch.cat([self.ids, torch.tensor(answer)]),
            torch.cat([self.kinds, torch.full_like(count, TEXT)]),
            torch.cat([self.positions, (self.positions.max() + 1 + count).expand(3, -1)], dim=1),
        )


class QwenInputs:
    """Builds the inputs of one kind of question.

    `processor`: of `AutoProcessor`; `views`: in the order in which they are shown; `num_frames`: K.
    """

    def __init__(
        self,
        processor: Any,
        builder: InputBuilder,
        views: tuple[str, ...],
        num_frames: int,
        template: str,
        use_chat_template: bool = True,
    ):
        self.processor, self.builder = processor, builder
        self.views, self.num_frames, self.template = tuple(views), num_frames, template
        self.use_chat_template = use_chat_template
        self.tokenizer = processor.tokenizer
        self._prompts: dict[tuple, _Prompt] = {}  # (task, sizes of the views)
        self._fast_sizes: dict[tuple, bool] = {}  # sizes -> whether our own patches are the processor's

    # -- questions -----------------------------------------------------------------------------------

    def questions(self, frames: dict[str, Tensor], tasks: list[str]) -> dict[str, Tensor]:
        """frames: view -> (B, K, H, W, 3) uint8; a task per sample -> the model's keyword arguments, on the
        frames' device.

        Texts are padded on the left, so that the answer begins at the same place in all of them. UserError
        where a view is missing or no uint8 RGB.
        """
        check_frames(frames, self.views)
        prompts = [self._prompt(task, frames) for task in tasks]
        return {**self._padded(prompts, frames), **self._pixels(frames, tasks)}

    def lessons(
        self, frames: dict[str, Tensor], tasks: list[str], answers: list[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The same questions with their answers -> (keyword arguments, labels).

        labels (B, S) int64: the tokens of answer + end of turn, at the end of each row, NO_LABEL before.
        """
        check_frames(frames, self.views)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        tails = {answer: [*self.answer_ids(answer), end] for answer in set(answers)}
        texts = [
            self._prompt(task, frames).with_answer(tails[answer])
            for task, answer in zip(tasks, answers, strict=True)
        ]
        inputs = self._padded(texts, frames)
        length = torch.tensor([len(tails[answer]) for answer in answers], device=inputs["input_ids"].device)
        place_from_end = torch.arange(inputs["input_ids"].shape[1], 0, -1, device=length.device)
        is_answer = place_from_end <= length[:, None]
        labels = torch.where(is_answer, inputs["input_ids"], NO_LABEL)
        return {**inputs, **self._pixels(frames, tasks)}, labels

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer as it follows the question."""
        return self.tokenizer.encode(answer, add_special_tokens=False)

    def parts(self, task: str) -> list[Part]:
        return self.builder(task, self.views, self.num_frames, self.template)

    def text(self, task: str) -> str:
        """The prompt up to where the answer begins, with one mark per image or video."""
        parts = self.parts(task)
        if not self.use_chat_template:
            marks = {"image": "<|vision_start|><|image_pad|><|vision_end|>", "video": "<|video_pad|>"}
            return "".join(marks.get(part.kind, part.content) for part in parts)
        content = [
            {"type": part.kind, part.kind: part.content if part.kind == "text" else ""} for part in parts
        ]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.replace(WRAPPED_VIDEO, "<|video_pad|>")

    # -- parts ---------------------------------------------------------------------------------------

    def _prompt(self, task: str, frames: dict[str, Tensor]) -> _Prompt:
        key = (task, _sizes(frames, self.views))
        if key not in self._prompts:
            made = self._processed({view: frames[view][:1] for view in self.views}, [task])
            ids = made["input_ids"][0]
            kinds = torch.full_like(ids, TEXT)
            kinds[ids == self.processor.image_token_id] = IMAGE
            kinds[ids == self.processor.video_token_id] = VIDEO
            self._prompts[key] = _Prompt(ids, kinds, self._positions(kinds, made))
        return self._prompts[key]

    def _positions(self, kinds: Tensor, grids: dict[str, Tensor]) -> Tensor:
        """(3, S) int64: Qwen3-VL's multimodal rotary positions (time, height, width) of one prompt.

        What transformers works out again for each sample of each batch. An image, or a temporal patch of a
        video, stands at one time, and text goes on after its longer side.
        """
        videos = [
            (h, w) for t, h, w in grids.get("video_grid_thw", torch.empty(0, 3)).tolist() for _ in range(t)
        ]
        images = [(h, w) for _, h, w in grids.get("image_grid_thw", torch.empty(0, 3)).tolist()]
        pictures = {IMAGE: iter(images), VIDEO: iter(videos)}
        merge, start, parts = self.processor.video_processor.merge_size, 0, []
        for kind, run in groupby(kinds.tolist()):
            if kind == TEXT:
                length = len(list(run))
                parts.append((start + torch.arange(length)).expand(3, -1))
                start += length
            else:
                h, w = (side // merge for side in next(pictures[kind]))
                rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
                parts.append(start + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1))
                start += max(h, w)
        return torch.cat(parts, dim=1)

    def _padded(self, prompts: list[_Prompt], frames: dict[str, Tensor]) -> dict[str, Tensor]:
        """input_ids, attention_mask, mm_token_type_ids, each (B, S) int64, and position_ids (3, B, S)."""
        length = max(len(prompt.ids) for prompt in prompts)
        rows: dict[str, list[Tensor]] = {}
        made: dict[int, dict[str, Tensor]] = {}  # samples share prompts
        for prompt in prompts:
            if id(prompt) not in made:
                short = length - len(prompt.ids)
                made[id(prompt)] = {
                    "input_ids": F.pad(prompt.ids, (short, 0), value=self.tokenizer.pad_token_id),
                    "attention_mask": F.pad(torch.ones_like(prompt.ids), (short, 0)),
                    "mm_token_type_ids": F.pad(prompt.kinds, (short, 0), value=TEXT),
                    "position_ids": F.pad(prompt.positions, (short, 0)),
                }
            for name, row in made[id(prompt)].items():
                rows.setdefault(name, []).append(row)
        device = frames[self.views[0]].device
        return {
            name: torch.stack(row, dim=1 if name == "position_ids" else 0).to(device)
            for name, row in rows.items()
        }

    def _pixels(self, frames: dict[str, Tensor], tasks: list[str]) -> dict[str, Tensor]:
        sizes = _sizes(frames, self.views)
        if sizes not in self._fast_sizes:
            self._fast_sizes[sizes] = self._is_fast(frames, tasks[0])
        if self._fast_sizes[sizes]:
            return self._patches(frames)
        out = self._processed(frames, tasks)
        device = frames[self.views[0]].device
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        return {name: out[name].to(device) for name in names if name in out}

    def _is_fast(self, frames: dict[str, Tensor], task: str) -> bool:
        """Whether only videos of one size are shown, and `_patches` makes of them what the processor does."""
        shown = [part for part in self.parts(task) if part.kind != "text"]
        sizes = {frames[part.content].shape[2:4] for part in shown}
        settings = self.processor.video_processor
        unit = settings.patch_size * settings.merge_size
        if (
            any(part.kind != "video" for part in shown)
            or len(sizes) != 1
            or any(s % unit for s in sizes.pop())
        ):
            return False
        generator = torch.Generator().manual_seed(0)
        noise = {
            view: torch.randint(0, 256, frames[view][:1].shape, dtype=torch.uint8, generator=generator)
            for view in self.views
        }
        ours, theirs = self._patches(noise), self._processed(noise, [task])
        return all(torch.equal(ours[name], theirs[name]) for name in ours)

    def _patches(self, frames: dict[str, Tensor]) -> dict[str, Tensor]:
        """Videos of one size cut into normalised patches, in the processor's order."""
        settings = self.processor.video_processor
        p, m, tp = settings.patch_size, settings.merge_size, settings.temporal_patch_size
        order = [part.content for part in self.parts("") if part.kind == "video"]
        videos = torch.stack([frames[view] for view in order], dim=1).flatten(0, 1)  # (B*V, K, H, W, 3)
        if short := -videos.shape[1] % tp:
            videos = torch.cat([videos, videos[:, -1:].expand(-1, short, -1, -1, -1)], dim=1)
        n, t, h, w, _ = videos.shape
        grid = t // tp, h // p, w // p
        cut = videos.view(n, grid[0], tp, grid[1] // m, m, p, grid[2] // m, m, p, 3)
        # moved about as bytes, a quarter of the floats' traffic
        patches = cut.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(-1, 3, tp * p * p).float()
        mean, std = (
            255 * torch.tensor(value, device=videos.device)[:, None]
            for value in (settings.image_mean, settings.image_std)
        )
        return {
            "pixel_values_videos": patches.sub_(mean).div_(std).flatten(1),
            "video_grid_thw": torch.tensor(grid, device=videos.device).expand(n, 3).clone(),
        }

    def _processed(self, frames: dict[str, Tensor], tasks: list[str]) -> dict[str, Tensor]:
        """What the processor itself makes of the samples, texts of equal length."""
        images, videos = [], []
        for row, task in enumerate(tasks):
            for part in self.parts(task):
                if part.kind == "image":
                    images.append(frames[part.content][row, -1].cpu().numpy())
                elif part.kind == "video":
                    videos.append(frames[part.content][row].cpu().numpy())
        kwargs: dict[str, Any] = {"images": images} if images else {}
        if videos:
            k = len(videos[0])
            metadata = {"fps": VIDEO_FPS, "frames_indices": list(range(k)), "total_num_frames": k}
            kwargs |= {"videos": videos, "video_metadata": [dict(metadata) for _ in videos]}
            kwargs |= {"do_sample_frames": False, "cap_pixels_per_frame": False}
        text = [self.text(task) for task in tasks]
        return dict(self.processor(text=text, padding=True, return_tensors="pt", **kwargs))


def _sizes(frames: dict[str, Tensor], views: tuple[str, ...]) -> tuple:
    """(K, H, W) of each view."""
    return tuple(tuple(frames[view].shape[1:4]) for view in views)


def check_frames(frames: dict[str, Tensor], views: tuple[str, ...]) -> None:
    """UserError unless every view is there as (B, K, H, W, 3) uint8."""
    if missing := [view for view in views if view not in frames]:
        raise UserError(
            f"the reward model looks at {missing[0]}, which is not among the frames: {', '.join(frames)}"
        )
    for view in views:
        if frames[view].dtype != torch.uint8 or frames[view].dim() != 5 or frames[view].shape[-1] != 3:
            shape = tuple(frames[view].shape)
            raise UserError(f"{view} must be uint8 RGB (B, K, H, W, 3), got {frames[view].dtype} {shape}")

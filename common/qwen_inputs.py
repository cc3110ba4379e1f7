"""From questions and frames to what a Qwen3-VL takes: one way, for training and for scoring.

The text comes from the model's own chat template, pictures through its own processor, with two corrections:
`do_sample_frames=False`, without which a processor that is told a frame rate drops frames of a short window,
and bare `<|video_pad|>` marks, because the processor adds the wrapper that the stock template has as well.

Prompts repeat, so their token ids are made once. So are patches of videos that need no resizing, in one batch
on the frames' own device; the first batch of each size is compared with the processor's, bit by bit.
"""

from typing import Any

import torch
from torch import Tensor

from common.prompts import InputBuilder, Part
from common.runtime import UserError

NO_LABEL = -100  # in `labels`: not a token of the answer
# Frames per second that the text says the videos have. A constant, so that the prompt does not depend on
# the env: Qwen3-VL's own training videos are sampled at 2.
VIDEO_FPS = 2.0
PIXELS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
WRAPPED_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


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
        self._prompts: dict[tuple, Tensor] = {}  # (task, sizes) -> (S,) token ids
        self._fast_sizes: dict[tuple, bool] = {}  # sizes -> whether our own patches are the processor's

    # -- questions -----------------------------------------------------------------------------------

    def questions(self, frames: dict[str, Tensor], tasks: list[str]) -> dict[str, Tensor]:
        """frames: view -> (B, K, H, W, 3) uint8; a task per sample -> the model's keyword arguments.

        Texts are padded on the left, so that the answer begins at the same place in all of them.
        """
        prompts = [self._prompt(task, frames) for task in tasks]
        return {**self._padded(prompts), **self._pixels(frames, tasks)}

    def lessons(
        self, frames: dict[str, Tensor], tasks: list[str], answers: list[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The same questions with their answers -> (keyword arguments, labels).

        labels (B, S) int64: the tokens of answer + end of turn, at the end of each row, NO_LABEL before.
        """
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        spelt = {answer: self.answer_ids(answer) for answer in set(answers)}
        tails = [torch.tensor([*spelt[answer], end]) for answer in answers]
        texts = [
            torch.cat([self._prompt(task, frames), tail]) for task, tail in zip(tasks, tails, strict=True)
        ]
        inputs = self._padded(texts)
        labels = torch.full_like(inputs["input_ids"], NO_LABEL)
        for row, tail in enumerate(tails):
            labels[row, -len(tail) :] = tail
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

    def _prompt(self, task: str, frames: dict[str, Tensor]) -> Tensor:
        key = (task, _sizes(frames, self.views))
        if key not in self._prompts:
            one = {view: frames[view][:1] for view in self.views}
            self._prompts[key] = self._processed(one, [task])["input_ids"][0]
        return self._prompts[key]

    def _padded(self, texts: list[Tensor]) -> dict[str, Tensor]:
        """input_ids, attention_mask, mm_token_type_ids, each (B, S) int64."""
        length = max(map(len, texts))
        ids = torch.full((len(texts), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, length - len(text) :] = text
            mask[row, length - len(text) :] = 1
        kinds = torch.zeros_like(ids)
        kinds[ids == self.processor.image_token_id] = 1
        kinds[ids == self.processor.video_token_id] = 2
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}

    def _pixels(self, frames: dict[str, Tensor], tasks: list[str]) -> dict[str, Tensor]:
        sizes = _sizes(frames, self.views)
        if sizes not in self._fast_sizes:
            self._fast_sizes[sizes] = self._is_fast(frames, tasks[0])
        if self._fast_sizes[sizes]:
            return self._patches(frames)
        out = self._processed(frames, tasks)
        return {
            name: out[name] for name in out if name.startswith(("pixel_values", "image_grid", "video_grid"))
        }

    def _is_fast(self, frames: dict[str, Tensor], task: str) -> bool:
        shown = [part for part in self.parts(task) if part.kind != "text"]
        sizes = {frames[part.content].shape[2:4] for part in shown}
        if any(part.kind != "video" for part in shown) or len(sizes) != 1:
            return False
        noise = {
            view: torch.randint(0, 256, frames[view][:1].shape, dtype=torch.uint8) for view in self.views
        }
        theirs = self._processed(noise, [task])
        unit = self.processor.video_processor.patch_size * self.processor.video_processor.merge_size
        if any(side % unit for side in sizes.pop()):
            return False  # it is resized
        ours = self._patches(noise)
        return torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"]) and torch.equal(
            ours["pixel_values_videos"], theirs["pixel_values_videos"]
        )

    def _patches(self, frames: dict[str, Tensor]) -> dict[str, Tensor]:
        """Videos cut into normalised patches, in the processor's order."""
        settings = self.processor.video_processor
        p, m, tp = settings.patch_size, settings.merge_size, settings.temporal_patch_size
        order = [part.content for part in self.parts("") if part.kind == "video"]
        videos = torch.stack([frames[view] for view in order], dim=1).flatten(0, 1)  # (B*V, K, H, W, 3)
        if short := -videos.shape[1] % tp:
            videos = torch.cat([videos, videos[:, -1:].expand(-1, short, -1, -1, -1)], dim=1)
        n, t, h, w, _ = videos.shape
        grid = t // tp, h // p, w // p
        cut = videos.view(n, grid[0], tp, h // p // m, m, p, w // p // m, m, p, 3)
        patches = cut.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(-1, 3 * tp * p * p).float()
        for values, change in ((settings.image_mean, patches.sub_), (settings.image_std, patches.div_)):
            change((255 * torch.tensor(values, device=videos.device)).repeat_interleave(tp * p * p))
        return {
            "pixel_values_videos": patches,
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
    """(K, H, W) of each view. UserError where a view is missing or no uint8 RGB."""
    if missing := [view for view in views if view not in frames]:
        raise UserError(
            f"the reward model looks at {missing[0]}, which is not among the frames: {', '.join(frames)}"
        )
    for view in views:
        if frames[view].dtype != torch.uint8 or frames[view].dim() != 5 or frames[view].shape[-1] != 3:
            shape = tuple(frames[view].shape)
            raise UserError(f"{view} must be uint8 RGB (B, K, H, W, 3), got {frames[view].dtype} {shape}")
    return tuple(tuple(frames[view].shape[1:4]) for view in views)

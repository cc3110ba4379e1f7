"""What a vision-language model is asked, and what its answer is worth. **The** prompt lives here.

An *input builder* says what goes into the user's turn, in order: parts of text, image (the last frame of a
view) and video (a view's whole window). A *reward parser* knows the answers that may come back and their
worth. Both are looked up by name; `my_file.py:my_builder` names one in a file of your own. Training, scoring
here and scoring by a served model all go through them: a model is asked online what it was trained on.
"""

import importlib.util
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from common.runtime import UserError
from common.trend import LABELS

if TYPE_CHECKING:  # preprocessing needs the prompt alone, and importing torch costs 0.5 GB and seconds
    from torch import Tensor

INVALID = -1  # in place of a label: the answer was none of them

TREND_TEMPLATE = (
    "The robot's task: {task}\n"
    "Two videos show the same {num_frames} moments of it, one from the main camera and one from a second "
    "camera. From the first to the last moment, did the robot come closer to completing the task? Answer "
    "with one word: positive if it came closer, negative if it lost ground, unclear if neither can be seen."
)
SCORE_TEMPLATE = (
    "The robot's task: {task}\n"
    "The images show the scene now. How far is the task completed? Answer with one number between 0 (not "
    "begun) and 1 (completed)."
)

# ----------------------------------------------------------------------------------------------------
# Questions


@dataclass(frozen=True)
class Part:
    """A piece of the user's turn. `content`: the text, or the view that the image or video shows."""

    kind: Literal["text", "image", "video"]
    content: str


def fill(template: str, task: str, num_frames: int) -> str:
    """The template with `{task}` and `{num_frames}` filled in (by replacement: other braces stay)."""
    return template.replace("{num_frames}", str(num_frames)).replace("{task}", task)


def template_of(prompt: str, task: str) -> str:
    """The template that gives `prompt` for `task`, for data whose prompt was written elsewhere."""
    return prompt.replace(task, "{task}") if task else prompt


def qwentrend_input_builder(task: str, views: tuple[str, ...], num_frames: int, template: str) -> list[Part]:
    """The window as one video per view, then the question (RLinf's order)."""
    videos = [Part("video", view) for view in views]
    return [*videos, Part("text", fill(template, task, num_frames))]


def base_vlm_input_builder(task: str, views: tuple[str, ...], num_frames: int, template: str) -> list[Part]:
    """The current image of each view, then the question."""
    images = [Part("image", view) for view in views]
    return [*images, Part("text", fill(template, task, num_frames))]


InputBuilder = Callable[[str, tuple[str, ...], int, str], list[Part]]
INPUT_BUILDERS: dict[str, InputBuilder] = {
    "qwentrend_input_builder": qwentrend_input_builder,
    "vlm_trend_input_builder": qwentrend_input_builder,  # its name in newer RLinf
    "base_vlm_input_builder": base_vlm_input_builder,
}
TEMPLATES = {"base_vlm_input_builder": SCORE_TEMPLATE}  # all others: TREND_TEMPLATE


@dataclass
class InputBuilderParams:
    """`reward.model.input_builder_params`."""

    default_task_description: str | None = None  # null: what the env says of itself
    template: str | None = None  # with {task} and {num_frames}; null: the checkpoint's, else the standard one


def warn_of_other_task(task: str, meta: dict[str, Any]) -> None:
    """Where the task is none of those that the model was trained on (`tasks` of its reward.json)."""
    trained = meta.get("tasks")
    if trained and task not in trained:
        others = " and others" if len(trained) > 1 else ""
        warnings.warn(
            f"the task is '{task}', but the reward model was trained on '{trained[0]}'{others}", stacklevel=3
        )


class AskedAboutTask:
    """Knows the task in words. `meta`: the checkpoint's reward.json."""

    _own_task: str | None  # the config's
    _env_task = ""
    meta: dict[str, Any]

    @property
    def task(self) -> str:
        """The task in words: the config's, else what the env says of itself."""
        return self._env_task if self._own_task is None else self._own_task

    @task.setter
    def task(self, task: str) -> None:
        if task != self._env_task:
            self._env_task = task
            warn_of_other_task(self.task, self.meta)


# ----------------------------------------------------------------------------------------------------
# Answers


@dataclass
class QwenTrendRewardParser:
    """One of three words. What each is worth, in reward units; `expected_value`: the probabilities' mean of
    these instead of the likeliest word's."""

    positive_reward: float = 1.0
    negative_reward: float = -0.2
    unclear_reward: float = 0.0
    invalid_reward: float = 0.0
    expected_value: bool = False
    labels: ClassVar[tuple[str, ...]] = LABELS

    def parse(self, text: str) -> int:
        """Index into `labels` or INVALID. `{"trend": "positive"}` or a text with exactly one of the words,
        not negated ("not positive" says nothing)."""
        text = text.strip().lower()
        try:
            answer = json.loads(text)
            text = str(answer.get("trend", "")) if isinstance(answer, dict) else str(answer)
        except ValueError:
            pass
        words = re.findall(r"[a-z']+", text)
        found = {word for word in words if word in self.labels}
        if len(found) != 1 or {"not", "no", "never", "isn't"} & set(words):
            return INVALID
        return self.labels.index(found.pop())

    def reward(self, label_prob: "Tensor") -> "Tensor":
        """(M,) float32 of label_prob (M, 3), rows of zeros standing for an invalid answer."""
        worth = label_prob.new_tensor([self.positive_reward, self.negative_reward, self.unclear_reward])
        label = likeliest(label_prob)
        if self.expected_value:
            value = (label_prob / label_prob.sum(1, keepdim=True).clamp(min=1e-12)) @ worth
        else:
            value = worth[label.clamp(min=0)]
        return value.where(label != INVALID, self.invalid_reward)


@dataclass
class BaseVLMRewardParser:
    """A number between 0 and 1."""

    invalid_score: float = 0.0

    def parse(self, text: str) -> float:
        """The one number in [0, 1] in the text (`0.8`, `80%`, `8/10`), nan where there is none or several."""
        number = r"-?\d+(?:\.\d+)?|-?\.\d+"
        match = re.findall(rf"({number})\s*(?:(%)|/\s*({number}))?", text)
        if len(match) != 1:
            return math.nan
        value, percent, of = match[0]
        score = float(value) / (100 if percent else float(of) if of and float(of) else 1)
        return score if 0 <= score <= 1 else math.nan


REWARD_PARSERS: dict[str, type] = {
    "qwentrend_reward_parser": QwenTrendRewardParser,
    "vlm_trend_reward_parser": QwenTrendRewardParser,
    "base_vlm_reward_parser": BaseVLMRewardParser,
}


def likeliest(label_prob: "Tensor") -> "Tensor":
    """(M,) int64 index of the likeliest label of (M, L); INVALID for a row of zeros."""
    return label_prob.argmax(1).where(label_prob.sum(1) > 0, INVALID)


def make_parser(name: str, params: dict[str, Any]) -> Any:
    """The parser of that name, with its params. UserError for one that it does not know."""
    parser = look_up(name, REWARD_PARSERS, "reward_parser_name")
    try:
        return parser(**params)
    except TypeError as error:
        known = ", ".join(getattr(parser, "__dataclass_fields__", ())) or "none"
        raise UserError(f"reward_parser_params of {name}: {error}; it knows {known}") from error


def look_up(name: str, registry: dict[str, Any], key: str) -> Any:
    """What the registry has under `name`, or `thing` of a Python file for a name like `file.py:thing`."""
    if name in registry:
        return registry[name]
    path, colon, thing = name.rpartition(":")
    if not colon:
        raise UserError(
            f"{key}: nothing is called '{name}'; there is {', '.join(registry)}, or name one of yours as "
            "path/to/file.py:its_name"
        )
    if not Path(path).is_file():
        raise UserError(f"{key}: '{name}' names the file {path}, which does not exist")
    private = "_of_user_" + str(Path(path).resolve()).replace(".", "_")
    spec = importlib.util.spec_from_file_location(private, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    if not hasattr(module, thing):
        raise UserError(f"{key}: {path} defines no '{thing}'")
    return getattr(module, thing)

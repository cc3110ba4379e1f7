"""A vision-language reward model behind an OpenAI-compatible chat endpoint: vLLM, SGLang, transformers serve.

For models that outgrow the workstation. The questions and the reading of answers are those of models loaded
here (`common.prompts`), and so is what a reward model offers: `score`, `views`, `window`, `meta`, `task`.
A label's probability is that of its first token where the server tells `logprobs`; else the word that it
wrote counts as certain.
"""

import base64
import contextlib
import io
import json
import math
import os
import sys
import threading
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from common.prompts import (
    INPUT_BUILDERS,
    INVALID,
    TEMPLATES,
    TREND_TEMPLATE,
    AskedAboutTask,
    InputBuilderParams,
    Part,
    look_up,
    make_parser,
)
from common.qwen_checkpoint import check_meta, read_meta
from common.runtime import UserError

TOP_LOGPROBS = 20  # as many as OpenAI and, by default, vLLM allow
WORTH_ANOTHER_TRY = {408, 409, 425, 429, 500, 502, 503, 504}
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0  # before a retry; doubles from one to the next


@dataclass
class ApiConfig:
    """Section `reward.api`."""

    base_url: str = "http://localhost:8000/v1"
    model: str = ""  # the name under which the server knows it
    api_key_env: str | None = None  # environment variable that holds the key; null: none is sent
    timeout_s: float = 60.0  # of one try
    max_retries: int = 4  # after 429, 5xx, timeouts and refused connections
    num_concurrent: int = 8  # requests at a time
    logprobs: Literal["auto", "on", "off"] = "auto"  # auto: where the server gives them
    image_format: Literal["png", "jpeg"] = "png"
    # images: every server knows them. video_url: vLLM's list of JPEGs, for a model that was tuned on videos.
    send_videos_as: Literal["images", "video_url"] = "images"

    def __post_init__(self):
        if not self.model:
            raise ValueError("reward.api.model: give the name under which the server knows the model")
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"reward.api.base_url must start with http:// or https://, got {self.base_url}")
        if self.timeout_s <= 0 or self.max_retries < 0 or self.num_concurrent < 1:
            raise ValueError(
                "reward.api needs timeout_s above 0, max_retries from 0 and num_concurrent from 1, got "
                f"{self.timeout_s}, {self.max_retries} and {self.num_concurrent}"
            )


# ----------------------------------------------------------------------------------------------------
# One request
# ----------------------------------------------------------------------------------------------------


class ChatClient:
    """Asks one model of one server. Thread-safe."""

    def __init__(self, cfg: ApiConfig):
        """UserError where the key's environment variable is empty."""
        self.cfg = cfg
        self.closed = threading.Event()
        self.url = cfg.base_url.rstrip("/") + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        if cfg.api_key_env is not None:
            if not os.environ.get(cfg.api_key_env):
                raise UserError(
                    f"reward.api.api_key_env: the environment variable {cfg.api_key_env} is empty"
                )
            self.headers["Authorization"] = f"Bearer {os.environ[cfg.api_key_env]}"

    def ask(self, request: dict[str, Any]) -> "Answer":
        """UserError where the server refuses, at once, or after `max_retries` where waiting may help."""
        body = json.dumps({"model": self.cfg.model, **request}).encode()
        for attempt in range(self.cfg.max_retries + 1):
            wait_s = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)
            try:
                post = urllib.request.Request(self.url, body, self.headers)
                with urllib.request.urlopen(post, timeout=self.cfg.timeout_s) as response:
                    return self._first_answer(response.read())
            except urllib.error.HTTPError as error:
                message = ""
                with contextlib.suppress(OSError, HTTPException):  # an answer that is cut short
                    message = error.read().decode(errors="replace")[:300]
                if error.code not in WORTH_ANOTHER_TRY:
                    raise self._refusal(error.code, message) from error
                asked_s = error.headers.get("Retry-After", "")
                wait_s = min(float(asked_s), self.cfg.timeout_s) if asked_s.isdigit() else wait_s
                problem = f"answered {error.code}: {message}"
            except (OSError, HTTPException) as error:  # refused, reset, timed out, cut short
                problem = f"gave no answer ({getattr(error, 'reason', error) or type(error).__name__})"
            if attempt < self.cfg.max_retries and self.closed.wait(wait_s):
                raise UserError(f"reward.api: given up while {self.url} was asked again")
        tries = f"after {self.cfg.max_retries + 1} tries" if self.cfg.max_retries else "at the only try"
        raise UserError(
            f"reward.api: {self.url} {problem} {tries}; is the server running, and reward.api.base_url right?"
        )

    def _refusal(self, code: int, message: str) -> UserError:
        if code in (401, 403):
            key = self.cfg.api_key_env or "null: no key was sent"
            return UserError(f"reward.api: {self.url} refused the key (api_key_env: {key}): {code} {message}")
        if code == 404:
            return UserError(
                f"reward.api: {self.url} knows no model '{self.cfg.model}', or no chat under this base_url "
                f"(it usually ends in /v1): 404 {message}"
            )
        return UserError(f"reward.api: {self.url} refused the request: {code} {message}")

    def _first_answer(self, body: bytes) -> "Answer":
        try:
            choice = json.loads(body)["choices"][0]
            return Answer(
                choice["message"]["content"] or "", (choice.get("logprobs") or {}).get("content") or []
            )
        except (ValueError, LookupError, TypeError) as error:
            start = body[:200].decode(errors="replace")
            raise UserError(f"reward.api: {self.url} answered with no chat completion: {start}") from error


@dataclass
class Answer:
    text: str
    logprobs: list[dict[str, Any]]  # one entry per token; empty where the server tells none


def label_prob_of(answer: Answer, labels: tuple[str, ...]) -> list[float] | None:
    """Each label's probability, as that of its first token; None where the server told no logprobs, or where
    none of the likeliest tokens begins a label.

    A token belongs to the one label that it begins, whatever its case and the space or quote before it.
    """
    if not answer.logprobs:
        return None
    prob = [0.0] * len(labels)
    for candidate in answer.logprobs[0].get("top_logprobs") or answer.logprobs[:1]:
        token = candidate["token"].strip(" \t\n\"'*.`").lower()
        begun = [i for i, label in enumerate(labels) if token and label.lower().startswith(token)]
        if len(begun) == 1:
            prob[begun[0]] += math.exp(candidate["logprob"])
    return prob if sum(prob) > 0 else None


def data_url(frame: Tensor, image_format: str) -> str:
    """(H, W, 3) uint8 RGB -> data:image/...;base64,..."""
    buffer = io.BytesIO()
    Image.fromarray(frame.numpy()).save(buffer, image_format, quality=95)  # which png does not look at
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ----------------------------------------------------------------------------------------------------
# The reward model
# ----------------------------------------------------------------------------------------------------


class ServedVLMRewardModel(AskedAboutTask):
    """Scores by asking a server: `history_vlm` windows (label probabilities) or `vlm` images (a number).

    views: keys of the frames; window: frames of a window, None for a model of single images.
    """

    def __init__(
        self,
        api: ApiConfig,
        views: tuple[str, ...],
        window: int | None,
        input_builder_name: str,
        input_builder_params: InputBuilderParams,
        reward_parser_name: str,
        reward_parser_params: dict[str, Any],
        max_new_tokens: int = 16,
        meta: dict[str, Any] | None = None,
    ):
        """meta: what the model's checkpoint says of itself, where that is at hand; a server says nothing."""
        self.api, self.views, self.window, self.meta = api, tuple(views), window, meta or {}
        self.build = look_up(input_builder_name, INPUT_BUILDERS, "input_builder_name")
        standard = TEMPLATES.get(input_builder_name, TREND_TEMPLATE)
        self.template = self.meta.get("template") or input_builder_params.template or standard
        self._own_task = input_builder_params.default_task_description
        self.parser = make_parser(reward_parser_name, reward_parser_params)
        self.labels: tuple[str, ...] | None = getattr(self.parser, "labels", None)
        self.max_new_tokens = max_new_tokens
        self.client = ChatClient(api)
        self.pool = ThreadPoolExecutor(api.num_concurrent, thread_name_prefix="reward_api")
        self.asks_logprobs = api.logprobs != "off" and self.labels is not None
        self.lock = threading.Lock()  # around the change of mind about logprobs

    def score(self, frames: dict[str, Tensor], tasks: list[str] | None = None) -> Tensor:
        """frames: view -> (B, K, H, W, 3), for `vlm` (B, H, W, 3), uint8 RGB -> on the CPU, float32,
        label probabilities (B, L), a row of zeros where the answer is none of them; for `vlm` scores (B,).
        """
        pictures = {view: frames[view].cpu() for view in self.views}
        count = len(pictures[self.views[0]])
        tasks = [self.task] * count if tasks is None else tasks
        jobs = [
            self.pool.submit(self._judge, {view: images[i] for view, images in pictures.items()}, tasks[i])
            for i in range(count)
        ]
        try:
            answers = [job.result() for job in jobs]
        finally:
            for job in jobs:  # after an error, the rest is not asked any more
                job.cancel()
        width = () if self.labels is None else (len(self.labels),)
        return torch.tensor(answers, dtype=torch.float32).reshape(count, *width)

    def _judge(self, pictures: dict[str, Tensor], task: str) -> list[float] | float:
        """One window's or image's verdict: (L,) probabilities, or a score."""
        parts = self.build(task, self.views, self.window or 1, self.template)
        content = [piece for part in parts for piece in self._pieces(part, pictures)]
        request = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_new_tokens,
            "temperature": 0,
        }
        if self.api.send_videos_as == "video_url":
            # vLLM's processor would drop frames for its own frame rate
            request["mm_processor_kwargs"] = {"do_sample_frames": False}
        answer = self._ask(request)
        if self.labels is None:
            score = self.parser.parse(answer.text)
            return self.parser.invalid_score if math.isnan(score) else score
        prob = label_prob_of(answer, self.labels)
        if prob is not None:
            return prob
        label = self.parser.parse(answer.text)
        return [float(i == label and label != INVALID) for i in range(len(self.labels))]

    def _ask(self, request: dict[str, Any]) -> Answer:
        """The answer; in mode `auto` without logprobs from the first refusal of them on."""
        if not self.asks_logprobs:
            return self.client.ask(request)
        try:
            answer = self.client.ask({**request, "logprobs": True, "top_logprobs": TOP_LOGPROBS})
        except UserError as error:
            if "logprobs" not in str(error) or self.api.logprobs == "on":
                raise
            answer = self.client.ask(request)
        if answer.text and not answer.logprobs:  # an empty answer has no token to tell them of
            if self.api.logprobs == "on":
                raise UserError(
                    f"reward.api.logprobs: on, but {self.client.url} tells none; set it to auto to count the "
                    "word that it writes as certain"
                )
            with self.lock:
                if self.asks_logprobs:
                    print(
                        f"warning: {self.client.url} tells no logprobs; the word that it writes is "
                        "taken as certain",
                        file=sys.stderr,
                    )
                self.asks_logprobs = False
        return answer

    def _pieces(self, part: Part, pictures: dict[str, Tensor]) -> list[dict[str, Any]]:
        """A part of the question as the chat API says it."""
        if part.kind == "text":
            return [{"type": "text", "text": part.content}]
        frames = pictures[part.content]
        frames = frames[None] if frames.ndim == 3 else frames  # (K, H, W, 3)
        if part.kind == "video" and self.api.send_videos_as == "video_url":
            jpegs = ",".join(data_url(frame, "jpeg").partition(",")[2] for frame in frames)
            return [{"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{jpegs}"}}]
        shown = frames if part.kind == "video" else frames[-1:]
        urls = [data_url(frame, self.api.image_format) for frame in shown]
        images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        if part.kind == "image":
            return images
        # else nothing would say where one camera's frames end and the next one's begin
        camera = f"Camera {self.views.index(part.content) + 1}, {len(shown)} frames in order of time:"
        return [{"type": "text", "text": camera}, *images]

    def close(self) -> None:
        """Nothing is asked any more; what is being asked has until `timeout_s`, and no other try."""
        self.client.closed.set()
        self.pool.shutdown(wait=False, cancel_futures=True)


def load_served(cfg: Any, api: ApiConfig) -> ServedVLMRewardModel:
    """For a section `reward.model` of type vlm or history_vlm.

    `inference_mode: generate` asks for no logprobs. Of `lora_path` or `model_path` a `reward.json` alone is
    read, for the template; UserError where the section asks another question.
    """
    if cfg.model_type == "vlm":
        views, window = cfg.views, None
    else:
        (buffer, *_) = cfg.history_buffers.values()
        views, window = buffer.history_keys, buffer.history_size
    if cfg.inference_mode == "generate":
        api = replace(api, logprobs="off")
    meta = read_meta(cfg)
    model = ServedVLMRewardModel(
        api,
        tuple(views),
        window,
        cfg.input_builder_name,
        cfg.input_builder_params,
        cfg.reward_parser_name,
        cfg.reward_parser_params,
        cfg.max_new_tokens,
        meta,
    )
    if meta:
        check_meta(meta, cfg, {"views": model.views, "window": window or 1}, model.parser)
        if api.send_videos_as == "images":
            warnings.warn(
                f"{cfg.lora_path or cfg.model_path} was tuned on videos, and the server is sent images; set "
                "reward.api.send_videos_as to video_url",
                stacklevel=2,
            )
    return model

"""A served reward model against a small HTTP server that answers as a test says, and against a real one."""

import base64
import contextlib
import io
import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import reward_link, vlm_api
from common.files import save_json
from common.history import HistoryBufferConfig
from common.prompts import TREND_TEMPLATE, InputBuilderParams, fill
from common.qwen_reward import HistoryVLMRewardConfig
from common.reward_client import RewardClient
from common.reward_config import RewardConfig
from common.runtime import UserError
from common.vlm_api import Answer, ApiConfig, ServedVLMRewardModel, label_prob_of, load_served

ROOT = Path(__file__).resolve().parents[1]
VIEWS = ("main_images", "extra_view_images")
LABELS = ("positive", "negative", "unclear")


class Server(ThreadingHTTPServer):
    """`answer(request, number)` -> (status, body as a dict, headers); keeps what it was asked."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.requests, self.keys = answer, [], []
        self.lock, self.inside, self.most_inside = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append(request)
            server.keys.append(self.headers.get("Authorization"))
            server.inside += 1
            server.most_inside = max(server.most_inside, server.inside)
        assert self.path == "/v1/chat/completions"
        status, body, headers = server.answer(request, number)
        with server.lock:
            server.inside -= 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that no longer waits
            self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):
    """`serve(answer)` starts a server in a thread. Retries come at once."""
    monkeypatch.setattr(vlm_api, "FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(answer) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def said(text: str, top: dict[str, float] | None = None):
    """A completion; `top`: the likeliest first tokens and their probabilities."""
    choice = {"message": {"role": "assistant", "content": text}}
    if top is not None:
        tokens = [{"token": token, "logprob": math.log(prob)} for token, prob in top.items()]
        choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens}]}
    return 200, {"choices": [choice]}, {}


def model_of(server: Server | str, parser: str = "qwentrend_reward_parser", **api) -> ServedVLMRewardModel:
    trend = parser == "qwentrend_reward_parser"
    url = server if isinstance(server, str) else server.url
    return ServedVLMRewardModel(
        ApiConfig(base_url=url, **{"model": "judge", **api}),
        VIEWS,
        3 if trend else None,
        "qwentrend_input_builder" if trend else "base_vlm_input_builder",
        InputBuilderParams(default_task_description="Push the cube."),
        parser,
        {},
    )


def windows(count: int, window: tuple[int, ...] = (3,)) -> dict[str, torch.Tensor]:
    """Frames of one colour each: (window, position in it, view)."""
    frames = torch.zeros(count, *window, 8, 8, 3, dtype=torch.uint8)
    frames[..., 0] = torch.arange(count).reshape(-1, *[1] * (len(window) + 2))
    if window:
        frames[..., 1] = torch.arange(window[0]).reshape(-1, 1, 1)
    extra = frames.clone()
    extra[..., 2] = 1
    return {"main_images": frames, "extra_view_images": extra}


def pixel(url: str) -> tuple:
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    colours = np.asarray(picture).reshape(-1, 3)
    assert (colours == colours[0]).all()
    return tuple(colours[0].tolist())


def window_number(request: dict) -> int:
    return next(
        pixel(p["image_url"]["url"])[0] for p in request["messages"][0]["content"] if "image_url" in p
    )


# ----------------------------------------------------------------------------------------------------
# What is asked, what is understood
# ----------------------------------------------------------------------------------------------------


def test_what_a_window_looks_like_to_the_server(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server = serve(lambda request, number: said("positive", {"positive": 1.0}))
    model_of(server, api_key_env="JUDGE_KEY").score(windows(1))
    (request,) = server.requests
    assert server.keys == ["Bearer s3cret"]
    content = request.pop("messages")[0]["content"]
    assert request == {
        "model": "judge",
        "max_tokens": 16,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    kinds = [piece["type"] for piece in content]
    assert kinds == ["text", *["image_url"] * 3] * 2 + ["text"]
    assert [pixel(p["image_url"]["url"]) for p in content if p["type"] == "image_url"] == [
        (0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 1, 1), (0, 2, 1)
    ]  # fmt: skip
    assert content[0]["text"] == "Camera 1, 3 frames in order of time:"
    assert content[-1]["text"] == fill(TREND_TEMPLATE, "Push the cube.", 3)


def test_videos_go_as_vllms_list_of_jpegs(serve):
    server = serve(lambda request, number: said("positive", {"positive": 1.0}))
    model_of(server, send_videos_as="video_url").score(windows(1), tasks=["Lift."])
    content = server.requests[0]["messages"][0]["content"]
    assert [piece["type"] for piece in content] == ["video_url", "video_url", "text"]
    head, *jpegs = content[1]["video_url"]["url"].split(",")
    assert head == "data:video/jpeg;base64"
    assert [Image.open(io.BytesIO(base64.b64decode(jpeg))).size for jpeg in jpegs] == [(8, 8)] * 3
    assert content[-1]["text"] == fill(TREND_TEMPLATE, "Lift.", 3)
    assert server.requests[0]["mm_processor_kwargs"] == {"do_sample_frames": False}


def test_probabilities_are_the_first_tokens(serve):
    top = {" Positive": 0.5, "pos": 0.2, "NEG": 0.125, "un": 0.0625, "the": 0.1}
    server = serve(lambda request, number: said("Positive", top))
    assert model_of(server).score(windows(1)).tolist() == [pytest.approx([0.7, 0.125, 0.0625])]


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"positive": 0.25, '"': 0.25, "": 0.25}, [0.25, 0.0, 0.0]),
        ({"{": 0.9, "the": 0.1}, None),  # the answer begins otherwise: its text says more
        ({"positively": 0.9}, None),
    ],
)
def test_which_tokens_begin_a_label(top: dict, expected: list | None):
    tokens = [{"token": token, "logprob": math.log(prob)} for token, prob in top.items()]
    assert label_prob_of(Answer("", [{**tokens[0], "top_logprobs": tokens}]), LABELS) == expected


def test_a_token_that_begins_two_labels_counts_for_none():
    answer = Answer("", [{"token": "un", "logprob": 0.0, "top_logprobs": []}])
    assert label_prob_of(answer, ("unclear", "unsafe")) is None
    assert label_prob_of(answer, ("unclear", "safe")) == [1.0, 0.0]


def test_without_logprobs_the_word_counts_and_that_is_said_once(serve, capsys):
    texts = ["positive", '{"trend": "negative"}', "unclear.", "who knows", ""]
    server = serve(lambda request, number: said(texts[window_number(request)]))
    model = model_of(server)
    expected = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert model.score(windows(5)).tolist() == expected
    assert model.score(windows(5)).tolist() == expected
    assert capsys.readouterr().err.count("tells no logprobs") == 1
    assert "logprobs" not in server.requests[-1]


@pytest.mark.parametrize("logprobs", ["auto", "on"])
def test_an_empty_answer_says_nothing_of_logprobs(serve, capsys, logprobs):
    server = serve(lambda request, number: said("") if number == 0 else said("", {"negative": 1.0}))
    model = model_of(server, num_concurrent=1, logprobs=logprobs)
    assert model.score(windows(2)).tolist() == [[0, 0, 0], [0, 1, 0]]
    assert "logprobs" in server.requests[1]
    assert capsys.readouterr().err == ""


def test_a_server_that_refuses_logprobs_is_asked_without(serve):
    def answer(request, number):
        if "logprobs" in request:
            return 400, {"error": "unknown parameter: logprobs"}, {}
        return said("negative")

    server = serve(answer)
    assert model_of(server, num_concurrent=1).score(windows(2)).tolist() == [[0, 1, 0]] * 2
    assert len(server.requests) == 3
    with pytest.raises(UserError, match="unknown parameter: logprobs"):
        model_of(server, logprobs="on").score(windows(1))


def test_logprobs_on_insists(serve):
    server = serve(lambda request, number: said("positive"))
    with pytest.raises(UserError, match=r"logprobs: on, but .* tells none; set it to auto"):
        model_of(server, logprobs="on").score(windows(1))


def test_scores_of_single_images(serve):
    texts = ["0.25", "80%", "well", "1"]
    server = serve(lambda request, number: said(texts[window_number(request)]))
    scores = model_of(server, parser="base_vlm_reward_parser").score(windows(4, ()))
    assert scores.tolist() == pytest.approx([0.25, 0.8, 0.0, 1.0])
    content = server.requests[0]["messages"][0]["content"]
    assert [piece["type"] for piece in content] == ["image_url", "image_url", "text"]
    assert "logprobs" not in server.requests[0]


def test_the_configs_task_wins_over_the_envs(serve):
    server = serve(lambda request, number: said("positive", {"positive": 1.0}))
    model = model_of(server)
    assert model.task == "Push the cube."
    model.task = "the env's"  # what `RewardClient.set_task` does
    assert model.task == "Push the cube."
    model.score(windows(1))
    asked = server.requests[0]["messages"][0]["content"][-1]["text"]
    assert asked == fill(TREND_TEMPLATE, "Push the cube.", 3)


def test_nothing_to_score(serve):
    server = serve(lambda request, number: said("positive"))
    assert model_of(server).score(windows(0)).shape == (0, 3)
    assert server.requests == []


def test_a_model_section_says_what_is_asked(serve):
    server = serve(lambda request, number: said("positive", {"positive": 1.0}))
    section = HistoryVLMRewardConfig(
        history_buffers={"window": HistoryBufferConfig(history_size=3, history_keys=["main_images"])},
        input_builder_params=InputBuilderParams(template="{task}?"),
        max_new_tokens=4,
        inference_mode="generate",
    )
    model = load_served(section, ApiConfig(base_url=server.url, model="judge"))
    model.task = "Lift"
    assert (model.views, model.window, model.meta) == (("main_images",), 3, {})
    assert model.score(windows(1)).tolist() == [[1, 0, 0]]
    (request,) = server.requests
    assert request["max_tokens"] == 4
    assert "logprobs" not in request
    assert request["messages"][0]["content"][-1]["text"] == "Lift?"


def test_a_checkpoint_beside_the_server_tells_the_question(serve, tmp_path):
    """A tuned model that was asked by the standard template, or by another one, was asked in silence."""
    server = serve(lambda request, number: said("positive", {"positive": 1.0}))
    meta = {"model_type": "history_vlm", "prompt_version": 1, "template": "{task}?", "labels": list(LABELS)}
    meta |= {"views": list(VIEWS), "window": 3, "use_chat_template": True, "tasks": ["Lift"]}
    save_json({**meta, "input_builder_name": "qwentrend_input_builder"}, tmp_path / "reward.json")
    section = served_windows(server, lora_path=str(tmp_path)).model
    videos = ApiConfig(base_url=server.url, model="judge", send_videos_as="video_url")
    model = load_served(section, videos)
    model.task = "Lift"
    model.score(windows(1))
    assert server.requests[0]["messages"][0]["content"][-1]["text"] == "Lift?"
    assert model.meta["window"] == 3
    with pytest.warns(UserWarning, match="the task is 'Push', but the reward model was trained on 'Lift'"):
        model.task = "Push"
    with pytest.warns(
        UserWarning, match="was tuned on videos, .* set reward.api.send_videos_as to video_url"
    ):
        load_served(section, replace(videos, send_videos_as="images"))
    section.input_builder_params.template = "Now {task}!"
    with pytest.raises(UserError, match=r"another question: template: trained with \{task\}\?, here Now"):
        load_served(section, videos)


# ----------------------------------------------------------------------------------------------------
# Time and trouble
# ----------------------------------------------------------------------------------------------------


def test_requests_run_side_by_side_and_come_back_in_order(serve):
    def answer(request, number):
        time.sleep(0.02 * (8 - window_number(request)))  # the first window takes longest
        return said("", {LABELS[window_number(request) % 3]: 1.0})

    server = serve(answer)
    prob = model_of(server, num_concurrent=4).score(windows(8))
    assert prob.argmax(1).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert server.most_inside == 4


@pytest.mark.parametrize(("status", "headers"), [(429, {"Retry-After": "0"}), (503, {}), (500, {})])
def test_what_passes_is_tried_again(serve, status: int, headers: dict):
    server = serve(
        lambda request, number: said("", {"negative": 1.0}) if number == 2 else (status, {}, headers)
    )
    assert model_of(server).score(windows(1)).tolist() == [[0, 1, 0]]
    assert len(server.requests) == 3


def test_a_slow_answer_is_given_up_and_asked_for_again(serve):
    def answer(request, number):
        time.sleep(0.5 if number == 0 else 0)
        return said("", {"positive": 1.0})

    server = serve(answer)
    assert model_of(server, timeout_s=0.2).score(windows(1)).tolist() == [[1, 0, 0]]
    assert len(server.requests) == 2


def test_an_error_that_is_cut_short_is_one_all_the_same(serve):
    def answer(request, number):
        return (503, {}, {"Content-Length": "1000"}) if number == 0 else said("", {"positive": 1.0})

    server = serve(answer)
    assert model_of(server).score(windows(1)).tolist() == [[1, 0, 0]]


def test_retries_are_bounded_and_the_rest_is_not_asked(serve):
    server = serve(lambda request, number: (503, {"error": "loading"}, {}))
    with pytest.raises(UserError, match=r"answered 503: .*loading.* after 3 tries; is the server running"):
        model_of(server, max_retries=2, num_concurrent=1).score(windows(50))
    assert len(server.requests) <= 6  # of the first window, and of one that was under way


def served_windows(server: Server, **model) -> RewardConfig:
    """`reward` of a run that asks the server about windows of 3 frames, in this process."""
    buffers = {"window": HistoryBufferConfig(history_size=3)}
    return RewardConfig(
        use_reward_model=True,
        reward_mode="history_buffer",
        placement="inline",
        model=HistoryVLMRewardConfig(history_buffers=buffers, **model),
        api=ApiConfig(base_url=server.url, model="judge"),
    )


def test_closing_the_client_ends_the_retries(serve, monkeypatch):
    """Ctrl-C used to hang until the last of them."""
    monkeypatch.setattr(vlm_api, "FIRST_WAIT_S", 8.0)
    server = serve(lambda request, number: (503, {"error": "loading"}, {}))
    client, errors = RewardClient(served_windows(server)), []

    def ask():
        try:
            client.score(windows(2))
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while len(server.requests) < 2:
        time.sleep(0.005)
    start = time.monotonic()
    client.close()
    thread.join()
    assert time.monotonic() - start < 5
    assert errors == [f"reward.api: given up while {server.url}/chat/completions was asked again"]
    assert len(server.requests) == 2


def test_a_reward_server_closes_the_model_that_it_asks(serve, monkeypatch):
    asked = []

    def stop(model, *_):
        asked.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(reward_link, "serve", stop)
    with pytest.raises(KeyboardInterrupt):
        reward_link.serve_reward_model(served_windows(serve(None)), "tcp://127.0.0.1:0")
    assert asked[0].client.closed.is_set()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refused the key \(api_key_env: null: no key was sent\): 401"),
        (404, "knows no model 'judge', or no chat under this base_url"),
        (400, "refused the request: 400 .*why"),
        (200, "answered with no chat completion: .*why"),
    ],
)
def test_what_does_not_pass_is_said_at_once(serve, status: int, message: str):
    server = serve(lambda request, number: (status, {"error": "why"}, {}))
    with pytest.raises(UserError, match=message):
        model_of(server, num_concurrent=1).score(windows(1))
    assert len(server.requests) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nobody_there(serve):
    with pytest.raises(UserError, match=r"gave no answer .*refused.* after 2 tries; is the server running"):
        model_of(f"http://127.0.0.1:{free_port()}/v1", max_retries=1).score(windows(1))


def test_settings_that_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match=r"reward\.api\.model: give the name"):
        ApiConfig()
    with pytest.raises(ValueError, match="must start with http"):
        ApiConfig(model="m", base_url="localhost:8000")
    with pytest.raises(ValueError, match=r"num_concurrent from 1, got 60.0, 4 and 0"):
        ApiConfig(model="m", num_concurrent=0)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="the environment variable NO_SUCH_KEY is empty"):
        model_of("http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY")


# ----------------------------------------------------------------------------------------------------
# A real server
# ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tiny_qwen_behind_transformers_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It ignores logprobs and writes whatever an untrained model writes: rows are one label or none."""
    for extra in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(extra, reason="pip install 'transformers[serving]'")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder, port = tmp_path / "qwen", free_port()
    subprocess.run([sys.executable, str(ROOT / "benchmarks/tiny_qwen.py"), str(folder)], check=True)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"], stdout=log, stderr=log
        )
        try:
            wait_until_healthy(server, port, tmp_path / "server.log")
            frames = {view: torch.randint(0, 256, (3, 3, 64, 64, 3), dtype=torch.uint8) for view in VIEWS}
            model = model_of(f"http://127.0.0.1:{port}/v1", model=str(folder), num_concurrent=2)
            prob, again = model.score(frames), model.score(frames)
            answer = model.client.ask({"messages": [{"role": "user", "content": "Push?"}], "max_tokens": 2})
            with pytest.raises(UserError, match=r"refused the request: 400 .*requested 'another'"):
                model_of(f"http://127.0.0.1:{port}/v1", model="another").score(frames)
        finally:
            server.terminate()
            server.wait(timeout=20)
    assert prob.shape == (3, 3)
    assert set(prob.sum(1).tolist()) <= {0.0, 1.0}
    assert torch.equal(prob, again)
    assert not model.asks_logprobs
    assert answer.text


def wait_until_healthy(server: subprocess.Popen, port: int, log: Path) -> None:
    for _ in range(120):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text())

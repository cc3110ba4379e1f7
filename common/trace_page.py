"""One HTML file to look through episodes: their video, and on one time line what the reward model said of
each frame and what was true. Episodes with false positives come first.

The file needs no server and no network, and opens from the disk. Frames travel in it as WebP sheets, one per
episode and camera. How it looks and what its keys do is in `trace_page.html`, beside this module.
"""

import base64
import html
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.files import atomic_write, to_json
from common.rewards import reaches
from common.video import OPPOSITE, Trace

TEMPLATE = Path(__file__).with_suffix(".html")
MAX_SIDE = 256  # pixels; larger frames are made smaller
MAX_SHEET_SIDE = 16000  # pixels; WebP's limit is 16383
QUALITY = 80  # of WebP with loss,
LOSS_PAYS = 1.5  # taken where without loss the sheet would be so many times as large


def save_trace_page(
    traces: list[Trace], threshold: float, path: Path, title: str, fps: float, note: str = ""
) -> None:
    """Write the page, whole or not at all.

    threshold: of the score, at which a verdict is yes (of windows not shown); fps: frames per second when
    played; title and note are plain text. ValueError without a trace.
    """
    if not traces:
        raise ValueError("no episode to show")
    episodes = [_episode(trace, threshold) for trace in traces]
    # as many false positives as possible first, then misses; sort keeps the order of the rest
    episodes.sort(key=lambda episode: (-episode["false_positives"], -episode["missed"]))
    data = to_json({"threshold": threshold, "fps": fps, "episodes": episodes})
    # inside <script>, where only a "<" could end the data
    parts = {"TITLE": html.escape(title), "NOTE": html.escape(note), "DATA": data.replace("<", "\\u003c")}
    with atomic_write(path) as temporary:
        temporary.write_text(fill(TEMPLATE.read_text(encoding="utf-8"), parts), encoding="utf-8")


def fill(template: str, parts: dict[str, str]) -> str:
    """The template with each `{{NAME}}` replaced by its part. Parts that look like one are left alone."""
    first, *rest = template.split("{{")
    pieces = [first]
    for text in rest:
        name, _, after = text.partition("}}")
        pieces += [parts[name], after]
    return "".join(pieces)


def errors(trace: Trace, threshold: float) -> tuple[int, int]:
    """(false positives, misses): the steps on which the verdict was wrong."""
    wrong, verdict = trace.wrong(threshold), trace.verdict(threshold)
    return int((wrong & verdict).sum()), int((wrong & ~verdict).sum())


def _episode(trace: Trace, threshold: float) -> dict[str, Any]:
    """What the page knows of one episode; lists are of length T, None where there is nothing to say."""
    false_positives, missed = errors(trace, threshold)
    verdict = [
        bool(said) if asked else None
        for said, asked in zip(trace.verdict(threshold), trace.scored, strict=True)
    ]
    views = {"main camera": trace.frames, "second camera": trace.extra_frames}
    out = {
        "title": trace.title,
        "first_step": trace.first_step,
        "says": [trace.question, OPPOSITE[trace.question]],
        "truth_says": [trace.truth_of, OPPOSITE[trace.truth_of]],
        "score": [round(float(score), 4) for score in trace.score],
        "reaches": reaches(torch.from_numpy(trace.score), threshold) if trace.by_threshold else None,
        "verdict": verdict,
        "truth": [
            bool(true) if known else None for true, known in zip(trace.truth, trace.known, strict=True)
        ],
        "wrong": trace.wrong(threshold),
        "false_positives": false_positives,
        "missed": missed,
        "views": [{"name": name, **_sheet(frames)} for name, frames in views.items() if frames is not None],
    }
    if trace.label_prob is not None:
        prob = trace.label_prob.astype(float)
        # nothing where it was not asked, nor where its answer was none of the labels, a row of zeros
        label = np.where(np.nan_to_num(prob).any(1), np.nan_to_num(prob).argmax(1), -1)
        out["labels"], out["label_prob"] = trace.labels, prob.round(4)
        for name, numbers in (("label", label), ("true_label", trace.true_label)):
            if numbers is not None:
                out[name] = [None if number < 0 else trace.labels[number] for number in numbers]
    return out


def _sheet(frames: np.ndarray) -> dict[str, Any]:
    """frames (T, H, W, 3) uint8 -> a picture of them all, row by row, as a data URI, and how it is laid out.

    Without loss where that is about as small: drawn frames are, photographed ones are not.
    """
    count, height, width = frames.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = min(1, MAX_SIDE / max(height, width), MAX_SHEET_SIDE / (columns * max(height, width)))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    sheet = Image.new("RGB", (columns * size[0], rows * size[1]))
    for number, frame in enumerate(frames):
        picture = Image.fromarray(frame)
        picture = picture if scale == 1 else picture.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(picture, (number % columns * size[0], number // columns * size[1]))
    exact, lossy = _webp(sheet, lossless=True), _webp(sheet, quality=QUALITY)
    content = lossy if len(exact) > LOSS_PAYS * len(lossy) else exact
    uri = "data:image/webp;base64," + base64.b64encode(content).decode()
    return {"sheet": uri, "columns": columns, "width": size[0], "height": size[1]}


def _webp(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", **options)
    return buffer.getvalue()

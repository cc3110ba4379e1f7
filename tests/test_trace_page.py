"""The page of episodes: what is in the file, and what a browser makes of it, driven by keys and clicks."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.trace_page import MAX_SIDE, errors, fill, save_trace_page
from common.video import Trace

NAN = float("nan")
EVIL = "</script><script>document.title='pwned'</script><b>&amp;{{DATA}}"
LABELS = ("positive", "negative", "unclear")


def trace(score: list[float], truth: list[int], title: str, first_grey: int = 10, **more) -> Trace:
    """Frame t is one grey of its own, first_grey + 3 t, so that a picture tells which frame it is."""
    frames = np.zeros((len(score), 8, 10, 3), np.uint8)
    frames += (first_grey + 3 * np.arange(len(score), dtype=np.uint8))[:, None, None, None]
    return Trace(frames, np.array(score, np.float32), np.array(truth, bool), title, **more)


def three() -> list[Trace]:
    """At a threshold of 0.5: no mistake; one missed; two false positives, seen by two cameras."""
    fine = trace([0.1, NAN, 0.9], [0, 0, 1], "fine", 10)
    missed = trace([0.2, 0.4, 0.6], [0, 1, 1], EVIL, 40, known=np.array([False, True, True]), first_step=7)
    fooled = trace([0.1, 0.5, 0.7, 0.2], [0, 0, 0, 0], "fooled", 100)
    fooled.extra_frames = 255 - fooled.frames
    return [fine, missed, fooled]


def read(path: Path) -> tuple[str, dict]:
    """The page, and the data in it."""
    page = path.read_text(encoding="utf-8")
    return page, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def frame_of(view: dict, t: int) -> np.ndarray:
    content = base64.b64decode(view["sheet"].removeprefix("data:image/webp;base64,"))
    sheet = np.asarray(Image.open(io.BytesIO(content)))
    row, column = divmod(t, view["columns"])
    height, width = view["height"], view["width"]
    return sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]


# ----------------------------------------------------------------------------------------------------
# The file


def test_false_positives_come_first_and_all_is_there(tmp_path: Path):
    traces = three()
    assert [errors(trace, 0.5) for trace in traces] == [(0, 0), (0, 1), (2, 0)]
    save_trace_page(traces, 0.5, tmp_path / "traces.html", "a run", fps=10)
    assert [path.name for path in tmp_path.iterdir()] == ["traces.html"]
    _, data = read(tmp_path / "traces.html")
    fooled, missed, fine = data["episodes"]
    assert (data["threshold"], data["fps"]) == (0.5, 10)
    assert [e["title"] for e in data["episodes"]] == ["fooled", EVIL, "fine"]
    assert (fooled["false_positives"], fooled["missed"]) == (2, 0)
    assert fooled["verdict"] == [False, True, True, False]  # 0.5 reaches a threshold of 0.5
    assert fooled["wrong"] == [False, True, True, False]
    assert fooled["truth"] == [False] * 4 and fooled["score"] == [0.1, 0.5, 0.7, 0.2]
    assert missed["truth"] == [None, True, True] and missed["first_step"] == 7
    assert missed["wrong"] == [False, True, False]
    assert fine["score"] == [0.1, None, 0.9] and fine["verdict"] == [False, None, True]
    assert fine["says"] == fine["truth_says"] == ["success", "failure"]
    assert [view["name"] for view in fooled["views"]] == ["main camera", "second camera"]
    for t in range(4):
        np.testing.assert_array_equal(frame_of(fooled["views"][0], t), traces[2].frames[t])
        np.testing.assert_array_equal(frame_of(fooled["views"][1], t), traces[2].extra_frames[t])


def test_nothing_is_loaded_and_text_stays_text(tmp_path: Path):
    save_trace_page(three(), 0.5, tmp_path / "traces.html", EVIL, fps=10, note="<i>{{TITLE}}")
    page, _ = read(tmp_path / "traces.html")
    assert page.count("<script") == page.count("</script>") == 2
    assert page.count(html.escape(EVIL)) == 2  # tab and heading
    assert "&lt;i&gt;{{TITLE}}" in page
    addresses = set(re.findall(r"https?://[^\"' <)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, nothing to load
    assert "default-src 'none'; img-src data:;" in page


def test_a_part_that_looks_like_a_place_is_left_alone():
    assert fill("a {{X}} b {{Y}}", {"X": "{{Y}}", "Y": "y"}) == "a {{Y}} b y"


def test_a_held_verdict_is_shown_and_not_the_bare_score(tmp_path: Path):
    held = trace([0.6, 0.7, 0.1], [0, 0, 0], "held", said=np.array([False, True, True]))
    save_trace_page([held], 0.5, tmp_path / "traces.html", "a run", fps=10)
    (episode,) = read(tmp_path / "traces.html")[1]["episodes"]
    assert episode["verdict"] == episode["wrong"] == [False, True, True]
    assert episode["reaches"] == [True, True, False]


def test_windows_bring_their_labels(tmp_path: Path):
    prob = np.array([[NAN] * 3, [0.6, 0.1, 0.2], [0.1, 0.5, 0.2], [0, 0, 0]], np.float32)
    windows = trace([NAN, 0.67, 0.12, 0.0], [0, 0, 0, 1], "windows", question="positive", truth_of="positive")
    windows.labels, windows.label_prob, windows.true_label = LABELS, prob, np.array([-1, 2, 1, 0])
    windows.known = windows.true_label >= 0
    windows.said = np.array([False, True, False, False])
    save_trace_page([windows], 0.5, tmp_path / "traces.html", "a run", fps=10)
    (episode,) = read(tmp_path / "traces.html")[1]["episodes"]
    assert episode["labels"] == list(LABELS)
    assert episode["label"] == [None, "positive", "negative", None]  # the last answer was none of them
    assert episode["true_label"] == [None, "unclear", "negative", "positive"]
    assert episode["label_prob"][:2] == [[None] * 3, [0.6, 0.1, 0.2]]
    assert (episode["false_positives"], episode["missed"]) == (1, 1)
    assert episode["reaches"] is None  # no threshold is shown
    assert episode["truth"] == [None, False, False, True]
    assert episode["says"] == ["positive", "not positive"]


def test_large_frames_are_made_smaller_and_photographs_are_stored_with_loss(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (5, 150, 2 * MAX_SIDE, 3), dtype=np.uint8)
    shown = Trace(noise, np.zeros(5, np.float32), np.zeros(5, bool), "noise")
    save_trace_page([shown], 0.5, tmp_path / "traces.html", "a run", fps=10)
    (view,) = read(tmp_path / "traces.html")[1]["episodes"][0]["views"]
    assert (view["width"], view["height"], view["columns"]) == (MAX_SIDE, 75, 3)
    assert frame_of(view, 4).shape == (75, MAX_SIDE, 3)
    assert len(view["sheet"]) < 5 * 75 * MAX_SIDE * 3


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "traces.html"
    save_trace_page(three(), 0.5, path, "old", fps=10)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no episode to show"):
        save_trace_page([], 0.5, path, "new", fps=10)
    with pytest.raises(TypeError):
        save_trace_page(three(), 0.5, path, "new", fps=object())
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# ----------------------------------------------------------------------------------------------------
# In a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed: {', '.join(BROWSERS)}")

# Runs after the page's own script, as its user: presses keys, clicks, and notes what is shown.
DRIVER = """
const told = [];
// the page's own canvas would warn of being read
const scratch = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const key = (name, more = {}) => document.body.dispatchEvent(
  new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true, ...more }));
const click = (selector) => document.querySelector(selector).click();
const wait = (ms = 0) => new Promise((done) => setTimeout(done, ms));
function point(kind, share, row = 80) {   // at a share of the plot's width
  const box = document.querySelector("#time").getBoundingClientRect();
  const x = box.left + PLOT.left + share * (box.width - PLOT.left - PLOT.right);
  const at = { clientX: x, clientY: box.top + row, buttons: 1, bubbles: true };
  document.querySelector("#time").dispatchEvent(new PointerEvent(kind, at));
}
async function note(what) {
  await wait(5);
  const greys = [...document.querySelectorAll("#views canvas")].map((canvas) => {
    scratch.drawImage(canvas, 0, 0);
    return scratch.getImageData(4, 4, 1, 1).data[0];
  });
  const text = (selector) => document.querySelector(selector).textContent;
  told.push([what, { episode: text("#stage h2"), place: text("#place"), step: text("#readout .step"),
    says: [...document.querySelectorAll("#readout dd:not(.meter)")].map((x) => x.textContent),
    mistake: document.querySelector("#mistake").hidden ? null : text("#mistake"), greys,
    labels: [...document.querySelectorAll("#labels > div")].map((x) => [x.className, x.textContent]),
    listed: [...document.querySelectorAll("#list li")].filter((x) => x.offsetParent).map((x) => x.title),
    totals: [...document.querySelectorAll("#totals li")].map((x) => x.textContent),
    legend: [...document.querySelectorAll("#legend li")].map((x) => x.textContent),
    marks: ["false-positive", "missed"].map((name) => document.querySelectorAll(`#time .${name}`).length),
    cursor: document.querySelector("#cursor").transform.baseVal[0]?.matrix.e,
    wide: document.documentElement.scrollWidth - innerWidth,
    none: document.querySelector("#none").offsetParent ? text("#none div") : null, play: text("#play") }]);
}
(async () => {
  await Promise.all(episodes.flatMap((e) => e.views.map(load)));
  STEPS
  const pre = document.createElement("pre");
  pre.id = "told";
  pre.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(told))));
  document.body.append(pre);
})();
"""


def browse(page: Path, steps: str, width: int = 1400) -> tuple[dict[str, dict], list[str]]:
    """Open the page from the disk, take the steps (JavaScript). -> what was noted, lines of the console."""
    driven = page.with_name("driven.html")
    script = f"<script>{DRIVER.replace('STEPS', steps)}</script></body>"
    driven.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={page.parent}/browser", f"--window-size={width},900"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", driven.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="told">([^<]*)</pre>', done.stdout)
    assert found, f"the steps did not end; the console says {console}"
    return dict(json.loads(base64.b64decode(found[1]))), console


@needs_browser
def test_a_user_scrubs_through_the_episodes(tmp_path: Path):
    page = tmp_path / "traces.html"
    save_trace_page(three(), 0.5, page, EVIL, fps=10)
    at, console = browse(
        page,
        """
        await note("start");
        key("ArrowRight"); key("ArrowRight"); await note("two right");
        key("ArrowRight"); await note("not beyond the end");
        key("Home"); await note("home");
        key("ArrowRight", { shiftKey: true }); await note("ten right");
        key("ArrowLeft"); await note("left");
        point("pointerdown", 0.3); await note("click");
        point("pointermove", 0.99); await note("drag");
        key("ArrowDown"); await note("next episode");
        key("ArrowDown"); await note("last episode");
        key("ArrowDown"); await note("still the last");
        key("p"); await note("mistake before");
        key("p"); await note("another one");
        key("n"); await note("and back");
        click("#list li:nth-child(1)"); await note("clicked in the list");
        key("Home"); key(" "); await note("plays"); await wait(250); await note("has played");
        key(" "); await note("stopped"); await wait(300); await note("stays");
        click("#play"); await wait(2000); await note("to the end");
        """,
    )
    assert console == []
    start = at["start"]
    assert start["episode"] == "fooled" and start["place"] == "1 of 3"
    assert start["step"] == "step 1 of 3"  # where it first goes wrong
    assert start["says"] == ["0.500 ≥ 0.5", "success", "failure"] and start["mistake"] == "False positive"
    assert start["greys"] == [103, 255 - 103] and start["marks"] == [2, 0]
    assert start["listed"] == ["fooled", EVIL, "fine"]
    assert start["totals"] == [
        "3episodes",
        "10frames",
        "2false positives in 1 episode",
        "1missed in 1 episode",
        "0.5threshold",
    ]
    assert at["two right"]["step"] == "step 3 of 3" and at["two right"]["greys"] == [109, 255 - 109]
    assert at["two right"]["mistake"] is None and at["two right"]["says"] == ["0.200 < 0.5", *["failure"] * 2]
    assert at["not beyond the end"] == at["two right"]
    assert at["home"]["step"] == "step 0 of 3" and at["home"]["greys"] == [100, 255 - 100]
    assert at["ten right"]["step"] == "step 3 of 3" and at["left"]["step"] == "step 2 of 3"
    assert at["home"]["cursor"] < at["left"]["cursor"] < at["ten right"]["cursor"]
    assert at["click"]["step"] == "step 1 of 3" and at["drag"]["step"] == "step 3 of 3"
    assert at["next episode"]["episode"] == EVIL and at["next episode"]["mistake"] == "Missed"
    assert at["next episode"]["step"] == "step 8 of 9" and at["next episode"]["greys"] == [43]
    assert at["next episode"]["marks"] == [0, 1]
    assert at["last episode"]["episode"] == "fine" and at["last episode"]["step"] == "step 0 of 2"
    assert at["still the last"] == at["last episode"]
    assert at["mistake before"]["episode"] == EVIL and at["mistake before"]["step"] == "step 8 of 9"
    assert at["another one"]["episode"] == "fooled" and at["another one"]["step"] == "step 1 of 3"
    assert at["and back"] == at["mistake before"]
    assert at["clicked in the list"] == start
    assert (at["plays"]["play"], at["plays"]["step"]) == ("Pause", "step 0 of 3")
    assert at["has played"]["step"] == "step 2 of 3"  # 10 frames per second
    assert at["stopped"]["play"] == "Play" and at["stays"]["step"] == "step 2 of 3"
    assert (at["to the end"]["play"], at["to the end"]["step"]) == ("Play", "step 3 of 3")


@needs_browser
def test_episodes_are_filtered_and_found(tmp_path: Path):
    page = tmp_path / "traces.html"
    save_trace_page(three(), 0.5, page, "a run", fps=10)
    at, console = browse(
        page,
        """
        const type = (text) => { const box = document.querySelector("#search");
          box.value = text; box.dispatchEvent(new Event("input")); };
        click("[data-name='Missed']"); await note("missed");
        key("ArrowDown"); await note("the only one");
        click("[data-name='No mistake']"); await note("no mistake");
        type("foo"); await note("nothing left");
        click("#none button"); await note("all again");
        type("FOO"); await note("found");
        """,
        width=700,
    )
    assert console == []
    assert at["missed"]["listed"] == [EVIL] and at["missed"]["episode"] == EVIL
    assert at["missed"]["place"] == at["the only one"]["place"] == "1 of 1"
    assert at["no mistake"]["listed"] == ["fine"] and at["no mistake"]["episode"] == "fine"
    assert at["nothing left"]["listed"] == []
    assert at["nothing left"]["none"] == "No episode here has “foo” in its name."
    assert at["all again"]["listed"] == ["fooled", EVIL, "fine"] and at["all again"]["none"] is None
    assert at["found"]["listed"] == ["fooled"]
    assert all(noted["wide"] <= 0 for noted in at.values())  # nothing sticks out of a narrow window


@needs_browser
def test_windows_show_label_and_probability(tmp_path: Path):
    prob = np.array([[NAN] * 3, [0.6, 0.1, 0.2]], np.float32)
    windows = trace([NAN, 0.67], [0, 0], "windows", question="positive", truth_of="positive")
    windows.labels, windows.label_prob, windows.true_label = LABELS, prob, np.array([-1, 2])
    windows.known, windows.said = windows.true_label >= 0, np.array([False, True])
    save_trace_page([windows], 0.5, tmp_path / "traces.html", "a run", fps=10)
    at, console = browse(tmp_path / "traces.html", 'await note("start"); key("Home"); await note("home");')
    assert console == []
    assert at["start"]["says"] == ["0.670", "positive", "unclear"]
    assert at["start"]["labels"] == [["chosen", "positive0.60"], ["", "negative0.10"], ["", "unclear0.20"]]
    assert at["start"]["mistake"] == "False positive"
    assert at["home"]["says"] == ["not scored", "–", "–"] and at["home"]["mistake"] is None


@needs_browser
def test_episodes_that_no_model_scored_show_the_truth(tmp_path: Path):
    save_trace_page([trace([NAN] * 2, [0, 1], "seen")], 1.0, tmp_path / "traces.html", "a run", fps=10)
    at, console = browse(tmp_path / "traces.html", 'await note("start"); key("End"); await note("end");')
    assert console == []
    assert at["start"]["totals"][2:] == ["No reward model was asked: only the truth is shown."]
    assert at["start"]["says"] == ["failure"] and at["end"]["says"] == ["success"]
    assert at["start"]["marks"] == [0, 0]
    assert at["start"]["legend"] == ["success", "failure"]


@needs_browser
def test_the_console_is_heard(tmp_path: Path):
    """Else the tests above could not fail by it."""
    save_trace_page(three(), 0.5, tmp_path / "traces.html", "a run", fps=10)
    _, console = browse(tmp_path / "traces.html", "setTimeout(() => nobody()); await wait(20);")
    assert len(console) == 1 and "nobody is not defined" in console[0]

"""A person looks at frames that the reward model got wrong, one by one, and says what is true.

    python collect.py --review RUN/hard

Each answer is in the file (`common.hard_frames`) before the next frame is shown, so stopping loses nothing
and the next start goes on with what has not been looked at.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.episodes import VIEWS, read_episode
from common.files import atomic_write
from common.hard_frames import HardFrame, list_hard, relabel
from common.keyboards import AnyKeyboard
from common.session import FINISH, LABEL_KEYS, UNDO

SKIP = " "
HELP = "c success, a fail, space skip, u back, q quit"
PICTURE = "review.png"
MAX_COLUMNS = 80
WORDS = {True: "success", False: "failure", None: "unknown"}


def review(folder: Path, keyboard: AnyKeyboard, say: Callable[[str], None] = print) -> int:
    """Ask about each frame of `folder` that no person has looked at. -> how many were answered.

    The frame is drawn in the terminal where that shows colours, and is in `folder`/review.png in any case.
    UserError where there is nothing of the kind.
    """
    everything = list_hard(folder)
    todo = [hard for hard in everything if not hard.reviewed]
    say(f"{folder}: {len(everything)} frames, {len(todo)} not looked at yet. {HELP}")
    answered, at, keys = set(), 0, pressed(keyboard)
    picture = folder / PICTURE
    try:
        while at < len(todo):
            show(todo[at], picture, f"{at + 1}/{len(todo)}", say)
            key = next(keys)
            if key == FINISH:
                break
            if key in LABEL_KEYS:
                relabel(todo[at], bool(LABEL_KEYS[key]))
                answered.add(at)
                say(f"  -> {WORDS[todo[at].success]}")
            at = max(0, at - 1) if key == UNDO else at + 1
    finally:
        picture.unlink(missing_ok=True)
    left = sum(hard.success is None for hard in todo)
    say(f"{len(answered)} answered; {left} of {len(everything)} frames have no label yet")
    return len(answered)


def pressed(keyboard: AnyKeyboard) -> Iterator[str]:
    """The keys that mean something here, as they are pressed; waits for each."""
    while True:
        yield from (key for key in keyboard.read() if key in (SKIP, UNDO, FINISH, *LABEL_KEYS))
        time.sleep(0.02)


def show(hard: HardFrame, picture: Path, number: str, say: Callable[[str], None]) -> None:
    """Both views side by side, with what the model and the env say."""
    episode = read_episode(hard.path, views=None)
    frame = np.concatenate([episode.images[view][-1] for view in VIEWS if view in episode.images], axis=1)
    write_picture(frame, picture)
    if sys.stdout.isatty():
        say("\n" + terminal_picture(frame, MAX_COLUMNS))
    verdict = "a success" if hard.called else "no success"
    truth = "by you" if hard.reviewed else "by the env"
    truth = "unknown" if hard.success is None else f"{WORDS[hard.success]} ({truth})"
    score = f"score {hard.success_prob:.3f}, the model says {verdict}"
    say(f"{number}  {score}; truth: {truth}   {hard.path.name}")


def write_picture(frame: np.ndarray, path: Path, least: int = 384) -> None:
    """A PNG, enlarged by a whole number so that pixels stay squares. frame (H, W, 3) uint8."""
    from matplotlib.image import imsave

    scale = max(1, least // frame.shape[0])
    with atomic_write(path) as temporary:
        imsave(temporary, frame.repeat(scale, 0).repeat(scale, 1), format="png")


def terminal_picture(frame: np.ndarray, max_columns: int) -> str:
    """Two pixels to a character: an upper half block, its colour over that of the background. frame (H, W, 3)
    uint8, averaged down where it is wider than `max_columns`."""
    height, width = frame.shape[:2]
    columns = min(width, max_columns)
    rows = max(2, round(height * columns / width / 2) * 2)
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    small = F.interpolate(pixels, (rows, columns), mode="area")[0].permute(1, 2, 0).byte().tolist()

    def cell(upper: list[int], lower: list[int]) -> str:
        (r, g, b), (x, y, z) = upper, lower
        return f"\x1b[38;2;{r};{g};{b};48;2;{x};{y};{z}m\u2580"

    lines = [
        "".join(cell(upper, lower) for upper, lower in zip(small[row], small[row + 1], strict=True))
        for row in range(0, rows, 2)
    ]
    return "\n".join(f"{line}\x1b[0m" for line in lines)

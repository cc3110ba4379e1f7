"""Frames that the reward model gets wrong, kept one by one: what to look at, and what to learn from next.

**Hard frame**: an episode file of `common.episodes` with one step (T = 1), so that whatever reads episodes
reads it. Its second observation is the frame; the first, which stands for the reset, is black and means
nothing. `infos[1]` is what the env said of the step, and besides: `success_prob` (float); `called` (bool), it
reaches the threshold; `success` (bool), the truth of what the model has learned to tell, which is absent
where nobody knows it yet; `reviewed` (True) once a person has said so.

`rl_train.py` keeps them (`reward.keep_hard`), `collect.py --review` labels them, and `preprocess_resnet.py
--add` puts them into the training data.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common.episodes import EpisodeWriter, episode_name, list_episodes, write_episode
from common.files import load_pickle
from common.rewards import reaches
from common.runtime import UserError

SURE = 0.5  # a score on the wrong side of it is hard, whatever the threshold
UNSURE = (0.2, 0.8)  # without a truth: scores between them are worth a look


class HardFrames:
    """Picks hard frames out of a rollout and hands them to a writer: of each env's episode one per kind at
    most, as neighbours look alike, and `limit` in all, or since the last `renew`.

    With a truth: failures that reach the threshold or score SURE, and successes that do not. Without one:
    whatever reaches the threshold, or scores UNSURE. A frame that was never scored is none.
    """

    def __init__(
        self,
        writer: EpisodeWriter,
        limit: int,
        action_dim: int,
        facts: dict[str, Any],
        knows: bool = True,
        label: str = "success",
    ):
        """facts: `task`, `task_description`, `render`, `control` of the envs; knows: whether what they say is
        the truth; label: what of it the model has learned, where they say that (else `success`)."""
        self.writer, self.limit, self.facts, self.knows = writer, limit, facts, knows
        self.action_dim, self.label = action_dim, label
        self.num_kept = self.num_steps = 0
        self.room = limit
        self._kept: set[tuple[int, bool | None]] = set()  # env, and the kind kept of its episode

    def renew(self) -> None:
        """Those kept so far have been learned from: there is room for `limit` more."""
        self.room = self.limit

    def keep(
        self,
        frames: dict[str, Tensor],
        env_ids: Tensor,
        success_prob: Tensor,
        threshold: float,
        info: dict[str, Tensor],
        done: Tensor,
    ) -> None:
        """After one step of N envs, in order of time. frames: view -> (M, H, W, 3) uint8 of the envs in
        env_ids (M,); success_prob (N,), nan: not scored; info: name -> (N,), `success` among them; done (N,)
        bool."""
        self.num_steps += len(done)
        if self.room:
            success_prob = success_prob.cpu()
            called = reaches(success_prob, threshold).tolist()
            info = {
                name: value.cpu() for name, value in info.items()
            }  # at once: a GPU is waited for only here
            for row, env in enumerate(env_ids.tolist()):
                self._look(frames, row, env, float(success_prob[env]), called[env], info)
        self._kept -= {(env, kind) for env, kind in self._kept if done[env]}

    def _look(self, frames: dict, row: int, env: int, prob: float, called: bool, info: dict) -> None:
        truth = bool(info.get(self.label, info["success"])[env]) if self.knows else None
        if self.knows:
            hard = called != truth or (prob >= SURE) != truth
        else:
            hard = called or UNSURE[0] <= prob <= UNSURE[1]
        if not hard or math.isnan(prob) or (env, truth) in self._kept or not self.room:
            return
        self._kept.add((env, truth))
        self.num_kept, self.room = self.num_kept + 1, self.room - 1
        said = {name: value[env].item() for name, value in info.items()} if self.knows else {}
        said |= {"success": truth} if self.knows else {}
        self.writer.put(
            {
                "rank": 0,
                "env_idx": env,
                "step": self.num_steps,
                "success": bool(truth),
                "observations": _observations({view: images[row] for view, images in frames.items()}),
                "actions": [np.zeros(self.action_dim, np.float32)],
                "rewards": [0.0, 0.0],
                "terminated": [False, False],
                "truncated": [False, True],
                "infos": [{}, {**said, "success_prob": prob, "called": called}],
                **self.facts,
            }
        )


def _observations(shown: dict[str, Tensor]) -> list[dict[str, np.ndarray]]:
    """A black reset and the frame, each view as episodes have it."""
    frame = {view: image.cpu().numpy().copy() for view, image in shown.items()}
    if "extra_view_images" in frame:
        frame["extra_view_images"] = frame["extra_view_images"][None]  # (V=1, H, W, 3)
    return [{view: np.zeros_like(image) for view, image in frame.items()}, frame]


# ----------------------------------------------------------------------------------------------------
# Looking at them again


@dataclass
class HardFrame:
    """One of them, without its pixels."""

    path: Path
    success_prob: float
    called: bool  # a success, by the model
    success: bool | None  # the truth; None: nobody knows
    reviewed: bool  # by a person

    @property
    def error(self) -> float:
        """How far off the score is, to sort by; what nobody knows comes first."""
        return 2.0 if self.success is None else abs(self.success - self.success_prob)


def list_hard(folder: str | Path) -> list[HardFrame]:
    """Those in `folder`, the unknown first, then the most wrong. UserError where it holds other episodes."""
    found = []
    for path in list_episodes(folder):
        info = load_pickle(path)["infos"][-1]
        if "called" not in info:
            raise UserError(f"{path} is no hard frame; name a folder that reward.keep_hard filled")
        success = bool(info["success"]) if "success" in info else None
        found.append(HardFrame(path, info["success_prob"], info["called"], success, "reviewed" in info))
    return sorted(found, key=lambda hard: (-hard.error, hard.path))


def relabel(hard: HardFrame, success: bool) -> None:
    """Write a person's word into the file, whose name tells the outcome too. Nothing is lost or doubled
    whenever this stops: an interrupted one is asked about again."""
    episode = load_pickle(hard.path)
    episode["infos"][1] |= {"success": success, "reviewed": True}
    episode["success"] = success
    parts = (episode[key] for key in ("rank", "env_idx", "episode_id", "step"))
    hard.path = hard.path.rename(hard.path.with_name(episode_name(*parts, success)))
    write_episode(hard.path.parent, episode)
    hard.success, hard.reviewed = success, True

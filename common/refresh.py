"""The reward model learns from its mistakes while the policy learns from it (`reward.refresh_every`).

Each time the same commands run that a user would type: `preprocess_resnet.py --add` joins the hard frames
kept so far to a copy of the train split, `train_resnet.py` goes on from the model in use and chooses the
threshold anew. Unless it has forgotten more than its validation frames leave in doubt, the reward client then
takes the new checkpoint, and what lies in the replay buffer is paid once more.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.buffers import ReplayBuffer
from common.files import load_json
from common.frame_report import side_by_side
from common.hard_frames import HardFrames
from common.reward_client import RewardClient
from common.reward_config import RewardConfig
from common.rewards import worth
from common.runtime import UserError

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 1024  # frames paid again at once


class JudgedFrames:
    """The frames that the newest transitions of a replay buffer were paid for: a ring of `capacity`, uint8 on
    the CPU. Of older transitions the pay stays as it is. Frames are in no checkpoint."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.num_transitions = 0  # that have been added since the start, with a frame or without
        self.num_frames = 0  # likewise
        self.frames: dict[str, Tensor] = {}  # view -> (capacity, H, W, 3) uint8
        self.paid = torch.zeros(capacity)  # what the frame has brought its transition, weight included
        self.transition = torch.zeros(capacity, dtype=torch.long)  # its number since the start

    def __len__(self) -> int:
        return min(self.num_frames, self.capacity)

    def add(self, frames: dict[str, Tensor], env_ids: Tensor, paid: Tensor) -> None:
        """One step of N envs, whose N transitions go into the buffer next. frames: view -> (M, H, W, 3) uint8
        of the envs in env_ids (M,); paid (N,): reward_weight * model_reward."""
        count = len(env_ids)
        if count:
            where = (self.num_frames + torch.arange(count)) % self.capacity
            for view, images in frames.items():
                if view not in self.frames:  # pages of zeros take no memory until they are written
                    self.frames[view] = torch.zeros((self.capacity, *images.shape[1:]), dtype=torch.uint8)
                self.frames[view][where] = images.cpu()
            self.paid[where] = paid.cpu()[env_ids]
            self.transition[where] = self.num_transitions + env_ids
            self.num_frames += count
        self.num_transitions += len(paid)

    def pay_again(self, buffer: ReplayBuffer, client: RewardClient, weight: float) -> int:
        """Replace what these frames have brought by what the client's model says of them now. -> how many."""
        age = self.num_transitions - self.transition[: len(self)]  # 1: the newest transition
        kept = (age <= len(buffer)).nonzero().squeeze(1)
        for rows in kept.split(CHUNK):
            prob = client.score({view: self.frames[view][rows] for view in client.views}).success_prob.cpu()
            apart = torch.ones(1, len(rows), dtype=torch.bool)  # each is decided for itself
            paid = weight * worth(prob, client.decision(len(rows))(prob[None], apart)[0])
            slots = ((buffer.next_slot - age[rows]) % buffer.capacity).to(buffer.device)
            buffer.reward[slots] += (paid - self.paid[rows]).to(buffer.device)
            self.paid[rows] = paid
        return len(kept)


class Refresher:
    """Fine-tunes the client's model on the hard frames of a run, in `folder`/refresh."""

    def __init__(
        self,
        cfg: RewardConfig,
        folder: Path,
        client: RewardClient,
        hard: HardFrames,
        say: Callable[[str], None],
        before: str | None = None,
    ):
        """before: the checkpoint that an earlier run was refreshed to, whose hard frames lie beside it."""
        self.cfg, self.folder, self.client, self.hard, self.say = cfg, folder, client, hard, say
        self.memory = JudgedFrames(cfg.refresh_memory)
        self.num_learned = 0  # hard frames that the model has been shown
        base = Path(cfg.refresh_data) if before is None else Path(before).parent.parent
        self.base = base / "train.pt"  # what it had learned from before this run
        if not self.base.exists():
            raise UserError(f"{self.base} is gone, from which the reward model {before} has learned")

    def due(self, before: int, now: int) -> bool:
        """Whether a multiple of refresh_every lies in (before, now]."""
        return before // self.cfg.refresh_every != now // self.cfg.refresh_every

    def refresh(self, step: int) -> bool:
        """Learn from the hard frames, and let the client judge by what came of it. -> False where the model
        in use stays: there were no new ones, or what came is worse. Nothing may be under way to it. UserError
        where a command fails."""
        if self.hard.num_kept == self.num_learned:
            self.say(f"step {step:,}: no new hard frames, so the reward model stays as it is")
            return False
        self.hard.writer.flush()
        self.num_learned = self.hard.num_kept
        data, train = Path(self.cfg.refresh_data), self.folder / "refresh" / "train.pt"
        run = self.folder / "refresh" / f"step_{step:08}"
        _run(
            "preprocess_resnet.py",
            f"--add={self.hard.writer.folder}",
            f"--output-dir={self.base.parent}",
            f"--val-output-path={data / 'val.pt'}",
            f"--train-output-path={train}",
        )
        _run(
            "train_resnet.py",
            self.cfg.refresh_config,
            f"actor.model.model_path={self.client.cfg.model.model_path}",
            f"data.train_data_paths={train}",
            f"data.val_data_paths={data / 'val.pt'}",
            f"runner.logger.log_path={run}",
            "runner.max_epochs=-1",
            f"runner.max_steps={self.cfg.refresh_steps}",
            f"runner.val_check_interval={self.cfg.refresh_steps}",  # so that the last step is what is kept
        )
        self.hard.renew()
        compared = load_json(run / "summary.json")["compared"]
        table = side_by_side(**compared)
        self.say(f"step {step:,}: the reward model has learned from {self.num_learned} hard frames\n{table}")
        old, new = (compared[name]["scores"]["auprc"] for name in ("old", "new"))
        lowest = old["value"] if old["interval"] is None else old["interval"][0]
        if new["value"] < lowest:
            self.say(
                f"step {step:,}: the new one has forgotten too much (AUPRC), so the old one stays in use"
            )
            return False
        self.client.swap(str(run / "checkpoint"))
        return True


def _run(script: str, *arguments: str) -> None:
    """One of the project's scripts, in silence; UserError with its last line where it fails."""
    # threads that wait for each other sleep: the envs' processes use the cores too
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise UserError(f"reward.refresh_every: {script} ended with code {done.returncode}: {last}")

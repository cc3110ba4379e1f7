"""RL at an arm: devices, arm, cameras and reward model in this process, as envs to learn and be measured in.

    with open_robot(cfg.env.train, cfg.devices, cfg.reward, seed) as robot:
        Rollout(robot.training, ...); evaluate(robot.evaluation, ...)

Both are the same arm: who goes over from one to the other begins with a `reset`. The operator may take over
at any time; what is stored is the action that was executed. Keys: space pause, `q` or Ctrl-C end the run. An
arm that is lost is recovered by space (`common.session`): its episode is cut, and learning goes on.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from common.devices import DevicesConfig, hid_reports
from common.envs import Step
from common.franka_config import FrankaConfig
from common.reward_client import RewardClient, make_reward_client
from common.reward_config import RewardConfig
from common.reward_link import make_judge
from common.robot_envs import RobotEnvs, check_pictures, rewarded_by
from common.scripted_operator import ScriptedOperator
from common.session import Session, StatusLine, open_session

HELPS_IN = 0.5  # share of the training episodes in which the scripted operator takes over
HELPS_WITHIN = 0.5  # share of an episode within which it does


class HelpingOperator(ScriptedOperator):
    """An operator made of code who lets the policy try, and in some episodes, after a while, brings the arm
    to the target. `begin_episode` before each."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self._idle_steps = np.inf

    def begin_episode(self, hands_off: bool) -> None:
        self._idle_steps = np.inf
        if not hands_off and self.rng.random() < HELPS_IN:
            self._idle_steps = self.rng.integers(
                0, max(1, int(HELPS_WITHIN * self._env.cfg.max_episode_steps))
            )
            self._begin("stay")

    def _reports(self, step: int) -> list[bytes]:
        if self._idle_steps > 0 or self._left == 0:  # not yet, or it has been there
            self._idle_steps -= 1
            return hid_reports(np.zeros(6))
        return super()._reports(step)


class OperatedEnvs(RobotEnvs):
    """A session as envs; its status line tells who drives.

    Where a reward model inside pays, `Step.info` has success_prob too (nan: late), which tells the loops that
    nobody else is to judge (`common.judging.judged_inside`). hands_off: the policy is to be measured.
    KeyboardInterrupt at `q`.
    """

    def __init__(self, session: Session, hands_off: bool, judged: bool):
        super().__init__(session, session.cfg)
        self.session, self.hands_off, self.judged = session, hands_off, judged
        self.name = "evaluation, hands off" if hands_off else "training"
        self.num_episodes = 0
        if judged:
            self.spec.info_types["success_prob"] = torch.float32

    def reset(self, seed: int | None) -> torch.Tensor:
        self._end_at_q()
        self.num_episodes += 1
        self.session.line.show(f"{self.name}: the arm goes to its start")
        if isinstance(self.session.keyboard, HelpingOperator):
            self.session.keyboard.begin_episode(self.hands_off)
        obs = super().reset(seed)
        self._end_at_q()
        return obs

    def step_wait(self) -> Step:
        step = super().step_wait()
        info = self.last_info
        driver = "the operator" if info.get("intervene_flag") else "the policy"
        shown = ""
        if self.judged:
            prob = info.get("success_prob")
            step.info["success_prob"] = torch.tensor([np.nan if prob is None else prob], dtype=torch.float32)
            shown = f" | prob {'--' if prob is None else format(prob, '.2f')}"
        if late_s := info.get("late_s"):
            shown += f" | {late_s:.2f} s late"
        self.session.line.show(f"{self.name}, episode {self.num_episodes} | {driver} drives{shown}")
        self._end_at_q()
        return step

    def _end_at_q(self) -> None:
        if self.session.finished:
            raise KeyboardInterrupt


class Robot(NamedTuple):
    training: OperatedEnvs
    evaluation: OperatedEnvs
    client: RewardClient | None  # the reward model: inside the env, or for the loops to ask


@contextlib.contextmanager
def open_robot(cfg: FrankaConfig, devices: DevicesConfig, reward: RewardConfig, seed: int) -> Iterator[Robot]:
    """However the block ends, the arm stops, the devices are closed and the terminal is as it was.

    UserError where hardware is missing, or the reward model knows other pictures than the cameras give.
    """
    with contextlib.ExitStack() as stack:
        line = stack.enter_context(contextlib.closing(StatusLine()))
        client, verdict = None, None
        if reward.standalone_realworld:
            judge = stack.enter_context(make_judge(reward))
            client, verdict = judge.client, rewarded_by(judge, cfg, reward, learns=True)
        elif reward.use_reward_model:
            client = stack.enter_context(make_reward_client(reward))
        session = stack.enter_context(open_session(cfg, devices, line, verdict, seed, HelpingOperator))
        envs = [OperatedEnvs(session, hands_off, verdict is not None) for hands_off in (False, True)]
        if client is not None:
            check_pictures(client, envs[0].spec)
        yield Robot(*envs, client)

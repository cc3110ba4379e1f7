"""The rollout in a process of its own: the envs never wait for the learner, nor the learner for the envs.

The child steps its envs with the newest weights it finds in shared memory and sends up transitions that are
paid already. What the learner sees then depends on timing; that is what makes it asynchronous.
"""

from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp
from torch import Tensor

from common.agents import build_agent
from common.buffers import Transitions
from common.env_workers import EnvPool
from common.experience import Rollout
from common.nets import ActorModelConfig, OptimConfig
from common.processes import Child
from common.reward_client import make_reward_client
from common.reward_config import RewardConfig
from common.runtime import seed_everything
from common.sac import SACConfig
from common.scenes import EnvConfig

SEND_EVERY = 8  # vector steps per message


@dataclass
class RolloutConfig:
    """What the rollout process needs of the run's config."""

    env: EnvConfig
    reward: RewardConfig
    algorithm: SACConfig
    model: ActorModelConfig
    optim: OptimConfig
    seed: int
    random_steps: int  # env steps of uniform random actions first
    log_interval: int  # env steps between two sets of metrics


class SharedWeights:
    """One policy's tensors in shared memory, with a version. Written by the learner, read by the rollout."""

    def __init__(self, state: dict[str, dict[str, Tensor]]):
        self.state = {
            part: {name: tensor.cpu().clone().share_memory_() for name, tensor in tensors.items()}
            for part, tensors in state.items()
        }
        self.version = torch.zeros(1, dtype=torch.long).share_memory_()
        self.lock = mp.get_context("spawn").Lock()

    def publish(self, state: dict[str, dict[str, Tensor]]) -> None:
        with self.lock:
            for part, tensors in state.items():
                for name, tensor in tensors.items():
                    self.state[part][name].copy_(tensor)
            self.version += 1

    def newer_than(self, version: int) -> tuple[int, dict[str, dict[str, Tensor]] | None]:
        """-> the version now, and a copy of the weights if it is not the one given."""
        with self.lock:
            now = int(self.version)
            if now == version:
                return now, None
            return now, {p: {n: t.clone() for n, t in ts.items()} for p, ts in self.state.items()}


class AsyncRollout:
    """The learner's end. A context manager: leaving it ends the process."""

    def __init__(self, cfg: RolloutConfig, actor_state: dict[str, dict[str, Tensor]]):
        self.weights = SharedWeights(actor_state)
        self.child = Child("rollout", _rollout, (cfg, self.weights), daemon=False)

    def receive(self) -> tuple[list[Transitions], int, dict[str, float]]:
        """What has come since the last call, without waiting: transitions, env steps, the newest metrics."""
        transitions, steps, metrics = [], 0, {}
        while self.child.has_message():
            batch, count, numbers = self.child.receive()
            transitions.append({name: torch.from_numpy(array) for name, array in batch.items()})
            steps += count
            metrics.update(numbers)
        return transitions, steps, metrics

    def publish(self, actor_state: dict[str, dict[str, Tensor]]) -> None:
        self.weights.publish(actor_state)

    def __enter__(self) -> "AsyncRollout":
        return self

    def __exit__(self, *_) -> None:
        self.child.close()


def _rollout(connection: Connection, cfg: RolloutConfig, weights: SharedWeights) -> None:
    seed_everything(cfg.seed)
    client = make_reward_client(cfg.reward) if cfg.reward.use_reward_model else None
    pool = EnvPool(cfg.env.num_workers, cfg.env.num_envs)
    try:
        envs = pool.make(cfg.env, client.camera_views if client is not None else ())
        if client is not None:
            client.check_envs(envs.spec)
            client.set_task(envs.spec.task_description)
        agent = build_agent(cfg.algorithm, cfg.model, cfg.optim, envs.spec, envs.device)
        rollout = Rollout(envs, client, cfg.reward, cfg.algorithm.bootstrap_type, cfg.algorithm.gamma)
        rollout.reset(cfg.seed)
        steps, version, told_at = 0, -1, 0
        while not connection.poll():  # a closed pipe polls true: the learner is done
            batch = []
            for _ in range(SEND_EVERY):
                version, state = weights.newer_than(version)
                if state is not None:
                    agent.load_actor_state(state)
                action = agent.act(rollout.obs)
                if steps < cfg.random_steps:
                    action = torch.rand_like(action) * 2 - 1
                rollout.start(action)
                batch += rollout.finish()
                steps += envs.num_envs
            if batch:
                joined = {name: torch.cat([b[name] for b in batch]).cpu().numpy() for name in batch[0]}
                metrics = {}
                if steps - told_at >= cfg.log_interval:  # rates of fewer episodes would say little
                    metrics, told_at = rollout.metrics() | (client.clock() if client else {}), steps
                connection.send(("ok", (joined, SEND_EVERY * envs.num_envs, metrics)))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the learner closed its end while a message was on its way
    finally:
        pool.close()
        if client is not None:
            client.close()

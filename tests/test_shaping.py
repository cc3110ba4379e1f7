"""Potential-based shaping: exact sums, an optimum that no potential moves, and every way it is paid."""

from dataclasses import replace

import pytest
import torch
from doubles import (
    CountingEnvs,
    reward_config,
    use_fake_model,
    use_fake_trend_model,
    window_config,
)
from test_experience import CPU, SPEC, ppo_rollouts, step_once, write
from test_window_rewards import pixels as window_pixels
from torch import Tensor, tensor

import rl_train
from common.experience import Rollout
from common.franka_config import FrankaConfig, FrankaTaskConfig
from common.prior import prior_buffer
from common.reward_client import RewardClient
from common.rewards import Shaping, no_bootstrap
from common.rl_config import EnvSection
from common.sac import SACConfig
from common.scenes import EnvConfig

NAN = float("nan")
SHAPED = {"shaping": "potential", "env_reward_weight": 1.0, "reward_mode": "per_step"}


def shaped(score: list[float], ends: dict[int, str], gamma: float = 0.5) -> list[float]:
    """What one env's steps are paid; ends: step -> "terminal" or "cut"."""
    done = tensor([[t in ends] for t in range(len(score))])
    terminal = tensor([[ends.get(t) == "terminal"] for t in range(len(score))])
    whole = Shaping(gamma, 1)(tensor(score)[:, None], terminal, done)
    rows = Shaping(gamma, 1)
    parts = [rows(tensor([[s]]), *x) for s, *x in zip(score, terminal[:, None], done[:, None], strict=True)]
    assert torch.cat(parts).equal(whole)  # how the steps are cut into calls changes nothing
    return whole[:, 0].tolist()


@pytest.mark.parametrize(
    ("score", "ends", "paid"),
    [
        ([0.5, 1.0, 0.25], {}, [0.25, 0.0, -0.875]),
        ([0.5, 1.0, 0.25], {2: "terminal"}, [0.25, 0.0, -1.0]),  # Phi of a true end is 0
        ([0.5, 1.0, 0.25], {2: "cut"}, [0.25, 0.0, -0.875]),  # of a time limit it is not
        ([0.5, 1.0, 0.5, 0.5], {1: "cut"}, [0.25, 0.0, 0.25, -0.25]),  # the next episode begins with 0
        ([0.5, NAN, 1.0], {}, [0.25, -0.25, 0.0]),  # no score: Phi stays
    ],
)
def test_paid_by_hand(score, ends, paid):
    assert shaped(score, ends) == paid


@pytest.mark.parametrize("end", ["terminal", "cut"])
def test_an_episode_is_paid_its_last_potential_and_nothing_else(end):
    """sum_t gamma^t F_t = gamma^T Phi(s_T), to the last bit where numbers are eighths."""
    score = (torch.randint(0, 9, (12,), generator=torch.Generator().manual_seed(0)) / 8).tolist()
    paid = shaped(score, {11: end})
    assert sum(0.5**t * f for t, f in enumerate(paid)) == (0.0 if end == "terminal" else 0.5**12 * score[-1])


# ----------------------------------------------------------------------------------------------------
# A small task of 6 states and 3 actions, in which episodes begin in state 0 and never come back to it

NUM_STATES, NUM_ACTIONS, TERMINAL, GAMMA = 7, 3, 6, 0.9


def random_task(seed: int) -> tuple[Tensor, Tensor]:
    """Next state and env reward, (S, A) each; state 6 is the end."""
    generator = torch.Generator().manual_seed(seed)
    after = torch.randint(1, NUM_STATES, (NUM_STATES, NUM_ACTIONS), generator=generator)
    return after, torch.rand(NUM_STATES, NUM_ACTIONS, generator=generator)


def lived(task: tuple[Tensor, Tensor], phi: Tensor, steps: int = 4000) -> dict[str, Tensor]:
    """Random steps in one env, cut after 8 at the latest, and what the shaping pays for them."""
    generator, shaping = torch.Generator().manual_seed(0), Shaping(GAMMA, 1)
    rows, state, age = [], 0, 0
    for _ in range(steps):
        action = int(torch.randint(NUM_ACTIONS, (), generator=generator))
        after, reward = int(task[0][state, action]), float(task[1][state, action])
        age += 1
        terminal, done = after == TERMINAL, after == TERMINAL or age == 8
        paid = float(shaping(phi[None, None, after], tensor([[terminal]]), tensor([[done]])))
        rows.append((state, action, after, terminal, reward, paid))
        state, age = (0, 0) if done else (after, age)
    names = ("state", "action", "after", "terminal", "reward", "paid")
    return {name: tensor(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def q_values(data: dict[str, Tensor], reward: Tensor) -> Tensor:
    """(S, A) of Q-learning until nothing changes, on what was lived through."""
    cell = data["state"] * NUM_ACTIONS + data["action"]
    count = cell.bincount(minlength=NUM_STATES * NUM_ACTIONS).clamp(min=1)
    q = torch.zeros(NUM_STATES, NUM_ACTIONS, dtype=torch.float64)
    for _ in range(300):
        target = reward.double() + GAMMA * ~data["terminal"] * q.max(1).values[data["after"]]
        q = (torch.zeros(q.numel(), dtype=q.dtype).index_add(0, cell, target) / count).view_as(q)
    return q


@pytest.mark.parametrize("seed", [0, 2, 3, 4, 5])  # in task 1 the control happens to lead the same way
def test_a_wrong_potential_leaves_the_optimum_alone(seed):
    """Five times as large as the env reward, drawn by lot: Q moves by Phi of the state, whatever the action.
    Paid as a reward, the same numbers lead elsewhere."""
    task = random_task(seed)
    phi = 5 * torch.rand(NUM_STATES, generator=torch.Generator().manual_seed(100 + seed))
    data = lived(task, phi)
    q, moved = q_values(data, data["reward"]), q_values(data, data["reward"] + data["paid"])
    visited = data["state"].unique()
    at_start = phi.clone()
    at_start[0] = 0  # by definition
    torch.testing.assert_close(moved[visited], (q - at_start[:, None])[visited], atol=1e-5, rtol=0)
    assert moved[visited].argmax(1).equal(q[visited].argmax(1))
    exploited = q_values(data, data["reward"] + phi[data["after"]])
    assert not exploited[visited].argmax(1).equal(q[visited].argmax(1))


def one_state(sees_time: bool, bootstrap_type: str, phi: float, weight: float) -> Tensor:
    """(S, A) Q of the only state there is: staying (action 0) pays 0, exit 1; cut after 4 steps. The states
    are how many steps have been taken, all one to a learner that does not see the time."""
    generator, shaping, t = torch.Generator().manual_seed(0), Shaping(GAMMA, 1), 0
    rows = []
    for _ in range(4000):
        action = int(torch.randint(2, (), generator=generator))
        exits, cut = tensor([[action == 1]]), tensor([[action == 0 and t == 3]])
        terminal = no_bootstrap(exits, cut, bootstrap_type)
        paid = float(shaping(tensor([[phi]]), terminal, exits | cut))
        state, after = (t, t + 1) if sees_time else (0, 0)
        rows.append((state, action, after, bool(terminal), action + weight * paid))
        t = 0 if exits or cut else t + 1
    states, actions, afters, terminals, rewards = (tensor(column) for column in zip(*rows, strict=True))
    q = torch.zeros(5, 2)
    for _ in range(200):
        target = rewards + GAMMA * ~terminals * q.max(1).values[afters]
        for s in range(5):
            for a in range(2):
                if (here := (states == s) & (actions == a)).any():
                    q[s, a] = target[here].mean()
    return q


def test_a_start_that_comes_back_needs_the_time():
    """Without it, going back to the start (Phi 0 the first time, 1 then) is paid again and again. A limit
    that is bootstrapped through ends in a state nobody acts in, whose value lacks its Phi."""
    blind = one_state(False, "standard", 1.0, 0.0)
    torch.testing.assert_close(blind[0], tensor([0.9, 1.0]))
    fooled = one_state(False, "standard", 1.0, 1.0)
    assert fooled[0, 0] > fooled[0, 1] + 1
    for phi in (1.0, 5.0):
        plain, moved = (one_state(True, "none", phi, weight) for weight in (0.0, 1.0))
        torch.testing.assert_close(plain[:4], tensor([[0.9, 1.0], [0.9, 1.0], [0.9, 1.0], [0.0, 1.0]]))
        potential = tensor([0.0, phi, phi, phi])
        torch.testing.assert_close(moved[:4], plain[:4] - potential[:, None])
    through = one_state(True, "standard", 5.0, 1.0)
    assert through[3, 0] > through[3, 1]  # plain: 0 and 1


# ----------------------------------------------------------------------------------------------------
# Every way it is paid: gamma 0.5, env 0 ends truly after 3 steps, env 1 at its time limit after 4

SCORES = {0: [60, 70, 20], 1: [80, 10, 90, 50]}
PAID = {
    0: [0.3, 0.35 - 0.6, -0.7],
    1: [0.4, 0.05 - 0.8, 0.45 - 0.1, 0.25 - 0.9],
}
ENDS = frozenset((0, episode) for episode in range(9))


@pytest.fixture
def fake_model(monkeypatch):
    use_fake_model(monkeypatch)


def counting() -> CountingEnvs:
    pixel = lambda env, episode, t: 99 if t == 0 else SCORES[env][t - 1]  # noqa: E731
    return CountingEnvs([[3], [4]], terminates=ENDS, pixel=pixel)


def expected(steps: int, weight: float = 1.0) -> Tensor:
    """(T, 2) of env reward (100 i + 10 k + t) and shaping."""
    rows = []
    for step in range(steps):
        row = []
        for env in (0, 1):
            episode, t = divmod(step, len(PAID[env]))
            row.append(100 * env + 10 * episode + t + 1 + weight * PAID[env][t])
        rows.append(row)
    return tensor(rows)


@pytest.mark.parametrize("verdict_every", [1, 5])
def test_the_rollout_pays_differences(fake_model, verdict_every):
    """And still counts the verdicts: .6, .7 and .8, .9, .5 are called a success."""
    cfg = reward_config(**SHAPED, reward_weight=2.0, verdict_every=verdict_every)
    rollout = Rollout(counting(), RewardClient(cfg), cfg, "standard", gamma=0.5)
    rollout.reset(0)
    batches = [batch for _ in range(12) for batch in step_once(rollout)] + list(rollout.drain())
    torch.testing.assert_close(torch.stack([batch["reward"] for batch in batches]), expected(12, weight=2.0))
    metrics = rollout.metrics()
    assert metrics["rollout/learned_success"] == 1.0
    assert metrics["reward/false_positives_per_1000_steps"] == 1000 * (4 * 2 + 3 * 3) / 24


@pytest.mark.parametrize(
    ("bootstrap_type", "last"),
    [("standard", (-0.7, -0.65)), ("always", (-0.6, -0.65)), ("none", (-0.7, -0.9))],
)
def test_the_potential_is_nothing_where_the_next_value_does_not_count(fake_model, bootstrap_type, last):
    cfg = reward_config(**SHAPED)
    rollout = Rollout(counting(), RewardClient(cfg), cfg, bootstrap_type, gamma=0.5)
    rollout.reset(0)
    batches = [batch for _ in range(4) for batch in step_once(rollout)] + list(rollout.drain())
    paid = [float(batches[2]["reward"][0]) - 3, float(batches[3]["reward"][1]) - 104]
    assert paid == pytest.approx(last, abs=1e-4)


def test_ppo_pays_differences_across_rollouts(fake_model):
    """No bootstrap here, so that the rewards are bare: Phi is 0 at env 1's time limit too."""
    rollouts, _ = ppo_rollouts(counting(), 2, 24, bootstrap_type="none", **SHAPED)
    reward = expected(12)
    reward[3::4, 1] -= 0.25
    torch.testing.assert_close(torch.cat([rollout["reward"] for rollout in rollouts]), reward)


def test_prior_data_pays_differences(fake_model, tmp_path):
    """Frames 90 are resets, which nobody scores; recorded env rewards are 1, 2, 3."""
    write(tmp_path, 0, [90, 60, 70, 20], [False] * 3, terminated=True)
    write(tmp_path, 1, [90, 80, 10], [False] * 2)
    cfg = reward_config(**SHAPED)
    buffer, *_ = prior_buffer([str(tmp_path)], SPEC, RewardClient(cfg), cfg, "standard", CPU, gamma=0.5)
    torch.testing.assert_close(buffer.reward, tensor([1.3, 1.75, 2.3, 1.4, 1.25]))


def test_a_trend_is_a_potential_too(monkeypatch):
    """Windows of two frames: none yet, up, up, down, still; +1, +1, -1, 0."""
    use_fake_trend_model(monkeypatch)
    cfg = window_config(shaping="potential", env_reward_weight=1.0)
    envs = CountingEnvs([[5]], pixel=window_pixels)
    rollout = Rollout(envs, RewardClient(cfg), cfg, "standard", gamma=0.5)
    rollout.reset(0)
    batches = [batch for _ in range(6) for batch in step_once(rollout)] + list(rollout.drain())
    paid = [0.0, 0.5, 0.5 - 1, -0.5 - 1, 1.0, 0.0]
    reward = tensor([1.0, 2.0, 3.0, 4.0, 5.0, 11.0]) + tensor(paid)
    assert torch.cat([batch["reward"] for batch in batches]).equal(reward)
    assert rollout.metrics()["rollout/model_return"] == 1.0  # what the windows said, not what they paid


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_mode": "terminal"}, "it needs .*reward_mode per_step or history_buffer"),
        ({"standalone_realworld": True}, "standalone_realworld false"),
        ({"env_reward_weight": 0.0}, "set env_reward_weight"),
        ({"hold_k": 2, "hold_n": 2}, "shaping pays the scores themselves"),
        ({"leave_threshold": 0.2}, "shaping pays the scores themselves"),
    ],
)
def test_what_cannot_be_shaped(changes, message):
    with pytest.raises(ValueError, match=message):
        reward_config(**(SHAPED | changes))


@pytest.mark.parametrize("model", [{"gt_success_bonus": 1.0}, {"interval_reward": -0.1}])
def test_windows_pay_no_extras_beside_the_shaping(model):
    with pytest.raises(ValueError, match="no differences of a score"):
        window_config(model=model, shaping="potential", env_reward_weight=1.0)


def test_nobody_imitates_what_was_paid_most_then():
    algorithm = SACConfig(prior_data="a", imitation_coef=1.0, bootstrap_type="none")
    with pytest.raises(ValueError, match="imitation takes the episodes that were paid most"):
        rl_train.Config(algorithm=algorithm, reward=reward_config(**SHAPED))


def shaped_run(train: EnvConfig | FrankaConfig | None = None, **algorithm) -> rl_train.Config:
    train = train or EnvConfig(observe_time=True)
    env = EnvSection(train=train, eval=replace(train))
    algorithm = SACConfig(**({"bootstrap_type": "none"} | algorithm))
    return rl_train.Config(env=env, algorithm=algorithm, reward=reward_config(**SHAPED))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": EnvConfig()}, r"set env\.\*\.observe_time to true"),
        (
            {"train": FrankaConfig(override_cfg=FrankaTaskConfig(target_ee_pose=(0.5, 0, 0.2, -3.14, 0, 0)))},
            "in a simulation",
        ),
        ({"bootstrap_type": "standard"}, "bootstrap_type to none"),
        ({"target_clip": (0.0, 1.0)}, "target_clip bounds returns of the env"),
    ],
)
def test_runs_that_shaping_would_lead_elsewhere(changes, message):
    shaped_run()
    with pytest.raises(ValueError, match=message):
        shaped_run(**changes)

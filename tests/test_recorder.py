"""EpisodeRecorder over a double whose states and pictures say of which env, episode and step they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.envs import EnvSpec, Render, Step
from common.episodes import EpisodeWriter, list_episodes, read_episode
from common.scenes import VIEWS, DataCollectionConfig
from common.wrappers import EpisodeRecorder, critic_score

SPEC = EnvSpec(
    obs_dim=3,
    action_dim=2,
    obs_layout={"mark": (0, 3)},
    info_types={"grasped": torch.bool, "success": torch.bool},
    frame_shape={view: (8, 8, 3) for view in VIEWS},
    task="Toy-v1",
    task_description="Do it.",
    control={"mode": "toy", "freq_hz": 10},
    render={"task": "Toy-v1", "views": {}},
)


class ToyEnvs:
    """Env i ends its episodes after `lengths[i]` steps; those of env 0 succeed at step 1 only.

    State and pictures are (env, episode, t), so that each tells where it belongs.
    """

    def __init__(self, lengths: list[int], terminates: bool = False):
        self.spec, self.num_envs, self.device = SPEC, len(lengths), torch.device("cpu")
        self.lengths, self.terminates = lengths, terminates
        self.asked: list = []

    def _mark(self) -> torch.Tensor:
        rows = [torch.arange(self.num_envs), torch.tensor(self.episode), torch.tensor(self.t)]
        return torch.stack(rows, dim=1).float()

    @staticmethod
    def _pictures(marks: torch.Tensor) -> dict[str, torch.Tensor]:
        main = marks.to(torch.uint8)[:, None, None, :].expand(-1, 8, 8, 3).contiguous()
        return {"main_images": main, "extra_view_images": main + 100}

    def reset(self, seed: int) -> torch.Tensor:
        self.episode, self.t = [seed] * self.num_envs, [0] * self.num_envs
        return self._mark()

    def render(self, env_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._pictures(self._mark()[env_ids])

    def step_async(self, action: torch.Tensor, render: Render | torch.Tensor = Render.NONE) -> None:
        self.asked.append(render)

    def step_wait(self) -> Step:
        self.t = [t + 1 for t in self.t]
        next_obs = self._mark()
        done = torch.tensor([t == length for t, length in zip(self.t, self.lengths, strict=True)])
        success = torch.tensor([i == 0 and t == 1 for i, t in enumerate(self.t)])
        for i in done.nonzero().squeeze(1).tolist():
            self.episode[i], self.t[i] = self.episode[i] + 1, 0
        obs, reset_ids, no = self._mark(), done.nonzero().squeeze(1), torch.zeros_like(done)
        return Step(
            obs=obs,
            next_obs=next_obs,
            env_reward=next_obs[:, 2] / 10,
            terminated=done if self.terminates else no,
            truncated=no if self.terminates else done,
            info={"grasped": next_obs[:, 2], "success": success},
            frames=self._pictures(next_obs),
            frame_ids=torch.arange(self.num_envs),
            reset_frames=self._pictures(obs[reset_ids]) if len(reset_ids) else {},
            reset_ids=reset_ids,
        )


def record(folder: Path, envs: ToyEnvs, num_steps: int, **settings) -> EpisodeRecorder:
    """Action t of env i is (i, t) / 100."""
    with EpisodeWriter(folder) as writer:
        recorder = EpisodeRecorder(envs, DataCollectionConfig(**settings), writer)
        recorder.reset(0)
        for t in range(num_steps):
            action = torch.tensor([[i / 100, t / 100] for i in range(envs.num_envs)])
            recorder.step(action)
            action.fill_(9)  # the caller may use its buffer again
    return recorder


def test_observations_actions_and_outcomes_align(tmp_path: Path):
    """T+1 entries, the last one the true last observation: not the next episode's first, as in `obs`."""
    recorder = record(tmp_path, ToyEnvs([3, 2]), num_steps=6)
    episodes = [read_episode(path, views=None) for path in list_episodes(tmp_path)]
    assert recorder.num_episodes == len(episodes) == 5
    for episode in episodes:
        env, number = episode.env_idx, episode.episode_id
        length = [3, 2][env]
        times = np.arange(length + 1)
        marks = np.stack([np.full(length + 1, env), np.full(length + 1, number), times], axis=1)
        np.testing.assert_array_equal(episode.states, marks)
        np.testing.assert_array_equal(episode.images["main_images"][:, 4, 4], marks)
        np.testing.assert_array_equal(episode.images["extra_view_images"][:, 0, 7], marks + 100)
        started = number * length
        expected = np.stack([np.full(length, env), started + times[:-1]], axis=1) / np.float32(100)
        np.testing.assert_allclose(episode.actions, expected)
        np.testing.assert_allclose(episode.rewards, times / np.float32(10))
        assert episode.truncated.tolist() == [False] * length + [True]
        assert not episode.terminated.any()
        assert [info.get("grasped") for info in episode.infos] == [None, *times[1:].tolist()]
        assert (episode.layout, episode.length) == ("T+1", length)


class ToyPush(ToyEnvs):
    """As PushCube: the gripper starts 1 m behind where it pushes and comes 0.1 m nearer with each step."""

    def __init__(self, lengths: list[int]):
        super().__init__(lengths)
        layout = {"tcp_pose": (0, 3), "obj_pose": (3, 6), "goal_pos": (6, 9)}
        self.spec = replace(SPEC, task="PushCube-v1", obs_layout=layout, obs_dim=9)

    def _mark(self) -> torch.Tensor:
        obs = torch.zeros(self.num_envs, 9)
        obs[:, 0] = -0.025 - 1.0 + 0.1 * torch.tensor(self.t)
        obs[:, 6] = 0.2 * torch.tensor(self.episode)  # the goal, 0.2 m farther in each episode
        return obs

    @staticmethod
    def _pictures(marks: torch.Tensor) -> dict[str, torch.Tensor]:
        return {view: torch.zeros(len(marks), 8, 8, 3, dtype=torch.uint8) for view in VIEWS}


def test_metres_left_are_in_every_info_of_a_task_with_a_rule(tmp_path: Path):
    """The reset's too: they are of the same state as the frame beside them, also after an auto-reset."""
    record(tmp_path, ToyPush([2, 3]), num_steps=4)
    episodes = [read_episode(path) for path in list_episodes(tmp_path)]
    distance = {
        (episode.env_idx, episode.episode_id): [info["success_distance"] for info in episode.infos]
        for episode in episodes
    }
    reach = [0.99, 0.89, 0.79, 0.69]  # less the 1 cm that counts as there
    assert set(distance) == {(0, 0), (0, 1), (1, 0)}
    assert distance[0, 0] == pytest.approx(reach[:3], abs=1e-5)
    assert distance[0, 1] == pytest.approx([0.4 + d for d in reach[:3]], abs=1e-5)
    assert distance[1, 0] == pytest.approx(reach, abs=1e-5)
    first = next(episode for episode in episodes if episode.env_idx == 0 and episode.episode_id == 0)
    assert set(first.infos[0]) == {"success_distance"}
    assert first.success.tolist() == [False, True, False]  # the reset entry still says fail


def test_critic_score_against_numbers_worked_out_by_hand():
    """gamma = lambda = 0.5: return[t] = r[t+1] + (value[t+1] + return[t+1]) / 4, and the last is value[T]."""
    value, env_reward = torch.tensor([8.0, 4.0, 2.0]), torch.tensor([1.0, 3.0])
    last = 3 + 0.5 * 2  # both shares of the future are value[2]
    first = 1 + 0.25 * 4 + 0.25 * last
    score = critic_score(value, env_reward, gamma=0.5, gae_lambda=0.5)
    assert score.tolist() == pytest.approx([0.5 * first, 0.5 * last, 0.5 * 2])
    constant = critic_score(torch.full((4,), 10.0), torch.ones(3), gamma=0.9, gae_lambda=0.7)
    assert constant.tolist() == pytest.approx([1.0] * 4)  # in units of the env reward per step


@pytest.mark.parametrize("terminates", [False, True])
def test_episodes_carry_the_critics_score(tmp_path: Path, terminates: bool):
    """lambda = 0: reward and the next value. The value is 10 t, the env pays t / 10; ended or cut alike."""
    with EpisodeWriter(tmp_path) as writer:
        cfg = DataCollectionConfig(gae_gamma=0.8, gae_lambda=0.0)
        recorder = EpisodeRecorder(ToyEnvs([3, 2], terminates), cfg, writer)
        recorder.value = lambda obs: 10 * obs[:, 2]
        recorder.reset(0)
        for _ in range(3):
            recorder.step(torch.zeros(2, 2))
    first, second = (read_episode(path) for path in list_episodes(tmp_path))
    returns = [0.1 + 0.8 * 10, 0.2 + 0.8 * 20, 0.3 + 0.8 * 30, 30]
    np.testing.assert_allclose(first.gae, [0.2 * g for g in returns], rtol=1e-6)
    np.testing.assert_allclose(second.gae, [0.2 * g for g in [*returns[:2], 20]], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gae_gamma": 0.8}, "go together"),
        ({"gae_lambda": 0.8}, "go together"),
        ({"gae_gamma": 1.0, "gae_lambda": 0.9}, r"must lie in \[0, 1\)"),
    ],
)
def test_settings_of_the_critics_score_are_checked(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DataCollectionConfig(**settings)


def test_success_is_of_the_episode_and_of_each_frame(tmp_path: Path):
    recorder = record(tmp_path, ToyEnvs([3, 2]), num_steps=3)
    first, second = (read_episode(path) for path in list_episodes(tmp_path))
    assert first.path.name == "rank_0_env_0_episode_0_step_6_success.pkl"  # steps of all envs
    assert second.path.name == "rank_0_env_1_episode_0_step_4_fail.pkl"
    assert (first.success_once, second.success_once) == (True, False)
    assert first.success.tolist() == [False, True, False, False]  # it held at t = 1 alone
    assert (first.task, first.task_description, first.render) == ("Toy-v1", "Do it.", SPEC.render)
    assert (recorder.num_episodes, recorder.num_successes, recorder.num_steps) == (2, 1, 6)
    assert recorder.num_frames == (4 + 3) * len(VIEWS)


def test_an_episode_cut_short_by_reset_is_dropped(tmp_path: Path):
    with EpisodeWriter(tmp_path) as writer:
        recorder = EpisodeRecorder(ToyEnvs([2]), DataCollectionConfig(), writer)
        recorder.reset(0)
        recorder.step(torch.zeros(1, 2))
        recorder.reset(5)
        for _ in range(2):
            recorder.step(torch.zeros(1, 2))
    (path,) = list_episodes(tmp_path)
    np.testing.assert_array_equal(read_episode(path).states, [[0, 5, 0], [0, 5, 1], [0, 5, 2]])


@pytest.mark.parametrize(
    ("terminates", "names"),
    [(True, ["rank_0_env_0_episode_0_step_6_success.pkl"]), (False, [])],
)
def test_only_success_keeps_what_succeeded_and_terminated(tmp_path: Path, terminates: bool, names: list):
    recorder = record(tmp_path, ToyEnvs([3, 2], terminates), num_steps=4, only_success=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert recorder.num_episodes == recorder.num_successes == len(names)


@pytest.mark.parametrize(
    ("render", "frame_ids", "reset_ids"),
    [
        (Render.NONE, [[], []], [[], []]),
        (Render.IF_DONE, [[], [1]], [[], []]),
        (Render.ALWAYS, [[0, 1], [0, 1]], [[], []]),
        (Render.RECORD, [[0, 1], [0, 1]], [[], [1]]),
        (torch.tensor([Render.ALWAYS, Render.NONE]), [[0], [0]], [[], []]),
        (torch.tensor([Render.NONE, Render.RECORD]), [[1], [1]], [[], [1]]),
        (torch.tensor([Render.IF_DONE, Render.IF_DONE]), [[], [1]], [[], []]),
    ],
)
def test_only_the_frames_asked_for_are_passed_on(tmp_path: Path, render, frame_ids, reset_ids):
    envs = ToyEnvs([3, 2])
    with EpisodeWriter(tmp_path) as writer:
        recorder = EpisodeRecorder(envs, DataCollectionConfig(), writer)
        recorder.reset(0)
        steps = [recorder.step(torch.zeros(2, 2), render) for _ in range(2)]
    assert envs.asked == [Render.RECORD] * 2  # it needs them all itself
    assert [step.frame_ids.tolist() for step in steps] == frame_ids
    assert [step.reset_ids.tolist() for step in steps] == reset_ids
    for step in steps:
        assert set(step.frames) == (set(VIEWS) if len(step.frame_ids) else set())
        assert set(step.reset_frames) == (set(VIEWS) if len(step.reset_ids) else set())
        for row, env in enumerate(step.frame_ids.tolist()):
            assert step.frames["main_images"][row, 0, 0].tolist() == step.next_obs[env].tolist()
        for row, env in enumerate(step.reset_ids.tolist()):
            assert step.reset_frames["main_images"][row, 0, 0].tolist() == step.obs[env].tolist()


def test_what_is_kept_of_an_env_does_not_keep_the_frames_of_all(tmp_path: Path):
    """A view into the batch would hold all envs' pictures for as long as one episode of one env lives."""
    with EpisodeWriter(tmp_path) as writer:
        recorder = EpisodeRecorder(ToyEnvs([9] * 50), DataCollectionConfig(), writer)
        handed_over = []
        writer.put = handed_over.append
        recorder.reset(0)
        for _ in range(9):
            recorder.step(torch.zeros(50, 2))
    arrays = [
        value for observation in handed_over[0]["observations"] for value in observation.values()
    ] + handed_over[0]["actions"]
    assert all(array.base is None for array in arrays if array.ndim < 4)
    assert all(array.base.nbytes == array.nbytes for array in arrays if array.ndim == 4)  # (V=1, H, W, 3)

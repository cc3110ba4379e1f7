"""common/pixels.py and the encoder: what a policy sees of a frame, who trains the eyes, what is kept."""

import pytest
import torch
from doubles import CountingEnvs
from test_experience import write

from common.agents import agent_meta, build_agent, check_same_agent, load_agent
from common.checkpoint import save_checkpoint
from common.envs import Render
from common.episodes import EpisodeWriter, list_episodes, read_episode
from common.nets import NUM_PIXEL_FEATURES, ActorModelConfig, OptimConfig, PixelEncoder
from common.pixels import PixelObs, seen_views, state_dim, to_pixels
from common.ppo import PPOConfig
from common.prior import prior_buffer
from common.reward_config import RewardConfig
from common.runtime import UserError
from common.sac import SAC, SACConfig
from common.scenes import DataCollectionConfig
from common.wrappers import EpisodeRecorder

CPU = torch.device("cpu")
SIDE = 8
STATE, ACTION = 3, 2
OBS = STATE + 2 * 3 * SIDE * SIDE

# ----------------------------------------------------------------------------------------------------
# What the policy sees


def pixel(obs: torch.Tensor, view: int) -> list[int]:
    """What `CountingEnvs` has painted the picture of this view with, as it is in obs (N, D)."""
    pictures = obs[:, STATE:].reshape(len(obs), 2, -1)[:, view]
    assert (pictures == pictures[:, :1]).all()
    return (255 * pictures[:, 0]).round().int().tolist()


def test_a_picture_is_the_mean_of_its_places_row_by_row():
    frame = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    frame[0, 0, 2:, 0] = 255  # red, the upper half of the upper right quarter
    frame[0, 2:, :2, 2] = 51  # blue, the whole lower left quarter
    seen = to_pixels({"main_images": frame}, ["main_images"], 2).reshape(2, 2, 3)
    expected = [[[0, 0, 0], [0.5, 0, 0]], [[0, 0, 0.2], [0, 0, 0]]]
    torch.testing.assert_close(seen, torch.tensor(expected))


def test_observations_go_on_with_pictures_of_the_same_moment():
    """Env 0 ends at its second step: where it led to and where the next episode begins are two pictures."""
    envs = PixelObs(CountingEnvs([[2], [9]]), SIDE)
    assert (envs.spec.obs_dim, state_dim(envs.spec)) == (OBS, STATE)
    assert seen_views(envs.spec) == ["main_images", "extra_view_images"]
    obs = envs.reset(0)
    assert obs[:, :STATE].tolist() == [[0, 0, 0], [1, 0, 0]] and pixel(obs, 0) == [0, 20]
    step = envs.step(torch.zeros(2, 2))
    assert pixel(step.obs, 0) == pixel(step.next_obs, 0) == [1, 21]
    step = envs.step(torch.zeros(2, 2))
    assert step.obs[:, :STATE].tolist() == [[0, 1, 0], [1, 0, 2]] and pixel(step.obs, 0) == [10, 22]
    assert step.next_obs[:, :STATE].tolist() == [[0, 0, 2], [1, 0, 2]] and pixel(step.next_obs, 0) == [2, 22]
    assert pixel(step.next_obs, 1) == [255 - 2, 255 - 22]


def test_frames_are_passed_on_to_who_asks():
    envs = PixelObs(CountingEnvs([[2], [9]]), SIDE)
    envs.reset(0)
    step = envs.step(torch.zeros(2, 2))
    assert (step.frames, step.frame_ids.tolist()) == ({}, [])
    step = envs.step(torch.zeros(2, 2), Render.IF_DONE)
    assert step.frame_ids.tolist() == [0] and step.frames["main_images"][:, 0, 0, 0].tolist() == [2]
    assert step.reset_frames == {}
    step = envs.step(torch.zeros(2, 2), torch.tensor([0, 2]))
    assert step.frame_ids.tolist() == [1] and step.frames["main_images"][:, 0, 0, 0].tolist() == [23]
    step = envs.step(torch.zeros(2, 2), Render.RECORD)
    assert step.frame_ids.tolist() == [0, 1] and step.reset_ids.tolist() == [0]


def test_a_recorder_inside_keeps_states_and_whole_frames(tmp_path):
    with EpisodeWriter(tmp_path) as writer:
        recorder = EpisodeRecorder(CountingEnvs([[2]]), DataCollectionConfig(enabled=True), writer)
        envs = PixelObs(recorder, SIDE)
        envs.reset(0)
        obs = [envs.step(torch.zeros(1, 2)).next_obs for _ in range(2)]
    episode = read_episode(list_episodes(tmp_path)[0], views=None)
    assert episode.states.shape == (3, STATE) and episode.images["main_images"].shape == (3, 8, 8, 3)
    spec = envs.spec
    buffer = prior_buffer(
        [str(tmp_path)], spec, None, RewardConfig(env_reward_weight=1.0), "none", CPU
    ).buffer
    torch.testing.assert_close(buffer.next_obs, torch.cat(obs))  # as the rollout gives them


def test_prior_data_without_a_picture_the_policy_needs_is_named(tmp_path):
    bad = write(tmp_path, 0, [90, 60, 80], [False, True])  # of main_images alone
    spec = PixelObs(CountingEnvs([[1]]), SIDE).spec
    with pytest.raises(UserError, match="has no view extra_view_images") as error:
        prior_buffer([str(tmp_path)], spec, None, RewardConfig(env_reward_weight=1.0), "none", CPU)
    assert bad.name in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "message"), [({}, "no camera"), ({"main_images": (7, 9, 3)}, r"\(7, 9, 3\)")]
)
def test_cameras_that_cannot_serve(shapes, message):
    envs = CountingEnvs([[1]])
    envs.spec.frame_shape = shapes
    with pytest.raises(UserError, match=message):
        PixelObs(envs, SIDE)


# ----------------------------------------------------------------------------------------------------
# The encoder


def test_the_state_passes_and_pictures_become_features():
    torch.manual_seed(0)
    for side, num_views in ((8, 1), (32, 2), (64, 1), (84, 1)):
        encoder = PixelEncoder(5 + num_views * 3 * side * side, 5, side)
        obs = torch.rand(3, 5 + num_views * 3 * side * side)
        out = encoder(obs)
        assert out.shape == (3, encoder.out_dim) == (3, 5 + NUM_PIXEL_FEATURES)
        assert out[:, :5].equal(obs[:, :5])
        assert out[:, 5:].abs().max() < 1
    obs[1, -1] += 0.5  # one place of one picture
    assert (encoder(obs)[1] != out[1]).any() and encoder(obs)[0].equal(out[0])


def test_what_is_no_whole_picture_is_refused():
    with pytest.raises(ValueError, match="hold no whole pictures"):
        PixelEncoder(5 + 100, 5, 8)
    with pytest.raises(ValueError, match="hold no whole pictures"):
        PixelEncoder(5, 5, 8)
    with pytest.raises(ValueError, match="nobody sees the others"):
        SAC(OBS, ACTION, SACConfig(), ActorModelConfig(), OptimConfig(), state_dim=STATE)


def test_a_shift_moves_each_picture_and_repeats_the_border():
    encoder = PixelEncoder(1 + 3 * 8 * 8, 1, 8)
    picture = torch.arange(8.0)[:, None, None].expand(8, 8, 3) + 10 * torch.arange(8.0)[None, :, None]
    obs = torch.cat([torch.full((2, 1), 7.0), picture.reshape(1, -1).expand(2, -1)], dim=1)
    moved = encoder.shifted(obs, torch.tensor([[2, 0], [0, -1]]))
    assert moved[:, 0].tolist() == [7, 7]
    first, second = encoder.pictures(moved)[..., 0]
    assert first[:, 0].tolist() == [2, 3, 4, 5, 6, 7, 7, 7]
    assert second[0].tolist() == [0, 0, 10, 20, 30, 40, 50, 60]


# ----------------------------------------------------------------------------------------------------
# SAC of pixels


def make(seed: int = 0, pixels: int | None = SIDE, **algorithm) -> SAC:
    torch.manual_seed(seed)
    model = ActorModelConfig(hidden_dims=(16,), pixels=pixels)
    return SAC(OBS, ACTION, SACConfig(**algorithm), model, OptimConfig(lr=1e-3), state_dim=STATE)


def make_batch(seed: int = 1, size: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "obs": torch.rand(size, OBS, generator=generator),
        "next_obs": torch.rand(size, OBS, generator=generator),
        "action": torch.rand(size, ACTION, generator=generator) * 2 - 1,
        "reward": torch.rand(size, generator=generator),
        "terminal": torch.rand(size, generator=generator) > 0.5,
        "steps": torch.ones(size),
    }


def test_the_critics_train_the_encoder_and_the_actor_does_not():
    """Of an update in which the critics learn nothing, the encoder stays; the policy moves all the same."""
    for critic_lr, moves in ((1e-3, True), (1e-30, False)):
        torch.manual_seed(0)
        model, optim = (
            ActorModelConfig(hidden_dims=(16,), pixels=SIDE),
            OptimConfig(lr=1e-3, critic_lr=critic_lr),
        )
        sac = SAC(OBS, ACTION, SACConfig(), model, optim, state_dim=STATE)
        before = {name: value.clone() for name, value in sac.encoder.state_dict().items()}
        policy = [value.clone() for value in sac.policy.parameters()]
        batch = make_batch()
        batch |= {"best_obs": batch["obs"], "best_action": batch["action"]}
        sac.update(batch)
        moved = [(value - before[name]).abs().max() for name, value in sac.encoder.state_dict().items()]
        assert min(moved) > 1e-5 if moves else max(moved) < 1e-20
        assert any(not a.equal(b) for a, b in zip(sac.policy.parameters(), policy, strict=True))


def test_the_target_sees_by_the_present_encoder_and_sends_no_gradient():
    sac, batch = make(), make_batch()
    obs = sac.encoder(sac.scaled(batch["obs"]))
    next_obs = sac.encoder(sac.scaled(batch["next_obs"]))
    noise = torch.zeros(6, ACTION)
    loss, _ = sac.critic_loss(batch, obs, next_obs, noise, None)
    (by_obs,) = torch.autograd.grad(loss, obs, retain_graph=True)
    assert by_obs.abs().sum() > 0
    assert torch.autograd.grad(loss, next_obs, allow_unused=True) == (None,)


def test_scale_and_noise_are_for_the_state_alone():
    sac, batch = make(obs_noise=0.5), make_batch()
    sac.set_obs_stats(torch.full((OBS,), 2.0), torch.full((OBS,), 4.0))
    noisy = sac.noisy(batch["obs"])
    assert noisy[:, STATE:].equal(batch["obs"][:, STATE:])
    assert sac.scaled(batch["obs"])[:, :STATE].allclose((batch["obs"][:, :STATE] - 2) / 4)
    assert (noisy[:, :STATE] - sac.scaled(batch["obs"])[:, :STATE]).abs().min() > 0


def test_shifts_are_drawn_by_the_agent_and_never_when_it_acts():
    sac, batch = make(pixel_shift=2), make_batch()
    first, second = sac.noisy(batch["obs"]), sac.noisy(batch["obs"])
    assert first[:, :STATE].equal(second[:, :STATE]) and not first.equal(second)
    assert sac.scaled(batch["obs"]).equal(batch["obs"])
    assert make(pixel_shift=2).noisy(batch["obs"]).equal(first)


def test_a_loaded_agent_sees_alike_and_goes_on_alike(tmp_path):
    spec = PixelObs(CountingEnvs([[1]]), SIDE).spec
    parts = (
        SACConfig(ema_actor=0.1, pixel_shift=1),
        ActorModelConfig((16,), pixels=SIDE),
        OptimConfig(),
        spec,
    )
    sac = build_agent(*parts, CPU)
    sac.update(make_batch())
    save_checkpoint(tmp_path / "last", {"agent": sac.state_dict()}, agent_meta(*parts))
    loaded = load_agent(tmp_path / "last", spec, CPU)
    acting = build_agent(*parts, CPU)
    acting.load_actor_state(sac.actor_state())
    obs = make_batch(3)["obs"]
    assert acting.act(obs, deterministic=True).equal(sac.act(obs, deterministic=True))
    for agent in (sac, loaded):
        agent.update(make_batch(2))
    assert sac.act(obs, deterministic=True).equal(loaded.act(obs, deterministic=True))
    assert sac.act(obs).equal(loaded.act(obs)) and sac.value(obs).equal(loaded.value(obs))
    assert not sac.eval_encoder.linear.weight.equal(sac.encoder.linear.weight)


def test_an_agent_of_other_pixels_cannot_go_on(tmp_path):
    spec = PixelObs(CountingEnvs([[1]]), SIDE).spec
    metas = [agent_meta(SACConfig(), ActorModelConfig(pixels=p), OptimConfig(), spec) for p in (8, None)]
    with pytest.raises(UserError, match=r"trained with actor.model.pixels 8, but the config says None"):
        check_same_agent(*metas, tmp_path)


def test_ppo_refuses_pixels():
    with pytest.raises(UserError, match="pixels is for SAC"):
        build_agent(PPOConfig(), ActorModelConfig(pixels=8), OptimConfig(), CountingEnvs([[1]]).spec, CPU)


def test_sac_learns_what_only_the_picture_shows():
    """A bandit: the picture is bright or dark, and an action of +0.5 or -0.5 is paid. The state is empty."""
    torch.manual_seed(0)
    sac = make(gamma=0.0, critic_layer_norm=True, pixel_shift=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        batch = make_batch(size=32)
        bright = torch.rand(32, 1, generator=generator) > 0.5
        batch["obs"] = torch.zeros(32, OBS)
        batch["obs"][:, STATE:] = torch.where(bright, 0.8, 0.2)
        batch["action"] = torch.rand(32, ACTION, generator=generator) * 2 - 1
        wanted = torch.where(bright, 0.5, -0.5)
        batch["reward"] = -(batch["action"] - wanted).square().sum(1)
        sac.update(batch)
    looks = torch.zeros(2, OBS)
    looks[:, STATE:] = torch.tensor([[0.8], [0.2]])
    action = sac.act(looks, deterministic=True)
    assert (action[0] > 0.2).all() and (action[1] < -0.2).all()

"""ManiSkill envs: auto-reset, time limit, pictures where and of what they were asked for, bad input.

Making a simulation costs a second and the first picture of a process several: all tests share three.
"""

import builtins
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from common.envs import ManiSkillEnvs, Render, Step, episode_seed
from common.runtime import UserError
from common.scenes import VIEWS, CameraConfig, CamerasConfig, DataCollectionConfig, EnvConfig, make_base_env

SMALL = CameraConfig(width=64, height=64)
ACTION = torch.tensor([[0.6, -0.4, -0.5, 1.0]])
ALL = torch.zeros(1, dtype=torch.long)  # the ids of the one env that a simulation on the CPU holds


def env_config(task: str, **changes) -> EnvConfig:
    cameras = changes.pop("cameras", CamerasConfig(main_images=SMALL, extra_view_images=SMALL))
    settings = {"max_episode_steps": 3, "control_freq": 10, "sim_backend": "cpu", "render_backend": "cpu"}
    return EnvConfig(task=task, cameras=cameras, **{**settings, **changes})


@pytest.fixture(scope="module")
def push(renderer: None) -> Iterator[ManiSkillEnvs]:
    envs = ManiSkillEnvs(env_config("PushCube-v1"), num_envs=1, first_env=2)
    yield envs
    envs.close()


@pytest.fixture(scope="module")
def pick(renderer: None) -> Iterator[ManiSkillEnvs]:
    envs = ManiSkillEnvs(env_config("PickCube-v1"), num_envs=1)
    yield envs
    envs.close()


@pytest.fixture(scope="module")
def other_pick(renderer: None) -> Iterator[ManiSkillEnvs]:
    """PickCube as ManiSkill draws it, goal hidden, the second camera turned to the sky."""
    sky = CameraConfig(eye=(0, 0, 2), target=(1, 0, 3), fov=0.5, width=32, height=24)
    cameras = CamerasConfig(SMALL, sky, low_poly=False, show_goal_site=False)
    envs = ManiSkillEnvs(env_config("PickCube-v1", cameras=cameras), num_envs=1)
    yield envs
    envs.close()


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch):
    """Other settings for the rest of the test: `change(envs, max_episode_steps=5)`."""
    return lambda envs, **changes: monkeypatch.setattr(envs, "cfg", replace(envs.cfg, **changes))


def run(envs: ManiSkillEnvs, seed: int, num_steps: int, render: Render = Render.NONE) -> list[Step]:
    envs.reset(seed)
    return [envs.step(ACTION, render) for _ in range(num_steps)]


def put_cube_on_goal(envs: ManiSkillEnvs) -> None:
    from mani_skill.utils.structs import Pose

    position = envs.env.goal_region.pose.p.clone()
    position[:, 2] = 0.02
    envs.env.obj.set_pose(Pose.create_from_pq(position))


# ----------------------------------------------------------------------------------------------------
# Episodes
# ----------------------------------------------------------------------------------------------------


def test_episode_seed_is_fixed_and_differs_by_seed_env_and_episode():
    # pinned: other numbers would make a resumed collection repeat episodes of an older version
    assert [episode_seed(0, 0, 0), episode_seed(1, 2, 3)] == [1484405855, 1911094848]
    seeds = {episode_seed(s, e, k) for s in range(5) for e in range(5) for k in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_reset_begins_the_episodes_that_episode_seed_names(push: ManiSkillEnvs):
    first = push.reset(5)
    assert torch.equal(first, push.env.reset(seed=episode_seed(5, 2, 0))[0])  # env number 2
    run(push, 8, 4)  # another history, and auto-resets
    assert torch.equal(push.reset(5), first)
    assert not torch.equal(push.reset(6), first)
    assert first.dtype == torch.float32
    assert first.shape == (1, push.spec.obs_dim)


def test_auto_reset_keeps_the_true_last_observation(push: ManiSkillEnvs, change):
    """`next_obs` is what the last action led to, `obs` the next episode's first: never one for the other."""
    cut = run(push, seed=5, num_steps=4)
    expected_first = push.env.reset(seed=episode_seed(5, 2, 1))[0]
    change(push, max_episode_steps=9)
    uncut = run(push, seed=5, num_steps=4)

    assert [bool(step.done) for step in cut] == [False, False, True, False]
    assert [bool(step.done) for step in uncut] == [False] * 4
    for t in range(3):
        assert torch.equal(cut[t].next_obs, uncut[t].next_obs)
        assert torch.equal(cut[t].env_reward, uncut[t].env_reward)
    for step in (*cut[:2], *uncut):
        assert torch.equal(step.obs, step.next_obs)
    assert torch.equal(cut[2].obs, expected_first)
    assert not torch.equal(cut[2].obs, cut[2].next_obs)
    assert not torch.equal(cut[3].next_obs, uncut[3].next_obs)


def test_a_step_is_not_changed_by_the_next(push: ManiSkillEnvs):
    first, *_ = run(push, seed=5, num_steps=1, render=Render.ALWAYS)
    kept = [first.obs.clone(), first.next_obs.clone(), first.frames["main_images"].clone()]
    for _ in range(3):
        push.step(-ACTION, Render.ALWAYS)
    for now, then in zip([first.obs, first.next_obs, first.frames["main_images"]], kept, strict=True):
        assert torch.equal(now, then)


class OneBufferCamera:
    """A camera as on a GPU: every picture is a view of one buffer, which the next picture fills."""

    def __init__(self):
        self.buffer, self.number = torch.zeros(1, 4, 4, 4, dtype=torch.uint8), 0

    def capture(self) -> None:
        self.number += 1
        self.buffer.fill_(self.number)

    def get_obs(self, **_) -> dict[str, torch.Tensor]:
        return {"rgb": self.buffer[..., :3]}


def test_pictures_outlive_the_renderers_buffer(push: ManiSkillEnvs, monkeypatch):
    """Under RECORD the last frame of an episode and the first of the next come from one step."""
    cameras = {view: OneBufferCamera() for view in VIEWS}
    monkeypatch.setattr(push.env.scene, "sensors", cameras)
    monkeypatch.setattr(push.env.scene, "update_render", lambda **_: None)
    last = run(push, seed=5, num_steps=3, render=Render.RECORD)[-1]
    assert last.truncated.all()
    assert (int(last.frames["main_images"].max()), int(last.reset_frames["main_images"].max())) == (3, 4)


@pytest.mark.parametrize(
    ("ignore_terminations", "success_step", "terminated", "truncated"),
    [
        (True, None, [0, 0, 0], [0, 0, 1]),
        (True, 1, [0, 0, 0], [0, 0, 1]),  # success is no end
        (False, None, [0, 0, 0], [0, 0, 1]),
        (False, 1, [0, 1, 0], [0, 0, 0]),
        (False, 2, [0, 0, 1], [0, 0, 0]),  # both at once: a success is not cut by time
    ],
)
def test_terminated_and_truncated(
    push: ManiSkillEnvs, change, ignore_terminations, success_step, terminated, truncated
):
    change(push, ignore_terminations=ignore_terminations)
    push.reset(0)
    steps = []
    for t in range(3):
        if t == success_step:
            put_cube_on_goal(push)
        steps.append(push.step(torch.zeros(1, 4)))
    assert [int(step.terminated) for step in steps] == terminated
    assert [int(step.truncated) for step in steps] == truncated
    if success_step is not None:
        assert bool(steps[success_step].success)  # of next_obs, though the env has been reset since
    assert not bool(steps[0].success)


# ----------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "frames", "reset_frames"),
    [
        (Render.NONE, [0, 0, 0, 0], [0, 0, 0, 0]),
        (Render.IF_DONE, [0, 0, 1, 0], [0, 0, 0, 0]),
        (Render.ALWAYS, [1, 1, 1, 1], [0, 0, 0, 0]),
        (Render.RECORD, [1, 1, 1, 1], [0, 0, 1, 0]),
    ],
)
def test_frames_come_only_where_asked_for(push: ManiSkillEnvs, monkeypatch, mode, frames, reset_frames):
    renderings = []
    scene = push.env.scene
    update = scene.update_render
    monkeypatch.setattr(scene, "update_render", lambda **which: renderings.append(1) or update(**which))
    steps = run(push, seed=0, num_steps=4, render=mode)
    assert [len(step.frame_ids) for step in steps] == frames
    assert [len(step.reset_ids) for step in steps] == reset_frames
    assert len(renderings) == sum(frames) + sum(reset_frames)  # nothing rendered and thrown away
    for step in steps:
        assert set(step.frames) == (set(VIEWS) if len(step.frame_ids) else set())
        for image in (*step.frames.values(), *step.reset_frames.values()):
            assert (image.dtype, image.shape) == (torch.uint8, (1, 64, 64, 3))


def test_modes_may_differ_by_step_as_a_tensor(push: ManiSkillEnvs):
    push.reset(0)
    modes = [Render.ALWAYS, Render.NONE, Render.IF_DONE]
    steps = [push.step(ACTION, torch.tensor([int(mode)], dtype=torch.uint8)) for mode in modes]
    assert [step.frame_ids.tolist() for step in steps] == [[0], [], [0]]


def test_the_last_frame_shows_the_last_state_and_the_reset_frame_the_first(push: ManiSkillEnvs, change):
    cut = run(push, seed=5, num_steps=3, render=Render.RECORD)[-1]
    first_frame = push.render(ALL)
    change(push, max_episode_steps=9)
    uncut = run(push, seed=5, num_steps=3, render=Render.ALWAYS)[-1]
    for view in VIEWS:
        assert torch.equal(cut.frames[view], uncut.frames[view])
        assert torch.equal(cut.reset_frames[view], first_frame[view])
        assert not torch.equal(cut.frames[view], cut.reset_frames[view])


def test_only_the_views_asked_for_are_rendered(push: ManiSkillEnvs, monkeypatch):
    monkeypatch.setattr(push, "views", ("extra_view_images",))
    assert set(push.render(ALL)) == {"extra_view_images"}
    assert push.render(ALL[:0]) == {}


def num_green(frame: torch.Tensor) -> int:
    red, green, blue = frame.int().unbind(-1)
    return int(((green > red + 40) & (green > blue + 40)).sum())


def test_the_goal_is_seen_where_it_is_to_be(pick: ManiSkillEnvs, other_pick: ManiSkillEnvs):
    """ManiSkill hides goal markers from its own cameras; an image model could not see where the goal is."""
    for seed in range(3):
        for envs in (pick, other_pick):
            envs.reset(seed)
        assert num_green(pick.render(ALL)["main_images"]) >= 2  # small, at 64 x 64
        assert num_green(other_pick.render(ALL)["main_images"]) == 0
    assert pick.spec.render["show_goal_site"] is True
    assert other_pick.spec.render["show_goal_site"] is False


def test_low_poly_pictures_differ_and_say_so(pick: ManiSkillEnvs, other_pick: ManiSkillEnvs):
    black = []
    for envs in (pick, other_pick):
        envs.reset(0)
        black.append(float((envs.render(ALL)["main_images"] == 0).all(-1).float().mean()))
    assert black[0] > 0.1  # low poly: no ground behind the table
    assert black[1] < 0.01
    assert pick.spec.render["low_poly"] is True  # the default where the CPU renders
    assert other_pick.spec.render["low_poly"] is False
    assert pick.spec.render != other_pick.spec.render


def test_low_poly_outlives_a_reset_that_builds_the_scene_anew():
    """PegInsertionSide does at each reset: hulls and goal markers were those of the first scene alone."""
    envs = ManiSkillEnvs(env_config("PegInsertionSide-v1"), num_envs=1)
    envs.reset(0)
    links = envs.env.agent.robot.links
    shapes = [shape for link in links for shape in render_shapes(link._objs[0].entity)]
    envs.close()
    num_triangles = sum(len(part.triangles) for shape in shapes for part in shape.parts)
    assert 0 < num_triangles < 10_000  # the Panda's own visuals have 135,000


def render_shapes(entity) -> list:
    import sapien

    body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
    meshes = [] if body is None else body.render_shapes
    return [shape for shape in meshes if isinstance(shape, sapien.render.RenderShapeTriangleMesh)]


def test_a_camera_of_the_config_takes_the_picture_and_is_recorded(
    pick: ManiSkillEnvs, other_pick: ManiSkillEnvs
):
    for envs in (pick, other_pick):
        envs.reset(0)
    sky, table = (envs.render(ALL)["extra_view_images"] for envs in (other_pick, pick))
    assert sky.shape == (1, 24, 32, 3)
    assert other_pick.spec.frame_shape == {"main_images": (64, 64, 3), "extra_view_images": (24, 32, 3)}
    assert sky.reshape(-1, 3).unique(dim=0).shape[0] == 1  # nothing up there
    assert table.reshape(-1, 3).unique(dim=0).shape[0] > 100

    facts, defaults = other_pick.spec.render["views"], pick.spec.render["views"]
    assert facts["main_images"] == defaults["main_images"]
    sky_facts = facts["extra_view_images"]
    assert sky_facts["pose"][:3] == [0.0, 0.0, 2.0]
    assert (sky_facts["fov"], sky_facts["width"], sky_facts["height"]) == (0.5, 32, 24)


# ----------------------------------------------------------------------------------------------------
# What an env says of itself
# ----------------------------------------------------------------------------------------------------


def test_obs_layout_names_the_columns(pick: ManiSkillEnvs):
    obs = pick.reset(3)
    part = {name: obs[0, start:stop] for name, (start, stop) in pick.spec.obs_layout.items()}
    assert torch.equal(part["goal_pos"], pick.env.goal_site.pose.p[0])
    assert torch.equal(part["obj_pose"], pick.env.cube.pose.raw_pose[0])
    assert torch.equal(part["tcp_pose"], pick.env.agent.tcp_pose.raw_pose[0])
    assert torch.equal(part["qpos"], pick.env.agent.robot.qpos[0])
    columns = sorted(pick.spec.obs_layout.values())
    assert [start for start, _ in columns] == [0, *(stop for _, stop in columns[:-1])]  # without a gap
    assert columns[-1][1] == pick.spec.obs_dim == obs.shape[1]


def test_observe_time_appends_the_share_of_the_time_limit(push: ManiSkillEnvs, change):
    state_dim = push.reset(3).shape[1]
    change(push, observe_time=True)
    spec = push._describe()
    assert (spec.obs_dim, spec.obs_layout["time"]) == (state_dim + 1, (state_dim, state_dim + 1))
    assert push.reset(3)[0, -1] == 0
    steps = [push.step(ACTION) for _ in range(3)]
    assert [round(float(step.next_obs[0, -1]), 3) for step in steps] == [0.333, 0.667, 1.0]
    assert steps[-1].obs[0, -1] == 0  # of the next episode
    change(push, observe_time=False)
    assert torch.equal(steps[-1].obs[:, :-1], run(push, 3, 3)[-1].obs)


def test_a_binary_gripper_opens_or_closes_whatever_the_size_of_the_action(pick: ManiSkillEnvs, change):
    def qpos(gripper: float) -> torch.Tensor:
        pick.reset(3)
        steps = [pick.step(torch.tensor([[0.0, 0.0, 0.1, gripper]])) for _ in range(3)]
        return steps[-1].next_obs[0, :9]

    half, fully = qpos(-0.2), qpos(-1.0)
    assert not half.equal(fully)
    change(pick, binary_gripper=True)
    assert qpos(-0.2).equal(fully) and qpos(0.1).equal(qpos(1.0)) and qpos(0.0).equal(qpos(1.0))


@pytest.mark.parametrize("parts", [{"arm": (0, 4)}, {"gripper": (0, 1), "arm": (1, 4)}])
def test_a_binary_gripper_needs_a_gripper_at_the_end(pick: ManiSkillEnvs, change, monkeypatch, parts):
    change(pick, binary_gripper=True)
    assert pick._describe().control["binary_gripper"]
    monkeypatch.setattr(pick.env.agent.controller, "action_mapping", parts)
    with pytest.raises(UserError, match=r"binary_gripper: .* PickCube-v1 under .* moves no gripper"):
        pick._describe()


def test_observe_fine_appends_parts_that_tell_millimetres(pick: ManiSkillEnvs, change, monkeypatch):
    state = pick.reset(3)[0]
    change(pick, observe_fine={"obj_to_goal_pos": (0.03, 0.1), "no_such_part": ()}, observe_time=True)
    monkeypatch.setattr(pick, "spec", pick._describe())
    obs, layout = pick.reset(3)[0], pick.spec.obs_layout
    assert obs[: len(state)].equal(state) and len(obs) == pick.spec.obs_dim == len(state) + 7
    far = obs[slice(*layout["obj_to_goal_pos"])]
    for scale in (0.03, 0.1):
        torch.testing.assert_close(obs[slice(*layout[f"obj_to_goal_pos/{scale}"])], torch.tanh(far / scale))
    assert layout["time"] == (len(obs) - 1, len(obs))
    change(pick, observe_fine={"obj_to_mars": (0.1,)})
    with pytest.raises(UserError, match=r"PickCube-v1 has no obj_to_mars in its state, only qpos, qvel, .*"):
        pick._describe()


def test_spec(push: ManiSkillEnvs):
    spec = push.spec
    assert (spec.task, spec.action_dim) == ("PushCube-v1", 4)
    assert spec.task_description == "Push the cube to the red and white target on the table."
    assert "success" in spec.info_types
    assert "elapsed_steps" not in spec.info_types
    assert replace(push.cfg, task="OpenDoor-v1").description == "Do the task OpenDoor-v1."
    assert replace(push.cfg, task_description="Shove it.").description == "Shove it."


# ----------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "PushCub-v1"}, "ManiSkill has no task 'PushCub-v1', did you mean 'PushCube-v1'?"),
        ({"task": "PushCube-v1", "control_mode": "pd_ee"}, "PushCube-v1 lacks control_mode pd_ee"),
        ({"task": "StackPyramid-v1"}, "or reward_mode normalized_dense"),
    ],
)
def test_what_maniskill_cannot_build_is_refused_in_one_line(settings: dict, message: str):
    with pytest.raises(UserError) as caught:
        make_base_env(env_config(**settings), 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="gpu asked for, but torch sees no GPU"):
        make_base_env(env_config("PushCube-v1", sim_backend="gpu"), 1)


def test_a_task_that_wants_a_download_is_refused_without_a_question(monkeypatch: pytest.MonkeyPatch):
    """ManiSkill asks at the terminal: a run hung there, or died of FileNotFoundError."""
    from mani_skill.utils import assets, download_asset

    monkeypatch.setattr(assets, "is_data_source_downloaded", lambda _: False)
    with pytest.raises(UserError, match=r"run python -m mani_skill\S+download_asset PickSingleYCB-v1$"):
        make_base_env(env_config("PickSingleYCB-v1"), 1)

    asked = []
    monkeypatch.setattr(builtins, "input", lambda question: asked.append(question) or "n")
    ask = download_asset.prompt_yes_no
    monkeypatch.setattr("os.path.exists", lambda path: "widowxai" not in str(path))
    with pytest.raises(UserError, match=r"run python -m mani_skill\S+download_asset widowxai$"):
        make_base_env(env_config("PickCubeWidowXAI-v1"), 1)
    assert asked == []
    assert download_asset.prompt_yes_no is ask


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CameraConfig(eye=(0, 0, 1)), "eye and target go together"),
        (lambda: CameraConfig(width=4), "at least 8x8 pixels, got 4x128"),
        (lambda: EnvConfig(num_envs=0), "num_envs must be at least 1, got 0"),
        (lambda: EnvConfig(max_episode_steps=0), "max_episode_steps must be at least 1, got 0"),
        # nothing would ever be kept, and collect.py would run for ever
        (lambda: EnvConfig(data_collection=DataCollectionConfig(only_success=True)), "only_success keeps"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()

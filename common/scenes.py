"""ManiSkill scenes: which task, seen by which cameras, drawn how.

`EnvConfig` is the section `env.train` / `env.eval` of every config. `make_base_env` builds the task's own
ManiSkill class with two cameras in place of its sensors: `main_images` (the task's camera) and
`extra_view_images` (the pose of the task's human render camera), both movable in the config.
"""

import contextlib
import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from common.fast_control import use_fast_control
from common.runtime import UserError

# Mesa's CPU renderer starts one thread per core in every process that renders; several env processes then
# fight for the cores. Read when the render device is made, so it must be set before the first env.
os.environ.setdefault("LP_NUM_THREADS", "0")

VIEWS = ("main_images", "extra_view_images")

# What a vision-language model is told; also written into every episode.
TASK_DESCRIPTIONS = {
    "PushCube-v1": "Push the cube to the red and white target on the table.",
    "PullCube-v1": "Pull the cube to the red and white target on the table.",
    "PickCube-v1": "Pick up the red cube and place it on the green spot on the table.",
    "StackCube-v1": "Pick up the red cube and stack it on the green cube.",
    "LiftPegUpright-v1": "Lift the peg and stand it upright on the table.",
    "PlaceSphere-v1": "Pick up the sphere and place it into the bin.",
    "PegInsertionSide-v1": "Pick up the peg and insert it into the hole in the box.",
    "PokeCube-v1": "Poke the cube with the peg onto the target on the table.",
    "RollBall-v1": "Roll the ball to the target at the other end of the table.",
}


@dataclass
class CameraConfig:
    eye: tuple[float, float, float] | None = None  # m, world frame; null: the task's own camera
    target: tuple[float, float, float] | None = None  # m, the point looked at
    fov: float | None = None  # rad; null: the task's own
    width: int = 128
    height: int = 128

    def __post_init__(self):
        if (self.eye is None) != (self.target is None):
            raise ValueError("eye and target go together: give both or neither")
        if min(self.width, self.height) < 8:
            raise ValueError(f"a camera needs at least 8x8 pixels, got {self.width}x{self.height}")


@dataclass
class CamerasConfig:
    main_images: CameraConfig = field(default_factory=CameraConfig)
    extra_view_images: CameraConfig = field(default_factory=CameraConfig)
    shader: Literal["minimal", "default", "rt-fast"] = "minimal"
    low_poly: bool | None = None  # draw collision hulls; null: on where the CPU renders (8x faster there)
    show_goal_site: bool = (
        True  # ManiSkill hides goal markers from sensors: no image model could see the goal
    )


@dataclass
class DataCollectionConfig:
    enabled: bool = False
    save_dir: str | None = None  # null: collected_data in the run folder
    export_format: Literal["pickle"] = "pickle"
    # sim_state: no pictures but the simulator's state; collect.py --render-from draws them, by any cameras
    frames: Literal["rendered", "sim_state"] = "rendered"
    only_success: bool = False  # keep only episodes that succeeded and terminated
    # rl_train.py: write the critic's score of each frame into the episodes, as `gae` (see common/trend.py).
    gae_gamma: float | None = None  # discount, that of the algorithm; null: no score
    gae_lambda: float | None = (
        None  # 0: what the critic expects; 1: what the env paid until the episode's end
    )

    def __post_init__(self):
        if (self.gae_gamma is None) != (self.gae_lambda is None):
            raise ValueError("data_collection.gae_gamma and gae_lambda go together: give both or neither")
        if self.gae_gamma is not None and not (0 <= self.gae_gamma < 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError(
                "data_collection.gae_gamma must lie in [0, 1) and gae_lambda in [0, 1], got "
                f"{self.gae_gamma} and {self.gae_lambda}"
            )


@dataclass
class EnvConfig:
    env_type: Literal["maniskill"] = "maniskill"  # realworld: an arm, see common/franka_config.py
    task: str = "PickCube-v1"  # any registered ManiSkill task
    num_envs: int = 2
    num_workers: int | None = (
        None  # CPU processes (env.train's serve env.eval too); null: one per core; 0: none
    )
    max_episode_steps: int = 50
    ignore_terminations: bool = (
        True  # episodes run to the time limit whatever the simulator thinks of success
    )
    observe_time: bool = False  # append the share of the time limit that has passed to the state
    # Part of the state -> scales in its unit: tanh(part / scale) is appended, which tells millimetres near 0.
    # No scales ([]) take away what a base YAML asks for.
    observe_fine: dict[str, tuple[float, ...]] = field(default_factory=dict)
    control_mode: str = "pd_ee_delta_pos"
    control_freq: int | None = None  # Hz; null: the task's own (20)
    # The last action's sign alone counts: the gripper opens (0 or more) or closes; none gets stuck half open.
    binary_gripper: bool = False
    sim_backend: Literal["auto", "cpu", "gpu"] = "auto"  # auto: gpu where torch sees one
    render_backend: Literal["auto", "cpu", "gpu"] = "auto"
    reward_mode: Literal["dense", "normalized_dense", "sparse"] = "normalized_dense"
    task_description: str | None = None  # null: from the table above
    cameras: CamerasConfig = field(default_factory=CamerasConfig)
    data_collection: DataCollectionConfig = field(default_factory=DataCollectionConfig)

    def __post_init__(self):
        if self.num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {self.num_envs}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {self.num_workers}")
        if any(scale <= 0 for scales in self.observe_fine.values() for scale in scales):
            raise ValueError(f"observe_fine holds scales above 0, got {self.observe_fine}")
        if self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {self.max_episode_steps}")
        if self.data_collection.only_success and self.ignore_terminations:
            raise ValueError(
                "data_collection.only_success keeps episodes that terminated, and ignore_terminations: true "
                "lets none; set one of them to false"
            )

    @property
    def backend(self) -> str:
        """`gpu` or `cpu`, with `auto` resolved."""
        if self.sim_backend != "auto":
            return self.sim_backend
        return "gpu" if torch.cuda.is_available() else "cpu"

    @property
    def renderer(self) -> str:
        """`gpu` or `cpu`, with `auto` resolved."""
        if self.render_backend != "auto":
            return self.render_backend
        return "gpu" if torch.cuda.is_available() else "cpu"

    @property
    def low_poly(self) -> bool:
        return self.renderer == "cpu" if self.cameras.low_poly is None else self.cameras.low_poly

    @property
    def description(self) -> str:
        return self.task_description or TASK_DESCRIPTIONS.get(self.task, f"Do the task {self.task}.")


def make_base_env(cfg: EnvConfig, num_envs: int):
    """The task's own class with two cameras of ours in place of its sensors.

    UserError for an unknown task, a download it wants, a control or reward mode it lacks, a missing GPU.
    """
    registered = _registered(cfg.task)
    use_compiled_kinematics()
    if "gpu" in (cfg.backend, cfg.renderer) and not torch.cuda.is_available():
        raise UserError(
            "env.sim_backend / render_backend: gpu asked for, but torch sees no GPU; use 'auto' or 'cpu'"
        )
    if cfg.backend == "cpu" and num_envs != 1:
        raise ValueError("PhysX on the CPU holds one env per scene")

    class WithCameras(registered.cls):
        @property
        def _default_sensor_configs(self):
            return _camera_configs(
                cfg, super()._default_sensor_configs, self._default_human_render_camera_configs
            )

        def _after_reconfigure(self, options):
            # some tasks build their scene anew at every reset (PegInsertionSide)
            super()._after_reconfigure(options)
            use_fast_control(self.agent)
            if cfg.cameras.show_goal_site:
                self._hidden_objects.clear()
            if cfg.low_poly:
                use_low_poly_visuals(self.scene)

    kwargs = dict(registered.default_kwargs)
    kwargs.pop("sensor_configs", None)
    if cfg.control_freq is not None:
        kwargs["sim_config"] = {"control_freq": cfg.control_freq}
    try:
        with _no_questions(cfg.task):
            return WithCameras(
                num_envs=num_envs,
                obs_mode="state",
                reward_mode=cfg.reward_mode,
                control_mode=cfg.control_mode,
                sim_backend="physx_cuda" if cfg.backend == "gpu" else "physx_cpu",
                render_backend=cfg.renderer,
                sensor_configs={"shader_pack": cfg.cameras.shader},
                **kwargs,
            )
    except (AssertionError, NotImplementedError) as error:  # how ManiSkill refuses modes
        raise UserError(
            f"task {cfg.task} lacks control_mode {cfg.control_mode} or reward_mode {cfg.reward_mode}: {error}"
        ) from error


def _registered(task: str):
    """ManiSkill's entry for a task whose assets are all here."""
    import mani_skill.envs  # noqa: F401  registers the tasks
    from mani_skill.utils import assets
    from mani_skill.utils.registration import REGISTERED_ENVS

    if task not in REGISTERED_ENVS:
        near = difflib.get_close_matches(task, REGISTERED_ENVS, n=1)
        hint = f", did you mean '{near[0]}'?" if near else ""
        raise UserError(f"env.task: ManiSkill has no task '{task}'{hint}")
    sources = assets.expand_data_group_into_individual_data_source_ids(task)
    if not all(assets.is_data_source_downloaded(source) for source in sources):
        raise _needs_download(task, task)
    return REGISTERED_ENVS[task]


def use_compiled_kinematics() -> None:
    """Solve inverse kinematics in C++, whatever else is installed.

    Where there is a Python package pinocchio (franky-sim brings it) SAPIEN prefers that: steps take thrice as
    long, and a target out of reach moves the arm elsewhere.
    """
    from mani_skill.agents.controllers.utils import kinematics

    with contextlib.suppress(ImportError):  # SAPIEN has it built for Linux only
        from sapien.pysapien_pinocchio import PinocchioModel

        kinematics.PinocchioModel = PinocchioModel


def _needs_download(task: str, what: str) -> UserError:
    return UserError(
        f"task {task} needs assets that are not here: run python -m mani_skill.utils.download_asset {what}"
    )


@contextlib.contextmanager
def _no_questions(task: str) -> Iterator[None]:
    """ManiSkill asks at the terminal before it downloads a robot; a run must not wait for an answer."""
    from mani_skill.utils import download_asset

    def refuse(question: str):  # "Robot <name> has assets available for download. ..."
        raise _needs_download(task, question.split()[1])

    ask, download_asset.prompt_yes_no = download_asset.prompt_yes_no, refuse
    try:
        yield
    finally:
        download_asset.prompt_yes_no = ask


def _camera_configs(cfg: EnvConfig, task_sensors, human_camera) -> list:
    from mani_skill.sensors.camera import CameraConfig as ManiSkillCamera
    from mani_skill.utils.sapien_utils import look_at

    def first(configs):
        configs = list(configs.values()) if isinstance(configs, dict) else configs
        if isinstance(configs, (list, tuple)):
            return configs[0] if configs else None
        return configs

    own = {"main_images": first(task_sensors), "extra_view_images": first(human_camera)}
    cameras = []
    for view, task_camera in own.items():
        ours: CameraConfig = getattr(cfg.cameras, view)
        if ours.eye is None and (task_camera is None or task_camera.mount is not None):
            raise UserError(
                f"{cfg.task} has no fixed camera for {view}: set env.*.cameras.{view}.eye and target"
            )
        pose = task_camera.pose if ours.eye is None else look_at(ours.eye, ours.target)
        fov = ours.fov or (task_camera.fov if task_camera is not None else None) or 1.0
        cameras.append(ManiSkillCamera(view, pose, ours.width, ours.height, fov=fov, near=0.01, far=100))
    return cameras


def camera_facts(camera) -> dict[str, Any]:
    """What of a camera shows in its pictures, as plain numbers that survive a trip through JSON."""
    pose = np.asarray(
        camera.pose.raw_pose if hasattr(camera.pose, "raw_pose") else [*camera.pose.p, *camera.pose.q]
    )
    return {
        "pose": [round(float(x), 4) for x in pose.reshape(-1)[:7]],  # position in m, quaternion wxyz
        "fov": round(float(camera.fov), 4),
        "width": camera.width,
        "height": camera.height,
    }


# ----------------------------------------------------------------------------------------------------
# Cheap pictures on the CPU
# ----------------------------------------------------------------------------------------------------


def use_low_poly_visuals(scene) -> None:
    """Draw every robot link as its convex collision hulls and hide the ground plane.

    Rendering on the CPU is vertex work: the Panda's visuals have 135k triangles and the ground 20k, its hulls
    a few thousand; a frame falls from about 30 ms to about 4 ms. The picture changes, so episodes and reward
    models record it.
    """
    import sapien

    for articulation in scene.articulations.values():
        for link in articulation.links:
            for physical in link._objs:
                _draw_hulls(physical.entity, physical.collision_shapes, sapien)
    for name, actor in scene.actors.items():
        if name.startswith("ground"):
            for entity in actor._objs:
                _drop_visual(entity, sapien)


def _drop_visual(entity, sapien) -> None:
    body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
    if body is not None:
        entity.remove_component(body)


def _draw_hulls(entity, shapes, sapien) -> None:
    """Replace the entity's visual by its collision shapes; where none can be drawn, keep it."""
    material = sapien.render.RenderMaterial()
    material.base_color = [0.85, 0.85, 0.85, 1.0]
    drawn = []
    for shape in shapes:
        if isinstance(shape, sapien.physx.PhysxCollisionShapeConvexMesh):
            drawn.append(_flat_shaded_mesh(shape.vertices * shape.scale, shape.triangles, material, sapien))
        elif isinstance(shape, sapien.physx.PhysxCollisionShapeBox):
            drawn.append(sapien.render.RenderShapeBox(shape.half_size, material))
        else:
            continue
        drawn[-1].local_pose = shape.local_pose
    if drawn:
        _drop_visual(entity, sapien)
        body = sapien.render.RenderBodyComponent()
        for shape in drawn:
            body.attach(shape)
        entity.add_component(body)


def _flat_shaded_mesh(vertices: np.ndarray, triangles: np.ndarray, material, sapien):
    corners = vertices[triangles]  # (F, 3, 3): own corners per face: own normals
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-12
    num_corners = len(corners) * 3
    return sapien.render.RenderShapeTriangleMesh(
        corners.reshape(-1, 3).astype(np.float32),
        np.arange(num_corners, dtype=np.uint32).reshape(-1, 3),
        np.repeat(normal, 3, axis=0).astype(np.float32),
        np.zeros((num_corners, 2), np.float32),
        material,
    )

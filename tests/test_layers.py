"""The direction of imports: `common/` is a table of levels, and a module imports only from lower ones.

The table here is the one that counts, a new module gets its place here first. Modules are parsed, not
imported, so the test costs nothing and needs no simulator.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LEVELS = [
    # 0 knows nothing of robots
    [
        "runtime",
        "unpickle",
        "files",
        "declarations",
        "yaml_tree",
        "config",
        "log",
        "checkpoint",
        "processes",
        "device_thread",
        "ranks",
        "timing",
    ],
    # 1 data and pure functions
    [
        "episodes",
        "payload",
        "add_frames",
        "frames",
        "trend",
        "prompts",
        "history",
        "rewards",
        "hard_frames",
        "drift",
        "intervals",
        "baselines",
        "metrics",
        "frame_card",
        "audit",
        "windows",
        "trend_card",
        "preprocessing",
        "wire",
        "link_keys",
        "link",
        "block_split",
        "labelling",
        "poses",
        "arm_protocol",
    ],
    # 2 things with weights
    [
        "nets",
        "buffers",
        "ppo",
        "sac",
        "training",
        "resnets",
        "resnet_reward",
        "fast_vision",
        "qwen_inputs",
        "qwen_reward",
        "qwen_checkpoint",
        "qwen_sft",
        "vlm_api",
        "fast_control",
    ],
    # 3 the world
    [
        "geometry",
        "scenes",
        "envs",
        "wrappers",
        "pixels",
        "scripted",
        "spacemouse",
        "keyboards",
        "devices",
        "cameras",
        "maniskill_arm",
        "franky_arm",
        "serl_arm",
        "arms",
        "franka_config",
        "franka",
        "franka_wrappers",
    ],
    # 4 other processes, pictures
    [
        "env_workers",
        "reward_models",
        "reward_config",
        "reward_client",
        "judging",
        "reward_server",
        "reward_link",
        "video",
        "report",
        "frame_report",
        "trend_report",
        "trace_page",
        "robot_envs",
        "scripted_operator",
        "session",
        "review",
        "live_trace",
    ],
    # 5 parts of an RL run
    [
        "agents",
        "prior",
        "refresh",
        "experience",
        "evaluation",
        "recorded",
        "async_rollout",
        "run",
        "rl_config",
        "policy_mix",
        "rerender",
        "robot_run",
        "worlds",
    ],
]

# What others of its own level may import all the same, those to the right of it: module -> who.
WITHIN_LEVEL = {
    "runtime": {"files", "yaml_tree", "config", "log", "checkpoint", "processes", "device_thread", "ranks"},
    "unpickle": {"files"},
    "files": {"config", "log", "checkpoint"},
    "declarations": {"config"},
    "yaml_tree": {"config"},
    "episodes": {"hard_frames", "add_frames", "trend", "windows"},
    "trend": {"prompts", "windows", "rewards", "trend_card", "audit"},
    "rewards": {"audit", "metrics", "frame_card", "hard_frames"},
    "prompts": {"windows", "rewards"},
    "history": {"rewards"},
    "payload": {"add_frames", "frames", "labelling"},
    "windows": {"trend_card"},
    "intervals": {"baselines", "metrics", "audit", "frame_card", "trend_card"},
    "baselines": {"frame_card", "trend_card"},
    "metrics": {"frame_card", "trend_card", "audit"},
    "preprocessing": {"labelling"},
    "block_split": {"labelling"},
    "frames": {"windows", "frame_card"},
    "nets": {"ppo", "sac"},
    "buffers": {"ppo", "sac"},
    "resnets": {"resnet_reward"},
    "fast_vision": {"qwen_checkpoint"},
    "qwen_inputs": {"qwen_reward", "qwen_checkpoint", "qwen_sft", "vlm_api"},
    "qwen_reward": {"qwen_checkpoint", "qwen_sft", "vlm_api"},
    "qwen_checkpoint": {"qwen_sft", "vlm_api"},
    "geometry": {"wrappers", "scripted", "envs"},
    "wire": {"link"},
    "link_keys": {"link"},
    "reward_models": {"reward_config", "reward_client", "reward_link"},
    "reward_config": {"reward_client", "judging", "reward_server", "reward_link", "robot_envs"},
    "reward_client": {"judging", "reward_server", "reward_link", "robot_envs"},
    "reward_server": {"reward_link"},
    "scenes": {"envs", "wrappers", "pixels", "maniskill_arm", "franka_config"},
    "envs": {"wrappers", "pixels"},
    "wrappers": {"pixels"},
    "spacemouse": {"devices"},
    "keyboards": {"devices"},
    "devices": {"franka_wrappers"},
    "cameras": {"franka_config", "franka", "franka_wrappers"},
    "maniskill_arm": {"arms"},
    "franky_arm": {"arms"},
    "serl_arm": {"arms"},
    "arms": {"franka_config", "franka", "franka_wrappers"},
    "franka_config": {"franka", "franka_wrappers"},
    "franka": {"franka_wrappers"},
    "video": {"report", "trace_page", "live_trace"},
    "trace_page": {"live_trace"},
    "report": {"frame_report", "trend_report", "live_trace"},
    "reward_link": {"robot_envs"},
    "robot_envs": {"session"},
    "scripted_operator": {"session"},
    "session": {"review", "live_trace"},
    "agents": {"async_rollout", "run", "policy_mix"},
    "run": {"rl_config"},
    "prior": {"experience"},
    "refresh": {"experience"},
    "experience": {"async_rollout", "run"},
    "evaluation": {"recorded", "run"},
    "robot_run": {"worlds"},
}

# Packages that are slow to import or that only some users have, and the modules about nothing else. Elsewhere
# the function that needs one imports it, so that nobody else pays for it or misses it.
LATE_IMPORTS = {
    "mani_skill": {"scenes"},
    "sapien": {"scenes"},
    "transformers": set(),
    "peft": set(),
    "matplotlib": {"report"},
    "sklearn": set(),
    "tensorboard": set(),
    "pyspacemouse": set(),
    "prompt_toolkit": set(),
    "zmq": set(),
    "franky": set(),
    "pyrealsense2": set(),
    "cv2": set(),
    "evdev": set(),
}

LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path for path in (ROOT / "common").glob("*.py") if path.name != "__init__.py")
SCRIPTS = sorted(ROOT.glob("*.py"))


def imports(tree: ast.AST) -> list[str]:
    """Dotted names that the statements under `tree` import: `from common import x` is `common.x`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"common.{alias.name}" for alias in node.names] if module == "common" else [module]
    return names


def runs_at_import(source: str) -> ast.Module:
    """The module without what runs later (functions) or never (`if TYPE_CHECKING`)."""

    class Drop(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

    return Drop().visit(ast.parse(source))


def faults_of_module(name: str, source: str) -> list[str]:
    """What is wrong with the imports of `common/<name>.py`, inside functions too; empty if nothing is."""
    if name not in LEVEL_OF:
        return [f"common/{name}.py has no level: add it to LEVELS in tests/test_layers.py"]
    faults = []
    for imported in imports(ast.parse(source)):
        if imported.startswith("."):
            faults.append(f"relative import {imported!r}: write common.x")
        if not imported.startswith("common."):
            continue
        other = imported.split(".")[1]
        if other not in LEVEL_OF:
            faults.append(f"{other} has no level")
        elif LEVEL_OF[other] > LEVEL_OF[name]:
            faults.append(f"{name} (level {LEVEL_OF[name]}) imports {other} (level {LEVEL_OF[other]})")
        elif LEVEL_OF[other] == LEVEL_OF[name] and name not in WITHIN_LEVEL.get(other, ()):
            faults.append(f"{name} imports {other} of its own level {LEVEL_OF[name]}")
    for imported in imports(runs_at_import(source)):
        package = imported.split(".")[0]
        if package in LATE_IMPORTS and name not in LATE_IMPORTS[package]:
            faults.append(
                f"{name} imports {package} at module level: import it in the function that needs it"
            )
    return faults


def faults_of_script(name: str, source: str, scripts: set[str]) -> list[str]:
    """What is wrong with a script: its imports, and work at module level, which a spawned worker repeats."""
    tree = ast.parse(source)
    faults = [
        f"{name} imports the script {imported}"
        for imported in imports(tree)
        if imported.split(".")[0] in scripts | {"benchmarks", "tests"}
    ]
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    guard = "if __name__ == '__main__':\n    run_script(main)"
    *body, last = tree.body
    if not ast.get_docstring(tree):
        faults.append(f"{name} does not open with what it does")
    if ast.unparse(last) != guard:
        faults.append(f"{name} does not end with: {guard}")
    faults += [
        f"{name}:{node.lineno} works at module level"
        for node in body[1:]
        if not isinstance(node, definitions) and not ast.unparse(node).startswith("if TYPE_CHECKING")
    ]
    return faults


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_imports_only_from_levels_above(path: Path):
    assert faults_of_module(path.stem, path.read_text()) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_stands_alone(path: Path):
    assert faults_of_script(path.stem, path.read_text(), {other.stem for other in SCRIPTS}) == []


def test_exceptions_within_a_level_point_one_way():
    place = {name: (level, position) for level, row in enumerate(LEVELS) for position, name in enumerate(row)}
    for imported, importers in WITHIN_LEVEL.items():
        for name in importers:
            assert place[name][0] == place[imported][0], f"{name} and {imported} are of different levels"
            assert place[name][1] > place[imported][1], f"{name} stands left of {imported}"


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("episodes", "from common.files import save_json", ""),
        (
            "episodes",
            "from common.env_workers import EnvWorkers",
            "episodes (level 1) imports env_workers (level 4)",
        ),
        ("episodes", "from common import env_workers", "episodes (level 1) imports env_workers (level 4)"),
        ("episodes", "def read():\n    import common.envs", "episodes (level 1) imports envs (level 3)"),
        ("sac", "from common.nets import Actor", ""),
        ("nets", "from common.sac import SAC", "nets imports sac of its own level 2"),
        ("files", "from common.log import RunLog", "files imports log of its own level 0"),
        ("rewards", "from . import metrics", "relative import '.': write common.x"),
        ("extras", "", "common/extras.py has no level: add it to LEVELS in tests/test_layers.py"),
        ("env_workers", "def child():\n    import mani_skill.envs", ""),
        ("episodes", "if TYPE_CHECKING:\n    import sapien", ""),
        (
            "env_workers",
            "import mani_skill.envs",
            "env_workers imports mani_skill at module level: import it in the function that needs it",
        ),
    ],
)
def test_what_counts_as_a_fault_of_a_module(name: str, source: str, fault: str):
    assert faults_of_module(name, source) == ([fault] if fault else [])


def test_what_counts_as_a_fault_of_a_script():
    good = '"""Does."""\nimport torch\ndef main(): ...\nif __name__ == "__main__":\n    run_script(main)\n'
    bad = '"""Does."""\nimport collect\ntorch.manual_seed(0)\nmain()\n'
    assert faults_of_script("train", good, {"train", "collect"}) == []
    assert faults_of_script("train", bad, {"train", "collect"}) == [
        "train imports the script collect",
        "train does not end with: if __name__ == '__main__':\n    run_script(main)",
        "train:3 works at module level",
    ]

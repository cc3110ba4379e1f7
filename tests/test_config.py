"""common/config.py: what YAML and command line may say, and what a mistake is told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from common import config
from common.config import ConfigError
from common.runtime import UserError
from common.yaml_tree import parse

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Logger:
    log_path: str | None = None  # folder of the run
    experiment_name: str = "run"


@dataclass
class Runner:
    logger: Logger = field(default_factory=lambda: Logger(experiment_name="push"))
    max_steps: int = 100


@dataclass
class PPO:
    name: Literal["ppo"] = "ppo"
    gamma: float = 0.8
    hidden_dims: tuple[int, ...] = (256, 256)


@dataclass
class SAC:
    name: Literal["sac", "async_sac"] = "sac"
    gamma: float = 0.8
    tau: float = 0.01
    target_clip: tuple[float, float] | None = None

    def __post_init__(self):
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")


@dataclass
class Model:
    model_path: str
    threshold: float | Literal["auto"] = "auto"
    pretrained: bool = False


@dataclass
class Config:
    seed: int = 0
    lr: float = 3e-4
    runner: Runner = field(default_factory=Runner)
    algorithm: PPO | SAC = field(default_factory=PPO)
    policies: list[PPO | SAC] = field(default_factory=lambda: [PPO(), SAC()])
    model: Model | None = None
    buffers: dict[str, Logger] = field(default_factory=dict)
    save_dir: str | None = None
    serials: list[str] = field(default_factory=list)
    extra: Any = None


def read(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return config.from_yaml(Config, path, list(overrides))


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    """The one line that a config is refused with, without the folder of the test."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *overrides)
    message = str(caught.value).replace(f"{tmp_path}/", "")
    assert "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------
# What is understood


def test_nothing_given_is_all_defaults(tmp_path):
    assert read(tmp_path, "") == Config()
    assert read(tmp_path, "runner:\nalgorithm:\n  # gamma: 0.9") == Config()


def test_what_is_given_in_part_is_completed_from_the_fields_own_default(tmp_path):
    cfg = read(tmp_path, "runner: {logger: {log_path: logs/a}}\nalgorithm: {gamma: 0.9}")
    assert cfg.runner.logger == Logger("logs/a", "push")  # not Logger's own "run"
    assert cfg.algorithm == PPO(gamma=0.9)


def test_unions_are_told_apart_by_their_literal(tmp_path):
    cfg = read(tmp_path, "algorithm: {name: async_sac}\npolicies: [{name: sac, tau: 1}, {name: ppo}]")
    assert cfg.algorithm == SAC(name="async_sac")
    assert cfg.policies == [SAC(tau=1.0), PPO()]
    assert read(tmp_path, "model: {model_path: a, threshold: auto}").model == Model("a", "auto")
    assert read(tmp_path, "model: {model_path: a, threshold: 1}").model == Model("a", 1.0)
    assert read(tmp_path, "model: null").model is None


def test_types_are_the_declared_ones(tmp_path):
    cfg = read(
        tmp_path,
        "lr: 1\nseed: 1e6\nserials: ['0123', b]\nextra: {a: [1, x]}\nbuffers: {a: {log_path: b}}\n"
        "algorithm: {name: sac, target_clip: [0, 1]}\n",
    )
    assert (cfg.lr, type(cfg.lr)) == (1.0, float)
    assert (cfg.seed, type(cfg.seed)) == (1_000_000, int)
    assert cfg.serials == ["0123", "b"]
    assert cfg.extra == {"a": [1, "x"]}
    assert cfg.buffers == {"a": Logger("b")}
    assert (cfg.algorithm.target_clip, type(cfg.algorithm.target_clip)) == ((0.0, 1.0), tuple)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),  # PyYAML reads a text
        ("1E5", 1e5),
        ("-1e-2", -0.01),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000_000", 1_000_000),
        (".inf", float("inf")),
        ("0x1f", 31),
        ("0123", "0123"),  # a camera's serial number; PyYAML reads 83
        ("12:30", "12:30"),  # PyYAML reads 750
        ("off", "off"),  # PyYAML reads false
        ("2026-01-01", "2026-01-01"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1-2", "1-2"),
        ("True", True),
        ("null", None),
        ("~", None),
        ("[1, a, 2e0]", [1, "a", 2.0]),
        ("'3e-4'", "3e-4"),
    ],
)
def test_scalars_are_what_people_expect(text, value):
    assert parse(text, "x") == value
    assert type(parse(text, "x")) is type(value)
    assert parse(yaml.dump({"a": value}, Dumper=config.Dumper), "x") == {"a": value}


def test_command_line_wins(tmp_path):
    cfg = read(
        tmp_path,
        "seed: 1\nlr: 0.1\npolicies: [{name: ppo}, {name: sac}]\nsave_dir: a\nmodel: {model_path: m}",
        "seed=2",
        "lr=3e-4",
        "runner.logger.log_path=logs/b=c",
        "policies.1.tau=0.5",
        "policies.0.hidden_dims=[64, 32]",
        "save_dir=null",
        "serials=[a, 'b']",
        "algorithm={name: sac}",
        "algorithm.tau=0.2",
        "model.pretrained=true",
    )
    assert (cfg.seed, cfg.lr, cfg.save_dir, cfg.serials) == (2, 3e-4, None, ["a", "b"])
    assert cfg.runner.logger.log_path == "logs/b=c"
    assert cfg.policies == [PPO(hidden_dims=(64, 32)), SAC(tau=0.5)]
    assert cfg.algorithm == SAC(tau=0.2)
    assert cfg.model == Model("m", pretrained=True)


def test_bases_are_merged_later_wins(tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "deep.yaml").write_text(
        "seed: 1\nlr: 0.1\nrunner: {max_steps: 1, logger: {log_path: deep}}"
    )
    (tmp_path / "env" / "a.yaml").write_text(
        "base: deep.yaml\nrunner: {logger: {log_path: a}}\nserials: [a, b]"
    )
    (tmp_path / "b.yaml").write_text("lr: 0.2\nserials: [c]")
    cfg = read(tmp_path, "base: [env/a.yaml, b.yaml]\nrunner: {logger: {experiment_name: x}}\n", "seed=9")
    assert (cfg.seed, cfg.lr, cfg.serials) == (9, 0.2, ["c"])
    assert cfg.runner == Runner(Logger("a", "x"), 1)


def test_references_resolve(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/data")
    monkeypatch.setenv("NUM", "7")
    monkeypatch.delenv("UNSET", raising=False)
    cfg = read(
        tmp_path,
        "runner: {logger: {log_path: '${oc.env:DATA_ROOT}/logs'}, max_steps: '${oc.env:NUM}'}\n"
        "save_dir: ${runner.logger.log_path}/${runner.logger.experiment_name}/data\n"  # a default too
        "seed: ${runner.max_steps}\n"
        "serials: ['${oc.env:NUM}', '${serials.0}', '${oc.env:UNSET,a b}', 'lr ${lr}', x]\n"
        "model: {model_path: '${oc.env:UNSET,${save_dir}}', pretrained: true}\n"
        "extra: ${policies.1}\n"
        "algorithm: ${extra}\n"
        "buffers: {a: {log_path: '${oc.env:UNSET,null}'}}\n",
        "serials.4='${model.pretrained} or not'",
    )
    assert cfg.save_dir == "/data/logs/push/data"
    assert (cfg.seed, cfg.runner.max_steps) == (7, 7)
    assert cfg.serials == ["7", "7", "a b", "lr 0.0003", "true or not"]
    assert cfg.model.model_path == cfg.save_dir
    assert cfg.algorithm == SAC()
    assert cfg.buffers["a"].log_path is None


def test_a_saved_config_is_the_same_config(tmp_path):
    cfg = read(
        tmp_path,
        "algorithm: {name: sac, target_clip: [0, 1]}\nlr: 1e-5\nmodel: {model_path: '3e-4'}\n"
        "save_dir: 'null'\nserials: ['0123', 'off', '12', 'ü']",
    )
    config.save(cfg, tmp_path / "config.yaml")
    assert config.from_yaml(Config, tmp_path / "config.yaml") == cfg
    assert config.from_dict(Config, config.to_dict(cfg), "meta.json") == cfg
    assert config.to_dict(cfg)["algorithm"] == {
        "name": "sac",
        "gamma": 0.8,
        "tau": 0.01,
        "target_clip": [0, 1],
    }


def test_load_reads_the_command_line(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("seed: 3")
    assert config.load(Config, [str(tmp_path / "x.yaml"), "lr=1"]) == Config(seed=3, lr=1.0)
    for argv, met in [
        ([], "got nothing"),
        (["seed=1"], "got 'seed=1'"),
        (["--config", "x.yaml"], "'--config'"),
    ]:
        with pytest.raises(ConfigError, match=f"the first argument is the config, .*{met}.* usage: python "):
            config.load(Config, argv)
    with pytest.raises(SystemExit) as caught:
        config.load(Config, ["--help"], description="Collect episodes.")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Collect episodes.\n\nusage: python ")
    assert "  runner.logger.log_path: str | null = null  # folder of the run\n" in shown
    assert "  runner.logger.experiment_name: str = push\n" in shown
    assert "  algorithm.tau: float = 0.01\n" in shown
    assert "  model.model_path: str\n  model.threshold: float | 'auto' = auto\n" in shown


# ----------------------------------------------------------------------------------------------------
# What a mistake is told


# A YAML, perhaps an override after $, and the line that it is refused with.
MISTAKES = r"""
sede: 1
    x.yaml: unknown key 'sede', did you mean 'seed'?
algorithm: {gama: 1}
    x.yaml: unknown key 'algorithm.gama', did you mean 'algorithm.gamma'?
experiment_name: a
    x.yaml: unknown key 'experiment_name', did you mean 'runner.logger.experiment_name'?
seed: 1   $ runner.max_step=3
    command line: unknown key 'runner.max_step', did you mean 'runner.max_steps'?
algorithm: {name: ppo, tau: 1}
    x.yaml: unknown key 'algorithm.tau' of PPO; known here: name, gamma, hidden_dims
policies: [{name: ppo, zzz: 1}]
    x.yaml: unknown key 'policies.0.zzz' of PPO; known here: name, gamma, hidden_dims
lr: fast
    x.yaml: 'lr' must be a number, got 'fast' (a text)
lr: true
    x.yaml: 'lr' must be a number, got true
seed: 1   $ seed=1.5
    command line: 'seed' must be a whole number, got 1.5 (a number)
seed: .inf
    x.yaml: 'seed' must be a whole number, got inf (a number)
seed:
    x.yaml: 'seed' must be a whole number, got null
serials: [1]
    x.yaml: 'serials.0' must be a text, got 1 (a number), quote it
serials: a
    x.yaml: 'serials' must be a list, got 'a' (a text)
runner: 3
    x.yaml: 'runner' must be a section, got 3 (a number)
lr: {a: 1}
    x.yaml: 'lr' must be a number, got a section
model: {model_path: a, pretrained: yes}
    x.yaml: 'model.pretrained' must be true or false, got 'yes' (a text)
model: {model_path: a, threshold: autom}
    x.yaml: 'model.threshold' must be a number or 'auto', got 'autom' (a text)
model: {pretrained: true}
    x.yaml: 'model.model_path' is missing; it has no default, give a text
algorithm: {name: sacc}
    x.yaml: 'algorithm.name' must be one of 'ppo', 'sac', 'async_sac', got 'sacc' (a text), did you
    mean 'sac'?
policies: [{gamma: 1}]
    x.yaml: 'policies.0.name' is missing; give one of 'ppo', 'sac', 'async_sac'
algorithm: {name: sac, target_clip: [1]}
    x.yaml: 'algorithm.target_clip' must be a list of 2, got [1] (a list)
algorithm: {name: sac, tau: 2}
    x.yaml: section 'algorithm': tau must be in (0, 1], got 2.0
policies: [{name: ppo}]   $ policies.1.gamma=1
    command line: there is no 'policies.1', 'policies' has 1 entries
cluster: {num_nodes: 1}
    x.yaml: key 'cluster' is gone: it arranges a cluster, and one workstation needs none; delete it
defaults: [env/a]
    x.yaml: key 'defaults' is gone with Hydra: name the YAML to build on with `base: other.yaml`
runner: {group_name: a}
    x.yaml: key 'runner.group_name' is gone: it arranges a cluster, and one workstation needs none;
    delete it
seed: 1\nseed: 2
    x.yaml: not readable as YAML: key 'seed' is given twice, line 1
seed: [1
    x.yaml: not readable as YAML: expected ',' or ']', but got '<stream end>', line 1
- seed
    x.yaml: a config is made of `key: value` lines, this is a list
1: 2
    x.yaml: key '1' is a int, must be a text; quote it
base: y.yaml
    y.yaml (base of x.yaml): no such file, did you mean 'x.yaml'?
base: x.yaml
    x.yaml (base of x.yaml): is, through `base:`, its own base
base: {a: b}
    x.yaml: 'base' must be the name of a YAML or a list of names, got {'a': 'b'}
seed: 1   $ seed
    command line: expected section.key=value, got 'seed'
seed: 1   $ runner..a=1
    command line: expected section.key=value, got 'runner..a=1'
seed: 1   $ seed=[
    command line (seed=[): not readable as YAML: expected the node content, but found '<stream
    end>', line 1
save_dir: ${lrr}
    x.yaml: 'save_dir' refers to 'lrr', which has no value; check its spelling
save_dir: ${model.model_path}
    x.yaml: 'save_dir' refers to 'model.model_path', which has no value; check its spelling
save_dir: ${runner.logger.log_path}/a
    x.yaml: 'save_dir' is '${runner.logger.log_path}/a', but 'runner.logger.log_path' is null; set
    it
save_dir: a${runner}
    x.yaml: 'save_dir' is 'a${runner}', but 'runner' is not a single value; set it
save_dir: ${extra}\nextra: ${save_dir}
    x.yaml: 'save_dir' refers in a circle: extra -> save_dir -> extra
save_dir: ${oc.env:SURELY_UNSET}
    x.yaml: 'save_dir' needs the environment variable SURELY_UNSET, which is not set; export
    SURELY_UNSET=...
save_dir: ${now:%Y}
    x.yaml: 'save_dir' asks for '${now:%Y}'; only ${section.key} and ${oc.env:NAME} are known
"""


def mistakes() -> list[tuple[str, list[str], str]]:
    """-> (YAML, overrides, message) of each entry of MISTAKES; messages may run over several lines."""
    found = []
    for line in MISTAKES.strip().split("\n"):
        if line.startswith("    "):
            found[-1][2].append(line.strip())
        else:
            text, _, override = line.partition("   $ ")
            found.append((text.replace("\\n", "\n"), [override] if override else [], []))
    return [(text, overrides, " ".join(message)) for text, overrides, message in found]


@pytest.mark.parametrize(("text", "overrides", "message"), mistakes())
def test_a_mistake_is_told_in_one_line(tmp_path, text, overrides, message):
    assert complaint(tmp_path, text, *overrides) == message


def test_the_file_named_is_the_one_with_the_mistake(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: fast\nrunner: {max_steps: 1}")
    assert complaint(tmp_path, "base: base.yaml\nseed: 1").startswith("base.yaml: 'lr'")
    assert read(tmp_path, "base: base.yaml\nlr: 1").lr == 1.0
    assert complaint(tmp_path, "base: base.yaml\nlr: 1", "runner.max_steps=a").startswith(
        "command line: 'runner"
    )
    assert complaint(tmp_path, "base: base.yaml\nlr: 1\nrunner: {a: 1}").startswith(
        "x.yaml: unknown key 'runner.a'"
    )
    with pytest.raises(ConfigError, match=r"^meta\.json: 'seed' must be a whole number, got 'a'"):
        config.from_dict(Config, {"seed": "a"}, "meta.json")


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "demo_collect.yaml").touch()
    with pytest.raises(
        ConfigError, match=r"demo_colect\.yaml: no such file, did you mean '.*demo_collect\.yaml'\?"
    ):
        config.from_yaml(Config, tmp_path / "demo_colect.yaml")


def test_checks_may_raise_what_users_are_told(tmp_path):
    @dataclass
    class Whole:
        seed: int = 0

        def __post_init__(self):
            if self.seed < 0:
                raise UserError("seed is below 0")

    (tmp_path / "x.yaml").write_text("seed: -1")
    with pytest.raises(ConfigError, match=r"x\.yaml: seed is below 0$"):
        config.from_yaml(Whole, tmp_path / "x.yaml")


def test_declarations_that_cannot_work_are_the_programmers_error(tmp_path):
    @dataclass
    class Twin:
        name: Literal["ppo"] = "ppo"

    @dataclass
    class Unclear:
        a: PPO | Twin = field(default_factory=PPO)
        b: set | None = None

    (tmp_path / "x.yaml").write_text("a: {name: ppo}")
    with pytest.raises(TypeError, match="PPO, Twin need a Literal field"):
        config.from_yaml(Unclear, tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("b: 1")
    with pytest.raises(TypeError, match=r"'b' has the type .*set"):
        config.from_yaml(Unclear, tmp_path / "x.yaml")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_shipped_yamls_are_readable(path):
    assert isinstance(config.read_tree(path).data, dict)

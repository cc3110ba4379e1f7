"""YAML -> dataclass: every key is a field of a dataclass that stands beside the code which reads it.

    python SCRIPT.py configs/x.yaml [section.key=value ...]        (--help lists all keys of SCRIPT)

- A YAML holds what differs from the defaults. `base: other.yaml` (or a list, relative to the YAML's own
  folder) is read first and the rest merged over it, section by section; later wins. Values on the command
  line are YAML too: `a.b=[1, 2]`, `a.b=null`, `policies.0.weight=2`.
- `${section.key}` stands for another value of the config, defaults included, and `${oc.env:NAME}` or
  `${oc.env:NAME,default}` for an environment variable; both also inside a longer text.
- Types of fields: bool, int, float, str, None, Any, Literal, list, tuple, dict[str, ...], dataclasses, unions
  of these. A union's dataclasses are told apart by a Literal field of all: `name: Literal["ppo"] = "ppo"`.
- A section that a YAML gives in part is completed from the default of its field. `__post_init__` of a section
  checks it (ValueError or UserError) and leaves its fields alone.

Whatever does not fit stops the run with the file, the full key, what was met and the nearest known key.
"""

import sys
import types
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from common.declarations import (
    SCALARS,
    all_keys,
    default_of,
    describe,
    did_you_mean,
    discriminator,
    field_default,
    help_lines,
    join,
    nearest,
    show,
)
from common.files import atomic_write
from common.runtime import UserError
from common.yaml_tree import COMMAND_LINE, ConfigError, Dumper, EnvironmentText, Tree, read_tree

Config = TypeVar("Config")

_GONE = "is gone: it arranges a cluster, and one workstation needs none; delete it"
# Keys of the reference's YAMLs without a meaning here. Asked only for keys that no dataclass knows.
GONE_KEYS = {
    "defaults": "is gone with Hydra: name the YAML to build on with `base: other.yaml`",
    "hydra": "is gone with Hydra: delete it; the run folder is `runner.logger.log_path`",
    "project_name": "is gone: only tracking services need one; delete it",
    "cluster": _GONE,
    "component_placement": _GONE,
    "enable_offload": _GONE,
    "fsdp_config": _GONE,
    "group_name": _GONE,
    "node_group": _GONE,
    "node_groups": _GONE,
    "num_nodes": _GONE,
    "pipeline_stage_num": _GONE,
    "placement": _GONE,
    "training_backend": _GONE,
    "weight_syncer": _GONE,
}


def load(cls: type[Config], argv: list[str] | None = None, description: str = "") -> Config:
    """The config that the command line (`argv`, by default this process's) asks for.

    `--help` prints `description`, the usage and all keys, and exits. Raises ConfigError.
    """
    argv = sys.argv[1:] if argv is None else argv
    usage = f"python {Path(sys.argv[0]).name} configs/x.yaml [section.key=value ...]"
    if "-h" in argv or "--help" in argv:
        print(f"{description.strip()}\n\nusage: {usage}\n\nKeys, with their defaults:\n")
        print("\n".join(help_lines(cls)))
        sys.exit(0)
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        met = f"got '{argv[0]}'" if argv else "got nothing"
        raise ConfigError(f"{COMMAND_LINE}: the first argument is the config, {met}; usage: {usage}")
    return from_yaml(cls, argv[0], argv[1:])


def from_yaml(cls: type[Config], path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read a YAML and its bases, apply `a.b=value` overrides, check everything. Raises ConfigError.

    `path` None: no file, the defaults.
    """
    tree = Tree({}, COMMAND_LINE) if path is None else read_tree(Path(path))
    for text in overrides or []:
        tree.override(text)
    tree.interpolate(lambda parts: to_dict(default_of(cls, parts)))
    return _Builder(cls, tree).section(cls, tree.data, "")


def from_dict(cls: type[Config], data: dict[str, Any], where: str) -> Config:
    """The inverse of `to_dict`, with the same checks; errors name `where` (a checkpoint's path, say)."""
    return _Builder(cls, Tree(data, where)).section(cls, data, "")


def to_dict(cfg: Any) -> Any:
    """A dataclass and all inside it as dicts, lists and scalars, ready for YAML or JSON."""
    if is_dataclass(cfg):
        return {field.name: to_dict(getattr(cfg, field.name)) for field in fields(cfg)}
    if isinstance(cfg, dict):
        return {key: to_dict(value) for key, value in cfg.items()}
    if isinstance(cfg, list | tuple):
        return [to_dict(value) for value in cfg]
    return cfg


def save(cfg: Any, path: str | Path) -> None:
    """Write the resolved config as a YAML that `from_yaml` reads back to an equal one."""
    text = yaml.dump(to_dict(cfg), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------
# Checking and building


class _Builder:
    """Builds values of declared types out of a tree. `key` is always the full one, for the messages."""

    def __init__(self, root: type, tree: Tree):
        self.root = root
        self.tree = tree

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(f"{self.tree.source(key)}: {message}")

    def wrong(self, key: str, wanted: str, value: Any) -> ConfigError:
        hint = ", quote it" if wanted == "a text" and isinstance(value, int | float) else ""
        return self.error(key, f"'{key}' must be {wanted}, got {show(value)}{hint}")

    def section(self, cls: type, data: Any, key: str, default: Any = MISSING) -> Any:
        """A dataclass. Fields that `data` lacks come from `default`, where that is one of the same class."""
        data = {} if data is None else data  # `section:` with nothing under it
        if not isinstance(data, dict):
            raise self.wrong(key, "a section", data)
        known = {field.name: field for field in fields(cls) if field.init}
        for name in data:
            if name not in known:
                raise self.unknown(cls, name, key)
        hints = get_type_hints(cls)
        values = {}
        for name, field in known.items():
            inherited = getattr(default, name) if isinstance(default, cls) else field_default(field)
            if name in data:
                values[name] = self.value(hints[name], data[name], join(key, name), inherited)
            elif inherited is not MISSING:
                values[name] = inherited
            else:
                wanted = describe(hints[name])
                raise self.error(key, f"'{join(key, name)}' is missing; it has no default, give {wanted}")
        try:
            return cls(**values)
        except (ValueError, UserError) as error:  # from __post_init__
            raise self.error(key, f"section '{key}': {error}" if key else str(error)) from error

    def value(self, kind: Any, value: Any, key: str, default: Any = MISSING) -> Any:
        """`value` as a `kind`; raises ConfigError where it is none."""
        origin, args = get_origin(kind), get_args(kind)
        if kind is Any:
            return value
        if is_dataclass(kind):
            return self.section(kind, value, key, default)
        if origin in (Union, types.UnionType):
            return self.union(args, value, key, default)
        if origin is Literal:
            return self.choice(args, value, key)
        if kind in SCALARS:
            return self.scalar(kind, value, key)
        if (origin or kind) in (list, tuple, dict):
            return self.container(origin or kind, args, value, key)
        raise TypeError(f"config field '{key}' has the type {kind}, which common/config.py does not know")

    def choice(self, choices: tuple, value: Any, key: str) -> Any:
        value = str(value) if isinstance(value, EnvironmentText) else value
        for choice in choices:
            if value == choice and type(value) is type(choice):  # True == 1 in Python
                return choice
        near = did_you_mean(nearest(str(value), [str(choice) for choice in choices]))
        raise self.error(key, f"'{key}' must be {describe(Literal[choices])}, got {show(value)}{near}")

    def scalar(self, kind: type, value: Any, key: str) -> Any:
        if isinstance(value, EnvironmentText) and kind is not str:
            value = value.parsed()
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is float and is_number:
            return float(value)
        if kind is int and is_number and float(value).is_integer():  # 1e6 is a fine number of steps
            return int(value)
        if kind is str and isinstance(value, str):
            return str(value)
        if kind in (bool, type(None)) and isinstance(value, kind):
            return value
        raise self.wrong(key, describe(kind), value)

    def container(self, kind: type, args: tuple, value: Any, key: str) -> Any:
        """list[T], tuple[T, ...], tuple[A, B], dict[str, T]."""
        value = value.parsed() if isinstance(value, EnvironmentText) else value
        if kind is dict:
            if not isinstance(value, dict):
                raise self.wrong(key, "a section", value)
            inner = args[1] if args else Any
            return {name: self.value(inner, item, join(key, name)) for name, item in value.items()}
        if not isinstance(value, list):
            raise self.wrong(key, "a list", value)
        if kind is list or args[-1] is Ellipsis:
            inners = [args[0] if args else Any] * len(value)
        else:
            inners = list(args)
        if len(inners) != len(value):
            raise self.wrong(key, f"a list of {len(inners)}", value)
        pairs = zip(inners, value, strict=True)
        return kind(self.value(inner, item, f"{key}.{i}") for i, (inner, item) in enumerate(pairs))

    def union(self, kinds: tuple, value: Any, key: str, default: Any) -> Any:
        if value is None and type(None) in kinds:
            return None
        sections = [kind for kind in kinds if is_dataclass(kind)]
        if sections and (isinstance(value, dict) or value is None):
            return self.section(self.member(sections, value or {}, key, default), value, key, default)
        others = [kind for kind in kinds if kind is not type(None) and kind not in sections]
        if len(others) == 1 and not sections:
            return self.value(others[0], value, key, default)
        for kind in others:
            try:
                return self.value(kind, value, key, default)
            except ConfigError:
                continue
        raise self.wrong(key, describe(Union[kinds]), value)  # noqa: UP007  built from a tuple

    def member(self, sections: list[type], value: dict, key: str, default: Any) -> type:
        """Which of the dataclasses `value` is meant for, by the field that tells them apart."""
        if len(sections) == 1:
            return sections[0]
        tag = discriminator(sections)
        names = {name: cls for cls in sections for name in get_args(get_type_hints(cls)[tag])}
        if tag in value:
            return names[self.choice(tuple(names), value[tag], join(key, tag))]
        if type(default) in sections:
            return type(default)
        raise self.error(key, f"'{join(key, tag)}' is missing; give {describe(Literal[tuple(names)])}")

    def unknown(self, cls: type, name: str, section: str) -> ConfigError:
        key = join(section, name)
        if name in GONE_KEYS:
            return self.error(key, f"key '{key}' {GONE_KEYS[name]}")
        siblings = [field.name for field in fields(cls)]
        everywhere = list(all_keys(self.root))
        near = nearest(name, siblings)
        if near:
            near = join(section, near)
        elif (
            key not in everywhere
        ):  # else another member of a union knows it, and this section is the wrong one
            near = next((other for other in everywhere if other.split(".")[-1] == name), None)
            near = near or nearest(key, everywhere, cutoff=0.8)
        hint = did_you_mean(near) or f" of {cls.__name__}; known here: {', '.join(siblings)}"
        return self.error(key, f"unknown key '{key}'{hint}")

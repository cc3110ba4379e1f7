"""A config before it has types: YAML files merged over each other, overridden, with their `${...}` resolved.

`common/config.py` is the door; this is what lies before the types. A tree is nested dicts, lists and
scalars; it remembers which file (or the command line) each key came from, so that every message can name it.
"""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from common.runtime import UserError

COMMAND_LINE = "command line"


class ConfigError(UserError):
    """A config that does not fit: the file (or "command line"), the full key, what was met, the remedy."""


# ----------------------------------------------------------------------------------------------------
# YAML as people expect it. PyYAML follows YAML 1.1, where 3e-4 is a text, 0123 is 83, 12:30 is 750, `off` is
# false, a date is an object, and a key given twice counts once.

_TAGS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0b[01]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "timestamp": None,
}


def _with_our_scalars(cls: type) -> type:
    ours = {f"tag:yaml.org,2002:{name}" for name in _TAGS}
    cls.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in ours]
        for first, resolvers in cls.yaml_implicit_resolvers.items()
    }
    for name, spelling in _TAGS.items():
        if spelling is not None:
            pattern, first = spelling
            cls.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), list(first))
    return cls


@_with_our_scalars
class Loader(yaml.SafeLoader):
    """Plain data only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for name in names:
            if names.count(name) > 1:
                problem = f"key '{name}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


class EnvironmentText(str):
    """The value of an environment variable: a text, or a number or list where the field wants one."""

    __slots__ = ()

    def parsed(self) -> Any:
        return parse(str(self), COMMAND_LINE)


@_with_our_scalars
class Dumper(yaml.SafeDumper):
    """Quotes every text that `Loader` would take for something else."""


Dumper.add_representer(EnvironmentText, yaml.representer.SafeRepresenter.represent_str)


def parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError):
            reason = f"{error.problem}, line {error.problem_mark.line + 1}"
        raise ConfigError(f"{where}: not readable as YAML: {reason}") from error


# ----------------------------------------------------------------------------------------------------
# The tree

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")  # the innermost ones first
_MAX_REFERENCES = 100  # in one text; more is a text that refers to itself


class Tree:
    """`data`: nested dicts, lists, scalars. `name`: what errors name where a key has no source of its own."""

    def __init__(self, data: dict[str, Any], name: str):
        self.data = data
        self.name = name
        self.sources: dict[str, str] = {}  # full key -> file

    def source(self, key: str) -> str:
        """The file that `key`, or the closest section around it, was last set in."""
        while key and key not in self.sources:
            key = key.rpartition(".")[0]
        return self.sources.get(key, self.name)

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(f"{self.source(key)}: {message}")

    def merge(self, data: dict[str, Any], source: str) -> None:
        """Lay `data` over the tree: sections are merged, everything else is replaced."""
        self.data = self._merged(self.data, data, "", source)

    def _merged(self, old: Any, new: Any, key: str, source: str) -> Any:
        if key not in self.sources or not isinstance(new, dict):  # a section stays with who opened it
            self.sources[key] = source
        if not isinstance(new, dict):
            return new
        if isinstance(old, list) and new and all(str(name).isdigit() for name in new):  # policies.0.weight=2
            merged = list(old)
            for name, value in new.items():
                if int(name) >= len(old):
                    raise ConfigError(f"{source}: there is no '{key}.{name}', '{key}' has {len(old)} entries")
                merged[int(name)] = self._merged(old[int(name)], value, f"{key}.{name}", source)
            return merged
        merged = dict(old) if isinstance(old, dict) else {}
        for name, value in new.items():
            full = f"{key}.{name}" if key else str(name)
            if not isinstance(name, str):
                raise ConfigError(
                    f"{source}: key '{full}' is a {type(name).__name__}, must be a text; quote it"
                )
            merged[name] = self._merged(merged.get(name), value, full, source)
        return merged

    def override(self, text: str) -> None:
        """Apply one `a.b=value` of the command line."""
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{COMMAND_LINE}: expected section.key=value, got '{text}'")
        nested = parse(value, f"{COMMAND_LINE} ({text})")
        for name in reversed(key.split(".")):
            nested = {name: nested}
        self.merge(nested, COMMAND_LINE)

    def interpolate(self, default: Callable[[list[str]], Any]) -> None:
        """Resolve every `${...}`. `default` gives the value of a key the tree lacks, or raises KeyError."""
        self.data = self._resolved(self.data, "", (), default)

    def _resolved(self, value: Any, key: str, chain: tuple[str, ...], default: Callable) -> Any:
        """`chain`: the references that led here, so that a circle is noticed."""
        if isinstance(value, dict):
            return {
                name: self._resolved(item, f"{key}.{name}" if key else name, chain, default)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self._resolved(item, f"{key}.{i}", chain, default) for i, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        text = value
        for _ in range(_MAX_REFERENCES):
            match = _REFERENCE.search(text)
            if match is None:
                return text
            found = self._referred(match[1].strip(), key, chain, default)
            if match[0] == text:
                return found  # keeps its type
            if found is None or isinstance(found, dict | list):
                met = "null" if found is None else "not a single value"
                raise self.error(key, f"'{key}' is '{value}', but '{match[1]}' is {met}; set it")
            found = str(found).lower() if isinstance(found, bool) else str(found)
            text = text[: match.start()] + found + text[match.end() :]
        raise self.error(key, f"'{key}' is '{value}', which goes on for ever")

    def _referred(self, name: str, key: str, chain: tuple[str, ...], default: Callable) -> Any:
        """What `${name}`, met at `key`, stands for."""
        resolver, colon, argument = name.partition(":")
        if colon and resolver == "oc.env":
            return self._environment(argument, key)
        if colon:
            message = f"'{key}' asks for '${{{name}}}'; only ${{section.key}} and ${{oc.env:NAME}} are known"
            raise self.error(key, message)
        if name in chain:
            raise self.error(key, f"'{key}' refers in a circle: {' -> '.join((*chain, name))}")
        try:
            found = self._found(name.split("."), default)
        except KeyError:
            message = f"'{key}' refers to '{name}', which has no value; check its spelling"
            raise self.error(key, message) from None
        return self._resolved(found, name, (*chain, name), default)

    def _found(self, parts: list[str], default: Callable) -> Any:
        node: Any = self.data
        for part in parts:
            if isinstance(node, dict) and part in node:
                node = node[part]
            elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            else:
                return default(parts)
        return node

    def _environment(self, argument: str, key: str) -> EnvironmentText | None:
        variable, comma, fallback = (part.strip() for part in argument.partition(","))
        if variable in os.environ:
            return EnvironmentText(os.environ[variable])
        if not comma:
            remedy = f"which is not set; export {variable}=..."
            raise self.error(key, f"'{key}' needs the environment variable {variable}, {remedy}")
        return None if fallback == "null" else EnvironmentText(fallback)


def read_tree(path: Path) -> Tree:
    """The YAML at `path` merged over the YAMLs that its `base:` names. Raises ConfigError."""
    tree = Tree({}, str(path))
    _read_into(tree, path, ())
    return tree


def _read_into(tree: Tree, path: Path, chain: tuple[Path, ...]) -> None:
    """`chain`: the files that named this one as their base."""
    named_by = f" (base of {chain[-1]})" if chain else ""
    if path.resolve() in [other.resolve() for other in chain]:
        raise ConfigError(f"{path}{named_by}: is, through `base:`, its own base")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], 1)
        hint = f", did you mean '{path.with_name(near[0])}'?" if near else ""
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"not readable ({error})"
        raise ConfigError(f"{path}{named_by}: {reason}{hint}") from error
    data = parse(text, str(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is made of `key: value` lines, this is a {type(data).__name__}")
    bases = data.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: 'base' must be the name of a YAML or a list of names, got {bases!r}")
    for base in bases:
        _read_into(tree, path.parent / base, (*chain, path))
    tree.merge(data, str(path))

"""What dataclasses declare, read for `common/config.py`: defaults, keys, comments, and types in words."""

import difflib
import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SCALARS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}


def join(section: str, name: str) -> str:
    """The full key of `name` in a section ("" is the whole config)."""
    return f"{section}.{name}" if section else str(name)


def nearest(name: str, candidates: list[str], cutoff: float = 0.6) -> str | None:
    """The candidate most like `name`; `cutoff` in [0, 1]: how like it must be."""
    return next(iter(difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)), None)


def did_you_mean(near: str | None) -> str:
    return f", did you mean '{near}'?" if near else ""


def show(value: Any) -> str:
    """A value that was met, in words for the user: short, with its type."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    kind = "a text" if isinstance(value, str) else "a list" if isinstance(value, list) else "a number"
    shown = repr(str(value) if isinstance(value, str) else value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({kind})"


def describe(kind: Any) -> str:
    """A type in words for the user."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        shown = [repr(choice) for choice in args]
        return shown[0] if len(shown) == 1 else f"one of {', '.join(shown)}"
    if kind in SCALARS:
        return SCALARS[kind]
    return "a list" if (origin or kind) in (list, tuple) else "a section"


def discriminator(sections: list[type]) -> str:
    """The field that tells the members of a union apart: a Literal in all of them, never the same twice."""
    all_hints = [get_type_hints(cls) for cls in sections]
    for name in all_hints[0]:
        kinds = [hints.get(name) for hints in all_hints]
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if all(get_origin(kind) is Literal for kind in kinds) and len(choices) == len(set(choices)):
            return name
    names = ", ".join(cls.__name__ for cls in sections)
    raise TypeError(f"{names} need a Literal field of the same name that tells them apart")


def field_default(field: Field) -> Any:
    """Made anew where there is a factory; MISSING if the field must be given."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def default_of(cls: type, parts: list[str]) -> Any:
    """The default that the declarations under `cls` give to a key, a dataclass as such. KeyError if none."""
    node: Any = cls
    for part in parts:
        if isinstance(node, dict):
            node = node[part]
            continue
        if isinstance(node, list | tuple):
            node = dict(zip(map(str, range(len(node))), node, strict=True))[part]
            continue
        known = {field.name: field for field in fields(node)} if is_dataclass(node) else {}
        if not isinstance(node, type):
            node = getattr(node, known[part].name)
            continue
        default = field_default(known[part])
        node = get_type_hints(node)[part] if default is MISSING else default
        if default is MISSING and not is_dataclass(node):
            raise KeyError(part)
    if isinstance(node, type):
        raise KeyError(parts[-1])
    return node


def sections_in(kind: Any) -> list[type]:
    """The dataclasses that a declared type may hold: itself, members of a union, entries of a list."""
    if is_dataclass(kind):
        return [kind]
    return [cls for arg in get_args(kind) for cls in sections_in(arg)]


def all_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every full key under `cls`, sections included."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        key = join(prefix, field.name)
        yield key
        for section in sections_in(hints[field.name]):
            yield from all_keys(section, key)


def _spelling(kind: Any) -> str:
    """A type as one writes it: `float | 'auto'`, `list[str] | null`."""
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(_spelling(arg) for arg in get_args(kind))
    if get_origin(kind) is Literal:
        return " | ".join(repr(choice) for choice in get_args(kind))
    if kind is type(None):
        return "null"
    return (
        kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).removeprefix("typing.")
    )


def _comments(cls: type) -> dict[str, str]:
    """Field -> the comment at the end of its line; a class overrides its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            found.update(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE))
    return found


def help_lines(cls: type, prefix: str = "", default: Any = MISSING) -> Iterator[str]:
    """`key: type = default  # comment`, section by section."""
    hints, comments = get_type_hints(cls), _comments(cls)
    for field in fields(cls):
        kind, key = hints[field.name], join(prefix, field.name)
        value = getattr(default, field.name) if isinstance(default, cls) else field_default(field)
        sections = sections_in(kind)
        if not sections:
            shown = "" if value is MISSING else f" = {'null' if value is None else value}"
            comment = f"  # {comments[field.name]}" if field.name in comments else ""
            yield f"  {key}: {_spelling(kind)}{shown}{comment}"
        for section in sections:
            if len(sections) > 1:
                yield f"  {key}, where it is {section.__name__}:"
            yield from help_lines(section, key, value)

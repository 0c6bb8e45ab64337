"""Every key of a configuration as a row: type, range, default and meaning, all read from the configuration classes.

The type is the field's annotation, the range its `Range` in `check_fields`, the default what the default configuration
composes to (`configs/train.yaml`; where that has no such key, the class's own), and the meaning the comment on the
field's line or in the lines above it. Refused: a table of meanings of its own, which nobody would keep true.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from fp8moe.cli.compose import alternatives, tree_of
from fp8moe.limits import CEILING, Range, ranges_of
from fp8moe.train.config import TrainConfig

_REFERENCE = re.compile(r" \(`[\w.]+`\)")  # to a module, for those who read the source


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, type and range in words, its default as YAML writes it, and its meaning.

    default "": none, the key must be set. kind: the value of its group's `kind` that the key belongs to, "" for all.
    """

    name: str
    type: str
    default: str
    meaning: str
    kind: str = ""

    @property
    def group(self) -> str:
        """The first part of the name; "" for a key outside of all groups."""
        return self.name.partition(".")[0] if "." in self.name else ""


@functools.cache
def key_table() -> tuple[Key, ...]:
    """Every key that takes a value, groups in the order of the classes; keys outside of all groups first."""
    rows: dict[str, list[Key]] = {}
    defaults = tree_of([]) | {"name": None}  # which composing filled in
    for key in _keys(TrainConfig, "", defaults, ""):
        rows.setdefault(key.name, []).append(key)
    return tuple(sorted((_joined(found) for found in rows.values()), key=lambda key: key.group != ""))


def _joined(found: list[Key]) -> Key:
    """One row of a key that several classes of a union have."""
    first = found[0]
    if len(found) == 1:
        return first
    meaning = first.meaning
    if any(key.meaning != meaning for key in found):
        meaning = "; ".join(f"{key.kind}: {key.meaning}" for key in found)
    kinds = dict.fromkeys(key.type for key in found)
    return dataclasses.replace(first, type=" or ".join(kinds), meaning=meaning, kind="")


def _keys(cls: Any, path: str, defaults: Mapping[str, Any], kind: str) -> Iterator[Key]:
    hints, ranges, meanings = typing.get_type_hints(cls), ranges_of(cls), comments(cls)
    for field in dataclasses.fields(cls):
        name = f"{path}.{field.name}" if path else field.name
        hint, default = hints[field.name], defaults.get(field.name, _own_default(field))
        classes = [inner for inner in alternatives(hint) if dataclasses.is_dataclass(inner)]
        if not classes or default is None:
            type_text = "group of keys or null" if classes else in_words(hint, ranges.get(field.name))
            yield Key(name, type_text, as_typed(default), meanings.get(field.name, ""), kind)
        for inner in classes:
            inner_kind = _kind(inner) if len(classes) > 1 else kind
            is_chosen = isinstance(default, Mapping) and (len(classes) == 1 or default["kind"] == inner_kind)
            yield from _keys(inner, name, default if is_chosen else {}, inner_kind)


def _kind(cls: Any) -> str:
    return str(get_args(typing.get_type_hints(cls)["kind"])[0])


def _own_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return {}
    return field.default


def as_typed(value: Any) -> str:
    """A default as a command line has it; "" where there is none."""
    if value is dataclasses.MISSING:
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {as_typed(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_typed, value))}]"
    return str(value.value if isinstance(value, Enum) else value)


def in_words(hint: Any, limit: Range | None) -> str:
    """A field's annotation and range: "whole number, at least 1; or null"."""
    parts = [_one_type(part, limit) for part in alternatives(hint) if part is not type(None)]
    optional = type(None) in alternatives(hint)
    return " or ".join(parts) + (("; or null" if "," in parts[0] else " or null") if optional else "")


def _one_type(part: Any, limit: Range | None) -> str:
    origin = get_origin(part)
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(part)))}" if len(get_args(part)) > 1 else str(get_args(part)[0])
    if origin is tuple:
        inner = get_args(part)[0]
        return f"list, each {'a group of keys' if dataclasses.is_dataclass(inner) else _one_type(inner, limit)}"
    if issubclass(part, Enum):
        return f"one of {', '.join(str(member.value) for member in part)}"
    name = {int: "whole number", float: "number", bool: "true or false", str: "text"}[part]
    return f"{name}, {range_in_words(limit)}" if limit is not None and part in (int, float) else name


def range_in_words(limit: Range) -> str:
    """ "above 0, at most 100"; the ceiling of all ranges is left out."""
    low = f"above {_number(limit.above)}" if limit.least is None else f"at least {_number(limit.least)}"
    if limit.below is not None:
        return f"{low}, below {_number(limit.below)}"
    return low if limit.most == CEILING else f"{low}, at most {_number(limit.most)}"


def _number(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


@functools.cache
def comments(cls: type) -> Mapping[str, str]:
    """What the source says of each field: the comment that ends its line, else that in the lines right above it."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, found = source.split("\n"), {}
    said = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        line = node.lineno - 1
        while line in said and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, said[line])
            line -= 1
        text = said.get(node.end_lineno or node.lineno) or " ".join(above)
        text = _REFERENCE.sub("", text).replace("None:", "null:")
        found[node.target.id] = text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text
    return found

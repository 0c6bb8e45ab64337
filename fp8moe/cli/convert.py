"""A plain dict into frozen dataclasses, strictly: every key must be known, every value of the type the field says.

The annotations are the schema; there is no second one. What YAML gives is what is taken: an int may stand for a float
and a list for a tuple, nothing else is coerced, because a silent `str -> bool` is how runs go wrong. Refused:
OmegaConf's structured configs, which would put its types on every floor.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from typing import Any, Literal, TypeVar, get_args, get_origin

from fp8moe.errors import ConfigError

T = TypeVar("T")


def to_dataclass(cls: type[T], values: object, path: str = "") -> T:
    """Build `cls` from a mapping of its fields; `path` is the dotted place of it, for messages.

    Raises ConfigError for an unknown or missing key and for a wrong type, with the nearest legal choice; what the
    dataclass itself refuses (ValueError) passes through.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'the configuration'} is {_show(values)}, not a group of keys")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise unknown_key(_join(path, str(key)), [_join(path, name) for name in fields])
    missing = [_join(path, name) for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be set: {len(missing)} of {len(fields)} keys are missing")
    return cls(**{key: _value(hints[key], value, _join(path, key)) for key, value in values.items()})


def keys_of(cls: type, path: str = "") -> list[str]:
    """Every dotted key of a dataclass and of those inside it, groups before their members."""
    found = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = _join(path, field.name)
        found.append(key)
        for inner in _alternatives(hints[field.name]):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                found += keys_of(inner, key)
    return found


def unknown_key(key: str, known: Sequence[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest of those that do."""
    last = key.rsplit(".", 1)[-1]
    near = [name for name in known if name.rsplit(".", 1)[-1] == last][:1]  # a right name in the wrong group
    near = near or get_close_matches(key, known, 1, 0.5)
    advice = f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(known[:12])}"
    return ConfigError(f"unknown key {key}: {advice}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _show(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _value(hint: Any, value: object, path: str) -> object:
    choices = _alternatives(hint)
    if value is None and type(None) in choices:
        return None
    (hint,) = [choice for choice in choices if choice is not type(None)]  # `X | None` is the only union in use
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return to_dataclass(hint, value, path)
    if get_origin(hint) is Literal:
        return _choice(value, get_args(hint), path)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(_choice(value, tuple(member.value for member in hint), path))
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={_show(value)} is no list: write {path}=[...]")
        return tuple(_value(get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    return _scalar(hint, value, path)


def _choice(value: object, choices: tuple[Any, ...], path: str) -> object:
    if value not in choices:
        raise ConfigError(f"{path}={value!r} is not one of {', '.join(map(str, choices))}{_nearest(value, choices)}")
    return value


def _nearest(value: object, choices: tuple[Any, ...]) -> str:
    near = get_close_matches(str(value), [str(choice) for choice in choices], 1)
    return f": did you mean {near[0]}?" if near else ""


def _scalar(hint: type, value: object, path: str) -> object:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    advice = ""
    if hint is int and isinstance(value, float):
        advice = f": use {round(value)}"
    elif hint is str:
        advice = f""": quote it, '{path}="{value}"'"""
    raise ConfigError(f"{path}={_show(value)} must be {wanted}{advice}")

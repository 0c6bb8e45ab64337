"""Limits of settings: every field of a configuration class is of its type, and every number finite and in its range.

A configuration class calls `check_fields` first when it is made, with a `Range` for each number it has; rules that
concern several fields follow there. The types are read from the annotations, so that a class made by a test or by a
library's user obeys the same rules as a command line. A number without a `Range` is an error of the class
(AssertionError): a new setting can't be left unchecked. A range always ends, at 2^31 - 1 where nothing smaller is said:
sizes and counts beyond it are typing errors, and none of them would fail in less than minutes.

This module imports nothing of the project, so any floor may use it. Refused: a validation library (pydantic), whose
messages list every field at length and name no nearest legal value; and `Annotated` types, which put three lines of
limits between the lines of the fields.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
import unicodedata
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

CEILING = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """Numbers of at least `least` or above `above`, and at most `most` or below `below`.

    use: the advice where the nearest bound is no good one, a whole clause: "use 0 for none".
    """

    least: float | None = None
    above: float | None = None
    most: float = CEILING
    below: float | None = None
    use: str = ""

    def __contains__(self, value: float) -> bool:
        return self._is_high_enough(value) and not self._is_too_high(value) and value <= self.most  # no NaN is

    def _is_high_enough(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.above is None or value > self.above)

    def _is_too_high(self, value: float) -> bool:
        return value > self.most or (self.below is not None and value >= self.below)

    def rule(self, value: float | None) -> str:
        """The bound that `value` breaks; both where it is no number, or where the range is short."""
        low = f"above {self.above}" if self.least is None else f"at least {self.least}"
        high = f"at most {self.most}" if self.below is None else f"below {self.below}"
        if value is None or value != value or (self.most if self.below is None else self.below) <= 1:
            return f"{low} and {high}"
        return high if self._is_too_high(value) else low

    def advice(self, value: float | None, default: object) -> str:
        """What to use in place of `value`: the nearest bound, or the field's default."""
        if value is not None and value > self.most and self.below is None:
            return f"use {self.most} or less"
        if self.use:
            return self.use
        is_low = value is not None and not self._is_high_enough(value) and value == value
        if isinstance(default, int | float) and (self.least is None or not is_low):
            return f"use {default}"
        assert self.least is not None, "a range that is open below needs a default or an advice"
        return f"use {self.least} or more"


SIZE = Range(least=1, most=2**20)  # features of a layer: 1 TB of weights in a single square matrix
COUNT = Range(least=0)
POSITIVE = Range(least=1)


def check_fields(config: Any, group: str, **ranges: Range) -> None:
    """Raise ValueError with one sentence unless every field of a dataclass is legal.

    group: its dotted key, "" for the topmost. ranges: of each field that is a number, or a tuple of numbers.
    """
    cls: Any = type(config)
    if not vars(config):
        raise _Asked(ranges)
    hints = _hints(cls)
    assert set(ranges) <= set(hints), f"{cls.__name__} has no {set(ranges) - set(hints)}"
    for field in dataclasses.fields(config):
        key = f"{group}.{field.name}" if group else field.name
        default = None if field.default is dataclasses.MISSING else field.default
        _check(key, getattr(config, field.name), hints[field.name], ranges.get(field.name), default)


class _Asked(Exception):
    """The ranges of a class, for `ranges_of`."""


def ranges_of(cls: Any) -> dict[str, Range]:
    """The ranges that a configuration class gives to `check_fields`, by field; none where it does not call it."""
    try:
        if hasattr(cls, "__post_init__"):
            cls.__post_init__(object.__new__(cls))  # without fields, which `check_fields` takes as the question
    except _Asked as asked:
        return dict(asked.args[0])
    return {}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _check(key: str, value: object, hint: Any, limit: Range | None, default: object) -> None:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    choices = typing.get_args(hint) if is_union else (hint,)
    given = [choice for choice in choices if choice is not type(None)]
    if value is None and len(given) < len(choices):
        return
    origin = typing.get_origin(given[0])
    if given[0] in (int, float):
        assert limit is not None, f"{key} is a number and needs a Range"
        _check_number(key, value, given[0], limit, default)
    elif given[0] is str:
        _check_text(key, value, "null" if len(given) < len(choices) else default or "a name")
    elif origin is Literal:
        legal = typing.get_args(given[0])
        if value not in legal:
            raise ValueError(f"{key}={shown(value)} does not exist: use {_listed([str(name) for name in legal])}")
    elif origin is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{key}={shown(value)} must be a list: use {key}=[...]")
        for i, item in enumerate(value):
            _check(f"{key}[{i}]", item, typing.get_args(given[0])[0], limit, None)
    elif not isinstance(value, tuple(given)):
        raise ValueError(f"{key}={shown(value)} must be {_named(given, default)}")


def _check_number(key: str, value: object, kind: type, limit: Range, default: object) -> None:
    of_its_type = isinstance(value, int | kind) and not isinstance(value, bool)
    number = value if isinstance(value, int | float) and of_its_type else None
    if number is not None and number in limit:
        return
    noun = "" if number is not None and number == number else {int: "a whole number, ", float: "a number, "}[kind]
    advice = limit.advice(number, default)
    raise ValueError(f"{key}={shown(value)} must be {noun}{limit.rule(number)}: {advice}")


def _check_text(key: str, value: object, instead: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{key}={shown(value)} must be text: use {instead}")
    if not value.strip():
        raise ValueError(f"{key}={value!r} must not be empty: use {instead}")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value):
        plain = " ".join("".join(c if c.isprintable() else " " for c in value).split())
        raise ValueError(f"{key}={shown(value)} must be one line without control characters: use {plain or instead}")


def _named(kinds: list[Any], default: object) -> str:
    if kinds[0] is bool:
        return f"true or false: use {str(default).lower() if isinstance(default, bool) else 'one of them'}"
    if issubclass(kinds[0], Enum):
        return f"one of {kinds[0].__name__}: use {_listed([str(member.value) for member in kinds[0]])}"
    return f"a {_listed([kind.__name__ for kind in kinds])}: use the keys of that group"


def _listed(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def shown(value: object) -> str:
    """`value` for a message: its repr, cut to 60 characters; a float that is written as a whole number keeps its .0."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

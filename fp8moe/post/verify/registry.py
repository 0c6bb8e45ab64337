"""Verifiers by name: `answer`, `code:seconds=2`, `length:max_tokens=512`, or `module:function` of one's own.

What stands behind the name are the keyword arguments of the function that makes the verifier; for a function of one's
own they are passed on at every call. Built-in names come first, so a module of such a name needs its package's name
too. Functions of users run in processes of their own (`own`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fp8moe.errors import ConfigError
from fp8moe.post.verify.answer import verify_answer
from fp8moe.post.verify.code import code
from fp8moe.post.verify.form import language, length, repetition, verify_ended
from fp8moe.post.verify.own import OwnVerifier
from fp8moe.post.verify.verdict import NamedVerifier, Verifier

# Name -> (what makes it of its options, keys that a prompt's line must have).
BUILT_IN: dict[str, tuple[Callable[..., Verifier], tuple[str, ...]]] = {
    "answer": (lambda: verify_answer, ("answer",)),
    "code": (code, ("tests",)),
    "ended": (lambda: verify_ended, ()),
    "language": (language, ()),
    "length": (length, ()),
    "repetition": (repetition, ()),
}


def verifier(spec: str, timeout: float | None = None) -> NamedVerifier:
    """The verifier that `spec` asks for. timeout: seconds of a user's call. Raises ConfigError with one sentence."""
    name, _, rest = spec.partition(":")
    if name in BUILT_IN:
        make, needs = BUILT_IN[name]
        try:
            return NamedVerifier(spec, make(**_options(spec, rest, make)), needs)
        except ValueError as error:
            raise ConfigError(f"--verify {spec}: {str(error).removeprefix(f'--verify {spec}: ')}") from error
    function_name, _, options = rest.partition(":")
    if not function_name or "=" in function_name:
        raise ConfigError(
            f"--verify {spec} is none of {', '.join(BUILT_IN)} and no function: use one of them, or module:function"
        )
    return NamedVerifier(spec, OwnVerifier(f"{name}:{function_name}", _options(spec, options, None), timeout))


def _options(spec: str, text: str, make: Callable[..., Any] | None) -> dict[str, Any]:
    """Options `a=1,b=x` as keyword arguments; those of `make` are refused where it has none of that name or type."""
    known = inspect.signature(make).parameters if make is not None else {}
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, has_value, value = part.partition("=")
        if not has_value:
            raise ConfigError(f"--verify {spec}: {part} is no option: write options as name=value,name=value")
        if make is not None and key not in known:
            names = ", ".join(known)
            raise ConfigError(f"--verify {spec}: {key} is no option of it: use {names or 'none, it has no options'}")
        options[key] = _value(value)
        if make is not None and isinstance(options[key], str) and known[key].default.__class__ is not str:
            raise ConfigError(f"--verify {spec}: {key}={value} must be a number: use {key}={known[key].default or 100}")
        if isinstance(options[key], float) and isinstance(getattr(known.get(key), "default", 0.0), int | None):
            raise ConfigError(f"--verify {spec}: {key}={value} must be a whole number: use {round(options[key])}")
    return options


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

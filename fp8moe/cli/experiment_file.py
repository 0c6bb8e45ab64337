"""Settings in a file of the user's: read and checked before hydra composes them; and what no setting may refer to.

A file holds YAML's own types alone: tags that would make objects are refused by the safe loader. A value may name
another key (`${model.vocab_size}`) and nothing else: OmegaConf's resolvers (`${oc.env:NAME}` and the like) read the
environment, and a resolved configuration is written to config.yaml, logs and checkpoints, where a password of the
environment must never be. Refused: a list of harmless resolvers, since one resolver's name can be made by another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from fp8moe.errors import ConfigError
from fp8moe.limits import shown

_RESOLVER = re.compile(r"\$\{[^}]*[:$]")  # a colon, or an interpolation inside one


def read_experiment(path: Path) -> str:
    """The text of a file of settings. Raises ConfigError with one sentence unless hydra can compose it."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        refuse_resolvers(content, str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else in_words(error)
        raise ConfigError(f"experiment={path} can't be read ({reason}): name a YAML file of settings") from error
    if not isinstance(content, Mapping | None):
        raise ConfigError(f"experiment={path} holds {shown(content)} and must hold keys: write key: value, a line each")
    if content and "hydra" in content:
        raise ConfigError(f"experiment={path} has settings of hydra, which only composes here: take hydra out")
    return text


def in_words(error: Exception) -> str:
    """Why a file could not be read as YAML."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or 'not YAML'}{where}"


def refuse_resolvers(value: object, key: str) -> None:
    """Raise ConfigError if a text in `value`, which `key` was set to, calls a resolver."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            refuse_resolvers(name, key)
            refuse_resolvers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_resolvers(item, key)
    elif isinstance(value, str) and _RESOLVER.search(value):
        raise ConfigError(
            f"{key}={shown(value)} calls a resolver, and settings, which are written to files, may name other keys "
            "only: write the value itself, or ${steps}, say"
        )

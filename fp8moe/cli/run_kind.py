"""The command that a run belongs to, by what it learns from; a run goes on by that command.

data.source of its configuration says it: conversations are of `fp8moe sft`, problems of `fp8moe grpo`, token files and
this Python's text of `fp8moe train`, which goes on with a fine-tuning too, since that is the same loop. Refused: a line
of its own in the run directory, which older runs and checkpoints by URL have not.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from fp8moe.data.sources import SOURCES
from fp8moe.errors import ConfigError

_OF_SOURCE = {"chat": "sft", "problems": "grpo"}  # others: train
_LEARNS_FROM = {"train": "text or conversations", "sft": "conversations", "grpo": "problems"}
_BEGINS = {"sft": "data.paths=[FILE] run_dir=NEW", "grpo": "run_dir=NEW"}  # behind init_from=RUN


def command_of(source: str) -> str:
    """The command that learns from data of this kind, and goes on with such a run."""
    return _OF_SOURCE.get(source, "train")


def check_source(command: str, tree: Mapping[str, Any]) -> None:
    """Raise ConfigError where a new run of `fp8moe COMMAND` would have data that this command does not learn from."""
    source = _source(tree)
    if source in SOURCES and (kind := command_of(source)) != command:
        wanted = next(one for one, name in _OF_SOURCE.items() if name == command)
        raise ConfigError(
            f"fp8moe {command} learns from {_LEARNS_FROM[command]}, data.source={wanted}, and data.source={source} is "
            f"of fp8moe {kind}: use data.source={wanted}"
        )


def check_command(command: str, run: object, theirs: Mapping[str, Any], ours: Mapping[str, Any], typed: str) -> None:
    """Raise ConfigError where `fp8moe COMMAND` does not do what the run at `run` does.

    theirs: the run's configuration; ours: that changed by what is typed, which may give it other data. typed: the words
    that name the run: resume=RUN, --from RUN.
    """
    source = _source(theirs)
    kind = command_of(source)
    if kind == command or (command, kind) == ("train", "sft") or _source(ours) != source:
        return
    same = "begin another like it" if typed.startswith("--from") else "go on with it"
    begin = ""
    if command in _BEGINS:  # which take the model of init_from
        init = shlex.quote(f"init_from={run}")
        begin = f"begin from its weights by fp8moe {command} {init} {_BEGINS[command]}, or "
    raise ConfigError(
        f"{run} is a run of fp8moe {kind}, on data.source={source}, and fp8moe {command} learns from "
        f"{_LEARNS_FROM[command]}: {begin}{same} by fp8moe {kind} {typed}"
    )


def _source(tree: Mapping[str, Any]) -> str:
    data = tree.get("data")
    return str(data.get("source")) if isinstance(data, Mapping) else ""

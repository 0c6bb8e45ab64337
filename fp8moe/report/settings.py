"""Settings of runs: flat, what differs from the defaults, what differs between runs, which runs can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fp8moe.errors import ConfigError
from fp8moe.report.run_files import Record, RunFiles

# What decides which text a run is validated on, where no fingerprint of it is on record.
_TEXT = ("data.source", "data.paths", "data.validation_paths", "data.validation_share")
_OF_A_START = ("run_dir", "resume", "name", "report")  # settings that make no other run


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """A nested configuration by dotted keys; a list is one value, unless it holds groups."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        name = f"{above}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def changed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value, default) of what a run sets otherwise than the defaults do; a key without a default has None."""
    plain, usual = flat(config), flat(defaults)
    return [
        (key, value, usual.get(key))
        for key, value in plain.items()
        if key not in _OF_A_START
        and (key not in usual or usual[key] != value)
        and not (value is None and key not in usual)
    ]


def differences(runs: Sequence[RunFiles]) -> list[tuple[Any, ...]]:
    """(key, value of each run) where the runs' configurations differ."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _OF_A_START)
    rows = [(key, *(config.get(key) for config in configs)) for key in keys]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def check_comparable(runs: Sequence[RunFiles], most: int) -> None:
    """Raises ConfigError where the runs make no page together: too many, one of them twice, other held-out text."""
    if len(runs) > most:
        raise ConfigError(f"{len(runs)} runs are too many to tell apart, {most} is the most: name {most} of them")
    first = runs[0]
    for i, run in enumerate(runs):
        if run.path.resolve() in [other.path.resolve() for other in runs[:i]]:
            raise ConfigError(f"{run.path} is named twice: name each run once")
        if _text(run, first) != _text(first, run):
            raise ConfigError(
                f"{first.path} and {run.path} were validated on different text, so that their losses can't be "
                "compared: make a report of each"
            )


def _text(run: RunFiles, other: RunFiles) -> Any:
    """What identifies the validation text of a run, in terms that `other` knows too."""
    mine, theirs = _fingerprint(run), _fingerprint(other)
    if mine and theirs and mine.get("tokenizer") == theirs.get("tokenizer"):
        return mine.get("validation")
    config = flat(run.config)
    return [config.get(key) for key in _TEXT] if config and other.config else None


def _fingerprint(run: RunFiles) -> Record:
    starts = [event["data"] for event in run.events if event.get("kind") == "start" and event.get("data")]
    return starts[-1] if starts else {}

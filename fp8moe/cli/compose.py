"""Words on a command line -> hydra -> a plain dict -> `TrainConfig`. Hydra and OmegaConf go no further than this file.

The compose API, not `@hydra.main`: that one makes a run directory a rank, sets up logging, and exits 1 on an unknown
key. Overrides are hydra's: `key=value`, `group=choice`, dotted keys. They are looked through before hydra sees them, so
that a mistyped key or choice gets the nearest right one instead of hydra's several lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import fp8moe
from fp8moe.cli.convert import keys_of, to_dataclass, unknown_key
from fp8moe.errors import ConfigError
from fp8moe.train.config import TrainConfig

CONFIGS = Path(fp8moe.__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class Composed:
    """A checked configuration and the YAML of it, all values resolved."""

    config: TrainConfig
    text: str


def compose(overrides: Sequence[str]) -> Composed:
    """The configuration that `overrides` ask for. Raises ConfigError or ValueError, one sentence."""
    parsed = [_parse(override) for override in overrides]
    known = keys_of(TrainConfig)
    for override in parsed:
        _check(override, known)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            tree = hydra_compose("train", list(overrides), return_hydra_config=True)
            choices = OmegaConf.to_container(tree.hydra.runtime.choices)
            OmegaConf.set_struct(tree, False)
            del tree["hydra"]
            plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    assert isinstance(plain, dict) and isinstance(choices, dict)
    if plain.get("name") is None:
        plain["name"] = choices.get("experiment") or choices["model"]
    config = to_dataclass(TrainConfig, plain)
    return Composed(config, as_yaml(config))


def as_yaml(config: TrainConfig) -> str:
    """Every key of a configuration with its value; composing from it gives the same configuration."""
    return str(yaml.safe_dump(_plain(asdict(config)), sort_keys=False, width=120))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _parse(text: str) -> Override:
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"{text!r} is no setting: write key=value")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(f"{text!r} can't be read as key=value: {_one_line(error)}") from error


def _check(override: Override, known: Sequence[str]) -> None:
    key = override.key_or_group
    if override.is_sweep_override():
        raise ConfigError(f"{override.input_line!r} asks for {key} more than once: give one value, a list is [a,b]")
    if key.startswith("hydra"):
        raise ConfigError(f"{key} belongs to hydra, which only composes the configuration here: leave it out")
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    if key in groups:
        choices = sorted(path.stem for path in (CONFIGS / key).glob("*.yaml"))
        value = override.value()
        if isinstance(value, str) and value not in choices:
            near = get_close_matches(value, choices, 1)
            advice = f"did you mean {near[0]}?" if near else f"use one of {', '.join(choices)}"
            raise ConfigError(f"{key}={value} is not there: {advice}")
    elif key not in known and not any(key.startswith(f"{name}.") for name in _leaves(known)):
        raise unknown_key(key, [*known, *sorted(groups - set(known))])


def _leaves(known: Sequence[str]) -> list[str]:
    # A key below a leaf reaches into a list or an optional group (data.paths.0): whether it may is hydra's to say.
    return [name for name in known if not any(other.startswith(f"{name}.") for other in known)]


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__

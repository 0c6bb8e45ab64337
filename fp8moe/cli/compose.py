"""Settings of a command line to a `TrainConfig`: hydra composes a plain dict, which is converted strictly.

Settings are hydra's overrides: `key=value`, `group=choice`, dotted keys. They are checked before hydra (`hydra_tree`)
composes them: a mistyped key or choice gives one sentence with the nearest right one. In the conversion every key must
be a field of the dataclass and every value of the field's type; a union of dataclasses is chosen by its tag, the field
`kind`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from hydra.core.override_parser.types import Override

from fp8moe.cli.hydra_tree import CONFIGS, config_groups, is_file, kept_tree, parse, tree_by_hydra
from fp8moe.cli.key_names import unknown_key
from fp8moe.errors import ConfigError
from fp8moe.limits import shown
from fp8moe.train.config import TrainConfig

T = TypeVar("T")

_OWNERS = {"hydra": "hydra, which only composes the configuration here", "cluster": "fp8moe plan"}  # of other settings

# Keys of the model configuration when it was flat, and where they are now.
_YARN_KEYS = ("factor", "original_max_seq_len", "beta_slow", "beta_fast", "mscale", "mscale_all")
_MOVED_INTO = {
    "attention": (
        *("num_heads", "q_lora_rank", "kv_lora_rank", "nope_dim", "rope_dim", "v_dim", "rope_theta", "yarn"),
        *(f"yarn.{key}" for key in _YARN_KEYS),
    ),
    "router": (
        *("score", "topk", "num_groups", "top_groups", "normalize_topk", "route_scale"),
        *("force_balance", "aux_loss_alpha", "bias_gamma"),
    ),
    "experts": ("num_experts",),
}
MOVED = {f"model.{key}": f"model.{group}.{key}" for group, keys in _MOVED_INTO.items() for key in keys} | {
    "model.attention": "model.attention.backend",
    "model.expert_hidden": "model.experts.hidden",
    "model.num_shared_experts": "model.experts.num_shared",
}


@dataclass(frozen=True)
class Composed:
    """A checked configuration, and its YAML with all values resolved."""

    config: TrainConfig
    text: str


def compose(settings: Sequence[str]) -> Composed:
    """The configuration of the defaults changed by `settings`. Raises ConfigError or ValueError with one sentence."""
    return composed(tree_of(settings))


def composed(tree: Mapping[str, Any]) -> Composed:
    """The configuration that a plain dict of all keys describes. Raises ConfigError or ValueError with one sentence."""
    config = to_dataclass(TrainConfig, tree)
    return Composed(config, as_yaml(config))


def tree_of(settings: Sequence[str]) -> dict[str, Any]:
    """The defaults changed by `settings`, as a plain dict of all keys with its values resolved; the caller's to change.

    experiment=PATH.yaml stands for a file of the user's, written like one of `configs/experiment`.
    """
    known = keys_of(TrainConfig)
    for setting in settings:
        check(parse(setting), known)
    if any(is_file(parse(setting).value()) for setting in settings):
        return tree_by_hydra(tuple(settings))
    return copy.deepcopy(kept_tree(tuple(settings)))


def as_yaml(config: TrainConfig) -> str:
    """Every key of a configuration with its value; composing from it gives the same configuration."""
    return str(yaml.safe_dump(plain_values(asdict(config)), sort_keys=False, width=120))


def plain_values(value: Any) -> Any:
    """A copy of nested groups and lists made of YAML's own types."""
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def check(override: Override, known: Sequence[str]) -> None:
    """Raise ConfigError unless `override` gives one value to a key of `known` or chooses a file of a group."""
    key, line = override.key_or_group, str(override.input_line)
    if override.is_sweep_override():
        raise ConfigError(
            f"{shown(line)} gives several values and {key} takes one: write a list as [a,b], or quote text, "
            f"'{key}=\"a,b\"'"
        )
    if override.package is not None:
        raise ConfigError(f"{shown(line)} would put {key} in another place: leave @{override.package} out")
    if owner := _OWNERS.get(key.split(".")[0].split("/")[0]):
        raise ConfigError(f"{key} is a setting of {owner}: leave it out")
    groups, value = config_groups(), override.value()
    if key in groups:
        _check_choice(key, value)
    elif key in MOVED and (key not in known or isinstance(value, str)):
        raise ConfigError(f"{key} is now {MOVED[key]}: write {line.replace(key, MOVED[key], 1)}")
    elif key not in known and not any(key.startswith(f"{name}.") for name in _leaves(known)):
        raise unknown_key(key, [*known, *sorted(groups - set(known))], line.partition("=")[2] or None)


def _check_choice(group: str, value: object) -> None:
    if isinstance(value, dict) or (value is None and group in ("experiment", "lr_schedule")):
        return
    choices = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    if value not in choices and not (group == "experiment" and is_file(value)):
        raise ConfigError(f"{group}={value!s:.60} is not one of {', '.join(choices)}{nearest(value, choices)}")


def keys_in(group: str, choice: object) -> list[str]:
    """The keys that a file of a group holds; none where the choice is taken back (~lr_schedule)."""
    return [] if choice is None else list(yaml.safe_load((CONFIGS / group / f"{choice}.yaml").read_text()))


def _leaves(known: Sequence[str]) -> list[str]:
    # A key below a leaf reaches into a list or an optional group (data.paths.0): hydra checks those.
    return [name for name in known if not any(other.startswith(f"{name}.") for other in known)]


def to_dataclass(cls: type[T], values: object, path: str = "") -> T:
    """Build `cls` from a mapping of its fields; `path` is its dotted key, for messages.

    Raises ConfigError for an unknown or missing key and for a wrong type, with the nearest legal choice; what the
    dataclass itself refuses (ValueError) passes through.
    """
    values = _mapping(values, path)
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
    """Every dotted key of a dataclass and of the dataclasses inside it, groups before their members."""
    found = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = _join(path, field.name)
        found.append(key)
        for inner in alternatives(hints[field.name]):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                found += keys_of(inner, key)
    return list(dict.fromkeys(found))  # the families of a union share keys


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: those of a union, else the one."""
    return get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _show(value: object) -> str:
    return f"{shown(value)} ({type(value).__name__})"


def _value(hint: Any, value: object, path: str) -> object:
    """`value` as the type `hint` says."""
    choices = alternatives(hint)
    if value is None and type(None) in choices:
        return None
    given = [choice for choice in choices if choice is not type(None)]
    hint = given[0] if len(given) == 1 else _family(given, value, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return to_dataclass(hint, value, path)
    if get_origin(hint) is Literal:
        return _choice(value, get_args(hint), path)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(_choice(value, tuple(member.value for member in hint), path))
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            entry = value if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) else "..."
            raise ConfigError(f"{path}={_show(value)} must be a list: write {path}=[{entry}]")
        return tuple(_value(get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    return _scalar(hint, value, path)


def _mapping(value: object, path: str) -> Mapping[Any, object]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path or 'the configuration'}={_show(value)} must be a group of keys")
    return value


def _family(classes: Sequence[Any], value: object, path: str) -> Any:
    """The dataclass, of a union of them, whose tag `kind` is the one in `value`."""
    kinds = {get_args(typing.get_type_hints(cls)["kind"])[0]: cls for cls in classes}
    values = _mapping(value, path)
    if "kind" not in values:
        raise ConfigError(f"{path}.kind must be set: use one of {', '.join(kinds)}")
    return kinds[_choice(values["kind"], tuple(kinds), f"{path}.kind")]


def _choice(value: object, choices: tuple[Any, ...], path: str) -> object:
    if value not in choices:
        raise ConfigError(
            f"{path}={shown(value)} is not one of {', '.join(map(str, choices))}{nearest(value, choices)}"
        )
    return value


def nearest(value: object, choices: Sequence[Any]) -> str:
    near = get_close_matches(str(value), [str(choice) for choice in choices], 1)
    return f": did you mean {near[0]}?" if near else ""


def _scalar(hint: type, value: object, path: str) -> object:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(min(max(value, -(2**1023)), 2**1023))  # a larger one is no float; what it is for refuses this too
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    if hint is bool and value in ("on", "off"):  # YAML takes these for true and false, the command line for text
        return value == "on"
    wanted, advice = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint], ""
    if hint is int and isinstance(value, float) and abs(value) < 1e9:
        advice = f": use {round(value)}"
    elif hint is str and not isinstance(value, list | Mapping):
        advice = f""": quote it, '{path}="{value}"'"""
    raise ConfigError(f"{path}={_show(value)} must be {wanted}{advice}")

"""The families of released models by `model_type`: read from a directory's config.json, chosen for an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp8moe.errors import ConfigError, DataError
from fp8moe.interop import deepseek, gpt_oss, grouped
from fp8moe.interop.config_json import Keys
from fp8moe.interop.family import Family
from fp8moe.model.config import ModelConfig

_ALL = (deepseek.V3, deepseek.V2, deepseek.KIMI_K2, grouped.QWEN3, grouped.GLM4, grouped.OLMOE, gpt_oss.GPT_OSS)
FAMILIES: dict[str, Family] = {one.model_type: one for one in _ALL}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of one object. Raises DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise DataError(f"{path} can't be read ({reason}): use the released file") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object of keys: use the released file")
    return content


def read_config(folder: Path) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """The family and the model of a directory, and its config.json. Raises ConfigError or DataError."""
    path = folder / "config.json"
    values = read_json(path)
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"{path}: model_type={model_type!r} is not supported: use one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    return family, family.read(Keys(values, str(path))), values


def family_for(config: ModelConfig, preferred: str | None = None) -> Family:
    """The family that an export of `config` is written as: `preferred` where it can say the model, else the first.

    Raises ConfigError where none can.
    """
    reasons = []
    ordered = sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred)
    for family in ordered:
        try:
            family.write(config)
        except ConfigError as error:
            reasons.append(str(error))
        else:
            return family
    raise ConfigError(f"no family of released models can say this model ({'; '.join(dict.fromkeys(reasons))})")

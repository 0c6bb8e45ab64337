"""What a family of released models is: its configuration both ways, and its name map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fp8moe.interop.config_json import Keys
from fp8moe.interop.names import Parameter
from fp8moe.model.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    read: config.json -> the model, with as many MTP modules as it announces (0 or 1). write: the way back, without the
    keys that all families share; raises ConfigError where the model has what the family can't say. parameters: the name
    map; `fused`: with the experts of a layer in one tensor, as models of transformers hold them. copies: further names
    under which an export holds a parameter (MTP's embedding and head), by the name it holds it under first. has_fp8:
    whether its readers take block FP8.
    """

    model_type: str
    architecture: str
    read: Callable[[Keys], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    parameters: Callable[[ModelConfig, bool], list[Parameter]]
    copies: Callable[[ModelConfig], dict[str, str]]
    has_fp8: bool = True


def mtp_layer(name: str, num_layers: int) -> int | None:
    """The number of the MTP layer that a tensor belongs to, behind the model's own layers; None for another tensor."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or not parts[2].isdigit() or int(parts[2]) < num_layers:
        return None
    return int(parts[2])

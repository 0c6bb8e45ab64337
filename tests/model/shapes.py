"""Model configurations from flat fields: tests name a size, not the group it is configured in."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fp8moe.layers.attention import GqaConfig, MlaConfig
from fp8moe.layers.moe import ExpertsConfig
from fp8moe.layers.router import RouterConfig
from fp8moe.model.config import ModelConfig

GROUPS = {"attention": MlaConfig, "router": RouterConfig, "experts": ExpertsConfig}
RENAMED = {
    "expert_hidden": ("experts", "hidden"),
    "num_shared_experts": ("experts", "num_shared"),
    "latent_eps": ("attention", "norm_eps"),
}
OWN = {field.name for field in fields(ModelConfig)}
KINDS = [*GROUPS.items(), ("attention", GqaConfig)]
PLACES = {field.name: (group, field.name) for group, cls in KINDS for field in fields(cls)} | RENAMED


def _grouped(flat: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    own, groups = {}, {group: {} for group in GROUPS}
    for name, value in flat.items():
        if name in PLACES and name not in OWN:
            group, field = PLACES[name]
            groups[group][field] = value
        else:
            own[name] = value
    return own, groups


def model_config(**flat: Any) -> ModelConfig:
    """A configuration from fields of it and of its attention, router and experts; MLA without a `kind`."""
    own, groups = _grouped(flat)
    classes = GROUPS | ({"attention": GqaConfig} if flat.get("kind") == "gqa" else {})
    return ModelConfig(**own, **{group: classes[group](**values) for group, values in groups.items()})


def changed(config: ModelConfig, **flat: Any) -> ModelConfig:
    """`config` with some fields of it and of its groups replaced."""
    own, groups = _grouped(flat)
    return replace(
        config, **own, **{g: replace(getattr(config, g), **values) for g, values in groups.items() if values}
    )

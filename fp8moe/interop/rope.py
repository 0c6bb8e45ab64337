"""Rotary positions in config.json: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`, both read.

The older keys are written: every reader knows them. Of scalings YaRN alone is supported.
"""

from __future__ import annotations

from typing import Any

from fp8moe.errors import ConfigError
from fp8moe.interop.config_json import Keys
from fp8moe.layers.attention.yarn import YarnConfig

_PLAIN = ("default", "yarn")


def read_rope(keys: Keys, *, theta: float, max_position: int) -> tuple[float, YarnConfig | None]:
    """(base of the rotation, YaRN or None). theta: the family's, where the file has none. Raises ConfigError."""
    values: dict[str, Any] = dict(keys.take("rope_scaling", {}))
    values |= dict(keys.take("rope_parameters", {}))
    rope = Keys(values, f"{keys.where}, rope_parameters")
    base = float(rope.number("rope_theta", keys.number("rope_theta", theta)))
    kind, older = rope.take("rope_type", None), rope.take("type", None)
    rope.take("partial_rotary_factor", None)  # read with the sizes of a head
    kind = kind or older or "default"
    if kind not in _PLAIN:
        raise ConfigError(
            f"{rope.where}: rope_type={kind!r} is not supported, its scaling of positions would be lost: use "
            f"{' or '.join(_PLAIN)}"
        )
    all_dim = float(rope.number("mscale_all_dim", 0.0))
    original = rope.whole("original_max_position_embeddings", max_position)
    factor = rope.number("factor", max_position / original)
    yarn = YarnConfig(
        factor=float(factor),
        original_max_seq_len=original,
        beta_slow=float(rope.number("beta_slow", 1.0)),
        beta_fast=float(rope.number("beta_fast", 32.0)),
        mscale=float(rope.number("mscale", 0.0 if all_dim else 1.0)),  # without mscale_all_dim it has no effect
        mscale_all=all_dim,
        truncate=bool(rope.take("truncate", True)),
    )
    rope.finish()
    return base, yarn if kind == "yarn" else None


def write_rope(theta: float, yarn: YarnConfig | None) -> dict[str, Any]:
    """rope_theta and rope_scaling."""
    if yarn is None:
        return {"rope_theta": theta, "rope_scaling": None}
    scaling: dict[str, Any] = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_seq_len,
        "beta_slow": yarn.beta_slow,
        "beta_fast": yarn.beta_fast,
    }
    if yarn.mscale_all:
        scaling |= {"mscale": yarn.mscale or None, "mscale_all_dim": yarn.mscale_all}
    if not yarn.truncate:
        scaling["truncate"] = False
    return {"rope_theta": theta, "rope_scaling": scaling}

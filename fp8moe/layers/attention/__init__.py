"""Families of attention: each is one module with its configuration, tagged by `kind`, and the layer built from it.

A configuration answers for everything that depends on the family: parameters, FLOPs, bytes kept for the backward, the
sizes that FP8 constrains, the Linears to compile kernels for, the rotation of positions, and how the layer is built;
the layer, for what it keeps of a token for generation (`cache`). To add one, write its module with these methods and
add its configuration to `AttentionConfig`.
"""

from fp8moe.layers.attention.core import Positions
from fp8moe.layers.attention.gqa import GqaConfig
from fp8moe.layers.attention.mla import MlaConfig

AttentionConfig = MlaConfig | GqaConfig

__all__ = ["AttentionConfig", "GqaConfig", "MlaConfig", "Positions"]

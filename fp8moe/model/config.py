"""The shape of a model, checked when it is made.

Names follow the DeepSeek-V3 report (arXiv 2412.19437, sections 2.1 and 4.2). Every rule that a size must obey stands
here, once: a model that was configured can be built. FP8 takes sizes that are multiples of 16 (a short last tile of
128 is fine), and a configuration obeys that in every precision, so that `precision=` can be switched freely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FP8_MULTIPLE = 16


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071) of the decoupled rotary part.

    `factor` is s = new length / original length; `beta_slow`, `beta_fast` (the paper's alpha and beta) bound the ramp
    between interpolated and untouched frequencies. The softmax scale is multiplied by (0.1 * mscale_all * ln s + 1)^2,
    the rotation's amplitude by the ratio of that term for `mscale` and for `mscale_all`.
    """

    factor: float = 40.0
    original_max_seq_len: int = 4096
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    mscale: float = 1.0
    mscale_all: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"model.yarn.factor={self.factor} would shorten the context: use 1 or more")

    @staticmethod
    def _attention_scale(factor: float, mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    @property
    def softmax_factor(self) -> float:
        """What the softmax scale is multiplied by."""
        return self._attention_scale(self.factor, self.mscale_all) ** 2 if self.mscale_all else 1.0

    @property
    def amplitude(self) -> float:
        """What the rotary cosines and sines are multiplied by."""
        if self.mscale and self.mscale_all:
            return self._attention_scale(self.factor, self.mscale) / self._attention_scale(self.factor, self.mscale_all)
        return self._attention_scale(self.factor, 1.0)


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3-shaped transformer: MLA attention, dense layers first, then mixtures of experts, an MTP module.

    Sizes count features unless said otherwise; `q_lora_rank=0` means queries without a latent; `yarn=None` plain RoPE.
    Raises ValueError with the rule, both numbers and the nearest legal choice when sizes don't fit.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_dense_layers: int
    num_heads: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    dense_hidden: int
    expert_hidden: int
    num_experts: int
    topk: int
    q_lora_rank: int = 0
    num_shared_experts: int = 1
    num_groups: int = 1
    top_groups: int = 1
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_topk: bool = True
    route_scale: float = 1.0
    force_balance: bool = False
    aux_loss_alpha: float = 1e-4
    bias_gamma: float = 1e-3
    mtp_depth: int = 0
    mtp_weight: float = 0.3
    rope_theta: float = 10000.0
    yarn: YarnConfig | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.006
    max_seq_len: int = 4096
    attention: Literal["sdpa", "flash"] = "sdpa"

    def __post_init__(self) -> None:
        self._check_positive()
        self._check_multiples()
        self._check_routing()
        if self.score not in ("sigmoid", "softmax"):
            raise ValueError(f"model.score={self.score!r} is no affinity: use sigmoid or softmax")
        if self.attention not in ("sdpa", "flash"):
            raise ValueError(f"model.attention={self.attention!r} is no attention: use sdpa or flash")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"model.num_dense_layers={self.num_dense_layers} must be between 0 and num_layers={self.num_layers}"
            )
        if self.mtp_depth not in (0, 1):
            raise ValueError(f"model.mtp_depth={self.mtp_depth}: DeepSeek-V3 predicts one token more; use 0 or 1")
        if self.rope_dim % 2:
            raise ValueError(f"model.rope_dim={self.rope_dim} must be even, to rotate pairs: use {self.rope_dim + 1}")

    def _check_positive(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "kv_lora_rank", "nope_dim", "rope_dim", "v_dim",
                     "dense_hidden", "expert_hidden", "num_experts", "topk", "num_groups", "top_groups",
                     "max_seq_len"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("q_lora_rank", "num_shared_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must not be negative: use 0 for none")

    def _check_multiples(self) -> None:
        sizes = {
            "dim": self.dim,
            "dense_hidden": self.dense_hidden,
            "expert_hidden": self.expert_hidden,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "kv_lora_rank + rope_dim": self.kv_lora_rank + self.rope_dim,
            "num_heads * (nope_dim + rope_dim)": self.num_heads * self.qk_dim,
            "num_heads * (nope_dim + v_dim)": self.num_heads * (self.nope_dim + self.v_dim),
            "num_heads * v_dim": self.num_heads * self.v_dim,
        }
        for name, size in sizes.items():
            if size % FP8_MULTIPLE:
                nearest = max(FP8_MULTIPLE, round(size / FP8_MULTIPLE) * FP8_MULTIPLE)
                raise ValueError(f"model.{name}={size} is no multiple of {FP8_MULTIPLE}, as FP8 needs: use {nearest}")

    def _check_routing(self) -> None:
        experts, groups = self.num_experts, self.num_groups
        if experts % groups:
            legal = max(g for g in range(1, groups + 1) if experts % g == 0)
            raise ValueError(f"model.num_groups={groups} does not divide num_experts={experts}: use {legal}")
        if self.top_groups > groups:
            raise ValueError(f"model.top_groups={self.top_groups} exceeds num_groups={groups}: use at most {groups}")
        reachable = experts // groups * self.top_groups
        if self.topk > reachable:
            raise ValueError(
                f"model.topk={self.topk} exceeds the {reachable} experts of top_groups={self.top_groups} groups: "
                f"use at most {reachable}"
            )

    @property
    def qk_dim(self) -> int:
        """Features of one query or key head: the part without position and the rotary part."""
        return self.nope_dim + self.rope_dim

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by before the softmax, YaRN's factor included."""
        return self.qk_dim**-0.5 * (self.yarn.softmax_factor if self.yarn else 1.0)

    def is_dense(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0; the MTP module's block is number `num_layers`) has a dense MLP."""
        return layer < self.num_dense_layers

    @property
    def has_experts(self) -> bool:
        """Whether any block, the MTP module's included, is a mixture of experts."""
        return not self.is_dense(self.num_layers - 1 + self.mtp_depth)

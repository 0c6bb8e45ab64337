"""How many parameters a model has and how much arithmetic a token costs, by closed formulas.

The count is DeepSeek's: only ACTIVE parameters, the embedding look-up not counted, 2 FLOPs a multiply-add, the backward
twice the forward, attention's score and value products added (half of them under a causal mask). For DeepSeek-V3 at
4096 tokens that is 250 GFLOP a token causal and 281 non-causal (ISCA 2025 paper, table 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8moe.model.config import ModelConfig

BF16_PEAK = 989e12  # FLOP/s, dense, of an H100, H200 or H800
FP8_PEAK = 1979e12
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters: `total` and `active` of the main model (active without the embedding), `mtp` of the MTP module."""

    total: int
    active: int
    mtp: int


def block_parameters(config: ModelConfig, layer: int, *, active: bool = False) -> int:
    """Parameters of block number `layer`, all of them or those one token uses."""
    c = config
    attention, norms = c.attention.num_parameters(c.dim), 2 * c.dim
    if c.is_dense(layer):
        return attention + 3 * c.dim * c.dense_hidden + norms
    routed = c.router.topk if active else c.experts.num_experts
    gate = c.experts.num_experts * (c.dim + c.router.gate_bias)
    return attention + c.experts.num_parameters(c.dim, routed) + gate + norms


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameters of the main model (total, active a token) and of the MTP module, which shares embedding and head."""
    c = config
    embedding = c.vocab_size * c.dim
    total = sum(block_parameters(c, i) for i in range(c.num_layers)) + 2 * embedding + c.dim
    active = sum(block_parameters(c, i, active=True) for i in range(c.num_layers)) + embedding + c.dim
    mtp = c.mtp_depth * (block_parameters(c, c.num_layers) + 2 * c.dim * c.dim + 3 * c.dim)
    return ParameterCounts(total, active, mtp)


def flops_per_token(config: ModelConfig, seq_len: int, causal: bool = True) -> float:
    """Forward and backward FLOPs of the main model, a token, at sequences of `seq_len` tokens."""
    layers = range(config.num_layers)
    attention = sum(config.attention.core_flops(seq_len, causal=causal, layer=layer) for layer in layers)
    return FORWARD_AND_BACKWARD * (2.0 * count_parameters(config).active + attention)


def mfu(config: ModelConfig, seq_len: int, tokens_per_second_per_gpu: float, peak: float = BF16_PEAK) -> float:
    """Model FLOPs utilisation: causal FLOPs a token x tokens/s/GPU over `peak` FLOP/s."""
    return flops_per_token(config, seq_len) * tokens_per_second_per_gpu / peak

"""Rotated queries and keys as autograd follows them: one launch each way (`kernels.rope`), nothing kept but the angles.

Legend: T tokens, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.rope import rope_keys, rope_keys_backward, rope_queries, rope_queries_backward


def rotated_queries(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q [T, H, nope + rope] with its rotary part turned by cos, sin [T, rope/2]."""
    return _QueriesFunction.apply(q, cos, sin)


def keys_and_values(kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, *, nope_dim: int) -> tuple[Tensor, Tensor]:
    """kv [T, H, nope + v], k_rope [T, rope] -> keys [T, H, nope + rope], values [T, H, v], a view of kv."""
    return _KeysFunction.apply(kv, k_rope, cos, sin, nope_dim)


class _QueriesFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rope_queries(q, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return rope_queries_backward(grads[0], *ctx.saved_tensors), None, None


class _KeysFunction(torch.autograd.Function):
    """Keys and values together: their gradients meet again in one tensor, the up projection's."""

    @staticmethod
    def forward(ctx: Any, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, nope_dim: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rope_keys(kv, k_rope, cos, sin, nope_dim=nope_dim), kv[..., nope_dim:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return *rope_keys_backward(*grads, *ctx.saved_tensors), None, None, None

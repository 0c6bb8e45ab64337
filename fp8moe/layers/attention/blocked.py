"""Causal attention on a CPU for values narrower than keys: softmax(scale q k^T) v by blocks of queries.

PyTorch's fused CPU kernel takes equal heads only; for others it goes through FP32 as a whole, keeps every score, and
computes those of the future as well. Here a block of queries meets the keys up to its own end, and the backward makes
the probabilities again: nothing but q, k, v is kept. Refused: values padded to the width of the keys for the fused
kernel, which at 256 tokens is as slow as what it replaces.

Numerics, those of the fused kernels on GPUs: scores, softmax and the gradient of scores in FP32; probabilities and the
gradient of scores are rounded to the dtype of v where they enter a product; each output is one product with FP32 sums,
rounded once. In FP32 nothing is rounded.

Legend: B sequences, S tokens of a sequence, H heads, G of B x H heads at a time, d features of a query or key, V of a
value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8moe.layers.linear import product

_QUERIES = 64  # of a block
_SCORES = 1 << 18  # of a pass: 1 MiB of FP32, which stays in a core's cache


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: None = None) -> Tensor:
    """q, k [B, S, H, d], v [B, S, H, V] of one dtype -> [B, S, H, V]; causal, of one sequence length."""
    assert mask is None and q.shape == k.shape, (mask, q.shape, k.shape)
    return _BlockedAttention.apply(q, k, v, scale)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        values = _heads_first(v)
        queries, keys = _heads_first(q).float() * scale, _heads_first(k).float()
        out = torch.empty_like(values)
        for heads in _groups(values):
            for block in _blocks(q.shape[1]):
                p = _probabilities(queries[heads, block], keys[heads, : block.stop], block)
                out[heads, block] = product(p.to(v.dtype), values[heads, : block.stop])
        return _heads_back(out, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = (_heads_first(x) for x in ctx.saved_tensors)
        dy = _heads_first(grads[0])
        queries, keys, values, gradients = q.float() * ctx.scale, k.float(), v.float(), dy.float()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        seq_len = q.shape[1]
        for heads in _groups(v):
            p_GSS = v.new_empty(len(q[heads]), seq_len, seq_len)  # the future is neither written nor read
            d_scores_GSS = torch.empty_like(p_GSS)
            for block in _blocks(seq_len):
                past = slice(0, block.stop)
                p = _probabilities(queries[heads, block], keys[heads, past], block)
                dp = torch.bmm(gradients[heads, block], values[heads, past].mT)
                p_GSS[:, block, past] = p
                d_scores = torch.ops.aten._softmax_backward_data(dp, p, -1, torch.float32)
                d_scores_GSS[:, block, past] = d_scores.mul_(ctx.scale)
                dq[heads, block] = product(d_scores_GSS[:, block, past], k[heads, past])
            for block in _blocks(seq_len):
                later = slice(block.start, None)
                dk[heads, block] = product(d_scores_GSS[:, later, block].mT, q[heads, later])
                dv[heads, block] = product(p_GSS[:, later, block].mT, dy[heads, later])
        return *(_heads_back(x, like) for x, like in zip((dq, dk, dv), ctx.saved_tensors, strict=True)), None


def _probabilities(queries: Tensor, keys: Tensor, block: slice) -> Tensor:
    """Softmax of FP32 scores, [G, block, keys up to its end]."""
    scores = torch.bmm(queries, keys.mT)
    size = block.stop - block.start
    scores[:, :, block] += torch.full((size, size), float("-inf"), device=scores.device).triu_(1)
    return torch.softmax(scores, -1, out=scores)


def _blocks(seq_len: int) -> list[slice]:
    return [slice(start, min(start + _QUERIES, seq_len)) for start in range(0, seq_len, _QUERIES)]


def _groups(x: Tensor) -> list[slice]:
    """Heads of [B x H, S, ...] that one pass takes."""
    heads, seq_len = x.shape[:2]
    size = max(1, _SCORES // (min(_QUERIES, seq_len) * seq_len))
    return [slice(start, start + size) for start in range(0, heads, size)]


def _heads_first(x: Tensor) -> Tensor:
    """[B, S, H, d] -> [B x H, S, d], contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _heads_back(x: Tensor, like: Tensor) -> Tensor:
    """[B x H, S, d] -> a view [B, S, H, d]."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)

"""Causal attention on a CPU by blocks of queries: values narrower than keys, sinks, windows.

PyTorch's fused CPU kernel takes equal heads only, and no sinks; for other heads it goes through FP32 as a whole, keeps
every score, and computes those of the future as well. Here a block of queries meets the keys up to its own end, from
the first that its window shows, and the backward makes the probabilities again: nothing but q, k, v is kept. Gradients
of keys and values are one product of all queries each, zeros included: blocks of that transposed matrix would be copied
one by one, which takes longer than the zeros. Refused:
values padded to the width of the keys for the fused kernel, which at 256 tokens is as slow as what it replaces.

Numerics, those of the fused kernels on GPUs: scores, softmax and the gradient of scores in FP32; probabilities and the
gradient of scores are rounded to the dtype of v where they enter a product; each output is one product with FP32 sums,
rounded once. In FP32 nothing is rounded.

Legend: B sequences, S tokens of a sequence, L where keys are more, H heads, G of B x H heads at a time, J heads of keys
and values, d features of a query or key, V of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8moe.layers.linear import product

_QUERIES = 64  # of a block
_SCORES = 1 << 18  # of a pass: 1 MiB of FP32, which stays in a core's cache


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, S, H, d], k [B, L, J, d], v [B, L, J, V] of one dtype -> [B, S, H, V]; causal.

    J divides H, L is at least S: the last query is at the last key. window: tokens that a query sees, itself included.
    sinks: FP32 [H], a logit more in each query's softmax, without a value.
    """
    if k.shape[2] != q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    assert q.shape[2:] == k.shape[2:] and q.shape[1] <= k.shape[1], (q.shape, k.shape)
    return _BlockedAttention.apply(q, k, v, sinks, scale, window)


@dataclass(frozen=True)
class _Softmax:
    """What a query's softmax is over: keys that its window shows, and maybe its head's sink."""

    num_heads: int
    window: int | None
    sinks: Tensor | None
    ahead: int  # keys before the first query

    def placed(self, block: slice) -> slice:
        """The keys of the tokens of a block of queries."""
        return slice(block.start + self.ahead, block.stop + self.ahead)

    def past(self, block: slice) -> slice:
        """The keys that some query of `block` sees."""
        placed = self.placed(block)
        return slice(0 if self.window is None else max(0, placed.start - self.window + 1), placed.stop)

    def probabilities(self, queries: Tensor, keys: Tensor, heads: slice, block: slice) -> tuple[Tensor, Tensor | None]:
        """Softmax of FP32 scores, [G, block, past], and the sink's share [G, block]."""
        scores, past = torch.bmm(queries, keys.mT), self.past(block)
        if self.window is None:
            size = block.stop - block.start
            scores[:, :, self.placed(block)] += torch.full((size, size), float("-inf"), device=scores.device).triu_(1)
        else:
            scores.masked_fill_(self._hidden(self.placed(block), past, self.window), float("-inf"))
        if self.sinks is None:
            return torch.softmax(scores, -1, out=scores), None
        sinks_G = self.sinks[torch.arange(heads.start, heads.start + len(queries)) % self.num_heads]
        both = torch.cat([scores, sinks_G[:, None, None].expand(*scores.shape[:2], 1)], -1).softmax(-1)
        return both[..., :-1], both[..., -1]

    @staticmethod
    def _hidden(block: slice, past: slice, window: int) -> Tensor:
        """True where a query may not look, [block, past]."""
        query, key = torch.arange(block.start, block.stop)[:, None], torch.arange(past.start, past.stop)
        return (key > query) | (key <= query - window)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ahead = k.shape[1] - q.shape[1]
        ctx.scale, ctx.softmax = scale, _Softmax(q.shape[2], window, None if sinks is None else sinks.detach(), ahead)
        values = _heads_first(v)
        queries, keys = _heads_first(q).float() * scale, _heads_first(k).float()
        out = values.new_empty(len(values), q.shape[1], v.shape[3])
        for heads in _groups(values):
            for block in _blocks(q.shape[1]):
                past = ctx.softmax.past(block)
                p, _ = ctx.softmax.probabilities(queries[heads, block], keys[heads, past], heads, block)
                out[heads, block] = product(p.to(v.dtype), values[heads, past])
        return _heads_back(out, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = (_heads_first(x) for x in ctx.saved_tensors)
        dy, softmax = _heads_first(grads[0]), ctx.softmax
        queries, keys, values, gradients = q.float() * ctx.scale, k.float(), v.float(), dy.float()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_sinks = v.new_zeros(len(v), dtype=torch.float32)
        for heads in _groups(v):
            p_GSS = v.new_zeros(len(q[heads]), q.shape[1], k.shape[1])  # what a query does not see stays zero
            d_scores_GSS = torch.zeros_like(p_GSS)
            for block in _blocks(q.shape[1]):
                past = softmax.past(block)
                p, sink = softmax.probabilities(queries[heads, block], keys[heads, past], heads, block)
                dp = torch.bmm(gradients[heads, block], values[heads, past].mT)
                p_GSS[:, block, past] = p
                if sink is not None:
                    d_sinks[heads] -= (sink * (p * dp).sum(-1)).sum(-1)
                d_scores = torch.ops.aten._softmax_backward_data(dp, p, -1, torch.float32)
                d_scores_GSS[:, block, past] = d_scores.mul_(ctx.scale)
                dq[heads, block] = product(d_scores_GSS[:, block, past], k[heads, past])
            dk[heads] = product(d_scores_GSS.mT, q[heads])
            dv[heads] = product(p_GSS.mT, dy[heads])
        back = (_heads_back(x, like) for x, like in zip((dq, dk, dv), ctx.saved_tensors, strict=True))
        by_head = None if softmax.sinks is None else d_sinks.unflatten(0, (-1, softmax.num_heads)).sum(0)
        return *back, by_head, None, None


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

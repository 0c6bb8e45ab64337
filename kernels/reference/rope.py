"""RoPE with the concatenation: (a, b) = (x[2i], x[2i+1]) -> (a cos - b sin, b cos + a sin), FP32, rounded once."""

import torch
from torch import Tensor

from fp8moe.kernels.reference._arithmetic import row_chunks


def rope_queries(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    nope = q.shape[-1] - 2 * cos.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for part in row_chunks(q.shape[0], q.shape[1] * q.shape[2]):
        out[part, :, :nope] = q[part, :, :nope]
        out[part, :, nope:] = _turn(q[part, :, nope:], cos[part, None], sin[part, None])
    return out


def rope_queries_backward(dq: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    nope = dq.shape[-1] - 2 * cos.shape[1]
    out = torch.empty(dq.shape, dtype=dq.dtype, device=dq.device)
    for part in row_chunks(dq.shape[0], dq.shape[1] * dq.shape[2]):
        out[part, :, :nope] = dq[part, :, :nope]
        out[part, :, nope:] = _turn_back(dq[part, :, nope:].float(), cos[part, None], sin[part, None])
    return out


def rope_keys(kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, *, nope_dim: int) -> Tensor:
    t, heads, _ = kv.shape
    out = torch.empty(t, heads, nope_dim + k_rope.shape[1], dtype=kv.dtype, device=kv.device)
    out[..., :nope_dim] = kv[..., :nope_dim]
    out[..., nope_dim:] = _turn(k_rope, cos, sin)[:, None]
    return out


def rope_keys_backward(dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    nope = dk.shape[-1] - 2 * cos.shape[1]
    d_kv = torch.cat([dk[..., :nope], dv], dim=-1)
    d_rope = _turn_back(dk[..., nope:].sum(1, dtype=torch.float32), cos, sin)
    return d_kv, d_rope.to(dk.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., rope] rotated in FP32, in its dtype: first members of all pairs, then second ones."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).to(x.dtype)


def _turn_back(dx: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `_turn` for dx [..., rope] FP32; FP32."""
    first, second = dx.chunk(2, dim=-1)
    return torch.stack([first * cos + second * sin, second * cos - first * sin], dim=-1).flatten(-2)

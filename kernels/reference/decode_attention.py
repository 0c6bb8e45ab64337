"""Attention to a cache: softmax(scale q k^T) v of a sequence's entries up to each token's own, scores in FP32.

Probabilities are rounded to the dtype of the values, as in the fused kernels, and the output once. BF16 entries are
widened on a CPU for a few sequences at a time, which stay in its cache.
"""

import torch
from torch import Tensor

from fp8moe.kernels.device_layout import are_latents

WIDENED_VALUES = 1 << 19  # of keys that are copied to FP32 at once, but for one sequence at least


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rows: Tensor | None = None,
    sinks: Tensor | None = None, *,
    length: int, scale: float, window: int | None = None,
) -> Tensor:  # fmt: skip
    keys, values = keys[:, :length], values[:, :length]
    out = torch.empty(*q.shape[:3], values.shape[-1], dtype=q.dtype, device=q.device)
    widens = q.dtype is not torch.float32 and q.device.type == "cpu"
    step = WIDENED_VALUES // max(1, keys[0].numel()) if widens else len(q)
    for start in range(0, len(q), max(step, 1)):
        part = slice(start, start + max(step, 1))
        entries = part if rows is None else rows[part]
        seen = _seen(positions[part], length, window)
        out[part] = _attend(q[part], *_widened(keys, values, entries), seen, sinks, scale)
    return out


def _seen(positions_BS: Tensor, length: int, window: int | None) -> Tensor:
    """True where a new token may look at an entry, [B, S, L]: its own and what came before it, of a window."""
    places_L = torch.arange(length, device=positions_BS.device)
    seen = places_L <= positions_BS[..., None]
    return seen if window is None else seen & (places_L > positions_BS[..., None] - window)


def _widened(keys: Tensor, values: Tensor, entries: slice | Tensor) -> tuple[Tensor, Tensor]:
    """Some sequences' keys and values in FP32, copied once where they are the same."""
    wide = keys[entries].float()
    return wide, wide[..., : values.shape[-1]] if are_latents(keys, values) else values[entries].float()


def _attend(q: Tensor, keys: Tensor, values: Tensor, seen_BSL: Tensor, sinks_H: Tensor | None, scale: float) -> Tensor:
    """Of q [B, S, H, d] and FP32 entries [B, L, G, *] -> FP32 [B, S, H, V]."""
    s, h, groups, length = q.shape[1], q.shape[2], keys.shape[2], keys.shape[1]
    queries = q.float().unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, H/G x S, d]
    scores = (queries @ keys.permute(0, 2, 3, 1)).mul_(scale).unflatten(2, (-1, s))
    scores.masked_fill_(~seen_BSL[:, None, None], float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.view(1, groups, h // groups, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    p = scores.softmax(-1)[..., :length].to(q.dtype).float().flatten(2, 3)
    out = p @ values.transpose(1, 2)
    return out.unflatten(2, (-1, s)).permute(0, 3, 1, 2, 4).flatten(2, 3)

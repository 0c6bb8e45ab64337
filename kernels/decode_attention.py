"""Attention of new tokens to a cache of entries, for generation: no gradients.

A cache has rows of entries, a row a sequence; a new token sees those of its own row up to its own place, of a window if
there is one. Values may be the keys' first features (latent attention: one head of keys); they are then read once.
Entries behind a row's last token may be read and are multiplied by 0, so they must be finite.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend

DTYPES = (torch.bfloat16, torch.float32)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    rows: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    length: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of q [B, S, H, d], keys [N, L, G, d], values [N, L, G, V] -> [B, S, H, V], of one dtype.

    H/G neighbouring heads share a key. positions [B, S] int64: each token's place, that of its own entry; less than
    length. rows [B] int64: the sequences' rows of the cache; None: the first B, in order. sinks [H] FP32: a logit a
    head that takes part in the softmax and has no value. length: entries of a row that are read at most. window:
    entries that a token sees, its own included; None: all up to it. BF16 or FP32. Raises ValueError for other shapes
    or dtypes; values of positions and rows are not looked at.
    """
    _check(q, keys, values)
    b, s, h, _ = q.shape
    for name, given, shape, dtype in (
        ("positions", positions, (b, s), torch.int64), ("rows", rows, (b,), torch.int64),
        ("sinks", sinks, (h,), torch.float32),
    ):  # fmt: skip
        if given is not None and (given.shape != shape or given.dtype is not dtype):
            raise ValueError(f"{name} must be {list(shape)} {dtype}, got {list(given.shape)} {given.dtype}: cast it")
    if rows is None and b > len(keys):
        raise ValueError(f"{b} sequences have {len(keys)} rows of entries: give each sequence its row")
    if not 1 <= length <= keys.shape[1]:
        raise ValueError(f"length={length} must be from 1 to the {keys.shape[1]} entries of a row: use {keys.shape[1]}")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: use None for all entries")
    out: Tensor = backend.op("decode_attention")(
        q, keys, values, positions, rows, sinks, length=length, scale=scale, window=window
    )
    return out


def _check(q: Tensor, keys: Tensor, values: Tensor) -> None:
    if q.dim() != 4 or keys.dim() != 4 or values.dim() != 4:
        raise ValueError(
            f"decode_attention takes q [B, S, H, d], keys [N, L, G, d] and values [N, L, G, V], not {list(q.shape)}, "
            f"{list(keys.shape)} and {list(values.shape)}: unflatten them"
        )
    if not q.dtype == keys.dtype == values.dtype or q.dtype not in DTYPES:
        raise ValueError(f"q, keys and values are {q.dtype}, {keys.dtype} and {values.dtype}: all BF16, or all FP32")
    heads, groups = q.shape[2], keys.shape[2]
    if keys.shape[:3] != values.shape[:3] or q.shape[3] != keys.shape[3] or not groups or heads % groups:
        raise ValueError(
            f"heads {list(q.shape[2:])} don't fit keys {list(keys.shape)} and values {list(values.shape)}: as many "
            "features as a key has, and a multiple of the key heads"
        )

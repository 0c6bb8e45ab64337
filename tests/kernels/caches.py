"""Caches that attention's kernels are tried on, and the answer in FP64, sequence by sequence and head by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sequences, new tokens of each, heads, heads of keys, features of a key and a value, entries that are read."""

    b: int
    s: int
    h: int
    g: int
    d: int
    v: int
    length: int
    window: int | None = None
    rows: bool = False
    sinks: bool = False

    @property
    def latents(self) -> bool:
        """Whether values are the keys' first features."""
        return self.g == 1 and self.v < self.d


CACHES = {
    "latents": Sizes(3, 1, 16, 1, 96, 64, 190, rows=True),
    "latents of few features": Sizes(2, 2, 3, 1, 24, 16, 40, rows=True),
    "latents of many heads": Sizes(2, 1, 80, 1, 48, 32, 100),
    "heads": Sizes(3, 2, 6, 2, 32, 32, 150, sinks=True),
    "a head each": Sizes(2, 1, 4, 4, 16, 24, 70, rows=True),
    "a window": Sizes(3, 2, 6, 2, 40, 24, 290, window=50, rows=True, sinks=True),
    "a short window": Sizes(2, 5, 8, 2, 16, 16, 70, window=1),
    "many new tokens": Sizes(2, 21, 8, 2, 24, 8, 70, rows=True),
    "one entry": Sizes(2, 1, 4, 2, 16, 16, 1),
}


@dataclass(frozen=True)
class Cache:
    """What is attended, all of it: `kernels.decode_attention`."""

    q: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    rows: Tensor | None
    sinks: Tensor | None
    length: int
    window: int | None


def filled(name: str | Sizes, dtype: torch.dtype, device: torch.device | str = "cpu") -> Cache:
    """Random numbers everywhere; sequences of any length, the first of one forward alone and the last of them all."""
    of = CACHES[name] if isinstance(name, str) else name
    kept = of.b + 2 if of.rows else of.b
    width = of.d if of.latents else of.g * (of.d + of.v)
    entries = torch.randn(kept, of.length + 3, width, device=device).to(dtype)
    if of.latents:
        keys = entries.unsqueeze(2)
        values = keys[..., : of.v]
    else:
        keys, values = (part.unflatten(-1, (of.g, -1)) for part in entries.split([of.g * of.d, of.g * of.v], dim=-1))
    starts = torch.randint(0, of.length - of.s + 1, (of.b,), device=device)
    starts[0], starts[-1] = 0, of.length - of.s
    return Cache(
        torch.randn(of.b, of.s, of.h, of.d, device=device).to(dtype),
        keys,
        values,
        starts[:, None] + torch.arange(of.s, device=device),
        torch.randperm(kept, device=device)[: of.b] if of.rows else None,
        torch.randn(of.h, device=device) if of.sinks else None,
        of.length,
        of.window,
    )


def caches_arguments() -> tuple[Tensor | None, ...]:
    """Queries, keys and values, places, rows: of latents."""
    cache = filled("latents", torch.bfloat16)
    return cache.q, cache.keys, cache.values, cache.positions, cache.rows


def by_hand(cache: Cache, scale: float) -> Tensor:
    """softmax(scale q k^T) v in FP64, each token over the entries that it sees alone."""
    b, s, h, _ = cache.q.shape
    shared = h // cache.keys.shape[2]
    out = torch.empty(b, s, h, cache.values.shape[-1], dtype=torch.float64, device=cache.q.device)
    for i in range(b):
        row = i if cache.rows is None else int(cache.rows[i])
        for j in range(s):
            end = int(cache.positions[i, j]) + 1
            seen = slice(0 if cache.window is None else max(end - cache.window, 0), end)
            for head in range(h):
                keys = cache.keys[row, seen, head // shared].double()
                values = cache.values[row, seen, head // shared].double()
                scores = keys @ cache.q[i, j, head].double() * scale
                if cache.sinks is not None:
                    scores = torch.cat([scores, cache.sinks[head : head + 1].double()])
                out[i, j, head] = scores.softmax(-1)[: len(values)] @ values
    return out

"""Which tensors of a run's state hold a number that is not finite, and on which ranks.

A tensor is judged by its least and largest value: a NaN is both of them, an infinity one. That is one pass without a
temporary; `isfinite` would write a byte a value, and a sum may overflow in FP32 where every value is finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fp8moe.parallel.place import listed_ranks


def not_finite(tensors: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """Names of those whose parts, of any dtype and device, are not all finite. Waits for a device once."""
    parts = [
        (name, part) for name, found in tensors.items() for part in found if part.is_floating_point() and part.numel()
    ]
    if not parts:
        return []
    finite = [torch.stack(torch.aminmax(part.detach())).isfinite().all() for _, part in parts]
    is_finite = dict.fromkeys((name for name, _ in parts), True)
    for (name, _), good in zip(parts, _to_host(finite), strict=True):
        is_finite[name] &= good
    return [name for name, good in is_finite.items() if not good]


def _to_host(flags: Sequence[Tensor]) -> list[bool]:
    """The values of bool [] tensors, those of one device brought over together."""
    found: dict[int, bool] = {}
    for device in {flag.device for flag in flags}:
        here = [i for i, flag in enumerate(flags) if flag.device == device]
        found |= dict(zip(here, torch.stack([flags[i] for i in here]).tolist(), strict=True))
    return [found[i] for i in range(len(flags))]


def described(of_ranks: Sequence[Sequence[str]]) -> str | None:
    """A clause on the names that each rank found, in order of rank: the first one and its ranks; None of none."""
    names = [name for found in of_ranks for name in found]
    if not names:
        return None
    ranks = [rank for rank, found in enumerate(of_ranks) if names[0] in found]
    others = len(set(names)) - 1
    more = "" if not others else f", nor {'is' if others == 1 else 'are'} {others} other tensor{'s'[: others > 1]},"
    return f"{names[0]} is not finite on rank{'s'[: len(ranks) > 1]} {listed_ranks(ranks)}{more}"

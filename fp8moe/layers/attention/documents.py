"""Documents packed in sequences, as their lengths: what kernels of variable length and blocks of scores are made from.

Lengths are host numbers, known when a batch is cut: a kernel's launch needs the longest, a loop on a CPU all of them,
and neither may wait for the device. Cumulative lengths go there when a kernel first asks, once for all layers. Refused:
a number of its document for every token, from which the device would have to find the borders, and a dense mask, which
at 32,768 tokens is a gigabyte a sequence.

Legend: B sequences, S tokens of a sequence, T = B x S, N documents or parts of some; none crosses a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Documents of T tokens in order, by their lengths, on `device`."""

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)

    @functools.cached_property
    def cumulative_N(self) -> Tensor:
        """Where each begins and, last, where they end: int32 [N + 1]."""
        host = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return (host.pin_memory() if self.device.type == "cuda" else host).to(self.device, non_blocking=True)

    @functools.cached_property
    def numbers_T(self) -> Tensor:
        """The document of each token, int64 [T], counted over all sequences."""
        places = torch.arange(sum(self.lengths), dtype=torch.int32, device=self.device)
        return torch.searchsorted(self.cumulative_N, places, right=True) - 1


def by_document(
    kernel: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    documents: Documents,
    **options: object,
) -> Tensor:
    """Attention of [B, S, H, d] by a kernel that knows no documents, called once for each."""
    parts = [x.flatten(0, 1).split(documents.lengths) for x in (q, k, v)]
    outputs = [kernel(*(x[None] for x in one), scale, **options)[0] for one in zip(*parts, strict=True)]
    return torch.cat(outputs).unflatten(0, q.shape[:2])

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
    q_TH: Tensor,
    k_TH: Tensor,
    v_TH: Tensor,
    scale: float,
    documents: Documents,
    key_documents: Documents,
    **options: object,
) -> list[Tensor]:
    """Attention of [T, H, d] by a kernel that knows no documents, called once for each -> its output of each."""
    queries, keys, values = (
        x.split(lengths.lengths) for x, lengths in ((q_TH, documents), (k_TH, key_documents), (v_TH, key_documents))
    )
    return [
        kernel(q[None], k[None], v[None], scale, **options)[0] for q, k, v in zip(queries, keys, values, strict=True)
    ]

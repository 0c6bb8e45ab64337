"""Weight gradients that wait until the schedule asks.

A backward is two products: dgrad, which the layer below needs at once, and wgrad, which nobody needs before the
optimizer. Zero-bubble and DualPipe schedules run them apart (arXiv 2401.10241). Every Linear hands its wgrad over with
`submit`; outside `WeightGradStore.collect` it runs on the spot, which is ordinary training, inside it waits in the
store under the key of its stage, micro-batch and phase. Results are bit-equal: the same products, in the same order
within a parameter. Hooks on autograd nodes were refused: they can't tell the two products of one node apart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

_collecting: list[Callable[[Callable[[], None]], None]] = []


def submit(wgrad: Callable[[], None]) -> None:
    """Run `wgrad` now, or leave it to the store that is collecting. It must add into a parameter's `main_grad`."""
    if _collecting:
        _collecting[-1](wgrad)
    else:
        wgrad()


class WeightGradStore:
    """Put-off weight gradients, first in first out under each key."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, list[Callable[[], None]]] = {}

    @contextmanager
    def collect(self, key: Hashable) -> Iterator[None]:
        """Within the block, every submitted weight gradient waits under `key`.

        The list is the process's, not the thread's: on a GPU autograd runs a backward in a thread of its own.
        """
        _collecting.append(self._waiting.setdefault(key, []).append)
        try:
            yield
        finally:
            _collecting.pop()

    @torch.no_grad()
    def run(self, key: Hashable) -> None:
        """Compute what waits under `key`, in the order it came, and forget it."""
        for wgrad in self._waiting.pop(key, []):
            wgrad()

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._waiting.values())

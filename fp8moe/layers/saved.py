"""What autograd saves of an operation whose backward is not ours, held in boxes, so that less can be kept of it.

Attention's kernels save what they read and write, a plain product its operands. `boxed` runs such an operation under
`saved_tensors_hooks`: each saved tensor goes into a box, and afterwards a box may be told to make its tensor when
backward asks instead of holding it: from a packed copy (`kept_output`), or from a computation (`compute_again`). Hooks
do not nest, the innermost alone is asked: hence one list of boxes, and everyone who replaces takes it.

Refused: an autograd function around the operation, which would have to name each back end's private backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor


class Box:
    """What autograd holds in the place of a tensor: `saved` itself, or, once that is None, the way to make it again."""

    def __init__(self, saved: Tensor) -> None:
        self.saved: Tensor | None = saved
        self._make: Callable[[], Tensor] | None = None

    def open(self) -> Tensor:
        """What backward gets."""
        if self.saved is not None:
            return self.saved
        assert self._make is not None
        return self._make()

    def replace(self, make: Callable[[], Tensor]) -> None:
        """Let go of the tensor: from now on `make()` gives one of its shape, strides and values."""
        self.saved, self._make = None, make


@contextmanager
def boxed() -> Iterator[list[Box]]:
    """Within the block, what autograd saves goes into boxes, listed in the order they were saved."""
    boxes: list[Box] = []

    def box(saved: Tensor) -> Box:
        boxes.append(Box(saved.detach()))
        return boxes[-1]

    with torch.autograd.graph.saved_tensors_hooks(box, Box.open):
        yield boxes


def compute_again(boxes: Sequence[Box], tensors: Sequence[Tensor], again: Callable[[], Sequence[Tensor]]) -> None:
    """Let go of every saved view of `tensors`: backward gets the same view of what `again()` returns in their order.

    `again` must lay out memory as it was; it runs once a backward, without gradients, when the first view is asked for.
    """
    source = _Again(again)
    for box in boxes:
        saved = box.saved
        if saved is None or not saved.numel():  # empty tensors share an address, and no memory
            continue
        for which, tensor in enumerate(tensors):
            if saved.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                box.replace(source.view(which, saved))
                break


class _Again:
    """Computes its tensors for the first view that backward asks for, and forgets them after the last."""

    def __init__(self, compute: Callable[[], Sequence[Tensor]]) -> None:
        self._compute = compute
        self._views = self._left = 0
        self._made: Sequence[Tensor] = ()

    def view(self, which: int, saved: Tensor) -> Callable[[], Tensor]:
        self._views += 1
        return partial(self._view, which, saved.shape, saved.stride(), int(saved.storage_offset()))

    def _view(self, which: int, shape: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        if not self._left:
            with torch.no_grad():
                self._made = self._compute()
            self._left = self._views
        tensor = self._made[which].as_strided(shape, stride, offset)
        self._left -= 1
        if not self._left:
            self._made = ()
        return tensor

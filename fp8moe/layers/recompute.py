"""Values for the backward: kept, or computed again by the one consumer that needs them.

A `Recallable` is a tensor whose values a backward can ask for, kept or recomputed. `capture_saved` holds what autograd
saves of an operation whose backward is not ours (attention's kernels save what they read and write), so that less can
be kept of it: each saved tensor becomes a `SavedTensor`, and afterwards it may be told to make its tensor when backward
asks: from a packed copy (`attention.core`) or from a computation (`recompute_saved`). Hooks do not nest, the innermost
alone is asked: hence one list of saved tensors, and everyone who replaces takes it.

Nothing that routes, sends, counts or registers a weight gradient ever runs twice. `torch.utils.checkpoint` was refused
for that reason: it repeats whole regions, attention, router and the registering of weight gradients with them. An
autograd function around the operation was refused too: it would have to name each back end's private backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recallable:
    """A tensor followed by autograd, for the forward; `recall()` gives its values to the backward.

    Who wants the backward to have the values must hold on to `recall` alone: `tensor` is the memory to be released.
    """

    tensor: Tensor
    recall: Callable[[], Tensor]


def kept(x: Tensor | Recallable) -> Recallable:
    """A plain tensor as a Recallable that keeps its values."""
    if isinstance(x, Recallable):
        return x
    values = x.detach()
    return Recallable(x, lambda: values)


class SavedTensor:
    """What autograd holds in place of a tensor: `tensor` itself or, once that is None, a function to make it again."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self._make: Callable[[], Tensor] | None = None

    def unpack(self) -> Tensor:
        """The tensor that backward gets."""
        if self.tensor is not None:
            return self.tensor
        assert self._make is not None
        return self._make()

    def replace(self, make: Callable[[], Tensor]) -> None:
        """Release the tensor: from now on `make()` gives one of its shape, strides and values."""
        self.tensor, self._make = None, make


@contextmanager
def capture_saved() -> Iterator[list[SavedTensor]]:
    """Within the block, what autograd saves is captured, in the order in which it is saved."""
    captured: list[SavedTensor] = []

    def pack(tensor: Tensor) -> SavedTensor:
        captured.append(SavedTensor(tensor.detach()))
        return captured[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, SavedTensor.unpack):
        yield captured


def recompute_saved(
    captured: Sequence[SavedTensor], tensors: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]
) -> None:
    """Release every saved view of `tensors`: backward gets the same view of what `compute()` returns in their order.

    `compute` must lay out memory as it was; it runs once a backward, without gradients, at the first view asked for.
    """
    source = _Recomputed(compute)
    for saved in captured:
        tensor = saved.tensor
        if tensor is None or not tensor.numel():  # empty tensors share an address, and no memory
            continue
        for which, original in enumerate(tensors):
            if tensor.untyped_storage().data_ptr() == original.untyped_storage().data_ptr():
                saved.replace(source.view(which, tensor))
                break


class _Recomputed:
    """Tensors computed for the first view that backward asks for, released after the last."""

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

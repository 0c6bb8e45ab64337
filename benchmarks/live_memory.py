"""Bytes of the tensors that some code created and that are still alive: what a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among `values`, in lists and dicts too. torch's tree_leaves gives the same; it took half the time of
    a step whose operations are recorded."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())


class TrackStorages(TorchDispatchMode):
    """Within the block, records every storage that an operation returned, without keeping any alive."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors(args)}
        if kwargs:
            given.update(t.untyped_storage()._cdata for t in _tensors(kwargs.values()))
        out = function(*args, **(kwargs or {}))
        for t in _tensors((out,)):
            if t.untyped_storage()._cdata not in given:
                ref = StorageWeakRef(t.untyped_storage())
                self._bytes.setdefault(ref.cdata, (ref, t.untyped_storage().nbytes()))
        return out

    def live_bytes(self) -> int:
        """Bytes of the recorded storages that something still holds; the others are forgotten.

        Any thread may ask while others record: `dict.copy` runs no Python code, so nothing is added half-way, which
        `list(dict.items())` does not promise (its tuples can start the garbage collector, and that another thread).
        """
        total = 0
        for key, (ref, size) in self._bytes.copy().items():
            if ref.expired():
                self._bytes.pop(key, None)
            else:
                total += size
        return total


class TrackPeak(TrackStorages):
    """The most bytes of them alive after any operation so far, and how many operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = super().__torch_dispatch__(function, types, args, kwargs)
        self.operations += 1
        self.most = max(self.most, self.live_bytes())
        return out

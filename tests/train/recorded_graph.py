"""A CUDA graph as a CPU can have one: every op of a capture with its tensors, done again at the same addresses.

Faithful in what can go wrong: a capture changes nothing that lies outside of it; a replay begins with NaN in all that
the capture allocated, and an allocation has NaN again; scalars, shapes and addresses are those of the capture; the host
may read nothing. Memory is not used twice within a replay, as a GPU's pool does: that is PyTorch's.

The project's ops are one entry each, whatever their specification does inside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fp8moe.kernels import backend, cross_entropy, permute
from fp8moe.kernels.row_map import most_rows
from fp8moe.layers import dispatch
from fp8moe.parallel.stream import tensors_of

READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero", "bincount"}
NAN_BYTE = 0xFF  # of every floating-point format here; -1 as an integer
Entry = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have room for every routing, and nothing is read because that costs a CPU nothing."""
    plan_rows = dispatch.plan_rows

    def with_room(ids_TK: Tensor, num_experts: int, *, room: int | None) -> Any:
        assert room is None
        return plan_rows(ids_TK, num_experts, room=most_rows(ids_TK.numel(), num_experts))

    monkeypatch.setattr(dispatch, "plan_rows", with_room)
    for module in (permute, cross_entropy):
        monkeypatch.setattr(module, "_read_for_free", lambda tensor: False)


def bytes_of(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


class RecordedGraph(TorchDispatchMode):
    """A `Graph`; `entries` are what was captured."""

    messages_have_threads = True  # whose ops are not the capture's

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self._own: dict[int, Tensor] = {}  # memory that the capture allocated, by address
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # memory outside of it and what that held
        self._in_op = False

    @contextmanager
    def capturing(self) -> Iterator[None]:
        run, mine, ended = backend._run, threading.get_ident(), list[bool]()

        def run_op(name: str, *args: Any, **kwargs: Any) -> Any:
            if ended or (self.messages_have_threads and threading.get_ident() != mine):
                return run(name, *args, **kwargs)
            self._in_op = True
            try:
                return self._do(lambda *a, **k: run(name, *a, **k), args, kwargs, returns_new=True)
            finally:
                self._in_op = False

        backend._calls.clear()
        try:
            with mock.patch.object(backend, "_run", run_op), self:
                yield
        finally:
            ended.append(True)
            backend._calls.clear()
        for memory, held in self._before.values():
            memory.copy_(held)
        self._before.clear()

    def replay(self) -> None:
        for memory in self._own.values():
            memory.fill_(NAN_BYTE)
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for call, args, kwargs, results in self.entries:
                made = call(*args, **kwargs)
                if not results:  # written in place
                    continue
                for there, here in zip(results, tensors_of(made), strict=True):
                    assert (there.shape, there.dtype) == (here.shape, here.dtype)
                    if there.data_ptr() != here.data_ptr():
                        there.copy_(here)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._in_op:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        assert name not in READS, f"the host reads by aten::{name} while a graph is captured"
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return func(*args, **kwargs)  # a view: the captured one stays
        if name.startswith(("empty", "new_empty")):
            made = func(*args, **kwargs)
            self._allocated(made)
            return made
        writes = any(r.alias_info is not None for r in func._schema.returns)
        return self._do(func, args, kwargs, returns_new=not writes)

    def _do(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, returns_new: bool) -> Any:
        for tensor in tensors_of([list(args), list(kwargs.values())]):
            address = tensor.untyped_storage().data_ptr()
            if address not in self._own and address not in self._before:
                memory = bytes_of(tensor)
                self._before[address] = memory, memory.clone()
        made = call(*args, **kwargs)
        results = list(tensors_of(made)) if returns_new else []
        for tensor in results:
            self._allocated(tensor)
        # Aliases: autograd, which looks whether what it saved was written to, must not hear of a replay.
        again_args, again_kwargs, again_results = tree_map_only(Tensor, lambda t: t.data, (args, kwargs, results))
        self.entries.append((call, again_args, again_kwargs, again_results))
        return made

    def _allocated(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address and address not in self._before:
            self._own.setdefault(address, bytes_of(tensor))

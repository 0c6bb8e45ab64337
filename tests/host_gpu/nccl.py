"""Collectives as NCCL runs them, by gloo.

Each group has a stream of its own, which begins behind what the caller's stream was given, and only `wait()` orders it
before what comes next. Pieces of an uneven gather or reduction may differ in size. A work holds its tensors until it
was waited for, as PyTorch's does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

WRITES_FIRST = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "irecv", "recv")
OTHERS = ("broadcast", "all_gather", "reduce_scatter", "isend", "send")

_streams: dict[Any, torch.Stream] = {}
_unfinished: set[_Work] = set()


class _Work:
    """What an asynchronous collective returns: `wait()` has the current stream wait, and lets go of the tensors."""

    def __init__(self, work: Any, done: torch.Event, tensors: Any) -> None:
        self._work, self._done, self._tensors = work, done, tensors
        _unfinished.add(self)

    def wait(self, *timeout: Any) -> Any:
        result = self._work.wait(*timeout)
        torch.accelerator.current_stream().wait_event(self._done)
        self._tensors = None
        _unfinished.discard(self)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _all_gather(pieces: list[Tensor], mine: Tensor, group: Any = None) -> None:
    for source, piece in enumerate(pieces):
        if source == dist.get_rank(group) and piece.data_ptr() != mine.data_ptr():
            piece.copy_(mine)
        dist.broadcast(piece, group=group, group_src=source)


def _reduce_scatter(mine: Tensor, pieces: list[Tensor], group: Any = None) -> None:
    for target, piece in enumerate(pieces):
        total = piece.clone()
        dist.all_reduce(total, group=group)
        if target == dist.get_rank(group):
            mine.copy_(total)


def _receives(function: Callable[..., Any], args: tuple[Any, ...], group: Any, options: dict[str, Any]) -> bool:
    """Whether this rank is given a broadcast's values: the root has them."""
    if function.__name__ != "broadcast":
        return False
    root = options.get("group_src")
    if root is None:
        source = args[1] if len(args) > 1 else options["src"]
        root = source if group is None else dist.get_group_rank(group, source)
    return bool(root != dist.get_rank(group))


def _filled(function: Callable[..., Any], flat: list[Tensor], group: Any) -> list[Tensor]:
    """What a collective writes: its first tensor, of a gather in place without the part that is this rank's own."""
    if function.__name__ != "all_gather_into_tensor":
        return flat[:1]
    parts = list(flat[0].view(-1).chunk(dist.get_world_size(group)))
    if parts[rank := dist.get_rank(group)].data_ptr() == flat[1].data_ptr():
        del parts[rank]
    return parts


def _on_its_stream(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, group: Any = None, **options: Any) -> Any:
        tensors = [one for one in (*args, *options.values()) if isinstance(one, Tensor | list)]
        flat = [one for one in tree_leaves(tensors) if isinstance(one, Tensor)]
        if not any(one.is_cuda for one in flat):
            return function(*args, group=group, **options)
        if group not in _streams:
            _streams[group] = torch.Stream(device="cuda")
        stream, caller = _streams[group], torch.accelerator.current_stream()
        stream.wait_event(caller.record_event())
        with stream:
            writes = function.__name__ in WRITES_FIRST or _receives(function, args, group, options)
            for one in _filled(function, flat, group) if writes else flat[:1]:
                torch.ops.host_gpu.access(one, writes, function.__name__)
            for one in flat[1:]:
                torch.ops.host_gpu.access(one, False, function.__name__)
            work = function(*args, group=group, **options)
            done = stream.record_event()
        if work is not None:
            return _Work(work, done, tensors)
        caller.wait_event(done)
        return None

    return call


def install() -> None:
    """Put these in place of `torch.distributed`'s, and gloo in place of NCCL."""
    start, new_group = dist.init_process_group, dist.new_group

    def init_process_group(backend: str, **options: Any) -> None:
        start(backend.replace("nccl", "gloo"), **options)

    def new_group_without_options(*args: Any, pg_options: Any = None, **options: Any) -> Any:
        return new_group(*args, **options)

    dist.init_process_group, dist.new_group = init_process_group, new_group_without_options
    dist.ProcessGroupNCCL = SimpleNamespace(Options=lambda: SimpleNamespace(config=SimpleNamespace()))
    dist.all_gather, dist.reduce_scatter = _all_gather, _reduce_scatter
    for name in (*WRITES_FIRST, *OTHERS):
        setattr(dist, name, _on_its_stream(getattr(dist, name)))

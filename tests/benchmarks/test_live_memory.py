"""Live bytes: what is still held, forgotten when it goes, also while another thread records."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.live_memory import TrackStorages


@contextmanager
def recording_in_every_collection(tracked: TrackStorages, kept: list[Tensor]) -> Iterator[None]:
    """The garbage collector runs at almost every allocation and records a tensor more each time, as a thread would."""

    def record(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            with tracked:
                kept.append(torch.zeros(4))

    before = gc.get_threshold()
    gc.callbacks.append(record)
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(record)


def test_bytes_are_those_still_held() -> None:
    with TrackStorages() as tracked:
        first = torch.ones(100)
        second = first + 1
    assert tracked.live_bytes() == first.nbytes + second.nbytes
    del first
    assert tracked.live_bytes() == second.nbytes


def test_tuples_lists_and_keywords_hold_tensors() -> None:
    """What an operation was given, by keyword too, is not what it made; nor is a view of it."""
    given, out = torch.arange(6.0), torch.empty(6)
    with TrackStorages() as tracked:
        most = torch.topk(given, 2)
        more = torch._foreach_add([given, given], 1.0)
        views = torch.split(given, 2)
        torch.add(given, 1.0, out=out)
    assert len(views) == 3
    assert tracked.live_bytes() == most.values.nbytes + most.indices.nbytes + sum(one.nbytes for one in more)


def test_another_thread_may_record_meanwhile() -> None:
    kept: list[Tensor] = []
    with TrackStorages() as tracked:
        first = [torch.zeros(4) for _ in range(50)]
    with recording_in_every_collection(tracked, kept):
        counted = tracked.live_bytes()
    assert len(first) * 16 <= counted <= (len(first) + len(kept)) * 16
    assert kept, "no collection happened, so nothing was recorded meanwhile"
    assert tracked.live_bytes() == (len(first) + len(kept)) * 16

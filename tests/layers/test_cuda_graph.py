"""Captures divided by calls outside: what runs when, in the capture and in a replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from fp8moe.layers.cuda_graph import Captured, capture, cuda_graphs, graphs_at_once, outside

log: list[str] = []


class Noted:
    """A graph that notes what happens to it; work, which a capture does not do, is a number of it."""

    count = 0

    def __init__(self) -> None:
        self.number = Noted.count = Noted.count + 1

    @contextmanager
    def capturing(self) -> Iterator[None]:
        log.append(f"begin {self.number}")
        try:
            yield
        finally:
            log.append(f"end {self.number}")

    def replay(self) -> None:
        log.append(f"replay {self.number}")


@pytest.fixture(autouse=True)
def fresh() -> None:
    log.clear()
    Noted.count = 0


def test_a_call_outside_meets_what_the_graph_before_it_computed() -> None:
    """So the graph before has been replayed, in the capture too, and the next begins behind the call."""

    def call() -> None:
        assert capture() is not None
        outside(lambda: log.append("call"))

    captured = Captured(call, Noted)
    assert log == ["begin 1", "end 1", "replay 1", "call", "begin 2", "end 2", "replay 2"]
    assert capture() is None
    log.clear()
    captured.replay()
    assert log == ["replay 1", "call", "replay 2"]


def test_what_fails_ends_the_capture() -> None:
    with pytest.raises(ZeroDivisionError):
        Captured(lambda: 1 / 0, Noted)
    assert log == ["begin 1", "end 1"]
    assert capture() is None


def test_a_call_outside_that_fails_ends_it_too() -> None:
    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        Captured(lambda: outside(fail), Noted)
    assert log == ["begin 1", "end 1", "replay 1"]
    assert capture() is None


def test_graphs_of_a_gpu_share_a_pool_and_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's own signatures; other threads may call CUDA meanwhile."""
    entered = mock.create_autospec(torch.cuda.graph)
    for name, fake in (
        ("CUDAGraph", mock.create_autospec(torch.cuda.CUDAGraph)),
        ("graph_pool_handle", lambda: "pool"),
        ("Stream", lambda: "stream"),
        ("graph", entered),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    make = cuda_graphs()
    for graph in (make(), make()):
        graph.capturing()
        graph.replay()
    assert [call.kwargs for call in entered.call_args_list] == [
        {"pool": "pool", "stream": "stream", "capture_error_mode": "thread_local"}
    ] * 2


def test_captures_at_once_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither PyTorch's context, which waits for the device, nor anything that does; what fails ends the capture."""
    made = mock.create_autospec(torch.cuda.CUDAGraph)
    streams: list[str] = []

    @contextmanager
    def on(stream: str) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.append("left")

    refused = mock.Mock(side_effect=AssertionError)
    for name, fake in (
        ("CUDAGraph", made),
        ("graph_pool_handle", lambda: "pool"),
        ("Stream", lambda: "stream"),
        ("stream", on),
        *((name, refused) for name in ("graph", "synchronize", "empty_cache")),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    graph = graphs_at_once()()
    with graph.capturing():
        assert streams == ["stream"] and made.return_value.method_calls == [
            mock.call.capture_begin(pool="pool", capture_error_mode="thread_local")
        ]
    assert streams == ["stream", "left"] and made.return_value.method_calls[1:] == [mock.call.capture_end()]
    with pytest.raises(ZeroDivisionError), graph.capturing():
        _ = 1 / 0
    assert made.return_value.method_calls[-1] == mock.call.capture_end()

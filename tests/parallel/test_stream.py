"""The communication thread: starts at once, keeps the order, owns buffers, counts waits, hands exceptions on."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.parallel.device_stream import communication_stream
from fp8moe.parallel.stream import HostStream, Pending, leaving_sms, tensors_of
from fp8moe.profile import spans
from fp8moe.profile.spans import COMMUNICATION, COMPUTE, Recorder, exposed_seconds, listening
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")


def test_messages_run_in_order_beside_the_caller_and_only_waits_are_exposed() -> None:
    stream, gate, order = HostStream(), threading.Event(), []

    def first() -> int:
        gate.wait(10)
        order.append(1)
        return 1

    def second() -> int:
        order.append(2)
        return 2

    exposed_seconds()
    a, b = stream.start(first, lambda x: x + 10), stream.start(second, lambda x: x + 20)
    time.sleep(0.05)
    assert order == []  # the caller went on, and so far neither has run
    assert exposed_seconds() == 0.0
    threading.Timer(0.2, gate.set).start()
    assert b.wait() == 22
    assert 0.1 < exposed_seconds() < 5
    assert (a.wait(), a.wait()) == (11, 11)
    assert order == [1, 2]


def test_a_handle_owns_its_buffers_until_it_is_waited_for() -> None:
    stream, tensor = HostStream(), torch.ones(3)
    alive = weakref.ref(tensor)
    handle = stream.start(lambda t=tensor: t + 1, lambda y: y)
    del tensor
    time.sleep(0.05)  # the message has run by now, and its buffers stay until somebody waits
    gc.collect()
    assert alive() is not None
    assert handle.wait().tolist() == [2, 2, 2]
    gc.collect()
    assert alive() is None


def test_sms_are_left_from_a_messages_start_to_its_wait() -> None:
    stream, free = HostStream(), lambda: backend.allowed_sms(132)
    unlimited = stream.start(lambda: 1, lambda x: x)
    with leaving_sms(100):
        assert free() == 132
        first = stream.start(lambda: 1, lambda x: x + free())
        small = stream.start(lambda: 1, lambda x: x, takes_sms=False)
        second = stream.start(lambda: 1, lambda x: x)
        assert free() == 100
        assert (small.wait(), unlimited.wait(), second.wait(), free()) == (1, 1, 1, 100)
        assert first.wait() == 1 + 132, "what a message brought is finished on all SMs"
        assert (first.wait(), free()) == (1 + 132, 132)
        stream.start(lambda: 1, lambda x: x)
        assert free() == 100
    assert free() == 132, "whatever was not waited for"
    with leaving_sms(None):
        late = stream.start(lambda: 1, lambda x: x)
        assert free() == 132
    assert late.wait() == 1
    with pytest.raises(ZeroDivisionError), leaving_sms(90):
        broken = stream.start(lambda: 1 // 0, lambda x: x)
        assert free() == 90
        try:
            broken.wait()
        finally:
            assert free() == 132
    assert free() == 132


def test_a_stream_that_waits_for_a_message_is_timed_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the order of what a wait enqueues decides what is measured: an event, the wait, an event."""
    log: list[str] = []
    event = type("Event", (), {"record": lambda self: log.append("event")})
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event())
    current = SimpleNamespace(wait_event=lambda done: log.append(f"wait {done}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append("record"))
    monkeypatch.setattr(spans, "_clock", [spans.DeviceClock()])
    pending: Pending[Any, Any] = Pending(lambda: None, lambda value: log.append("finish"), "one")
    pending.future.set_result((torch.ones(1), "done"))
    pending.wait()
    spans.exposed()
    assert log == ["event", "wait done", "event", "record", "finish"]


def test_an_exception_reaches_its_waiter_and_ends_the_stream() -> None:
    stream, ran = HostStream(), []

    def fail() -> None:
        raise RuntimeError("the link is down")

    handles = [stream.start(fail, lambda _: None), stream.start(lambda: ran.append(1), lambda _: None)]
    for handle in handles:
        with pytest.raises(RuntimeError, match="the link is down"):
            handle.wait()
    assert ran == []


def test_messages_record_no_graph() -> None:
    x = torch.ones(2, requires_grad=True)
    assert not HostStream().start(lambda: x * 2, lambda y: y).wait().requires_grad


def test_a_later_message_reads_what_an_earlier_one_delivered() -> None:
    stream = HostStream()
    counts = stream.start(lambda: [2, 3], sum, "counts")
    rows = stream.start(lambda: [n + 1 for n in counts.arrived()], lambda got: got, "rows")
    assert (rows.wait(), counts.wait()) == ([3, 4], 5)


def test_messages_and_their_waits_are_spans() -> None:
    kept = Recorder()
    with listening(kept):
        message = HostStream().start(lambda: 1, lambda x: x, "rows")
        assert (message.wait(), message.wait()) == (1, 1)
    assert sorted((span.name, span.thread) for span in kept.spans) == [
        ("message rows", COMMUNICATION), ("wait rows", COMPUTE),
    ]  # fmt: skip


def test_the_tensors_of_a_value_are_those_in_its_items_and_fields() -> None:
    @dataclass
    class Pair:
        rows: torch.Tensor
        rest: list[Any]

    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    found = list(tensors_of((a, 7, Pair(b, [c, "text", None]))))
    assert [id(tensor) for tensor in found] == [id(a), id(b), id(c)]


def use_the_stream() -> int:
    return communication_stream(CPU).start(lambda: 5, lambda x: x).wait()


def test_a_forked_process_has_a_stream_of_its_own() -> None:
    assert use_the_stream() == 5
    assert run_ranks(use_the_stream, 1, timeout=20) == [5]

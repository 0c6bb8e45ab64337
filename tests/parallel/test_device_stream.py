"""A GPU's stream of messages, on streams and events that only write down what is asked of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.parallel.device_stream import DeviceStream
from fp8moe.parallel.stream import leaving_sms
from fp8moe.profile.spans import COMMUNICATION, COMPUTE, REPLICAS, Recorder, listening

CUDA = torch.device("cuda", 0)


class Fake:
    """A CUDA stream."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        return f"{self.name} at {len(self.log)}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams were asked for; messages of the tests add themselves."""
    log: list[str] = []
    current = [Fake("compute", log)]

    @contextmanager
    def on(stream: Fake) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def made(device: torch.device, priority: int = 0) -> Fake:
        return Fake(f"priority {priority}", log)

    monkeypatch.setattr(torch.cuda, "Stream", made)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    return log


def test_whoever_starts_a_message_launches_it_behind_what_came_before(log: list[str]) -> None:
    stream, here = DeviceStream(CUDA), threading.get_ident()

    def message() -> int:
        assert threading.get_ident() == here and not torch.is_grad_enabled()
        log.append(f"launched on {torch.cuda.current_stream().name}")
        return 1

    log.append("compute")
    pending = stream.start(message, lambda x: x + 1)
    assert log == ["compute", "priority -1 waits for compute at 1", "launched on priority -1"]
    assert (pending.wait(), pending.wait(), torch.cuda.current_stream().name) == (2, 2, "compute")
    assert log[3:] == ["compute waits for priority -1 at 3"]
    assert DeviceStream(CUDA, REPLICAS)._cuda.name == "priority 0", "nobody waits for those"


def test_what_the_host_does_not_know_yet_holds_back_its_message_and_those_behind(log: list[str]) -> None:
    stream, here = DeviceStream(CUDA), set[str]()

    def start(name: str, ready: bool = True) -> Any:
        return stream.start(lambda: order.append(name), lambda _: name, ready=None if ready else lambda: name in here)

    order: list[str] = []
    start("a")
    waiting, behind = start("b", ready=False), start("c")
    last = start("d", ready=False)
    assert order == ["a"]
    here.add("b")
    assert order == ["a"], "nobody has looked"
    start("e")
    assert order == ["a", "b", "c"], "d is not there"
    assert last.wait() == "d" and order == ["a", "b", "c", "d", "e"], "who needs it waits"
    late = start("f", ready=False)
    assert behind.wait() == "c" and order[-1] == "e", "an old one launches nothing that is not ready"
    assert (waiting.wait(), late.wait(), order[-1]) == ("b", "f", "f")


def test_what_a_message_raises_is_raised_by_its_wait_and_by_all_later_ones(log: list[str]) -> None:
    stream = DeviceStream(CUDA)
    bad = stream.start(lambda: 1 // 0, lambda x: x)
    needs = stream.start(lambda: 1, lambda x: x, ready=lambda: bad.has(lambda value: value > 5))
    for pending in (bad, needs, stream.start(lambda: 1, lambda x: x)):
        with pytest.raises(ZeroDivisionError):
            pending.wait()
    stopped = DeviceStream(CUDA)
    with pytest.raises(KeyboardInterrupt):
        stopped.start(_interrupted, lambda x: x)
    with pytest.raises(KeyboardInterrupt):
        stopped.start(lambda: 1, lambda x: x)


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_a_later_message_asks_what_an_earlier_one_delivered(log: list[str]) -> None:
    stream, there = DeviceStream(CUDA), [False]
    counts = stream.start(lambda: there, lambda x: x, takes_sms=False)
    rows = stream.start(lambda: counts.arrived()[0], lambda x: x, ready=lambda: counts.has(lambda value: value[0]))
    assert not rows.future.done()
    there[0] = True
    assert rows.wait() is True


def test_a_message_that_is_held_back_counts_as_in_flight(log: list[str]) -> None:
    stream = DeviceStream(CUDA)
    with leaving_sms(100):
        held = stream.start(lambda: 1, lambda x: x, ready=lambda: False)
        assert backend.allowed_sms(132) == 100
        assert held.wait() == 1 and backend.allowed_sms(132) == 132


def test_its_spans_are_those_of_the_communication_thread(log: list[str]) -> None:
    kept = Recorder()
    with listening(kept):
        DeviceStream(CUDA, REPLICAS).start(lambda: 1, lambda x: x, "weights").wait()
        DeviceStream(CUDA).start(lambda: 1, lambda x: x, "rows").wait()
    assert [(span.name, span.thread) for span in kept.spans] == [
        ("message weights", REPLICAS), ("wait weights", COMPUTE), ("message rows", COMMUNICATION),
        ("wait rows", COMPUTE),
    ]  # fmt: skip

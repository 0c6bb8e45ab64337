"""Spans: which listeners are told of them and when, how waits are counted, what the recorder and profilers get."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8moe.parallel.stream import HostStream
from fp8moe.profile import spans
from fp8moe.profile.spans import (
    COMMUNICATION,
    COMPUTE,
    EXPOSED,
    PhaseLaps,
    Recorder,
    Span,
    Stopwatch,
    exposed_seconds,
    listening,
    marking,
    span,
    waiting,
)

CPU = torch.device("cpu")


class Listener:
    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def began(self, name: str) -> str:
        self.log.append((self.name, "began", name))
        return f"{self.name} of {name}"

    def ended(self, name: str, began: str) -> None:
        self.log.append((self.name, "ended", name, began))


def test_listeners_are_told_in_order_and_of_the_end_in_reverse() -> None:
    log: list[Any] = []
    with listening(Listener("a", log)), listening(Listener("b", log)), span("F attn"):
        log.append("inside")
    with span("unheard"):
        pass
    assert log == [
        ("a", "began", "F attn"), ("b", "began", "F attn"), "inside",
        ("b", "ended", "F attn", "b of F attn"), ("a", "ended", "F attn", "a of F attn"),
    ]  # fmt: skip


def test_a_span_that_fails_ends_and_a_block_that_fails_stops_listening() -> None:
    log: list[Any] = []
    with pytest.raises(KeyError), listening(Listener("a", log)), span("F attn"):
        raise KeyError
    with span("unheard"):
        pass
    assert [entry[1] for entry in log] == ["began", "ended"]


def test_waits_add_up_until_they_are_read() -> None:
    Stopwatch(CPU)
    exposed_seconds()
    with waiting():
        time.sleep(0.02)
    with pytest.raises(KeyError), waiting():
        time.sleep(0.02)
        raise KeyError
    assert 0.04 <= exposed_seconds() < 5
    assert exposed_seconds() == 0.0


def test_messages_and_waits_have_their_threads_and_times() -> None:
    kept = Recorder()
    with listening(kept), span("F0.0"):
        with span("F dispatch"):
            message = HostStream().start(lambda: time.sleep(0.2), lambda _: 1, "dispatch")
        with span("F mlp"):
            message.wait()
    with span("nobody listens"):
        pass
    spans = {one.name: one for one in kept.spans}
    names = ["F dispatch", "message dispatch", "wait dispatch", "F mlp", "F0.0"]
    assert sorted(spans) == sorted(names) and len(kept.spans) == 5
    assert {name: spans[name].thread for name in names} == dict.fromkeys(names, COMPUTE) | {
        "message dispatch": COMMUNICATION
    }
    assert 0.1 < spans["wait dispatch"].seconds <= spans["message dispatch"].seconds + 0.1
    assert spans["F mlp"].contains(spans["wait dispatch"]) and spans["F0.0"].contains(spans["F mlp"])
    assert not spans["F0.0"].contains(spans["message dispatch"])  # another thread's


def test_torchs_profiler_sees_the_spans(tmp_path: Path) -> None:
    with marking(CPU), span("unseen"):  # nobody profiles
        pass
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu]) as profiler, marking(CPU), span("F attn"):
        torch.ones(3).sum()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e.get("cat") == "user_annotation"] == ["F attn"]


def test_profilers_of_a_gpu_get_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("end"))
    with marking(torch.device("cuda")), span("F0.0"), span("F attn"):
        pass
    assert told == ["F0.0", "F attn", "end", "end"]


def test_a_span_is_small_enough_to_be_sent() -> None:
    import pickle

    one = Span("F attn", COMPUTE, 1.0, 2.0)
    assert pickle.loads(pickle.dumps(one)) == one


class Clock:
    """perf_counter that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_a_stopwatch_adds_laps_by_name_without_what_was_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(spans, "time", clock)

    def wait(seconds: float) -> None:
        with waiting():
            clock.now += seconds

    Stopwatch(CPU)
    wait(9.0)
    stopwatch = Stopwatch(CPU)  # what was waited before it does not count
    clock.now += 1.0
    wait(0.5)
    clock.now += 1.0
    wait(0.5)
    stopwatch.lap("forward")
    clock.now += 2.0
    stopwatch.lap("data")
    wait(4.0)
    stopwatch.lap("forward")
    seconds = stopwatch.read()
    assert (seconds["forward"], seconds["data"], seconds["backward"], seconds[EXPOSED]) == (2.0, 2.0, 0.0, 5.0)


class Device:
    """Stands in for a GPU's stream, whose time goes on when it works and not when the host does."""

    def __init__(self) -> None:
        self.now, self.synchronized = 7.0, 0

    def event(self, *, enable_timing: bool) -> DeviceEvent:
        assert enable_timing
        return DeviceEvent(self)


class DeviceEvent:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, float("nan")

    def record(self) -> None:
        self.at = self.device.now

    def synchronize(self) -> None:
        self.device.synchronized += 1

    def elapsed_time(self, end: DeviceEvent) -> float:
        assert self.device.synchronized, "read before the device is known to have got there"
        return (end.at - self.at) * 1e3


def test_a_gpus_stopwatch_reads_waits_off_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host returns from a wait at once, its stream waits; while the host is busy elsewhere, the stream is not."""
    device, host = Device(), Clock()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(spans, "time", host)
    stopwatch = Stopwatch(torch.device("cuda"))
    device.now += 1.0
    host.now += 100.0
    with waiting():
        device.now += 3.0
    device.now += 0.5
    stopwatch.lap("forward")
    with waiting():
        host.now += 50.0
    stopwatch.lap("backward")
    assert device.synchronized == 0, "a lap waits for nothing"
    seconds = stopwatch.read()
    assert (seconds["forward"], seconds["backward"], seconds[EXPOSED]) == (1.5, 0.0, 3.0)
    with waiting():
        device.now += 2.0
    assert exposed_seconds() == 2.0
    Stopwatch(CPU)
    with waiting():
        host.now += 4.0
    assert exposed_seconds() == 4.0


def test_phases_are_forward_or_backward_and_nothing_else_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(spans, "time", clock)
    stopwatch = Stopwatch(CPU)
    with listening(PhaseLaps(stopwatch)):
        for name, seconds in (("F attn", 1.0), ("B mlp", 2.0), ("F0.1", 0.5), ("W mlp", 4.0), ("wait dispatch", 0.25)):
            with span(name):
                clock.now += seconds
    assert dict(stopwatch.read()) == {"forward": 1.0, "backward": 2.0 + 0.5 + 4.0, EXPOSED: 0.0}


def test_a_span_contains_what_lies_within_on_its_thread() -> None:
    outer = Span("F0.0", COMPUTE, 1.0, 2.0)
    assert outer.seconds == 1.0 and outer.contains(outer)
    assert not outer.contains(Span("F attn", COMPUTE, 0.5, 1.5)) and not outer.contains(Span("F", COMPUTE, 1.5, 2.5))
    assert not outer.contains(Span("message", COMMUNICATION, 1.25, 1.5))

"""What listeners of spans keep and hand on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from fp8moe.parallel.stream import Stream
from fp8moe.profile.recorder import COMMUNICATION, COMPUTE, Recorder, Span, marking
from fp8moe.profile.spans import listening, span

CPU = torch.device("cpu")


def test_messages_and_waits_have_their_threads_and_times() -> None:
    kept = Recorder()
    with listening(kept), span("F0.0"):
        with span("F dispatch"):
            message = Stream(CPU).start(lambda: time.sleep(0.2), lambda _: 1, "dispatch")
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

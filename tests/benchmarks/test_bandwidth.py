"""Bandwidths: bytes a second, ratios of paired trials, names and bytes of operands."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import bandwidth
from benchmarks.bandwidth import COPY, add_bandwidths, size_of
from benchmarks.harness import Report
from fp8moe.kernels.quantize import quantize_rows


def test_a_ratio_is_the_median_over_the_copy_of_the_same_trial(monkeypatch):
    seconds = {COPY: [1.0, 2.0, 4.0], "ours": [2.0, 2.0, 2.0], "torch": [1.0, 1.0, 1.0], "plan": [3e-6, 5e-6, 4e-6]}
    monkeypatch.setattr(bandwidth, "alternate", lambda calls, *_, **__: {name: seconds[name] for name in calls})
    entries = {COPY: (print, 4 * 10**9), "ours": (print, 2 * 10**9), "torch": (print, 10**9), "plan": (print, 0)}
    device = torch.device("cpu")
    report = Report(device)
    add_bandwidths(report, entries, "T1", SimpleNamespace(device=device, repeats=3, warmup=0), "reference", ("torch",))
    found = [(r.name, r.metric, r.value, r.baseline, r.ratio) for r in report.records]
    assert found == [
        (COPY, "bandwidth", 2.0, None, None),
        ("reference ours", "bandwidth", 1.0, COPY, 0.5),  # 1/4, 1/2, 1 a trial
        ("torch", "bandwidth", 1.0, COPY, 0.5),
        ("reference plan", "time", pytest.approx(4.0), None, None),
    ]


def test_bytes_are_of_codes_and_scales_and_of_every_tensor_of_a_tuple():
    x = torch.randn(128, 256, dtype=torch.bfloat16)
    rows = quantize_rows(x)
    assert size_of(x) == 128 * 256 * 2 and size_of(rows) == 128 * 256 + 2 * 128 * 4
    assert size_of((x, None, rows)) == size_of(x) + size_of(rows)

"""What the benchmark of optimizer shardings reports of trials whose times are known."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import bench_zero
from benchmarks.harness import Report


def figures(done: dict[str, list[bench_zero.Trial]]) -> dict[tuple[str, str], tuple[float, float | None]]:
    report = Report(torch.device("cpu"))
    bench_zero.report_trials(report, done, "")
    return {(record.name, record.metric): (record.value, record.ratio) for record in report.records}


def test_times_are_medians_and_ratios_are_paired() -> None:
    ours = [bench_zero.Trial(0.001, 0.003), bench_zero.Trial(0.002, 0.006), bench_zero.Trial(0.009, 0.009)]
    theirs = [bench_zero.Trial(0.002, 0.006), bench_zero.Trial(0.004, 0.003), bench_zero.Trial(0.004, 0.003)]
    found = figures({"none": ours, "deepspeed": theirs})
    assert found["none", "reduce"] == (pytest.approx(2.0), pytest.approx(0.5))
    assert found["none", "update"] == (pytest.approx(6.0), pytest.approx(2.0))
    assert found["none", "both"] == (pytest.approx(8.0), pytest.approx(8 / 7))
    assert found["deepspeed", "both"] == (pytest.approx(7.0), None)
    assert figures({"none": ours})["none", "both"] == (pytest.approx(8.0), None)


def test_who_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench_zero.shardings() == ("none", "zero1")
    assert "deepspeed is not installed and left out" in capsys.readouterr().out

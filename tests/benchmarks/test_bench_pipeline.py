"""What the pipeline benchmark reports of trials whose figures are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_pipeline
from benchmarks.harness import Report
from benchmarks.pipeline_trials import Trial
from fp8moe.profile.figures import RankFigures


def trial(seconds: float, communication: float, exposed: float, bubble: float = 0.0) -> Trial:
    rank = RankFigures(seconds - 1, seconds - 1 - exposed - bubble, communication, exposed, bubble, {})
    return Trial(seconds, (rank, rank), (seconds - 2, 0.5))


def figures(report: Report) -> dict[tuple[str, str], tuple[float, float | None]]:
    return {(record.name, record.metric): (record.value, record.ratio) for record in report.records}


def test_overlap_on_against_off() -> None:
    report = Report(torch.device("cpu"))
    off, on = [trial(10.0, 4.5, 4.0), trial(20.0, 9.0, 8.0)], [trial(7.0, 5.0, 1.0), trial(14.0, 10.0, 2.0)]
    bench_pipeline.report_overlap(report, {"waited at once": off, "overlapped": on}, "")
    found = figures(report)
    assert found["overlapped", "step"] == (pytest.approx(10500.0), pytest.approx(0.7))
    assert found["floor, max(compute, communication) / all", "share of waited at once"][0] == pytest.approx(0.6)
    assert found["waited at once", "communication in the step"][0] == pytest.approx(0.4)
    assert found["overlapped", "communication hidden"][0] == pytest.approx(0.8)
    assert found["overlapped", "waits less than waited at once"][0] == pytest.approx(0.75)


def test_schedules_beside_the_simulator() -> None:
    report = Report(torch.device("cpu"))
    done = {"1f1b": [trial(10.0, 4.0, 4.0, 1.0)], "zb1p": [trial(9.0, 0.0, 0.0, 2.0)]}
    bench_pipeline.report_schedules(report, done, "")
    found = figures(report)
    assert found["zb1p", "step"] == (9000.0, pytest.approx(0.9)) and found["1f1b", "step"][1] is None
    assert found["1f1b, measured", "forwards and backwards"] == (9000.0, pytest.approx(9 / 8))
    assert (found["zb1p, measured", "bubble"][0], found["zb1p, simulated", "bubble"][0]) == (2000.0, 500.0)
    assert (found["1f1b", "communication hidden"][0], found["zb1p", "communication hidden"][0]) == (0.0, 1.0)


def test_neighbours_are_on_different_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = []
    for node in range(2):
        for local in range(2):
            for name, value in (("GROUP_WORLD_SIZE", 2), ("GROUP_RANK", node), ("LOCAL_RANK", local)):
                monkeypatch.setenv(name, str(value))
            monkeypatch.setenv("RANK", str(2 * node + local))
            bench_pipeline.across_nodes()
            ranks.append(int(bench_pipeline.os.environ["RANK"]))
    assert ranks == [0, 2, 1, 3]

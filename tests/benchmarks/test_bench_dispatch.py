"""The dispatch benchmark: its formulas are what is sent, its records name every verb and hop, its picture's lines."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.bench_dispatch import Trials, report_verbs, simulate, verb_trials
from benchmarks.dispatch_layer import KINDS, VERBS, Layer, ranks_of
from benchmarks.dispatch_plot import plot_beside, shares, times
from benchmarks.dispatch_traffic import Setting, Traffic, distinct, expected
from benchmarks.harness import Report
from tests.parallel.ranks import run_ranks

SETTING = Setting(tokens=16, hidden=256, ranks=4, per_node=2, experts=16, topk=3, chunks=2)


def measured() -> tuple[dict[str, tuple[Traffic, Traffic]], Trials]:
    layer = Layer(SETTING, ranks_of(SETTING))
    traffic = {}
    for kind in ("naive", *KINDS):
        layer.counted()
        layer.forward(kind)
        traffic[kind] = (layer.counted(), expected(kind, SETTING, layer.all_ids))
    return traffic, verb_trials(layer, repeats=2)


def test_formulas_are_what_is_sent_and_every_verb_is_recorded() -> None:
    traffic, trials = run_ranks(measured, SETTING.ranks)[0]
    for kind, (counted, told) in traffic.items():
        assert counted == told and counted.across > 0 and counted.inside > 0, kind
    report = Report(torch.device("cpu"))
    report_verbs(report, SETTING, trials)
    found = {(r.name, r.metric, r.unit, r.baseline) for r in report.records}
    for kind in trials:
        for verb in VERBS:
            assert (f"{kind}: {verb}", "time", "ms", None if kind == "naive" else f"naive: {verb}") in found
            for hop in ("across nodes", "inside the node"):
                assert (f"{kind}: {verb}, {hop}", "bandwidth", "GB/s", None) in found
    assert sorted(times(report.records, 256)) == sorted(trials)
    naive = sum(r.value for r in report.records if r.metric == "time" and r.name.startswith("naive"))
    assert times(report.records, 256)["naive"] == [(16, pytest.approx(naive))]


def test_distinct_pairs_by_hand() -> None:
    ids = torch.tensor([[0, 1, 5], [4, 5, 6], [7, 0, 2]])  # peers of two experts: 0 0 2, 2 2 3, 3 0 1
    assert [distinct(ids, 2, own) for own in range(4)] == [5, 6, 5, 5]


def test_the_simulation_covers_its_worlds_and_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(torch.device("cpu"))
    simulate(report, quick=True)
    lines = shares(report.records)
    assert {kind: [x for x, _ in points] for kind, points in lines.items()} == {kind: [2, 8, 64] for kind in KINDS}
    assert all(0 < two <= one < 1 for (_, one), (_, two) in zip(lines["one hop"], lines["two hops"], strict=True))
    plot_beside(report)  # nobody asked for a file
    assert capsys.readouterr().out == ""
    report.json_path = tmp_path / "dispatch.json"
    plot_beside(report)
    assert "plot in" in capsys.readouterr().out
    drawn = ElementTree.parse(tmp_path / "dispatch.svg").getroot()
    tags = [element.tag.rpartition("}")[2] for element in drawn.iter()]
    assert tags.count("polyline") == len(KINDS) and tags.count("circle") == 3 * len(KINDS)
    heights = {float(element.get("cy", "nan")) for element in drawn.iter() if element.tag.endswith("circle")}
    assert min(heights) == pytest.approx(40.0) and max(heights) < 300.0, "the largest value reaches the top"

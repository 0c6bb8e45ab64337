"""The benchmark of gradients beside the backward: its bytes are the formula's, its shares those of the steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.bench_gradients import ALL_REDUCE, BEHIND, BESIDE, Step, report_bytes, report_trials, trials
from benchmarks.harness import Report
from tests.parallel.ranks import run_ranks
from tests.train.runs import SMALL, write_corpus


def test_every_kind_of_step_runs_and_sends_what_the_formula_says(tmp_path: Path) -> None:
    words = [
        *SMALL,
        *write_corpus(tmp_path),
        "precision=bf16",
        "parallel.ep=1",
        "optimizer.sharding=zero1",
        "run_dir=null",
    ]
    for steps, apart, least, formula in run_ranks(trials, 2, words, 1):
        assert list(steps) == [ALL_REDUCE, BESIDE, BEHIND] and len(apart) == 1 and 0 < least < 1
        assert [step.counted for kind in (BESIDE, BEHIND) for step in steps[kind]] == [formula, formula]
        assert all(step.passes > step.backward > 0 and step.waited > 0 for kind in steps for step in steps[kind])


def test_shares_of_given_steps() -> None:
    def step(waited: float) -> Step:
        return Step(passes=4.0, backward=1.0, waited=waited, counted=100, interface=110)

    report = Report(torch.device("cpu"))
    steps = {ALL_REDUCE: [step(2.0)], BESIDE: [step(0.2)], BEHIND: [step(1.0)]}
    report_trials(report, "two ranks", steps, [0.8], 0.1)
    report_bytes(report, "two ranks", steps, 100)
    found = {record.name: record for record in report.records}
    assert found["reduction hidden"].value == pytest.approx(0.75)
    assert found["at most hidden: all but the last pass's bytes"].value == pytest.approx(0.9)
    assert found["reduction alone / a micro-batch's backward"].value == pytest.approx(0.8)
    assert found[BESIDE].ratio == pytest.approx(4.2 / 6.0) and found[BESIDE].value == pytest.approx(4200)
    with pytest.raises(AssertionError):
        report_bytes(report, "two ranks", steps, 99)

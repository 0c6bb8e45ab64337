"""What is drawn of a run, marks, settings and words, on records that are made here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp8moe.report.curves import logarithmic, loss, marks
from fp8moe.report.html import duration, si, table
from fp8moe.report.page import page
from fp8moe.report.parts import layer_name, step_time
from fp8moe.report.run_files import RunFiles
from fp8moe.report.series import MOST, draw, smoothed
from fp8moe.report.settings import changed, differences, flat
from fp8moe.report.tables import results, state


def run_of(number: int, name: str = "run", **more: Any) -> RunFiles:
    """A run of so many steps of 10 tokens."""
    steps = [{"step": step, "loss": 5.0, "tokens": 10, "seconds": 0.5} for step in range(1, number + 1)]
    return RunFiles(Path("runs") / name, {}, steps, [], [], [], [], None, None, {}, **more)


def test_a_long_run_is_thinned_and_says_so() -> None:
    run = run_of(2 * MOST + 2)
    run.metrics[101] |= {"skipped": True, "loss": None}
    run.metrics[103] |= {"val_loss": 4.0}
    (drawn,) = draw([run])
    assert drawn.every == 3 and len(drawn.steps) < MOST + 3
    steps = [record["step"] for record in drawn.steps]
    assert steps[:2] == [1, 4] and {102, 104, len(run.metrics)} <= set(steps)
    assert drawn.tokens == [10 * step for step in steps]
    x, y, at = drawn.series("val_loss")
    assert (x, y, at) == ([1040], [4.0], [104])
    assert "Of 8,002 steps one in 3 is drawn" in page([drawn])
    assert draw([run_of(MOST)])[0].every == 1


def test_runs_of_one_name_are_numbered() -> None:
    assert [run.label for run in draw([run_of(1), run_of(1, "other"), run_of(1)])] == ["run (1)", "other", "run (2)"]


def test_a_smoothed_line_starts_without_a_bias_and_follows() -> None:
    assert smoothed([4.0] * 50) == pytest.approx([4.0] * 50)
    line = smoothed([0.0] * 60 + [1.0] * 60)
    assert line[59] == 0.0 and line[60] == pytest.approx(1 / 3, rel=0.01) and 0.99 < line[-1] < 1.0


def test_marks_are_at_the_tokens_of_their_step() -> None:
    events = [
        *({"kind": "start", "step": 0}, {"kind": "rollback", "step": 3}, {"kind": "failure", "step": 99}),
        *({"kind": "start", "step": 2}, {"kind": "checkpoint", "step": 2}),
    ]
    (drawn,) = draw([replace(run_of(5), events=events)])
    assert [(mark["x0"], mark["x1"]) for mark in marks(drawn)] == [(20, 20), (30, 30), (50, 50)]
    assert "dotted lines" in loss([drawn]).note


def test_the_axis_of_times_leaves_out_what_would_flatten_it() -> None:
    run = run_of(100)
    for record in run.metrics:
        record["time"] = {"forward": 1.0 if record["step"] > 1 else 60.0, "backward": 2.0}
    figure = step_time(draw([run]))
    assert figure is not None and figure.layout["yaxis"]["range"] == [0, pytest.approx(3.45)]
    assert figure.note == "on rank 0; the axis leaves out the slowest steps, up to 62 s"
    assert figure.data[0]["y"][0] == 60.0  # it is there, for whoever zooms out


def test_settings_are_flat_and_compared() -> None:
    config = {"a": {"b": 1, "c": [1, 2]}, "phases": [{"shape": "cosine"}], "run_dir": "x", "d": None, "e": {}}
    assert flat(config) == {"a.b": 1, "a.c": [1, 2], "phases.0.shape": "cosine", "run_dir": "x", "d": None, "e": {}}
    usual = {"a": {"b": 2, "c": [1, 2]}, "run_dir": None}
    assert changed(config, usual) == [("a.b", 1, 2), ("phases.0.shape", "cosine", None), ("e", {}, None)]
    other = replace(run_of(1), config=config | {"a": {"b": 1, "c": [1]}, "f": 1, "run_dir": "y"})
    assert differences([replace(run_of(1), config=config), other]) == [("a.c", [1, 2], [1]), ("f", None, 1)]


def test_results_and_state_of_a_run() -> None:
    run = run_of(20)
    run.metrics[19] |= {"loss": 4.0, "val_bits_per_byte": 2.5, "mfu": 0.3, "max_violation": 0.25, "memory_bytes": 5e9}
    found = results(replace(run, ranks=[{"memory_bytes": [6e9, 7e9]}]))
    assert found == {
        **{"training loss": "4.9000", "bits per byte": "2.5000", "tokens a second": "20", "MFU": "30.0%"},
        **{"MaxVio": "0.250", "peak memory": "7 GB", "skipped steps": "0"},
    }
    trace = {"hidden": 0.5, "bubble": 1.0, "seconds": 4.0}
    found = results(replace(run, events=[{"kind": "trace", "figures": trace}]))
    assert (found["communication hidden"], found["bubble"], found["peak memory"]) == ("50.0%", "25.0%", "5 GB")
    whole = replace(run, config={"steps": 40, "precision": {"mode": "fp8"}}, origin={"world_size": 8, "device": "H100"})
    assert state(whole) == "20 of 40 steps · 200 tokens · FP8 · 8 x H100 · 10 s in steps"
    assert "failed" in state(replace(whole, events=[{"kind": "start"}, {"kind": "failure", "time": 0.0}]))


def test_words_and_numbers() -> None:
    assert [duration(seconds) for seconds in (0.1234, 45, 200, 18420, 273600)] == [
        *("0.123 s", "45 s", "3 min 20 s", "5 h 07 min", "3 d 4 h"),
    ]
    assert [si(9999), si(12345), si(14.8e12, "tokens"), si(2e9, "tokens"), si(2e9)] == [
        *("9,999", "12.3k", "14.8T tokens", "2B tokens", "2G"),
    ]
    assert [layer_name(name) for name in ("blocks.3.moe.router", "mtp.block.moe.router", "x")] == [
        *("block 3", "MTP block", "x"),
    ]
    assert "<td>&lt;b&gt;</td>" in table([("a", "<b>")]) and "<td>null</td>" in table([("a", None)])
    assert logarithmic([0.5, 5.0])["ticktext"] == ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50"]
    assert all(math.log10(value) % 1 == 0 for value in logarithmic([1e-3, 1e3])["tickvals"])
    assert logarithmic([]) == {} == logarithmic([1.0, 5.0])

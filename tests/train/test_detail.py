"""What a run puts on record beside its metrics: events, expert loads, memory and work of ranks, FP8 shares by kind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.kernels.statistics import CastStatistics
from fp8moe.layers.linear import QuantizedWeight
from fp8moe.train import detail as module
from fp8moe.train import step as step_module
from fp8moe.train.detail import Detail, relative
from fp8moe.train.events import EventLog
from fp8moe.train.json_lines import JsonLines, read_lines
from fp8moe.train.loop import run_to_end, train
from fp8moe.train.metric_names import flat
from fp8moe.train.step import train_step
from fp8moe.train.trackers import LoggingConfig
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    found, broken = read_lines(folder / f"{name}.jsonl")
    assert broken == []
    return found


def test_records_are_due_fifty_times_a_run_and_at_its_end() -> None:
    due = [step for step in range(1, 1001) if LoggingConfig().experts_are_due(step, 1000)]
    assert due == list(range(20, 1001, 20))
    assert [step for step in range(1, 8) if LoggingConfig(experts_every=3).experts_are_due(step, 7)] == [3, 6, 7]
    assert not any(LoggingConfig(experts_every=0).experts_are_due(step, 7) for step in range(1, 8))
    assert all(LoggingConfig().experts_are_due(step, 7) for step in range(1, 8))


def test_a_load_is_relative_to_the_layers_mean() -> None:
    assert relative(torch.tensor([1, 3, 0, 4])) == [0.5, 1.5, 0.0, 2.0]
    assert relative(torch.tensor([0, 0])) == [0.0, 0.0]


def detailed(settings: list[str], folder: str) -> tuple[Any, ...]:
    """A run on one of two ranks -> loads between its records, working seconds and memory of each step."""
    run = built(configured(settings, f"run_dir={folder}", world_size=2))
    update, note = step_module.update, Detail.note
    counted, reports = [{name: load.clone() for name, load in run.loads.items()}], []

    def updating(one: Any, *rest: Any, **more: Any) -> None:
        update(one, *rest, **more)
        counted.append({name: load.clone() for name, load in one.loads.items()})

    def noting(self: Detail, report: Any) -> None:
        reports.append((report.time, report.memory_bytes))
        note(self, report)

    step_module.update, Detail.note = updating, noting  # type: ignore[method-assign]
    run_to_end(run, time.perf_counter())
    loads = [
        {name: relative(counted[last][name] - counted[first][name]) for name in counted[0]}
        for first, last in ((0, 2), (2, 4), (4, 5))
    ]
    working = [times.data + times.forward + times.backward + times.optimizer for times, _ in reports]
    return loads, working, [memory for _, memory in reports]


@pytest.mark.parametrize("layout", [("parallel.ep=2",), ("parallel.pp=2", "parallel.schedule=1f1b")])
def test_loads_and_ranks_are_what_the_ranks_counted(corpus: list[str], tmp_path: Path, layout: tuple[str, ...]) -> None:
    settings = [*corpus, *layout, "steps=5", "logging.experts_every=2", "batch.micro_batch=1", "precision=bf16"]
    ranks = run_ranks(detailed, 2, [*settings, "checkpoint.at_end=false"], str(tmp_path))
    loads, recorded = records(tmp_path, "expert_load"), records(tmp_path, "ranks")
    steps = [(1, 2), (3, 4), (5, 5)]
    assert [(record["first_step"], record["step"]) for record in loads] == steps
    assert [(record["first_step"], record["step"]) for record in recorded] == steps
    for number, record in enumerate(loads):
        expected = {name: load for deltas, _, _ in ranks for name, load in deltas[number].items()}
        assert record["layers"] == expected and len(expected) == 2  # block 1, and the MTP module's
    for record, (first, last) in zip(recorded, steps, strict=True):
        assert record["memory_bytes"] == [memory[last - 1] for _, _, memory in ranks]
        means = [sum(working[first - 1 : last]) / (last - first + 1) for _, working, _ in ranks]
        assert record["working_seconds"] == pytest.approx(means)


def test_a_resumed_run_has_every_record_once_and_its_history(corpus: list[str], tmp_path: Path) -> None:
    settings = [*corpus, "precision=bf16", "checkpoint.every=2", "logging.experts_every=1", f"run_dir={tmp_path}"]
    run_to_end(built(configured(settings, "steps=4")), time.perf_counter())
    JsonLines(tmp_path / "expert_load.jsonl").append({"step": 5, "layers": {}})  # of an attempt that saved no more
    EventLog(tmp_path, 4).note("skipped", 5, "undone")
    EventLog(tmp_path, 5).note("failure", 5, "ended there")
    run_to_end(built(configured(settings, "steps=6", "resume=auto")), time.perf_counter())
    assert [record["step"] for record in records(tmp_path, "expert_load")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(tmp_path, "ranks")] == [1, 2, 3, 4, 5, 6]
    events = records(tmp_path, "events")
    kinds = [(event["kind"], event["step"]) for event in events]
    assert kinds == [
        *(("start", 0), ("checkpoint", 2), ("checkpoint", 4), ("end", 4), ("failure", 5)),
        *(("start", 4), ("checkpoint", 6), ("end", 6)),
    ]
    assert events[0]["world_size"] == 1 and events[0]["versions"]["torch"] == torch.__version__
    assert events[5]["text"] == "goes on after step 4 on 1 x CPU" and events[0]["time"] <= events[5]["time"]


def test_a_rollback_takes_the_records_of_its_steps_along(corpus: list[str], tmp_path: Path) -> None:
    settings = [*corpus, "precision=bf16", "checkpoint.every=1", "steps=5", "logging.experts_every=1"]
    run, passes, poisoned = built(configured(settings, f"run_dir={tmp_path}")), step_module.train_passes, []

    def passing(one: Any, *rest: Any) -> Any:
        if one.step == 2 and not poisoned:
            poisoned.append(True)
            next(iter(one.routers().values())).bias_E[0] = float("nan")
        return passes(one, *rest)

    step_module.train_passes = passing
    try:
        run_to_end(run, time.perf_counter())
    finally:
        step_module.train_passes = passes
    assert run.guard.rollbacks == 1
    assert [record["step"] for record in records(tmp_path, "expert_load")] == [1, 2, 3, 4, 5]
    events = records(tmp_path, "events")
    assert [event["kind"] for event in events].count("rollback") == 1
    assert not any(event["kind"] == "skipped" for event in events)  # undone with its step
    after = next(record for record in records(tmp_path, "expert_load") if record["step"] == 3)
    assert after["first_step"] == 3 and all(0.9 < sum(load) / 4 < 1.1 for load in after["layers"].values())


def test_skipped_steps_and_failures_are_events(corpus: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    run = built(configured(corpus, "precision=bf16", "steps=4", "logging.experts_every=0", f"run_dir={tmp_path}"))
    passes = step_module.forward_backward

    def chosen(one: Any, *rest: Any) -> step_module.Losses:
        losses = passes(one, *rest)
        if one.step == 3:
            raise RuntimeError("a peer is gone")
        return step_module.Losses(float("nan"), 0.0, 0.0) if one.step == 1 else losses

    monkeypatch.setattr(step_module, "forward_backward", chosen)
    with pytest.raises(RuntimeError, match="a peer is gone"):
        run_to_end(run, time.perf_counter())
    events = [(event["kind"], event["step"], event["text"]) for event in records(tmp_path, "events")]
    assert events[1:] == [("skipped", 2, "step 2 was skipped, samples 8 to 15"), ("failure", 3, "a peer is gone")]
    assert not (tmp_path / "expert_load.jsonl").exists() and not (tmp_path / "ranks.jsonl").exists()


def test_fp8_shares_by_kind_are_those_of_the_casts(corpus: list[str], tmp_path: Path) -> None:
    run = built(configured(corpus, "precision=fp8", f"run_dir={tmp_path}"))
    weights = [one for one in run.model.modules() if isinstance(one, QuantizedWeight) and one.recipe.fp8]
    with torch.no_grad():
        weights[0].weight.view(-1)[1::2] = 1e-9  # beside ordinary ones, half of it becomes zero
    weights[0].quantize()
    lost = weights[0].weight.numel() / 2 / sum(one.weight.numel() for one in weights)
    report = train_step(run, count_fp8=True)
    under, over = report.fp8_underflow_by_kind, report.fp8_saturated_by_kind
    assert (
        under is not None
        and over is not None
        and under.keys() == over.keys() == {"activations", "gradients", "weights"}
    )
    assert under["weights"] == pytest.approx(lost, rel=0.02) and over["weights"] == 0.0
    assert min(under["activations"], under["gradients"]) <= (report.fp8_underflow_share or 0.0)
    assert (report.fp8_underflow_share or 0.0) <= max(under["activations"], under["gradients"])
    plain = train_step(run)
    assert plain.fp8_underflow_by_kind is None and plain.fp8_saturated_by_kind is None
    assert (
        flat({"step": 1, "time": {"data": 2.0}, "fp8_underflow_by_kind": under})["fp8_underflow_by_kind/weights"]
        == (under["weights"])
    )


def test_a_weight_in_parts_is_counted_like_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(3, 400, 272) ** 9
    q, _ = quantize_blocks(w)
    whole, parts = CastStatistics(), CastStatistics()
    whole.add(w, q, "weights")
    monkeypatch.setattr("fp8moe.kernels.statistics._PART", 1000)
    parts.add_weight(w, q)
    assert whole.of_kind("weights") == parts.of_kind("weights") and whole.underflow_share > 0.01
    assert whole.of_kind("gradients") == (0, 0, 0)


def test_the_report_is_called_however_a_run_ends(corpus: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    called: list[tuple[Path, list[str]]] = []

    def report(folder: Path) -> None:
        called.append((folder, [event["kind"] for event in records(folder, "events")]))

    short = [*corpus, "precision=bf16", "steps=1", "checkpoint.at_end=false"]
    train(configured(short, f"run_dir={tmp_path / 'a'}"), str, report=report)
    train(configured(short, "report=false", f"run_dir={tmp_path / 'b'}"), str, report=report)
    monkeypatch.setattr(module.Detail, "note", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(configured(short, f"run_dir={tmp_path / 'c'}"), str, report=report)
    assert called == [(tmp_path / "a", ["start", "end"]), (tmp_path / "c", ["start", "failure"])]
    assert json.loads((tmp_path / "a" / "metrics.jsonl").read_text())["step"] == 1

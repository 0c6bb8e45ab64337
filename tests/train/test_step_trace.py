"""profile=true on two real processes: the trace of every rank, and the figures that the run ends with."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fp8moe.cli.compose import as_yaml
from fp8moe.profile.figures import RankFigures
from fp8moe.schedule.build import build_schedule
from fp8moe.train.loop import run_to_end
from fp8moe.train.step_trace import StepFigures, summed_up, table
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured

REDUCE = ("reduce (gradients)",)
SETTINGS = ("parallel.schedule=dualpipev", "parallel.ep=2", "batch.micro_batch=1", "precision=fp8", "profile=true",
            "checkpoint.at_end=false")  # fmt: skip


def trained(corpus: list[str], run_dir: str, *settings: str) -> StepFigures | None:
    config = configured(corpus, *SETTINGS, *settings, f"run_dir={run_dir}", world_size=2)
    assert "profile: true" in as_yaml(config)
    return run_to_end(built(config), 0.0).trace


def test_a_traced_step(corpus: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first, second = run_ranks(trained, 2, corpus, str(run_dir), "steps=2")
    assert first == second and first.step == 2  # the last of fewer than three
    summary = json.loads((run_dir / "summary.json").read_text())
    assert 0 <= summary["trace"]["hidden_worst"] <= summary["trace"]["hidden"] <= 1
    assert summary["trace"]["bubble"] >= 0 and summary["trace"]["bubble_simulated"] == pytest.approx(0.0, abs=1e-9)
    assert {"F attn", "F mlp", "B mlp", "W attn", "F embed", "B loss"} <= summary["trace"]["phases"].keys()
    parts, phases = summary["trace"]["parts"], summary["trace"]["phases"]
    assert {"data", "reduce", "optimizer", "wait for layers", "other"} <= parts.keys() and min(parts.values()) >= 0
    assert parts["optimizer"] > 0 and parts["reduce"] > 0
    whole = sum(parts.values()) + sum(phases.values())
    assert 0.5 * summary["trace"]["step_seconds"] < whole <= summary["trace"]["step_seconds"] * (1 + 1e-9)
    assert parts["other"] < 0.25 * whole

    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert processes == [f"rank {r} (pp 0, dp {r}, ep {r}; stages 0, 1)" for r in range(2)]
    actions = build_schedule("dualpipev", 1, 4).actions[0]
    for pid in range(2):
        slices = [e for e in events if e["ph"] == "X" and e["pid"] == pid]
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for one in slices:
            by_kind.setdefault(one["cat"], []).append(one)
        assert Counter(e["name"] for e in by_kind["action"]) == Counter(map(str, actions))
        for phase in by_kind["phase"]:
            assert re.fullmatch(r"[FBW] (attn|dispatch|mlp|combine|embed|join|loss)", phase["name"])
            assert phase["tid"] == 0 and sum(holds(action, phase) for action in by_kind["action"]) == 1
        messages = Counter(e["name"] for e in by_kind["message"] if e["tid"] == 1)
        assert len(set(messages.values())) == 1 and set(messages) == {
            f"message {name}" for name in ("counts", "dispatch", "combine", "dispatch backward", "combine backward")
        }
        between_replicas = {e["name"] for e in by_kind["message"] if e["tid"] != 1}
        assert between_replicas == {"message gradients", "message weights"}
        assert {e["tid"] for e in by_kind["message"]} == {1, 2}
        assert {"data", "reduce", "optimizer"} == {e["name"] for e in by_kind["rest"]}
        assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in slices)


def holds(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
    slack = 1e-3  # microseconds
    return outer["ts"] <= inner["ts"] + slack and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + slack


def test_the_job_is_the_sum_of_its_ranks() -> None:
    one = RankFigures(10.0, 6.0, 4.0, 1.0, 3.0, {"F attn": 2.0}, {"optimizer": 5.0, "other": 4.0}, 11.0)
    more = {"optimizer": 2.0, "reduce": 3.0, "other": 2.0}
    other = RankFigures(10.0, 5.0, 1.0, 1.0, 4.0, {"F attn": 4.0, "W mlp": 2.0}, more, 13.0)
    job = summed_up(7, [one, other], 2.5)
    assert (job.hidden, job.hidden_worst) == (pytest.approx(1 - 2 / 5), 0.0)
    assert (job.seconds, job.bubble, job.bubble_worst, job.bubble_simulated) == (10.0, 3.5, 4.0, 2.5)
    assert job.phases == {"F attn": 3.0, "W mlp": 1.0} and job.phases_worst == {"F attn": 4.0, "W mlp": 2.0}
    assert job.parts == {"optimizer": 3.5, "other": 3.0, "reduce": 1.5} and job.step_seconds == 13.0
    assert job.parts_worst == {"optimizer": 5.0, "other": 4.0, "reduce": 3.0}
    lines = table(job, Path("runs/one/trace.json")).splitlines()
    assert lines[0].startswith("trace of step 7")
    assert [re.split(r" {2,}", line)[0] for line in lines[1:6]] == ["optimizer", "F attn", "other", *REDUCE, "W mlp"]
    assert re.fullmatch(r"optimizer +3500.0 ms +29.2% +5000.0 ms", lines[1])
    assert re.fullmatch(r"W mlp +1000.0 ms +8.3% +2000.0 ms", lines[5])
    assert re.fullmatch(r"whole step +12000.0 ms +13000.0 ms", lines[6])
    assert re.fullmatch(r"communication hidden +60.0% +0.0%", lines[7])
    assert re.fullmatch(r"bubble +3500.0 ms \(simulated 2500.0 ms\) +4000.0 ms", lines[9])
    assert lines[10] == "open runs/one/trace.json at ui.perfetto.dev"
    assert lines[0].index("the worst") == lines[9].index("4000.0 ms")  # columns as wide as their widest cell
    assert lines[0].index("a rank") == lines[9].index("3500.0 ms") == len("forwards and backwards") + 2
    alone = summed_up(1, [RankFigures(1.0, 1.0, 0.0, 0.0, 0.0, {})], None)
    assert (alone.hidden, alone.hidden_worst) == (None, None)
    assert "hidden" not in table(alone, Path()) and "simulated" not in table(alone, Path())

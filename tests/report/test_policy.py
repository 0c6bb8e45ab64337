"""Figures of a run of GRPO: each point is what metrics.jsonl says; answers before and after stand under their times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp8moe.report.page import write_report
from fp8moe.report.policy import policy
from fp8moe.report.run_files import read_run
from fp8moe.report.series import draw


def record(step: int) -> dict[str, Any]:
    """A step's figures; every second one is the first of a batch of rollouts."""
    of_policy = {"clip_share": 0.01 * step, "kl": 0.001 * step, "loss": -0.1, "tokens": 100, "step": step}
    of_batch = {
        "reward": 0.2 * step,
        "rewards": {"accuracy": 0.1 * step, "format": 0.5},
        "completion_length": 20.0 + step,
        "entropy": 0.3,
        "groups_alike": 2,
        "mismatch_kl": 1e-6,
    }
    return of_policy | (of_batch if step % 2 else {}) | ({"held_out_accuracy": 0.25 * step} if step == 4 else {})


def test_every_figure_is_what_the_files_say(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    records = [record(step) for step in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    samples = [{"prompt": "2 + 3?", "text": text, "when": when, "accuracy": share} for text, when, share in (
        ("four", "before", 0.25), ("five", "after step 4", 0.75),
    )]  # fmt: skip
    (run / "samples.json").write_text(json.dumps({"samples": samples}))
    found = {figure.name: figure.data for figure in policy(draw([read_run(run)]))}
    expected = {
        "policy_reward": ([100, 300], [0.2, 0.6]),
        "policy_held_out_accuracy": ([400], [1.0]),
        "policy_completion_length": ([100, 300], [21.0, 23.0]),
        "policy_kl": ([100, 200, 300, 400], [0.001, 0.002, 0.003, 0.004]),
        "policy_clip_share": ([100, 200, 300, 400], [0.01, 0.02, 0.03, 0.04]),
        "policy_entropy": ([100, 300], [0.3, 0.3]),
        "policy_groups_alike": ([100, 300], [2, 2]),
        "policy_mismatch_kl": ([100, 300], [1e-6, 1e-6]),
    }
    assert set(found) == {*expected, "policy_rewards"}
    for name, (x, y) in expected.items():
        (trace,) = found[name]
        assert list(trace["x"]) == x and [round(value, 9) for value in trace["y"]] == y, name
    names = {trace["name"]: [round(value, 9) for value in trace["y"]] for trace in found["policy_rewards"]}
    assert names == {"accuracy": [0.1, 0.3], "format": [0.5, 0.5]}
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.index("before, accuracy 25.0%") < page.index("four") < page.index("after step 4, accuracy 75.0%")
    assert '<section id="section-policy">' in page

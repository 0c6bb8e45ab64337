"""metrics.jsonl line by line, what a resumed run keeps of it, and a wandb that is not installed."""

from __future__ import annotations

import json
import math
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp8moe.errors import ConfigError
from fp8moe.train.json_lines import finite
from fp8moe.train.metrics import MetricsWriter, StepReport, StepSeconds
from fp8moe.train.trackers import LoggingConfig, check_trackers

REPORT = StepReport(
    step=1,
    loss=5.0,
    mtp_loss=None,
    aux_loss=1.0,
    grad_norm=2.0,
    lr=1e-3,
    skipped=False,
    tokens=100,
    consumed_samples=8,
    tokens_per_second=50.0,
    mfu=None,
    max_violation=0.5,
    fp8_saturated_share=None,
    fp8_underflow_share=None,
    seconds=2.0,
    time=StepSeconds(0.1, 0.5, 1.0, 0.2, 0.2),
    memory_bytes=1000,
)
PROMISED = {"step", "loss", "grad_norm", "lr", "tokens_per_second", "consumed_samples", "mfu", "time", "memory_bytes"}
PARTS = {"data", "forward", "backward", "exposed_communication", "optimizer", "checkpoint"}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_has_what_is_promised(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, LoggingConfig(), "name", {}, after_step=0)
    writer.write(REPORT, {})
    writer.write(replace(REPORT, step=2, loss=math.nan, grad_norm=math.inf), {"val_loss": 4.0})
    one, two = lines(tmp_path)  # readable before the end
    assert one.keys() >= PROMISED and one["time"].keys() == PARTS
    assert one["loss"] == 5.0 and one["mfu"] is None
    assert (two["loss"], two["grad_norm"], two["val_loss"]) == (None, None, 4.0)
    writer.close()


def test_lines_of_a_full_disk_are_written_later(tmp_path: Path) -> None:
    """A limit in the middle of the second line: nothing of it stays, and it comes with the third."""
    writer = MetricsWriter(tmp_path, LoggingConfig(), "name", {}, after_step=0)
    writer.write(REPORT, {})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        writer.write(replace(REPORT, step=2), {})
        writer.write(replace(REPORT, step=3), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    for step in (4, 5):
        writer.write(replace(REPORT, step=step), {})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, LoggingConfig(), "name", {}, after_step=0)
    for step in range(1, 6):
        writer.write(replace(REPORT, step=step), {})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    writer = MetricsWriter(tmp_path, LoggingConfig(), "name", {}, after_step=3)
    writer.write(replace(REPORT, step=4, loss=1.0), {})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 1.0)]


def test_numbers_that_json_has_no_word_for() -> None:
    assert finite({"a": [math.inf, 1.0], "b": {"c": math.nan}, "d": "inf", "e": (-math.inf, 2)}) == {
        "a": [None, 1.0],
        "b": {"c": None},
        "d": "inf",
        "e": [None, 2],
    }


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_one_sentence(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(LoggingConfig())
    with pytest.raises(ConfigError, match=rf"package {package}, .* not installed: pip install 'fp8moe\[{package}\]'"):
        check_trackers(LoggingConfig(**{package: True}))  # type: ignore[arg-type]

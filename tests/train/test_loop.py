"""A whole small run: it learns, reports what is promised, and validates alike on any number of ranks."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
import yaml

from fp8moe.cli.compose import as_yaml, to_dataclass
from fp8moe.data.packing import IGNORED_LABEL
from fp8moe.train.config import TrainConfig
from fp8moe.train.loop import run_to_end, train
from fp8moe.train.run_log import RunLogger
from fp8moe.train.step import forward_passes
from fp8moe.train.summary import table
from fp8moe.train.trackers import LoggingConfig
from fp8moe.train.validation import ValidationConfig, ValidationReport, validate
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured

PROMISED = (
    *("val_loss", "val_bits_per_byte", "byte_bigram_bits_per_byte", "tokens_per_second", "max_violation"),
    *("fp8_saturated_share", "fp8_underflow_share", "steps", "wall_seconds", "world_size", "precision"),
)


def test_a_run_from_settings_to_summary(corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "steps=40",
        "batch.micro_batch=8",
        "optimizer.schedule.peak=1e-2",
        "validation.every=20",
        "checkpoint.every=39",
    ]
    config = configured(corpus, *settings, f"run_dir={tmp_path}")
    summary = train(config, as_yaml)
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "summary.json").read_text())
    assert all(key in written for key in PROMISED)
    assert written["steps"] == 40 and written["world_size"] == 1 and written["precision"] == "fp8"
    assert summary.val_bits_per_byte < 0.8 * summary.byte_bigram_bits_per_byte
    for shares in summary.expert_token_shares.values():
        assert all(share > 0 for share in shares) and sum(shares) == pytest.approx(1.0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 41))
    assert [record["step"] for record in records if "val_loss" in record] == [20, 40]
    assert records[-1]["fp8_saturated_share"] == 0.0 and records[0]["fp8_saturated_share"] is None
    assert sum(record["loss"] for record in records[-5:]) < 0.5 * sum(record["loss"] for record in records[:5])
    assert records[-1]["time"]["checkpoint"] > 0 == records[-2]["time"]["checkpoint"]  # of the step before
    assert to_dataclass(TrainConfig, yaml.safe_load((tmp_path / "config.yaml").read_text())) == config
    assert "run directory" in shown and "mfu = tokens/s/GPU x" in shown and str(tmp_path) in shown
    assert table(summary) in shown
    assert "step 40/40" in (tmp_path / "logs" / "rank-0.log").read_text()


def score(settings: list[str], world_size: int) -> ValidationReport:
    run = built(configured(settings, world_size=world_size))
    if run.model.mtp is not None:
        run.model.mtp.enter = None  # it takes no part
    data, micro_batch = run.data, run.config.micro_batch
    return validate(
        lambda batches: forward_passes(run, batches)[0],
        data.validation, data.token_bytes, run.mesh, samples=8, micro_batch=micro_batch,
    )  # fmt: skip


def test_validation_by_hand_and_on_any_layout(corpus: list[str]) -> None:
    settings = [*corpus, "precision=fp32", "data.document_mask=true"]
    report = score(settings, 1)
    pipelined = [*settings, "parallel.pp=2", "batch.micro_batch=1"]
    others = run_ranks(score, 4, settings, 4)
    for schedule in ("1f1b", "dualpipe"):
        others += run_ranks(score, 4, [*pipelined, f"parallel.schedule={schedule}"], 4)
    for other in others:
        assert other.loss == pytest.approx(report.loss, rel=1e-6)
        assert other.bits_per_byte == pytest.approx(report.bits_per_byte, rel=1e-6)
        assert other.tokens == report.tokens

    run = built(configured(settings))
    batch = run.data.validation.batch(range(8))
    run.model.eval()
    predicted = batch.labels_BS != IGNORED_LABEL
    with torch.no_grad():
        nats = float(run.model(batch).main)
    num_bytes = int(run.data.token_bytes[batch.labels_BS[predicted]].sum())
    assert report.tokens == int(predicted.sum()) < 8 * 32
    assert report.loss == pytest.approx(nats / report.tokens, rel=1e-6)
    assert report.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


def test_validation_leaves_training_alone(corpus: list[str], tmp_path: Path) -> None:
    plain = built(configured(corpus, "steps=3", f"run_dir={tmp_path / 'a'}"))
    watched = built(configured(corpus, "steps=3", "validation.every=1", f"run_dir={tmp_path / 'b'}"))
    one, other = (run_to_end(run, time.perf_counter()) for run in (plain, watched))
    assert (one.loss, one.val_loss, one.expert_token_shares) == (other.loss, other.val_loss, other.expert_token_shares)


@pytest.mark.parametrize(("every", "due"), [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (7, [6])])
def test_when_validation_and_counts_of_fp8_are_due(every: int, due: list[int]) -> None:
    validation, logging = ValidationConfig(every=every), LoggingConfig(fp8_every=every)
    assert [step for step in range(1, 7) if validation.is_due(step, 6)] == due
    assert [step for step in range(1, 7) if logging.fp8_is_due(step, 6)] == due


def test_start_up_ends_with_the_first_step_and_dispatches_are_verified(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["steps=3", "precision=bf16", "checkpoint.at_end=false", "parallel.timeout=7", f"run_dir={tmp_path}"]
    run = built(configured(corpus, *settings))
    ended: list[tuple[int, float]] = []
    monkeypatch.setattr("fp8moe.train.loop.end_startup", lambda mesh, links, seconds: ended.append((run.step, seconds)))
    verified: list[int] = []
    monkeypatch.setattr(run.dispatcher, "verify", lambda: verified.append(run.step))
    run_to_end(run, time.perf_counter())
    assert ended == [(1, 7.0)]
    assert verified == [0, 1, 2, 3]  # before each update, and behind the validation


def test_the_run_logger_is_closed_once_when_a_step_fails(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(configured(corpus, "steps=2", f"run_dir={tmp_path}"))
    closed: list[int] = []
    close = RunLogger.close
    monkeypatch.setattr(RunLogger, "close", lambda logger: (closed.append(run.step), close(logger))[1])

    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("this step fails")

    monkeypatch.setattr("fp8moe.train.loop.train_step", fails)
    with pytest.raises(RuntimeError, match="this step fails"):
        run_to_end(run, time.perf_counter())
    assert closed == [0]


def test_a_report_is_made_however_a_run_ends_unless_it_never_began(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for and ended, asked for and failed; not asked for, or refused while it was built."""
    made: list[str] = []

    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("it fails")

    def run(name: str, *settings: str) -> None:
        words = ("steps=1", "precision=bf16", "checkpoint.at_end=false", f"run_dir={tmp_path / name}", *settings)
        train(configured(corpus, *words), as_yaml, report=lambda run_dir: made.append(run_dir.name))

    run("ended")
    run("unasked", "report=false")
    for name, stage in (("failed", "train_step"), ("refused", "build")):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="it fails"):
            patch.setattr(f"fp8moe.train.loop.{stage}", fails)
            run(name)
    assert made == ["ended", "failed"]

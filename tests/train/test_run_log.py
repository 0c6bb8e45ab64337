"""Progress lines and the bar, the log file, and the summary's figures from what the steps reported."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fp8moe.train.progress import ProgressDisplay
from fp8moe.train.run_log import RunLogger, all_loads, log_file
from fp8moe.train.validation import ValidationReport
from tests.train.runs import built, configured
from tests.train.test_metrics import REPORT


def test_lines_come_first_last_and_at_their_distance(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay(steps=8, done=0, every=3)
    for step in range(1, 9):
        display.show(replace(REPORT, step=step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 3", "step 6", "step 8"]
    assert all(words in lines[1] for words in ("loss 5.0000", "50 tokens/s in this step", "left at the pace of"))
    assert [line.partition(" left ")[2] for line in lines] == [
        "at the pace of 1 step",
        *(f"at the pace of the last {step} steps" for step in (3, 6, 8)),
    ]


def test_a_skipped_step_says_so_and_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        ProgressDisplay(8, 0, 1).line(replace(REPORT, skipped_samples=(8, 15))).endswith("  SKIPPED, samples 8 to 15")
    )
    silent = ProgressDisplay(8, 0, 1, silent=True)
    silent.show(REPORT)
    silent.print("words")
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_a_log_on_a_full_disk_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").symlink_to("/dev/full")
    with log_file(tmp_path, 0):
        logging.getLogger("fp8moe").info("a line")
    assert capsys.readouterr().err == ""


def test_time_left_goes_by_the_recent_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    display = ProgressDisplay(steps=100, done=0, every=1000, silent=True)
    for step in range(1, 51):
        now[0] += 500.0 if step == 1 else 2.0
        display.show(replace(REPORT, step=step))
    assert display.seconds_left() == pytest.approx(100.0)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    display = ProgressDisplay(steps=4, done=2, every=1)
    display.show(replace(REPORT, step=3))
    display.print("between")
    display.close()
    captured = capsys.readouterr()
    assert captured.out == "between\n" and "3/4" in captured.err and "last step: loss 5.000" in captured.err


def test_the_summary_is_made_of_the_steps(corpus: list[str], tmp_path: Path) -> None:
    run = built(configured(corpus, f"run_dir={tmp_path}"))
    run_logger = RunLogger(run, time.perf_counter() - 100.0)
    for step in range(1, 13):
        fp8 = {4: (0.25, 0.5), 8: (0.125, 0.75)}.get(step, (None, None))
        report = replace(REPORT, step=step, loss=float(step), tokens=100 * step, seconds=50.0 if step == 1 else 2.0,
                         fp8_saturated_share=fp8[0], fp8_underflow_share=fp8[1])  # fmt: skip
        validation = {6: ValidationReport(9.0, 8.0, 1), 12: ValidationReport(4.0, 3.0, 1)}.get(step)
        run_logger.note(report, validation)
        assert run_logger.num_steps == step
    run.step, run.guard.skipped, run.guard.in_a_row = 12, 5, 0
    for name, load in run.loads.items():
        load.copy_(torch.tensor([5, 1, 1, 1]) if name.startswith("mtp") else torch.tensor([1, 1, 1, 1]))
    summary = run_logger.finish(None)
    run_logger.close()
    assert summary.loss == pytest.approx(sum(range(3, 13)) / 10) and summary.loss_steps == 10
    assert (summary.val_loss, summary.val_bits_per_byte, summary.steps, summary.skipped_steps) == (4.0, 3.0, 12, 5)
    assert summary.tokens == sum(range(100, 1300, 100))
    assert summary.tokens_per_second == pytest.approx((summary.tokens - 100) / 22)  # without the first step
    assert (summary.fp8_saturated_share, summary.fp8_underflow_share) == (0.125, 0.75)  # the last that were counted
    assert summary.max_violation == pytest.approx(1.5) == max(summary.max_violation_by_layer.values())
    assert min(summary.max_violation_by_layer.values()) == 0.0
    assert 100 <= summary.wall_seconds < 160
    assert json.loads((tmp_path / "summary.json").read_text())["loss"] == summary.loss
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 13)
    ]


def test_rewards_are_summed_up_and_batches_without_a_gradient_are_named_once_in_a_row(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = built(configured(corpus, f"run_dir={tmp_path}"))
    run_logger = RunLogger(run, time.perf_counter())
    for number, (alike, reward) in enumerate([(4, 0.0), (4, 0.0), (3, 0.5), (4, 1.0)], 1):
        run_logger.add_figures({"rollouts": number, "groups_drawn": 4, "groups_alike": alike, "reward": reward})
        run_logger.note(replace(REPORT, step=number), ValidationReport(9.0, 8.0, 1))
    run_logger.add_figures({"rollouts": 4, "clip_share": 0.0})  # a second update of the last batch
    run_logger.add_figures({"held_out_accuracy": 0.25, "held_out_length": 8.0})
    summary = run_logger.finish(None)
    run_logger.close()
    assert (summary.reward, summary.reward_batches, summary.held_out_accuracy) == (0.375, 4, 0.25)
    warned = [line for line in capsys.readouterr().out.splitlines() if "gives no gradient" in line]
    assert [line.split(": ")[0] for line in warned] == [
        f"batch {number} of rollouts gives no gradient" for number in (1, 4)
    ]
    assert "its 4 groups all completions scored alike (mean reward 1)" in warned[1]


def test_layers_are_in_the_order_of_the_model() -> None:
    names = ["mtp.block.moe.router", "blocks.10.moe.router", "blocks.9.moe.router", "blocks.1.moe.router"]
    run = SimpleNamespace(loads={name: torch.ones(2) for name in names}, mesh=SimpleNamespace(pp_group=None))
    assert list(all_loads(run)) == names[::-1]  # type: ignore[arg-type]


def test_a_log_file_takes_messages_and_warnings_while_its_block_runs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    logger = logging.getLogger("fp8moe.some")
    with log_file(tmp_path, 3):
        logger.info("inside")
    logger.warning("behind")
    text = (tmp_path / "logs" / "rank-3.log").read_text()
    assert "INFO fp8moe.some: inside" in text and "behind" not in text

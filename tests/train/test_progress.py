"""Plain lines where there is no terminal, on one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fp8moe.train.run_log import ProgressDisplay, duration
from tests.train.test_metrics import REPORT


def test_lines_come_first_last_and_at_their_distance(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay(steps=8, done=0, every=3)
    for step in range(1, 9):
        display.show(replace(REPORT, step=step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 3", "step 6", "step 8"]
    assert all(words in lines[1] for words in ("loss 5.0000", "50 tokens/s", "left"))


def test_a_skipped_step_says_so_and_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert ProgressDisplay(8, 0, 1).line(replace(REPORT, skipped=True)).endswith("SKIPPED: not finite")
    silent = ProgressDisplay(8, 0, 1, silent=True)
    silent.show(REPORT)
    silent.say("words")
    assert capsys.readouterr().out == ""


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
    display.say("between")
    display.close()
    captured = capsys.readouterr()
    assert captured.out == "between\n" and "3/4" in captured.err


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.2, 59.4, 60, 200, 3600, 18420)] == [
        *("0s", "59s", "1m00s", "3m20s", "1h00m", "5h07m")
    ]

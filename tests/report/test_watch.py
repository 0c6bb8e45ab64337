"""`fp8moe watch`: files read as they grow, the curve's dots, and what is shown of runs in every state."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fp8moe.errors import ConfigError, DataError
from fp8moe.report import watch_state
from fp8moe.report.watch import PLAIN_WIDTH, watch
from fp8moe.report.watch_plot import bars, binned, curve
from fp8moe.report.watch_state import Watched
from fp8moe.report.watch_tail import Tail
from fp8moe.train.run_lock import LOCK_FILE

NOW = time.time()


def append(path: Path, *records: dict[str, Any] | str) -> None:
    with open(path, "a") as file:
        file.write("".join(record if isinstance(record, str) else f"{json.dumps(record)}\n" for record in records))


def step(number: int, **more: Any) -> dict[str, Any]:
    parts = {"data": 0.0, "forward": 0.5, "backward": 1.0, "exposed_communication": 0.25, "optimizer": 0.25}
    record = {"step": number, "loss": 4.0 / number, "grad_norm": 2.0, "lr": 1e-3, "tokens_per_second": 1000.0 * number,
              "mfu": None, "max_violation": 0.5, "seconds": 2.0, "time": {**parts, "checkpoint": 0.5},
              "memory_bytes": 2e9, "skipped": False}  # fmt: skip
    return record | more


def run_of(folder: Path, steps: int = 10, **config: Any) -> Path:
    """A run directory with ten steps, of a run that trains."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps({"name": "mine", "steps": 100, "parallel": {"dp": 2}} | config))
    append(folder / "metrics.jsonl", *(step(number) for number in range(1, steps + 1)))
    (folder / LOCK_FILE).touch()
    return folder


def shown(folder: Path, **options: Any) -> str:
    file = io.StringIO()
    watch(folder, console=Console(file=file, width=100), **options)
    return file.getvalue()


def test_a_file_is_read_line_by_line_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = Tail(path)

    def look() -> tuple[bool, list[Any]]:
        replaced, records = tail.look()
        return replaced, list(records)

    assert look() == (False, [])
    append(path, {"a": 1}, '{"a": 2')
    assert look() == (False, [{"a": 1}])  # half a line waits for its end
    append(path, "}\n", "7\nno json\n", {"a": 3})
    assert look() == (False, [{"a": 2}, {"a": 3}])
    assert look() == (False, [])
    path.with_suffix(".new").write_text('{"b": 1}\n{"b": 2}\n{"b": 3}\n{"b": 4}\n{"b": 5}\n{"b": 6}\n')
    path.with_suffix(".new").replace(path)  # longer than before, and another file
    assert look() == (True, [{"b": number} for number in range(1, 7)])
    path.write_text('{"c": 1}\n')
    assert look() == (True, [{"c": 1}])
    path.unlink()
    assert look() == (True, []) and look() == (False, [])
    append(path, {"d": 1})
    assert look() == (False, [{"d": 1}])


def test_lines_that_span_blocks_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.report.watch_tail.BLOCK", 7)
    records = [{"number": number, "text": "ä" * number} for number in range(12)]
    append(tmp_path / "lines", *records)
    assert list(Tail(tmp_path / "lines").look()[1]) == records


def test_a_long_file_costs_a_look_its_new_lines_alone(tmp_path: Path) -> None:
    line = json.dumps(step(7)) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line * 50_000)
    run = Watched(tmp_path)
    begin = time.perf_counter()
    for _ in range(20):
        run.refresh()
    assert (time.perf_counter() - begin) / 20 < 0.01 and len(run.steps) == 50_000
    assert len(binned(run.steps, run.losses, 100)) == 100


def dots(lines: list[str]) -> list[str]:
    """The plot dot by dot, by the numbering of Unicode's braille block."""
    order = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]  # (row, column) of dots 1 to 8
    grid = [[" "] * (2 * len(lines[0])) for _ in range(4 * len(lines))]
    for y, line in enumerate(lines):
        for x, character in enumerate(line):
            for bit, (row, column) in enumerate(order):
                if (ord(character) - 0x2800) >> bit & 1:
                    grid[4 * y + row][2 * x + column] = "*"
    return ["".join(row) for row in grid]


def test_a_curve_has_a_dot_for_each_value_and_joins_neighbours() -> None:
    assert dots(curve([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 2)) == [" " * i + "*" + " " * (7 - i) for i in range(8)]
    assert dots(curve([0.0, 3.0, None, 0.0], 1)) == [" *  ", " *  ", " *  ", "*  *"]
    assert dots(curve([3.0, 0.0], 1)) == ["* ", " *", " *", " *"]
    assert dots(curve([1.0, 1.0], 1)) == ["  ", "  ", "**", "  "]  # flat, in the middle
    assert dots(curve([None, None], 1)) == ["  "] * 4


def test_bins_are_means_of_what_is_finite() -> None:
    assert binned([1, 2, 3, 4], [1.0, 3.0, math.nan, 5.0], 2) == [2.0, 5.0]
    assert binned([1, 2, 9, 10], [1.0, 3.0, 5.0, 7.0], 3) == [2.0, None, 6.0]
    assert binned([1], [math.inf], 2) == [None, None] and binned([], [], 2) == [None, None]
    assert bars([0.0, 1.0, None, 7.0]) == "▁▂ █" and bars([5.0, 10.0], least=0.0) == "▅█" and bars([None]) == ""


def test_a_run_that_trains(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run")
    append(folder / "metrics.jsonl",
           step(11, val_loss=3.0, val_bits_per_byte=1.5, skipped=True, loss=None, max_violation=0.75),
           step(12, val_loss=2.5, val_bits_per_byte=1.25, mfu=0.4, slowest_rank=1, slowest_rank_seconds_behind=8.1),
           '{"step": 13, "lo')  # fmt: skip
    append(folder / "events.jsonl", {"kind": "start", "step": 0, "time": NOW, "text": "begins"},
           {"kind": "checkpoint", "step": 10, "time": time.time() - 125, "text": "step-10 is complete"},
           {"kind": "straggler", "step": 12, "time": NOW, "text": "slowest rank 1 (node01, gpu 3) [red]"})  # fmt: skip
    append(folder / "expert_load.jsonl", {"step": 12, "first_step": 9, "layers": {"one": [1.0, 1.0, 1.0, 1.0],
           "two": [0.0, 0.5, 1.0, 2.5]}})  # fmt: skip
    append(folder / "ranks.jsonl", {"step": 12, "first_step": 9, "memory_bytes": [2e9, 5e9, 1e9, 1e9],
           "working_seconds": [1.0, 1.9, 7.0, 7.1]})  # fmt: skip
    text = shown(folder, once=True)
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in text.splitlines()}
    assert text.startswith(f"mine ({folder})  trains\n")
    assert "step 12/100, 3m40s left at the pace of the last 12 steps" in text  # 88 x 2.5 s
    assert "training loss, nats a token, steps 1 to 12; of each step" in text and "4.000" in text and "0.333" in text
    assert lines["loss"] == "loss 0.3333 in step 12"
    assert f"{sum(4 / n for n in range(1, 13) if n != 11) / 11:.4f} mean of the last 12 steps" in text
    assert lines["validation"] == "validation 2.5000, 1.2500 bits a byte after step 12 (step 11: 3.0000)"
    assert lines["tokens/s"] == "tokens/s 6,500 of the whole job, mean of the last 12 steps"
    assert lines["MFU"].startswith("MFU 40.0% of the BF16 peak")
    assert lines["a step"] == (
        "a step 2 s; rank 0: forward 20%, backward 40%, waits 10%, optimizer 10%, checkpoint 20%"
    )
    assert lines["memory"] == "memory 2 GB on rank 0, the most so far; 5 GB on rank 1, the largest"
    assert lines["skipped"] == "skipped 1 of 12 steps"
    assert re.fullmatch(r"checkpoint after step 10, [2-9]m\d\ds ago", lines["checkpoint"])
    assert "load of each expert over the mean, 2 worst of 2 layers, steps 9 to 12" in text
    assert text.index("two") < text.index("0.00 to 2.50") < text.index("1 WITHOUT TOKENS") < text.index("1.00 to 1.00")
    assert "rank 1: 1.9 s a step, 1.90 x the median" in text and "rank 3: 7.1" not in text and "rank 2" not in text
    assert "slowest rank 1: +8.1 s beside the median, in the comparison at step 12" in text
    assert "slowest rank 1 (node01, gpu 3) [red]" in text  # no markup of rich's
    assert all(len(line) <= PLAIN_WIDTH for line in text.splitlines())


def test_a_policy_shows_what_it_learns_by(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", steps=1)
    append(folder / "metrics.jsonl", step(2, reward=0.25, held_out_accuracy=0.1), step(3), step(4, reward=0.75),
           step(5, held_out_accuracy=0.5))  # fmt: skip
    text = shown(folder, once=True)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "policy loss, steps 1 to 5" in text and "training loss" not in text
    place = lines.index("reward 0.75 in step 4")
    assert lines[place + 1 : place + 3] == [
        "0.5 mean of the last 2 batches",
        "held-out 50.0% right after step 5 (step 2: 10.0%)",
    ]


def test_what_a_run_does_not_have_is_left_out(tmp_path: Path) -> None:
    """Metrics alone, as a run of an older version has them; and a configuration alone, before the first step."""
    append(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0}, {"step": 2, "loss": None})
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-2" / "state.json").touch()
    (tmp_path / "checkpoints" / "step-9").mkdir()  # half of one
    text = shown(tmp_path)
    assert "does not train" in text and "\nstep 2\n" in text and "loss           not finite in step 2" in text
    assert "after step 2, 0s ago" in text and "experts" not in text and "MFU" not in text and "events" not in text
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("name: new\nsteps: 5\n")
    assert "No step is done yet" in shown(tmp_path / "new") and "step 0/5" in shown(tmp_path / "new")


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({LOCK_FILE: ""}, "trains"),
        ({"events.jsonl": [{"kind": "failure"}]}, "failed"),
        ({"events.jsonl": [{"kind": "failure"}, {"kind": "start"}], LOCK_FILE: ""}, "trains"),
        ({"events.jsonl": [{"kind": "preempted"}]}, "preempted, to be started again"),
        ({"preempted": "saved"}, "preempted, to be started again"),
        ({"events.jsonl": [{"kind": "end"}]}, "finished"),
        ({"summary.json": "{}"}, "finished"),
        ({}, "does not train"),
    ],
)
def test_states(files: dict[str, Any], state: str, tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", steps=100)
    (folder / LOCK_FILE).unlink()
    for name, content in files.items():
        append(folder / name, *(content if isinstance(content, list) else [content]))
    assert Watched(folder).state() == state and (state == "finished") == Watched(folder).is_finished


def test_a_run_that_moves_no_more_stands_out(tmp_path: Path) -> None:
    assert watch_state.LOCK == LOCK_FILE
    folder = run_of(tmp_path / "run")
    ago = time.time() - 300
    os.utime(folder / "metrics.jsonl", (ago, ago))
    assert re.search(r"NO NEW STEP FOR 5m\d\ds", " ".join(shown(folder, once=True).split()))
    os.utime(folder / LOCK_FILE, (ago, ago))
    text = " ".join(shown(folder, once=True).split())
    assert "ended without a word (no sign of life for 3" in text and "NO NEW STEP" not in text
    (folder / "summary.json").write_text("{}")  # of an earlier end, with fewer steps
    (folder / LOCK_FILE).unlink()
    assert "does not train" in shown(folder, once=True)


def test_a_resume_takes_back_steps_and_changes_the_configuration(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run")
    append(folder / "events.jsonl", {"kind": "checkpoint", "step": 8, "time": NOW}, {"kind": "failure", "step": 10})
    run = Watched(folder)
    assert (run.last or {})["step"] == 10 and run.checkpoint == (8, NOW) and len(run.events) == 2
    (folder / "new").write_text("".join(f"{json.dumps(step(number))}\n" for number in range(1, 9)))
    (folder / "new").replace(folder / "metrics.jsonl")
    (folder / "config.yaml").write_text("steps: 20\nname: mine\n")
    append(folder / "metrics.jsonl", step(9, loss=7.0))
    run.refresh()
    assert run.steps == [*range(1, 10)] and run.losses[-1] == 7.0 and run.total_steps == 20 and run.skipped == 0
    assert run.seconds_left() == pytest.approx(11 * 2.5)


def test_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing is not there: name a run's directory"):
        watch(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"holds no metrics.jsonl"):
        watch(tmp_path)


def test_a_narrow_terminal_without_unicode_is_no_error(tmp_path: Path) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    watch(run_of(tmp_path / "run"), console=Console(file=file, width=40), once=True)
    file.flush()
    assert b"training loss" in raw.getvalue() and b"****" in raw.getvalue() and b"?" not in raw.getvalue()


def test_an_interrupt_that_is_lost_on_its_way_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python drops an exception that is raised in a destructor or a callback, a signal's as well."""
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        assert len(looks) == 1, "it went on"
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("fp8moe.report.watch.time.sleep", sleep)
    file = io.StringIO()
    watch(run_of(tmp_path / "run"), console=Console(file=file, width=100, force_terminal=True))
    assert looks and "step 10/100" in file.getvalue() and signal.getsignal(signal.SIGINT) == before

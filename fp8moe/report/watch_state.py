"""What `fp8moe watch` knows of a run: read from the files of its directory, and kept up to date line by line.

No torch is loaded and nothing but files is read, so a run can be watched from any machine that sees its directory.
Every file may be missing, of an older version, or end in half a line.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from pathlib import Path
from typing import Any

import yaml

from fp8moe.report.run_files import read_run
from fp8moe.report.watch_tail import Tail
from fp8moe.train.json_lines import EVENTS, EXPERT_LOAD, METRICS, RANKS

Record = dict[str, Any]
LOCK = "lock"  # of a live run (`train.run_lock`), whose modification time is its heartbeat
BEATS = 60.0  # seconds without a heartbeat after which a run counts as dead
RECENT = 20  # steps that speeds and the time left are means of
MOST_EVENTS = 8


class Watched:
    """The run in a directory, as of the last `refresh`.

    config: of the newest start; empty without one. last: the newest record of a step; None before the first. steps,
    losses and violations (MaxVio): of every step that has them. recent: the newest RECENT records. validations: of
    each, its step, loss and bits a byte. rewards, held_out: of fp8moe grpo, each with its step. skipped: steps that
    changed nothing. events: the newest. experts, ranks: the newest record of expert loads and of figures of the ranks.
    checkpoint: step and Unix time of the newest.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError or DataError, as `read_run` does, where `path` is no run's directory."""
        self.path = Path(path)
        if not self.path.is_dir() or not any((self.path / name).is_file() for name in ("config.yaml", METRICS)):
            read_run(self.path)  # which says why not
        self.config: Record = {}
        self._config_time = 0
        self._metrics, self._events = Tail(self.path / METRICS), Tail(self.path / EVENTS)
        self._experts, self._ranks = Tail(self.path / EXPERT_LOAD), Tail(self.path / RANKS)
        self._forget()
        self.events: deque[Record] = deque(maxlen=MOST_EVENTS)
        self._attempt: Record | None = None  # the newest event of how a start began or ended
        self.checkpoint: tuple[int, float] | None = None
        self.experts: Record | None = None
        self.ranks: Record | None = None
        self.refresh()

    def _forget(self) -> None:
        self.last: Record | None = None
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.violations: deque[float] = deque(maxlen=512)
        self.recent: deque[Record] = deque(maxlen=RECENT)
        self.validations: list[tuple[int, float, float | None]] = []
        self.rewards: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self.slowest: Record | None = None
        self.skipped = 0

    def refresh(self) -> None:
        """Read what the run has written since. Raises OSError where a file that is there can't be read."""
        self._read_config()
        is_replaced, records = self._metrics.look()
        if is_replaced:
            self._forget()
        for record in records:
            self._add_step(record)
        is_replaced, records = self._events.look()
        if is_replaced:
            self.events.clear()
            self.checkpoint = None
        for event in records:
            self._add_event(event)
        for record in self._experts.look()[1]:
            self.experts = record
        for record in self._ranks.look()[1]:
            self.ranks = record
        if self.checkpoint is None:
            self.checkpoint = _newest_checkpoint(self.path)

    def _add_step(self, record: Record) -> None:
        step = record.get("step")
        if not isinstance(step, int):
            return
        self.last = record
        self.recent.append(record)
        loss = record.get("loss")
        self.steps.append(step)
        self.losses.append(float("nan") if loss is None else loss)
        if record.get("max_violation") is not None:
            self.violations.append(record["max_violation"])
        if record.get("val_loss") is not None:
            self.validations.append((step, record["val_loss"], record.get("val_bits_per_byte")))
        for kept, name in ((self.rewards, "reward"), (self.held_out, "held_out_accuracy")):
            if record.get(name) is not None:
                kept.append((step, record[name]))
        if record.get("slowest_rank") is not None:
            self.slowest = record
        self.skipped += bool(record.get("skipped"))

    def _add_event(self, event: Record) -> None:
        kind = event.get("kind")
        if kind == "checkpoint":
            self.checkpoint = (event.get("step", 0), event.get("time", 0.0))
        if kind in ("start", "end", "failure", "preempted"):
            self._attempt = event
        self.events.append(event)

    def _read_config(self) -> None:
        path = self.path / "config.yaml"
        with contextlib.suppress(OSError, yaml.YAMLError):
            changed = path.stat().st_mtime_ns
            if changed != self._config_time:
                found = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
                self.config, self._config_time = found if isinstance(found, dict) else {}, changed

    @property
    def name(self) -> str:
        """The run's own name and its directory's, by which runs are told apart."""
        return f"{self.config['name']} ({self.path})" if self.config.get("name") else str(self.path)

    @property
    def total_steps(self) -> int | None:
        """Steps that the run is to do; None where no configuration tells."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    def state(self, now: float | None = None) -> str:
        """How the run is: trains, finished, failed, preempted, or ended without a word."""
        now = time.time() if now is None else now
        if (beat := _modified(self.path / LOCK)) is not None:
            return "trains" if now - beat < BEATS else f"ended without a word (no sign of life for {now - beat:,.0f} s)"
        kind = None if self._attempt is None else self._attempt["kind"]
        if kind == "failure":
            return "failed"
        if kind == "preempted" or (self.path / "preempted").exists():
            return "preempted, to be started again"
        done = self.last is not None and self.total_steps is not None and self.last["step"] >= self.total_steps
        if kind == "end" or (done and (self.path / "summary.json").exists()):
            return "finished"
        return "does not train"

    @property
    def is_finished(self) -> bool:
        """Whether all its steps are done, so that nothing will change any more."""
        return self.state() == "finished"

    def mean(self, *keys: str) -> float | None:
        """The mean of a figure of the recent steps; None where they have none."""
        found = []
        for record in self.recent:
            value: Any = record
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                found.append(float(value))
        return sum(found) / len(found) if found else None

    def seconds_left(self) -> float | None:
        """Seconds that the remaining steps take at the pace of the recent ones; None where it can't be told."""
        seconds = self.mean("seconds")
        if self.last is None or self.total_steps is None or seconds is None:
            return None
        waited = self.mean("time", "checkpoint") or 0.0
        return max(0, self.total_steps - self.last["step"]) * (seconds + waited)

    def seconds_since_step(self, now: float | None = None) -> float | None:
        """Seconds since the last step's line was written; None before the first."""
        written = _modified(self.path / METRICS)
        return None if written is None else max(0.0, (time.time() if now is None else now) - written)

    def slow_ranks(self, ratio: float = 1.1) -> list[tuple[int, float, float]]:
        """Ranks that work longer than `ratio` times the median of ranks with the same stages, the slowest first.

        -> (rank, seconds a step, times the median) of each.
        """
        seconds = (self.ranks or {}).get("working_seconds") or []
        dp = (self.config.get("parallel") or {}).get("dp") or len(seconds)
        found = []
        for rank, mine in enumerate(seconds):
            first = rank - rank % dp
            others = sorted(seconds[other] for other in range(first, min(first + dp, len(seconds))) if other != rank)
            median = others[len(others) // 2] if others else 0.0
            if median > 0 and mine >= ratio * median:
                found.append((rank, mine, mine / median))
        return sorted(found, key=lambda one: -one[2])


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _newest_checkpoint(path: Path) -> tuple[int, float] | None:
    """Step and time of the newest checkpoint in the directory, of a run that wrote no events."""
    found = []
    for folder in (path / "checkpoints").glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdigit() and (folder / "state.json").is_file():
            found.append((int(number), _modified(folder) or 0.0))
    return max(found, default=None)

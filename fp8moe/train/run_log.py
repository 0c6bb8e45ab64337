"""Output of a run: opening lines, progress, metrics, each rank's log file, and the summary at the end.

Rank 0 prints and writes; the other ranks collect the same figures and print nothing, so that every rank returns the
same summary and the loop does not ask which rank it is on. Progress is a bar on a terminal and plain lines elsewhere;
the log file holds every step's line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fp8moe.parallel.collectives import gather
from fp8moe.train import step_trace
from fp8moe.train.checkpoint import Location
from fp8moe.train.checkpoint.folder import step_of
from fp8moe.train.events import EventLog, started_as
from fp8moe.train.metric_names import flat
from fp8moe.train.metrics import MetricsWriter, StepReport
from fp8moe.train.opening import memory_of_largest_rank, messages_beside_compute, opening, other_tokenizer
from fp8moe.train.progress import ProgressDisplay
from fp8moe.train.rollback import Rollback
from fp8moe.train.run import Run
from fp8moe.train.step_trace import StepFigures
from fp8moe.train.stragglers import Slowest
from fp8moe.train.summary import LOSS_STEPS, Summary, balance, table, write_summary
from fp8moe.train.validation import ValidationReport

REPORT_SECONDS = 2.0  # a step is reported no later than this after its update


class LogFile(logging.FileHandler):
    """A log file that never ends a run: lines that a full disk has no room for are lost."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Pass over a line that can't be written."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file, whatever it has not written."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def log_file(run_dir: Path, rank: int) -> Iterator[None]:
    """Write this rank's log messages and warnings to `run_dir/logs/rank-N.log` while the block runs."""
    handler = LogFile(run_dir / "logs" / f"rank-{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("fp8moe")
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()


class RunLogger:
    """Prints and writes what a run reports, from its start to its summary. `started` is a perf_counter reading."""

    def __init__(self, run: Run, started: float) -> None:
        config = run.config
        self._run, self._started = run, started
        self._log = logging.getLogger(__name__)
        self._display = ProgressDisplay(config.steps, run.step, config.logging.every, silent=not run.is_first)
        self._writer = (
            MetricsWriter(run.run_dir, config.logging, config.name, dataclasses.asdict(config), run.step, self.warn)
            if run.is_first
            else None
        )
        self._events = EventLog(run.run_dir, run.step) if run.is_first else None
        self._expected: StepReport | None = None  # of a step whose line is not written yet
        self._written, self._writing = run.step, threading.Lock()  # the step of the last line
        self._losses: deque[float] = deque(maxlen=LOSS_STEPS)
        self._first_step = run.step + 1  # of this attempt
        self._steps: list[tuple[int, float]] = []  # (tokens, seconds) of each
        self._fp8_shares: tuple[float | None, float | None] = (None, None)
        self._extra: dict[str, Any] = {}  # of the next record
        self._rewards: deque[float] = deque(maxlen=LOSS_STEPS)  # mean of each batch of rollouts
        self._held_out_accuracy: float | None = None
        self._has_spread = True  # some group of the last batch of rollouts had completions that scored differently
        self._validation: ValidationReport | None = None
        self._averaged: ValidationReport | None = None
        self.note_event("start", *started_as(run))
        self._describe(opening(run))
        self._describe(memory_of_largest_rank(run))
        for sentence in (other_tokenizer(run), messages_beside_compute(run)) if run.is_first else ():
            if sentence is not None:
                self.warn(sentence)

    @property
    def num_steps(self) -> int:
        """Steps of this attempt so far."""
        return len(self._steps)

    def note_saved(self, checkpoints: Sequence[Location], failures: Sequence[Exception] = ()) -> None:
        """Report checkpoints that have been completed, and those that training goes on without."""
        for error in failures:
            self.print(f"{error}; training goes on without it (checkpoint.on_failure=continue)")
        for path in checkpoints:
            self._log.info("checkpoint %s is complete", path)
            if self._writer is not None:
                self._writer.note_checkpoint(step_of(path))
            self.note_event("checkpoint", f"{path} is complete", at=step_of(path))

    def note_event(self, kind: str, text: str, more: Mapping[str, Any] | None = None, *, at: int | None = None) -> None:
        """Write an event (`train.events`) of step `at`, else of the run's present one."""
        if self._events is not None:
            self._events.note(kind, self._run.step if at is None else at, text, **(more or {}))

    def warn(self, sentence: str, kind: str = "warning") -> None:
        """Log a warning, show it, and note it as an event of that kind."""
        self._log.warning("%s", sentence)
        self._display.print(sentence)
        self.note_event(kind, sentence)

    def note_slowest(self, slowest: Slowest) -> None:
        """Note a comparison of the ranks in the record of the step; show it where one is a straggler."""
        self._extra |= {"slowest_rank": slowest.rank, "slowest_rank_seconds_behind": slowest.behind}
        if slowest.is_straggler:
            self.warn(str(slowest), "straggler")

    def add_figures(self, figures: Mapping[str, Any]) -> None:
        """Add figures to the record of the step that is noted next, and show them as often as the step."""
        self._extra |= figures
        if "reward" in figures:
            self._note_rewards(figures)
        self._held_out_accuracy = figures.get("held_out_accuracy", self._held_out_accuracy)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in flat(figures).items())
        if self._run.step % self._run.config.logging.every == 0 or "held_out_accuracy" in figures:
            self.print(f"  {numbers}")
        else:
            self._log.info("%s", numbers)

    def _note_rewards(self, figures: Mapping[str, Any]) -> None:
        """Keep a batch's mean reward; warn at the first of batches in a row that give no gradient."""
        self._rewards.append(figures["reward"])
        drawn, had_spread = figures["groups_drawn"], self._has_spread
        self._has_spread = figures["groups_alike"] < drawn
        if had_spread and not self._has_spread:
            self.warn(
                f"batch {figures['rollouts']} of rollouts gives no gradient: within each of its {drawn} groups all "
                f"completions scored alike (mean reward {figures['reward']:.4g}): use easier or harder problems, more "
                "grpo.samples, a higher grpo.temperature, or a model that is sometimes right"
            )

    def note_rollback(self, rollback: Rollback) -> None:
        """Report a rollback; records of the steps that it undoes go, and the next one says what they were."""
        self.print(str(rollback))
        self._losses.clear()
        self._rewards.clear()
        self._extra |= {"rolled_back_from": rollback.step, "passed_over": [rollback.first, rollback.stop - 1]}
        if self._writer is not None and self._events is not None:
            self._writer.forget_after(self._run.step)
            self._events.forget_after(self._run.step)
        self.note_event("rollback", str(rollback), at=rollback.step)
        with self._writing:
            self._expected, self._written = None, self._run.step

    def expect(self, report: StepReport) -> None:
        """A step was done that `note` will report."""
        self._expected = report

    def write_expected(self, step: int) -> None:
        """Write the line of `step` if `note` has not; for another thread, in which a run is stopped between the two."""
        deadline = time.monotonic() + REPORT_SECONDS
        while (self._expected is None or self._expected.step < step) and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._expected is not None and self._expected.step == step:
            self._write(self._expected, {})

    def _write(self, report: StepReport, extra: Mapping[str, float | None]) -> None:
        with self._writing:
            if self._writer is not None and report.step > self._written:
                guard = self._run.guard
                totals = {"steps": self._run.config.steps, "skipped_steps": guard.skipped, "rollbacks": guard.rollbacks}
                self._writer.write(report, extra, totals)
                self._written = report.step

    def note(
        self, report: StepReport, validation: ValidationReport | None, averaged: ValidationReport | None = None
    ) -> None:
        """Report one step, with the validations that followed it, if any: of the weights, and of their average.

        Its line is written before a checkpoint of the step is begun, so that no checkpoint is without it.
        """
        extra, self._extra = self._extra, {}
        if validation is not None:
            self._validation = validation
            extra |= {"val_loss": validation.loss, "val_bits_per_byte": validation.bits_per_byte}
        if averaged is not None:
            self._averaged = averaged
            extra |= {"val_loss_ema": averaged.loss, "val_bits_per_byte_ema": averaged.bits_per_byte}
        self._write(report, extra)
        self._display.show(report)
        self._log.info("%s", self._display.line(report))
        for of, scored in (("", validation), (" of the averaged weights", averaged)):
            if scored is not None:
                bits = "" if scored.bits_per_byte is None else f", {scored.bits_per_byte:.4f} bits a byte"
                text = f"validation{of} after step {report.step}: loss {scored.loss:.4f}{bits}"
                self.print(f"{text}, mean of {scored.tokens:,} tokens")
        if report.skipped_samples is None:
            self._losses.append(report.loss)
        else:
            first, last = report.skipped_samples
            self.note_event("skipped", f"step {report.step} was skipped, samples {first} to {last}")
        self._steps.append((report.tokens, report.seconds))
        if report.fp8_saturated_share is not None:
            self._fp8_shares = (report.fp8_saturated_share, report.fp8_underflow_share)

    def finish(self, trace: StepFigures | None) -> Summary:
        """Write and print the summary of a run that has done all its steps."""
        run, validation = self._run, self._validation
        assert validation is not None, "the last step is always validated"
        violations, shares = balance(all_loads(run))
        paced = self._steps[1:] or self._steps  # the first step compiles, allocates and opens connections
        summary = Summary(
            loss=sum(self._losses) / len(self._losses),  # there is one: the last step was not skipped
            loss_steps=len(self._losses),
            val_loss=validation.loss,
            val_loss_ema=None if self._averaged is None else self._averaged.loss,
            val_bits_per_byte=validation.bits_per_byte,
            byte_bigram_bits_per_byte=run.data.bigram_bits_per_byte,
            tokens_per_second=sum(tokens for tokens, _ in paced) / sum(seconds for _, seconds in paced),
            max_violation=max(violations.values(), default=None),
            max_violation_by_layer=violations,
            expert_token_shares=shares,
            fp8_saturated_share=self._fp8_shares[0],
            fp8_underflow_share=self._fp8_shares[1],
            steps=run.step,
            first_step=self._first_step,
            consumed_samples=run.sampler.consumed,
            seq_len=run.config.seq_len,
            skipped_steps=run.guard.skipped,
            rollbacks=run.guard.rollbacks,
            tokens=sum(tokens for tokens, _ in self._steps),
            wall_seconds=time.perf_counter() - self._started,
            world_size=run.mesh.world_size,
            precision=run.config.precision.mode.value,
            run_dir=str(run.run_dir),
            trace=trace,
            reward=sum(self._rewards) / len(self._rewards) if self._rewards else None,
            reward_batches=len(self._rewards),
            held_out_accuracy=self._held_out_accuracy,
        )
        if self._writer is not None:
            write_summary(summary, run.run_dir / "summary.json")
            self._writer.close(dataclasses.asdict(summary))
            self._writer = None
        if trace is not None:
            self.note_event(
                "trace", f"step {trace.step} was recorded", {"figures": dataclasses.asdict(trace)}, at=trace.step
            )
        self.note_event("end", f"the run has done its {run.step} steps")
        self._display.close()
        if trace is not None:
            self.print("\n" + step_trace.table(trace, run.run_dir / step_trace.TRACE))
        self._describe("\n" + table(summary))
        return summary

    def close(self) -> None:
        """Close files and the bar after an error; after `finish` it does nothing."""
        self._display.close()
        if self._writer is not None:
            self._writer.close()

    def print(self, text: str) -> None:
        """Print on rank 0 and log on every rank."""
        self._display.print(text)
        self._log_lines(text)

    def _describe(self, text: str) -> None:
        """The same of what a run is and ends with, which logging.summary=false logs alone."""
        if self._run.config.logging.summary:
            self._display.print(text)
        self._log_lines(text)

    def _log_lines(self, text: str) -> None:
        for line in text.splitlines():
            self._log.info("%s", line)


def all_loads(run: Run, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tokens that each expert has had, by router name, of all stages in the order of the model; those since `before`.

    Collective over pp.
    """
    mine = {name: (load if before is None else load - before[name]).cpu() for name, load in run.loads.items()}
    loads = {name: load for part in gather(mine, run.mesh.pp_group) for name, load in part.items()}
    return {name: loads[name] for name in sorted(loads, key=_block_number)}


def _block_number(name: str) -> tuple[bool, int]:
    _, number, *_ = name.split(".")
    return (False, int(number)) if number.isdigit() else (True, 0)  # the MTP module's block is the last

"""Progress of a run on the terminal: a bar, or plain lines where there is none.

Each figure says what it counts: those of a step are of that step alone, the time left is by the pace of the last steps.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from fp8moe.train.durations import duration
from fp8moe.train.metrics import StepReport

PACE_STEPS = 20  # the time left is estimated from so many last steps


class ProgressDisplay:
    """Progress from `done` to `steps`: a bar on a terminal, else a line every `every` steps; nothing if `silent`."""

    def __init__(self, steps: int, done: int, every: int, *, silent: bool = False) -> None:
        self._steps, self._every, self._silent = steps, every, silent
        self._first = True
        self._moments: deque[tuple[float, int]] = deque([(time.monotonic(), done)], maxlen=PACE_STEPS + 1)
        self._bar: Any = None
        if not silent and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)

    def show(self, report: StepReport) -> None:
        """Show a finished step."""
        self._moments.append((time.monotonic(), report.step))
        if self._silent:
            return
        if self._bar is not None:
            self._bar.update(report.step - self._bar.n)
            self._bar.set_postfix_str(
                f"last step: loss {report.loss:.3f}, {report.tokens_per_second:,.0f} tokens/s", refresh=False
            )
        elif self._first or report.step % self._every == 0 or report.step == self._steps:
            print(self.line(report), flush=True)
        self._first = False

    def line(self, report: StepReport) -> str:
        """The plain line of a step: its own figures, then the time left."""
        text = (
            f"step {report.step:>{len(str(self._steps))}}/{self._steps}  loss {report.loss:.4f}  "
            f"grad norm {report.grad_norm:.2f}  lr {report.lr:.2e}  {report.tokens_per_second:,.0f} tokens/s in this "
            f"step  {duration(self.seconds_left())} left {self._pace()}"
        )
        if report.skipped_samples is None:
            return text
        first, last = report.skipped_samples
        return f"{text}  SKIPPED, samples {first} to {last}"

    def seconds_left(self) -> float:
        """Seconds that the remaining steps take at the pace of the recent ones."""
        (start, first), (now, last) = self._moments[0], self._moments[-1]
        return (now - start) / max(last - first, 1) * (self._steps - last)

    def _pace(self) -> str:
        """What the time left is estimated from."""
        steps = self._moments[-1][1] - self._moments[0][1]
        return f"at the pace of the last {steps} steps" if steps > 1 else "at the pace of 1 step"

    def print(self, text: str) -> None:
        """Print text between the steps, such as a validation's result, without breaking the bar."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Close the bar; nothing for plain lines."""
        if self._bar is not None:
            self._bar.close()

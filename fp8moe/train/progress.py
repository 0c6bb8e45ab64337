"""What the terminal shows while a run goes on: a bar where there is a terminal, plain lines where there is none.

One rank shows it. The pace is that of the recent steps, not of the whole run: the first step compiles and warms up, and
a bar that counts it promises too much for a long time.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from fp8moe.train.metrics import StepReport

PACE_STEPS = 20


def duration(seconds: float) -> str:
    """Seconds as 45s, 3m20s or 5h07m."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole // 60 % 60:02d}m"


class ProgressDisplay:
    """Shows the steps from `done` to `steps`; `every` is the distance of plain lines. A silent one shows nothing."""

    def __init__(self, steps: int, done: int, every: int, *, silent: bool = False) -> None:
        self._steps, self._every, self._silent = steps, every, silent
        self._first = True
        self._moments: deque[tuple[float, int]] = deque([(time.monotonic(), done)], maxlen=PACE_STEPS + 1)
        self._bar: Any = None
        if not silent and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)

    def show(self, report: StepReport) -> None:
        """Report a finished step."""
        self._moments.append((time.monotonic(), report.step))
        if self._silent:
            return
        if self._bar is not None:
            self._bar.update(report.step - self._bar.n)
            self._bar.set_postfix_str(
                f"loss {report.loss:.3f}, {report.tokens_per_second:,.0f} tokens/s", refresh=False
            )
        elif self._first or report.step % self._every == 0 or report.step == self._steps:
            print(self.line(report), flush=True)
        self._first = False

    def line(self, report: StepReport) -> str:
        """The plain line of a step."""
        text = (
            f"step {report.step:>{len(str(self._steps))}}/{self._steps}  loss {report.loss:.4f}  "
            f"grad norm {report.grad_norm:.2f}  lr {report.lr:.2e}  {report.tokens_per_second:,.0f} tokens/s  "
            f"{duration(self.seconds_left())} left"
        )
        return text + ("  SKIPPED: not finite" if report.skipped else "")

    def seconds_left(self) -> float:
        """At the pace of the recent steps."""
        (start, first), (now, last) = self._moments[0], self._moments[-1]
        return (now - start) / max(last - first, 1) * (self._steps - last)

    def say(self, text: str) -> None:
        """A line between the steps, such as a validation's result, without breaking the bar."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

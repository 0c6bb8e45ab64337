"""Guard: decides whether a step may update the weights, and whether training may go on from where it is.

A step whose loss, gradient norm or router bias is not finite is skipped: it moves neither weights, moments nor router
bias, and its samples count as consumed. The decision is taken on values that were reduced over every rank, so all ranks
take the same one. More than `limit` such steps in a row, a tensor of the state that is not finite, a validation loss
that is not, and, where asked for, a loss far above the last ones are a `problem`: `train.rollback` then goes back to
the last checkpoint, or ends the run.

A spike is judged against the mean and the standard deviation of the last 128 losses of steps that counted, once there
are 128 of this attempt; a run that resumes collects them anew. Refused: a moving average, whose deviation would lag
behind a falling loss in the same way and which needs a constant more.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Literal

from fp8moe.errors import NonFiniteError
from fp8moe.limits import COUNT, Range, check_fields

WINDOW = 128  # losses that a spike is judged by
LEAST_DEVIATION = 1e-3  # of their mean: with a constant loss the smallest change would be a spike


@dataclass(frozen=True)
class GuardConfig:
    """What follows on a problem, and what else is looked for."""

    # what a problem leads to: back to the newest whole checkpoint, behind the data that was in use (rollback),
    # or stop
    then: Literal["rollback", "stop"] = "rollback"
    max_rollbacks: int = 2  # to one checkpoint, before the run ends
    # a loss so many standard deviations above the mean of the last 128 is a problem; None: not looked for
    spike_sigma: float | None = None
    consistency_every: int = 0  # steps between comparisons of the replicas' weights; 0: none

    def __post_init__(self) -> None:
        check_fields(
            self,
            "guard",
            max_rollbacks=Range(least=1),
            spike_sigma=Range(above=0, use="use 6.0, or null to look for none"),
            consistency_every=COUNT,
        )

    def consistency_is_due(self, step: int) -> bool:
        """Whether replicas are compared after step number `step` (from 1)."""
        return self.consistency_every > 0 and step % self.consistency_every == 0


class Guard:
    """Counts skipped steps and allows `limit` of them in a row; with 0 the first one is a problem.

    skipped: steps skipped in the whole run. in_a_row: those since the last step that counted. rollbacks: of this
    attempt. problem: a clause on why training can't go on from here; None where it can.
    """

    def __init__(self, limit: int, config: GuardConfig = GuardConfig()) -> None:
        self.limit, self.config = limit, config
        self.skipped = self.in_a_row = self.rollbacks = 0
        self.problem: str | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._returned_to, self._returns = -1, 0

    def accepts(self, step: int, loss: float, grad_norm: float, wrong: str | None = None) -> bool:
        """Whether step number `step` may update the weights; notes a problem where there is one.

        wrong: a clause on what of the state was not finite in this step.
        """
        if wrong is not None:
            self.problem = f"{wrong} in step {step}"
        elif not (math.isfinite(loss) and math.isfinite(grad_norm)):
            if self.in_a_row >= self.limit:
                number = self.in_a_row + 1
                were = "1 step was" if number == 1 else f"{number} consecutive steps were"
                self.problem = (
                    f"{were} not finite; max_skipped_steps allows {self.limit} (step {step}: loss {loss}, gradient "
                    f"norm {grad_norm})"
                )
        elif not self._is_spike(step, loss):
            self.in_a_row = 0
            self._losses.append(loss)
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    def check_rates(self, step: int, lr: float, bias_gamma: float) -> None:
        """Raise NonFiniteError unless the numbers that step `step` would update by are finite; no rollback cures it."""
        for name, value, key in (
            ("learning rate", lr, "optimizer.schedule"),
            ("router bias's step", bias_gamma, "model.router.bias_gamma"),
        ):
            if not math.isfinite(value):
                raise NonFiniteError(f"the {name} of step {step} is {value} and must be finite: correct {key}")

    def may_return_to(self, step: int) -> bool:
        """Whether another rollback to the checkpoint of that step is allowed."""
        return step != self._returned_to or self._returns < self.config.max_rollbacks

    def returned_to(self, step: int) -> None:
        """Note a rollback to the checkpoint of that step: there is no problem, and nothing was skipped, since."""
        self._returns = self._returns + 1 if step == self._returned_to else 1
        self._returned_to = step
        self.rollbacks += 1
        self.in_a_row, self.problem = 0, None

    def _is_spike(self, step: int, loss: float) -> bool:
        sigma = self.config.spike_sigma
        if sigma is None or len(self._losses) < WINDOW:
            return False
        mean = statistics.fmean(self._losses)
        deviation = max(statistics.pstdev(self._losses, mean), LEAST_DEVIATION * abs(mean))
        if loss <= mean + sigma * deviation:
            return False
        self.problem = (
            f"the loss of step {step}, {loss:.4f}, is {(loss - mean) / deviation:.1f} standard deviations above the "
            f"mean of the last {WINDOW}, {mean:.4f}; guard.spike_sigma allows {sigma}"
        )
        return True

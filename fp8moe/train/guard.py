"""Guard: a step whose loss or gradient norm is not a finite number is skipped, a bounded number of times in a row.

The decision is taken on values that were reduced over every rank, so all ranks take the same one. A skipped step moves
neither weights, moments nor router bias; its samples count as consumed. A run that only skips is broken: past the
bound it ends, with its last complete checkpoint untouched.
"""

from __future__ import annotations

import math

from fp8moe.errors import NonFiniteError


class Guard:
    """Counts skipped steps and allows `limit` of them in a row; with 0 the first one ends the run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0

    def accepts(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether step number `step` may update the weights. Raises NonFiniteError past the bound."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            number = "1 step was" if self.in_a_row == 1 else f"{self.in_a_row} consecutive steps were"
            raise NonFiniteError(
                f"{number} not finite; max_skipped_steps allows {self.limit} (step {step}: loss {loss}, gradient norm "
                f"{grad_norm}): resume from the last checkpoint with a lower optimizer.schedule.peak, or try "
                "precision=bf16"
            )
        return False

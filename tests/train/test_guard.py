"""Steps that are not finite: skipped up to a bound in a row, then the run ends."""

from __future__ import annotations

import math

import pytest

from fp8moe.errors import NonFiniteError
from fp8moe.train.guard import Guard


def test_a_bounded_number_in_a_row() -> None:
    guard = Guard(2)
    assert guard.accepts(1, 2.0, 1.0)
    assert not guard.accepts(2, math.nan, 1.0)
    assert not guard.accepts(3, 2.0, math.inf)
    assert guard.accepts(4, 2.0, 1.0)  # the count starts again
    assert not guard.accepts(5, math.inf, 1.0)
    assert not guard.accepts(6, 2.0, math.nan)
    rule = r"3 consecutive steps were not finite; max_skipped_steps allows 2 \(step 7: loss 2.0, gradient norm nan\)"
    with pytest.raises(NonFiniteError, match=rule) as caught:
        guard.accepts(7, 2.0, math.nan)
    assert caught.value.exit_code == 5
    assert guard.skipped == 5


def test_zero_allows_none() -> None:
    with pytest.raises(NonFiniteError, match=r"^1 step was not finite; max_skipped_steps allows 0 "):
        Guard(0).accepts(1, math.nan, 1.0)

"""Steps that are not finite: borne up to a bound in a row, then the end."""

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
    assert guard.accepts(4, 2.0, 1.0)  # forgives
    assert not guard.accepts(5, math.inf, 1.0)
    assert not guard.accepts(6, 2.0, math.nan)
    with pytest.raises(NonFiniteError, match=r"step 7: .*3 times in a row.*max_skipped_steps=2") as caught:
        guard.accepts(7, 2.0, math.nan)
    assert caught.value.exit_code == 5
    assert guard.skipped == 5


def test_zero_bears_none() -> None:
    with pytest.raises(NonFiniteError):
        Guard(0).accepts(1, math.nan, 1.0)

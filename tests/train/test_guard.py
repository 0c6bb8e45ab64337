"""Steps that are not finite and losses that leave their course: skipped up to a bound, then a problem."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fp8moe.errors import NonFiniteError
from fp8moe.train.finite_state import described, not_finite
from fp8moe.train.guard import Guard, GuardConfig


def test_a_bounded_number_in_a_row() -> None:
    guard = Guard(2)
    assert guard.accepts(1, 2.0, 1.0)
    assert not guard.accepts(2, math.nan, 1.0)
    assert not guard.accepts(3, 2.0, math.inf)
    assert guard.accepts(4, 2.0, 1.0)  # the count starts again
    assert not guard.accepts(5, math.inf, 1.0)
    assert not guard.accepts(6, 2.0, math.nan)
    assert guard.problem is None and guard.in_a_row == 2
    assert not guard.accepts(7, 2.0, math.nan)
    assert guard.problem == (
        "3 consecutive steps were not finite; max_skipped_steps allows 2 (step 7: loss 2.0, gradient norm nan)"
    )
    assert (guard.skipped, guard.in_a_row) == (5, 3)


def test_zero_allows_none_and_a_tensor_is_a_problem_at_once() -> None:
    guard = Guard(0)
    assert not guard.accepts(1, math.nan, 1.0)
    assert guard.problem is not None and guard.problem.startswith("1 step was not finite; max_skipped_steps allows 0 ")
    guard = Guard(9)
    assert not guard.accepts(3, 2.0, 1.0, "bias.a is not finite on rank 1")
    assert guard.problem == "bias.a is not finite on rank 1 in step 3" and guard.skipped == guard.in_a_row == 1


def test_rollbacks_to_one_checkpoint_are_bounded() -> None:
    guard = Guard(0, GuardConfig(max_rollbacks=2))
    for step in (4, 4, 6):
        guard.accepts(8, math.nan, 1.0)
        assert guard.may_return_to(step)
        guard.returned_to(step)
        assert guard.problem is None and guard.in_a_row == 0
    assert guard.may_return_to(6)
    guard.returned_to(6)
    assert not guard.may_return_to(6) and guard.may_return_to(8)
    assert (guard.rollbacks, guard.skipped) == (4, 3)


@pytest.mark.parametrize(("rates", "named"), [((math.nan, 1e-3), "learning rate"), ((1e-3, math.inf), "bias's step")])
def test_rates_that_are_not_finite_end_the_run(rates: tuple[float, float], named: str) -> None:
    Guard(1).check_rates(3, 0.0, 0.0)
    with pytest.raises(NonFiniteError, match=rf"{named} of step 3 is (nan|inf) and must be finite") as caught:
        Guard(1).check_rates(3, *rates)
    assert caught.value.exit_code == 5


def test_a_spike_is_six_deviations_above_the_last_128_losses() -> None:
    noise = random.Random(0)
    guard = Guard(3, GuardConfig(spike_sigma=6.0))
    assert guard.accepts(0, 99.0, 1.0)  # it leaves the window with the 129th loss
    losses = [2.0 + noise.gauss(0.0, 0.1) for _ in range(128)]
    for step, loss in enumerate(losses):
        assert guard.accepts(step, loss, 1.0)
    mean = sum(losses) / 128
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 128)
    assert not guard.accepts(128, mean + 6.01 * deviation, 1.0)
    assert guard.problem is not None and "is 6.0 standard deviations above the mean of the last 128" in guard.problem
    guard.returned_to(1)
    assert not guard.accepts(128, mean + 6.01 * deviation, 1.0)  # the spike itself is not among the losses
    guard.returned_to(1)
    assert guard.accepts(128, mean + 5.99 * deviation, 1.0)
    assert guard.accepts(129, mean - 9 * deviation, 1.0)  # downwards is welcome
    assert guard.problem is None

    early, off, steady = Guard(3, GuardConfig(spike_sigma=6.0)), Guard(3), Guard(3, GuardConfig(spike_sigma=6.0))
    for step in range(127):
        assert early.accepts(step, 2.0, 1.0) and off.accepts(step, 2.0, 1.0)
    assert early.accepts(127, 100.0, 1.0)
    assert off.accepts(127, 2.0, 1.0) and off.accepts(128, 100.0, 1.0)
    for step in range(128):
        assert steady.accepts(step, 2.0, 1.0)
    assert steady.accepts(128, 2.01, 1.0) and not steady.accepts(129, 2.1, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_number_among_many_is_found(bad: float, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    good = torch.full((1000,), largest, dtype=dtype)  # whose sum is not finite
    wrong = good.clone()
    wrong[617] = bad
    tensors = {"a": [good, -good], "b": [good, wrong], "loads": [torch.ones(3, dtype=torch.int64)], "c": [good[:0]]}
    assert not_finite(tensors) == ["b"]
    assert not_finite({"c": [good[:0]]}) == []


def test_a_tensor_is_named_with_its_ranks() -> None:
    assert described([[], []]) is None
    assert described([[], ["a"]]) == "a is not finite on rank 1"
    assert described([["a"], [], ["a", "b"]]) == "a is not finite on ranks 0, 2, nor is 1 other tensor,"
    assert described([["a", "b", "c"]]) == "a is not finite on rank 0, nor are 2 other tensors,"


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        *(("max_rollbacks", 0, "at least 1"), ("consistency_every", -1, "at least 0")),
        *(("spike_sigma", bad, "above 0") for bad in (0.0, -1.0)),
        *(
            ("spike_sigma", math.nan, "a number, above 0 and at most 2147483647"),
            ("spike_sigma", math.inf, "at most 2147483647"),
        ),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"guard\.{setting}={value} must be {rule}: use"):
        GuardConfig(**{setting: value})  # type: ignore[arg-type]

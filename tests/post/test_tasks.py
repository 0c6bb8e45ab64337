"""Tasks: every worked step is true, answers are found, held-out problems are apart, and draws repeat."""

import re

import pytest

from fp8moe.errors import ConfigError
from fp8moe.post.tasks import problems
from fp8moe.post.verify.answer import final_answer


@pytest.mark.parametrize("digits", [1, 2, 5])
def test_every_step_of_an_addition_is_true_and_leads_to_its_answer(digits):
    for problem in problems("addition", 30, 0, digits=digits):
        first, second = map(int, re.findall(r"\d+", problem.prompt))
        *steps, last = problem.solution.splitlines()
        written, carry = "", 0
        for step in steps:
            left, total = step.split("=")
            numbers = [int(one) for one in left.split("+")]
            assert sum(numbers) == int(total)
            assert (numbers[2:] or [0]) == [carry]
            written, carry = f"{int(total) % 10}{written}", int(total) // 10
        assert int(f"{carry}{written}") == first + second == int(problem.answer)
        assert max(first, second) < 10**digits
        assert last == f"Answer: {problem.answer}"
        assert final_answer(problem.solution) == problem.answer


@pytest.mark.parametrize("digits", [2, 4])
def test_held_out_problems_are_in_no_training_set(digits):
    held_out = {one.prompt for one in problems("addition", 300, 1, digits=digits, held_out=True)}
    training = {one.prompt for seed in (1, 2) for one in problems("addition", 2000, seed, digits=digits)}
    assert len(held_out) == 300
    assert not held_out & training


def test_draws_repeat_differ_by_seed_and_hold_no_problem_twice():
    first = problems("addition", 500, 7, digits=3)
    assert first == problems("addition", 500, 7, digits=3)
    assert first != problems("addition", 500, 8, digits=3)
    assert len({one.prompt for one in first}) == 500


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("adition", 1, 0, 2), "task 'adition' is not one of addition: use addition"),
        (("addition", 1, 0, 0), "digits=0 must be from 1 to 12: use 1"),
        (("addition", 100, 0, 1), "there are 9\\d: use 0 to 9\\d, or more digits"),
        (("addition", 600_000, 0, 3), "there are 500000: use 0 to 500000, or more digits"),
    ],
)
def test_what_there_is_not_is_refused(arguments, sentence):
    *positional, digits = arguments
    with pytest.raises(ConfigError, match=sentence):
        problems(*positional, digits=digits)

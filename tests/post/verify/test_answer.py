"""The final answer of a text, and when two are equal; cases from published solutions' styles."""

from __future__ import annotations

import pytest

from fp8moe.post.tasks import problems
from fp8moe.post.verify.answer import final_answer, same_answer, verify_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{1} then \\boxed{\\frac{3}{4}}", "\\frac{3}{4}"),
        ("\\boxed{\\text{a } \\{1\\}}", "\\text{a } \\{1\\}"),
        ("Answer: 7\nwait\n**Answer:** 8", "8"),
        ("  > **Final Answer: 12**  \n", "12"),
        ("#### 1,234", "1,234"),
        ("\\boxed{3}\nAnswer: 4", "4"),
        ("Answer: 4\n\\boxed{3}", "3"),
        ("Answer: \\boxed{5}", "5"),
        ("The answer is 5", None),
        ("\\boxed{5", None),
        ("Answer:\n", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_that_is_marked(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7", "7.0"), ("14/2", "7"), ("\\frac{1}{2}", "0.5"), ("-\\dfrac{1}{2}", "-1/2"), ("1,000", "1000"),
        ("$5", "5.00"), ("50\\%", "50"), ("1e3", "1000"), ("x + 1", "x+1"), ("\\text{Yes}.", "yes"), ("+3", "3"),
        ("0.1", "1/10"), ("1,234,567.5", "1234567.5"), (" 12. ", "12"),
    ],
)  # fmt: skip
def test_equal_answers(one: str, other: str) -> None:
    assert same_answer(one, other) and same_answer(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [("7", "8"), ("1/3", "0.333"), ("1,2", "12"), ("x", "y"), ("1/0", "1"), ("nan", "0"), ("inf", "1"), ("12", "1 3"),
     ("1e999999999", "2"), ("9" * 5000, "1"), ("-1", "1"), ("10000000000000001", "10000000000000000")],
)  # fmt: skip
def test_different_answers(one: str, other: str) -> None:
    assert not same_answer(one, other) and not same_answer(other, one)


def test_verdicts_say_why() -> None:
    assert verify_answer("#### 12", {"answer": 12}).ok
    assert verify_answer("\\boxed{0.75}", {"answer": "three of four: \\frac{3}{4}\n#### 3/4"}).ok
    wrong = verify_answer("Answer: 13", {"answer": "12"})
    assert not wrong.ok and wrong.reason == "it answers 13 and not 12"
    assert "no final answer" in verify_answer("12", {"answer": "12"}).reason


def test_solutions_of_a_task_are_right_and_their_neighbours_wrong() -> None:
    for problem in problems("addition", 50, 0, digits=3):
        assert verify_answer(problem.solution, {"answer": problem.answer}).ok
        assert not verify_answer(problem.solution, {"answer": str(int(problem.answer) + 1)}).ok

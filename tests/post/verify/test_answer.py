"""The final answer of a text, and when two are equal; cases from published solutions' styles."""

from __future__ import annotations

import time

import pytest

from fp8moe.post.rewards import REWARDS
from fp8moe.post.tasks import Problem, problems
from fp8moe.post.verify.answer import final_answer, same_answer, verify_answer
from fp8moe.post.verify.code import last_block
from fp8moe.post.verify.form import language, repetition, verify_ended


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
        ("Answer:\n12", None),
        ("The Answer: 3", None),
        ("Answer: 3\r\nno,\r\nAnswer:  -14 \r\n", "-14"),
        ("<think>5 or \\boxed{6}</think> <answer> 9 </answer>", "9"),
        ("<answer>9</answer>\nAnswer: 8", "8"),
        ("Answer: 8\n<answer>9</answer>", "9"),
        ("<answer>1</answer> <answer>2\n</answer> </answer>", "2"),
        ("<answer>7</answer><answer> </answer>\\boxed{}\n####\nAnswer: **", "7"),
        ("<answer>\nAnswer: 5</answer>", "5"),
        ("<answer>it is \\boxed{4}</answer>", "4"),
        ("Answer: <answer>3</answer>.", "3"),
        ("<answer>9", None),
        ("</answer>9<answer>", None),
        ("} \\boxed{{2} and \\boxed{1", None),
        ("} \\boxed{{2}} } \\boxed{1", "{2}"),
        ("\\boxed{3 \\boxed{4} 5}", "4"),
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
     ("1e999999999", "2"), ("1e9_9_9_9_9_9_9_9_9", "2"), ("1/2/3", "3/2"), ("1/1e9999", "0"), ("9" * 5000, "1"),
     ("-1", "1"), ("10000000000000001", "10000000000000000")],
)  # fmt: skip
def test_different_answers(one: str, other: str) -> None:
    assert not same_answer(one, other) and not same_answer(other, one)


MANY = 100_000  # characters
ADVERSE = {
    "lines": "Answer: 1\n" * (MANY // 10),
    "spaces in an answer": "Answer: 1" + " " * MANY + "x",
    "stars in an answer": "Answer: 1" + "*" * MANY + "x",
    "stars before": "*" * MANY + "answer",
    "empty answers": "answer \n" * (MANY // 8),
    "boxes that do not close": "\\boxed{" * (MANY // 7),
    "boxes in boxes": "\\boxed{" * (MANY // 8) + "5" + "}" * (MANY // 8),
    "boxes of nothing": "\\boxed{ }" * (MANY // 9) + "{" * MANY,
    "a box far from its brace": ("\\boxed" + " " * 50) * (MANY // 56),
    "braces": "{" * MANY + "}" * MANY,
    "tags that do not close": "<answer>" * (MANY // 8),
    "tags that do not open": "</answer>" * (MANY // 9),
    "tags around nothing": "<answer></answer>" * (MANY // 17),
    "tags the wrong way": "</answer><answer>" * (MANY // 17),
    "thoughts": "<think>" + "</think> " * (MANY // 9) + "<answer>5</answer>",
    "digits": "Answer: " + "9" * MANY,
    "powers": "Answer: 1e999999999",
    "powers in parts": "Answer: 1e9_9_9_9_9_9_9_9_9",
    "fractions": "Answer: " + "\\frac{1}{" * (MANY // 9),
    "signs": "Answer: " + "-" * MANY,
    "words of LaTeX": "Answer: " + "\\text{" * (MANY // 6),
    "a fence": "```" + "a" * MANY,
    "LaTeX that does not close": "\\(" * (MANY // 4) + "\\[" * (MANY // 4),
    "dollars": "$$" + "$a" * (MANY // 2),
}


@pytest.mark.parametrize("name", ADVERSE)
def test_no_text_takes_long(name: str) -> None:
    text, problem = ADVERSE[name], Problem("", "", "5")
    began = time.process_time()
    same_answer(text, "5")
    verify_answer("Answer: 5", {"answer": text})
    for reward in REWARDS.values():
        assert reward(problem, text) in (0, 1)
    last_block(text)
    for form in (language(script="latin"), repetition(), verify_ended):
        form(text, {"prompt": "a"})
    assert time.process_time() - began < 4, "quadratic steps would take minutes"


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

"""Rewards by name, and what becomes of one that fails."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from fp8moe.errors import DataError
from fp8moe.post.problems import chosen, read_problems
from fp8moe.post.rewards import accuracy, find_reward, format_reward, score, think
from fp8moe.post.tasks import Problem

SUM = Problem("What is 4 + 5?", "4+5=9\nAnswer: 9", "9")


@pytest.mark.parametrize(
    ("text", "right", "formed", "thought"),
    [
        ("4+5=9\nAnswer: 9", 1, 1, 0),
        ("Answer: 8\nAnswer: 9", 1, 0, 0),
        ("Answer: 9\nand more", 1, 0, 0),
        ("Answer: 99", 0, 1, 0),
        ("nine", 0, 0, 0),
        ("", 0, 0, 0),
        ("<think>four and five</think> <answer> 9 </answer>", 1, 0, 1),
        ("<think>a</think><think>b</think><answer>9</answer>", 1, 0, 0),
        ("so <think>a</think><answer>9</answer>", 1, 0, 0),
    ],
)
def test_the_rewards_of_the_registry(text: str, right: int, formed: int, thought: int) -> None:
    assert (accuracy(SUM, text), format_reward(SUM, text), think(SUM, text)) == (right, formed, thought)


def test_the_sum_is_weighted_and_failures_exclude() -> None:
    rewards = [(name, find_reward(name)) for name in ("accuracy", "format")]
    found = score(SUM, "Answer: 9", 0, rewards, (2.0, 0.5))
    assert found.total == 2.5 and found.parts == (1.0, 1.0) and found.failure is None
    failing = [*rewards, ("mine", lambda problem, text: 1 / 0), ("later", accuracy)]
    found = score(SUM, "Answer: 9", 3, failing, (1.0,) * 4)
    assert math.isnan(found.total) and found.parts[:2] == (1.0, 1.0) and all(map(math.isnan, found.parts[2:]))
    assert found.failure == (
        "sample 3 of 'What is 4 + 5?' is excluded: the reward mine raised ZeroDivisionError: division by zero"
    )
    found = score(SUM, "a", 3, [("mine", lambda problem, text: sys.exit(3))], (1.0,))
    assert found.failure is not None and found.failure.endswith("the reward mine raised SystemExit: 3")
    found = score(SUM, "a", 3, [("mine", lambda problem, text: float("inf"))], (1.0,))
    assert math.isnan(found.total) and found.failure is not None and found.failure.endswith("the reward mine gave inf")


def test_every_epoch_takes_every_problem_once() -> None:
    first = [number for batch in range(5) for number in chosen(10, batch, 4, 7)]
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10)) and first[:10] != first[10:]
    assert chosen(10, 2, 4, 7) == first[8:12] and chosen(10, 2, 4, 8) != first[8:12]


def test_problems_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d", "solution": "e"}\n')
    assert read_problems(str(path)) == [Problem("a", "", "b"), Problem("c", "e", "d")]
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"line 1 of .* needs the keys prompt, answer"):
        read_problems(str(path))

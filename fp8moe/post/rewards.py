"""Rewards: functions of a problem and a completion's text, by name.

A run's `grpo.rewards` names functions of this registry, or of the user's as `module:function`. Each is called with the
problem and the text of a completion, without the token that ended it, and gives a number.

    accuracy    1 where the text's answer is the problem's, else 0: the verifier `answer` (`post.verify.answer`)
    format      1 where the text has one line `Answer: X` and ends with it, else 0
    think       1 where the text is <think>...</think> <answer>...</answer> (DeepSeek-R1-Zero's template), else 0

Where `format` or `think` is 1, the answer that `accuracy` compares is the one of that line, or in those tags, or marked
within it. These functions are linear in the text, so they are called where the run is; those of users are called in a
process of their own (`post.scoring`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fp8moe.post.tasks import Problem
from fp8moe.post.verify.answer import answer_lines, verify_answer

Reward = Callable[[Problem, str], float]
_THINK = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def accuracy(problem: Problem, text: str) -> float:
    """1 where the answer is the problem's."""
    return float(verify_answer(text, {"answer": problem.answer}).ok)


def format_reward(problem: Problem, text: str) -> float:
    """1 where there is one line `Answer: X`, spelled so, and it is the last."""
    found, body = answer_lines(text), text.rstrip()
    last = body.rfind("\n") + 1
    return float([place for place, _ in found] == [last] and body[last:].lstrip(" ").startswith("Answer:"))


def think(problem: Problem, text: str) -> float:
    """1 where the whole text is one thought and one answer in their tags."""
    once = all(text.count(tag) == 1 for tag in _TAGS)
    return float(once and _THINK.fullmatch(text) is not None)


REWARDS: dict[str, Reward] = {"accuracy": accuracy, "format": format_reward, "think": think}

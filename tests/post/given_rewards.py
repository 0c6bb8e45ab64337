"""Rewards of the tests' own, named as a user's: tests.post.given_rewards:NAME."""

from __future__ import annotations

from fp8moe.post.tasks import Problem


def letters(problem: Problem, text: str) -> float:
    """Share of the characters that are lower-case letters."""
    return sum("a" <= one <= "z" for one in text) / max(len(text), 1)


def alike(problem: Problem, text: str) -> float:
    """The same for every completion."""
    return 0.5


def fails_on_vowels(problem: Problem, text: str) -> float:
    """Raises where the text has an `a`, gives a NaN where it has an `e`."""
    if "a" in text:
        raise KeyError("a in it")
    return float("nan") if "e" in text else letters(problem, text)

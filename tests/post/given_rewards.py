"""Rewards of the tests' own, named as a user's: tests.post.given_rewards:NAME."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

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


def does(problem: Problem, text: str) -> Any:
    """What the text says; its length where it says nothing known."""
    word, _, rest = text.partition(" ")
    match word:
        case "sleep":
            time.sleep(float(rest))
        case "loop":
            while True:
                pass
        case "regex":  # holds the interpreter's lock for years
            re.match(r"(a+)+$", "a" * 64 + "b")
        case "leave":
            Path(rest).write_text(f"{os.getpid()} {subprocess.Popen(['sleep', '600']).pid}")
            time.sleep(600)
        case "exit":
            sys.exit("over")
        case "end":
            os._exit(7)
        case "crash":
            ctypes.string_at(0)
        case "interrupt":
            raise KeyboardInterrupt
        case "lines":
            raise ValueError("one\n  two")
        case "wordless":
            raise WordlessError
        case "function":
            return lambda: 1
        case "none":
            return None
        case "infinite":
            return float("inf")
        case "torch":
            return "torch" in sys.modules
        case "stdin":
            return len(sys.stdin.read())
        case "number":
            return Fraction(rest)
    return len(text)


class WordlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


not_a_function = 3


def hangs_on_vowels(problem: Problem, text: str) -> float:
    """Does not come back where the text has an `a`."""
    while "a" in text:
        pass
    return letters(problem, text)

"""Tasks with worked solutions whose answers a program can check: chat data, prompts, and rewards of small experiments.

`addition`: the sum of two numbers, worked digit by digit from the last one with its carry, which is what a small model
needs to write down to be right:

    What is 47 + 85?
    7+5=12
    4+8+1=13
    Answer: 132

A problem depends on (task, seed, digits) alone and none is drawn twice. One problem in ten is held out, by a hash of
its prompt and so in every seed: what a model is tested on was in no training set, whichever seeds and counts made both.
Refused: held-out seeds, since two seeds draw the same problems where the numbers are small.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from itertools import product

from fp8moe.errors import ConfigError

TASKS = ("addition",)
MOST_DIGITS = 12
HELD_OUT = 10  # one problem in so many
_LISTED = 2  # the problems of up to so many digits are listed, those of more are drawn


@dataclass(frozen=True)
class Problem:
    """prompt: the question. solution: its worked answer, which ends in the line `Answer: ANSWER`. place: the file and
    the line that it is from, for messages."""

    prompt: str
    solution: str
    answer: str
    place: str = field(default="", compare=False)


def problems(task: str, count: int, seed: int, *, digits: int, held_out: bool = False) -> list[Problem]:
    """`count` different problems of `task` in a random order: those held out, or those that may be trained on.

    digits: of the largest numbers. Raises ConfigError: no such task, or it has fewer problems.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is not one of {', '.join(TASKS)}: use {TASKS[0]}")
    if not 1 <= digits <= MOST_DIGITS:
        raise ConfigError(f"digits={digits} must be from 1 to {MOST_DIGITS}: use {min(max(digits, 1), MOST_DIGITS)}")
    generator = random.Random(f"{task} {seed} {digits}")
    numbers = range(10**digits)
    if digits <= _LISTED:
        pairs = [pair for pair in product(numbers, numbers) if _is_held_out(*pair) is held_out]
        _check_count(count, len(pairs), task, digits, held_out)
        return [_addition(*pair) for pair in generator.sample(pairs, count)]
    # Of more digits at most half are drawn: the last ones of all would take long to be hit.
    _check_count(count, 10 ** (2 * digits) // (2 * HELD_OUT if held_out else 2), task, digits, held_out)
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        pair = generator.choice(numbers), generator.choice(numbers)
        if _is_held_out(*pair) is held_out:
            found[pair] = None
    return [_addition(*pair) for pair in found]


def _check_count(count: int, most: int, task: str, digits: int, held_out: bool) -> None:
    if not 0 <= count <= most:
        kind = "held-out" if held_out else "training"
        raise ConfigError(
            f"{count} {kind} problems of {task} with {digits} digits were asked for and there are {most}: use 0 to "
            f"{most}, or more digits"
        )


def as_conversation(problem: Problem) -> dict[str, list[dict[str, str]]]:
    """A problem and its solution as a row of a chat file."""
    turns = ("user", problem.prompt), ("assistant", problem.solution)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _is_held_out(first: int, second: int) -> bool:
    digest = hashlib.blake2b(_question(first, second).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0


def _question(first: int, second: int) -> str:
    return f"What is {first} + {second}?"


def _addition(first: int, second: int) -> Problem:
    width = max(len(str(first)), len(str(second)))
    lines, carry = [], 0
    for one, other in zip(reversed(f"{first:0{width}}"), reversed(f"{second:0{width}}"), strict=True):
        total = int(one) + int(other) + carry
        lines.append(f"{one}+{other}{f'+{carry}' * bool(carry)}={total}")
        carry = total // 10
    answer = str(first + second)
    return Problem(_question(first, second), "\n".join([*lines, f"Answer: {answer}"]), answer)

"""Rewards: functions of a problem and a completion's text, by name.

A run's `grpo.rewards` names functions of this registry, or of the user's as `module:function`. Each is called with the
problem and the text of a completion, without the token that ended it, and gives a number. A function that raises, or
gives no finite number, excludes that sample: it is named, counted, and takes part in no mean.

    accuracy    1 where the text's answer is the problem's, else 0
    format      1 where the text has exactly one answer and ends with it, else 0
    think       1 where the text is <think>...</think> <answer>...</answer> (DeepSeek-R1-Zero's template), else 0
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fp8moe.errors import ConfigError
from fp8moe.post.tasks import Problem, extract_answer

Reward = Callable[[Problem, str], float]
_TAGGED = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_THINK = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
_LINE = re.compile(r"^ *Answer: *\S", re.MULTILINE)


def answer_of(text: str) -> str | None:
    """The answer of a completion: inside its last <answer> tags, else behind its last line `Answer:`."""
    tagged = _TAGGED.findall(text)
    return tagged[-1] if tagged else extract_answer(text)


def accuracy(problem: Problem, text: str) -> float:
    """1 where the answer is the problem's."""
    return float(answer_of(text) == problem.answer)


def format_reward(problem: Problem, text: str) -> float:
    """1 where there is one line `Answer:`, and it is the last."""
    lines = text.rstrip().splitlines()
    return float(len(_LINE.findall(text)) == 1 and bool(_LINE.match(lines[-1])))


def think(problem: Problem, text: str) -> float:
    """1 where the whole text is one thought and one answer in their tags."""
    once = text.count("<think>") == text.count("<answer>") == 1
    return float(once and _THINK.fullmatch(text) is not None)


REWARDS: dict[str, Reward] = {"accuracy": accuracy, "format": format_reward, "think": think}


def find_reward(name: str) -> Reward:
    """The function that `name` means. Raises ConfigError."""
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(
            f"grpo.rewards={name} is not one of {', '.join(REWARDS)}: use one of them, or module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"grpo.rewards={name} can't be imported ({error}): name it module:function") from error
    if not callable(found):
        raise ConfigError(f"grpo.rewards={name} is no function: name one that takes a problem and a text")
    reward: Reward = found
    return reward


@dataclass(frozen=True)
class Scored:
    """Of one completion: the weighted sum, NaN where it could not be scored; each reward's value; why it could not."""

    total: float
    parts: tuple[float, ...]
    failure: str | None = None


def score(
    problem: Problem, text: str, sample: int, rewards: Sequence[tuple[str, Reward]], weights: Sequence[float]
) -> Scored:
    """The rewards of one completion, sample number `sample` of the problem."""
    parts: list[float] = []
    for name, reward in rewards:
        try:
            value = float(reward(problem, text))
            wrong = None if math.isfinite(value) else f"gave {value}"
        except (Exception, SystemExit) as error:  # a function may end the process by mistake, too
            value, wrong = math.nan, f"raised {type(error).__name__}: {error}"
        if wrong is not None:
            sentence = f"sample {sample} of {problem.prompt!r:.200} is excluded: the reward {name} {wrong!s:.200}"
            return Scored(math.nan, tuple([*parts, *[math.nan] * (len(rewards) - len(parts))]), sentence)
        parts.append(value)
    return Scored(sum(part * weight for part, weight in zip(parts, weights, strict=True)), tuple(parts))

"""`answer`: the final answer of a text equals the row's.

The final answer is the last in the text that is not empty, by where it begins, of: `<answer>X</answer>` (the template
of DeepSeek-R1-Zero), a `\\boxed{X}`, a line `Answer: X` (also within `**`), a line `#### X`. So of one inside another
the inner one counts. Two answers are equal as numbers where both are plain numbers or fractions, exactly (7, 7.0, 14/2,
\\frac{14}{2}, 1,000, $5, 50%: signs of money and percent are dropped), else as texts without white space, dollar signs
of LaTeX and a full stop at the end. Refused: algebra (`x+1 = 1+x`), which takes a computer algebra system; a verifier
of one's own can call one.

Models under training write anything, so every step is linear in the text: a pattern never has two repetitions that
take the same characters, braces are paired in one pass, and a number has at most _LONGEST characters and an exponent
of three digits, since Fraction("1e999999999") would not end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from fp8moe.post.verify.verdict import Verdict

_LINE = re.compile(r"^[ \t>*_]*(?:final )?answer[ \t*_]*:(.*)", re.IGNORECASE | re.MULTILINE)
_HASHES = re.compile(r"^####(.*)", re.MULTILINE)
_OPEN, _CLOSED = "<answer>", "</answer>"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"[{}]")
_LATEX_FRACTION = re.compile(r"(-?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_DROPPED = re.compile(r"\\(?:left|right|[,;!: ])|\\?[$%]|\\[()\[\]]|\s")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", re.ASCII)
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,3})?", re.ASCII)
_LONGEST = 200


def final_answer(text: str) -> str | None:
    """The final answer of a text as it is written; None where it has none."""
    found = [*_boxed(text), *_tagged(text), *answer_lines(text), *_marked(_HASHES, text)]
    return max(found)[1] if found else None


def answer_lines(text: str) -> list[tuple[int, str]]:
    """(place, answer) of every line `Answer: X`."""
    return _marked(_LINE, text)


def _marked(line: re.Pattern[str], text: str) -> list[tuple[int, str]]:
    found = [(match.start(), match[1].partition(_CLOSED)[0].strip(" \t\r*_")) for match in line.finditer(text)]
    return [(place, answer) for place, answer in found if answer]


def _tagged(text: str) -> Iterator[tuple[int, str]]:
    """The last `<answer>` with its end that is not empty."""
    end = text.rfind(_CLOSED)
    while end >= 0 and (start := text.rfind(_OPEN, 0, end)) >= 0:
        behind = start + len(_OPEN)
        if answer := text[behind : text.index(_CLOSED, behind)].strip():
            yield start, answer
            return
        end = text.rfind(_CLOSED, 0, start)


def _boxed(text: str) -> Iterator[tuple[int, str]]:
    """The last box with its closing brace that is not empty."""
    boxes = {match.end() - 1: match.start() for match in _BOXED.finditer(text)}
    if not boxes:
        return
    ends: dict[int, int] = {}  # of each opening brace, its closing one
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif opened:
            ends[opened.pop()] = match.start()
    for brace in reversed(boxes):
        if answer := text[brace + 1 : ends.get(brace, 0)].strip():
            yield boxes[brace], answer
            return


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are equal, as numbers or as texts."""
    first, second = _plain(one), _plain(other)
    if first == second:
        return True
    numbers = _number(first), _number(second)
    return None not in numbers and numbers[0] == numbers[1]


def _plain(answer: str) -> str:
    answer = _TEXT.sub(r"\1", answer)
    answer = _LATEX_FRACTION.sub(r"\1\2/\3", answer)
    return _DROPPED.sub("", answer).rstrip(".").lower()


def _number(text: str) -> Fraction | None:
    if len(text) > _LONGEST:
        return None
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    over, slash, under = text.partition("/")
    if not _NUMBER.fullmatch(over) or (slash and not _NUMBER.fullmatch(under)):
        return None
    try:
        return Fraction(over) / Fraction(under or "1")
    except ZeroDivisionError:
        return None


def verify_answer(text: str, row: Mapping[str, Any]) -> Verdict:
    """Whether the final answer of `text` is that of row["answer"]: text or a number, or a solution that ends with
    it."""
    given = str(row["answer"])
    wanted = final_answer(given) or given
    found = final_answer(text)
    if found is None:
        return Verdict(False, "it has no final answer: no <answer>, no \\boxed{}, no line Answer: or ####")
    same = same_answer(found, wanted)
    return Verdict(same, "" if same else f"it answers {found[:80]} and not {wanted[:80]}")

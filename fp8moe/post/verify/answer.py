"""`answer`: the final answer of a text equals the row's.

The final answer is the last of: a `\\boxed{...}`, a line `Answer: X` (also within `**`), a line `#### X`. Two answers
are equal as numbers where both are plain numbers or fractions, exactly (7, 7.0, 14/2, \\frac{14}{2}, 1,000, $5, 50%:
signs of money and percent are dropped), else as texts without white space, dollar signs of LaTeX and a full stop at the
end. Refused: algebra (`x+1 = 1+x`), which takes a computer algebra system; a verifier of one's own can call one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from fp8moe.post.verify.verdict import Verdict

_LINE = re.compile(
    r"^[ \t>*_]*(?:final )?answer[ \t*_]*:[ \t*_]*(\S.*?)[ \t*_]*$|^####[ \t]*(\S.*?)[ \t]*$", re.I | re.M
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LATEX_FRACTION = re.compile(r"(-?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_DROPPED = re.compile(r"\\(?:left|right|[,;!: ])|\\?[$%]|\\[()\[\]]|\s")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_LONGEST = 200  # characters of an answer that is read as a number: Fraction("1e999999999") would not end


def final_answer(text: str) -> str | None:
    """The final answer of a text as it is written; None where it has none."""
    found = [(match.start(), match[1] or match[2]) for match in _LINE.finditer(text)]
    found += [(match.start(), inside) for match in _BOXED.finditer(text) if (inside := _braced(text, match.end()))]
    if not found:
        return None
    answer = max(found)[1]
    boxed = _BOXED.search(answer)
    return (boxed and _braced(answer, boxed.end())) or answer


def _braced(text: str, start: int) -> str:
    """What stands between an opening brace, just before `start`, and its closing one; "" where none closes it."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start:at].strip()
    return ""


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
    if len(text) > _LONGEST or re.search(r"e[-+]?\d{4}", text):
        return None
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    over, _, under = text.partition("/")
    try:
        return Fraction(over) / Fraction(under or "1")
    except (ValueError, ZeroDivisionError):
        return None


def verify_answer(text: str, row: Mapping[str, Any]) -> Verdict:
    """Whether the final answer of `text` is that of row["answer"]: text or a number, or a solution that ends with
    it."""
    given = str(row["answer"])
    wanted = final_answer(given) or given
    found = final_answer(text)
    if found is None:
        return Verdict(False, "it has no final answer: no \\boxed{}, no line Answer: or ####")
    same = same_answer(found, wanted)
    return Verdict(same, "" if same else f"it answers {found[:80]} and not {wanted[:80]}")

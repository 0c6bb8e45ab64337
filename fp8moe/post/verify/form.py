"""Verifiers of a text's form: `ended`, `length`, `language`, `repetition`. Simple counts, no models.

`language` counts letters by their Unicode script, outside fenced code and LaTeX, so it tells scripts apart and not
languages: French in an English answer passes, Chinese does not. DeepSeek-R1 (section 2.3.2) takes the share of words of
the wanted language alike. `repetition` counts n-grams of words, and of characters where a script has no spaces.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from fp8moe.post.verify.verdict import Verdict, Verifier

# Of a letter's Unicode name, the first words that belong to each script.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "latin": ("LATIN", "FULLWIDTH"),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "thai": ("THAI",),
    "chinese": ("CJK",),
    "japanese": ("HIRAGANA", "KATAKANA", "HALFWIDTH", "CJK"),
    "korean": ("HANGUL", "CJK"),
}
_LONE = ("chinese", "japanese", "thai")  # without spaces between words
# Of LaTeX in brackets the innermost: an opening one ends the search for the end of the one before, which is so linear.
_CODE_OR_LATEX = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]", re.DOTALL
)
_WORDS = re.compile(r"[^\W]{1,24}|[^\w\s]")  # an endless word falls into pieces, which then repeat


def verify_ended(text: str, row: Mapping[str, Any]) -> Verdict:
    """Whether the sample came to its end, row["ended"] is "stop", with any text. A cut one teaches to stop anywhere."""
    if not text.strip():
        return Verdict(False, "it is empty")
    ended = row.get("ended", "stop")
    return Verdict(ended == "stop", "" if ended == "stop" else f"it was cut: {ended}")


def length(
    *, min_tokens: int = 0, max_tokens: int | None = None, min_chars: int = 0, max_chars: int | None = None
) -> Verifier:
    """Whether a text's tokens, of row["tokens"], and characters are within bounds."""

    def verify(text: str, row: Mapping[str, Any]) -> Verdict:
        bounds = [(len(text), min_chars, max_chars, "characters")]
        if min_tokens or max_tokens is not None:
            if not isinstance(row.get("tokens"), int):
                raise ValueError("the teacher counted no tokens: use min_chars and max_chars")
            bounds.append((row["tokens"], min_tokens, max_tokens, "tokens"))
        for count, least, most, unit in bounds:
            if count < least or (most is not None and count > most):
                bound = f"fewer than {least}" if count < least else f"more than {most}"
                return Verdict(False, f"it has {count} {unit}, {bound}")
        return Verdict(True)

    return verify


def language(*, script: str = "prompt", share: float = 0.9) -> Verifier:
    """Whether `share` of a text's letters are of a script: that of most letters of row["prompt"] if "prompt".

    A text without letters outside code and LaTeX passes. Raises ValueError for a script that is not known.
    """
    if script != "prompt" and script not in SCRIPTS:
        raise ValueError(f"script={script} is not known: use prompt, {', '.join(SCRIPTS)}")
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1: use 0.9")

    def verify(text: str, row: Mapping[str, Any]) -> Verdict:
        wanted = _main_script(str(row.get("prompt", ""))) if script == "prompt" else script
        letters = _letters(text)
        total = sum(letters.values())
        if wanted is None or not total:
            return Verdict(True)
        found = sum(letters[kind] for kind in SCRIPTS[wanted]) / total
        return Verdict(found >= share, "" if found >= share else f"{found:.0%} of its letters are {wanted}")

    return verify


def _letters(text: str) -> Counter[str]:
    """Letters outside code and LaTeX, by the first word of their Unicode names."""
    counts: Counter[str] = Counter()
    for character, count in Counter(_CODE_OR_LATEX.sub(" ", text)).items():
        if character.isalpha():
            counts[_kind(character)] += count
    return counts


@cache
def _kind(character: str) -> str:
    return unicodedata.name(character, "UNNAMED").split()[0].partition("-")[0]


def _main_script(text: str) -> str | None:
    letters = _letters(text)
    if letters["HIRAGANA"] + letters["KATAKANA"]:
        return "japanese"  # whose texts may have more CJK letters than their own
    if letters["HANGUL"]:
        return "korean" if letters["HANGUL"] >= letters["LATIN"] else "latin"
    counts = {script: sum(letters[kind] for kind in kinds) for script, kinds in SCRIPTS.items() if script != "japanese"}
    most = max(counts, key=lambda script: counts[script])
    return most if counts[most] else None


def repetition(*, n: int = 8, times: int = 4) -> Verifier:
    """Whether no run of `n` words comes more than `times` times in a text."""
    if n < 1 or times < 1:
        raise ValueError(f"n={n} and times={times} must be at least 1: use n=8, times=4")

    def verify(text: str, row: Mapping[str, Any]) -> Verdict:
        words = _words(text)
        runs = Counter(zip(*(itertools.islice(words, start, None) for start in range(n)), strict=False))
        run, count = max(runs.items(), key=lambda item: item[1], default=((), 0))
        return Verdict(count <= times, "" if count <= times else f"{count} times the words {' '.join(run)!r:.60}")

    return verify


def _words(text: str) -> list[str]:
    lone = {kind for script in _LONE for kind in SCRIPTS[script]}
    words: list[str] = []
    for word in _WORDS.findall(text):
        words += list(word) if any(_kind(letter) in lone for letter in word) else [word]
    return words

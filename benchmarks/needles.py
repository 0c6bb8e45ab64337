"""Text with planted needles: facts scattered through filler, and asked at the end.

    old fox K7 and the E2 runs red ... B3 over hill E? E2 K? K7 B? B3 ...

A fact is one word, a key (a capital) with its value (a digit); each document draws all values anew, so nothing but
its own text answers a question. It states 16 facts once, at random places, and asks for all of them in random order at
its end: many needles a document, because a model learns to look them up in minutes where one question a document would
take hours. A token is a word with its space. Facts of two tokens, key and value, were refused: models of this size did
not learn to join them within 800 steps.
"""

from __future__ import annotations

import string

import numpy as np
from numpy.typing import NDArray

KEYS, VALUES = string.ascii_uppercase[:16], string.digits
FILLER = [
    "the", "and", "old", "red", "fox", "runs", "over", "hill", "into", "cold", "rain", "while", "few", "birds",
    "sing", "near", "long", "river", "under", "grey", "sky", "men", "walk", "home", "by", "dark", "road", "with",
    "bread", "salt", "milk", "then", "sleep", "till", "dawn", "breaks",
]  # fmt: skip
WORDS = (*FILLER, *(f"{key}?" for key in KEYS), *(key + value for key in KEYS for value in VALUES))
VOCABULARY = len(WORDS)
_IDS = {word: number for number, word in enumerate(WORDS)}


def document(
    length: int, generator: np.random.Generator, needle: tuple[str, float] | None = None, rounds: int = 1
) -> list[str]:
    """A document of `length` words.

    needle: (key, depth), the fact that stands at that share of the text and is asked first; all others are at random.
    rounds: how often it states and asks the same facts, in less filler each; a divisor of `length`.
    """
    facts = [key + value for key, value in zip(KEYS, generator.choice(list(VALUES), len(KEYS)), strict=True)]
    return [word for _ in range(rounds) for word in _round(length // rounds, facts, generator, needle)]


def _round(
    length: int, facts: list[str], generator: np.random.Generator, needle: tuple[str, float] | None
) -> list[str]:
    """Filler with each fact once, then a question for each."""
    asked = generator.permutation(len(facts)).tolist()
    count = length - 2 * len(facts)
    places = generator.choice(count, len(facts), replace=False)
    if needle is not None:
        number, place = KEYS.index(needle[0]), round(needle[1] * (count - 1))
        asked.remove(number)
        asked.insert(0, number)
        places[places == place] = places[number]  # the fact that stood there, if any, takes the needle's place
        places[number] = place
    words = generator.choice(FILLER, count).tolist()
    for place, fact in zip(places, facts, strict=True):
        words[place] = fact
    return [*words, *(word for number in asked for word in (f"{KEYS[number]}?", facts[number]))]


def tokens(words: list[str]) -> NDArray[np.int64]:
    """The ids of words."""
    return np.array([_IDS[word] for word in words], dtype=np.int64)


def num_bytes(words: list[str]) -> int:
    """Bytes of words, each with the space behind it."""
    return sum(len(word) + 1 for word in words)

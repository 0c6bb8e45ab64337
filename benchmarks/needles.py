"""Text with planted needles: facts scattered through filler, and asked at the end.

    old fox Qk and the Z4 runs red ... Bz over hill ?Z4 Qk Bz ...

A fact is a key, one of 26 capitals, and its value, one of 36 letters and digits; each document draws all values anew, so
nothing but its own text answers a question. A document states every key once, at random places among words, and asks for
all of them in random order behind a question mark: as many needles as there are keys, because a model learns to look one
up in minutes where one question a document would take hours. A token is a byte of ASCII.
"""

from __future__ import annotations

import string

import numpy as np
from numpy.typing import NDArray

VOCABULARY = 128
KEYS, VALUES = string.ascii_uppercase, string.ascii_lowercase + string.digits
ASKED = 3 * len(KEYS)  # tokens of the questions, with their mark
WORDS = (
    "the and old red fox runs over a hill into cold rain while few birds sing near long river under grey sky men "
    "walk home by dark road with bread salt milk then sleep till dawn breaks wide open fields wait for warm wind"
).split()


def document(length: int, generator: np.random.Generator, needle: tuple[str, float] | None = None) -> str:
    """A document of `length` characters.

    needle: (key, depth), the fact that stands at that share of the text and is asked first; others are at random.
    """
    values = dict(zip(KEYS, generator.choice(list(VALUES), len(KEYS)), strict=True))
    order = list(generator.permutation(list(KEYS)))
    if needle is not None:
        order.remove(needle[0])
        order.insert(0, needle[0])
    asked = "?" + " ".join(key + values[key] for key in order)
    body = length - ASKED
    facts = {key: place for key, place in zip(KEYS, generator.random(len(KEYS)), strict=True)}
    if needle is not None:
        facts[needle[0]] = needle[1]
    return _with_facts(body, [key + values[key] for key in sorted(facts, key=facts.__getitem__)], sorted(facts.values()), generator) + asked


def _with_facts(length: int, facts: list[str], places: list[float], generator: np.random.Generator) -> str:
    """Words of `length` characters in all, with each fact at its share of them."""
    words = length - 3 * len(facts)
    filler = ""
    while len(filler) < words:
        filler += str(generator.choice(WORDS)) + " "
    filler = filler[:words]
    pieces, done = [], 0
    for fact, place in zip(facts, places, strict=True):
        at = filler.rfind(" ", 0, round(place * words)) + 1  # between two words
        at = max(at, done)
        pieces += [filler[done:at], fact, " "]
        done = at
    return "".join([*pieces, filler[done:]])


def tokens(text: str) -> NDArray[np.int64]:
    """Ids of a text: its bytes."""
    return np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64)

"""Curves as text: a plot of braille dots (2 x 4 a character), and one line of block characters.

A library for plots in the terminal was refused: this is all that is needed of one. Values that are None leave a gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of U+2800 by row and column of a character
BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN = str.maketrans(BLOCKS + "".join(chr(0x2800 + bits) for bits in range(256)), "12345678 " + 255 * "*")


def binned(steps: Sequence[float], values: Sequence[float], columns: int) -> list[float | None]:
    """The means of `values` in `columns` equal ranges of `steps`; None where a range has none that is finite."""
    if not steps:
        return [None] * columns
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    is_finite = np.isfinite(y)
    first, last = x[0], x[-1]
    at = ((x - first) / max(last - first, 1) * columns).astype(int).clip(0, columns - 1)[is_finite]
    counts = np.bincount(at, minlength=columns)
    sums = np.bincount(at, weights=y[is_finite], minlength=columns)
    return [total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]


def curve(values: Sequence[float | None], height: int) -> list[str]:
    """A plot of `height` lines, two values a character, the largest at the top; neighbours are joined."""
    finite = [value for value in values if value is not None]
    width = math.ceil(len(values) / 2)
    cells = [[0] * width for _ in range(height)]
    if finite:
        low, high = min(finite), max(finite)
        last: int | None = None
        for column, value in enumerate(values):
            if value is None:
                last = None
                continue
            row = round((high - value) / (high - low) * (4 * height - 1)) if high > low else 2 * height
            first = row if last is None else last + (1 if row > last else -1 if row < last else 0)
            for dot in range(min(first, row), max(first, row) + 1):
                cells[dot // 4][column // 2] |= DOTS[dot % 4][column % 2]
            last = row
    return ["".join(chr(0x2800 + bits) for bits in line) for line in cells]


def bars(values: Sequence[float | None], *, least: float | None = None) -> str:
    """A line of blocks, one a value; `least`: the value of the lowest block, else the smallest value."""
    finite = [value for value in values if value is not None]
    if not finite:
        return ""
    low, high = min(finite) if least is None else least, max(finite)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else BLOCKS[max(0, round((value - low) * scale))] for value in values)


def plain(text: str) -> str:
    """A curve in ASCII, for a terminal without Unicode: a star for any dots, 1 to 8 for blocks."""
    return text.translate(_PLAIN)

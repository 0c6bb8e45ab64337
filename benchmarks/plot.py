"""A bar plot of a run's figures as SVG: one group of bars a size, one bar a candidate.

Written by hand, because the machine that measures has torch, Triton, NumPy and pytest and no plotting library.
"""

from collections.abc import Sequence
from html import escape

from benchmarks.harness import Record

COLOURS = ("#1b6ca8", "#e07b39", "#3a9d5d", "#b03a48", "#7d5ba6", "#8c8c8c", "#c2a83e", "#4fb3bf")
LEFT, TOP, HEIGHT, BAR, GAP, LINE = 70, 30, 260, 16, 26, 16  # pixels
TICKS = 5


def bars(records: Sequence[Record]) -> str:
    """The throughputs and bandwidths among `records` as one SVG picture, from zero; an empty frame without any."""
    shown = [r for r in records if r.metric in ("throughput", "bandwidth")]
    names, shapes = (list(dict.fromkeys(getattr(r, key) for r in shown)) for key in ("name", "shape"))
    values = {(r.shape, r.name): r.value for r in shown}
    top = max(values.values(), default=1.0)
    group = BAR * len(names) + GAP
    width, floor = max(LEFT + group * len(shapes) + GAP, 640), TOP + HEIGHT
    height = floor + 30 + LINE * (len(names) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for tick in range(TICKS + 1):
        y = floor - HEIGHT * tick / TICKS
        parts.append(f'<line x1="{LEFT}" x2="{width - GAP}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(text(LEFT - 6, y + 4, f"{top * tick / TICKS:.0f}", "end"))
    for s, shape in enumerate(shapes):
        left = LEFT + GAP / 2 + s * group
        for n, name in enumerate(names):
            value = values.get((shape, name), 0.0)
            tall = HEIGHT * value / top
            parts.append(
                f'<rect x="{left + n * BAR:.1f}" y="{floor - tall:.1f}" width="{BAR - 2}" height="{tall:.1f}" '
                f'fill="{COLOURS[n % len(COLOURS)]}"><title>{escape(name)}: {value:.0f}</title></rect>'
            )
        parts.append(text(left + (group - GAP) / 2, floor + 16, shape, "middle"))
    for n, name in enumerate(names):
        y = floor + 30 + LINE * n
        parts.append(f'<rect x="{LEFT}" y="{y}" width="10" height="10" fill="{COLOURS[n % len(COLOURS)]}"/>')
        parts.append(text(LEFT + 16, y + 9, name, "start"))
    if shown:
        parts.append(text(LEFT, TOP - 12, f"{shown[0].unit}; {shown[0].device}; {shown[0].date}", "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, anchor: str) -> str:
    """Words at a place, in pixels; anchor: start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'

"""Heat maps of needles found as SVG: one a model, lengths across, depths down, the share in each cell."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import Record
from benchmarks.plot import text

CELL, LEFT, TOP, GAP = (64, 34), 60, 48, 40  # pixels
NONE, ALL = (214, 96, 77), (67, 147, 105)  # red and green


def heat_maps(records: Sequence[Record], lengths: Sequence[int], depths: Sequence[float]) -> str:
    """A picture of the records of `needles found`, in their order."""
    found = {(r.name, r.shape): r.value for r in records if r.metric == "needles found"}
    names = list(dict.fromkeys(name for name, _ in found))
    wide, tall = CELL
    step = LEFT + wide * len(lengths) + GAP
    width, height = step * len(names), TOP + tall * len(depths) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, name in enumerate(names):
        left = LEFT + number * step
        parts.append(text(left, TOP - 26, f"needles found, {name}", "start"))
        parts += [text(left + (i + 0.5) * wide, TOP - 8, f"{length:,}", "middle") for i, length in enumerate(lengths)]
        for j, depth in enumerate(depths):
            y = TOP + j * tall
            parts.append(text(left - 6, y + tall / 2 + 4, f"{depth:.0%}", "end"))
            for i, length in enumerate(lengths):
                value = found[name, f"{length} tokens, depth {depth:.0%}"]
                x, fill = left + i * wide, _colour(value)
                parts.append(f'<rect x="{x}" y="{y}" width="{wide - 2}" height="{tall - 2}" fill="{fill}"/>')
                parts.append(text(x + 0.5 * wide, y + tall / 2 + 4, f"{value:.2f}", "middle"))
        parts.append(text(left, height - 14, "tokens across, depth of the fact down", "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _colour(share: float) -> str:
    """Between red at 0 and green at 1."""
    mixed = (round(none + (every - none) * share) for none, every in zip(NONE, ALL, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)

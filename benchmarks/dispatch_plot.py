"""Plot of a dispatch benchmark, as SVG: times of the four verbs by tokens, and bytes across nodes by ranks."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness import Record, Report
from benchmarks.plot import COLOURS, LINE, text

LEFT, TOP, WIDTH, HEIGHT = 40, 40, 420, 260  # pixels

SIMULATED = "bytes across, simulated"
Lines = dict[str, list[tuple[float, float]]]  # by legend: the points


def times(records: Sequence[Record], hidden: int = 1024, world: str = "ep2x2") -> Lines:
    """Milliseconds of all four verbs together by tokens a rank, a line for each kind."""
    total: dict[tuple[str, int], float] = defaultdict(float)
    for r in records:
        found = re.match(r"T(\d+) D(\d+) (\S+)", r.shape)
        if r.metric == "time" and found and (int(found[2]), found[3]) == (hidden, world):
            total[r.name.partition(":")[0], int(found[1])] += r.value
    return _lines(total)


def shares(records: Sequence[Record]) -> Lines:
    """Bytes across nodes relative to the naive all-to-all's by ranks, a line for each kind."""
    found = {}
    for r in records:
        layout = re.search(r"ep(\d+)x(\d+)", r.shape)
        if r.metric == SIMULATED and r.ratio is not None and layout:
            found[r.name.partition(",")[0], int(layout[1]) * int(layout[2])] = r.ratio
    return _lines(found)


def _lines(points: dict[tuple[str, int], float]) -> Lines:
    return {kind: sorted((x, y) for (k, x), y in points.items() if k == kind) for kind, _ in points}


@dataclass(frozen=True)
class Panel:
    """Lines over a logarithmic x axis of base 2; the y axis is logarithmic too, or linear from zero."""

    lines: Lines
    across: str
    upwards: str
    is_log: bool

    def height(self, value: float) -> float:
        """The place of `value` on the y axis, 0 at the bottom and 1 at the top."""
        values = [y for points in self.lines.values() for _, y in points]
        if self.is_log:
            low, high = math.log(min(values)), math.log(max(values))
            return (math.log(value) - low) / ((high - low) or 1.0)
        return value / (max(values) or 1.0)

    def draw(self, left: float) -> list[str]:
        """As SVG elements, `left` pixels from the edge."""
        ticks = sorted({x for points in self.lines.values() for x, _ in points})
        place = {x: left + WIDTH * (i + 0.5) / len(ticks) for i, x in enumerate(ticks)}
        floor = TOP + HEIGHT
        parts = [f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999999"/>']
        parts += [text(place[x], floor + 16, f"{x:g}", "middle") for x in ticks]
        parts += [text(left + WIDTH / 2, floor + 34, self.across, "middle"), text(left, TOP - 8, self.upwards, "start")]
        for n, (name, points) in enumerate(self.lines.items()):
            colour, y = COLOURS[n], floor + 52 + LINE * n
            spots = [(place[x], floor - HEIGHT * self.height(value), value) for x, value in points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for x, spot, value in spots:
                parts.append(f'<circle cx="{x:.1f}" cy="{spot:.1f}" r="3" fill="{colour}"/>')
                parts.append(text(x + 5, spot - 4, f"{value:.3g}", "start"))
            parts.append(f'<rect x="{left}" y="{y}" width="10" height="10" fill="{colour}"/>')
            parts.append(text(left + 16, y + 9, name, "start"))
        return parts


def picture(records: Sequence[Record]) -> str:
    """Both panels as one SVG picture; a panel without points is left out."""
    panels = [
        Panel(times(records), "tokens a rank", "ms, four verbs, 2 x 2 ranks, hidden 1024", True),
        Panel(shares(records), "ranks", "bytes across nodes / naive", False),
    ]
    width, height = 2 * (WIDTH + LEFT) + LEFT, TOP + HEIGHT + 52 + 4 * LINE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for i, panel in enumerate(panels):
        if panel.lines:
            parts += panel.draw(LEFT + i * (WIDTH + LEFT))
    return "\n".join([*parts, "</svg>"]) + "\n"


def plot_beside(report: Report) -> None:
    """Write the picture beside the report's JSON file, if one was asked for."""
    if report.json_path is not None:
        path = report.json_path.with_suffix(".svg")
        path.write_text(picture(report.records), encoding="utf-8")
        print(f"plot in {path}")

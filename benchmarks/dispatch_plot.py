"""The picture of a dispatch benchmark: times of the four verbs by tokens, and bytes across nodes by ranks."""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.harness import Record, Report

SIMULATED = "bytes across, simulated"
Lines = dict[str, list[tuple[float, float]]]  # by legend: the points


def times(records: Sequence[Record], hidden: int = 1024, world: str = "ep2x2") -> Lines:
    """Tokens a rank against the milliseconds of all four verbs together, a line for each kind."""
    total: dict[tuple[str, int], float] = defaultdict(float)
    for r in records:
        found = re.match(r"T(\d+) D(\d+) (\S+)", r.shape)
        if r.metric == "time" and found and (int(found[2]), found[3]) == (hidden, world):
            total[r.name.partition(":")[0], int(found[1])] += r.value
    return _lines(total)


def shares(records: Sequence[Record]) -> Lines:
    """Ranks against bytes across nodes relative to the naive all-to-all's, a line for each kind."""
    found = {}
    for r in records:
        layout = re.search(r"ep(\d+)x(\d+)", r.shape)
        if r.metric == SIMULATED and r.ratio is not None and layout:
            found[r.name.partition(",")[0], int(layout[1]) * int(layout[2])] = r.ratio
    return _lines(found)


def _lines(points: dict[tuple[str, int], float]) -> Lines:
    return {kind: sorted((x, y) for (k, x), y in points.items() if k == kind) for kind, _ in points}


def plot_beside(report: Report) -> None:
    """Write the picture beside the report's JSON file, if one was asked for and matplotlib is installed."""
    if report.json_path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    panels = ((left, times(report.records), "tokens a rank", "ms, four verbs, 2 x 2 ranks, hidden 1024", "log"),
              (right, shares(report.records), "ranks", "bytes across nodes / naive", "linear"))  # fmt: skip
    for axes, lines, x, y, scale in panels:
        for kind, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=kind)
        axes.set(xlabel=x, ylabel=y, yscale=scale)
        axes.set_xscale("log", base=2)
        axes.legend()
    figure.tight_layout()
    figure.savefig(report.json_path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)
    print(f"plot in {report.json_path.with_suffix('.png')}")

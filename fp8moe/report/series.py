"""Series of a run for its figures: values over tokens, thinned where a run has more steps than a screen has pixels.

A series is what metrics.jsonl says, number by number: nothing is averaged. Of a run with more than MOST steps every
n-th is drawn, and the page says so; steps with a validation, skipped steps and the last one are always among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fp8moe.report.run_files import Record, RunFiles

MOST = 4000  # steps of a run that are drawn
COLOURS = ("#3b7fc4", "#dd7733", "#35996b", "#8d6cc0", "#cc5566", "#1f9ea6", "#98794c", "#788591")
MOST_RUNS = len(COLOURS)


@dataclass(frozen=True)
class Drawn:
    """A run as it is drawn. label: its name on the page. steps: the records that are drawn, tokens: seen after each.

    every: one in so many steps is drawn. positions: tokens seen after each step of the run.
    """

    files: RunFiles
    label: str
    colour: str
    steps: list[Record]
    tokens: list[int]
    every: int
    positions: dict[int, int]

    def series(self, key: str | Callable[[Record], Any]) -> tuple[list[int], list[Any], list[int]]:
        """(tokens, values, steps) of the drawn steps that have a value: of a key, or made of a record."""
        value = key if callable(key) else lambda record: record.get(key)
        points = [
            (tokens, value(record), record["step"]) for tokens, record in zip(self.tokens, self.steps, strict=True)
        ]
        points = [point for point in points if point[1] is not None]
        return [point[0] for point in points], [point[1] for point in points], [point[2] for point in points]

    def position(self, step: int) -> int:
        """Tokens seen after `step`, or after the last step before it."""
        known = [number for number in self.positions if number <= step]
        return self.positions[max(known)] if known else 0


def draw(runs: list[RunFiles]) -> list[Drawn]:
    """The runs with their colours and the steps to draw; runs of one name are numbered."""
    names = [run.name for run in runs]
    drawn = []
    for number, run in enumerate(runs):
        seen = names[: number + 1].count(run.name)
        label = run.name if names.count(run.name) == 1 else f"{run.name} ({seen})"
        total = list(accumulate(int(record.get("tokens") or 0) for record in run.metrics))
        every = -(-len(run.metrics) // MOST)
        last = len(run.metrics) - 1
        kept = [
            i
            for i, record in enumerate(run.metrics)
            if i % every == 0
            or i == last
            or record.get("skipped")
            or any(record.get(key) is not None for key in ("val_loss", "reward"))
        ]
        positions = {record["step"]: tokens for record, tokens in zip(run.metrics, total, strict=True)}
        steps = [run.metrics[i] for i in kept]
        drawn.append(Drawn(run, label, COLOURS[number], steps, [total[i] for i in kept], every, positions))
    return drawn


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average over a fortieth of the values, at most 50, started without a bias towards zero."""
    keep = 1 - 1 / max(2, min(50, len(values) / 40))
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result

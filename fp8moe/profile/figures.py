"""Figures of a recorded step: communication hidden, bubble, time by phase, and costs for the simulator.

Of one rank, all on the host's clock:
  communication   the union of the messages on its communication thread: from when this rank can send until all has
                  arrived, so what it waits for a late peer counts, here and below. Messages between stages are not in
                  it, the host does not see when they move.
  exposed         how long its compute thread waits for those messages; hidden = 1 - exposed / communication
  bubble          how long its compute thread computes nothing between the first action of any rank and the last, less
                  what is exposed: waits for other stages, and both ends. The same as the simulator's.
  phases          time by phase without the waits in it
  parts           the rest of the step: its data, the waits of the compute thread by what is waited for, `reduce` (of
                  gradients), the optimizer, and `other`, so that phases and parts together are the step
On a GPU the host only enqueues; `kineto.py` finds the same figures in the intervals of the kernels.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fp8moe.profile.spans import COMMUNICATION, COMPUTE, Span

ACTION = re.compile(r"(F|BW|B|W)(\d+)\.(\d+)(?:&BW(\d+)\.\d+)?")
PHASE = re.compile(r"[FBW] \w+")
FOR_LAYERS, FOR_REPLICAS, FOR_STAGES, OTHER = "wait for layers", "wait for replicas", "wait for stages", "other"
Intervals = list[tuple[float, float]]  # sorted, disjoint stretches of time (start, end)


@dataclass(frozen=True)
class RankFigures:
    """Seconds of one rank in one step; see the module's note.

    window: from any rank's first action to the last. step: from the rank's first span to its last.
    """

    window: float
    computing: float
    communication: float
    exposed: float
    bubble: float
    phases: dict[str, float]
    parts: dict[str, float] = field(default_factory=dict)
    step: float = 0.0

    @property
    def hidden(self) -> float | None:
        """Share of communication; None without any. A wait also holds the wake-up, so it may exceed its message."""
        return max(0.0, 1 - self.exposed / self.communication) if self.communication else None


def kind_of(name: str) -> str:
    """The kind of span of that name: action, phase, message, wait or, for any other name, rest."""
    if name.startswith(("message ", "wait ")):
        return name.split(" ", 1)[0]
    return "action" if ACTION.fullmatch(name) else "phase" if PHASE.fullmatch(name) else "rest"


def window_of(ranks: Sequence[Sequence[Span]]) -> tuple[float, float]:
    """From the first action of any rank to the end of the last."""
    actions = [span for spans in ranks for span in spans if kind_of(span.name) == "action"]
    return min(span.start for span in actions), max(span.end for span in actions)


def num_microbatches(ranks: Sequence[Sequence[Span]]) -> int:
    """Micro-batches of the step, of each data-parallel rank."""
    found = (ACTION.fullmatch(span.name) for spans in ranks for span in spans)
    return 1 + max(int(match.group(3)) for match in found if match is not None)


def rank_figures(spans: Sequence[Span], window: tuple[float, float]) -> RankFigures:
    """The figures of a rank from its own spans, in a step of all ranks that took `window`."""
    messages = [span for span in spans if kind_of(span.name) == "message" and span.thread == COMMUNICATION]
    waits, exposed = times_of(waits_of(spans)), times_of(waits_of(spans, expert=True))
    actions = times_of(spans_of(spans, "action"))
    computing = length(actions) - length(overlap(actions, waits))
    shown = length(overlap(actions, exposed))
    phases: dict[str, float] = defaultdict(float)
    for span in spans_of(spans, "phase"):
        phases[span.name] += span.seconds - length(overlap([(span.start, span.end)], waits))
    bubble = max(0.0, window[1] - window[0] - computing - shown)
    of_thread = [span for span in spans if span.thread == COMPUTE]
    step = max(span.end for span in of_thread) - min(span.start for span in of_thread)
    parts = with_other(parts_of(spans), phases, step)
    figures = (window[1] - window[0], computing, length(times_of(messages)), shown, bubble)
    return RankFigures(*figures, dict(phases), parts, step)


def parts_of(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of the compute thread outside phases: waits; `data`, `reduce` and `optimizer` without waits in them."""
    waits = waits_of(spans)
    of_experts = {span.name.removeprefix("message ") for span in spans if span.thread == COMMUNICATION}
    found: dict[str, list[Span]] = defaultdict(list)
    for span in waits:
        name = span.name.removeprefix("wait ")
        is_of_stage = name.startswith("RECV_") or name == "until all has left"
        found[FOR_STAGES if is_of_stage else FOR_LAYERS if name in of_experts else FOR_REPLICAS].append(span)
    parts = {name: length(times_of(of_kind)) for name, of_kind in found.items()}
    all_waits = times_of(waits)
    for span in spans_of(spans, "rest"):
        took = span.seconds - length(overlap([(span.start, span.end)], all_waits))
        parts[span.name] = parts.get(span.name, 0.0) + took
    return parts


def with_other(parts: Mapping[str, float], phases: Mapping[str, float], step: float) -> dict[str, float]:
    """The parts with the rest of the step, which no span names."""
    return {**parts, OTHER: max(0.0, step - sum(parts.values()) - sum(phases.values()))}


def waits_of(spans: Sequence[Span], *, expert: bool | None = None) -> list[Span]:
    """The compute thread's waits: all, those for messages of its communication thread, or the others."""
    messages = (span for span in spans if kind_of(span.name) == "message" and span.thread == COMMUNICATION)
    started = {span.name.removeprefix("message ") for span in messages}
    waits = spans_of(spans, "wait")
    return [span for span in waits if expert is None or (span.name.removeprefix("wait ") in started) == expert]


def spans_of(spans: Sequence[Span], kind: str) -> list[Span]:
    return [span for span in spans if span.thread == COMPUTE and kind_of(span.name) == kind]


def times_of(spans: Sequence[Span]) -> Intervals:
    return union((span.start, span.end) for span in spans)


def union(parts: Iterable[tuple[float, float]]) -> Intervals:
    """All times in any of `parts`."""
    merged: Intervals = []
    for start, end in sorted(parts):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def overlap(a: Intervals, b: Intervals) -> Intervals:
    """All times in both; `a` and `b` are unions."""
    common, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            common.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def length(parts: Intervals) -> float:
    """The time that a union takes."""
    return sum(end - start for start, end in parts)


def without(a: Intervals, b: Intervals) -> float:
    """The time in `a` and not in `b`."""
    return length(a) - length(overlap(a, b))

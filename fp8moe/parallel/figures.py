"""What a recorded step says: communication hidden, bubble, time by phase, and costs for the simulator.

Of one rank, all on the host's clock:
  communication   the union of the messages on its communication thread: from when this rank can send until all has
                  arrived, so what it waits for a late peer counts, here and below. Messages between stages are not in
                  it, the host does not see when they move.
  exposed         what its compute thread stands in waits for those messages; hidden = 1 - exposed / communication
  bubble          what its compute thread computes nothing between the first action of any rank and the last, less
                  what is exposed: waits for other stages, and the ends. The same as the simulator's.
  phases          time by phase without the waits in it
On a GPU the host only enqueues; `kineto.py` finds the same figures in the intervals of the kernels.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fp8moe.parallel.intervals import Intervals, length, overlap, union
from fp8moe.parallel.recorder import COMMUNICATION, COMPUTE, Span
from fp8moe.parallel.simulate import Costs

ACTION = re.compile(r"(F|BW|B|W)(\d+)\.(\d+)(?:&BW(\d+)\.\d+)?")
PHASE = re.compile(r"[FBW] \w+")


@dataclass(frozen=True)
class RankFigures:
    """Seconds of one rank in one step; see the module's note. window: from any rank's first action to the last."""

    window: float
    computing: float
    communication: float
    exposed: float
    bubble: float
    phases: dict[str, float]

    @property
    def hidden(self) -> float | None:
        """Share of communication; None without any. A wait also holds the wake-up, so it may exceed its message."""
        return max(0.0, 1 - self.exposed / self.communication) if self.communication else None


def kind_of(name: str) -> str:
    """action, phase, message, wait, or "rest": what else says its name."""
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
    waits, exposed = _times(waits_of(spans)), _times(waits_of(spans, expert=True))
    actions = _times(_of(spans, "action"))
    computing = length(actions) - length(overlap(actions, waits))
    shown = length(overlap(actions, exposed))
    phases: dict[str, float] = defaultdict(float)
    for span in _of(spans, "phase"):
        phases[span.name] += span.seconds - length(overlap([(span.start, span.end)], waits))
    bubble = max(0.0, window[1] - window[0] - computing - shown)
    return RankFigures(window[1] - window[0], computing, length(_times(messages)), shown, bubble, dict(phases))


def waits_of(spans: Sequence[Span], *, expert: bool | None = None) -> list[Span]:
    """The compute thread's waits: all, those for messages of its communication thread, or the others."""
    started = {span.name.removeprefix("message ") for span in spans if kind_of(span.name) == "message"}
    waits = _of(spans, "wait")
    return [span for span in waits if expert is None or (span.name.removeprefix("wait ") in started) == expert]


def measured_costs(ranks: Sequence[Sequence[Span]], num_stages: int) -> Costs:
    """What a stage's F, B, W and FB took on average, waits for experts included and those for other stages left out.

    F, B and W come from actions of their own where a stage has any; the weight gradients within a BW from its phases.
    """
    seconds: dict[str, dict[int, list[float]]] = {kind: defaultdict(list) for kind in ("F", "B", "W")}
    pairs = []
    for spans in ranks:
        between_stages = _times(waits_of(spans, expert=False))
        late = [span for span in _of(spans, "phase") if span.name.startswith("W ")]
        for action in _of(spans, "action"):
            match = ACTION.fullmatch(action.name)
            assert match is not None
            kind, stage, back = match.group(1), int(match.group(2)), match.group(4)
            took = action.seconds - length(overlap([(action.start, action.end)], between_stages))
            if back is not None:
                pairs.append(took)
            elif kind == "BW":
                weight = sum(span.seconds for span in late if action.contains(span))
                seconds["W"][stage].append(weight)
                seconds["B"][stage].append(took - weight)
            else:
                seconds[kind][stage].append(took)
    return _costs(seconds, pairs, num_stages)


def _costs(seconds: dict[str, dict[int, list[float]]], pairs: list[float], num_stages: int) -> Costs:
    means = {
        kind: {stage: statistics.fmean(values) for stage, values in stages.items()} for kind, stages in seconds.items()
    }
    forward, back, weight = (statistics.fmean(stages.values()) for stages in means.values())
    shares = None
    if all(len(stages) == num_stages for stages in means.values()):
        totals = [sum(stages[stage] for stages in means.values()) for stage in range(num_stages)]
        shares = tuple(total / statistics.fmean(totals) for total in totals)
    pair = max(forward, back + weight, statistics.fmean(pairs)) if pairs else None
    return Costs(forward, back + weight, weight, pair, stages=shares)


def _of(spans: Sequence[Span], kind: str) -> list[Span]:
    return [span for span in spans if span.thread == COMPUTE and kind_of(span.name) == kind]


def _times(spans: Sequence[Span]) -> Intervals:
    return union((span.start, span.end) for span in spans)

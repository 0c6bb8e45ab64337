"""Files of a simulated schedule: an SVG picture, a Chrome trace for Perfetto, and its numbers as JSON.

The SVG shows what the terminal shows, with the number of every cell, to zoom and to print. Forward is blue, backward
for the input green, for the weights yellow; a whole backward is green then yellow; an overlapped pair is framed, its
forward above its backward; pale hues are the rank's other chunk. The grey strip under a row counts the schedule's
phases. Hovering over a cell shows what it is and when. The hues are near Okabe and Ito's palette and differ in
lightness, so that they can be told apart in greyscale and by colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape

from fp8moe.plan.schedule_text import is_second_chunk, label, ticks
from fp8moe.schedule.action import Action, Kind
from fp8moe.schedule.simulate import Costs, Timed, Timeline

MICROSECONDS = 1000.0  # the trace shows a cost unit as one millisecond
ROW, STRIP, GAP, LEFT, TOP = 26, 9, 4, 48, 12
FONT = 10
LINE = 17
# kind -> (the rank's first chunk, its other chunk)
HUES = {Kind.F: ("#56a3dc", "#b9dcf4"), Kind.B: ("#2f9e77", "#a3dcc6"), Kind.W: ("#e8b325", "#f7e3a1")}


def _number(x: float) -> str:
    return f"{float(x):.2f}".rstrip("0").rstrip(".")


def _rect(x: float, y: float, width: float, height: float, fill: str, extra: str = "") -> str:
    return (
        f'<rect x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}" '
        f'fill="{fill}"{extra}/>'
    )


def _text(x: float, y: float, words: str, *, size: float = FONT, anchor: str = "middle", fill: str = "#111") -> str:
    return (
        f'<text x="{_number(x)}" y="{_number(y)}" font-size="{_number(size)}" text-anchor="{anchor}" '
        f'fill="{fill}">{escape(words)}</text>'
    )


def _tooltip(timed: Timed) -> str:
    action = timed.action
    parts = [
        f"{kind} of stage {stage}, micro-batch {microbatch}, direction {direction}"
        for kind, stage, microbatch, direction in action.parts()
    ]
    return f"<title>{escape('; '.join(parts))}: {timed.start:.6g} to {timed.end:.6g}</title>"


class _Canvas:
    """Coordinates in the picture: rows by rank, x by time."""

    def __init__(self, timeline: Timeline, unit: float) -> None:
        self.timeline, self.unit = timeline, unit

    def x(self, time: float) -> float:
        return LEFT + float(time) * self.unit

    def y(self, rank: int) -> float:
        return TOP + rank * (ROW + STRIP + GAP)

    def half(self, action: Action, x: float, y: float, width: float, height: float) -> Iterator[str]:
        """Colour and number of one action: a whole backward in two hues, everything else in one."""
        second = is_second_chunk(self.timeline.schedule, action)
        costs = self.timeline.costs
        if action.kind is Kind.BW:
            first = width * float((costs.backward - costs.weight) / costs.backward) if costs.backward else width
            yield _rect(x, y, first, height, HUES[Kind.B][second])
            yield _rect(x + first, y, width - first, height, HUES[Kind.W][second])
        else:
            yield _rect(x, y, width, height, HUES[action.kind][second])
        name = str(action.microbatch)
        size = min(FONT, height - 1)
        if width >= 0.62 * size * len(name) + 1:
            yield _text(x + width / 2, y + height / 2 + 0.36 * size, name, size=size)

    def cell(self, rank: int, timed: Timed) -> Iterator[str]:
        action = timed.action
        x, y, width = self.x(timed.start), self.y(rank), self.x(timed.end) - self.x(timed.start)
        yield f"<g>{_tooltip(timed)}"
        if action.kind is Kind.FB:
            assert action.paired is not None
            forward = Action(Kind.F, action.stage, action.microbatch, action.direction)
            yield from self.half(forward, x, y, width, ROW / 2)
            yield from self.half(action.paired, x, y + ROW / 2, width, ROW / 2)
            yield _rect(x, y, width, ROW, "none", ' stroke="#111" stroke-width="1.4"')
        else:
            yield from self.half(action, x, y, width, ROW)
            yield _rect(x, y, width, ROW, "none", ' stroke="#fff" stroke-width="0.8"')
        yield "</g>"

    def phases(self, rank: int) -> Iterator[str]:
        """The strip under a row: a bar for each phase, from its first computation to the next phase's first."""
        titles = self.timeline.schedule.phases
        cells = [timed for timed in self.timeline.ranks[rank] if not timed.action.kind.is_message]
        starts = [t for i, t in enumerate(cells) if i == 0 or t.action.phase != cells[i - 1].action.phase]
        ends = [*(t.start for t in starts[1:]), cells[-1].end if cells else 0]
        for timed, end in zip(starts, ends, strict=True):
            phase = timed.action.phase
            if not phase:
                continue
            x, width = self.x(timed.start), self.x(end) - self.x(timed.start)
            y = self.y(rank) + ROW + 1
            title = f"<title>{escape(f'phase {phase}, {titles[phase - 1]}')}</title>" if phase <= len(titles) else ""
            yield f"<g>{title}{_rect(x, y, width, STRIP, '#777' if phase % 2 else '#cfcfcf')}"
            if width >= 9:
                yield _text(x + 5, y + STRIP - 1.5, str(phase), size=8, fill="#fff" if phase % 2 else "#222")
            yield "</g>"


def _legend(y: float) -> Iterator[str]:
    entries = (
        ("forward", (Kind.F,)),
        ("backward for the input", (Kind.B,)),
        ("backward for the weights", (Kind.W,)),
        ("whole backward", (Kind.B, Kind.W)),
        ("overlapped forward and backward", (Kind.FB,)),
    )
    x = float(LEFT)
    for words, kinds in entries:
        if kinds == (Kind.FB,):
            yield _rect(x, y, 22, 7, HUES[Kind.F][0]) + _rect(x, y + 7, 11, 7, HUES[Kind.B][0])
            yield _rect(x + 11, y + 7, 11, 7, HUES[Kind.W][0])
            yield _rect(x, y, 22, 14, "none", ' stroke="#111" stroke-width="1.4"')
        else:
            for i, kind in enumerate(kinds):
                yield _rect(x + i * 22 / len(kinds), y, 22 / len(kinds), 14, HUES[kind][0])
        yield _text(x + 27, y + 11, words, anchor="start")
        x += 27 + 5.6 * len(words) + 16
    yield _text(x, y + 11, "pale: the rank's other chunk; grey strip: phases", anchor="start")


def svg(timeline: Timeline, caption: list[str]) -> str:
    """The picture as SVG text; `caption` is one string a line, under the legend.

    A forward is drawn at least 14 px wide while the whole stays under 6,000 px.
    """
    schedule = timeline.schedule
    shortest = float(min(timeline.costs.forward or timeline.makespan, timeline.makespan)) or 1.0
    makespan = float(timeline.makespan) or 1.0
    unit = min(max(1100 / makespan, 14 / shortest), 6000 / makespan)
    canvas = _Canvas(timeline, unit)
    bottom = canvas.y(schedule.num_ranks)
    width = max(canvas.x(makespan) + 14, 980.0, LEFT + 6.0 * max(map(len, caption), default=0))
    height = bottom + 34 + 24 + LINE * len(caption)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_number(width)}" height="{_number(height)}" '
        f'viewBox="0 0 {_number(width)} {_number(height)}" font-family="Helvetica, Arial, sans-serif">',
        _rect(0, 0, width, height, "#fff"),
    ]
    for rank in range(schedule.num_ranks):
        y = canvas.y(rank)
        parts.append(_text(LEFT - 6, y + ROW / 2 + 4, f"rank {rank}", anchor="end"))
        parts.append(_rect(canvas.x(0), y, makespan * unit, ROW, "#f1f1f1"))
        for timed in timeline.ranks[rank]:
            if not timed.action.kind.is_message:
                parts += canvas.cell(rank, timed)
        parts += canvas.phases(rank)
    for time in ticks(makespan, int(makespan * unit // 90)):
        parts.append(_rect(canvas.x(time), bottom, 1, 4, "#555"))
        parts.append(_text(canvas.x(time), bottom + 14, f"{time:g}"))
    parts += _legend(bottom + 24)
    for i, line in enumerate(caption):
        parts.append(_text(LEFT, bottom + 34 + 22 + LINE * i, line, size=12, anchor="start"))
    return "\n".join([*parts, "</svg>", ""])


def _slices(timeline: Timeline, rank: int) -> list[dict[str, Any]]:
    """A slice for each computation of `rank`, and its counter of activations."""
    from fp8moe.profile.chrome_trace import slice_event  # it loads torch, which nothing else here needs

    events: list[dict[str, Any]] = []
    held = 0
    for timed in timeline.ranks[rank]:
        action = timed.action
        if action.kind.is_message:
            continue
        start, duration = float(timed.start) * MICROSECONDS, float(timed.end - timed.start) * MICROSECONDS
        title = timeline.schedule.phases[action.phase - 1] if action.phase else ""
        args = {"stage": action.stage, "microbatch": action.microbatch, "direction": action.direction, "phase": title}
        if action.paired is not None:
            args |= {"backward_stage": action.paired.stage, "backward_microbatch": action.paired.microbatch}
        events.append(slice_event(label(timeline.schedule, action), action.kind.value, 0, rank, start, duration, args))
        kinds = [kind for kind, *_ in action.parts()]
        for kind, step, time in ((Kind.F, 1, start), (Kind.W, -1, start + duration)):
            if kind in kinds:
                held += step
                count = {"ph": "C", "pid": 0, "tid": rank, "ts": time, "name": f"held by rank {rank}"}
                events.append({**count, "args": {"stage-activations": held}})
    return events


def _flows(timeline: Timeline) -> list[dict[str, Any]]:
    """An arrow for each message, from the computation that sends it to the one that needs it."""
    made: dict[tuple[Kind, int, int], tuple[int, Timed]] = {}
    for rank, cells in enumerate(timeline.ranks):
        for timed in cells:
            for kind, stage, microbatch, _ in timed.action.parts():
                made[kind, stage, microbatch] = (rank, timed)
    events: list[dict[str, Any]] = []
    for cells in timeline.ranks:
        for timed in cells:
            action = timed.action
            if not action.kind.is_send:
                continue
            part, step = (Kind.F, 1) if action.kind is Kind.SEND_F else (Kind.B, -1)
            ends = (
                ("s", made[part, action.stage, action.microbatch], 0.999),
                ("f", made[part, action.stage + step, action.microbatch], 0.001),
            )
            name = "activation" if part is Kind.F else "gradient"
            identity = f"{name} {action.stage} {action.microbatch}"
            for phase, (rank, cell), within in ends:
                # Inside the slice: on its border the viewer can't tell which slice the arrow belongs to.
                at = (float(cell.start) + within * float(cell.end - cell.start)) * MICROSECONDS
                event = {"ph": phase, "pid": 0, "tid": rank, "ts": at, "id": identity, "name": name, "cat": "message"}
                events.append(event | ({"bp": "e"} if phase == "f" else {}))
    return events


def schedule_trace(timeline: Timeline) -> dict[str, Any]:
    """Trace Event Format: a thread a rank, arrows for messages, a counter of held activations; 1 cost unit is 1 ms."""
    from fp8moe.profile.chrome_trace import metadata, named_thread, trace_file

    schedule = timeline.schedule
    title = f"{schedule.name}, {schedule.num_ranks} ranks, {schedule.num_microbatches} micro-batches"
    events = [metadata("process_name", 0, name=title)]
    for rank in range(schedule.num_ranks):
        stages = ", ".join(str(stage) for stage in sorted({stage for _, stage in schedule.held_by(rank)}))
        events += named_thread(0, rank, f"rank {rank} (stages {stages})")
        events += _slices(timeline, rank)
    return trace_file([*events, *_flows(timeline)])


def _costs(costs: Costs) -> dict[str, Any]:
    stages = None if costs.stages is None else [float(share) for share in costs.stages]
    return {
        "F": float(costs.forward),
        "B": float(costs.backward),
        "W": float(costs.weight),
        "FB": float(costs.pair),
        "message": float(costs.message),
        "stages": stages,
    }


def _where(action: Action) -> dict[str, Any]:
    return {"stage": action.stage, "microbatch": action.microbatch, "direction": action.direction}


def _record(timed: Timed) -> dict[str, Any]:
    """kind, stage, times; `parts` lists the F, B and W of a computation; `peer` is the other rank of a message."""
    action = timed.action
    record: dict[str, Any] = {"kind": action.kind.value, **_where(action)}
    record |= {"start": float(timed.start), "end": float(timed.end), "phase": action.phase}
    if action.kind.is_message:
        record["peer"] = action.peer
        return record
    record["parts"] = [
        {"kind": kind.value, "stage": stage, "microbatch": microbatch, "direction": direction}
        for kind, stage, microbatch, direction in action.parts()
    ]
    if action.paired is not None:
        record["forward"], record["backward"] = _where(action), _where(action.paired)
    return record


def as_json(timeline: Timeline) -> dict[str, Any]:
    """All results of the simulator: sizes, costs, makespan, bubble and peak activations per rank, actions per rank.

    Times are in the costs' unit. `actions[rank]` is in start order; for SEND and RECV start is when it was sent or
    posted, end when the message arrived. A rank's `bubble` is makespan minus what it computes.
    """
    schedule = timeline.schedule
    return {
        "name": schedule.name,
        "pp": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "num_microbatches": schedule.num_microbatches,
        "placement": [list(ranks) for ranks in schedule.placement],
        "phases": list(schedule.phases),
        "cost": _costs(timeline.costs),
        "makespan": float(timeline.makespan),
        "bubble": [float(bubble) for bubble in timeline.bubble],
        "peak_activations": [int(peak) for peak in timeline.peak_activations],
        "actions": [[_record(timed) for timed in rank] for rank in timeline.ranks],
    }

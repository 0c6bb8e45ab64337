"""Timeline of a schedule in a terminal: a row a rank, time to the right, at a given width.

A cell shows its name (`F3`, `BW3`, `F5&b2`) if all cells of its kind are wide enough for their names, and its letter
repeated if not. Each column shows what the rank does at the middle of the column's time, so cells narrower than a
column are sampled. Letters tell the cells apart, because a log file has no colour; a terminal gets colour too.
"""

from math import floor, inf, log10

from fp8moe.schedule.action import Action, Kind, Schedule
from fp8moe.schedule.simulate import Timed, Timeline

IDLE = "·"
LEGEND = (
    f"F forward, B backward for the input, W for the weights, BW both at once, X = F&BW overlapped, {IDLE} idle; "
    "small letters: the rank's other chunk"
)
# Backgrounds of the 256-colour palette for the rank's first chunk and its other; black text is readable on each.
COLOURS = {Kind.F: (75, 153), Kind.B: (72, 151), Kind.W: (178, 229), Kind.BW: (72, 151), Kind.FB: (176, 225)}


def is_second_chunk(schedule: Schedule, action: Action) -> bool:
    """Whether the action computes the rank's other chunk: direction 1, or the second half of a folded pipeline."""
    return action.direction == 1 or action.stage >= schedule.num_ranks


def label(schedule: Schedule, action: Action) -> str:
    """Name of an action: kind and micro-batch (`F3`, `BW3`, `F5&b2`), in small letters for the rank's other chunk."""
    if action.kind is Kind.FB:
        assert action.paired is not None
        forward = "f" if is_second_chunk(schedule, action) else "F"
        backward = "b" if is_second_chunk(schedule, action.paired) else "B"
        return f"{forward}{action.microbatch}&{backward}{action.paired.microbatch}"
    kind = action.kind.value.lower() if is_second_chunk(schedule, action) else action.kind.value
    return f"{kind}{action.microbatch}"


def _letter(timeline: Timeline, timed: Timed, time: float) -> str:
    """The letter of one column; a whole backward shows B during its part for the input, then W."""
    action, costs = timed.action, timeline.costs
    letter = {Kind.FB: "X", Kind.BW: "B"}.get(action.kind, action.kind.value)
    if action.kind is Kind.BW and (time - timed.start) * costs.backward >= (timed.end - timed.start) * (
        costs.backward - costs.weight
    ):
        letter = "W"
    return letter.lower() if is_second_chunk(timeline.schedule, action) else letter


def _named(timeline: Timeline, per_column: float) -> set[Kind]:
    """Kinds whose shortest cell has room for their longest name.

    No space is needed between names: each begins with a letter, so two in a row can still be told apart.
    """
    room: dict[Kind, float] = {}
    longest: dict[Kind, int] = {}
    for rank in timeline.ranks:
        for timed in rank:
            kind = timed.action.kind
            if not kind.is_message:
                room[kind] = min(room.get(kind, inf), (timed.end - timed.start) / per_column)
                longest[kind] = max(longest.get(kind, 0), len(label(timeline.schedule, timed.action)))
    return {kind for kind in room if int(room[kind] + 1e-9) >= longest[kind]}


def _row(timeline: Timeline, rank: int, columns: int, named: set[Kind], colour: bool) -> str:
    per_column = timeline.makespan / columns
    text = [IDLE] * columns
    shades = [""] * columns
    for timed in timeline.ranks[rank]:
        action = timed.action
        if action.kind.is_message or timed.end == timed.start:
            continue
        # The columns whose middles lie in [start, end).
        first = max(0, _ceil(timed.start / per_column - 0.5))
        end = min(columns, _ceil(timed.end / per_column - 0.5))
        shade = COLOURS[action.kind][is_second_chunk(timeline.schedule, action)]
        for column in range(first, end):
            shades[column] = f"\x1b[48;5;{shade};30m"
            text[column] = _letter(timeline, timed, (column + 0.5) * per_column)
        if action.kind in named:
            text[first:end] = label(timeline.schedule, action).ljust(end - first)
    if not colour:
        return "".join(text)
    painted = [
        (shade or "\x1b[0m") * (shade != before) + letter
        for letter, shade, before in zip(text, shades, ["", *shades], strict=False)
    ]
    return "".join(painted) + "\x1b[0m"


def _ceil(x: float) -> int:
    # Rounding errors of a sum of costs must not move a cell by a column.
    return -int(-(x - 1e-9) // 1)


def ticks(makespan: float, at_most: int) -> list[float]:
    """Round times from 0 to `makespan`, at most `at_most` + 1 of them."""
    if makespan <= 0:
        return [0.0]
    least = float(makespan) / max(1, at_most)
    power = 10.0 ** floor(log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    return [i * step for i in range(int(float(makespan) / step + 1e-9) + 1)]


def _axis(timeline: Timeline, columns: int) -> str:
    """The time axis: round times under their columns."""
    axis = [" "] * columns
    for time in ticks(timeline.makespan, columns // 10):
        mark, at = f"|{time:g}", int(time / float(timeline.makespan) * columns) if timeline.makespan else 0
        if at + len(mark) <= columns:
            axis[at : at + len(mark)] = mark
    return "".join(axis)


def draw(timeline: Timeline, width: int, *, colour: bool = False) -> str:
    """The timeline as text: a row a rank and a time axis, `width` columns wide, but at least 24."""
    names = [f"r{rank} " for rank in range(timeline.schedule.num_ranks)]
    margin = max(map(len, names))
    columns = max(24, width) - margin
    named = _named(timeline, timeline.makespan / columns) if timeline.makespan else set()
    rows = [name.rjust(margin) + _row(timeline, rank, columns, named, colour) for rank, name in enumerate(names)]
    return "\n".join([*rows, " " * margin + _axis(timeline, columns).rstrip()])

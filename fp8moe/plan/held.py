"""What a rank keeps at once by its schedule: activations of micro-batches on their way, messages between ranks.

A stage keeps a micro-batch's activations from its forward to its backward, and what its weight gradients read from
there until these are done. In an overlapped pair one micro-batch's forward fills up while another's backward empties,
block beside block, so a pair needs a block more than before it and not a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from fp8moe.schedule.action import Action, Kind, Schedule


@dataclass(frozen=True)
class StageBytes:
    """Bytes of one micro-batch in a stage: of each pass from forward to backward; `deferred`, from there to its W."""

    passes: tuple[float, ...]
    deferred: float

    @property
    def total(self) -> float:
        """Of all passes."""
        return sum(self.passes)


def most_held(
    schedule: Schedule, rank: int, stages: Sequence[StageBytes], *, overlap: bool = True
) -> tuple[float, float]:
    """Most bytes of activations that `rank` keeps at once: while one pass runs alone, and within an interleaved pair.

    overlap: False where pairs run one after the other; then there are none.
    """
    totals, deferred = [stage.total for stage in stages], [stage.deferred for stage in stages]
    held = alone = in_pair = 0.0
    for action in schedule.actions[rank]:
        paired = action.paired
        if paired is None:
            if not action.kind.is_message:
                held = _held_after(action, held, totals, deferred)
                alone = max(alone, held)
        elif overlap:
            in_pair = max(in_pair, held + pair_excess(stages[action.stage].passes, stages[paired.stage].passes))
            held += totals[action.stage] - totals[paired.stage]
        else:
            alone = max(alone, held + totals[action.stage])
            held += totals[action.stage] - totals[paired.stage]
    return alone, in_pair


def _held_after(action: Action, held: float, totals: Sequence[float], deferred: Sequence[float]) -> float:
    for kind, stage, _, _ in action.parts():
        if kind is Kind.F:
            held += totals[stage]
        elif kind is Kind.B:
            held += deferred[stage] - totals[stage]
        else:
            held -= deferred[stage]
    return held


def pair_excess(ahead: Sequence[float], back: Sequence[float]) -> float:
    """Most bytes that a pair keeps beyond what was kept before it; bytes of the passes of both, forward order."""
    held = most = 0.0
    for filled, emptied in zip_longest(ahead, reversed(back), fillvalue=0.0):
        held += filled
        most = max(most, held)
        held -= emptied
    return most


def most_messages(schedule: Schedule, rank: int) -> int:
    """Most messages that `rank` has buffers of at once: received ones until they are used, and one sent each way."""
    posted: set[tuple[Kind, int, int]] = set()
    most, ways = 0, set()
    for action in schedule.actions[rank]:
        if action.kind.is_send:
            ways.add(action.peer)
        elif action.kind.is_message:
            posted.add(action.message)
            most = max(most, len(posted))
        else:
            for kind, stage, microbatch, _ in action.parts():
                needs = {Kind.F: Kind.RECV_F, Kind.B: Kind.RECV_B}.get(kind)
                if needs is not None:
                    posted.discard((needs, stage, microbatch))
    return most + len(ways)

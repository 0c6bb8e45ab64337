"""What a rank keeps at once by its schedule: activations of micro-batches on their way, messages between ranks.

A stage's activations of a micro-batch are kept from its forward to the end of its weight gradients. In an overlapped
pair one micro-batch's forward fills up while another's backward empties, block beside block, so a pair needs a block
more than before it and not a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from fp8moe.schedule.action import Action, Kind, Schedule

BySize = Sequence[Sequence[float]]  # bytes of each pass of each stage


def most_held(schedule: Schedule, rank: int, by_stage: BySize, *, overlap: bool = True) -> float:
    """Most bytes of activations that `rank` keeps at once. overlap: pairs are interleaved, else one after the other."""
    held = most = 0.0
    for action in schedule.actions[rank]:
        if action.kind is Kind.FB and overlap:
            most = max(most, held + _pair_excess(action, by_stage))
        for kind, stage, _, _ in action.parts():
            if kind is Kind.F:
                held += sum(by_stage[stage])
                if not (action.kind is Kind.FB and overlap):
                    most = max(most, held)
            elif kind is Kind.W:
                held -= sum(by_stage[stage])
        most = max(most, held)
    return most


def _pair_excess(action: Action, by_stage: BySize) -> float:
    """Most bytes that a pair keeps beyond what was kept before it, its passes taken side by side."""
    assert action.paired is not None
    held = most = 0.0
    for ahead, back in zip_longest(by_stage[action.stage], reversed(by_stage[action.paired.stage]), fillvalue=0.0):
        held += ahead
        most = max(most, held)
        held -= back
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

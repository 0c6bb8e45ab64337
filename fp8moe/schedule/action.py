"""Actions of a pipeline schedule: what a rank does, one frozen value an action, and the lists that hold them.

A schedule is data: for each rank the list of its actions, in order, messages included. The same lists are proven
(check.py), timed (simulate.py), drawn (fp8moe.plan) and executed; nothing here computes, sends or waits.

    F     forward of one stage on one micro-batch
    B     backward for the stage's input only: what the stage before is waiting for
    W     backward for the stage's weights, deferred from its B
    BW    the whole backward at once; its input gradient is sent when all of it is done
    FB    an F and the BW of another micro-batch, interleaved phase by phase so that each hides the other's messages
    SEND_F, RECV_F    an activation is sent to, or received from, a neighbouring stage
    SEND_B, RECV_B    the same for the gradient of an activation

A SEND starts a message and never blocks; a RECV posts a buffer and never blocks; the compute that needs the message
waits for it. On each link (an ordered pair of ranks) messages are received in the order in which they are sent, so one
communicator a link suffices, without tags. Blocking receives were refused: placed early enough to hide a message they
would wait for what has not been computed yet.

A SEND stands right after the computation whose output it carries. Its RECV stands one computation before the one that
needs it, so that the message travels under that computation; earlier only where a link would otherwise receive in
another order than it sends, later never. Posting every receive at the start of the step was refused: it costs a buffer
for each message of the step, and one in flight a link is what hides a message. `with_messages` adds them to a list.

A stage is a range of layers. In a bidirectional schedule every stage lives on two ranks, and the direction of a
micro-batch says on which of them it meets the stage: `placement[direction][stage]` is a rank.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Kind(StrEnum):
    F = "F"
    B = "B"
    W = "W"
    BW = "BW"
    FB = "FB"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    @property
    def is_message(self) -> bool:
        return self in MESSAGES

    @property
    def is_send(self) -> bool:
        return self is Kind.SEND_F or self is Kind.SEND_B


MESSAGES = frozenset({Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B})
# What each compute action does of the three things every stage owes every micro-batch.
PARTS = {Kind.F: (Kind.F,), Kind.B: (Kind.B,), Kind.W: (Kind.W,), Kind.BW: (Kind.B, Kind.W)}


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a rank does.

    kind        what
    stage       the stage on this rank that computes; for a message the stage whose output (SEND) or input (RECV) it is
    microbatch  index in the step, 0 .. num_microbatches - 1
    direction   of the micro-batch: 0 from rank 0 up, 1 from the last rank down
    paired      FB only: the BW that the forward is interleaved with
    peer        messages only: the rank at the other end
    phase       1-based index into Schedule.phases, for readers and pictures; no part of what the action is
    """

    kind: Kind
    stage: int
    microbatch: int
    direction: int = 0
    paired: "Action | None" = None
    peer: int | None = None
    phase: int = field(default=0, compare=False)

    def parts(self) -> Iterator[tuple[Kind, int, int, int]]:
        """(F | B | W, stage, microbatch, direction) of everything this action computes, in order; none for messages."""
        if self.kind is Kind.FB:
            yield (Kind.F, self.stage, self.microbatch, self.direction)
            if self.paired is not None:
                yield from self.paired.parts()
        else:
            for kind in PARTS.get(self.kind, ()):
                yield (kind, self.stage, self.microbatch, self.direction)

    @property
    def message(self) -> tuple[Kind, int, int]:
        """A message's name at both of its ends: (RECV_F | RECV_B, the stage that needs it, micro-batch)."""
        if self.kind is Kind.SEND_F:
            return (Kind.RECV_F, self.stage + 1, self.microbatch)
        if self.kind is Kind.SEND_B:
            return (Kind.RECV_B, self.stage - 1, self.microbatch)
        return (self.kind, self.stage, self.microbatch)

    def __str__(self) -> str:
        if self.kind is Kind.FB:
            return f"F{self.stage}.{self.microbatch}&{self.paired}"
        at = f"{self.kind.value}{self.stage}.{self.microbatch}"
        return at if self.peer is None else f"{at}{'->' if self.kind.is_send else '<-'}rank {self.peer}"


class ScheduleError(ValueError):
    """A schedule that ranks could not run to its end, or that does not do a step's work."""


@dataclass(frozen=True)
class Schedule:
    """Per-rank lists of actions, and where the stages are.

    actions     actions[rank], in the order in which the rank starts them
    placement   placement[direction][stage] -> rank; one direction, or two
    phases      titles of the schedule's phases; Action.phase counts them from 1
    """

    name: str
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    placement: tuple[tuple[int, ...], ...]
    phases: tuple[str, ...] = ()

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    @property
    def num_stages(self) -> int:
        return len(self.placement[0])

    @property
    def num_directions(self) -> int:
        """1 or 2; also the copies of every stage's parameters that the ranks hold together."""
        return len(self.placement)

    @property
    def has_backward(self) -> bool:
        """Whether there are backwards; a schedule for validation has none."""
        return any(kind is Kind.B for actions in self.actions for action in actions for kind, *_ in action.parts())

    @property
    def is_folded(self) -> bool:
        """Whether stages r and num_stages - 1 - r share a rank."""
        return len(self.held_by(0)) > 1

    def direction_of(self, microbatch: int) -> int:
        """The first half of a bidirectional step's micro-batches goes in direction 0, the second in direction 1."""
        return microbatch * self.num_directions // self.num_microbatches

    def held_by(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(direction, stage) of every stage on `rank`, directions first."""
        return tuple(
            (direction, stage)
            for direction, ranks in enumerate(self.placement)
            for stage, holder in enumerate(ranks)
            if holder == rank
        )

    def last_wgrads(self, rank: int) -> dict[int, tuple[int, int]]:
        """For each stage on `rank`: the micro-batch whose W there is the last, and that action's place in the list."""
        found = {}
        for index, action in enumerate(self.actions[rank]):
            for kind, stage, microbatch, _ in action.parts():
                if kind is Kind.W:
                    found[stage] = (microbatch, index)
        return found

    def neighbour(self, stage: int, direction: int, step: int) -> int | None:
        """Rank that holds the stage `step` (+1 or -1) from `stage`, or None: past an end, or on the same rank."""
        ranks = self.placement[direction]
        if not 0 <= stage + step < len(ranks) or ranks[stage + step] == ranks[stage]:
            return None
        return ranks[stage + step]


def receives(schedule: Schedule, action: Action) -> list[Action]:
    """The messages that must have arrived before a compute action starts."""
    wanted = []
    for kind, stage, microbatch, direction in action.parts():
        step = {Kind.F: -1, Kind.B: +1}.get(kind)
        peer = None if step is None else schedule.neighbour(stage, direction, step)
        if peer is not None:
            message = Kind.RECV_F if kind is Kind.F else Kind.RECV_B
            wanted.append(Action(message, stage, microbatch, direction, peer=peer, phase=action.phase))
    return wanted


def sends(schedule: Schedule, action: Action) -> list[Action]:
    """The messages that are sent when a compute action is done."""
    leaving = []
    for kind, stage, microbatch, direction in action.parts():
        step = {Kind.F: +1, Kind.B: -1}.get(kind)
        peer = None if step is None else schedule.neighbour(stage, direction, step)
        if peer is not None:
            message = Kind.SEND_F if kind is Kind.F else Kind.SEND_B
            leaving.append(Action(message, stage, microbatch, direction, peer=peer, phase=action.phase))
    return leaving


def with_messages(schedule: Schedule) -> Schedule:
    """The same computations in the same order, with every SEND and RECV among them (those there before are dropped)."""
    compute = [[action for action in actions if not action.kind.is_message] for actions in schedule.actions]
    arriving: dict[tuple[int, tuple[Kind, int, int]], tuple[int, Action]] = {}
    for rank, actions in enumerate(compute):
        for index, action in enumerate(actions):
            for receive in receives(schedule, action):
                arriving[rank, receive.message] = (index, receive)

    on_link: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, actions in enumerate(compute):
        for action in actions:
            for send in sends(schedule, action):
                assert send.peer is not None
                on_link[rank, send.peer].append(send)

    posted: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for (_, rank), messages in sorted(on_link.items()):
        # From the last message of the link to its first: none is posted after one that is sent later.
        latest = len(compute[rank])
        in_reverse = []
        for send in reversed(messages):
            index, receive = arriving[rank, send.message]
            latest = min(latest, max(0, index - 1))
            in_reverse.append((latest, receive))
        for index, receive in reversed(in_reverse):
            posted[rank, index].append(replace(receive, phase=compute[rank][index].phase))

    lists = []
    for rank, actions in enumerate(compute):
        merged: list[Action] = []
        for index, action in enumerate(actions):
            merged += [*posted[rank, index], action, *sends(schedule, action)]
        lists.append(tuple(merged))
    return replace(schedule, actions=tuple(lists))

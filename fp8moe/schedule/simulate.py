"""Schedule simulator: when each action starts and ends, and so the makespan, the bubble and the memory.

Every rank starts its actions in order, each as soon as it is free and the inputs are there. A SEND or RECV takes no
time of its rank; a message moves when it was sent, its buffer was posted and the link has finished the message before
it, and takes `Costs.message`. The lists are the ones that the engine executes, so what is wrong with them (a message
nobody sends, a circle of waits) shows here as a ScheduleError that says which rank waits for what.

Times are in the unit of the costs; any exact number type works (fractions.Fraction gives formulas without rounding).
Contention between messages and compute was left out: what an overlap costs is in the measured time of an FB.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from fp8moe.errors import ConfigError
from fp8moe.schedule.action import Action, Kind, Schedule, ScheduleError, receives


@dataclass(frozen=True)
class Costs:
    """Times of one stage on one micro-batch, in any one unit.

    forward     F
    backward    the whole backward, input and weight gradients (B of the published formulas)
    weight      the weight gradients' part of it; a B action takes backward - weight
    overlapped  an FB pair; None: forward + backward, nothing gained
    message     one activation or gradient across one link
    stages      each stage's share of work relative to the average (1.0 each when None); scales all but messages
    """

    forward: float = 1
    backward: float = 2
    weight: float = 1
    overlapped: float | None = None
    message: float = 0
    stages: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, value in (("F", self.forward), ("B", self.backward), ("W", self.weight), ("message", self.message)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"cost {name}={value} must be a finite number of at least 0: use {name}=0 or more")
        if self.weight > self.backward:
            raise ConfigError(
                f"cost W={self.weight} is more than B={self.backward}, the whole backward, of which W is a part: use "
                f"W={self.backward} or less"
            )
        longer = max(self.forward, self.backward)
        if self.overlapped is not None and not longer <= self.overlapped < float("inf"):
            raise ConfigError(
                f"cost FB={self.overlapped} must be a finite number of at least {longer}, the longer of the pair's "
                f"F={self.forward} and B={self.backward}: use FB={longer} or more"
            )

    @property
    def pair(self) -> float:
        return self.forward + self.backward if self.overlapped is None else self.overlapped

    def scaled(self, factor: float) -> "Costs":
        """Compute times multiplied by `factor`; a message stays what it is."""
        pair = None if self.overlapped is None else self.overlapped * factor
        return Costs(
            self.forward * factor, self.backward * factor, self.weight * factor, pair, self.message, self.stages
        )

    def of(self, action: Action) -> float:
        """Time an action takes of its rank. A pair of unequal stages gains what the smaller of the two can hide."""
        if action.kind.is_message:
            return 0
        share = 1 if self.stages is None else self.stages[action.stage]
        if action.kind is Kind.FB:
            assert action.paired is not None
            other = 1 if self.stages is None else self.stages[action.paired.stage]
            gained = self.forward + self.backward - self.pair
            return self.forward * share + self.backward * other - gained * min(share, other)
        alone = {Kind.F: self.forward, Kind.B: self.backward - self.weight, Kind.W: self.weight, Kind.BW: self.backward}
        return alone[action.kind] * share


@dataclass(frozen=True, slots=True)
class Timed:
    """An action with its times: of the computation, or from send or post to arrival for a message."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule with times. busy, bubble: per rank; bubble = makespan - busy, waits at both ends included."""

    schedule: Schedule
    costs: Costs
    ranks: tuple[tuple[Timed, ...], ...]
    makespan: float

    @property
    def busy(self) -> tuple[float, ...]:
        return tuple(sum(self.time_by_kind(rank).values()) for rank in range(len(self.ranks)))

    @property
    def bubble(self) -> tuple[float, ...]:
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def peak_activations(self) -> tuple[float, ...]:
        return peak_held(self.schedule)

    def time_by_kind(self, rank: int) -> dict[Kind, float]:
        """Time that `rank` spends on each kind of computation; kinds it never runs are left out."""
        spent: dict[Kind, float] = defaultdict(int)
        for timed in self.ranks[rank]:
            if not timed.action.kind.is_message:
                spent[timed.action.kind] += timed.end - timed.start
        return dict(spent)


@dataclass
class _Link:
    """One direction of one pair of ranks: what was sent and posted on it, in order, and when it is free again."""

    sent: list[tuple[tuple[Kind, int, int], list[float]]] = field(default_factory=list)
    posted: list[tuple[tuple[Kind, int, int], list[float]]] = field(default_factory=list)
    moved: int = 0
    free: float = 0

    def move(self, name: str, message: float, arrived: dict[tuple[Kind, int, int], float]) -> None:
        """Time every message whose two ends are known. A message's record is its [start, end] at that end."""
        while self.moved < min(len(self.sent), len(self.posted)):
            (sent, from_sender), (posted, from_receiver) = self.sent[self.moved], self.posted[self.moved]
            if sent != posted:
                raise ScheduleError(f"message {self.moved} on link {name} is sent as {_say(sent)} and received as "
                                    f"{_say(posted)}")  # fmt: skip
            self.free = max(from_sender[0], from_receiver[0], self.free) + message
            from_sender[1] = from_receiver[1] = arrived[sent] = self.free
            self.moved += 1


def _say(message: tuple[Kind, int, int]) -> str:
    what = "activation" if message[0] is Kind.RECV_F else "gradient"
    return f"the {what} for stage {message[1]} of micro-batch {message[2]}"


@dataclass(frozen=True, slots=True)
class _Step:
    """An action with what it waits for: computations of its own rank, messages of others."""

    action: Action
    local: tuple[tuple[Kind, int, int], ...]
    messages: tuple[tuple[Kind, int, int], ...]


def _step(schedule: Schedule, action: Action) -> _Step:
    if action.kind.is_message:
        made = Kind.F if action.kind is Kind.SEND_F else Kind.B
        return _Step(action, ((made, action.stage, action.microbatch),) if action.kind.is_send else (), ())
    parts = list(action.parts())
    local = set()
    for kind, stage, microbatch, direction in parts:
        if kind is not Kind.F:
            local.add((Kind.F if kind is Kind.B else Kind.B, stage, microbatch))
        step = {Kind.F: -1, Kind.B: +1}.get(kind, 0)
        inside = 0 <= stage + step < schedule.num_stages
        if step and inside and schedule.neighbour(stage, direction, step) is None:  # the fold of a V
            local.add((kind, stage + step, microbatch))
    local -= {part[:3] for part in parts}  # a BW's own B
    return _Step(action, tuple(local), tuple(receive.message for receive in receives(schedule, action)))


class _Simulation:
    """The state of one simulation: clocks, finished computations, links."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.costs = costs
        self.steps = [[_step(schedule, action) for action in actions] for actions in schedule.actions]
        self.clock: list[float] = [0] * schedule.num_ranks
        self.done: list[set[tuple[Kind, int, int]]] = [set() for _ in schedule.actions]
        self.arrived: list[dict[tuple[Kind, int, int], float]] = [{} for _ in schedule.actions]
        self.links: dict[tuple[int, int], _Link] = defaultdict(_Link)
        self.times: list[list[list[float]]] = [[] for _ in schedule.actions]

    def waits_for(self, rank: int) -> str | None:
        """What keeps the rank's next action from starting, or None."""
        step = self.steps[rank][len(self.times[rank])]
        for kind, stage, microbatch in step.local:
            if (kind, stage, microbatch) not in self.done[rank]:
                return f"{kind} of stage {stage}, micro-batch {microbatch}"
        for message in step.messages:
            if message not in self.arrived[rank]:
                return _say(message)
        return None

    def start(self, rank: int) -> None:
        """Run the rank's next action, which waits for nothing."""
        step = self.steps[rank][len(self.times[rank])]
        action, begin = step.action, self.clock[rank]
        if action.kind.is_message:
            assert action.peer is not None
            times = [begin, begin]
            key = (rank, action.peer) if action.kind.is_send else (action.peer, rank)
            link = self.links[key]
            (link.sent if action.kind.is_send else link.posted).append((action.message, times))
            link.move(f"{key[0]} -> {key[1]}", self.costs.message, self.arrived[key[1]])
        else:
            begin = max([begin, *(self.arrived[rank][message] for message in step.messages)])
            times = [begin, begin + self.costs.of(action)]
            self.clock[rank] = times[1]
            self.done[rank].update(part[:3] for part in action.parts())
        self.times[rank].append(times)

    def has_more(self, rank: int) -> bool:
        return len(self.times[rank]) < len(self.steps[rank])


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Time every action of `schedule`.

    Errors: ScheduleError when the ranks can't all finish (the sentence names each stuck rank, its action and what that
    waits for) or a link receives in another order than it sends; ConfigError when costs.stages has another length than
    the schedule has stages.
    """
    costs = costs or Costs()
    if costs.stages is not None and len(costs.stages) != schedule.num_stages:
        raise ConfigError(
            f"costs.stages has {len(costs.stages)} shares and the schedule {schedule.num_stages} stages: "
            f"use {schedule.num_stages} shares"
        )
    state = _Simulation(schedule, costs)
    moving = True
    while moving:
        moving = False
        for rank in range(schedule.num_ranks):
            while state.has_more(rank) and state.waits_for(rank) is None:
                state.start(rank)
                moving = True
    stuck = [
        f"rank {rank} at {actions[len(state.times[rank])]} waits for {state.waits_for(rank)}"
        for rank, actions in enumerate(schedule.actions)
        if state.has_more(rank)
    ]
    if stuck:
        raise ScheduleError(f"{schedule.name} deadlocks: {'; '.join(stuck)}")
    ranks = tuple(
        tuple(Timed(action, *times) for action, times in zip(actions, state.times[rank], strict=True))
        for rank, actions in enumerate(schedule.actions)
    )
    return Timeline(schedule, costs, ranks, max(state.clock))


def peak_held(schedule: Schedule, weights: Sequence[float] | None = None) -> tuple[float, ...]:
    """Most that each rank holds at once: a stage's activations of a micro-batch, from the start of its F to the end of
    its W. Counted (weights None), or weighed by stage, for example in bytes.
    """
    peaks = []
    for actions in schedule.actions:
        held: float = 0
        peak: float = 0
        for action in actions:
            parts = list(action.parts())
            held += sum(1 if weights is None else weights[stage] for kind, stage, _, _ in parts if kind is Kind.F)
            peak = max(peak, held)
            held -= sum(1 if weights is None else weights[stage] for kind, stage, _, _ in parts if kind is Kind.W)
        peaks.append(peak)
    return tuple(peaks)


def published_bubble(name: str, num_stages: int, costs: Costs) -> float:
    """The bubble of the published formulas, messages free: that of the rank that waits most.

    Source: DeepSeek-V3 technical report, table 2; for zb1p it holds while W <= F and micro-batches >= stages.
    """
    forward, backward, weight = costs.forward, costs.backward, costs.weight
    if name == "1f1b":
        return (num_stages - 1) * (forward + backward)
    if name == "zb1p":
        return (num_stages - 1) * (forward + backward - 2 * weight)
    return (num_stages // 2 - 1) * (costs.pair + backward - 3 * weight)

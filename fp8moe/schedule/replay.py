"""A schedule timed many times over with other costs: the simulator's order of events, recorded once.

Which event waits for which does not depend on what they cost, so one simulation gives an order in which everything
that an event waits for stands before it. A replay walks that order with new costs: the same makespan and busy times as
`simulate`, in a tenth of its time. A search over layouts asks for thousands of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from fp8moe.schedule.action import Action, Kind, Schedule, receives
from fp8moe.schedule.simulate import Costs, simulate

Name = tuple[Kind, int, int]


@dataclass(frozen=True)
class _Event:
    """A computation (cost: its index among the different ones) with the messages it waits for, or one end of one."""

    rank: int
    cost: int
    messages: tuple[int, ...]
    link: int = -1


class Replay:
    """The events of a schedule in an order that respects every wait."""

    def __init__(self, schedule: Schedule) -> None:
        self._ranks = schedule.num_ranks
        timeline = simulate(schedule, Costs(forward=2, backward=4, weight=2, message=1))
        order = sorted(
            (timed.start, rank, index)
            for rank, actions in enumerate(timeline.ranks)
            for index, timed in enumerate(actions)
        )
        self._messages: dict[tuple[int, Name], int] = {}
        self._links: dict[tuple[int, int], int] = {}
        costs: dict[tuple[Kind, int, int | None], int] = {}
        self._samples: list[Action] = []
        self._counts: list[dict[int, int]] = [defaultdict(int) for _ in range(self._ranks)]
        self._events = []
        for _, rank, index in order:
            action = schedule.actions[rank][index]
            if action.kind.is_message:
                self._events.append(self._end(rank, action))
                continue
            key = (action.kind, action.stage, action.paired.stage if action.paired else None)
            if key not in costs:
                costs[key] = len(costs)
                self._samples.append(action)
            self._counts[rank][costs[key]] += 1
            waits = tuple(self._message(rank, one.message) for one in receives(schedule, action))
            self._events.append(_Event(rank, costs[key], waits))

    def _message(self, receiver: int, name: Name) -> int:
        return self._messages.setdefault((receiver, name), len(self._messages))

    def _end(self, rank: int, action: Action) -> _Event:
        assert action.peer is not None
        ends = (rank, action.peer) if action.kind.is_send else (action.peer, rank)
        link = self._links.setdefault(ends, len(self._links))
        return _Event(rank, -1, (self._message(ends[1], action.message),), link)

    def busy(self, cost: Callable[[Action], float]) -> list[float]:
        """Each rank's time of computations; cost: of one, which may depend on its kind and stages alone."""
        spent = [cost(action) for action in self._samples]
        return [sum(count * spent[kind] for kind, count in counts.items()) for counts in self._counts]

    def makespan(self, cost: Callable[[Action], float], message: float) -> float:
        """When the last rank is done."""
        spent = [cost(action) for action in self._samples]
        clock = [0.0] * self._ranks
        free = [0.0] * len(self._links)
        first: list[float | None] = [None] * len(self._messages)  # the earlier of a message's two ends
        arrived = [0.0] * len(self._messages)
        for event in self._events:
            rank = event.rank
            if event.cost < 0:
                (number,) = event.messages
                begun = first[number]
                if begun is None:
                    first[number] = clock[rank]
                else:
                    free[event.link] = max(begun, clock[rank], free[event.link]) + message
                    arrived[number] = free[event.link]
                continue
            start = clock[rank]
            for number in event.messages:
                if arrived[number] > start:
                    start = arrived[number]
            clock[rank] = start + spent[event.cost]
        return max(clock)

"""A second reader of schedules, which shares no code with the checker: it plays the lists, one action at a time.

Ranks are what they have done so far; a link is the messages sent on it and the buffers posted for it, in order, and
message k fills buffer k. `runs` says whether a step's work gets done by the rules.
"""

from dataclasses import dataclass, field

from fp8moe.schedule.action import Action, Schedule


@dataclass
class Rank:
    have: set[str] = field(default_factory=set)
    latest: dict[tuple[str, int], int] = field(default_factory=dict)
    held: int = 0
    at: int = 0


class BrokenError(Exception):
    """The lists can't be right, whatever else happens."""


def must(condition: bool) -> None:
    if not condition:
        raise BrokenError


class Reader:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.ranks = [Rank() for _ in schedule.actions]
        self.sent: dict[tuple[int, int], list[str]] = {}
        self.posted: dict[tuple[int, int], list[str]] = {}
        self.last = len(schedule.placement[0]) - 1

    def rank_of(self, stage: int, mb: int) -> int:
        direction = 0 if len(self.schedule.placement) == 1 or mb < self.schedule.num_microbatches // 2 else 1
        return self.schedule.placement[direction][stage]

    def exists(self, rank: int, action: Action) -> None:
        must(0 <= action.stage <= self.last and 0 <= action.microbatch < self.schedule.num_microbatches)
        must(self.rank_of(action.stage, action.microbatch) == rank)
        second = len(self.schedule.placement) == 2 and action.microbatch >= self.schedule.num_microbatches // 2
        must(action.direction == int(second))

    def arrived(self, rank: int, what: str) -> bool:
        """Whether a buffer for `what` is filled; one that was filled by something else is a broken link."""
        for (source, target), posted in self.posted.items():
            if target == rank and what in posted:
                sent = self.sent.get((source, target), [])
                place = posted.index(what)
                must(place >= len(sent) or sent[place] == what)
                return place < len(sent)
        raise BrokenError

    def may(self, rank: int, letter: str, one: Action, fresh: tuple[str, ...] = ()) -> bool:
        """Whether one of F, B and W can run now."""
        have = self.ranks[rank].have
        self.exists(rank, one)
        name = f"{one.stage}.{one.microbatch}"
        must(letter + name not in have)
        must(one.microbatch >= self.ranks[rank].latest.get((letter, one.stage), 0))
        if letter == "W":
            must("B" + name in have or "B" + name in fresh)
            return True
        must(letter == "F" or "F" + name in have)
        other = one.stage + (-1 if letter == "F" else 1)
        if not 0 <= other <= self.last:
            return True
        if self.rank_of(other, one.microbatch) == rank:
            must(f"{letter}{other}.{one.microbatch}" in have)
            return True
        return self.arrived(rank, letter + name)

    def message(self, rank: int, action: Action) -> None:
        side, _, letter = action.kind.value.partition("_")
        self.exists(rank, action)
        other = action.stage + (1 if (side == "SEND") == (letter == "F") else -1)
        must(0 <= other <= self.last and self.rank_of(other, action.microbatch) == action.peer != rank)
        assert action.peer is not None
        if side == "SEND":
            must(f"{letter}{action.stage}.{action.microbatch}" in self.ranks[rank].have)
            self.sent.setdefault((rank, action.peer), []).append(f"{letter}{other}.{action.microbatch}")
        else:
            self.posted.setdefault((action.peer, rank), []).append(f"{letter}{action.stage}.{action.microbatch}")

    def play(self, rank: int, action: Action) -> bool:
        """Run one action; False when it has to wait."""
        if "_" in action.kind.value:
            self.message(rank, action)
            return True
        must((action.kind.value == "FB") == (action.paired is not None))
        if action.paired is not None:
            back = action.paired
            must(back.kind.value == "BW" and (back.stage, back.microbatch) != (action.stage, action.microbatch))
            parts = [("F", action), ("B", back), ("W", back)]
        else:
            parts = [(letter, action) for letter in action.kind.value]
        fresh = tuple(f"{letter}{one.stage}.{one.microbatch}" for letter, one in parts)
        if not all([self.may(rank, letter, one, fresh) for letter, one in parts]):
            return False
        state = self.ranks[rank]
        state.have.update(fresh)
        state.latest.update({(letter, one.stage): one.microbatch for letter, one in parts})
        state.held += sum(letter == "F" for letter, _ in parts)
        must(state.held <= self.last + 2)
        state.held -= sum(letter == "W" for letter, _ in parts)
        return True

    def finish(self) -> bool:
        """Play until nobody moves; True when all the work is done and every message was sent, posted and used."""
        moving = True
        while moving:
            moving = False
            for rank, actions in enumerate(self.schedule.actions):
                while self.ranks[rank].at < len(actions) and self.play(rank, actions[self.ranks[rank].at]):
                    self.ranks[rank].at += 1
                    moving = True
        done = [len(actions) for actions in self.schedule.actions] == [state.at for state in self.ranks]
        mbs = range(self.schedule.num_microbatches)
        work = {f"{letter}{stage}.{mb}" for letter in "FBW" for stage in range(self.last + 1) for mb in mbs}
        crossings = [
            mb for mb in mbs for stage in range(self.last) if self.rank_of(stage, mb) != self.rank_of(stage + 1, mb)
        ]
        used = sum(map(len, self.posted.values()))
        everything = sorted(name for state in self.ranks for name in state.have)
        return done and everything == sorted(work) and self.sent == self.posted and used == 2 * len(crossings)


def runs(schedule: Schedule) -> bool:
    """Whether the lists do a step's work by the rules."""
    try:
        return Reader(schedule).finish()
    except BrokenError:
        return False

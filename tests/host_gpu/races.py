"""Races between streams, found in what the device wrote down: memory that two touch, one of them writing, in no order.

A stream does what it was given in order, and what else is ordered an event says: recorded on one stream and waited for
by another, or by the host, whose later launches then all come behind. Each stream has a vector clock, the newest line
of every stream that is surely done when its next one begins (Lamport 1978; CUDA's own sanitizer in PyTorch works so).
Memory goes back to the stream that allocated it: who used it elsewhere must have been waited for by then, or have said
so by `record_stream`. One run shows one order of launches; the events of it are those of every order.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

READ, WRITE, RECORD, WAIT, SYNCHRONIZE, ALLOCATE, FREE, RECORD_STREAM = range(8)
OF_EVENT, OF_DEVICE = -1, -2  # in place of the stream, what SYNCHRONIZE waits for

Line = tuple[int, int, int, int, str]  # kind, stream, first byte or event, last byte + 1, op
Clock = dict[int, int]


@dataclass(frozen=True)
class Access:
    """The last time that a stream touched these bytes in this way."""

    stream: int
    first: int
    last: int
    writes: bool
    time: int
    op: str

    def __str__(self) -> str:
        return f"{self.op} {'writes' if self.writes else 'reads'} on stream {self.stream}"


@dataclass
class _Block:
    """An allocation: its bytes, the stream it belongs to, who touched it."""

    first: int
    last: int
    stream: int
    accesses: dict[tuple[int, int, int, bool], Access] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class Replay:
    """A log gone through line by line: the clocks behind the last line, and what was found so far."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], str] = {}
        self._clocks: dict[int, Clock] = {}
        self._events: dict[int, Clock] = {}
        self._host: Clock = {}
        self._starts: list[int] = []
        self._blocks: dict[int, _Block] = {}

    def line(self, line: Line) -> None:
        kind, stream, first, last, op = line
        if kind in (READ, WRITE):
            self._access(stream, first, last, kind == WRITE, op)
        elif kind == RECORD:
            self._events[first] = dict(self._clock(stream))
        elif kind == WAIT:
            _join(self._clock(stream), self._events.get(first, {}))
        elif kind == SYNCHRONIZE:
            self._synchronize(stream, first)
        elif kind == ALLOCATE and last > first:
            if first not in self._blocks:
                bisect.insort(self._starts, first)
            self._blocks[first] = _Block(first, last, stream)
        elif kind == FREE and last > first:
            self._free(first)
        elif kind == RECORD_STREAM and (block := self._block_of(first)) is not None:
            block.recorded.add(stream)

    def time(self, stream: int, other: int) -> int:
        """The newest of `other`'s accesses that is done when the next one of `stream` begins; its own last one."""
        return self._clocks.get(stream, {}).get(other, 0)

    def _clock(self, stream: int) -> Clock:
        clock = self._clocks.setdefault(stream, {})
        _join(clock, self._host)
        return clock

    def _synchronize(self, stream: int, event: int) -> None:
        if stream == OF_EVENT:
            _join(self._host, self._events.get(event, {}))
        for one, clock in self._clocks.items():
            if stream in (one, OF_DEVICE):
                _join(self._host, clock)

    def _block_of(self, address: int) -> _Block | None:
        place = bisect.bisect_right(self._starts, address) - 1
        block = self._blocks[self._starts[place]] if place >= 0 else None
        return block if block is not None and address < block.last else None

    def _access(self, stream: int, first: int, last: int, writes: bool, op: str) -> None:
        block, clock = self._block_of(first), self._clock(stream)
        clock[stream] = time = clock.get(stream, 0) + 1
        if block is None:
            return
        now = Access(stream, first, last, writes, time, op)
        for key, before in list(block.accesses.items()):
            if before.stream == stream or last <= before.first or before.last <= first:
                continue
            if clock.get(before.stream, 0) < before.time and (writes or before.writes):
                self._report("race", f"{before}", f"{now}")
            elif writes and first <= before.first and before.last <= last:
                del block.accesses[key]
        block.accesses[stream, first, last, writes] = now

    def _free(self, first: int) -> None:
        block = self._blocks.pop(first, None)
        if block is None:
            return
        del self._starts[bisect.bisect_left(self._starts, first)]
        clock = self._clock(block.stream)
        for one in block.accesses.values():
            if one.stream != block.stream and one.stream not in block.recorded and clock.get(one.stream, 0) < one.time:
                self._report("freed too early", f"{one}", f"freed for stream {block.stream}")

    def _report(self, kind: str, before: str, after: str) -> None:
        self.found.setdefault((kind, before, after), f"{kind}: {before}; {after}, and nothing orders the two")


def _join(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        if clock.get(stream, 0) < time:
            clock[stream] = time


def lines(numbers: Sequence[int], names: Sequence[str]) -> Iterable[Line]:
    """The lines of `torch.ops.host_gpu.lines()`."""
    for start in range(0, len(numbers), 5):
        kind, stream, first, last, name = numbers[start : start + 5]
        yield kind, stream, first, last, names[name]


def races(log: Iterable[Line]) -> list[str]:
    """What is wrong in a log, a sentence each, each pair of ops once."""
    replay = Replay()
    for line in log:
        replay.line(line)
    return list(replay.found.values())

"""What a trace holds: every kernel launch, every wait of the host for the device, the most memory of each phase."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """Launches of one kernel from one place.

    phase: the span it ran in, "F attn", "W mlp". op: the project's op, or the ATen op. kernel: the kernel's function,
    or the ATen op. backend: which one ran the project's op, "torch" for ATen. kind: what the bytes are summed by.
    bytes: of the tensors it reads and writes. site: the project's line, or the autograd node.
    """

    phase: str
    op: str
    kernel: str
    backend: str
    kind: str
    bytes: int
    site: str
    count: int = 1


@dataclass
class Call:
    """A call of one of the project's ops, or of an ATen op outside them: what it makes, in words, by how many launches.

    Fields as in `Launch`; bytes are all its launches' together.
    """

    phase: str
    op: str
    backend: str
    kind: str
    site: str
    results: list[str] = field(default_factory=list)
    launches: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Wait:
    """The host waits for the device, or copies to it: what makes it, and where."""

    phase: str
    what: str
    site: str


@dataclass
class Trace:
    """One run: `peak` is the most bytes live in each phase beyond what lived when it began.

    copies: from the host's memory to the device, whether it waits for them or not.
    """

    launches: list[Launch] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    peak: dict[str, int] = field(default_factory=dict)
    facts: dict[str, int] = field(default_factory=dict)
    copies: list[Wait] = field(default_factory=list)

    def of(self, *phases: str) -> list[Launch]:
        """Launches of the phases with these names."""
        return [launch for launch in self.launches if launch.phase in phases]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> Trace:
        raw = json.loads(path.read_text())
        launches, calls = [Launch(**one) for one in raw["launches"]], [Call(**one) for one in raw["calls"]]
        waits, copies = ([Wait(**one) for one in raw[name]] for name in ("waits", "copies"))
        return Trace(launches, calls, waits, raw["peak"], raw["facts"], copies)


def count(launches: Iterable[Launch]) -> int:
    return sum(launch.count for launch in launches)


def counts_by(launches: Iterable[Launch], key: Callable[[Launch], str]) -> Counter[str]:
    """Launches by `key`."""
    total: Counter[str] = Counter()
    for launch in launches:
        total[key(launch)] += launch.count
    return total


def bytes_by(launches: Iterable[Launch], key: Callable[[Launch], str]) -> Counter[str]:
    """Bytes by `key`."""
    total: Counter[str] = Counter()
    for launch in launches:
        total[key(launch)] += launch.bytes
    return total

"""Stragglers: ranks that compute longer than others with the same work, named while the run goes on.

Ranks wait for each other, so the step takes as long on all of them and tells nothing. What differs is the time a rank
works: a step's parts without what it waited for messages. Ranks with the same stages are compared, each with the median
of the others, over a number of steps, so that one slow read or an uneven routing names nobody.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.place import rank_in_words
from fp8moe.train.metrics import StepReport

EVERY = 32  # steps between comparisons
RATIO = 1.5  # of the others' median, from which on a rank is named


@dataclass(frozen=True)
class Slowest:
    """The rank that worked longest beside ranks with the same work, in steps `first` to `last`.

    seconds: that it worked in all of these steps; median: of the others. limit: how many times the median a straggler
    takes.
    """

    rank: int
    seconds: float
    median: float
    first: int
    last: int
    limit: float = RATIO

    @property
    def behind(self) -> float:
        """Seconds that the rank worked longer than the others' median."""
        return self.seconds - self.median

    @property
    def is_straggler(self) -> bool:
        """Whether it is far behind the others."""
        return self.seconds >= self.limit * max(self.median, 1e-9)

    def __str__(self) -> str:
        steps = self.last - self.first + 1
        ratio = self.seconds / max(self.median, 1e-9)
        return (
            f"slowest {rank_in_words(self.rank)}: {self.behind:+.3g} s in steps {self.first} to {self.last}; it "
            f"works {self.seconds / steps:.3g} s a step, {ratio:.1f} x the median of ranks with the same work "
            f"({self.median / steps:.3g} s)"
        )


class Stragglers:
    """Compares ranks every `every` steps; `note` is then collective over all ranks."""

    def __init__(self, mesh: Mesh, every: int = EVERY, ratio: float = RATIO) -> None:
        self._mesh, self._every, self._ratio = mesh, every, ratio
        self._working: list[float] = []

    def note(self, report: StepReport) -> Slowest | None:
        """Count a step -> where the ranks are compared, the one that is farthest behind; None where each is alone."""
        time = report.time
        self._working.append(time.data + time.forward + time.backward + time.optimizer)
        if len(self._working) < self._every:
            return None
        of_ranks = torch.zeros(self._mesh.world_size, dtype=torch.float64)
        of_ranks[self._mesh.rank] = sum(self._working)
        self._working.clear()
        seconds: list[float] = all_reduce(of_ranks, self._mesh.world_group).tolist()
        beside = [(seconds[rank] / max(median, 1e-9), rank, median) for rank, median in self._medians(seconds)]
        if not beside:
            return None
        _, rank, median = max(beside)
        first = report.step - self._every + 1
        return Slowest(rank, seconds[rank], median, first, report.step, self._ratio)

    def _medians(self, seconds: list[float]) -> Iterator[tuple[int, float]]:
        """Each rank that is not alone on its stages, with the median of the others there."""
        dp = self._mesh.dp
        for rank in range(len(seconds)):
            first = rank - rank % dp
            others = [seconds[other] for other in range(first, first + dp) if other != rank]
            if others:
                yield rank, statistics.median(others)

"""Stragglers: ranks that compute longer than others with the same work, named while the run goes on.

Ranks wait for each other, so the step takes as long on all of them and tells nothing. What differs is the time a rank
works: a step's parts without what it waited for messages. Ranks with the same stages are compared, each with the median
of the others, over a number of steps, so that one slow read or an uneven routing names nobody.
"""

from __future__ import annotations

import socket
import statistics

import torch

from fp8moe.parallel.collectives import all_reduce, gather
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.metrics import StepReport

EVERY = 32  # steps between comparisons
RATIO = 1.5  # of the others' median, from which on a rank is named


class Stragglers:
    """Compares ranks every `every` steps. Collective over all ranks: construction, and `note` then."""

    def __init__(self, mesh: Mesh, every: int = EVERY, ratio: float = RATIO) -> None:
        self._mesh, self._every, self._ratio = mesh, every, ratio
        self._hosts = gather(socket.gethostname(), mesh.world_group)
        self._working: list[float] = []

    def note(self, report: StepReport) -> str | None:
        """Count a step -> a sentence that names the slowest rank where one is far behind the others; None else."""
        time = report.time
        self._working.append(time.data + time.forward + time.backward + time.optimizer)
        if len(self._working) < self._every:
            return None
        of_ranks = torch.zeros(self._mesh.world_size, dtype=torch.float64)
        of_ranks[self._mesh.rank] = statistics.fmean(self._working)
        self._working.clear()
        seconds: list[float] = all_reduce(of_ranks, self._mesh.world_group).tolist()
        ratio, rank, median = max(
            (self._beside_others(seconds, rank) for rank in range(len(seconds))), default=(0, 0, 0)
        )
        if ratio < self._ratio:
            return None
        return (
            f"rank {rank} on {self._hosts[rank]} is a straggler: it works {seconds[rank]:.3g} s a step, {ratio:.1f} x "
            f"the median of ranks with the same work ({median:.3g} s), in steps {report.step - self._every + 1} to "
            f"{report.step}"
        )

    def _beside_others(self, seconds: list[float], rank: int) -> tuple[float, int, float]:
        """(ratio to the median of the others with its stages, rank, that median); a ratio of 0 where it is alone."""
        dp = self._mesh.dp
        first = rank - rank % dp
        others = [seconds[other] for other in range(first, first + dp) if other != rank]
        if not others:
            return 0.0, rank, 0.0
        median = statistics.median(others)
        return seconds[rank] / max(median, 1e-9), rank, median

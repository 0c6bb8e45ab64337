"""Odd ones: which of several speeds are far below the others, by a rule that the odd ones do not move.

A value is odd where it is below SHARE of the median and further from it than SPREADS times the median distance of all.
Mean and standard deviation were refused: one value that is ten times too small widens them until it is within them.
With fewer than three values nobody is odd.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

SHARE = 0.7
SPREADS = 3.0

Key = TypeVar("Key", bound=Hashable)


def odd_ones(speeds: Mapping[Key, float]) -> dict[Key, float]:
    """Those far below the others -> their share of the median."""
    if len(speeds) < 3:
        return {}
    middle = statistics.median(speeds.values())
    spread = statistics.median(abs(speed - middle) for speed in speeds.values())
    return {
        key: speed / middle
        for key, speed in speeds.items()
        if speed < SHARE * middle and middle - speed > SPREADS * spread
    }


def odd_places(speeds: Sequence[float], hosts: Sequence[str]) -> tuple[dict[str, float], dict[int, float]]:
    """Odd nodes, and odd ranks on nodes that are not odd, with their share of the median. Both by rank.

    A node's speed is the median of its ranks'. With nodes of one rank each, the node is named.
    """
    of_host: dict[str, list[float]] = {}
    for host, speed in zip(hosts, speeds, strict=True):
        of_host.setdefault(host, []).append(speed)
    nodes = odd_ones({host: statistics.median(found) for host, found in of_host.items()})
    ranks = odd_ones(dict(enumerate(speeds)))
    return nodes, {rank: share for rank, share in ranks.items() if hosts[rank] not in nodes}

"""Counts that decide speed and need no clock: instructions, sectors of global memory, wavefronts of shared memory.

A warp's access to global memory moves whole sectors of 32 bytes: useful bytes over bytes of sectors is what coalescing
comes to. A warp's access to shared memory takes one wavefront for each word that its worst bank must serve; accesses of
8 and 16 bytes a lane go by halves and quarters of a warp. The least it could take is its bytes over 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx.registers import LANES

SECTOR, BANKS, LINE = 32, 32, 128
WARP = 48  # the bit of an address at which the number of its warp begins, so that warps are counted apart


def distinct(values: np.ndarray) -> np.ndarray:
    """The different values, in order. NumPy's own `unique` takes many times as long for so few."""
    found = np.sort(values, axis=None)
    return found[np.concatenate(([True], found[1:] != found[:-1]))] if found.size else found


@dataclass
class Counts:
    """Of one launch; `on` where accesses are looked at, which costs time."""

    on: bool = False
    executed: list[int] = field(default_factory=list)  # per instruction of the program, warps that executed it
    rounds: dict[int, int] = field(default_factory=dict)  # per branch to an earlier instruction, warps that took it
    of_runs: dict[int, int] = field(default_factory=dict)  # the same of runs, by their first instruction
    useful: dict[str, int] = field(default_factory=lambda: {"ld": 0, "st": 0})
    moved: dict[str, int] = field(default_factory=lambda: {"ld": 0, "st": 0})
    wavefronts: int = 0
    least: int = 0
    started: list[tuple[Any, np.ndarray]] = field(default_factory=list)  # the CTA and warps of each group of products

    def go_round(self, number: int, warps: int) -> None:
        """Warps took the branch that is instruction `number`, back to an earlier one."""
        self.rounds[number] = self.rounds.get(number, 0) + warps

    def settle(self, runs: Sequence[Any]) -> None:
        """Count what runs executed with their instructions."""
        for first, times in self.of_runs.items():
            for number in range(first, first + runs[first].length):
                self.executed[number] += times
        self.of_runs = {}

    def global_access(self, name: str, warps: np.ndarray, address: np.ndarray, total: int) -> None:
        """A gang's access of `total` bytes a lane, only lanes that take part."""
        if not self.on:
            return
        sector = np.concatenate([address, address + (total - 1)]) // SECTOR
        self.moved[name] += SECTOR * distinct(sector + (np.concatenate((warps, warps)) << WARP)).size
        self.useful[name] += total * distinct(address + (warps << WARP)).size

    def shared_access(self, warps: np.ndarray, address: np.ndarray, total: int) -> None:
        """Likewise in shared memory."""
        if not self.on:
            return
        if not address.size:
            return
        lanes, words = max(1, LANES // max(1, total // 4)), max(1, total // 4)
        place = np.arange(warps.size) - np.searchsorted(warps, warps)  # among the lanes of its warp that take part
        part = warps * LANES + place // lanes  # which lanes are served together
        found = distinct((address[:, None] // 4 + np.arange(words)) + (part << WARP)[:, None])
        part, word = found >> WARP, found & ((1 << WARP) - 1)
        number = np.concatenate(([0], part[1:] != part[:-1])).cumsum()
        size = np.bincount(number)
        banks = np.bincount(number * BANKS + word % BANKS, minlength=BANKS * size.size)
        self.wavefronts += int(banks.reshape(-1, BANKS).max(1).sum())
        self.least += int((-(-size * 4 // LINE)).sum())

"""Who may count on whose accesses to shared memory: vector clocks, the two proxies, accesses that are under way.

Warp w of a cluster has a clock of its own, which ticks whenever it releases (arrives at a barrier or an mbarrier),
and knows of the others' clocks what reached it by acquiring (leaving a barrier, an mbarrier's completed phase). An
access is stamped with its warp and that warp's clock; another's access may follow only if it knows that stamp. So a
missing barrier is found in any schedule, even one in which nothing went wrong. Data that arrive by themselves (TMA,
cp.async) are stamped by a second agent of the warp that asked for them, W + w, whose clock the mbarrier or the wait
hands on.

Proxies. What a warp wrote with ordinary stores is visible to TMA and WGMMA (the asynchronous proxy) only as far as a
`fence.proxy.async` came between, on the path of synchronisation: each warp keeps a second row of clocks, of ordinary
writes known to be visible there, which a fence sets to the first row and synchronisation hands on beside it.

Reads. Neither a barrier nor an arrival waits until an ordinary load has its value: the compiler may move its use
behind them, and on an H100 such a load has returned what TMA wrote next. So TMA may overwrite what a warp has read
only after a `fence.proxy.async` of that warp between the read and the release that the issuer of the TMA saw: a third
row of clocks. A later ordinary store by another warp need only come after the load was issued, both go through one
queue in order. Reads by WGMMA and by TMA stores are under way from issue to their wait, and nobody may write there
meanwhile.

Random schedules with delayed effects alone were refused: they find a race by luck, and each seed costs a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.registers import Fault

PIECE = 16  # bytes that the asynchronous proxy reads at least, of which TMA and WGMMA make everything
BLOCK = 64  # granules
UNWRITTEN = 1 << 30
UNDER_WAY = UNWRITTEN + 1
KNOWN, VISIBLE, READ = 0, 1, 2


class Clocks:
    """Of all warps of a cluster: [warp, (KNOWN, VISIBLE, READ), agent], clocks of agents.

    KNOWN: accesses up to there came before. VISIBLE: ordinary writes up to there are visible to the asynchronous proxy.
    READ: ordinary reads up to there have their values.
    """

    def __init__(self, num_warps: int) -> None:
        self.num_warps = num_warps
        self.rows = np.zeros((num_warps, 3, 2 * num_warps), np.int32)
        self.own = np.ones(num_warps, np.int32)
        warps = np.arange(num_warps)
        self.rows[warps, KNOWN, warps] = 1
        self.arrived = np.zeros(num_warps, np.int32)  # clocks of the agents W + w

    def release(self, warps: np.ndarray) -> np.ndarray:
        """What `warps` know now, for whoever acquires it; their clocks tick."""
        known = self.rows[warps].max(0)
        self._tick(warps)
        return known

    def _tick(self, warps: np.ndarray) -> None:
        self.own[warps] += 1
        self.rows[warps, KNOWN, warps] = self.own[warps]

    def acquire(self, warps: np.ndarray, known: np.ndarray) -> None:
        self.rows[warps] = np.maximum(self.rows[warps], known)

    def fence_proxy(self, warps: np.ndarray) -> None:
        """Ordinary writes that these warps know become visible to the asynchronous proxy, their own reads complete."""
        self.rows[warps, VISIBLE] = np.maximum(self.rows[warps, VISIBLE], self.rows[warps, KNOWN])
        self.rows[warps, READ, warps] = self.own[warps]
        self._tick(warps)

    def arrival(self, warp: int) -> tuple[int, np.ndarray]:
        """(stamp, what its acquirer knows) of data that arrive now for `warp`."""
        self.arrived[warp] += 1
        known = np.zeros((3, 2 * self.num_warps), np.int32)
        known[KNOWN, self.num_warps + warp] = self.arrived[warp]
        return int(self.arrived[warp]), known


class UnderWay:
    """A read of `pieces`, in order, by the asynchronous proxy; `what` says which, for a report."""

    def __init__(self, pieces: np.ndarray, what: Callable[[], str]) -> None:
        self.pieces, self.what = pieces, what
        self.first, self.last = int(pieces[0]), int(pieces[-1])


class Stamps:
    """The accesses to one CTA's shared memory, a stamp a granule, or for the asynchronous proxy's reads a piece."""

    def __init__(self, clocks: Clocks, size: int, granule: int) -> None:
        w = clocks.num_warps
        self.clocks, self.num_warps, self.granule, self.per_piece = clocks, w, granule, PIECE // granule
        self.owner = np.zeros(size, np.int16)  # agent of the last write, 2 W more where it was an ordinary store
        self.written = np.full(size, UNWRITTEN, np.int32)
        self.pieces_of = [one.view(f"V{one.itemsize * self.per_piece}") for one in (self.owner, self.written)]
        self.issued = np.zeros((size, w), np.int32)  # last ordinary read by each warp
        self.ever_read = np.zeros(size // BLOCK + 1, bool)  # whether there was one, by blocks of granules
        self.ended = np.zeros((size // self.per_piece, w), np.int32)  # last read for it by the asynchronous proxy
        self.under_way: list[UnderWay] = []
        self.places: dict[int, str] = {}  # agent -> where its last write was, for reports
        self.place: Callable[[], str] = lambda: ""

    def _writer(self, granules: Any) -> Any:
        return self.owner[granules] % (2 * self.num_warps)

    def _ordinary(self, granules: Any) -> Any:
        return self.owner[granules] >= 2 * self.num_warps

    def _known(self, warps: np.ndarray, granules: np.ndarray) -> np.ndarray:
        """What warps [n] know of the last writers of granules [n, k]."""
        rows, agents = self.clocks.rows, 2 * self.num_warps
        owner = self.owner.take(granules)
        return rows.reshape(-1).take(owner % agents + (warps * (3 * agents))[:, None])

    def _name(self, agent: int) -> str:
        kind = "warp" if agent < self.num_warps else "TMA or cp.async of warp"
        where = self.places.get(agent, "")
        return f"{kind} {agent % self.num_warps}" + (f" ({where})" if where else "")

    def _report(self, granules: np.ndarray, bad: np.ndarray, doing: str) -> Fault:
        at = int(granules[bad].flat[0])
        written = int(self.written[at])
        if written == UNWRITTEN:
            return Fault(f"{doing} shared memory at {at * self.granule}, which nobody wrote")
        other = self._name(int(self._writer(at)))
        if written == UNDER_WAY:
            return Fault(f"{doing} shared memory at {at * self.granule} while a copy of {other} is under way")
        kind = "ordinary write" if self._ordinary(at) else "write"
        return Fault(f"{doing} shared memory at {at * self.granule} without waiting for the {kind} of {other}")

    def check_known(self, warps: np.ndarray, granule: int) -> None:
        """Do these warps know of the last write to a granule?"""
        known = self.clocks.rows[warps, KNOWN, self._writer(granule)]
        if np.count_nonzero(self.written[granule] > known):
            raise self._report(np.array([granule]), np.array([True]), "uses")

    def read(self, warps: np.ndarray, granules: np.ndarray, within: tuple[int, int]) -> None:
        """An ordinary read: warps [n], granules [n, k], of which the first and the last are `within`."""
        if not warps.size:
            return
        written = self.written.take(granules)
        least = np.minimum.reduce(self.clocks.rows[warps[0] : warps[-1] + 1, KNOWN])  # every one of them knows more
        if np.count_nonzero(written > np.concatenate((least, least)).take(self.owner.take(granules))):
            bad = written > self._known(warps, granules)
            if bad.any():
                raise self._report(granules, bad, "reads")
        self.issued[granules, warps[:, None]] = self.clocks.own.take(warps)[:, None]
        self.ever_read[within[0] // BLOCK : within[1] // BLOCK + 1] = True

    def _ever_read(self, run: slice) -> bool:
        """May there have been an ordinary read of these granules?"""
        return bool(self.ever_read[run.start // BLOCK : run.stop // BLOCK + 1].any())

    def write(self, warps: np.ndarray, granules: np.ndarray, same: Callable[[], np.ndarray]) -> None:
        """An ordinary write; `same` says [n] where it changed nothing, so that two warps may write it."""
        written = self.written.take(granules)
        bad = written > self._known(warps, granules)
        if np.count_nonzero(bad):
            bad &= (written != UNWRITTEN) & ~same()[:, None]
            if bad.any():
                raise self._report(granules, bad, "writes")
        self._check_under_way(granules)
        known = self.clocks.rows[warps, KNOWN, : self.num_warps]
        for reads, where in ((self.issued, granules), (self.ended, granules // self.per_piece)):
            late = reads.take(where, axis=0) > known[:, None]
            if np.count_nonzero(late):
                lane, k, reader = (int(x[0]) for x in np.nonzero(late))
                at = int(granules[lane, k]) * self.granule
                raise Fault(f"writes shared memory at {at} without waiting for the read of warp {reader}")
        self.owner[granules] = (warps + 2 * self.num_warps)[:, None]
        self.written[granules] = self.clocks.own[warps][:, None]
        place = self.place()
        for warp in set(warps.tolist()):
            self.places[warp] = place

    def _check_under_way(self, granules: Any) -> None:
        if not self.under_way:
            return
        run = isinstance(granules, slice)
        first, last = (granules.start, granules.stop - 1) if run else (granules.min(), granules.max())
        start, end = first // self.per_piece, last // self.per_piece
        for read in self.under_way:
            if read.last < start or read.first > end:
                continue
            if run:
                hit = (read.pieces >= start) & (read.pieces <= end)
            else:
                hit = np.isin(read.pieces, granules // self.per_piece)
            if np.count_nonzero(hit):
                raise Fault(f"overwrites shared memory at {int(first) * self.granule} and on, while {read.what()}")

    def begin_read(self, warps: np.ndarray, pieces: np.ndarray, what: Callable[[], str]) -> UnderWay:
        """A read of pieces by the asynchronous proxy, on behalf of `warps`: under way until `end_read`."""
        rows = self.clocks.rows[warps]
        least = np.minimum.reduce(rows)  # what every one of them knows
        owner, written = (
            part.take(pieces).view(t) for part, t in zip(self.pieces_of, (np.int16, np.int32), strict=True)
        )
        bad = written > least[: VISIBLE + 1].reshape(-1).take(owner)
        if np.count_nonzero(bad):
            granules = (pieces[:, None] * self.per_piece + np.arange(self.per_piece)).reshape(-1)
            at = granules[bad][:1]
            writer = self._writer(at)
            if self._ordinary(at)[0] and (self.written[at] <= rows[:, KNOWN][:, writer]).all():
                raise Fault(
                    f"{what()} at {int(at[0]) * self.granule}: the ordinary write of {self._name(int(writer[0]))} is "
                    "not visible to the asynchronous proxy without fence.proxy.async"
                )
            raise self._report(granules, bad, f"{what()}:")
        read = UnderWay(pieces, what)
        self.under_way.append(read)
        return read

    def end_read(self, warps: np.ndarray, read: UnderWay) -> None:
        self.under_way.remove(read)
        first, last = int(warps[0]), int(warps[-1]) + 1
        if last - first == len(warps):  # neighbours, as nearly always
            self.ended[read.pieces, first:last] = self.clocks.own[first:last]
        else:
            self.ended[read.pieces[:, None], warps] = self.clocks.own[warps]

    def begin_copy(self, warp: int, granules: Any, *, asynchronous: bool) -> None:
        """A copy into `granules` (an array or a slice) that `warp` starts: by TMA (asynchronous proxy) or cp.async."""
        rows, written = self.clocks.rows[warp], self.written[granules]
        visible = rows[VISIBLE if asynchronous else KNOWN]
        bad = written > np.concatenate((rows[KNOWN], visible)).take(self.owner[granules])
        run = isinstance(granules, slice)
        if np.count_nonzero(bad):
            bad &= written != UNWRITTEN
            if bad.any():
                raise self._report(self._numbers(granules), bad, "a copy overwrites")
        self._check_under_way(granules)
        if run:
            pieces = slice(granules.start // self.per_piece, -(-granules.stop // self.per_piece))
        else:
            pieces = granules // self.per_piece
        for reads, where, row in (
            (self.issued, granules, READ if asynchronous else KNOWN),
            (self.ended, pieces, KNOWN),
        ):
            if reads is self.issued and run and not self._ever_read(where):
                continue
            late = reads[where] > rows[row, : self.num_warps]
            if np.count_nonzero(late):
                at, reader = (int(x[0]) for x in np.nonzero(late))
                at = int(self._numbers(where)[at]) * (self.granule if where is granules else PIECE)
                raise Fault(
                    f"a copy overwrites shared memory at {at} without waiting until the read of "
                    f"warp {reader} has its value" + (" (fence.proxy.async)" if row == READ else "")
                )
        agent = self.num_warps + warp
        self.owner[granules], self.written[granules] = agent + (0 if asynchronous else 2 * self.num_warps), UNDER_WAY
        self.places[agent] = self.place()

    @staticmethod
    def _numbers(where: Any) -> np.ndarray:
        return np.arange(where.start, where.stop) if isinstance(where, slice) else where

    def end_copy(self, granules: Any, stamp: int) -> None:
        self.written[granules] = stamp

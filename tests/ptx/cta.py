"""A CTA while it runs: its gangs, barriers, mbarriers, registers and the copies that are under way."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.barriers import Mbarrier
from tests.ptx.counts import Counts
from tests.ptx.decode import Decoded
from tests.ptx.memory import Global, Shared
from tests.ptx.order import Clocks
from tests.ptx.registers import LANES, WINDOW, Fault, Gang, Token


class Barrier:
    """Arrivals at one of a CTA's barriers, until all have come."""

    def __init__(self) -> None:
        self.warps: list[int] = []
        self.known: np.ndarray | None = None
        self.passed = False


class Cta:
    """`rank` of the `cluster` CTAs of a cluster; `peers` are all of them, itself too."""

    def __init__(
        self, decoded: Decoded, arguments: dict[str, bytes], maps: dict[int, Any], memory: Global, shared_size: int,
        ctaid: tuple[int, int, int], grid: tuple[int, int, int], clocks: Clocks, choices: random.Random | None,
        counts: Counts,
    ) -> None:  # fmt: skip
        self.decoded, self.program, self.arguments, self.maps = decoded, decoded.program, arguments, maps
        self.memory, self.ctaid, self.grid, self.clocks, self.random = memory, ctaid, grid, clocks, choices
        self.cluster, self.counts = decoded.program.cluster, counts
        self.fraction_bits: int | None = None  # of an FP8 WGMMA's sums; None: those of FP32
        self.rank = ctaid[0] % self.cluster
        self.num_warps = -(-self.program.threads // LANES)
        self.first_warp = self.rank * self.num_warps
        self.shared = Shared(clocks, shared_size, decoded.granule, self.first_warp, counts)
        self.shared.stamps.place = lambda: self.place(self.running)
        self.local_bytes = np.full((LANES * self.num_warps, self.program.local_bytes), 0xA5, np.uint8)
        self.peers: list[Cta] = [self]
        self.meeting: Meeting
        self.barriers: dict[int, Barrier] = {}
        self.mbarriers: dict[int, Mbarrier] = {}
        self.under_way: list[Callable[[], None]] = []
        self.reached: dict[int, int] = {}  # warp of another CTA -> its clock when it last used a barrier here
        self.register_pool = self.program.max_registers * self.program.threads
        self.held_registers = np.full(self.num_warps, self.program.max_registers)
        self.running: Gang
        self.gangs = [self.new_gang(warps) for warps in self.cuts()]

    def new_gang(self, warps: np.ndarray) -> Gang:
        return Gang(self, warps, len(self.decoded.decoder.names))

    def cuts(self) -> list[np.ndarray]:
        """Which warps run together: all, or as the schedule draws."""
        warps = np.arange(self.num_warps)
        if self.random is None:
            return [warps]
        often = self.random.choice((0.0, 0.1, 0.4))
        return np.split(warps, [i for i in range(1, self.num_warps) if self.random.random() < often])

    def gives_up(self) -> bool:
        """Whether a wait that isn't satisfied returns without."""
        return self.random is not None and self.random.random() < 0.2

    def place(self, gang: Gang) -> str:
        """Where a gang is in the Python source."""
        return self.program.code[gang.at].place

    def split(self, gang: Gang, targets: np.ndarray) -> None:
        """Warp i of the gang goes on at targets[i]."""
        if (targets == targets[0]).all():
            gang.pc = int(targets[0])
            return
        if any(isinstance(value, Token) for value in gang.regs):
            raise Fault("warps part while a WGMMA is under way")
        if gang.stores or gang.store_groups or gang.copies or gang.copy_groups:
            raise Fault("warps part while their copies are under way")
        parts = []
        for target in np.unique(targets):
            part = gang.part(targets == target)
            part.pc = int(target)
            parts.append(part)
        at = self.gangs.index(gang)
        self.gangs[at : at + 1] = parts
        gang.done = True

    def finish(self, gang: Gang) -> None:
        """The gang's warps leave the kernel."""
        gang.done = True
        if gang.stores or gang.store_groups:
            raise Fault("leaves the kernel while a TMA store reads its shared memory: no wait_group")
        if gang.wgmma is not None and (gang.wgmma.open or gang.wgmma.groups):
            raise Fault("leaves the kernel while a WGMMA is under way")

    def arrive(self, gang: Gang, number: int, needed: int) -> None:
        """The gang comes to barrier `number`, which `needed` warps pass together."""
        if number not in self.barriers and len(gang.warps) == needed:  # all of them at once
            warps = gang.warps + self.first_warp
            self.clocks.acquire(warps, self.clocks.release(warps))
            return
        barrier = self.barriers.setdefault(number, Barrier())
        if set(barrier.warps) & set(gang.warps.tolist()):
            raise Fault(f"a warp comes to barrier {number} twice")
        barrier.warps += gang.warps.tolist()
        known = self.clocks.release(gang.warps + self.first_warp)
        barrier.known = known if barrier.known is None else np.maximum(barrier.known, known)
        if len(barrier.warps) > needed:
            raise Fault(f"{len(barrier.warps)} warps come to barrier {number}, which is for {needed}")
        if len(barrier.warps) == needed:
            self.clocks.acquire(np.array(barrier.warps) + self.first_warp, barrier.known)
            barrier.passed = True
            del self.barriers[number]
            return
        gang.waiting = (
            (lambda: barrier.passed),
            (lambda: f"barrier {number}, where warps {sorted(barrier.warps)} are of {needed}"),
        )

    def local(self, address: np.ndarray) -> np.ndarray:
        """Addresses in this CTA's own shared memory, from its beginning."""
        if self.cluster == 1:  # whatever lies beyond is found to be beyond the CTA's own
            return address
        if address.size and not (
            int(np.minimum.reduce(address)) >> WINDOW == self.rank == int(np.maximum.reduce(address)) >> WINDOW
        ):
            raise Fault(f"reaches into another CTA's shared memory, at {int(address[0]):#x}")
        return address & ((1 << WINDOW) - 1)

    def mbarrier(self, at: int, warps: np.ndarray | None = None) -> Mbarrier:
        owner = self.peers[at >> WINDOW] if at >> WINDOW < len(self.peers) else self
        if owner is not self:
            if warps is not None:
                for warp in (warps + self.first_warp).tolist():
                    owner.reached[warp] = int(self.clocks.own[warp])
            return owner.mbarrier(at, None if warps is None else warps + self.first_warp - owner.first_warp)
        at &= (1 << WINDOW) - 1
        if at not in self.mbarriers:
            raise Fault(f"there is no mbarrier at {at} in shared memory")
        if warps is not None:
            self.shared.stamps.check_known(warps + self.first_warp, at // self.shared.granule)
        return self.mbarriers[at]

    def _touch(self, warp: int, address: int) -> int:
        at = self.local(np.array([address]))
        self.shared.check(at, 8)
        self.shared.stamps.write(
            np.array([warp + self.first_warp]), self.shared.granules(at, 8), lambda: np.array([False])
        )
        return int(at[0])

    def make_mbarrier(self, warp: int, address: int, count: int) -> None:
        self.mbarriers[self._touch(warp, address)] = Mbarrier(count, self.clocks.rows.shape[1:])

    def drop_mbarrier(self, warp: int, address: int) -> None:
        at = self._touch(warp, address)
        if self.mbarriers.pop(at, None) is None:
            raise Fault(f"there is no mbarrier at {at} in shared memory")

    def check_end(self) -> None:
        """All warps have left."""
        for at, bar in self.mbarriers.items():
            if bar.bytes:
                raise Fault(f"the kernel ends while the mbarrier at {at} still expects {bar.bytes} bytes")
        mine = self.clocks.rows[self.first_warp : self.first_warp + self.num_warps, 0]
        for warp, clock in self.reached.items():
            if mine[:, warp].max() < clock:
                raise Fault(
                    f"CTA {self.ctaid} may have left when warp {warp % self.num_warps} of CTA {warp // self.num_warps} "
                    "of the cluster arrives at its mbarrier: nothing waits for that arrival"
                )


class Meeting:
    """barrier.cluster: all warps of all CTAs of a cluster arrive, then each may pass its wait."""

    def __init__(self, ctas: list[Cta]) -> None:
        self.needed = sum(cta.num_warps for cta in ctas)
        self.round, self.arrived = 0, 0
        self.gathered: Any = 0
        self.known: list[Any] = []
        self.rounds: dict[tuple[int, int], int] = {}  # of each warp: how often it has arrived

    def arrive(self, gang: Gang) -> None:
        known = gang.cta.clocks.release(gang.warps + gang.cta.first_warp)
        self.gathered = np.maximum(self.gathered, known)
        for warp in gang.warps.tolist():
            key = (gang.cta.rank, warp)
            self.rounds[key] = self.rounds.get(key, 0) + 1
        self.arrived += len(gang.warps)
        if self.arrived == self.needed:
            self.known.append(self.gathered)
            self.arrived, self.gathered, self.round = 0, 0, self.round + 1

    def wait(self, gang: Gang) -> None:
        mine = max(self.rounds.get((gang.cta.rank, warp), 0) for warp in gang.warps.tolist())
        if mine == 0:
            raise Fault("waits at the cluster's barrier without having arrived")
        if self.round < mine:
            gang.pc -= 1
            gang.waiting = (
                (lambda: self.round >= mine),
                (lambda: f"the cluster's barrier, where {self.arrived} of {self.needed} warps have arrived"),
            )
            return
        gang.cta.clocks.acquire(gang.warps + gang.cta.first_warp, self.known[mine - 1])

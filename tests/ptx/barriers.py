"""How warps wait for each other: CTA barriers, mbarriers and their phases, fences, registers handed from warp to warp.

An mbarrier completes a phase when its arrivals and its bytes are all there; who waits for the phase then knows whatever
the arriving warps knew when they arrived, and that the bytes have landed. A wait that isn't satisfied puts the gang to
sleep with a sentence that says for what; nobody awake and nothing under way is a deadlock, and the sentences are its
report. `try_wait` may also give up, as hardware's does after a while: whether it does is the schedule's choice, so a
program must come back and ask again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.parser import Instruction, Unsupported
from tests.ptx.registers import LANES, Decoder, Fault, Gang, of_lane

TX_LIMIT = (1 << 20) - 1


class Mbarrier:
    """The state of one mbarrier; `known` gathers what arrivals of this phase and all before knew."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0
        self.gathered, self.known = np.zeros(shape, np.int32), np.zeros(shape, np.int32)

    def arrive(self, times: int, known: np.ndarray) -> None:
        self.gathered = np.maximum(self.gathered, known)
        self.pending -= times
        if self.pending < 0:
            raise Fault(f"{self.count - self.pending} arrivals in a phase of an mbarrier that counts {self.count}")
        self.complete()

    def expect(self, amount: int) -> None:
        self.bytes += amount
        self.complete()

    def land(self, amount: int, known: np.ndarray) -> None:
        """`amount` bytes have arrived."""
        self.gathered = np.maximum(self.gathered, known)
        self.bytes -= amount
        if abs(self.bytes) > TX_LIMIT:
            raise Fault(f"the mbarrier's count of bytes is {self.bytes}, beyond {TX_LIMIT}")
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.known = np.maximum(self.known, self.gathered)


def sync(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """bar.sync and barrier.sync: wait until `threads` are there."""
    o = instruction.operands
    number = decoder.read(o[0], np.uint32)
    threads = decoder.read(o[1], np.uint32) if len(o) > 1 else None
    if "arrive" in instruction.parts or "red" in instruction.parts:
        raise Unsupported(f"{instruction.opcode} is not known")

    def wait(gang: Gang, on: Any) -> None:
        cta, which = gang.cta, gang.one(number(gang), "the number of the barrier")
        total = cta.program.threads if threads is None else gang.one(threads(gang), "the number of threads")
        cta.arrive(gang, which, total // LANES)

    return wait, []


def mbarrier(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """mbarrier.init, .inval, .arrive with or without .expect_tx, .expect_tx, .try_wait.parity."""
    parts, o = instruction.parts, instruction.operands
    if "try_wait" in parts or "test_wait" in parts:
        return _try_wait(decoder, instruction)
    kind = parts[1]
    where = o[1] if kind == "arrive" else o[0]
    address = decoder.address(where)
    amount_text = o[2] if kind == "arrive" and len(o) > 2 else o[1] if kind in ("init", "expect_tx") else "1"
    amount, expects = decoder.read(amount_text, np.uint32), "expect_tx" in parts

    def act(gang: Gang, on: Any) -> None:
        lanes = np.arange(gang.n) if on is None else np.flatnonzero(on)
        numbers, addresses = amount(gang), address(gang)
        for lane in lanes.tolist():
            at, number, warp = int(addresses[lane]), of_lane(numbers, lane), np.asarray(gang.lane_warp[lane])
            if kind == "init":
                gang.cta.make_mbarrier(int(warp), at, number)
            elif kind == "inval":
                gang.cta.drop_mbarrier(int(warp), at)
            elif kind == "expect_tx":
                gang.cta.mbarrier(at, warp[None]).expect(number)
            else:
                bar, times = gang.cta.mbarrier(at, warp[None]), 1 if expects else number
                if expects:
                    bar.bytes += number
                bar.arrive(times, gang.cta.clocks.release(np.array([warp + gang.cta.first_warp])))

    return act, []


def _try_wait(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    o = instruction.operands
    target, address, parity = decoder.slot(o[0]), decoder.address(o[1]), decoder.read(o[2], np.uint32)

    def wait(gang: Gang, on: Any) -> None:
        at = gang.one(address(gang), "the mbarrier")
        bar, odd, cta = gang.cta.mbarrier(at, gang.warps), gang.one(parity(gang), "the parity") & 1, gang.cta
        passed = bar.phase & 1 != odd
        if not passed and not cta.gives_up():
            gang.pc -= 1
            gang.waiting = (
                (lambda: bar.phase & 1 != odd),
                (
                    lambda: (
                        f"the phase of parity {odd} of the mbarrier at {at} ({bar.pending} of {bar.count} arrivals and "
                        f"{bar.bytes} bytes are missing)"
                    )
                ),
            )
            return
        if passed:
            cta.clocks.acquire(gang.warps + cta.first_warp, bar.known)
        gang.regs[target] = np.full(gang.n, passed)

    return wait, [target]


def fence(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """fence.proxy.async; other fences order what is in order here."""
    if "proxy" not in instruction.parts:
        return (lambda gang, on: None), []

    def act(gang: Gang, on: Any) -> None:
        gang.cta.clocks.fence_proxy(gang.warps + gang.cta.first_warp)

    return act, []


def set_registers(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """setmaxnreg: `inc` waits until the CTA's pool has what it asks for."""
    grow, wanted = instruction.parts[1] == "inc", int(instruction.operands[0])

    def act(gang: Gang, on: Any) -> None:
        held, pool = gang.cta.held_registers, gang.cta.register_pool
        others = held.sum() - held[gang.warps].sum()
        if grow and (others + wanted * len(gang.warps)) * LANES > pool:
            gang.pc -= 1
            gang.waiting = (
                (lambda: (held.sum() - held[gang.warps].sum() + wanted * len(gang.warps)) * LANES <= pool),
                (lambda: f"registers: {wanted} a thread, of a pool of {pool}"),
            )
            return
        if not grow and (held[gang.warps] < wanted).any():
            raise Fault(f"setmaxnreg.dec to {wanted} registers, more than the {held[gang.warps].min()} there are")
        held[gang.warps] = wanted

    return act, []


def cluster(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """barrier.cluster.arrive and .wait: all warps of all CTAs of the cluster."""
    waits = "wait" in instruction.parts

    def act(gang: Gang, on: Any) -> None:
        gang.cta.meeting.wait(gang) if waits else gang.cta.meeting.arrive(gang)

    return act, []

"""A program as a list of functions of a gang, one an instruction.

Operands are looked up once, here; running an instruction is one call. A guard that holds for no lane skips the
instruction, one that holds for some keeps the other lanes' registers. A branch may send warps of a gang different ways
(the gang is cut), but never lanes of one warp: the compiler predicates such code, and a machine that followed it would
hide a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx import access, arithmetic, barriers, lanes, mma, tma, wgmma
from tests.ptx.parser import Instruction, Program, Unsupported
from tests.ptx.registers import LANES, Decoder, Fault, Gang
from tests.ptx.runs import Run, find_runs

LANE_OPS = ("shfl", "redux", "elect", "vote", "activemask")
NOTHING = ("nanosleep", "prefetch", "griddepcontrol")
_NO_BRACKETS = str.maketrans("{}[],|+", "       ")


@dataclass
class Decoded:
    """A program that can run."""

    program: Program
    decoder: Decoder
    ops: list[Callable[[Gang], None]]
    granule: int
    runs: list[Run | None]

    def mentioned(self, number: int) -> list[int]:
        """The registers, as slots, that instruction `number` names."""
        instruction = self.program.code[number]
        text = " ".join([*instruction.operands, instruction.guard or ""]).translate(_NO_BRACKETS)
        return [self.decoder.slots[word] for word in dict.fromkeys(text.split()) if word in self.decoder.slots]


def effect(instruction: Instruction) -> Any:
    """The builder of an instruction that does more than write registers; None for the rest."""
    parts = instruction.parts
    name = parts[0]
    if name in ("ld", "st", "ldmatrix", "stmatrix"):
        return access.build
    if name == "cp":
        return tma.build if "bulk" in parts else access.build
    if name == "mbarrier":
        return barriers.mbarrier
    if name in ("bar", "barrier"):
        if parts[1] == "warp":
            return _nothing
        return barriers.cluster if parts[1] == "cluster" else barriers.sync
    if name == "fence":
        return barriers.fence
    if name == "setmaxnreg":
        return barriers.set_registers
    if name == "wgmma":
        return wgmma.build
    return _nothing if name in NOTHING else None


def _nothing(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    return (lambda gang, on: None), []


def _guarded_effect(op: Any, mask: Any) -> Callable[[Gang], None]:
    def run(gang: Gang) -> None:
        on = mask(gang)
        lanes_on = np.count_nonzero(on)
        if lanes_on == gang.n:
            op(gang, None)
        elif lanes_on:
            op(gang, on)

    return run


def _guarded(decoder: Decoder, op: Any, mask: Any, targets: list[int]) -> Callable[[Gang], None]:
    def run(gang: Gang) -> None:
        on = mask(gang)
        lanes_on = np.count_nonzero(on)
        if not lanes_on:
            return
        if lanes_on == gang.n:
            op(gang)
            return
        old = [access.keep_old(decoder, gang, slot, gang.regs[slot], ~on & False) for slot in targets]
        op(gang)
        for slot, value in zip(targets, old, strict=True):
            gang.regs[slot] = np.where(on, gang.regs[slot], value)

    return run


def _branch(decoder: Decoder, instruction: Instruction) -> Callable[[Gang], None]:
    target = decoder.program.labels[instruction.operands[0]]
    mask = decoder.mask(instruction)

    def branch(gang: Gang) -> None:
        warps = len(gang.warps)
        if mask is None or (lanes_on := np.count_nonzero(on := mask(gang))) == gang.n:
            gang.pc = target
        elif lanes_on:
            going = whole_warps(on)
            gang.cta.split(gang, np.where(going, target, gang.pc))
            warps = int(going.sum())
        else:
            return
        if target <= gang.at:
            gang.cta.counts.go_round(gang.at, warps)

    return branch


def whole_warps(on: np.ndarray) -> np.ndarray:
    """Per warp: do its lanes take part? A fault where they differ."""
    rows = on.reshape(-1, LANES)
    if (rows.any(1) != rows.all(1)).any():
        raise Fault("lanes of one warp part at a branch")
    return rows.all(1)


def _table_branch(decoder: Decoder, instruction: Instruction) -> Callable[[Gang], None]:
    targets = np.array([decoder.program.labels[x] for x in decoder.program.tables[instruction.operands[1]]])
    index = decoder.read(instruction.operands[0], np.uint32)

    def branch(gang: Gang) -> None:
        rows = np.broadcast_to(index(gang).view(np.uint32), gang.n).reshape(-1, LANES)
        if (rows != rows[:, :1]).any() or (rows >= len(targets)).any():
            raise Fault("lanes of one warp part at a table of branches, or leave it")
        gang.cta.split(gang, targets[rows[:, 0]])

    return branch


def _leave(decoder: Decoder, instruction: Instruction) -> Callable[[Gang], None]:
    mask = decoder.mask(instruction)

    def leave(gang: Gang) -> None:
        if mask is not None:
            done = whole_warps(mask(gang))
            if not done.any():
                return
            if not done.all():
                gang.cta.split(gang, np.where(done, gang.pc - 1, gang.pc))
                return
        gang.cta.finish(gang)

    return leave


def _decode_one(decoder: Decoder, instruction: Instruction) -> Callable[[Gang], None]:
    name = instruction.parts[0]
    if name == "bra":
        return _branch(decoder, instruction)
    if name == "brx":
        return _table_branch(decoder, instruction)
    if name in ("ret", "exit"):
        return _leave(decoder, instruction)
    mask = decoder.mask(instruction)
    builder = effect(instruction)
    if builder is not None:
        op, _ = builder(decoder, instruction)
        return (lambda gang: op(gang, None)) if mask is None else _guarded_effect(op, mask)
    module = lanes if name in LANE_OPS else mma if name == "mma" else arithmetic
    op, targets = module.build(decoder, instruction)
    return op if mask is None else _guarded(decoder, op, mask, targets)


def decode(program: Program) -> Decoded:
    """Raises Unsupported, with the instruction and its place, where the machine does not know one."""
    decoder, ops, granule = Decoder(program), [], 4
    for instruction in program.code:
        try:
            ops.append(_decode_one(decoder, instruction))
        except (Unsupported, KeyError, ValueError, IndexError, TypeError) as error:
            raise Unsupported(f"{instruction} at {instruction.place}: {error!r}") from error
        parts = instruction.parts
        if parts[0] == "st" and parts[1].startswith("shared"):
            granule = min(granule, int(parts[-1][1:]) // 8)
    return Decoded(program, decoder, ops, granule, find_runs(decoder, program))

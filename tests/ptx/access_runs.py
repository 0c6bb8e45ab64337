"""Runs of accesses: equal loads from shared memory, or stores, behind one another, executed as one (`runs` says why).

All of them are checked and counted as one by one, but at once. Where one is at fault, or two stores meet in one place,
nothing is done at all: instructions are then executed one by one, and the fault is that of the one which makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.access import shape_of
from tests.ptx.conversions import dtype_of
from tests.ptx.parser import Instruction, list_of
from tests.ptx.registers import SIGNED, UNSIGNED, Decoder, Fault, Gang, every_lane

Execute = Callable[[Gang], bool]
FAILURES = (Fault, TypeError, AttributeError)  # a fault, or a register without a value


def member(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[str], list[str]] | None:
    """(a key, which all of a run have, the registers written, those read) of an access that may join a run."""
    parts, o, program = instruction.parts, instruction.operands, decoder.program
    space, loads, guard = parts[1].split("::")[0], parts[0] == "ld", instruction.guard
    if space not in (("shared",) if loads else ("shared", "global")) or (loads and guard is not None):
        return None
    names, base = list_of(o[0] if loads else o[1]), _base(o[1 if loads else 0])
    if not program.is_register(base) or (loads and not all(map(program.is_register, names))):
        return None
    key = (instruction.opcode, guard is None, program.bits(base), *(program.bits(x) for x in names if loads))
    return key, names if loads else [], [base] if loads else [base, *names]


def build(decoder: Decoder, members: list[Instruction]) -> Execute:
    """What executes a run."""
    return (_loads if members[0].parts[0] == "ld" else _stores)(decoder, members)


def _base(text: str) -> str:
    return text.strip("[] ").partition("+")[0].strip()


def _addresses(decoder: Decoder, texts: list[str]) -> Callable[[Gang], np.ndarray]:
    """The int64 addresses of all members' lanes, one member behind the other."""
    bases = [_base(text) for text in texts]
    offsets = np.array([[int(text.strip("[] ").partition("+")[2] or 0)] for text in texts])
    dtype = np.int64 if decoder.program.bits(bases[0]) == 64 else np.uint32
    if len(set(bases)) == 1:
        read = decoder.read(bases[0], dtype)
        return lambda gang: (offsets + read(gang).astype(np.int64)).reshape(-1)
    readers = [decoder.read(base, dtype) for base in bases]
    return lambda gang: (
        np.concatenate([read(gang) for read in readers]).reshape(len(bases), -1).astype(np.int64) + offsets
    ).reshape(-1)


def _masks(decoder: Decoder, members: list[Instruction]) -> Callable[[Gang], np.ndarray] | None:
    """Which of all members' lanes take part, [members, lanes] or the same for all; None: all of them."""
    if members[0].guard is None:
        return None
    masks = [decoder.mask(one) for one in members]
    if len({(one.guard, one.negated) for one in members}) == 1:
        return masks[0]
    return lambda gang: np.stack([mask(gang) for mask in masks])


def _loads(decoder: Decoder, members: list[Instruction]) -> Execute:
    parts, length = members[0].parts, len(members)
    (size, width), element = shape_of(parts), np.dtype(dtype_of(parts[-1]))
    names = [name for one in members for name in list_of(one.operands[0])]
    slots, natural = [decoder.slot(name) for name in names], np.dtype(decoder.natural(names[0]))
    addresses, total = _addresses(decoder, [one.operands[1] for one in members]), size * width
    wide = (SIGNED if element.kind == "i" else UNSIGNED)[8 * natural.itemsize]

    def execute(gang: Gang) -> bool:
        cta, n = gang.cta, gang.n
        try:
            at = cta.local(addresses(gang))
            values = cta.shared.read(np.concatenate((gang.lane_warp,) * length), at, size, width)
        except FAILURES:
            return False
        if cta.counts.on:
            for one in at.reshape(length, n):
                cta.counts.shared_access(gang.lane_warp, one, total)
        rows = np.ascontiguousarray(values.reshape(length, n, width).transpose(0, 2, 1)).reshape(-1, n)
        if element.itemsize != natural.itemsize:
            rows = rows.view(element).astype(wide)
        regs = gang.regs
        for slot, row in zip(slots, rows.view(natural), strict=True):
            regs[slot] = row
        return True

    return execute


def _stores(decoder: Decoder, members: list[Instruction]) -> Execute:
    parts, length = members[0].parts, len(members)
    size, width = shape_of(parts)
    dtype, shared = UNSIGNED[8 * size], parts[1].startswith("shared")
    addresses, masks = _addresses(decoder, [one.operands[0] for one in members]), _masks(decoder, members)
    readers = [decoder.read(x, dtype) for one in members for x in list_of(one.operands[1])]

    def execute(gang: Gang) -> bool:
        cta, n = gang.cta, gang.n
        try:
            on = None if masks is None else masks(gang)
            if on is not None and not np.count_nonzero(on):
                return True
            values = np.concatenate([every_lane(gang, read(gang).view(dtype)) for read in readers])
            values = np.ascontiguousarray(values.reshape(length, width, n).transpose(0, 2, 1)).reshape(-1, width)
            at, warps, numbers = addresses(gang), np.concatenate((gang.lane_warp,) * length), None
            if on is not None and np.count_nonzero(on) < on.size:
                on = np.broadcast_to(on, (length, n)).reshape(-1)
                at, warps, values, numbers = at[on], warps[on], values[on], np.flatnonzero(on) // n
            if shared:
                at = cta.local(at)
                cta.shared.write(warps, at, values)
            else:
                cta.memory.write(at, values)
        except FAILURES:
            return False
        if cta.counts.on:
            _count(cta.counts, shared, warps, at, size * width, np.arange(at.size) // n if numbers is None else numbers)
        return True

    return execute


def _count(counts: Any, shared: bool, warps: np.ndarray, at: np.ndarray, total: int, numbers: np.ndarray) -> None:
    """Count what each member, whose `numbers` its lanes have, stored."""
    for number in np.unique(numbers).tolist():
        mine = numbers == number
        if shared:
            counts.shared_access(warps[mine], at[mine], total)
        else:
            counts.global_access("st", warps[mine], at[mine], total)

"""Instructions that exchange values between the lanes of a warp: shuffles, reductions, votes, the elected lane.

Lanes of one warp never part here (a branch on which they differ is a fault), so the member mask is not looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.conversions import dtype_of
from tests.ptx.parser import Instruction, Unsupported
from tests.ptx.registers import LANES, Decoder, Gang, every_lane


def build(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """(what executes the instruction, the slots it writes)."""
    return {"shfl": _shuffle, "redux": _reduce, "elect": _elect, "vote": _vote, "activemask": _active}[
        instruction.parts[0]
    ](decoder, instruction)


def _shuffle(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    mode, o = instruction.parts[2], instruction.operands
    names = o[0].split("|")
    target, inside = decoder.slot(names[0]), decoder.slot(names[1]) if len(names) > 1 else None
    value, by = decoder.read(o[1], np.uint32), decoder.read(o[2], np.uint32)

    kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # by lanes and a distance that is the same for all

    def shuffle(gang: Gang) -> None:
        distance = by(gang)
        if isinstance(distance, np.generic):
            key = gang.n, int(distance)
            if key not in kept:
                kept[key] = _sources(mode, *key)
            source, valid = kept[key]
        else:
            source, valid = _sources(mode, gang.n, distance)
        gang.regs[target] = every_lane(gang, value(gang).view(np.uint32)).take(source)
        if inside is not None:
            gang.regs[inside] = valid

    return shuffle, [target] + ([] if inside is None else [inside])


def _sources(mode: str, lanes: int, distance: Any) -> tuple[np.ndarray, np.ndarray]:
    """From which lane each takes its value, itself where there is none, and whether there is one."""
    lane, start = np.arange(lanes) % LANES, np.arange(lanes) // LANES * LANES
    b = np.asarray(distance).astype(np.int64) & 31
    source = {"bfly": lane ^ b, "idx": b + 0 * lane, "up": lane - b, "down": lane + b}[mode]
    valid = (source >= 0) & (source < LANES)
    return start + np.where(valid, source, lane), valid


def _reduce(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    name, dtype = instruction.parts[2], dtype_of(instruction.parts[-1])
    functions = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }  # fmt: skip
    target, value = decoder.slot(instruction.operands[0]), decoder.read(instruction.operands[1], dtype)

    def reduce(gang: Gang) -> None:
        rows = value(gang).view(dtype).reshape(-1, LANES)
        gang.regs[target] = np.repeat(functions[name].reduce(rows, axis=1).astype(dtype), LANES).view(np.uint32)

    return reduce, [target]


def _elect(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    number, predicate = (None if x == "_" else decoder.slot(x) for x in instruction.operands[0].split("|"))

    def elect(gang: Gang) -> None:
        if number is not None:
            gang.regs[number] = np.zeros(gang.n, np.uint32)
        if predicate is not None:
            gang.regs[predicate] = np.arange(gang.n) % LANES == 0

    return elect, [slot for slot in (number, predicate) if slot is not None]


def _vote(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    mode, target = instruction.parts[2], decoder.slot(instruction.operands[0])
    value = decoder.read(instruction.operands[1], np.bool_)

    def vote(gang: Gang) -> None:
        rows = np.broadcast_to(value(gang).view(np.bool_), gang.n).reshape(-1, LANES)
        if mode == "ballot":
            gang.regs[target] = np.repeat((rows << np.arange(LANES, dtype=np.uint64)).sum(1).astype(np.uint32), LANES)
        elif mode in ("all", "any"):
            gang.regs[target] = np.repeat(getattr(rows, mode)(1), LANES)
        else:
            raise Unsupported(f"vote.{mode} is not known")

    return vote, [target]


def _active(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    target = decoder.slot(instruction.operands[0])

    def active(gang: Gang) -> None:
        gang.regs[target] = np.full(gang.n, 0xFFFFFFFF, np.uint32)

    return active, [target]

"""Loads and stores: parameters, global and shared memory, 8x8 matrices of a warp, and copies by cp.async.

Every function built here takes a gang and which of its lanes take part (None: all).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.ptx.conversions import dtype_of
from tests.ptx.parser import Instruction, Unsupported, list_of
from tests.ptx.registers import LANES, LOCAL, SIGNED, UNSIGNED, Decoder, Fault, Gang, Token, every_lane

Active = np.ndarray | None


def keep_old(decoder: Decoder, gang: Gang, slot: int, value: np.ndarray, on: Active) -> np.ndarray:
    """`value` where `on`, what the register holds elsewhere."""
    if on is None:
        return value
    old = gang.regs[slot]
    if isinstance(old, Token):
        raise Fault("writes a register that WGMMA is still using")
    return np.where(on, value, decoder.poison(gang, slot) if old is None else old)


def build(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """(what executes the instruction, the slots it writes); of ld, st, ldmatrix, stmatrix, and cp.async."""
    parts = [part for part in instruction.parts if part != "volatile"]  # here every access is performed as written
    if parts[0] in ("ldmatrix", "stmatrix"):
        return _matrix(decoder, instruction)
    if parts[:2] == ["cp", "async"]:
        return _copy(decoder, instruction)
    space = parts[1].split("::")[0]
    if space == "param":
        return _parameter(decoder, instruction)
    if space == parts[-1] or space == "local":
        return _local(decoder, instruction)
    if space not in ("global", "shared"):
        raise Unsupported(f"{instruction.opcode}: memory space {space!r} is not known")
    if parts[0] == "ld":
        return _load(decoder, instruction, space)
    return _store(decoder, instruction, space)


def shape_of(parts: list[str]) -> tuple[int, int]:
    """(bytes of an element, elements) of an access."""
    width = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
    return np.dtype(dtype_of(parts[-1])).itemsize, width


def _parameter(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    slot, natural = decoder.slot(instruction.operands[0]), np.dtype(decoder.natural(instruction.operands[0]))
    name, dtype = instruction.operands[1].strip("[] "), np.dtype(dtype_of(instruction.parts[-1]))

    def load(gang: Gang, on: Active) -> None:
        raw = gang.cta.arguments[name][: dtype.itemsize]
        value = np.frombuffer(raw, dtype)[0]
        wide = (SIGNED if dtype.kind == "i" else UNSIGNED)[8 * natural.itemsize]
        full = np.full(gang.n, value, dtype) if dtype.itemsize == natural.itemsize else np.full(gang.n, value, wide)
        gang.regs[slot] = keep_old(decoder, gang, slot, full.view(natural), on)

    return load, [slot]


def _load(decoder: Decoder, instruction: Instruction, space: str) -> tuple[Any, list[int]]:
    names = list_of(instruction.operands[0])
    slots, naturals = [decoder.slot(x) for x in names], [np.dtype(decoder.natural(x)) for x in names]
    size, width = shape_of(instruction.parts)
    element, address = np.dtype(dtype_of(instruction.parts[-1])), decoder.address(instruction.operands[1])

    def register(values: np.ndarray, natural: np.dtype) -> np.ndarray:
        values = np.ascontiguousarray(values).view(element)
        wide = (SIGNED if element.kind == "i" else UNSIGNED)[8 * natural.itemsize]
        return (values if element.itemsize == natural.itemsize else values.astype(wide)).view(natural)

    def load(gang: Gang, on: Active) -> None:
        at, warps = address(gang), gang.lane_warp
        if on is not None:
            at, warps = at[on], warps[on]
        if space == "global":
            values = gang.cta.memory.read(at, size, width)
            gang.cta.counts.global_access("ld", warps, at, size * width)
        else:
            at = gang.cta.local(at)
            values = gang.cta.shared.read(warps, at, size, width)
            gang.cta.counts.shared_access(warps, at, size * width)
        if on is not None:
            spread = np.zeros((gang.n, width), values.dtype)
            spread[on] = values
            values = spread
        for i, (slot, natural) in enumerate(zip(slots, naturals, strict=True)):
            gang.regs[slot] = keep_old(decoder, gang, slot, register(values[:, i], natural), on)

    return load, slots


def _store(decoder: Decoder, instruction: Instruction, space: str) -> tuple[Any, list[int]]:
    size, width = shape_of(instruction.parts)
    dtype, address = UNSIGNED[8 * size], decoder.address(instruction.operands[0])
    readers = [decoder.read(x, dtype) for x in list_of(instruction.operands[1])]

    def store(gang: Gang, on: Active) -> None:
        values = np.stack([every_lane(gang, read(gang).view(dtype)) for read in readers], 1)
        at, warps = address(gang), gang.lane_warp
        if on is not None:
            at, warps, values = at[on], warps[on], values[on]
        if space == "global":
            gang.cta.memory.write(at, values)
            gang.cta.counts.global_access("st", warps, at, size * width)
        else:
            at = gang.cta.local(at)
            gang.cta.shared.write(warps, at, values)
            gang.cta.counts.shared_access(warps, at, size * width)

    return store, []


def _local(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """One value of each thread's local memory; an access that names no space may reach that one only."""
    loads, dtype = instruction.parts[0] == "ld", np.dtype(dtype_of(instruction.parts[-1]))
    register, place = instruction.operands if loads else instruction.operands[::-1]
    size, width = shape_of(instruction.parts)
    if width != 1:
        raise Unsupported(f"{instruction.opcode}: vectors in local memory are not known")
    slot, natural = decoder.slot(register), np.dtype(decoder.natural(register))
    address, value = decoder.address(place), decoder.read(register, UNSIGNED[8 * size])

    def run(gang: Gang, on: Active) -> None:
        active, memory = np.ones(gang.n, bool) if on is None else on, gang.cta.local_bytes
        at, threads = address(gang)[active] - LOCAL, gang.tid[active]
        if (at < 0).any() or (at + size > memory.shape[1]).any() or (at % size).any():
            raise Fault(
                f"an access beyond the {memory.shape[1]} bytes of a thread's local memory, or in any other space"
            )
        where = threads[:, None], at[:, None] + np.arange(size)
        if not loads:
            raw = np.broadcast_to(value(gang).view(UNSIGNED[8 * size]), gang.n)[active]
            memory[where] = np.ascontiguousarray(raw).view(np.uint8).reshape(-1, size)
            return
        full = np.zeros(gang.n, natural)
        full[active] = memory[where].view(dtype)[:, 0].astype(natural)
        gang.regs[slot] = keep_old(decoder, gang, slot, full, on)

    return run, [slot] if loads else []


def _matrix(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """8x8 matrices of 16 bits: lane 8 j + r has the address of row r of matrix j; a lane holds two values of a row."""
    loads, parts, o = instruction.parts[0] == "ldmatrix", instruction.parts, instruction.operands
    names, place = list_of(o[0] if loads else o[1]), o[1] if loads else o[0]
    slots, address = [decoder.slot(x) for x in names], decoder.address(place)
    readers = [decoder.read(x, np.uint32) for x in names]
    lane, transposed, count = np.arange(LANES), "trans" in parts, len(names)
    row, column = lane // 4, lane % 4 * 2

    def load(gang: Gang, on: Active) -> None:
        at, warps = _rows(gang, on, address, count)
        raw = gang.cta.shared.read(warps, at, 4, 4)
        gang.cta.counts.shared_access(warps, at, 16)
        tiles = np.ascontiguousarray(raw).view(np.uint16).reshape(len(gang.warps), count, 8, 8)
        tiles = tiles.transpose(0, 1, 3, 2) if transposed else tiles
        pairs = np.ascontiguousarray(np.stack([tiles[:, :, row, column], tiles[:, :, row, column + 1]], -1))
        for j, slot in enumerate(slots):
            gang.regs[slot] = np.ascontiguousarray(pairs[:, j]).reshape(-1).view(np.uint32)

    def store(gang: Gang, on: Active) -> None:
        values = [np.ascontiguousarray(read(gang).view(np.uint32)).view(np.uint16) for read in readers]
        at, warps = _rows(gang, on, address, count)
        tiles = np.zeros((len(gang.warps), count, 8, 8), np.uint16)
        for j, value in enumerate(values):
            pair = value.reshape(-1, LANES, 2)
            tiles[:, j, row, column], tiles[:, j, row, column + 1] = pair[..., 0], pair[..., 1]
        tiles = np.ascontiguousarray(tiles.transpose(0, 1, 3, 2) if transposed else tiles)
        gang.cta.shared.write(warps, at, tiles.view(np.uint32).reshape(-1, 4))
        gang.cta.counts.shared_access(warps, at, 16)

    return (load, slots) if loads else (store, [])


def _rows(gang: Gang, on: Active, address: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(addresses, warps) of the rows of `count` matrices."""
    if on is not None and not on.all():
        raise Fault("lanes of a warp part at a matrix access")
    at = gang.cta.local(address(gang)).reshape(-1, LANES)[:, : 8 * count].reshape(-1)
    return at, np.repeat(gang.warps, 8 * count)


def _copy(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """cp.async: 4 to 16 bytes a lane from global to shared memory, under way until the wait for its group."""
    parts, o = instruction.parts, instruction.operands
    if "commit_group" in parts:
        return _commit, []
    if "wait_group" in parts or "wait_all" in parts:
        kept = int(o[0], 0) if o else 0
        return (lambda gang, on: _wait(gang, kept)), []
    target, source, total = decoder.address(o[0]), decoder.address(o[1]), int(o[2], 0)
    count = decoder.read(o[3], np.uint32) if len(o) > 3 else (lambda gang: np.full(gang.n, total, np.uint32))

    def copy(gang: Gang, on: Active) -> None:
        active = np.ones(gang.n, bool) if on is None else on
        to, bytes_read = (
            gang.cta.local(target(gang)[active]),
            np.broadcast_to(count(gang).view(np.uint32), gang.n)[active],
        )
        warps, shared = gang.lane_warp[active], gang.cta.shared
        shared.check(to, total)
        values = np.zeros((to.size, total // 4), np.uint32)
        full = bytes_read > 0
        if not np.isin(bytes_read, (0, total)).all():
            raise Unsupported("cp.async that copies a part and fills the rest with zeros")
        values[full] = gang.cta.memory.read(source(gang)[active][full], 4, total // 4)
        gang.cta.counts.global_access("ld", warps[full], source(gang)[active][full], total)
        granules = shared.granules(to, total)
        for warp in sorted(set(warps.tolist())):
            shared.stamps.begin_copy(warp + shared.first_warp, granules[warps == warp].reshape(-1), asynchronous=False)
        shared.views[4][(to // 4)[:, None] + np.arange(total // 4)] = values
        gang.copies.append((warps, granules))

    return copy, []


def _commit(gang: Gang, on: Active) -> None:
    gang.copy_groups.append(gang.copies)
    gang.copies = []


def _wait(gang: Gang, kept: int) -> None:
    """Groups but the newest `kept` have arrived: their warps know it."""
    shared = gang.cta.shared
    while len(gang.copy_groups) > kept:
        group = gang.copy_groups.pop(0)
        for warp in sorted({w for warps, _ in group for w in warps.tolist()}):
            stamp, known = shared.stamps.clocks.arrival(warp + shared.first_warp)
            for warps, granules in group:
                shared.stamps.end_copy(granules[warps == warp].reshape(-1), stamp)
            shared.stamps.clocks.acquire(np.array([warp + shared.first_warp]), known)

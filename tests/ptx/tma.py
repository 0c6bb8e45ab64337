"""TMA: tensors copied by tiles between global and shared memory, asynchronously.

A load may land at any moment between its issue and the end of the phase that waits for its bytes: the schedule draws
when. Until then its bytes in shared memory belong to nobody. A store reads shared memory from its issue to the
`wait_group` of the warp that issued it; nobody may write there meanwhile, so the bytes are taken at once.

A tensor map is what the driver would encode: sizes outermost first, strides in bytes, the box of one copy (a row of
it is at most one line of the swizzle wide), and the swizzle: the 16-byte column of a byte in shared memory is
exclusive-ored with bits of its row (128 bytes: 8 columns, 3 bits; 64: 4; 32: 2). A copy begins at a multiple of 16
bytes of a row: to an H100 a one-dimensional load that did not was an illegal instruction (benchmarks/LOG.md). What lies
outside the tensor is zero when it is loaded and not written when it is stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tests.ptx.memory import BASE, Global
from tests.ptx.order import PIECE
from tests.ptx.parser import Instruction, Unsupported, split_operands
from tests.ptx.registers import MAPS, WINDOW, Decoder, Fault, Gang, of_lane

ALIGNMENT = 128  # of a tile in shared memory


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory and the box that one copy moves; outermost dim first."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    box: tuple[int, ...]
    size: int  # bytes of an element
    swizzle: int  # bytes of a line, 0 for none

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.size


def swizzled(address: np.ndarray, line: int) -> np.ndarray:
    """Where the byte that would lie at `address` lies, with lines of `line` bytes."""
    bits = {0: 0, 32: 1, 64: 3, 128: 7}[line]
    return address ^ (((address >> 7) & bits) << 4)


@lru_cache(maxsize=1024)  # schedule by schedule a case copies the same boxes
def places(tensor: TensorMap, at: tuple[int, ...], start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(is it inside the tensor, index into global memory, address in shared memory) of every piece of a box, its bytes.

    A piece is 16 bytes, which stay together in every swizzle, where the tensor's rows and the box begin and end at
    whole pieces, or 1. Indices and addresses count pieces.
    """
    box, shape, strides, size = tensor.box, tensor.shape, tensor.strides, tensor.size
    first, length = at[-1] * size, box[-1] * size
    whole = (tensor.base, *strides[:-1], start, first, length, shape[-1] * size)
    piece = 1 if any(number % PIECE for number in whole) else PIECE
    rows, far, row_inside = 1, np.zeros((1, 1), np.int64), np.ones((1, 1), np.bool_)
    for begin, count, extent, stride in zip(at[:-1], box[:-1], shape[:-1], strides[:-1], strict=True):
        place = begin + np.arange(count)[None, :, None]
        far = (far[:, None, :] + place * stride).reshape(-1, 1)
        row_inside = (row_inside[:, None, :] & (place >= 0) & (place < extent)).reshape(-1, 1)
        rows *= count
    row, byte = np.arange(rows)[:, None], np.arange(0, length, piece)[None, :]
    column = byte // size + at[-1]
    inside = row_inside & (column >= 0) & (column < shape[-1])
    outer = tensor.base - BASE + far + first + byte
    inner = swizzled(start + row * length + byte, tensor.swizzle)
    return inside, outer // piece, inner // piece, piece


def pieces(raw: np.ndarray, piece: int) -> np.ndarray:
    """Bytes as pieces of that many."""
    return raw if piece == 1 else raw.view(f"V{piece}")


def existing(memory: Global, where: np.ndarray, piece: int) -> np.ndarray:
    first, last = where * piece, where * piece + (piece - 1)
    if where.size and (
        (first < 0).any()
        or (last >= memory.used).any()
        or not (memory.exists[first].all() and memory.exists[last].all())
    ):
        raise Fault("TMA reaches beyond the tensor's storage: its map is wrong")
    return where


def load_tile(memory: Global, shared: Any, tensor: TensorMap, at: tuple[int, ...], start: int) -> None:
    """The bytes arrive."""
    inside, outer, inner, piece = places(tensor, at, start)
    tile = pieces(np.zeros(inner.size * piece, np.uint8), piece).reshape(inner.shape)
    tile[inside] = pieces(memory.bytes, piece)[existing(memory, outer[inside], piece)]
    pieces(shared.bytes, piece)[inner] = tile


def store_tile(memory: Global, shared: Any, tensor: TensorMap, at: tuple[int, ...], start: int, adds: bool) -> None:
    """The bytes are written, or as FP32 added to what is there."""
    inside, outer, inner, piece = places(tensor, at, start)
    kept, tile = pieces(memory.bytes, piece), pieces(shared.bytes, piece)[inner[inside]]
    where = existing(memory, outer[inside], piece)
    if adds:
        tile = (kept[where].view(np.float32) + tile.view(np.float32)).view(tile.dtype)
    kept[where] = tile


def region(gang: Gang, tensor: TensorMap, start: int) -> slice:
    """The granules of a tile in shared memory."""
    shared = gang.cta.shared
    if start % ALIGNMENT:
        raise Fault(f"TMA's tile in shared memory starts at {start}, which is no multiple of {ALIGNMENT} bytes")
    if start < 0 or start + tensor.bytes > shared.size:
        raise Fault(f"TMA's tile ends at {start + tensor.bytes}, beyond the {shared.size} bytes of shared memory")
    return slice(start // shared.granule, (start + tensor.bytes) // shared.granule)


def build(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """(what executes the instruction, no slots) of cp.async.bulk and cp.reduce.async.bulk."""
    parts, o = instruction.parts, instruction.operands
    if "commit_group" in parts:
        return _commit, []
    if "wait_group" in parts:
        kept = int(o[0])
        return (lambda gang, on: _wait(gang, kept)), []
    adds = parts[1] == "reduce"
    if "tensor" not in parts or parts[0] != "cp" or (adds and "add" not in parts):
        raise Unsupported(f"{instruction.opcode} is not known")
    loads = not adds and parts[5].startswith("shared") and parts[6] == "global"
    tile_text, map_text = (o[0], o[1]) if loads else (o[1], o[0])
    match = re.fullmatch(r"\[\s*(\S+?)\s*,\s*\{(.*)\}\s*\]", map_text)
    tensor_map, tile = decoder.read(match[1], np.uint64), decoder.address(tile_text)
    coordinates = [decoder.read(x, np.int32) for x in split_operands(match[2])][::-1]
    bar = decoder.address(o[2]) if loads else None
    mask = decoder.read(o[3], np.uint16) if "multicast::cluster" in parts else None

    def copy(gang: Gang, on: Any) -> None:
        for lane in range(gang.n) if on is None else np.flatnonzero(on).tolist():
            pick = lambda value: of_lane(value, lane)  # noqa: B023, E731  used at once
            tensor = gang.cta.maps[(pick(tensor_map(gang)) - MAPS) // 256]
            at = tuple(pick(read(gang).view(np.int32)) for read in coordinates)
            if at[-1] * tensor.size % PIECE:
                raise Fault(f"TMA's copy begins at {at[-1] * tensor.size} bytes of a row, no multiple of {PIECE}")
            start = int(gang.cta.local(np.array([pick(tile(gang))]))[0])
            warp = int(gang.lane_warp[lane])
            if loads:
                ctas = pick(mask(gang)) if mask is not None else 1 << gang.cta.rank
                _load(gang, warp, tensor, at, start, pick(bar(gang)), ctas)
            else:
                _store(gang, warp, tensor, at, start, adds)

    return copy, []


def _load(gang: Gang, warp: int, tensor: TensorMap, at: tuple[int, ...], start: int, bar: int, ctas: int) -> None:
    where = region(gang, tensor, start)
    for cta in gang.cta.peers:
        if not ctas >> cta.rank & 1:
            continue
        agent, stamps = warp + gang.cta.first_warp, cta.shared.stamps
        mbarrier = cta.mbarrier(bar + ((cta.rank - gang.cta.rank) << WINDOW))
        stamps.begin_copy(agent, where, asynchronous=True)

        def land(cta: Any = cta, agent: int = agent, mbarrier: Any = mbarrier) -> None:
            load_tile(cta.memory, cta.shared, tensor, at, start)
            stamp, known = cta.clocks.arrival(agent)
            cta.shared.stamps.end_copy(where, stamp)
            mbarrier.land(tensor.bytes, known)

        gang.cta.under_way.append(land)


def _store(gang: Gang, warp: int, tensor: TensorMap, at: tuple[int, ...], start: int, adds: bool) -> None:
    region(gang, tensor, start)  # which must be there
    stamps, place = gang.cta.shared.stamps, gang.cta.place(gang)
    warps = np.array([warp + gang.cta.first_warp])
    of_tile = np.arange(start // PIECE, -(-(start + tensor.bytes) // PIECE))
    read = stamps.begin_read(warps, of_tile, lambda: f"the TMA store ({place}) reads")
    store_tile(gang.cta.memory, gang.cta.shared, tensor, at, start, adds)
    gang.stores.append((warps, read))


def _commit(gang: Gang, on: Any) -> None:
    if gang.stores:
        gang.store_groups.append(gang.stores)
        gang.stores = []


def _wait(gang: Gang, kept: int) -> None:
    """Groups but the newest `kept` have read their tiles."""
    while len(gang.store_groups) > kept:
        for warps, read in gang.store_groups.pop(0):
            gang.cta.shared.stamps.end_read(warps, read)

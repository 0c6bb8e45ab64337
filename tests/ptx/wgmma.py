"""Warp-group products: operands in shared memory, sums in registers that nobody may read before the wait.

A `mma_async` takes its operands from shared memory at any moment until `wait_group` has let its group go: nobody may
write there meanwhile, which `order` watches, so it does not matter when the product is formed. It is when its group is
let go; until then its registers hold a token that is worth a fault to any instruction but a copy or the next product of
the same sums, which adds to them where they are. Sums that ordinary instructions wrote need a `wgmma.fence` after that.

A product is formed in FP32 (each is exact; bounds of the tests are those of the project's GPU tests), or, where the
machine has `fraction_bits`, an FP8 one as the tensor core keeps it (`accumulator`). Operands with descriptors are
known, E4M3 (K-major) and BF16 (either way round), and A of BF16 from registers, which like the sums must have been
written before a fence; that nobody writes them again before the wait is not watched.

A descriptor: start, leading and stride offsets in units of 16 bytes, the swizzle in bits 62 and 63. K-major: row r
lies in line r % 8 of the r // 8th group, groups `stride` apart. Other way round, a line holds 64 values of one k; 8
of k make a group, groups `stride` apart, and the next 64 values lie `leading` further.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np

from tests.ptx.accumulator import truncated_sum
from tests.ptx.conversions import E4M3_PAIRS, f32_of_bf16
from tests.ptx.order import PIECE
from tests.ptx.parser import Instruction, Unsupported, list_of
from tests.ptx.registers import LANES, Decoder, Fault, Gang, Token
from tests.ptx.tma import swizzled

LINES = {1: 128, 2: 64, 3: 32}
WARPS = 4


@dataclass(frozen=True)
class Form:
    """How operands lie: their kind, which of A and B are K-major (0), whether registers hold A."""

    kind: str
    majors: tuple[int, int]
    held: bool

    def values(self, shared: Any, side: int, where: np.ndarray) -> np.ndarray:
        """What lies at places of A (side 0) or B (1), as FP32 [rows, k]."""
        if self.held and side == 0:
            return where
        raw = (shared.views[2] if self.majors[side] else shared.bytes.view(f"V{PIECE}")).take(where)
        if self.kind == "e4m3":
            return E4M3_PAIRS.take(raw.view(np.uint16)).view(np.float32)
        return f32_of_bf16(raw.view(np.uint16))


@dataclass(frozen=True)
class Product:
    """One WGMMA: by equal descriptors, which of the gang's warps have them, and the places of A and B (`_places`)."""

    form: Form
    warps: list[list[int]]
    sides: list[tuple[np.ndarray, np.ndarray]]


class Sums:
    """Sums in one set of registers: `values` [warps, 16, n] FP32, None for zeros, and products that are to be added.

    `under_way` is how many products are waited for. They are formed when the first of them is let go, until when
    nobody may write what they read: those behind one another with as many gathers and multiplications as a single one.
    """

    def __init__(self, shared: Any, shape: tuple[int, int, int], values: np.ndarray | None) -> None:
        self.shared, self.shape, self.values, self.under_way = shared, shape, values, 0
        self.products: list[Product] = []
        self.tokens = tuple(Token(self, i) for i in range(shape[2] // 2))

    def settle(self, fraction_bits: int | None = None) -> None:
        """Form the products."""
        while self.products:
            first = self.products[0]
            alike = [one for one in self.products if one.form == first.form and one.warps == first.warps]
            alike = alike if len(alike) == len(self.products) else [first]
            self.products = self.products[len(alike) :]
            out = np.empty(self.shape, np.float32)
            for i, warps in enumerate(first.warps):
                left, right = (
                    first.form.values(self.shared, side, np.concatenate([one.sides[i][side] for one in alike], 1))
                    for side in (0, 1)
                )
                if fraction_bits is None:
                    product = left @ right.T
                else:
                    start = None if self.values is None else self.values[warps].reshape(-1, self.shape[2])
                    product = truncated_sum(left, right, start, fraction_bits)
                product = product.reshape(-1, *self.shape[1:])
                if len(warps) == len(out):
                    out = product
                else:
                    out[warps] = product
            self.values = out if self.values is None or fraction_bits is not None else out + self.values

    def registers(self) -> list[np.ndarray]:
        """The bits of each register, for all lanes: lane 4 r + c has columns 2 c and 2 c + 1 of rows r and r + 8."""
        self.settle()
        warps, _, n = self.shape
        parts = self.values.reshape(warps, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
        return list(np.ascontiguousarray(parts).reshape(n // 2, warps * LANES).view(np.uint32))


def sums_of(registers: list[np.ndarray]) -> np.ndarray:
    """[warps, 16, n] FP32: what `registers` gives the bits of."""
    parts = np.concatenate(registers).view(np.float32).reshape(len(registers) // 4, 2, 2, -1, 8, 4)
    return np.ascontiguousarray(parts.transpose(3, 1, 4, 0, 5, 2)).reshape(parts.shape[3], 16, -1)


class State:
    """A gang's products: since the last commit, and groups of them that are under way."""

    def __init__(self) -> None:
        self.open: list[tuple[Any, Sums]] = []
        self.groups: list[list[tuple[Any, Sums]]] = []
        self.fenced: list[Any] = []  # what each register held at the last fence

    def fence(self, gang: Gang) -> None:
        self.fenced = list(gang.regs)


def state(gang: Gang) -> State:
    if gang.wgmma is None:
        gang.wgmma = State()
    return gang.wgmma


def build(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """(what executes the instruction, the slots it writes)."""
    parts, o = instruction.parts, instruction.operands
    if parts[1] == "fence":
        return (lambda gang, on: state(gang).fence(gang)), []
    if parts[1] == "commit_group":
        return _commit, []
    if parts[1] == "wait_group":
        kept = int(o[0])
        return (lambda gang, on: _wait(gang, kept)), []
    return _product(decoder, instruction)


def _commit(gang: Gang, on: Any) -> None:
    gang.cta.counts.started.append((gang.cta.ctaid, gang.warps))
    state(gang).groups.append(state(gang).open)
    state(gang).open = []


def _wait(gang: Gang, kept: int) -> None:
    groups, arrived = state(gang).groups, {}
    while len(groups) > kept:
        for reads, sums in groups.pop(0):
            sums.settle()
            for warps, read in reads:
                gang.cta.shared.stamps.end_read(warps, read)
            sums.under_way -= 1
            if not sums.under_way:
                arrived[sums] = sums.registers()
                sums.tokens = ()  # which hold the sums, and would until the next collection
    if arrived:
        regs = gang.regs
        for slot in gang.cta.decoded.decoder.moved:
            value = regs[slot]
            if value.__class__ is Token and value.sums in arrived:
                regs[slot] = arrived[value.sums][value.index]


def _product(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    opcode, o = instruction.opcode, instruction.operands
    match = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(e4m3|bf16)\.(e4m3|bf16)", opcode)
    if match is None or match[3] != match[4] or (o[1].startswith("{") and match[3] != "bf16"):
        raise Unsupported(f"{opcode}: only E4M3 and BF16 operands (A from registers: BF16) and FP32 sums are known")
    n, k, kind = int(match[1]), int(match[2]), match[3]
    slots = [decoder.slot(x) for x in list_of(o[0])]
    held = list_of(o[1]) if o[1].startswith("{") else []  # registers of A
    b, keeps = decoder.read(o[2], np.uint64), decoder.read(o[3], np.bool_)
    signs, majors = [int(x) for x in o[4:6]], [int(x) for x in o[6:8]] or [0, 0]
    if held:
        fragments, held_slots = [decoder.read(x, np.uint32) for x in held], [decoder.slot(x) for x in held]
        read_a, majors = (lambda gang: np.zeros(1, np.uint64)), [0, *majors[:1]]
    else:
        read_a, held_slots = decoder.read(o[1], np.uint64), []
    if signs != [1, 1] or len(slots) != n // 2:
        raise Unsupported(f"{opcode} with factors {signs} and {len(slots)} registers")
    decoder.moved.update(slots)
    of_sums, of_a_and_sums = itemgetter(*slots), [*slots, *held_slots]
    form = Form(kind, (majors[0], majors[1]), bool(held))
    layout = (n, k, kind, *majors)

    def multiply(gang: Gang, on: Any) -> None:
        keep = gang.one(keeps(gang), "the predicate of a WGMMA")
        before, sums = of_sums(gang.regs), None  # what the registers hold, and the sums that are still under way
        if before[0].__class__ is Token and before == before[0].sums.tokens:
            sums = before[0].sums
        _check(gang, held_slots if sums is not None else of_a_and_sums)
        kept = fragment_of_a([read(gang) for read in fragments]) if held else None
        parts = _by_descriptors(gang, read_a(gang), b(gang))
        if sums is None:
            sums = Sums(gang.cta.shared, (len(gang.warps), 16, n), _sums(before) if keep else None)
            for slot, token in zip(slots, sums.tokens, strict=True):
                gang.regs[slot] = token
        elif not keep:
            sums.products, sums.values = [], None
        at, reads, sides = gang.cta.place(gang), [], []
        for pair, mine in parts:
            warps = gang.warps[mine]
            quarters = warps % WARPS
            of_a, of_b, pieces = _places(
                gang.cta.shared.size, pair, None if kept is not None else tuple(quarters.tolist()), layout
            )
            sides.append((of_a if kept is None else kept[mine].reshape(-1, k), of_b))
            warps = warps + gang.cta.first_warp
            what = lambda at=at: f"the WGMMA ({at}) reads it"  # noqa: E731
            reads.append((warps, gang.cta.shared.stamps.begin_read(warps, pieces, what)))
        sums.products.append(Product(form, [mine for _, mine in parts], sides))
        sums.under_way += 1
        if kind == "e4m3" and gang.cta.fraction_bits is not None:
            sums.settle(gang.cta.fraction_bits)
        state(gang).open.append((reads, sums))

    return multiply, slots


def _by_descriptors(gang: Gang, a: Any, b: Any) -> list[tuple[tuple[int, int], list[int]]]:
    """Pairs of descriptors, and which of the gang's warps have them."""
    found: dict[tuple[int, int], list[int]] = {}
    for warp, pair in enumerate(zip(_of_warps(gang, a).tolist(), _of_warps(gang, b).tolist(), strict=True)):
        found.setdefault(pair, []).append(warp)
    return sorted(found.items())


def _of_warps(gang: Gang, value: Any) -> np.ndarray:
    """A descriptor of each warp: its first lane's."""
    return value[::LANES] if value.shape == (gang.n,) else np.broadcast_to(value, len(gang.warps))


def fragment_of_a(registers: list[np.ndarray]) -> np.ndarray:
    """A as the registers hold it, [warps, 16, 16] FP32: two neighbours of k each, first of rows r, then of r + 8."""
    pairs = np.stack(registers).view(np.uint16).reshape(len(registers), -1, LANES, 2)
    lane, values = np.arange(LANES), np.zeros((pairs.shape[1], 16, 16), np.float32)
    for i, pair in enumerate(pairs):
        for half in (0, 1):
            row, column = lane // 4 + 8 * (i % 2), 2 * (lane % 4) + 8 * (i // 2) + half
            values[:, row, column] = f32_of_bf16(np.ascontiguousarray(pair[:, :, half]))
    return values


def _check(gang: Gang, slots: list[int]) -> None:
    """Sums that ordinary instructions wrote come before a fence."""
    fenced, regs = state(gang).fenced, gang.regs
    for slot in slots:
        value = regs[slot]
        if value.__class__ is not np.ndarray or (slot < len(fenced) and value is fenced[slot]):
            continue
        if not any(value is one for one in fenced):  # a copy is no write: compilers rename registers
            raise Fault("a WGMMA takes registers that were written after the last wgmma.fence")


def _sums(before: tuple[Any, ...]) -> np.ndarray:
    """What the registers hold, [warps, 16, n] FP32."""
    if any(value is None for value in before):
        raise Fault("a WGMMA adds to registers that nobody wrote")
    arrays = {id(one.sums): one.sums.registers() for one in before if one.__class__ is Token}
    return sums_of([arrays[id(one.sums)][one.index] if one.__class__ is Token else one for one in before])


@lru_cache(maxsize=8192)  # a ring's slots come round again and again, and are where another kernel's are
def _places(
    size: int, pair: tuple[int, int], quarters: tuple[int, ...] | None, layout: tuple[int, int, str, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where A (quarters None: it lies in registers) and B lie, and the pieces of 16 bytes that are read of both.

    K-major: pieces of 16 bytes, [rows, k / 16 bytes]. Otherwise each value, in units of 2 bytes, [rows, k].
    """
    n, k, kind, *majors = layout
    rows = None if quarters is None else np.add.outer(16 * np.array(quarters), np.arange(16)).reshape(-1), np.arange(n)
    found, both = [], []
    for descriptor, numbers, major in zip(pair, rows, majors, strict=True):
        if numbers is None:
            found.append(np.zeros(0, np.int64))
            continue
        step = 1 if major else PIECE if kind == "e4m3" else PIECE // 2
        address = _addresses(size, descriptor, numbers, np.arange(0, k, step), kind, major)
        both.append(address.ravel() // PIECE)
        found.append(address // 2 if major else both[-1].reshape(address.shape))
    return found[0], found[1], np.unique(np.concatenate(both))


def _addresses(size: int, descriptor: int, rows: np.ndarray, of_k: np.ndarray, kind: str, major: int) -> np.ndarray:
    """Where the first byte of values lies, [rows, of_k]; K-major, those that begin 16 bytes."""
    start, leading, stride = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 62 not in LINES:
        raise Unsupported("a WGMMA operand without swizzle")
    line, bytes_of_value = LINES[descriptor >> 62], 1 if kind == "e4m3" else 2
    if major == 0:
        first = (rows // 8 * stride + rows % 8 * line)[:, None] + of_k * bytes_of_value
    elif kind == "bf16":
        of_row = rows // (line // 2) * leading + rows % (line // 2) * 2
        first = of_row[:, None] + (of_k // 8 * stride + of_k % 8 * line)
    else:
        raise Unsupported("an E4M3 operand that is not K-major")
    address = swizzled(start + first, line)
    if (address + (bytes_of_value if major else PIECE) > size).any():
        raise Fault(f"a WGMMA reads shared memory beyond its {size} bytes")
    return address

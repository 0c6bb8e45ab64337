"""Warp-group products: operands in shared memory, sums in registers that nobody may read before the wait.

A `mma_async` takes its operands from shared memory at any moment until `wait_group` has let its group go: nobody may
write there meanwhile, which `order` watches, so the product is formed at once and kept from the program: its
registers hold a token that is worth a fault to any instruction but a copy or the next product of the same sums. Sums
that ordinary instructions wrote need a `wgmma.fence` after that.

A product is formed in FP32 (each is exact, the tensor core keeps about 14 bits of the sum of one instruction: bounds
of the tests are those of the project's GPU tests). Operands with descriptors are known, E4M3 (K-major) and BF16 (either
way round), and A of BF16 from registers, which like the sums must have been written before a fence; that nobody writes
them again before the wait is not watched.

A descriptor: start, leading and stride offsets in units of 16 bytes, the swizzle in bits 62 and 63. K-major: row r
lies in line r % 8 of the r // 8th group, groups `stride` apart. Other way round, a line holds 64 values of one k; 8
of k make a group, groups `stride` apart, and the next 64 values lie `leading` further.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.ptx.conversions import E4M3_VALUES, f32_of_bf16
from tests.ptx.parser import Instruction, Unsupported, list_of
from tests.ptx.registers import LANES, Decoder, Fault, Gang, Token
from tests.ptx.tma import swizzled

LINES = {1: 128, 2: 64, 3: 32}
WARPS = 4


class State:
    """A gang's products: since the last commit, and groups of them that are under way."""

    def __init__(self) -> None:
        self.open: list[tuple[Any, list[Token]]] = []
        self.groups: list[list[tuple[Any, list[Token]]]] = []
        self.fenced: list[Any] = []
        self.allowed: set[int] = set()

    def fence(self, gang: Gang) -> None:
        self.fenced = list(gang.regs)  # kept, so that no other array takes an id
        self.allowed = {id(value) for value in self.fenced}


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
    state(gang).groups.append(state(gang).open)
    state(gang).open = []


def _wait(gang: Gang, kept: int) -> None:
    groups = state(gang).groups
    while len(groups) > kept:
        for reads, sums in groups.pop(0):
            for warps, read in reads:
                gang.cta.shared.stamps.end_read(warps, read)
            for one in sums:
                one.ready = True
    for slot, value in enumerate(gang.regs):
        if isinstance(value, Token) and value.ready:
            gang.regs[slot] = value.value


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
        read_a = decoder.read(o[1], np.uint64)
    if signs != [1, 1] or len(slots) != n // 2:
        raise Unsupported(f"{opcode} with factors {signs} and {len(slots)} registers")
    lane = np.arange(LANES)
    i = np.arange(n // 2)[:, None]
    row, column = lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2  # [registers, lanes]

    def product(gang: Gang, on: Any) -> None:
        keep = gang.one(keeps(gang), "the predicate of a WGMMA")
        _check(gang, [*slots, *held_slots] if held else slots)
        kept = _held([read(gang) for read in fragments]) if held else None
        sums = _sums(gang, slots) if keep else None
        descriptors = [np.broadcast_to(read(gang).view(np.uint64), gang.n)[::LANES] for read in (read_a, b)]
        place, reads = gang.cta.place(gang), []
        out = np.zeros((len(gang.warps), 16, n), np.float32)
        for pair in sorted({(int(x), int(y)) for x, y in zip(*descriptors, strict=True)}):
            mine = np.flatnonzero((descriptors[0] == pair[0]) & (descriptors[1] == pair[1]))
            rows = (16 * (gang.warps[mine] % WARPS)[:, None] + np.arange(16)).reshape(-1)
            if kept is None:
                left, left_bytes = _operand(gang, pair[0], rows, k, kind, majors[0])
            else:
                left, left_bytes = kept[mine].reshape(-1, k), np.zeros(0, np.int64)
            right, right_bytes = _operand(gang, pair[1], np.arange(n), k, kind, majors[1])
            out[mine] = (left @ right.T).reshape(-1, 16, n)
            granule = gang.cta.shared.granule
            touched = np.zeros(gang.cta.shared.size // granule, bool)
            touched[left_bytes // granule] = touched[right_bytes // granule] = True
            granules = np.flatnonzero(touched)
            warps = gang.warps[mine] + gang.cta.first_warp
            what = lambda place=place: f"the WGMMA ({place}) reads it"  # noqa: E731
            reads.append((warps, gang.cta.shared.stamps.begin_read(warps, granules, what)))
        values = out[:, row, column].transpose(1, 0, 2).reshape(len(slots), -1)
        if sums is not None:
            values = values + sums
        tokens = [Token(np.ascontiguousarray(value).view(np.uint32)) for value in values.astype(np.float32)]
        for slot, token in zip(slots, tokens, strict=True):
            gang.regs[slot] = token
        state(gang).open.append((reads, tokens))

    return product, slots


def _held(registers: list[np.ndarray]) -> np.ndarray:
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
    for slot in slots:
        value = gang.regs[slot]
        if isinstance(value, np.ndarray) and id(value) not in state(gang).allowed:
            raise Fault("a WGMMA takes registers that were written after the last wgmma.fence")


def _sums(gang: Gang, slots: list[int]) -> np.ndarray:
    """What the registers hold, [registers, lanes] FP32."""
    values = [gang.regs[slot] for slot in slots]
    if any(value is None for value in values):
        raise Fault("a WGMMA adds to registers that nobody wrote")
    return np.stack([value.value if isinstance(value, Token) else value for value in values]).view(np.float32)


def _operand(
    gang: Gang, descriptor: int, rows: np.ndarray, k: int, kind: str, major: int
) -> tuple[np.ndarray, np.ndarray]:
    """(values [rows, k] FP32, addresses of their bytes)."""
    start, leading, stride = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 62 not in LINES:
        raise Unsupported("a WGMMA operand without swizzle")
    line, shared = LINES[descriptor >> 62], gang.cta.shared
    size = 1 if kind == "e4m3" else 2
    if major == 0:
        first = (rows // 8 * stride + rows % 8 * line)[:, None] + np.arange(k)[None, :] * size
    elif kind == "bf16":
        of_row = rows // (line // 2) * leading + rows % (line // 2) * 2
        of_k = np.arange(k) // 8 * stride + np.arange(k) % 8 * line
        first = of_row[:, None] + of_k[None, :]
    else:
        raise Unsupported("an E4M3 operand that is not K-major")
    address = swizzled(start + first, line)
    if (address + size > shared.size).any():
        raise Fault(f"a WGMMA reads shared memory beyond its {shared.size} bytes")
    if size == 1:
        return E4M3_VALUES[shared.bytes[address]], address
    return f32_of_bf16(shared.views[2][address // 2]), address

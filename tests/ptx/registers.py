"""A gang of warps, its registers, and how an operand's text becomes a value.

A gang is a set of warps that execute one instruction after the other together: 32 lanes for each, one NumPy array a
register. Which warps run together is for the scheduler: all of a CTA, or one by one. Arrays have the register's own
width and no sign (`.view` gives the rest); a predicate is an array of bool.

A register may hold a `Token` in place of an array: the sum of a WGMMA that has not been waited for. A token has no
arithmetic, so an instruction that reads it fails, and only then is looked at why: instructions on values that are there
cost nothing more. Registers nobody wrote hold a poison pattern: compilers leave registers undefined where they mask the
result away.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.parser import Instruction, Program, Unsupported

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
POISON = 0xA5A5A5A5A5A5A5A5
MAPS = 1 << 48  # the address of the tensor map in parameter i is MAPS + 256 i
LOCAL = 1 << 52  # where each thread's local memory begins
LANES = 32
WINDOW = 24  # shared memory of the CTA of rank r in a cluster begins at r << WINDOW

Reader = Callable[["Gang"], Any]


class Fault(RuntimeError):
    """What hardware would do wrong in silence, or hang on."""


class Token:
    """Stands in a register for number `index` of the sums of a WGMMA until they may be used."""

    __slots__ = ("index", "sums")
    __array_ufunc__ = None

    def __init__(self, sums: Any, index: int) -> None:
        self.sums, self.index = sums, index


class Gang:
    """Warps in lock-step. `cta` is the CTA they belong to, `warps` their numbers in it."""

    def __init__(self, cta: Any, warps: np.ndarray, num_registers: int) -> None:
        self.cta, self.warps = cta, np.asarray(warps)
        self.regs: list[Any] = [None] * num_registers
        self.n = LANES * len(self.warps)
        self.lane_warp = np.repeat(self.warps, LANES)  # the warp of each lane
        self.tid = self.lane_warp * LANES + np.tile(np.arange(LANES), len(self.warps))
        self.pc, self.at, self.done = 0, 0, False  # the next instruction, and the one that is executed
        self.waiting: tuple[Callable[[], bool], Callable[[], str]] | None = None
        self.wgmma: Any = None  # the state of warp-group products, made by their module
        self.copies: list[Any] = []  # asynchronous copies since the last commit, then groups of them
        self.copy_groups: list[list[Any]] = []
        self.stores: list[Any] = []
        self.store_groups: list[list[Any]] = []

    def part(self, keep: np.ndarray) -> Gang:
        """The warps of this gang where `keep`, with their registers, at the same instruction."""
        lanes = np.repeat(keep, LANES)
        other = Gang(self.cta, self.warps[keep], 0)
        other.regs = [value[lanes] if isinstance(value, np.ndarray) else value for value in self.regs]
        other.pc, other.at = self.pc, self.at
        return other

    def one(self, value: Any, what: str) -> int:
        """The value that all lanes share."""
        if not isinstance(value, np.ndarray):
            return int(value)
        if np.count_nonzero(value != value[0]):
            raise Fault(f"{what} differs between lanes that must agree")
        return int(value[0])


def of_lane(value: Any, lane: int) -> int:
    """A lane's of a value of all lanes, or of one for all."""
    return int(value[lane] if value.shape else value)


def every_lane(gang: Gang, value: Any) -> np.ndarray:
    """A value of all lanes, or one for all, as an array."""
    return value if value.shape == (gang.n,) else np.broadcast_to(value, gang.n)


def converter(natural: np.dtype, dtype: np.dtype) -> Callable[[Any], Any]:
    """A register's array of dtype `natural`, as an operand of `dtype`."""
    if natural.itemsize == dtype.itemsize:
        return lambda value: value.view(dtype)
    if natural.itemsize > dtype.itemsize:
        narrow = UNSIGNED[8 * dtype.itemsize]
        return lambda value: value.view(natural).astype(narrow).view(dtype)
    return lambda value: value.view(natural).astype(dtype)


class Decoder:
    """Names to slots, texts to readers, for one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.slots: dict[str, int] = {}
        self.names: list[str] = []
        self.moved: set[int] = set()  # slots that may hold a token: a WGMMA or a copy writes them

    def slot(self, register: str) -> int:
        if register not in self.slots:
            self.program.bits(register)  # declared?
            self.slots[register] = len(self.names)
            self.names.append(register)
        return self.slots[register]

    def natural(self, register: str) -> type:
        return UNSIGNED[self.program.bits(register)]

    def read(self, text: str, dtype: Any) -> Reader:
        """A function of a gang that gives `text` as `dtype`: an array of all lanes, or one number for a constant."""
        if self.program.is_register(text):
            return self.register(text, np.dtype(dtype))
        if text.startswith("%"):
            return special(text, np.dtype(dtype))
        value = self.constant(text, np.dtype(dtype))
        if text.startswith("global_smem"):
            return lambda gang: value + value.dtype.type(gang.cta.rank << WINDOW)
        return lambda gang: value

    def register(self, text: str, dtype: np.dtype) -> Reader:
        slot, natural = self.slot(text), np.dtype(self.natural(text))
        if natural == dtype:
            return lambda gang: gang.regs[slot]
        convert = converter(natural, dtype)
        return lambda gang: convert(gang.regs[slot])

    def plain(self, text: str, dtype: Any) -> int | None:
        """The slot of a register that is read as it lies there, as `dtype`; None for any other operand."""
        return self.slot(text) if self.program.is_register(text) and self.natural(text) == dtype else None

    def constant(self, text: str, dtype: np.dtype) -> Any:
        """A literal, or the address of shared memory or of a parameter."""
        if dtype == np.bool_:
            return np.bool_(int(text) != 0)
        if text.startswith("0f"):
            return np.frombuffer(struct.pack("<I", int(text[2:], 16)), dtype)[0]
        if text.startswith("0d"):
            return np.frombuffer(struct.pack("<Q", int(text[2:], 16)), dtype)[0]
        if match := re.fullmatch(r"global_smem(?:\+(\d+))?", text):
            number = int(match[1] or 0)
        elif re.fullmatch(r"__local_depot\d+", text):
            number = LOCAL
        elif match := re.fullmatch(r"\w+_param_(\d+)", text):
            number = MAPS + 256 * int(match[1])
        else:
            try:
                number = int(text.rstrip("U"), 0)
            except ValueError:
                raise Unsupported(f"operand {text!r} is not known") from None
        bits = 8 * dtype.itemsize
        return np.frombuffer((number & ((1 << bits) - 1)).to_bytes(dtype.itemsize, "little"), dtype)[0]

    def address(self, text: str) -> Reader:
        """`[register + offset]` as int64, an array of all lanes."""
        inner = text.strip("[] ").replace(" ", "")
        base, _, offset = inner.partition("+")
        if base == "global_smem" or not self.program.is_register(base):
            fixed = self.read(inner if base == "global_smem" else base, np.int64)
            return lambda gang: np.full(gang.n, fixed(gang), np.int64)
        dtype = np.int64 if self.program.bits(base) == 64 else np.uint32
        reader, shift = self.read(base, dtype), int(offset or 0)
        if not shift:
            return lambda gang: reader(gang).astype(np.int64)
        return lambda gang: reader(gang).astype(np.int64) + shift

    def mask(self, instruction: Instruction) -> Reader | None:
        """The guard as an array of bool; None for an instruction without one."""
        if instruction.guard is None:
            return None
        slot, negated = self.slot(instruction.guard), instruction.negated
        if negated:
            return lambda gang: ~gang.regs[slot]
        return lambda gang: gang.regs[slot].view(np.bool_)

    def poison(self, gang: Gang, slot: int) -> np.ndarray:
        dtype = np.dtype(self.natural(self.names[slot]))
        if dtype == np.bool_:
            return np.zeros(gang.n, np.bool_)
        return np.full(gang.n, POISON & ((1 << 8 * dtype.itemsize) - 1), dtype)


def special(text: str, dtype: np.dtype) -> Reader:
    """A special register."""
    name, _, axis = text.lstrip("%").partition(".")
    index = {"x": 0, "y": 1, "z": 2, "": 0}[axis]
    per_lane = {"tid": lambda gang: gang.tid if index == 0 else 0 * gang.tid, "laneid": lambda gang: gang.tid % LANES}
    per_cta = {
        "ctaid": lambda cta: cta.ctaid[index],
        "nctaid": lambda cta: cta.grid[index],
        "clusterid": lambda cta: cta.ctaid[index] // (cta.cluster if index == 0 else 1),
        "nclusterid": lambda cta: cta.grid[index] // (cta.cluster if index == 0 else 1),
        "cluster_ctarank": lambda cta: cta.rank,
        "ntid": lambda cta: cta.program.threads if index == 0 else 1,
    }
    if name in per_lane:
        lane = per_lane[name]
        return lambda gang: lane(gang).astype(dtype)
    if name in per_cta:
        cta_value = per_cta[name]
        return lambda gang: np.full(gang.n, cta_value(gang.cta), dtype)
    raise Unsupported(f"special register {text} is not known")

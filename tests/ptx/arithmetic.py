"""Instructions that read registers and write registers: integers, floats, bits, predicates, moves.

`build` gives a function of a gang that executes one instruction, and the slots that it writes. Whatever has the same
bits signed and unsigned (add, sub, the low half of a product) is done on unsigned arrays as they lie in the registers.

An FP32 multiply-add is formed in FP64, where the product is exact, and rounded once more to FP32: it can differ from
hardware's single rounding in one case of some 2^29. A tensor-core product's bounds are far wider; the two that divide
by 448 in a cast are exact, or were tried for every mantissa. One of FP64 is right where the product is exact in FP64,
as that of two numbers which were FP32 is.

Approximations (ex2, rcp) are as wrong here as their description allows, up or down by the bits of their argument: a
kernel that meets its bound on this machine counts on no more than the PTX manual promises.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.bit_fields import extract, funnel, permute_bytes
from tests.ptx.conversions import bf16_pair, convert, dtype_of
from tests.ptx.parser import Instruction, Unsupported, list_of
from tests.ptx.registers import SIGNED, UNSIGNED, Decoder, Gang, every_lane

Op = Callable[[Gang], Any]
SAME_BITS = {"add", "sub", "and", "or", "xor", "not", "shl"}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
    "neu": lambda a, b: ~(a == b), "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
}  # fmt: skip


def _fma(a: Any, b: Any, c: Any) -> Any:
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _divide(a: Any, b: Any) -> Any:
    """Integers towards zero; a divisor of zero gives all ones, as hardware does."""
    whole = np.trunc(a.astype(np.float64) / np.where(b == 0, 1, b)) if a.dtype.itemsize < 8 else _divide_wide(a, b)
    return np.where(b == 0, -1, whole.astype(np.int64)).astype(a.dtype)


def _divide_wide(a: Any, b: Any) -> Any:
    quotient = np.abs(a) // np.abs(np.where(b == 0, 1, b))
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _shift(left: bool, bits: int) -> Callable[[Any, Any], Any]:
    def shift(a: Any, count: Any) -> Any:
        if isinstance(count, np.generic) and count < bits:  # a literal, as nearly all are
            return np.left_shift(a, a.dtype.type(count)) if left else np.right_shift(a, a.dtype.type(count))
        count = np.asarray(count).astype(np.int64)
        kept = np.minimum(count, bits - 1).astype(a.dtype)
        moved = np.left_shift(a, kept) if left else np.right_shift(a, kept)
        beyond = np.right_shift(a, a.dtype.type(bits - 1)) if not left and a.dtype.kind == "i" else a.dtype.type(0)
        return np.where(count >= bits, beyond, moved)

    return shift


def _high(a: Any, b: Any) -> Any:
    if a.dtype.itemsize == 8:  # by Python's integers: kernels divide few 64-bit numbers by constants
        return np.array([int(x) * int(y) >> 64 for x, y in zip(*np.broadcast_arrays(a, b), strict=True)], a.dtype)
    wide = {"i": np.int64, "u": np.uint64}[a.dtype.kind]
    return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)


APPROXIMATIONS = {"ex2": (np.exp2, 2), "rcp": (np.reciprocal, 1)}  # of FP32, and their largest error in last places


def _flushed(a: Any) -> Any:
    """Subnormal FP32 as zero of its sign (`.ftz`)."""
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a).astype(np.float32)


def _flushing(exact: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: _flushed(exact(*(_flushed(value) for value in values)))


def _approximation(name: str) -> Callable[[Any], Any]:
    exact, places = APPROXIMATIONS[name]

    def approximate(a: Any) -> Any:
        value = exact(a.astype(np.float64)).astype(np.float32)
        wrong = ((a.view(np.uint32) * np.uint32(0x9E3779B1)) >> np.uint32(16)).astype(np.int32) % (2 * places + 1)
        moved = (value.view(np.int32) + (wrong - places)).view(np.float32)
        return np.where(np.isfinite(value) & (np.abs(value) >= np.finfo(np.float32).tiny), moved, value)

    return approximate


def _floats(name: str, parts: list[str]) -> Callable[..., Any]:
    table = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": _fma, "min": np.fmin,
        "max": np.fmax, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "ex2": np.exp2,
    }  # fmt: skip
    if name in ("min", "max") and "NaN" in parts:
        return np.minimum if name == "min" else np.maximum
    if "ftz" in parts:
        return _flushing(_floats(name, [part for part in parts if part != "ftz"]))
    if name in APPROXIMATIONS and parts[1:] == ["approx", "f32"]:
        return _approximation(name)
    if parts == ["rcp", "rn", "f32"]:
        return lambda a: np.float32(1) / a
    if name not in table or {"approx", "ftz"} & set(parts):
        raise Unsupported(f"{'.'.join(parts)} is not known")
    return table[name]


def _integers(name: str, parts: list[str], bits: int) -> Callable[..., Any]:
    table = {
        "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "not": np.invert, "neg": np.negative, "abs": np.abs, "min": np.minimum, "max": np.maximum, "div": _divide,
        "rem": lambda a, b: a - _divide(a, b) * b, "shl": _shift(True, bits), "shr": _shift(False, bits),
        "mul": _high if "hi" in parts else np.multiply, "mad": lambda a, b, c: a * b + c, "bfe": extract,
        "prmt": permute_bytes, "shf": funnel("l" in parts, "clamp" in parts),
        "popc": lambda a: np.array([int(x).bit_count() for x in a], np.uint32),
    }  # fmt: skip
    if name not in table:
        raise Unsupported(f"{'.'.join(parts)} is not known")
    return table[name]


class Lanewise(NamedTuple):
    """What an opcode does to each lane by itself: a function of its operands, and the types that it takes them as."""

    function: Callable[..., Any]
    dtypes: list[Any]
    result: np.dtype


def build(decoder: Decoder, instruction: Instruction) -> tuple[Op, list[int]]:
    """(what executes the instruction, the slots it writes). Raises Unsupported where it is not of this module."""
    parts, o = instruction.parts, instruction.operands
    if parts[0] in ("mov", "cvta"):
        return _move(decoder, "b64" if parts[0] == "cvta" else parts[-1], o)
    function, dtypes, result = lanewise(instruction.opcode, len(o) - 1)
    target, natural = decoder.slot(o[0]), np.dtype(decoder.natural(o[0]))
    readers = [decoder.read(text, t) for text, t in zip(o[1:], dtypes, strict=True)]
    if result == natural and decoder.program.is_register(o[1]):
        slots = [decoder.plain(text, t) for text, t in zip(o[1:], dtypes, strict=True)]
        return _direct(function, target, readers, slots), [target]
    return _apply(function, target, readers, natural), [target]


@cache
def lanewise(opcode: str, count: int) -> Lanewise:
    """Of an opcode with `count` operands; raises Unsupported where it is none that goes by lanes."""
    function, dtypes = _function(opcode, count)
    with np.errstate(all="ignore"):
        result = function(*(np.ones(1, dtype) for dtype in dtypes)).dtype
    return Lanewise(function, dtypes, result)


def _function(opcode: str, count: int) -> tuple[Callable[..., Any], list[Any]]:
    parts = opcode.split(".")
    name, kind = parts[0], parts[-1]
    if name == "setp":
        return COMPARE[parts[1]], [dtype_of(kind)] * count
    if kind == "pred":
        function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}[name]
        return function, [np.bool_] * count
    if name == "selp":
        dtype = UNSIGNED[int(kind[1:])]
        return (lambda a, b, p: np.where(p, a, b)), [dtype, dtype, np.bool_]
    if name == "cvt":
        return convert(parts)
    if kind in ("bf16", "bf16x2"):
        return bf16_pair(name, parts), [np.uint16 if kind == "bf16" else np.uint32] * count
    return _typed(parts, count)


def _typed(parts: list[str], count: int) -> tuple[Any, list[Any]]:
    """(function, dtypes of `count` operands) of an instruction on one type."""
    name, kind = parts[0], parts[-1]
    dtype = dtype_of(kind)
    bits = 8 * np.dtype(dtype).itemsize
    if kind[0] == "f":
        return _floats(name, parts), [dtype] * count
    if "wide" in parts:
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * bits]
        if name == "mul":
            return (lambda a, b: a.astype(wide) * b.astype(wide)), [dtype, dtype]
        return (lambda a, b, c: a.astype(wide) * b.astype(wide) + c), [dtype, dtype, wide]
    if name in SAME_BITS or (name in ("mul", "mad") and "hi" not in parts):
        dtype = UNSIGNED[bits]
    typed = {"shl": 1, "shr": 1, "bfe": 1}.get(name, count)
    return _integers(name, parts, bits), [dtype if i < typed else np.uint32 for i in range(count)]


def _direct(function: Callable[..., Any], target: int, readers: list[Any], slots: list[int | None]) -> Op:
    """regs[target] = function(*readers), which gives an array of the register's own type; plain operands have slots."""
    if len(readers) == 1:
        (a,) = readers
        return lambda gang: gang.regs.__setitem__(target, function(a(gang)))
    if len(readers) == 3:
        a, b, c = readers
        return lambda gang: gang.regs.__setitem__(target, function(a(gang), b(gang), c(gang)))
    (a, b), (first, second) = readers, slots
    if first is None:
        return lambda gang: gang.regs.__setitem__(target, function(a(gang), b(gang)))
    if second is None:
        return lambda gang: gang.regs.__setitem__(target, function(gang.regs[first], b(gang)))

    def run(gang: Gang) -> None:
        regs = gang.regs
        regs[target] = function(regs[first], regs[second])

    return run


def _apply(function: Callable[..., Any], target: int, readers: list[Any], natural: Any) -> Op:
    """regs[target] = function(*readers) in the register's own width."""
    natural = np.dtype(natural)

    def finish(gang: Gang, value: Any) -> None:
        if value.dtype.itemsize != natural.itemsize:
            value = value.astype(natural)
        if value.shape != (gang.n,):
            value = np.broadcast_to(value, gang.n).copy()
        gang.regs[target] = value.view(natural)

    if len(readers) == 1:
        (a,) = readers
        return lambda gang: finish(gang, function(a(gang)))
    if len(readers) == 2:
        a, b = readers
        return lambda gang: finish(gang, function(a(gang), b(gang)))
    a, b, c = readers
    return lambda gang: finish(gang, function(a(gang), b(gang), c(gang)))


def _move(decoder: Decoder, kind: str, o: list[str]) -> tuple[Op, list[int]]:
    """mov: a copy (of a token too), or one register from several or several from one."""
    if o[0].startswith("{"):
        return _unpack(decoder, list_of(o[0]), o[1], int(kind[1:]))
    if o[1].startswith("{"):
        return _pack(decoder, o[0], list_of(o[1]), int(kind[1:]))
    target, natural = decoder.slot(o[0]), np.dtype(decoder.natural(o[0]))
    source = decoder.read(o[1], natural)
    decoder.moved.add(target)

    def move(gang: Gang) -> None:
        value = source(gang)
        if isinstance(value, np.generic):
            value = np.full(gang.n, value, natural)
        gang.regs[target] = value

    return move, [target]


def _unpack(decoder: Decoder, names: list[str], source: str, bits: int) -> tuple[Op, list[int]]:
    each = UNSIGNED[bits // len(names)]
    targets, reader = (
        [None if name == "_" else decoder.slot(name) for name in names],
        decoder.read(source, UNSIGNED[bits]),
    )

    def unpack(gang: Gang) -> None:
        columns = np.ascontiguousarray(reader(gang).view(UNSIGNED[bits])).view(each).reshape(gang.n, -1)
        for i, target in enumerate(targets):
            if target is not None:
                gang.regs[target] = columns[:, i].copy()

    return unpack, [target for target in targets if target is not None]


def _pack(decoder: Decoder, target: str, names: list[str], bits: int) -> tuple[Op, list[int]]:
    each = UNSIGNED[bits // len(names)]
    slot, readers = decoder.slot(target), [decoder.read(name, each) for name in names]

    def pack(gang: Gang) -> None:
        columns = [every_lane(gang, read(gang).view(each)) for read in readers]
        gang.regs[slot] = np.stack(columns, 1).view(UNSIGNED[bits]).reshape(-1)

    return pack, [slot]

"""Runs: instructions of one opcode behind one another, executed as one on so many times as many lanes.

Compilers write a tile's arithmetic as tens of equal instructions on different registers, and a call of NumPy costs
about the same for all of them as for one. An instruction joins the run before it where both are lane-wise
(`arithmetic.lanewise`) or plain copies, take registers of the same widths, nothing branches to it, and it reads nothing
that the run writes. All operands are read before any result is written, so a run may write what its earlier
instructions read.

Accesses to memory make runs too (`access_runs`), which end where a burst does.

Where a register holds no value, or a product's token, a run does nothing, and instructions are executed one by one:
they say what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from tests.ptx import access_runs
from tests.ptx.arithmetic import Lanewise, lanewise
from tests.ptx.parser import Instruction, Program
from tests.ptx.registers import Decoder, Gang, converter

SHORTEST = 3
LANEWISE = {
    "add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs", "sqrt", "ex2", "rcp", "and", "or",
    "xor", "not", "shl", "shr", "bfe", "prmt", "shf", "popc", "setp", "selp", "cvt",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """`length` instructions; `execute` says whether it did. `seen`: others see what it does, and when."""

    length: int
    execute: Callable[[Gang], bool]
    seen: bool = False


@dataclass
class _Member:
    """An instruction that may join a run; runs are of members with equal keys."""

    key: Any
    targets: list[str]
    sources: list[str]
    form: Lanewise | Instruction | None  # of a copy None, of an access itself


def _member(decoder: Decoder, instruction: Instruction) -> _Member | None:
    o, program = instruction.operands, decoder.program
    if instruction.opcode.startswith(("ld.", "st.")):
        found = access_runs.member(decoder, instruction)
        return None if found is None else _Member(*found, instruction)
    if instruction.guard is not None or not o or not program.is_register(o[0]):
        return None
    if instruction.opcode.startswith("mov."):
        if len(o) == 2 and not o[1].startswith("{"):
            return _Member(("mov", program.bits(o[0])), o[:1], o[1:], None)
        return None
    if instruction.opcode.partition(".")[0] not in LANEWISE or any(text.startswith("global_smem") for text in o):
        return None
    widths = [program.bits(text) if program.is_register(text) else 0 for text in o]
    if any(not width and text.startswith("%") for text, width in zip(o, widths, strict=True)):
        return None  # a special register
    return _Member((instruction.opcode, *widths), o[:1], o[1:], lanewise(instruction.opcode, len(o) - 1))


def find_runs(decoder: Decoder, program: Program) -> list[Run | None]:
    """By the number of a run's first instruction, None elsewhere."""
    found: list[Run | None] = [None] * len(program.code)
    targets, members, written = set(program.labels.values()), [], set()

    def close(end: int) -> None:
        if len(members) >= SHORTEST:
            found[end - len(members)] = _run(decoder, members)

    for i, instruction in enumerate(program.code):
        member = _member(decoder, instruction)
        joins = (
            members and member is not None and i not in targets and member.key == members[0].key
            and written.isdisjoint(member.sources)
        )  # fmt: skip
        if not joins:
            close(i)
            members, written = [], set()
        if member is not None:
            members.append(member)
            written.update(member.targets)
    close(len(program.code))
    return found


def _run(decoder: Decoder, members: list[_Member]) -> Run:
    form = members[0].form
    if isinstance(form, Instruction):
        return Run(len(members), access_runs.build(decoder, [member.form for member in members]), seen=True)
    slots = [decoder.slot(member.targets[0]) for member in members]
    if form is None:
        return Run(len(members), _copies(decoder, slots, [member.sources[0] for member in members]))
    length, natural = len(members), np.dtype(decoder.natural(members[0].targets[0]))
    operands = [
        _operand(decoder, [member.sources[i] for member in members], np.dtype(dtype))
        for i, dtype in enumerate(form.dtypes)
    ]

    def execute(gang: Gang) -> bool:
        try:
            value = form.function(*[read(gang) for read in operands])
        except (TypeError, AttributeError, ValueError):
            return False
        if value.dtype.itemsize != natural.itemsize:
            value = value.astype(natural)
        if value.shape != (length * gang.n,):
            value = np.broadcast_to(value, length * gang.n).copy()
        regs = gang.regs
        for slot, row in zip(slots, value.view(natural).reshape(length, gang.n), strict=True):
            regs[slot] = row
        return True

    return Run(length, execute)


def _copies(decoder: Decoder, slots: list[int], sources: list[str]) -> Callable[[Gang], bool]:
    """mov: copies of registers (tokens too), and of constants and special registers."""
    if all(decoder.program.is_register(text) for text in sources):
        read_all = itemgetter(*(decoder.slot(text) for text in sources))
    else:
        natural = np.dtype(decoder.natural(decoder.names[slots[0]]))
        readers = [decoder.read(text, natural) for text in sources]
        read_all = None

    def execute(gang: Gang) -> bool:
        regs = gang.regs
        if read_all is not None:
            values = read_all(regs)
        else:
            values = [read(gang) for read in readers]
            values = [np.full(gang.n, v, natural) if isinstance(v, np.generic) else v for v in values]
        for slot, value in zip(slots, values, strict=True):
            regs[slot] = value
        return True

    return execute


def _operand(decoder: Decoder, texts: list[str], dtype: np.dtype) -> Callable[[Gang], Any]:
    """The operand of every instruction of a run, one behind the other."""
    length = len(texts)
    if not decoder.program.is_register(texts[0]):
        values = [decoder.constant(text, dtype) for text in texts]
        if len(set(texts)) == 1:
            return lambda gang: values[0]
        return lambda gang: np.repeat(np.array(values, dtype), gang.n)
    natural = np.dtype(decoder.natural(texts[0]))
    convert = converter(natural, dtype)
    if len(set(texts)) == 1:
        slot = decoder.slot(texts[0])
        return lambda gang: convert(np.concatenate((gang.regs[slot],) * length, dtype=natural, casting="no"))
    read_all = itemgetter(*(decoder.slot(text) for text in texts))
    return lambda gang: convert(np.concatenate(read_all(gang.regs), dtype=natural, casting="no"))

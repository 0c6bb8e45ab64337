"""Products of one warp: `mma.sync`, a 16x16 by a 16x8 matrix of BF16 that registers hold, added to FP32 sums.

It ends before the next instruction, unlike a WGMMA. Operands lie as the PTX manual draws them: a lane 4 r + c has of A
rows r and r + 8, of B column r, and of both the values 2 c, 2 c + 1 of k and those 8 further; of the sums rows r and
r + 8, columns 2 c and 2 c + 1. Formed in FP32, as `wgmma` does.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.ptx.conversions import f32_of_bf16
from tests.ptx.parser import Instruction, Unsupported, list_of
from tests.ptx.registers import LANES, Decoder, Gang, every_lane
from tests.ptx.wgmma import fragment_of_a, sums_of

KNOWN = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32"


def build(decoder: Decoder, instruction: Instruction) -> tuple[Any, list[int]]:
    """(what executes the instruction, the slots it writes)."""
    if not re.fullmatch(KNOWN, instruction.opcode):
        raise Unsupported(f"{instruction.opcode} is not known")
    out, *given = (list_of(operand) for operand in instruction.operands)
    targets = [decoder.slot(name) for name in out]
    of_a, of_b = ([decoder.read(name, np.uint32) for name in names] for names in given[:2])
    of_sums = [decoder.read(name, np.float32) for name in given[2]]

    def multiply(gang: Gang) -> None:
        a, b, sums = ([every_lane(gang, read(gang)) for read in reads] for reads in (of_a, of_b, of_sums))
        products = fragment_of_a(a) @ fragment_of_b(b) + sums_of(sums)
        for slot, value in zip(targets, registers_of(products), strict=True):
            gang.regs[slot] = value

    return multiply, targets


def fragment_of_b(registers: list[np.ndarray]) -> np.ndarray:
    """B as the registers hold it, [warps, k, 8] FP32."""
    pairs = np.stack(registers).view(np.uint16).reshape(2, -1, 8, 4, 2)  # [half of k, warp, column, c, value]
    values = f32_of_bf16(np.ascontiguousarray(pairs.transpose(1, 0, 3, 4, 2)))
    return values.reshape(pairs.shape[1], 16, 8)


def registers_of(sums: np.ndarray) -> np.ndarray:
    """[warps, 16, 8] FP32 as four registers of all lanes hold it: bits."""
    parts = sums.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return np.ascontiguousarray(parts).reshape(4, len(sums) * LANES).view(np.uint32)

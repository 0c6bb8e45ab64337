"""Faults planted in compiled PTX, to see that the machine finds each.

A plant is an edit of the text, found by structure: the instruction that it changes is named by its opcode, by what
stands before and behind it, or by where its operands come from, never by a register's name, which every compiler
chooses anew. An edit that does not find its place raises, so that a plant which plants nothing is no success.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

ARRIVE = r"mbarrier\.arrive\.shared::cta\.b64 "
TRY_WAIT = (
    r"waitLoop:\s+(?:\.loc[^\n]*\s+)?"
    r"mbarrier\.try_wait\.parity\.shared\S*\.b64 complete, (\[%r\d+\]), (%r\d+);"
)
STORE = r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta\.bulk_group \[%rd\d+, \{(%r\d+), (%r\d+)\}\]"
DESCRIPTOR = 0x4000004000000000  # 128-byte swizzle, groups of 8 rows 1024 bytes apart
Edit = Callable[[str], str]


@dataclass(frozen=True)
class Plant:
    """`case` is the kernel of the compile table that is edited; `edit` gives the text with the fault."""

    name: str
    case: str
    edit: Edit


def matches(text: str, pattern: str) -> list[re.Match[str]]:
    found = list(re.finditer(pattern, text))
    if not found:
        raise LookupError(f"no {pattern} in this PTX")
    return found


def change(pattern: str, new: str | Callable[[re.Match[str]], str], which: int | None = 0) -> Edit:
    """Replace occurrence number `which` of `pattern` (None: all)."""

    def edit(text: str) -> str:
        found = matches(text, pattern)
        for match in reversed(found if which is None else [found[which]]):
            text = text[: match.start()] + (new if isinstance(new, str) else new(match)) + text[match.end() :]
        return text

    return edit


def statement(pattern: str) -> str:
    """`pattern` with its guard and up to its semicolon."""
    return rf"(?:@!?%p\d+ )?{pattern}[^;]*;"


def drop(pattern: str, which: int | None = 0) -> Edit:
    return change(statement(pattern), "", which)


def flip_parity(which: int) -> Edit:
    """A wait for the other phase."""

    def flipped(match: re.Match[str]) -> str:
        wait = match[0].replace(match[2] + ";", "flipped;")
        return f".reg .b32 flipped;\nxor.b32 flipped, {match[2]}, 1;\n{wait}"

    return change(TRY_WAIT, flipped, which)


def release_early(text: str) -> str:
    """The first consumer's barrier and arrival come before the wait for its products instead of behind it."""
    arrival = matches(text, r"bar\.sync\s+\d+, 128;[^;]*" + statement(ARRIVE))[0]
    wait = [m for m in matches(text, statement(r"wgmma\.wait_group")) if m.start() < arrival.start()][-1]
    return text[: wait.start()] + text[wait.end() : arrival.end()] + wait[0] + text[arrival.end() :]


def scaled(factor: float) -> Callable[[re.Match[str]], str]:
    """The match with its first group, a number, times `factor`."""
    return lambda match: match[0].replace(match[1], str(int(int(match[1]) * factor)))


def fence_before_store(text: str) -> str:
    """No fence.proxy.async between the first tile's ordinary stores and its TMA store."""
    store = matches(text, STORE)[0].start()
    fence = [match for match in matches(text, r"fence\.proxy\.async[^;]*;") if match.start() < store][-1]
    return text[: fence.start()] + text[fence.end() :]


def fence_behind_reads(text: str) -> str:
    """No fence.proxy.async behind the first consumer's reads of scales."""
    commit = matches(text, r"wgmma\.commit_group[^;]*;")[0].end()
    fence = next(match for match in matches(text, r"fence\.proxy\.async[^;]*;") if match.start() > commit)
    return text[: fence.start()] + text[fence.end() :]


def keep_product(text: str) -> str:
    """The first product of a step adds to what its registers hold: promotion by steps of 128 is lost."""
    mma = matches(text, r"wgmma\.mma_async[^;]*?\}, %rd\d+, %rd\d+, (%p\d+)")[0]
    return change(rf"mov\.pred\s+{mma[1]}, 0;", f"mov.pred {mma[1]}, -1;")(text)


def swap_row_scales(text: str) -> str:
    """The scales of a row and of the one 8 below it change places."""
    pattern = r"ld\.shared\.b32\s+(%r\d+), (\[%r\d+\+\d+\]);(\s+)ld\.shared\.b32\s+(%r\d+), (\[%r\d+\+\d+\]);"
    return change(pattern, lambda m: f"ld.shared.b32 {m[1]}, {m[5]};{m[3]}ld.shared.b32 {m[4]}, {m[2]};")(text)


def second_wave_at_the_first(text: str) -> str:
    """The second wave of a tall tile is stored at the rows of the first."""
    stores = matches(text, STORE)
    row = stores[0][2]
    other = next(store for store in stores if store[2] != row)
    return text[: other.start(2)] + row + text[other.end(2) :]


def truncate_bf16(text: str) -> str:
    """FP32 to BF16 by its upper half, instead of to nearest."""
    pattern = r"cvt\.rn\.bf16x2\.f32\s+(%r\d+), (%r\d+), (%r\d+);"
    return change(pattern, lambda m: f"prmt.b32 {m[1]}, {m[3]}, {m[2]}, 30258;", None)(text)


ROWS, TALL, WIDE = "gluon gemm bf16 128x128x6", "gluon gemm bf16 256x128x4", "gluon grouped_gemm bf16 128x256x4"
COLUMNS, PLAIN = "gluon gemm_columns add 256x128x4", "triton gemm bf16 128x128x4"
BF16, FP32 = "triton wgrad bf16 128x128x3", "triton wgrad fp32"
FETCHED = "gluon grouped_wgrad add_fetched 256x128x3"
CAST, BLOCKS, LINES = (f"triton quantize_{what} bf16 pow2" for what in ("columns", "blocks", "rows"))
UPDATE = "triton adamw_step_quantize bf16 moments"

PLANTS = (
    Plant("a consumer waits for the wrong phase", ROWS, flip_parity(0)),
    Plant("the producer waits for the wrong phase", COLUMNS, flip_parity(-1)),
    Plant("a consumer never gives a slot back", ROWS, drop(ARRIVE)),
    Plant("a slot is given back before its products", WIDE, release_early),
    Plant("an empty barrier counts one consumer of two", TALL,
          change(r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )2;", lambda m: f"{m[1]}1;", None)),
    Plant("half of the bytes are expected", ROWS, change(r"expect_tx\S* _, \[%r\d+\], (\d+);", scaled(0.5))),
    Plant("more bytes are expected than come", COLUMNS, change(r"expect_tx\S* _, \[%r\d+\], (\d+);", scaled(1.5))),
    Plant("no proxy fence before a TMA store", ROWS, fence_before_store),
    Plant("no proxy fence behind reads of scales", COLUMNS, fence_behind_reads),
    Plant("promotion is lost", TALL, keep_product),
    Plant("an operand has the swizzle of 64 bytes", ROWS,
          change(rf"\b{DESCRIPTOR}\b", str(DESCRIPTOR + (1 << 62) - (1 << 64)))),
    Plant("the second product reads 16 bytes too early", PLAIN, change(rf"\b{DESCRIPTOR + 2}\b", str(DESCRIPTOR + 1))),
    Plant("the scales of two rows are swapped", COLUMNS, swap_row_scales),
    Plant("the scale of step k + 4 serves step k", WIDE,
          change(r"and\.b32\s+(%r\d+), %r\d+, -4;", lambda m: f"{m[0]}\nadd.s32 {m[1]}, {m[1]}, 4;")),
    Plant("the second wave is stored at the rows of the first", TALL, second_wave_at_the_first),
    Plant("an arrival does not wait for the partner warps", ROWS,
          change(rf"bar\.sync\s+\d+, 128;(?=[^;]*{statement(ARRIVE)})", "")),
    Plant("no wait for a product", TALL, drop(r"wgmma\.wait_group")),
    Plant("no fence before a product", PLAIN, drop(r"wgmma\.fence")),
    Plant("the buffer of a TMA store is written again at once", ROWS, drop(r"cp\.async\.bulk\.wait_group\.read", None)),
    Plant("the coordinates of a load are swapped", WIDE,
          change(r"(bytes \[%r\d+\], \[%rd\d+, \{)(%r\d+), (%r\d+)\}", lambda m: f"{m[1]}{m[3]}, {m[2]}}}")),
    Plant("a load of scales begins at any of them", ROWS, 
          change(r"and\.b32(\s+%r\d+, %r\d+), -4;", lambda m: f"and.b32{m[1]}, -1;")),
    Plant("what a sum is fetched for is taken before it is there", FETCHED, flip_parity(1)),
    Plant("a sum is fetched over one that is not stored", FETCHED, drop(r"cp\.async\.bulk\.wait_group\.read", None)),
    Plant("no proxy fence before a fetched sum is stored", FETCHED, fence_before_store),
    Plant("half of what a sum is added to is expected", FETCHED,
          change(r"expect_tx\S* _, \[%r\d+\], (8192);", scaled(0.5))),
    Plant("a partition keeps its registers", ROWS, drop(r"setmaxnreg\.dec", None)),
    Plant("a wait is given up after one try", ROWS, change(r"@!complete bra\.uni waitLoop;", "")),
    Plant("a copy by cp.async is not waited for", FP32,
          change(r"cp\.async\.wait_group\s+0;", "cp.async.wait_group 2;", None)),
    Plant("no proxy fence between masked rows and their product", BF16, drop(r"fence\.proxy\.async", None)),
    Plant("one barrier of the CTA is missing", CAST, drop(r"bar\.sync", 1)),
    Plant("a mask lets one row too many through", CAST, change(r"setp\.lt\.s32", "setp.le.s32", None)),
    Plant("BF16 is truncated", PLAIN, truncate_bf16),
    Plant("E4M3 takes its two values in the wrong order", BLOCKS,
          change(r"(cvt\.rn\.satfinite\.e4m3x2\.f32\s+%rs\d+, )(%r\d+), (%r\d+)", lambda m: f"{m[1]}{m[3]}, {m[2]}")),
    Plant("a reduction forgets half of its lanes", LINES,
          change(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )4,", lambda m: f"{m[1]}2,", None)),
    Plant("no barrier between a weight and its codes", UPDATE, drop(r"bar\.sync")),
)  # fmt: skip

"""The plan of a permutation on the device: a counting sort in three launches, without atomics and without the host.

Copies are cut into blocks of BLOCK_P in their own order. `count_kernel` counts, for each block, how many go to each
expert; `scan_kernel` turns each expert's counts into the copies before each block, and their total; `place_kernel` adds
where the expert's padded group starts, how many copies of it came in earlier blocks, and how many earlier in this one:
the row. Every number is a count of what comes before, so the order is that of a stable sort whatever runs first. More
programs of the same launch mark the rows that no copy goes to: nothing is filled beforehand.

PyTorch's sort was refused: with the scatters and sums around it that is some twenty launches for a list of a few
thousand numbers, once a layer and micro-batch. Sizes that change from batch to batch are not specialised: another
length compiles nothing anew.
"""

import triton
import triton.language as tl


@triton.jit
def load_ids(ids, p, P, topk, stride_n, stride_k, E):
    """Expert of copies p, int32, -1 where it is not here."""
    id_ = tl.load(ids + (p // topk).to(tl.int64) * stride_n + (p % topk) * stride_k, mask=p < P, other=-1)
    return tl.where((id_ >= 0) & (id_ < E), id_, -1).to(tl.int32)


@triton.jit(do_not_specialize=["P", "num_blocks"])
def count_kernel(ids, counts, P, topk, stride_n, stride_k, E, num_blocks, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts [E, num_blocks]: copies of each block that go to each expert."""
    block = tl.program_id(0)
    id_ = load_ids(ids, block * BLOCK_P + tl.arange(0, BLOCK_P), P, topk, stride_n, stride_k, E)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    count = tl.sum((e[:, None] == id_[None, :]).to(tl.int32), axis=1)
    tl.store(counts + e * num_blocks + block, count, mask=e < E)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_kernel(counts, totals, num_blocks, BLOCK_B: tl.constexpr):
    """counts [E, num_blocks] -> in place, the counts of all blocks before; totals [E] int64."""
    counts += tl.program_id(0) * num_blocks
    total = tl.full((), 0, tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        count = tl.load(counts + b, mask=b < num_blocks, other=0)
        tl.store(counts + b, total + tl.cumsum(count, 0) - count, mask=b < num_blocks)
        total += tl.sum(count, axis=0)
    tl.store(totals + tl.program_id(0), total.to(tl.int64))


@triton.jit
def mark_padding(totals, slots, sources, r, E, R, align, BLOCK_E: tl.constexpr):
    """slots, sources = -1 at those of the rows r, below R, that are no expert's copy."""
    copies = tl.zeros_like(r)
    end = tl.full((), 0, tl.int32)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        total = tl.load(totals + e, mask=e < E, other=0).to(tl.int32)
        padded = (total + (align - 1)) // align * align
        start = end + tl.cumsum(padded, 0) - padded
        inside = (r[:, None] >= start[None, :]) & (r[:, None] < (start + total)[None, :])
        copies += tl.sum(inside.to(tl.int32), axis=1)
        end += tl.sum(padded, axis=0)
    nothing = tl.full(r.shape, -1, tl.int64)
    tl.store(slots + r, nothing, mask=(r < R) & (copies == 0))
    tl.store(sources + r, nothing, mask=(r < R) & (copies == 0))


@triton.jit(do_not_specialize=["P", "num_blocks", "R", "align"])
def place_kernel(
    ids, before, totals, slots, sources, rows, offsets, P, topk, stride_n, stride_k, E, num_blocks, R, align,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """slots, sources [R] of the copies that have room there, -1 elsewhere, and the inverse, rows [P].

    offsets: int32 [E + 1]. Programs behind the copies' blocks mark padding, BLOCK_P rows each.
    """
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK_P)
    if block >= num_blocks:
        mark_padding(totals, slots, sources, (block - num_blocks) * BLOCK_P + lane, E, R, align, BLOCK_E)
    p = block * BLOCK_P + lane
    id_ = load_ids(ids, p, P, topk, stride_n, stride_k, E)
    row = tl.load(before + id_ * num_blocks + block, mask=id_ >= 0, other=0)
    row += tl.sum(((id_[None, :] == id_[:, None]) & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
    end = tl.full((), 0, tl.int32)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        total = tl.load(totals + e, mask=e < E, other=0).to(tl.int32)
        padded = (total + (align - 1)) // align * align
        row += tl.sum(tl.where(e[None, :] < id_[:, None], padded[None, :], 0), axis=1)
        if block == 0:
            tl.store(offsets + e, tl.minimum(end + tl.cumsum(padded, 0) - padded, R), mask=e < E)
        end += tl.sum(padded, axis=0)
    if block == 0:
        tl.store(offsets + E, tl.minimum(end, R))
    fits = (id_ >= 0) & (row < R)
    tl.store(slots + row, p.to(tl.int64), mask=fits)
    tl.store(sources + row, (p // topk).to(tl.int64), mask=fits)
    tl.store(rows + p, tl.where(fits, row, -1), mask=p < P)

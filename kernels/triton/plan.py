"""The plan of a permutation on the device: a counting sort in three launches, without atomics and without the host.

Copies are cut into blocks of BLOCK_P in their own order, or in a given order of the rows that they belong to.
`count_kernel` counts, for each block, how many go to each group; `scan_kernel` turns each group's counts into the
copies before each block, and their total; `place_kernel` adds where the group's padded rows start, how many copies of
it came in earlier blocks, and how many earlier in this one: the row. Every number is a count of what comes before, so
the order is that of a stable sort whatever runs first. More programs of the same launch mark the rows that no copy goes
to: nothing is filled beforehand. A group is an expert; of a message it is a peer, and `peers_kernel` says first which
ones each row goes to.

PyTorch's sort was refused: with the scatters and sums around it that is some twenty launches for a list of a few
thousand numbers, once a layer and micro-batch. Sizes that change from batch to batch are not specialised: another
length compiles nothing anew; nor are numbers that differ from rank to rank.
"""

import triton
import triton.language as tl


@triton.jit
def local_ids(raw, first, E, INVERTED: tl.constexpr):
    """Ids as they are read -> int32, counted from `first`, -1 where there is no such group."""
    if INVERTED:
        raw = (~raw).to(tl.int32)
    id_ = raw - first
    return tl.where((id_ >= 0) & (id_ < E), id_, -1).to(tl.int32)


@triton.jit
def load_ids(
    ids, order, p, P, topk, stride_n, stride_k, first, E, ORDERED: tl.constexpr, INVERTED: tl.constexpr
):  # fmt: skip
    """Copies p -> their row of x, their number in it, and their group, int32, -1 where that is not here."""
    n, k = p // topk, p % topk
    if ORDERED:
        n = tl.load(order + n, mask=p < P, other=0)
    raw = tl.load(ids + n.to(tl.int64) * stride_n + k * stride_k, mask=p < P, other=0)
    return n, k, tl.where(p < P, local_ids(raw, first, E, INVERTED), -1)


@triton.jit(do_not_specialize=["P", "num_blocks", "first"])
def count_kernel(
    ids, order, counts, P, topk, stride_n, stride_k, first, E, num_blocks,
    ORDERED: tl.constexpr, INVERTED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """counts [E, num_blocks]: copies of each block that go to each group."""
    block = tl.program_id(0)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    _, _, id_ = load_ids(ids, order, p, P, topk, stride_n, stride_k, first, E, ORDERED, INVERTED)
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
def mark_padding(totals, slots, sources, r, E, R, align, FIXED: tl.constexpr, BLOCK_E: tl.constexpr):
    """slots, sources = -1 at those of the rows r, below R, that are no group's copy. FIXED: a group has align rows."""
    copies = tl.zeros_like(r)
    if FIXED:
        total = tl.load(totals + r // align, mask=r < R, other=0).to(tl.int32)
        copies = (r % align < total).to(tl.int32)
    else:
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


@triton.jit(do_not_specialize=["P", "num_blocks", "R", "align", "first"])
def place_kernel(
    ids, order, before, totals, slots, sources, rows, offsets, P, topk, stride_n, stride_k, first, E, num_blocks, R,
    align,
    ORDERED: tl.constexpr, INVERTED: tl.constexpr, FIXED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """slots, sources [R] of the copies that have room there, -1 elsewhere, and the inverse, rows [P].

    offsets: int32 [E + 1]. FIXED: every group has `align` rows; else it is padded to a multiple of them. Programs
    behind the copies' blocks mark padding, BLOCK_P rows each.
    """
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK_P)
    if block >= num_blocks:
        mark_padding(totals, slots, sources, (block - num_blocks) * BLOCK_P + lane, E, R, align, FIXED, BLOCK_E)
    p = block * BLOCK_P + lane
    n, k, id_ = load_ids(ids, order, p, P, topk, stride_n, stride_k, first, E, ORDERED, INVERTED)
    row = tl.load(before + id_ * num_blocks + block, mask=id_ >= 0, other=0)
    row += tl.sum(((id_[None, :] == id_[:, None]) & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
    end = tl.full((), 0, tl.int32)
    for base in range(0, E, BLOCK_E):
        e = base + tl.arange(0, BLOCK_E)
        if FIXED:
            start = e * align
        else:
            total = tl.load(totals + e, mask=e < E, other=0).to(tl.int32)
            padded = (total + (align - 1)) // align * align
            row += tl.sum(tl.where(e[None, :] < id_[:, None], padded[None, :], 0), axis=1)
            start = end + tl.cumsum(padded, 0) - padded
            end += tl.sum(padded, axis=0)
        if block == 0:
            tl.store(offsets + e, tl.minimum(start, R), mask=e < E)
    if FIXED:
        row = tl.where(row < align, id_ * align + row, R)
        end = R
    if block == 0:
        tl.store(offsets + E, tl.minimum(end, R))
    fits = (id_ >= 0) & (row < R)
    slot = n * topk + k
    tl.store(slots + row, slot.to(tl.int64), mask=fits)
    tl.store(sources + row, n.to(tl.int64), mask=fits)
    tl.store(rows + slot, tl.where(fits, row, -1), mask=p < P)


@triton.jit(do_not_specialize=["N", "first"])
def peers_kernel(
    ids, peers, N, topk, stride_n, stride_k, first, span, num_peers, width,
    INVERTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """peers [N, width]: those that lead to one of a row's ids, `span` ids each, in ascending order, then -1."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    known = (n < N)[:, None] & (k < topk)[None, :]
    raw = tl.load(ids + n.to(tl.int64)[:, None] * stride_n + (k * stride_k)[None, :], mask=known, other=0)
    id_ = tl.where(known, local_ids(raw, first, span * num_peers, INVERTED), -1)
    peer = tl.where(id_ >= 0, id_ // span, -1)
    again = (peer[:, :, None] == peer[:, None, :]) & (k[None, None, :] < k[None, :, None])
    here = (peer >= 0) & (tl.sum(again.to(tl.int32), axis=2) == 0)
    before = (peer[:, None, :] < peer[:, :, None]) & here[:, None, :]
    place = tl.sum(before.to(tl.int32), axis=2)
    total = tl.sum(here.to(tl.int32), axis=1)
    peers += n.to(tl.int64)[:, None] * width
    tl.store(peers + place, peer.to(tl.int64), mask=here)
    nothing = tl.full((BLOCK_N, BLOCK_K), -1, tl.int64)
    tl.store(peers + k[None, :], nothing, mask=(n < N)[:, None] & (k[None, :] >= total[:, None]) & (k < width)[None, :])

"""Routing in Triton: one pass over the logits, and a second launch that sums what programs have counted.

A program is one warp. It takes a few rows at a time, so that every maximum over experts stays inside the warp: with
more warps Triton shares a row of 256 out among them, and each of some twenty maxima a row would cross shared memory.
Experts are laid out as [groups, experts of a group], both padded to powers of two; padding is never chosen.

The choice takes the largest key `topk` times over: the score's bits as an integer of the same order, and among equal
keys the lowest lane. The scores of the chosen are then read again by their ids, from the first-level cache.

Loads and the sums of shares are those of a program's rows, which lie in one sequence; `balance_kernel` adds them up in
their order, without atomics, into counts, f and a part of the loss for each block of experts. f goes to backward, which
needs one launch: the chosen experts of a row are a mask over its experts, and all the rest is sums along the row.

Sizes of a model are constants; numbers of tokens and sequences are not specialised, another batch compiles nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import ceil_div, next_power_of_2
from fp8moe.kernels.triton.launch import Prepared, by_shapes

ROWS = 8  # a program routes, at least
VALUES = 512  # a program holds of one kind, where a row isn't longer
BALANCE_PARTS, BALANCE_EXPERTS = 64, 16  # a program of balance_kernel adds at a time
BALANCE_WARPS = 4
TINY = tl.constexpr(1e-20)  # keeps a sum of scores that is zero from dividing by zero
LOWEST = tl.constexpr(-0x80000000)


@triton.jit
def divided(x, total):
    """x [M, N] / total [M], correctly rounded; a bias added to it is not fused with a product."""
    return tl.div_rn(x, tl.broadcast_to(total[:, None], x.shape))


@triton.jit
def share_of(x, total):
    """x [M, N] / total [M] by one division a row, for sums."""
    return x * tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total)[:, None]


@triton.jit
def softmax(x):
    """Along rows; -inf where a lane does not count."""
    power = tl.exp(x - tl.max(x, axis=1)[:, None])
    return divided(power, tl.sum(power, axis=1))


@triton.jit
def sigmoid(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))


@triton.jit
def first_largest(x, free, lane, LANES: tl.constexpr):
    """The lane of the largest of each row of x [M, LANES] among the free ones, the lowest where there are several."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # adding zero turns -0.0 into 0.0, which compares equal
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    largest = tl.max(tl.where(free, key, LOWEST), axis=1)
    return tl.min(tl.where(free & (key == largest[:, None]), lane, LANES - 1), axis=1)


@triton.jit
def kept_groups(
    biased, real,
    NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Which lanes of biased [M, LANES] lie in the best TOP_GROUPS groups; `real` lanes have an expert."""
    WIDTH: tl.constexpr = LANES // GROUPS
    grouped = tl.reshape(tl.where(real, biased, -float("inf")), (M, GROUPS, WIDTH))
    score = tl.max(grouped, axis=2)
    if TOP2 and SIZE > 1:
        inside = tl.arange(0, WIDTH)[None, None, :]
        first = tl.min(tl.where(grouped == score[:, :, None], inside, WIDTH), axis=2)
        score += tl.max(tl.where(inside == first[:, :, None], -float("inf"), grouped), axis=2)
    group = tl.arange(0, GROUPS)[None, :]
    free = tl.broadcast_to(group < NUM_GROUPS, (M, GROUPS))
    kept = tl.zeros((M, GROUPS), tl.int32)
    for _ in range(TOP_GROUPS):
        best = group == first_largest(score, free, group, GROUPS)[:, None]
        kept = tl.where(best, 1, kept)
        free = free & (best == 0)
    return tl.reshape(tl.broadcast_to(kept[:, :, None], (M, GROUPS, WIDTH)), (M, LANES)) > 0


@triton.jit
def chosen_lanes(
    biased, real, lane, t,
    E: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr,
    TOPK: tl.constexpr, TOPK_LANES: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, FORCED: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """(ids [M, TOPK_LANES], chosen [M, LANES] as zeros and ones) for rows t [M] of biased scores."""
    WIDTH: tl.constexpr = LANES // GROUPS
    slot = tl.arange(0, TOPK_LANES)[None, :]
    ids = tl.zeros((M, TOPK_LANES), tl.int32)
    chosen = tl.zeros((M, LANES), tl.int32)
    if not FORCED and TOP_GROUPS < NUM_GROUPS:
        kept = kept_groups(biased, real, NUM_GROUPS, GROUPS, SIZE, LANES, TOP_GROUPS, TOP2, M)
        biased = tl.where(kept, biased, -float("inf"))
    for k in range(TOPK):
        if FORCED:
            id_ = ((t * TOPK + k) % E).to(tl.int32)
            best = id_ // SIZE * WIDTH + id_ % SIZE
        else:
            best = first_largest(biased, real & (chosen == 0), lane, LANES)
            id_ = best // WIDTH * SIZE + best % WIDTH
        ids = tl.where(slot == k, id_[:, None], ids)
        chosen = tl.where(lane == best[:, None], 1, chosen)
    return ids, chosen


@triton.jit(do_not_specialize=["S", "blocks"])
def route_kernel(
    logits, bias, ids, weights, part_counts, part_shares, S, blocks, stride_t, route_scale,
    E: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, TOPK: tl.constexpr,
    TOPK_LANES: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr, FORCED: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one sequence, M at a time: ids and weights [T, TOPK], part_counts and part_shares [programs, E]."""
    SIZE: tl.constexpr = E // NUM_GROUPS
    LANES: tl.constexpr = GROUPS * WIDTH
    sequence, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    lane = tl.arange(0, LANES)[None, :]
    e = lane // WIDTH * SIZE + lane % WIDTH
    has_expert = (lane % WIDTH < SIZE) & (lane // WIDTH < NUM_GROUPS)
    slot = tl.arange(0, TOPK_LANES)[None, :]
    steer = tl.load(bias + e, mask=has_expert, other=0.0)
    counts, shares = tl.zeros((M, LANES), tl.int32), tl.zeros((M, LANES), tl.float32)
    for step in range(0, ROWS, M):
        s = first + step + tl.arange(0, M)
        t = sequence.to(tl.int64) * S + s
        row, real = (s < S)[:, None], tl.broadcast_to(has_expert, (M, LANES))
        logit = tl.load(logits + t[:, None] * stride_t + e, mask=row & real, other=0.0)
        logit = tl.where(real, logit, -float("inf"))
        score = sigmoid(logit) if SCORE == "sigmoid" else softmax(logit)
        biased = steer + (logit if SCORE == "softmax_topk" else score)
        id_, chosen = chosen_lanes(
            biased, real, lane, t, E, NUM_GROUPS, GROUPS, SIZE, LANES, TOPK, TOPK_LANES, TOP_GROUPS, TOP2, FORCED, M
        )
        mask = row & (slot < TOPK)
        weight = tl.load(logits + t[:, None] * stride_t + id_, mask=mask, other=-float("inf"))
        if SCORE == "sigmoid":
            weight = sigmoid(weight)
        if SCORE == "softmax":
            largest = tl.max(logit, axis=1)[:, None]
            weight = divided(tl.exp(weight - largest), tl.sum(tl.exp(logit - largest), axis=1))
        if SCORE == "softmax_topk":
            weight = softmax(tl.where(row, weight, 0.0))
        elif NORMALIZE:
            weight = divided(weight, tl.sum(weight, axis=1) + TINY)
        where = t[:, None] * TOPK + slot
        tl.store(ids + where, id_.to(tl.int64), mask=mask)
        tl.store(weights + where, weight * route_scale, mask=mask)
        counts += tl.where(row, chosen, 0)
        shares += tl.where(row, share_of(score, tl.sum(score, axis=1) + TINY), 0.0)
    part = tl.program_id(0).to(tl.int64) * E + tl.reshape(e, (LANES,))
    inside = tl.reshape(has_expert, (LANES,))
    tl.store(part_counts + part, tl.sum(counts, axis=0), mask=inside)
    tl.store(part_shares + part, tl.sum(shares, axis=0), mask=inside)


@triton.jit(do_not_specialize=["S", "B", "blocks"])
def balance_kernel(
    part_counts, part_shares, counts, f, losses, S, B, blocks, f_scale,
    E: tl.constexpr, COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Parts [B x blocks, E] summed: f [B, E], losses [ceil(E / BLOCK_E)]; where COUNT, counts [E] int64 += loads."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    length = tl.full((BLOCK_E,), S, tl.float32)
    loads, loss = tl.zeros((BLOCK_E,), tl.int64), tl.zeros((BLOCK_E,), tl.float32)
    for b in range(0, B):
        load, share = tl.zeros((BLOCK_E,), tl.int32), tl.zeros((BLOCK_E,), tl.float32)
        for first in range(0, blocks, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            part = (b * blocks + p.to(tl.int64))[:, None] * E + e[None, :]
            mask = (p < blocks)[:, None] & inside[None, :]
            load += tl.sum(tl.load(part_counts + part, mask=mask, other=0), axis=0)
            share += tl.sum(tl.load(part_shares + part, mask=mask, other=0.0), axis=0)
        f_e = tl.div_rn(load.to(tl.float32), length) * f_scale
        tl.store(f + b * E + e, f_e, mask=inside)
        loss += f_e * tl.div_rn(share, length)
        loads += load.to(tl.int64)
    tl.store(losses + tl.program_id(0), tl.sum(loss, axis=0))
    if COUNT:
        tl.store(counts + e, tl.load(counts + e, mask=inside, other=0) + loads, mask=inside)


@triton.jit(do_not_specialize=["T", "S"])
def route_backward_kernel(
    logits, ids, f, d_weights, d_loss, d_logits, T, S, stride_t, stride_ids, stride_dw_t, stride_dw_k, route_scale,
    E: tl.constexpr, LANES: tl.constexpr, TOPK: tl.constexpr, SCORE: tl.constexpr, NORMALIZE: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """d_logits [T, E] of M rows; a row's gradients of weights lie on the lanes of its chosen experts."""
    t = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    e = tl.arange(0, LANES)[None, :]
    row, real = (t < T)[:, None], tl.broadcast_to(e < E, (M, LANES))
    logit = tl.load(logits + t[:, None] * stride_t + e, mask=row & real, other=0.0)
    logit = tl.where(real, logit, -float("inf"))
    score = sigmoid(logit) if SCORE == "sigmoid" else softmax(logit)
    dy, chosen = tl.zeros((M, LANES), tl.float32), tl.zeros((M, LANES), tl.int32)
    for k in tl.static_range(TOPK):
        id_ = tl.load(ids + t * stride_ids + k, mask=t < T, other=-1).to(tl.int32)
        d_weight = tl.load(d_weights + t * stride_dw_t + k * stride_dw_k, mask=t < T, other=0.0) * route_scale
        here = e == id_[:, None]
        dy = tl.where(here, d_weight[:, None], dy)
        chosen = tl.where(here, 1, chosen)
    scale = tl.load(d_loss) / tl.cast(S, tl.float32)
    dx = tl.load(f + (t // S)[:, None] * E + e, mask=row & real, other=0.0) * scale
    total = tl.sum(score, axis=1) + TINY
    dx = share_of(dx - tl.sum(dx * share_of(score, total), axis=1)[:, None], total)
    if SCORE == "softmax_topk":
        weight = softmax(tl.where((chosen > 0) | (row == 0), logit, -float("inf")))
        dy = weight * (dy - tl.sum(dy * weight, axis=1)[:, None])
    elif NORMALIZE:
        picked = tl.where(chosen > 0, score, 0.0)
        total = tl.sum(picked, axis=1) + TINY
        dy = share_of(dy - tl.sum(dy * share_of(picked, total), axis=1)[:, None], total)
        dy = tl.where(chosen > 0, dy, 0.0)
    if SCORE == "sigmoid":
        dx = (dx + dy) * ((1.0 - score) * score)
    elif SCORE == "softmax":
        dx += dy
        dx = score * (dx - tl.sum(dx * score, axis=1)[:, None])
    else:
        dx = score * (dx - tl.sum(dx * score, axis=1)[:, None]) + dy
    tl.store(d_logits + t[:, None] * E + e, dx, mask=row & real)


def rows_at_once(lanes: int) -> int:
    """Rows of so many lanes that a program holds at a time."""
    return max(1, min(2 * ROWS, VALUES // lanes))


def route(
    logits_TE: Tensor, bias_E: Tensor, counts_E: Tensor | None, *, topk: int, num_groups: int, top_groups: int,
    score: str, group_score: str, normalize: bool, route_scale: float, num_sequences: int, force_balance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (t, e), device = logits_TE.shape, logits_TE.device
    ids = torch.empty(t, topk, dtype=torch.int64, device=device)
    weights = torch.empty(t, topk, dtype=torch.float32, device=device)
    if t == 0:
        return ids, weights, logits_TE.sum(), logits_TE.new_zeros(num_sequences, e)
    logits = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    parts, choose_on, balance_on = _route_launches(
        t, e, logits.stride(0), num_sequences, topk, num_groups, top_groups, score, group_score, normalize, route_scale,
        force_balance, counts_E is not None,
    )  # fmt: skip
    part_counts = torch.empty(parts, e, dtype=torch.int32, device=device)
    part_shares = torch.empty(parts, e, dtype=torch.float32, device=device)
    choose_on(logits, bias_E.contiguous(), ids, weights, part_counts, part_shares)
    f_BE = torch.empty(num_sequences, e, dtype=torch.float32, device=device)
    losses = torch.empty(ceil_div(e, BALANCE_EXPERTS), dtype=torch.float32, device=device)
    balance_on(part_counts, part_shares, counts_E, f_BE, losses)
    return ids, weights, losses.sum(), f_BE


@by_shapes
def _route_launches(
    t: int, e: int, stride: int, num_sequences: int, topk: int, num_groups: int, top_groups: int, score: str,
    group_score: str, normalize: bool, route_scale: float, forced: bool, count: bool,
) -> tuple[int, Prepared, Prepared]:  # fmt: skip
    """Of how many parts loads and shares are summed, and both launches."""
    groups, width = next_power_of_2(num_groups), next_power_of_2(e // num_groups)
    at_once = rows_at_once(groups * width)
    rows, length = max(ROWS, at_once), t // num_sequences
    blocks = ceil_div(length, rows)
    choose_on = Prepared(
        route_kernel, (num_sequences * blocks,), length, blocks, stride, route_scale, E=e, NUM_GROUPS=num_groups,
        GROUPS=groups, WIDTH=width, TOPK=topk, TOPK_LANES=next_power_of_2(topk), TOP_GROUPS=top_groups,
        TOP2=group_score == "top2_sum", SCORE=score, NORMALIZE=normalize, FORCED=forced, ROWS=rows, M=at_once,
        num_warps=1,
    )  # fmt: skip
    balance_on = Prepared(
        balance_kernel, (ceil_div(e, BALANCE_EXPERTS),), length, num_sequences, blocks, e / topk, E=e, COUNT=count,
        BLOCK_P=BALANCE_PARTS, BLOCK_E=BALANCE_EXPERTS, num_warps=BALANCE_WARPS,
    )  # fmt: skip
    return num_sequences * blocks, choose_on, balance_on


def route_backward(
    logits_TE: Tensor, topk_ids_TK: Tensor, f_BE: Tensor, d_weights_TK: Tensor, d_loss: Tensor, *, score: str,
    normalize: bool, route_scale: float,
) -> Tensor:  # fmt: skip
    (t, e), topk = logits_TE.shape, topk_ids_TK.shape[1]
    d_logits = torch.empty(t, e, dtype=torch.float32, device=logits_TE.device)
    if t:
        logits = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
        ids = topk_ids_TK if topk_ids_TK.stride(1) == 1 else topk_ids_TK.contiguous()
        launch_on = _backward_launch(
            t, e, f_BE.shape[0], topk, logits.stride(0), ids.stride(0), d_weights_TK.stride(), score, normalize,
            route_scale,
        )  # fmt: skip
        launch_on(logits, ids, f_BE.contiguous(), d_weights_TK, d_loss, d_logits)
    return d_logits


@by_shapes
def _backward_launch(
    t: int, e: int, num_sequences: int, topk: int, stride_t: int, stride_ids: int, dw_strides: tuple[int, ...],
    score: str, normalize: bool, route_scale: float,
) -> Prepared:  # fmt: skip
    lanes = next_power_of_2(e)
    at_once = rows_at_once(lanes)
    return Prepared(
        route_backward_kernel, (ceil_div(t, at_once),), t, t // num_sequences, stride_t, stride_ids, *dw_strides,
        route_scale, E=e, LANES=lanes, TOPK=topk, SCORE=score, NORMALIZE=normalize, M=at_once,
        num_warps=1,
    )  # fmt: skip

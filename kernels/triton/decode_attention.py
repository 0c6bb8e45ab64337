"""Attention to a cache in Triton: a program reads a part of a sequence's entries once, for all heads that share it.

A token's attention takes as long as its entries take to be read, so they pass through shared memory once: scores, their
exponentials and the sums of values are made of what lies there, with maximum and total kept as they come (online
softmax). Where values are the keys' first features (latents), they are not loaded again. Entries come through tensor
descriptors, TMA on Hopper: zeros stand behind a tensor's last feature and last entry, and no mask in the loop.

Few sequences would leave most SMs idle, so each one's entries are split until there are about PROGRAMS programs
(flash-decoding: Dao, Haziza, Massa, Sizov 2023), evenly by what the sequence itself has, which is read on the device: a
captured launch reads no more than there is. A second kernel reduces the splits, and adds the sinks.

Up to 32 rows of queries are multiplied by `mma.sync`, 64 by WGMMA. Values of 512 features don't allow 64: their sums
fill the registers of two warp groups, and Triton has each of both form all scores. FP32, which tests alone decode in,
has no tensor core and takes the specification's products. Refused: pointers in place of descriptors, whose cp.async
lacks a fence before WGMMA under Triton 3.6; flash-attn's kernel for caches, which takes no latents.

Legend: B sequences, S new tokens of each, H heads, G heads of keys and values, d features of a key, V of a value.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.device_layout import are_latents
from fp8moe.kernels.fp8 import ceil_div, next_power_of_2
from fp8moe.kernels.reference import decode_attention as specification
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.cross_entropy import LOG2_E, LOWEST
from fp8moe.kernels.triton.launch import Prepared, block_of, by_shapes
from fp8moe.kernels.triton.quantize import last_dim_contiguous

PROGRAMS = 528  # four an SM of Hopper
LEAST_STEPS = 2  # of a split
STEP_VALUES = 20480  # that a step loads at most: 40 KB, of which two programs of an SM await two each
SUMS_OF_WARPS = 8192  # of four: 64 registers a thread
WGMMA_ROWS, FEWEST_ROWS = 64, 16  # of queries in a program; 16 are an mma.sync's
HOPPERS_MEMORY = 200 << 10  # of shared bytes, which more than the fewest rows take
ALIGNMENT = 16  # bytes, of the strides that a descriptor takes


@triton.jit
def scores_of(q, keys, acc):
    """acc + q [M, d] keys [N, d]^T, FP32."""
    if encode.INTERPRETED:
        q, keys = q.to(tl.float32), keys.to(tl.float32)
    return tl.dot(q, tl.trans(keys), acc)


@triton.jit
def sums_of(weights, values, acc):
    """acc + weights [M, N] values [N, V], FP32 of weights rounded to BF16."""
    weights = encode.to_output(weights, tl.bfloat16)
    if encode.INTERPRETED:
        weights, values = weights.to(tl.float32), values.to(tl.float32)
    return tl.dot(weights, values, acc)


@triton.jit(do_not_specialize=["splits"])
def decode_attention_kernel(
    first, second, q, positions, rows, partials, stats, S, G, d, V, splits, window, scale,
    stride_b, stride_s, stride_h,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, LATENTS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """partials [B S H, splits, V] sums of exp2(score - maximum) value, stats [B S H, splits, 2] maximum and total.

    first, second: keys and values; where LATENTS, values, which are the keys' first features, and the others. FIRST,
    SECOND: features of their blocks. HEADS: that share a key. ROWS: entries stand in `rows` of the cache.
    """
    blocks = tl.cdiv(S * HEADS, M)
    pid = tl.program_id(0)
    b, g = pid // (blocks * splits) // G, pid // (blocks * splits) % G
    split, row = pid // blocks % splits, pid % blocks * M + tl.arange(0, M)
    s, h, is_row = row // HEADS, g * HEADS + row % HEADS, row < S * HEADS
    place = tl.load(positions + b * S + s, mask=is_row, other=-1).to(tl.int32)
    end = tl.max(place, axis=0) + 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(tl.min(tl.where(is_row, place, end), axis=0) - window + 1, 0)
    share = tl.cdiv(tl.cdiv(end - begin, N), splits) * N
    begin += split * share
    end = tl.minimum(begin + share, end)
    entry = b
    if ROWS:
        entry = tl.load(rows + b).to(tl.int32)

    q += b.to(tl.int64) * stride_b + s.to(tl.int64)[:, None] * stride_s + h[:, None] * stride_h
    feature = tl.arange(0, FIRST)[None, :]
    q_first = tl.load(q + feature, mask=is_row[:, None] & (feature < (V if LATENTS else d)), other=0.0)
    if LATENTS:
        feature = V + tl.arange(0, SECOND)[None, :]
        q_second = tl.load(q + feature, mask=is_row[:, None] & (feature < d), other=0.0)
    top = tl.full((M,), LOWEST, tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, FIRST if LATENTS else SECOND), tl.float32)
    for n in range(begin, end, N):
        of_first = tl.reshape(first.load([entry, n, g, 0]), (N, FIRST))
        of_second = tl.reshape(second.load([entry, n, g, 0]), (N, SECOND))
        scores = scores_of(q_first, of_first, tl.zeros((M, N), tl.float32))
        if LATENTS:
            scores = scores_of(q_second, of_second, scores)
        at = n + tl.arange(0, N)[None, :]
        seen = at <= place[:, None]
        if WINDOW:
            seen = seen & (at > place[:, None] - window)
        scores = tl.where(seen, scores * (scale * LOG2_E), float("-inf"))
        above = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - above[:, None])
        factor = tl.exp2(top - above)
        total = total * factor + tl.sum(weights, axis=1)
        sums = sums_of(weights, of_first if LATENTS else of_second, sums * factor[:, None])
        top = above

    at = ((b.to(tl.int64) * S + s) * (G * HEADS) + h) * splits + split
    tl.store(stats + 2 * at, top, mask=is_row)
    tl.store(stats + 2 * at + 1, total, mask=is_row)
    value = tl.arange(0, sums.shape[1])[None, :]
    tl.store(partials + at[:, None] * V + value, sums, mask=is_row[:, None] & (value < V))


@triton.jit(do_not_specialize=["splits"])
def reduce_splits_kernel(
    partials, stats, sinks, out, H, V, splits, SINKS: tl.constexpr, DTYPE: tl.constexpr, WIDTH: tl.constexpr
):
    """out [B S H, V]: the sums of all splits over their totals, each scaled from its maximum to the largest."""
    at = tl.program_id(0).to(tl.int64)
    value = tl.arange(0, WIDTH)
    partials += at * splits * V
    stats += at * splits * 2
    top = tl.load(stats)
    for split in range(1, splits):
        top = tl.maximum(top, tl.load(stats + 2 * split))
    total = tl.full((), 0.0, tl.float32)
    if SINKS:
        total = tl.exp2(tl.load(sinks + at % H) * LOG2_E - top)  # infinite where nothing else counts: zeros
    sums = tl.zeros((WIDTH,), tl.float32)
    for split in range(splits):
        factor = tl.exp2(tl.load(stats + 2 * split) - top)
        total += tl.load(stats + 2 * split + 1) * factor
        sums += tl.load(partials + split * V + value, mask=value < V, other=0.0) * factor
    tl.store(out + at * V + value, encode.to_output(tl.div_rn(sums, total), DTYPE), mask=value < V)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rows: Tensor | None = None,
    sinks: Tensor | None = None, *,
    length: int, scale: float, window: int | None = None,
) -> Tensor:  # fmt: skip
    if q.dtype is torch.float32:
        return specification.decode_attention(
            q, keys, values, positions, rows, sinks, length=length, scale=scale, window=window
        )
    b, s, h = q.shape[:3]
    v, groups = values.shape[-1], keys.shape[2]
    out = torch.empty(b, s, h, v, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    latents = are_latents(keys, values)
    first, second = (values, keys[..., v:]) if latents else (keys, values)
    first, second, q = on_rows(first), on_rows(second), last_dim_contiguous(q)
    lie, read = (first.shape, first.stride(), second.shape, second.stride()), min(length, (window or length) + s)
    tile = choose_tile(s * h // groups, first.shape[-1], second.shape[-1], latents, q.device)
    splits = num_splits(b * groups * ceil_div(s * h // groups, tile.m), ceil_div(read, tile.n))
    attend, add = _launches(
        q.shape, q.stride(), v, *lie, tile, splits, scale, window, rows is not None, sinks is not None, latents
    )
    partials = torch.empty(b * s * h, splits, v, device=q.device)
    stats = torch.empty(b * s * h, splits, 2, device=q.device)
    attend(first, second, q, positions.contiguous(), rows, partials, stats)
    add(partials, stats, sinks, out)
    return out


@dataclass(frozen=True, eq=False)  # `choose_tile` makes each once
class DecodeTile:
    """m rows of queries, n entries a step, powers of two of features, warps, stages."""

    m: int
    n: int
    first: int
    second: int
    warps: int
    stages: int = 3


@functools.cache
def choose_tile(rows: int, first: int, second: int, latents: bool, device: torch.device) -> DecodeTile:
    """For `rows` of queries that share a key, and so many features of what is loaded."""
    wide = latents * first or second
    first, second, wide = (max(16, next_power_of_2(one)) for one in (first, second, wide))
    m = min(_most_rows(device, wide), max(FEWEST_ROWS, next_power_of_2(rows)))
    warps = 8 if FEWEST_ROWS < m < WGMMA_ROWS and m * wide > SUMS_OF_WARPS else 4
    n = 64 if warps == 8 or (first + second) * 64 <= STEP_VALUES else 32
    return DecodeTile(m, n, first, second, warps)


def _most_rows(device: torch.device, wide: int) -> int:
    """Of queries in a program, where a value has `wide` features: two warp groups would form scores twice."""
    most = WGMMA_ROWS if wide <= 256 else WGMMA_ROWS // 2
    if device.type != "cuda":
        return most
    index = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return most if shared >= HOPPERS_MEMORY else FEWEST_ROWS


def num_splits(blocks: int, steps: int) -> int:
    """How many programs share the steps of a sequence, where `blocks` have each without."""
    return max(1, min(PROGRAMS // blocks, steps // LEAST_STEPS))


def on_rows(entries: Tensor) -> Tensor:
    """[N, L, G, *] as a descriptor takes it: heads on 16 bytes; a copy with zeros behind them if they are not so."""
    step = ALIGNMENT // entries.element_size()
    fits = entries.stride(-1) == 1 and all(stride % step == 0 for stride in entries.stride()[:-1])
    if fits and entries.data_ptr() % ALIGNMENT == 0:
        return entries
    return torch.nn.functional.pad(entries, (0, -entries.shape[-1] % step)).contiguous()


@by_shapes
def _launches(
    shape: torch.Size, strides: tuple[int, ...], v: int,
    first: torch.Size, first_strides: tuple[int, ...], second: torch.Size, second_strides: tuple[int, ...],
    tile: DecodeTile, splits: int, scale: float, window: int | None, has_rows: bool, has_sinks: bool,
    latents: bool,
) -> tuple[Prepared, Prepared]:  # fmt: skip
    (b, s, h, d), groups = shape, first[2]
    blocks = ceil_div(s * h // groups, tile.m)
    described = (
        (list(first), list(first_strides), block_of(1, tile.n, 1, tile.first)),
        (list(second), list(second_strides), block_of(1, tile.n, 1, tile.second)),
    )
    attend = Prepared(
        decode_attention_kernel, (blocks * splits * b * groups,), s, groups, d, v, splits, window or 0, scale,
        *strides[:3], described=described, HEADS=h // groups, ROWS=has_rows, WINDOW=window is not None,
        LATENTS=latents, M=tile.m, N=tile.n, FIRST=tile.first, SECOND=tile.second, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    add = Prepared(
        reduce_splits_kernel, (b * s * h,), h, v, splits, SINKS=has_sinks, DTYPE=tl.bfloat16,
        WIDTH=next_power_of_2(v), num_warps=max(1, min(4, v // 128)),
    )  # fmt: skip
    return attend, add

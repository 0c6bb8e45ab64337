"""FP8 GEMM in Triton with promotion every 128, and the BF16 or FP32 weight gradient added into FP32.

`acc += dot(a, b) * scale` starts a fresh product for each 128 of K, so the partial sum leaves the tensor core's 14-bit
accumulator before it is scaled and added in FP32: promotion by construction. Accumulating inside `dot` (its own
`acc=` argument, with or without max_num_imprecise_acc) was refused: it leaves no place for the scales.

Operands come through tensor descriptors: TMA on Hopper, masked loads elsewhere, zeros outside the tensor in both. So
every last tile may be short, and no mask stands in the inner loop. Descriptors ask for K-major bytes at strides of
16 bytes; an operand that lies otherwise is copied first (`k_major`). Scales are read with whatever strides they have.
"""

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fp8moe.kernels import tiles
from fp8moe.kernels.fp8 import BLOCK_TILE, TILE, Fp8Tensor, ceil_div
from fp8moe.kernels.triton import encode

TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
WGRAD_BLOCK, WGRAD_TOKENS, WGRAD_STAGES = 128, 64, 3
# FP32 products have no tensor core: 128x128 of them spill registers, and the router is too small to need larger tiles.
EXACT_BLOCK, EXACT_TOKENS, EXACT_STAGES = 64, 32, 2
WGRAD_WARPS = 8
_SHARED_RESERVE = 1024  # barriers, and what the driver keeps


@triton.jit
def tile_order(program, num_m, num_n, GROUP: tl.constexpr):
    """(m, n) of a tile: GROUP rows of tiles are swept together, so that their operands stay in L2."""
    width = GROUP * num_n
    first = program // width * GROUP
    height = tl.minimum(num_m - first, GROUP)
    inside = program % width
    return first + inside % height, inside // height


@triton.jit
def scaled_product(
    acc, a, b, a_row, b_row, k, a_scale, b_scale, a_stride_k, b_stride_k, m_mask, n_mask,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """acc + (a tile @ b tile^T) x scales, for tile k of the contraction.

    a_scale points at the rows of a, b_scale at those of b, or, where BLOCKS, at the one row of blocks.
    """
    product = tl.dot(a.load([a_row, k * encode.TILE]), tl.trans(b.load([b_row, k * encode.TILE])))
    sa = tl.load(a_scale + k * a_stride_k, mask=m_mask, other=0.0)
    if BLOCKS:
        sb = tl.load(b_scale + k * b_stride_k)
        acc += product * (sa * sb)[:, None]
    else:
        sb = tl.load(b_scale + k * b_stride_k, mask=n_mask, other=0.0)
        acc += (product * sb[None, :]) * sa[:, None]
    return acc


@triton.jit
def gemm_kernel(
    a, b, out, a_scale, b_scale, M, N, K, a_stride_m, a_stride_k, b_stride_n, b_stride_k, stride_m, stride_n,
    BLOCKS: tl.constexpr, ADD: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [M, N] = (or, where ADD, +=) a [M, K] @ b [N, K]^T. BLOCKS: b has 128x128 scales and BLOCK_N is 128."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    m_tile, n_tile = tile_order(tl.program_id(0), num_m, num_n, GROUP)
    m, n = m_tile * BLOCK_M + tl.arange(0, BLOCK_M), n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    a_scale += m.to(tl.int64) * a_stride_m
    if BLOCKS:
        b_scale += n_tile.to(tl.int64) * b_stride_n
    else:
        b_scale += n.to(tl.int64) * b_stride_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, tl.cdiv(K, encode.TILE)):
        acc = scaled_product(
            acc, a, b, m_tile * BLOCK_M, n_tile * BLOCK_N, k, a_scale, b_scale,
            a_stride_k, b_stride_k, m_mask, n_mask, BLOCKS,
        )  # fmt: skip
    where = out + m.to(tl.int64)[:, None] * stride_m + n.to(tl.int64)[None, :] * stride_n
    mask = m_mask[:, None] & n_mask[None, :]
    if ADD:
        acc += tl.load(where, mask=mask, other=0.0)
    tl.store(where, encode.to_output(acc, DTYPE), mask=mask)


@triton.jit
def wgrad_kernel(
    dy, x, main_grad, T, N, K, dy_stride_t, dy_stride_n, x_stride_t, x_stride_k, stride_n, stride_k,
    EXACT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """main_grad [N, K] += dy [T, N]^T @ x [T, K]. EXACT: an operand is FP32, products are FP32."""
    n_tile, k_tile = tile_order(tl.program_id(0), tl.cdiv(N, BLOCK), tl.cdiv(K, BLOCK), GROUP)
    n, k = n_tile * BLOCK + tl.arange(0, BLOCK), k_tile * BLOCK + tl.arange(0, BLOCK)
    n_mask, k_mask = n < N, k < K
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(0, tl.cdiv(T, BLOCK_T)):
        t = step * BLOCK_T + tl.arange(0, BLOCK_T)
        t_mask, t_far = (t < T)[:, None], t.to(tl.int64)[:, None]
        left = tl.load(dy + t_far * dy_stride_t + n[None, :] * dy_stride_n, mask=t_mask & n_mask[None, :], other=0.0)
        right = tl.load(x + t_far * x_stride_t + k[None, :] * x_stride_k, mask=t_mask & k_mask[None, :], other=0.0)
        if EXACT or encode.INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    where = main_grad + n.to(tl.int64)[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k
    mask = n_mask[:, None] & k_mask[None, :]
    tl.store(where, acc + tl.load(where, mask=mask, other=0.0), mask=mask)


def gemm(
    a: Fp8Tensor, b: Fp8Tensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=a.device) if accumulate is None else accumulate
    if out.numel() == 0 or k == 0:
        return out.zero_() if accumulate is None else out
    blocks = b.tile == BLOCK_TILE
    tile = choose_tile("gemm" if blocks else "gemm_columns", m, n, k, a.device)
    gemm_kernel[(ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n),)](
        descriptor(a.data, tile.block_m), descriptor(b.data, tile.block_n), out, a.scale, b.scale, m, n, k,
        *a.scale.stride(), *b.scale.stride(), *out.stride(), BLOCKS=blocks, ADD=accumulate is not None,
        DTYPE=TL_DTYPE[out.dtype], BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def wgrad(dy: Tensor, x: Tensor, main_grad: Tensor) -> None:
    (t, n), k = dy.shape, x.shape[1]
    if t == 0 or main_grad.numel() == 0:
        return
    exact = torch.float32 in (dy.dtype, x.dtype)
    block, tokens = (EXACT_BLOCK, EXACT_TOKENS) if exact else (WGRAD_BLOCK, WGRAD_TOKENS)
    wgrad_kernel[(ceil_div(n, block) * ceil_div(k, block),)](
        dy, x, main_grad, t, n, k, *dy.stride(), *x.stride(), *main_grad.stride(),
        EXACT=exact, BLOCK=block, BLOCK_T=tokens, GROUP=8,
        num_warps=WGRAD_WARPS, num_stages=EXACT_STAGES if exact else WGRAD_STAGES,
    )  # fmt: skip


def k_major(data: Tensor) -> Tensor:
    """FP8 codes [rows, K] as TMA reads them: K contiguous, rows at multiples of 16 bytes; a copy if they are not so."""
    fits = data.stride(-1) == 1 and data.stride(0) % 16 == 0 and data.data_ptr() % 16 == 0
    return data if fits else data.clone(memory_format=torch.contiguous_format)


def descriptor(data: Tensor, rows: int) -> Any:
    """A descriptor of [rows, 128] tiles of `data` [*, K]."""
    data = k_major(data)
    return TensorDescriptor(data, list(data.shape), list(data.stride()), [rows, TILE])


@functools.cache
def choose_tile(op: str, m: int, n: int, k: int, device: torch.device, groups: int = 1) -> tiles.Tile:
    """The table's tile for `op`, with as many stages as the device's shared memory holds."""
    if device.type != "cuda":
        return tiles.choose("triton", op, m, n, k, groups=groups)
    tile = tiles.choose("triton", op, m, n, k, groups=groups, device=torch.cuda.get_device_name(device))
    index = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"] - _SHARED_RESERVE
    stages = min(tile.stages, max(1, shared // ((tile.block_m + tile.block_n) * TILE)))
    return dataclasses.replace(tile, stages=stages)

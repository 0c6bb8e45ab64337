"""FP8 GEMM in Triton with promotion every 128. The unquantized weight gradient is `wgrad`'s kernel.

`acc += dot(a, b) * scale` starts a fresh product for each 128 of K, so the partial sum leaves the tensor core's 14-bit
accumulator before it is scaled and added in FP32: promotion by construction. Accumulating inside `dot` (its own
`acc=` argument, with or without max_num_imprecise_acc) was refused: it leaves no place for the scales.

Operands come through tensor descriptors: TMA on Hopper, masked loads elsewhere, zeros outside the tensor in both. So
every last tile may be short, and no mask stands in the inner loop. Descriptors ask for K-major bytes at strides of
16 bytes; an operand that lies otherwise is copied first (`k_major`). Scales are read with whatever strides they have.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels import tiles
from fp8moe.kernels.fp8 import BLOCK_TILE, TILE, Fp8Tensor, ceil_div
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.launch import Descriptor, block_of, launch
from fp8moe.kernels.triton.order import tile_order
from fp8moe.kernels.triton.wgrad import launch_wgrad

TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_SHARED_RESERVE = 1024  # barriers, and what the driver keeps


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


def gemm(
    a: Fp8Tensor, b: Fp8Tensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=a.device) if accumulate is None else accumulate
    if out.numel() == 0 or k == 0:
        return out.zero_() if accumulate is None else out
    blocks = b.tile == BLOCK_TILE
    tile = choose_tile("gemm" if blocks else "gemm_columns", m, n, k, a.device)
    launch(
        gemm_kernel, (ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n),),
        descriptor(a.data, tile.block_m), descriptor(b.data, tile.block_n), out, a.scale, b.scale, m, n, k,
        *a.scale.stride(), *b.scale.stride(), *out.stride(), BLOCKS=blocks, ADD=accumulate is not None,
        DTYPE=TL_DTYPE[out.dtype], BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def wgrad(dy: Tensor, x: Tensor, main_grad: Tensor) -> None:
    tile = choose_tile("wgrad", dy.shape[1], x.shape[1], dy.shape[0], main_grad.device)
    launch_wgrad(dy, x, main_grad[None], None, tile)


def k_major(data: Tensor) -> Tensor:
    """FP8 codes [rows, K] as TMA reads them: K contiguous, rows at multiples of 16 bytes; a copy if they are not so."""
    fits = data.stride(-1) == 1 and data.stride(0) % 16 == 0 and data.data_ptr() % 16 == 0
    return data if fits else data.clone(memory_format=torch.contiguous_format)


def descriptor(data: Tensor, rows: int) -> Descriptor:
    """A descriptor of [rows, 128] tiles of `data` [*, K]."""
    data = k_major(data)
    return Descriptor(data, list(data.shape), list(data.stride()), block_of(rows, TILE))


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

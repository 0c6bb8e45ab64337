"""SwiGLU without casts in Triton: one launch forward, one backward.

A program has BLOCK_VALUES values, 16 a lane, of as few rows as hold them. With weights a program of the backward passes
over all of F and adds their gradients in that order; without, it has one block of F. The sigmoid is the hardware's, see
`encode.sigmoid`: results are within its bound of the specification's before the one rounding. LIMIT: see `swiglu`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8 import SIZE_MULTIPLE, ceil_div, next_power_of_2
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.activation import activated, differentiate
from fp8moe.kernels.triton.gemm import TL_DTYPE
from fp8moe.kernels.triton.launch import Prepared, by_shapes
from fp8moe.kernels.triton.quantize import last_dim_contiguous
from fp8moe.kernels.triton.swiglu import weight_of

NUM_WARPS = 4
BLOCK_VALUES = 2048  # of a program
BLOCK_WIDTH = 512  # of one row, at most


def block_of(f: int) -> tuple[int, int]:
    """Rows and columns of a program, for rows of f values."""
    width = min(max(next_power_of_2(f), SIZE_MULTIPLE), BLOCK_WIDTH)
    return BLOCK_VALUES // width, width


@triton.jit(do_not_specialize=["R"])
def silu_mul_kernel(
    gate_up, weights, out, R, F, stride_m, DTYPE: tl.constexpr, LIMIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """gate_up [R, 2F] -> out [R, F]."""
    num_f = tl.cdiv(F, BLOCK_F)
    m = tl.program_id(0) // num_f * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % num_f * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (m < R)[:, None] & (k < F)[None, :]
    here = gate_up + m.to(tl.int64)[:, None] * stride_m + k[None, :]
    gate, up = (
        tl.load(here, mask=mask, other=0.0).to(tl.float32),
        tl.load(here + F, mask=mask, other=0.0).to(tl.float32),
    )
    product = activated(gate, up, LIMIT)
    if weights is not None:
        product *= weight_of(weights, m, R)[:, None]
    tl.store(out + m.to(tl.int64)[:, None] * F + k[None, :], encode.to_output(product, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["R", "blocks"])
def silu_mul_backward_kernel(
    dy, gate_up, weights, d_gate_up, d_weights, R, F, blocks, stride_dy, stride_m,
    DTYPE: tl.constexpr, LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dy [R, F], gate_up [R, 2F] -> d gate_up [R, 2F], d weights [R]; a program has `blocks` blocks of F."""
    parts = tl.cdiv(tl.cdiv(F, BLOCK_F), blocks)
    m = tl.program_id(0) // parts * BLOCK_M + tl.arange(0, BLOCK_M)
    row, far = (m < R)[:, None], m.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    start = tl.program_id(0) % parts * blocks
    for i in range(start, tl.minimum(start + blocks, tl.cdiv(F, BLOCK_F))):
        k = i * BLOCK_F + tl.arange(0, BLOCK_F)
        mask = row & (k < F)[None, :]
        here = gate_up + far * stride_m + k[None, :]
        gate = tl.load(here, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(here + F, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + far * stride_dy + k[None, :], mask=mask, other=0.0).to(tl.float32)
        d_gate, d_up, d_weight = differentiate(gate, up, gradient, LIMIT)
        if weights is not None:
            weight = weight_of(weights, m, R)[:, None]
            d_gate, d_up = d_gate * weight, d_up * weight
            total += d_weight
        there = d_gate_up + far * (2 * F) + k[None, :]
        tl.store(there, encode.to_output(d_gate, DTYPE), mask=mask)
        tl.store(there + F, encode.to_output(d_up, DTYPE), mask=mask)
    if weights is not None:
        tl.store(d_weights + m, tl.sum(total, axis=1), mask=m < R)


def silu_mul(gate_up: Tensor, weights: Tensor | None = None, *, limit: float | None = None) -> Tensor:
    r, f = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(r, f, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        gate_up = last_dim_contiguous(gate_up)
        launch_on = _forward_launch(r, f, gate_up.stride(0), limit, out.dtype)
        launch_on(gate_up, None if weights is None else weights.contiguous(), out)
    return out


@by_shapes
def _forward_launch(r: int, f: int, stride: int, limit: float | None, dtype: torch.dtype) -> Prepared:
    block_m, block_f = block_of(f)
    return Prepared(
        silu_mul_kernel, (ceil_div(r, block_m) * ceil_div(f, block_f),), r, f, stride, DTYPE=TL_DTYPE[dtype],
        LIMIT=limit, BLOCK_M=block_m, BLOCK_F=block_f, num_warps=NUM_WARPS,
    )  # fmt: skip


def silu_mul_backward(
    dy: Tensor, gate_up: Tensor, weights: Tensor | None = None, *, limit: float | None = None
) -> tuple[Tensor, Tensor | None]:
    r, f = gate_up.shape[0], gate_up.shape[1] // 2
    d_gate_up = torch.empty(r, 2 * f, dtype=gate_up.dtype, device=gate_up.device)
    d_weights = None if weights is None else torch.empty(r, dtype=torch.float32, device=gate_up.device)
    if d_gate_up.numel():
        dy, gate_up = last_dim_contiguous(dy), last_dim_contiguous(gate_up)
        launch_on = _backward_launch(r, f, dy.stride(0), gate_up.stride(0), weights is not None, limit, d_gate_up.dtype)
        launch_on(dy, gate_up, None if weights is None else weights.contiguous(), d_gate_up, d_weights)
    elif d_weights is not None:
        d_weights.zero_()
    return d_gate_up, d_weights


@by_shapes
def _backward_launch(
    r: int, f: int, stride_dy: int, stride: int, weighted: bool, limit: float | None, dtype: torch.dtype
) -> Prepared:
    block_m, block_f = block_of(f)
    num_f = ceil_div(f, block_f)
    blocks = num_f if weighted else 1
    return Prepared(
        silu_mul_backward_kernel, (ceil_div(r, block_m) * ceil_div(num_f, blocks),), r, f, blocks, stride_dy, stride,
        DTYPE=TL_DTYPE[dtype], LIMIT=limit, BLOCK_M=block_m, BLOCK_F=block_f, num_warps=NUM_WARPS,
    )  # fmt: skip

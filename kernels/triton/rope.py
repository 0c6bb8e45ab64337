"""RoPE in Triton: a program writes the heads of a few tokens, the copied features and the rotated ones.

Pairs are loaded as they lie, 2 x HALF contiguous features, and split in registers; each half is stored contiguous.
Keys: a program has one token, turns its shared part once, and writes it to all heads, BLOCK_H at a time; backward sums
the heads in the same order. Products and sums are not fused to FMAs: results are the specification's bit for bit, but
for the sum over heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.device_layout import empty_keys, empty_keys_gradient
from fp8moe.kernels.fp8 import ceil_div, next_power_of_2
from fp8moe.kernels.triton import encode
from fp8moe.kernels.triton.gemm import TL_DTYPE
from fp8moe.kernels.triton.launch import Prepared, by_shapes
from fp8moe.kernels.triton.quantize import NUM_WARPS, last_dim_contiguous

QUERY_HEADS, KEY_HEADS = 32, 32  # heads of a token that a program holds at a time


@triton.jit
def load_pairs(x, mask, BLOCK_H: tl.constexpr, HALF: tl.constexpr):
    """Pairs (2i, 2i+1) at pointers x [BLOCK_H, 2 HALF] -> first members, second members [BLOCK_H, HALF] FP32."""
    value = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(value, (BLOCK_H, HALF, 2)))


@triton.jit
def copy_features(source, target, h, stride_source, stride_target, H, width, WIDTH: tl.constexpr):
    """`width` features of heads h, from source to target."""
    d = tl.arange(0, WIDTH)[None, :]
    mask = (h < H)[:, None] & (d < width)
    tl.store(
        target + h[:, None] * stride_target + d, tl.load(source + h[:, None] * stride_source + d, mask=mask), mask=mask
    )


@triton.jit
def rotate_queries_kernel(
    q, cos, sin, out, H, nope, half, stride_t, stride_h,
    BACKWARD: tl.constexpr, DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """q [T, H, nope + 2 half] -> out, contiguous, rotated; BACKWARD: the transpose."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    width = nope + 2 * half
    q += t * stride_t
    out += t * H * width
    copy_features(q, out, h, stride_h, width, H, nope, NOPE)
    i = tl.arange(0, HALF)
    c = tl.load(cos + t * half + i, mask=i < half, other=0.0)[None, :]
    s = tl.load(sin + t * half + i, mask=i < half, other=0.0)[None, :]
    pairs = tl.arange(0, 2 * HALF)[None, :]
    apart, pairs_mask = (h < H)[:, None] & (i < half)[None, :], (h < H)[:, None] & (pairs < 2 * half)
    source, target = q + h[:, None] * stride_h + nope, out + h[:, None] * width + nope
    if BACKWARD:
        first = tl.load(source + i[None, :], mask=apart, other=0.0).to(tl.float32)
        second = tl.load(source + half + i[None, :], mask=apart, other=0.0).to(tl.float32)
        turned = tl.reshape(tl.join(first * c + second * s, second * c - first * s), (BLOCK_H, 2 * HALF))
        tl.store(target + pairs, encode.to_output(turned, DTYPE), mask=pairs_mask)
    else:
        even, odd = load_pairs(source + pairs, pairs_mask, BLOCK_H, HALF)
        tl.store(target + i[None, :], encode.to_output(even * c - odd * s, DTYPE), mask=apart)
        tl.store(target + half + i[None, :], encode.to_output(odd * c + even * s, DTYPE), mask=apart)


@triton.jit
def make_keys_kernel(
    kv, k_rope, cos, sin, keys, H, nope, half, stride_t, stride_h, stride_rope,
    DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """kv [T, H, nope + v], k_rope [T, 2 half] -> keys [T, H, nope + 2 half]."""
    t = tl.program_id(0).to(tl.int64)
    width = nope + 2 * half
    kv += t * stride_t
    keys += t * H * width
    i = tl.arange(0, HALF)
    c = tl.load(cos + t * half + i, mask=i < half, other=0.0)[None, :]
    s = tl.load(sin + t * half + i, mask=i < half, other=0.0)[None, :]
    pairs = tl.arange(0, 2 * HALF)[None, :]
    even, odd = load_pairs(k_rope + t * stride_rope + pairs, pairs < 2 * half, 1, HALF)
    first, second = encode.to_output(even * c - odd * s, DTYPE), encode.to_output(odd * c + even * s, DTYPE)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        copy_features(kv, keys, h, stride_h, width, H, nope, NOPE)
        mask = (h < H)[:, None] & (i < half)[None, :]
        target = keys + h[:, None] * width + nope + i[None, :]
        tl.store(target, tl.broadcast_to(first, (BLOCK_H, HALF)), mask=mask)
        tl.store(target + half, tl.broadcast_to(second, (BLOCK_H, HALF)), mask=mask)


@triton.jit
def keys_backward_kernel(
    dk, dv, cos, sin, d_kv, d_rope, H, nope, half, v, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, NOPE: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """dk [T, H, nope + 2 half], dv [T, H, v] -> d_kv [T, H, nope + v], d_rope [T, 2 half] summed over heads."""
    t = tl.program_id(0).to(tl.int64)
    width = nope + v
    dk += t * stride_dk_t
    dv += t * stride_dv_t
    d_kv += t * H * width
    i = tl.arange(0, HALF)
    first, second = tl.zeros((BLOCK_H, HALF), tl.float32), tl.zeros((BLOCK_H, HALF), tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        copy_features(dk, d_kv, h, stride_dk_h, width, H, nope, NOPE)
        copy_features(dv, d_kv + nope, h, stride_dv_h, width, H, v, V)
        mask = (h < H)[:, None] & (i < half)[None, :]
        source = dk + h[:, None] * stride_dk_h + nope + i[None, :]
        first += tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second += tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    first, second = tl.sum(first, axis=0), tl.sum(second, axis=0)
    c = tl.load(cos + t * half + i, mask=i < half, other=0.0)
    s = tl.load(sin + t * half + i, mask=i < half, other=0.0)
    turned = tl.reshape(tl.join(first * c + second * s, second * c - first * s), (2 * HALF,))
    pairs = tl.arange(0, 2 * HALF)
    tl.store(d_rope + t * 2 * half + pairs, encode.to_output(turned, DTYPE), mask=pairs < 2 * half)


def rope_queries(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _queries(q, cos, sin, backward=False)


def rope_queries_backward(dq: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _queries(dq, cos, sin, backward=True)


def _queries(q: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    t, heads, width = q.shape
    half = cos.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel():
        q = last_dim_contiguous(q)
        launch_on = _queries_launch(t, heads, width - 2 * half, half, q.stride(), backward, q.dtype)
        launch_on(q, cos.contiguous(), sin.contiguous(), out)
    return out


@by_shapes
def _queries_launch(
    t: int, heads: int, nope: int, half: int, strides: tuple[int, ...], backward: bool, dtype: torch.dtype
) -> Prepared:
    block_h = min(QUERY_HEADS, next_power_of_2(heads))
    return Prepared(
        rotate_queries_kernel, (t, ceil_div(heads, block_h)), heads, nope, half, *strides[:2], BACKWARD=backward,
        DTYPE=TL_DTYPE[dtype], BLOCK_H=block_h, NOPE=_block(nope), HALF=_block(half), num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip


def rope_keys(kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, *, nope_dim: int) -> Tensor:
    t, heads, _ = kv.shape
    half = cos.shape[1]
    (keys,) = empty_keys(kv, k_rope, cos, sin, nope_dim=nope_dim)
    if keys.numel():
        kv, k_rope = last_dim_contiguous(kv), last_dim_contiguous(k_rope)
        launch_on = _keys_launch(t, heads, nope_dim, half, kv.stride(), k_rope.stride(0), kv.dtype)
        launch_on(kv, k_rope, cos.contiguous(), sin.contiguous(), keys)
    return keys


@by_shapes
def _keys_launch(
    t: int, heads: int, nope: int, half: int, strides: tuple[int, ...], stride_rope: int, dtype: torch.dtype
) -> Prepared:
    return Prepared(
        make_keys_kernel, (t,), heads, nope, half, *strides[:2], stride_rope, DTYPE=TL_DTYPE[dtype],
        BLOCK_H=min(KEY_HEADS, next_power_of_2(heads)), NOPE=_block(nope), HALF=_block(half), num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip


def rope_keys_backward(dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    t, heads, width = dk.shape
    half, v = cos.shape[1], dv.shape[2]
    nope = width - 2 * half
    d_kv, d_rope = empty_keys_gradient(dk, dv, cos, sin)
    if dk.numel():
        dk, dv = last_dim_contiguous(dk), last_dim_contiguous(dv)
        launch_on = _keys_backward_launch(t, heads, nope, half, v, dk.stride(), dv.stride(), dk.dtype)
        launch_on(dk, dv, cos.contiguous(), sin.contiguous(), d_kv, d_rope)
    return d_kv, d_rope


@by_shapes
def _keys_backward_launch(
    t: int, heads: int, nope: int, half: int, v: int, dk_strides: tuple[int, ...], dv_strides: tuple[int, ...],
    dtype: torch.dtype,
) -> Prepared:  # fmt: skip
    return Prepared(
        keys_backward_kernel, (t,), heads, nope, half, v, *dk_strides[:2], *dv_strides[:2],
        DTYPE=TL_DTYPE[dtype], BLOCK_H=min(KEY_HEADS, next_power_of_2(heads)), NOPE=_block(nope), V=_block(v),
        HALF=_block(half), num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _block(width: int) -> int:
    return next_power_of_2(max(width, 1))

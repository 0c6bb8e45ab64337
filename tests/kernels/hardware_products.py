"""Checks of products and permutations on any device: what `test_triton_hardware` runs at production sizes."""

import torch

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.gemm import gemm
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.kernels.permute import RowMap, permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows
from fp8moe.kernels.quantize import requantize_columns as requantize
from fp8moe.kernels.reference import permute as permutation
from fp8moe.kernels.reference import quantize as twin
from tests.distance import calc_diff
from tests.kernels.device_cases import assert_same, data, offsets_of, product_bound
from tests.kernels.row_maps import PARTS, random_ids

CHECKED_ROWS = 512  # of a production shape, compared with FP64; every column of them


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, RowMap):
        return [getattr(result, part) for part in PARTS]
    if isinstance(result, tuple):
        return [t for part in result for t in tensors(part)]
    return [] if result is None else [result.data, result.scale]


def check_dense(device, m, n, k):
    x, w = data("normal", m, k, device=device), data("normal", n, k, device=device)
    a, (b, _) = quantize_rows(x), quantize_blocks(w)
    assert_same(a, twin.quantize_rows(x))
    assert_same(b, twin.quantize_blocks(w)[0])
    chosen = torch.randperm(m)[:CHECKED_ROWS].to(device)
    a64, b64 = a.dequantize()[chosen].double(), b.dequantize().double()
    exact = a64 @ b64.T
    for dtype in (torch.bfloat16, torch.float32):
        out = gemm(a, b, out_dtype=dtype)[chosen]
        assert calc_diff(out, exact, a64, b64) <= product_bound(dtype, "normal", device)


def check_wgrad(device, tokens, n, k):
    dy, x = data("normal", tokens, n, device=device), data("normal", tokens, k, device=device)
    a, b = quantize_columns(dy, amax_floor=1e-30, power_of_two=True), quantize_columns(x)
    total = torch.ones(n, k, device=device)
    gemm(a, b, accumulate=total)
    chosen = torch.randperm(n)[:CHECKED_ROWS].to(device)
    a64, b64 = a.dequantize()[chosen].double(), b.dequantize().double()
    assert calc_diff(total[chosen].double() - 1, a64 @ b64.T, a64, b64) <= product_bound(
        torch.float32, "normal", device
    )


def check_grouped(device, sizes, n, k):
    rows, experts = sum(sizes), len(sizes)
    x = data("normal", rows, k, device=device)
    w, dy = data("normal", experts, n, k, device=device), data("normal", rows, n, device=device)
    offsets = offsets_of(sizes, device)
    a, (b, _) = quantize_rows(x, power_of_two=True), quantize_blocks(w)
    dy_columns, x_columns = quantize_columns(dy, amax_floor=1e-30), requantize(a)
    out = grouped_gemm(a, b, offsets)
    total = torch.zeros(experts, n, k, device=device)
    grouped_wgrad(dy_columns, x_columns, offsets, total)
    for e in range(experts):
        first, last = int(offsets[e]), int(offsets[e + 1])
        chosen = slice(first, min(first + CHECKED_ROWS, last))
        a64 = Fp8Tensor(a.data[chosen], a.scale[chosen]).dequantize().double()
        b64 = Fp8Tensor(b.data[e], b.scale[e], b.tile).dequantize().double()
        assert calc_diff(out[chosen], a64 @ b64.T, a64, b64) <= 5e-6
        left = dy_columns.dequantize()[:CHECKED_ROWS, first:last].double()
        right = x_columns.dequantize()[:, first:last].double()
        bound = product_bound(torch.float32, "normal", device)
        assert calc_diff(total[e, :CHECKED_ROWS], left @ right.T, left, right) <= bound


def check_grouped_mm(device, sizes, n, k, spare):
    """Every group's products of all three kinds, whose rows start anywhere; NaN behind the last."""
    rows, experts, offsets = sum(sizes), len(sizes), offsets_of(sizes, device)
    x, dy = (data("normal", rows + spare, size, device=device) for size in (k, n))
    x[rows:], dy[rows:] = float("nan"), float("nan")
    w, total = data("normal", experts, n, k, device=device), torch.zeros(experts, n, k, device=device)
    grouped_mm_wgrad(dy, x, offsets, total)
    for a, b in ((x, w), (dy, w.mT)):
        out = grouped_mm(a, b, offsets)
        assert not bool(out[rows:].any())
        for e in range(experts):
            chosen = slice(int(offsets[e]), min(int(offsets[e]) + CHECKED_ROWS, int(offsets[e + 1])))
            if chosen.start < chosen.stop:
                a64, b64 = a[chosen].double(), b[e].double()
                assert calc_diff(out[chosen], a64 @ b64.T, a64, b64) <= 5e-6
    for e in range(experts):
        first, last = int(offsets[e]), int(offsets[e + 1])
        left, right = dy[first:last, :CHECKED_ROWS].double().T, x[first:last].double().T
        if first == last:
            assert not bool(total[e].any())
        else:
            assert calc_diff(total[e, :CHECKED_ROWS], left @ right.T, left, right) <= 1e-9


def check_permute(device, n, k, topk, num_experts, spare):
    """Every op of the permutation, bit for bit the specification on the same device, with room to spare."""
    ids = random_ids(n, topk, num_experts, 0.5).to(device)
    room = len(plan_rows(ids, num_experts).slot_R) + spare
    row_map, expected = (plan(ids, num_experts, room=room) for plan in (plan_rows, permutation.plan_rows))
    for ours, theirs in zip(tensors(row_map), tensors(expected), strict=True):
        assert torch.equal(ours, theirs)
    x = data("normal", n, k, device=device)
    rows = quantize_rows(x, power_of_two=True)
    assert_same(permute(rows, row_map), permutation.permute(rows, row_map))
    assert_same(permute_quantize(x, row_map, power_of_two=True), permutation.permute(rows, row_map))
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(permute(x.to(dtype), row_map), permutation.permute(x.to(dtype), row_map))
        y = data("normal", room, k, device=device, dtype=dtype)
        assert torch.equal(unpermute(y, row_map), permutation.unpermute(y, row_map))

"""What only a GPU can show of the Triton ops: repetition, production shapes, and no access outside a tensor.

Order of memory operations is the one thing the interpreter does not have: a load that races in a software pipeline
gives one wrong result in many. So every op is repeated, bit for bit, at sizes that keep all SMs and all stages busy.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.gemm import gemm, wgrad
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.kernels.permute import RowMap, permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows, quantize_rows_and_columns
from fp8moe.kernels.quantize import requantize_columns as requantize
from fp8moe.kernels.reference import permute as permutation
from fp8moe.kernels.reference import quantize as twin
from tests.distance import calc_diff
from tests.kernels.device_cases import assert_same, data, offsets_of, product_bound
from tests.kernels.row_maps import PARTS, random_ids

ROOT = Path(__file__).resolve().parent.parent.parent
REPEATS = 20
# M, N, K that DeepGEMM publishes figures for.
DENSE = [
    (4096, 7168, 16384),
    (4096, 4096, 7168),
    (4096, 24576, 1536),
    (4096, 7168, 2048),
    (4096, 32768, 512),
    (4096, 2112, 7168),
]
CHECKED_ROWS = 512  # of a production shape, compared with FP64; every column of them


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, RowMap):
        return [getattr(result, part) for part in PARTS]
    return [t for part in (result if isinstance(result, tuple) else (result,)) for t in (part.data, part.scale)]


def assert_repeatable(run, repeats=REPEATS):
    first = [t.clone() for t in tensors(run())]
    for _ in range(repeats - 1):
        for once, again in zip(first, tensors(run()), strict=True):
            assert torch.equal(once.reshape(-1).view(torch.uint8), again.reshape(-1).view(torch.uint8))


def from_zero(run, *shape, device):
    total = torch.zeros(*shape, device=device)
    run(total)
    return total


def repeat_everything(device, m, n, k, repeats):
    x, w = data("normal", m, k, device=device), data("normal", n, k, device=device)
    dy = data("normal", m, n, device=device)
    rows, columns = quantize_rows_and_columns(x)
    dy_columns, (b, _) = quantize_columns(dy), quantize_blocks(w)
    packed = pack_e5m6(x)
    offsets = offsets_of([m // 2 // 128 * 128, 0, m // 4 // 128 * 128], device)
    anywhere = offsets_of([m // 3, 0, m // 2], device)
    experts, _ = quantize_blocks(w.unflatten(0, (1, n)).repeat(3, 1, 1))
    ids = random_ids(m, 4, 16, 0.3).to(device)
    row_map = plan_rows(ids, 16, align=16)
    copies = permute(x, row_map)
    for run in (
        lambda: plan_rows(ids, 16),
        lambda: permute(x, row_map),
        lambda: permute(rows, row_map),
        lambda: permute_quantize(x, row_map),
        lambda: unpermute(copies, row_map),
        lambda: quantize_rows(x),
        lambda: quantize_rows_and_columns(x),
        lambda: quantize_blocks(w),
        lambda: requantize(rows),
        lambda: pack_e5m6(x),
        lambda: unpack_e5m6(packed),
        lambda: e5m6_to_columns(packed),
        lambda: gemm(rows, b),
        lambda: gemm(dy_columns, columns, out_dtype=torch.float32),
        lambda: from_zero(lambda total: wgrad(dy, x, total), n, k, device=device),
        lambda: grouped_gemm(rows, experts, offsets),
        lambda: from_zero(lambda total: grouped_wgrad(dy_columns, columns, offsets, total), 3, n, k, device=device),
        lambda: grouped_mm(x, w.expand(3, n, k).contiguous(), anywhere),
        lambda: from_zero(lambda total: grouped_mm_wgrad(dy, x, anywhere, total), 3, n, k, device=device),
    ):
        assert_repeatable(run, repeats)


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


@pytest.mark.gpu
@pytest.mark.parametrize("k", [7168, 2112, 576])
def test_permutations_of_production(triton_device, k):
    check_permute(triton_device, 4096, k, 8, 64, 1000)


@pytest.mark.gpu
def test_rows_go_to_experts_and_back_without_a_wait(triton_device):
    ids = random_ids(1000, 8, 64, 0.5).to(triton_device)
    x = data("normal", 1000, 576, device=triton_device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        row_map = plan_rows(ids, 64, room=16384)
        permute(quantize_rows(x), row_map)
        permute_quantize(x, row_map)
        unpermute(permute(x, row_map), row_map)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 2112, 7168), (1000 // 16 * 16, 576, 1536)])
def test_every_op_repeats_itself(triton_device, shape):
    repeat_everything(triton_device, *shape, REPEATS)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", DENSE)
def test_dense_shapes_of_production(triton_device, shape):
    check_dense(triton_device, *shape)


@pytest.mark.gpu
def test_wgrad_of_production(triton_device):
    check_wgrad(triton_device, 16384, 7168, 4096)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(4096, 7168), (7168, 2048)])
def test_grouped_shapes_of_production(triton_device, n, k):
    check_grouped(triton_device, [8192] * 4, n, k)
    check_grouped(triton_device, [128, 0, 8192, 3968, 0, 256], n, k)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(4096, 7168), (7168, 2048)])
def test_grouped_bf16_shapes_of_production(triton_device, n, k):
    check_grouped_mm(triton_device, [1024] * 8, n, k, 0)
    check_grouped_mm(triton_device, [100, 0, 4001, 64, 1, 0, 700], n, k, 517)


@pytest.mark.gpu
def test_grouped_bf16_products_wait_for_nothing(triton_device):
    x, w = data("normal", 1000, 512, device=triton_device), data("normal", 3, 256, 512, device=triton_device)
    dy, offsets = data("normal", 1000, 256, device=triton_device), offsets_of([100, 0, 800], triton_device)
    totals = torch.zeros(3, 256, 512, device=triton_device)
    for _ in range(2):  # the first call compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            grouped_mm(x, w, offsets)
            grouped_mm(dy, w.mT, offsets)
            grouped_mm_wgrad(dy, x, offsets, totals)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_access_outside_a_tensor(triton_device):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    ops = "quantize gemm grouped_gemm grouped_wgrad grouped_mm e5m6 permute"
    files = [f"tests/kernels/test_triton_{name}.py" for name in ops.split()]
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    chosen = "normal or anyhow or nothing or slot_order or on_the_way"
    command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", chosen, *files]
    # The caching allocator would hand out parts of larger blocks, inside which every access is legal.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]


def test_these_checks_run(triton_device):
    """The checks above at small sizes, on whatever device there is, so that a GPU finds them sound."""
    repeat_everything(triton_device, 272, 48, 144, 2)
    check_dense(triton_device, 48, 144, 272)
    check_wgrad(triton_device, 272, 48, 144)
    check_grouped(triton_device, [128, 0, 256], 48, 144)
    check_grouped_mm(triton_device, [3, 0, 70], 48, 144, 5)
    check_permute(triton_device, 24, 144, 3, 5, 40)

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
from fp8moe.kernels.norm import rms_norm, rms_norm_backward, rms_norm_columns
from fp8moe.kernels.permute import RowMap, permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows, quantize_rows_and_columns
from fp8moe.kernels.quantize import requantize_columns as requantize
from fp8moe.kernels.reference import permute as permutation
from fp8moe.kernels.reference import quantize as twin
from fp8moe.kernels.rope import rope_keys, rope_keys_backward, rope_queries, rope_queries_backward
from tests.distance import calc_diff
from tests.kernels.device_cases import assert_same, data, offsets_of, product_bound
from tests.kernels.row_maps import PARTS, random_ids
from tests.kernels.test_triton_norm import check_backward, check_forward
from tests.kernels.test_triton_rope import check as check_rope

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
    if isinstance(result, tuple):
        return [t for part in result for t in tensors(part)]
    return [result.data, result.scale]


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
    experts, _ = quantize_blocks(w.unflatten(0, (1, n)).repeat(3, 1, 1))
    ids = random_ids(m, 4, 16, 0.3).to(device)
    row_map = plan_rows(ids, 16, align=16)
    copies = permute(x, row_map)
    gain, inverse = torch.randn(k, device=device).bfloat16(), torch.rand(m, device=device)
    few = x[: m // 8]
    heads, angles = few.view(-1, 1, k).expand(-1, 3, -1), torch.rand(m // 8, 8, device=device)
    for run in (
        lambda: plan_rows(ids, 16),
        lambda: permute(x, row_map),
        lambda: permute(rows, row_map),
        lambda: permute_quantize(x, row_map),
        lambda: unpermute(copies, row_map),
        lambda: rms_norm(x, gain, x, eps=1e-6, rows=True),
        lambda: rms_norm_columns(x, gain, inverse),
        lambda: from_zero(lambda total: rms_norm_backward(x, x, gain, inverse, total, x), k, device=device),
        lambda: rope_queries(heads, angles, angles),
        lambda: rope_queries_backward(heads, angles, angles),
        lambda: rope_keys(heads, few[:, :16], angles, angles, nope_dim=k - 16),
        lambda: rope_keys_backward(heads, heads, angles, angles),
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


def check_norm(device, t, d, dtype=torch.bfloat16):
    """Of a latent, or with a residual, at a production width."""
    latent = data("normal", t, d + 64, device=device, dtype=dtype)[:, 32 : 32 + d]
    weight, delta = torch.randn(d, device=device).to(dtype), data("outliers", t, d, device=device, dtype=dtype)
    for added, asked in ((None, {"tensor": False}), (delta, {"power_of_two": True})):
        source, inverse = check_forward(latent, weight, added, rows=True, **asked)
        check_backward(source, weight, inverse, delta, added)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [7168, 1536, 512, 16384, 2048, 2112])
def test_norms_of_production(triton_device, d):
    check_norm(triton_device, 4096, d)
    check_norm(triton_device, 1008, d, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [128, 16])
def test_heads_of_production(triton_device, heads):
    check_rope(triton_device, 4096, heads, 128, 64, 128, torch.bfloat16)
    check_rope(triton_device, 1001, heads, 128, 64, 128, torch.float32)


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
def test_no_access_outside_a_tensor(triton_device):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    ops = "quantize gemm grouped_gemm grouped_wgrad e5m6 permute norm rope"
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
    check_permute(triton_device, 24, 144, 3, 5, 40)
    check_norm(triton_device, 16, 144)
    check_rope(triton_device, 2, 3, 16, 16, 16, torch.bfloat16)

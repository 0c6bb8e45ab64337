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

from fp8moe.kernels.adamw import adamw_step, adamw_step_quantize
from fp8moe.kernels.cross_entropy import cross_entropy_with_gradient
from fp8moe.kernels.embedding import embedding_wgrad
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.kernels.permute import permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_blocks, quantize_rows
from fp8moe.kernels.segments import Segments
from fp8moe.kernels.silu_mul import silu_mul, silu_mul_backward
from fp8moe.kernels.squared_norm import squared_norm
from fp8moe.kernels.swiglu import swiglu, swiglu_backward, swiglu_columns
from tests.kernels.device_cases import data, offsets_of
from tests.kernels.hardware_fused import (
    check_embedding,
    check_losses,
    check_norm,
    check_route,
    check_squared_norm,
    check_swiglu,
    check_update,
)
from tests.kernels.hardware_products import (
    check_dense,
    check_grouped,
    check_grouped_mm,
    check_permute,
    check_wgrad,
)
from tests.kernels.hardware_repeats import REPEATS, repeat_everything
from tests.kernels.loss_rows import logits_and_labels
from tests.kernels.row_maps import random_ids
from tests.kernels.test_triton_rope import check as check_rope
from tests.kernels.updates import SETTINGS, state

ROOT = Path(__file__).resolve().parent.parent.parent
# M, N, K that DeepGEMM publishes figures for.
DENSE = [
    (4096, 7168, 16384),
    (4096, 4096, 7168),
    (4096, 24576, 1536),
    (4096, 7168, 2048),
    (4096, 32768, 512),
    (4096, 2112, 7168),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 4096, 7168), (2, 7168, 2048), (576, 7168)])
def test_updates_of_production(triton_device, shape):
    check_update(triton_device, shape, REPEATS)


@pytest.mark.gpu
def test_an_update_waits_for_nothing(triton_device):
    shape = (2, 256, 512)
    tensors, flat = (state(*size, device=triton_device) for size in (shape, (70000,)))
    segments = Segments.of([(0, 13, False), (13, 70000, True)], triton_device)
    blocks = quantize_blocks(torch.zeros(shape, device=triton_device))
    weight = torch.empty(shape, dtype=torch.bfloat16, device=triton_device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale = squared_norm(flat[1]).rsqrt().float()
        adamw_step(*flat, segments, **SETTINGS, grad_scale=scale)
        adamw_step_quantize(*tensors, weight, *blocks, **SETTINGS, grad_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [129_280, 1 << 18, 32_001])
def test_losses_of_production(triton_device, size, dtype):
    check_losses(triton_device, 200, size, dtype)


@pytest.mark.gpu
def test_embedding_of_production(triton_device):
    check_embedding(triton_device, 4096, 7168, 4096)


@pytest.mark.gpu
def test_losses_and_embedding_never_wait(triton_device):
    logits, labels = logits_and_labels(64, 1000, device=triton_device)
    losses, total = torch.empty(64, device=triton_device), torch.zeros(1000, 1000, device=triton_device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weight = torch.full((), 1e-8, device=triton_device)
        cross_entropy_with_gradient(logits, labels, weight, losses)
        embedding_wgrad(logits, labels.clamp(min=0), total)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_norm_takes_no_memory(triton_device):
    flat = torch.empty(1 << 30, device=triton_device).fill_(2.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert float(squared_norm(flat)) == 4.0 * (1 << 30)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    check_squared_norm(triton_device, (1 << 28) + 12345, REPEATS)


@pytest.mark.gpu
@pytest.mark.parametrize(("r", "f", "weighted"), [(4096, 2048, True), (992, 1408, True), (528, 10944, False)])
def test_swiglu_of_production(triton_device, r, f, weighted):
    check_swiglu(triton_device, r, f, weighted)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(256, 8, 8, 4), (160, 6, 8, 3), (512, 16, 16, 4), (64, 6, 1, 1), (72, 3, 9, 2)])
def test_routing_of_production(triton_device, sizes):
    check_route(triton_device, 4096, *sizes, 2)
    check_route(triton_device, 3 * 1001, *sizes, 3)


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
        weights = x[:992, 0].float()
        _, cached = swiglu(x[:992], weights)
        swiglu_columns(cached, weights)
        swiglu_backward(x[:992, :288], cached, weights)
        silu_mul_backward(silu_mul(x, None), x, None)
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
    ops = "quantize e5m6 gemm grouped_gemm grouped_wgrad grouped_mm norm rope swiglu permute route"
    ops += " cross_entropy embedding adamw squared_norm"
    files = [f"tests/kernels/test_triton_{name}.py" for name in ops.split()]
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    chosen = "normal or anyhow or nothing or slot_order or on_the_way or any_range or written_beside or anywhere"
    chosen += " or every_size"
    command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", chosen, *files]
    # The caching allocator would hand out parts of larger blocks, inside which every access is legal.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]


def test_these_checks_run(triton_device):
    """The checks above at small sizes, on whatever device there is, so that a GPU finds them sound."""
    repeat_everything(triton_device, 144, 48, 144, 2)
    check_dense(triton_device, 48, 144, 272)
    check_wgrad(triton_device, 272, 48, 144)
    check_grouped(triton_device, [128, 0, 256], 48, 144)
    check_grouped_mm(triton_device, [3, 0, 70], 48, 144, 5)
    check_permute(triton_device, 24, 144, 3, 5, 40)
    check_update(triton_device, (2, 48, 144), 2)
    check_squared_norm(triton_device, 9000, 2)
    check_losses(triton_device, 6, 300, torch.bfloat16)
    check_embedding(triton_device, 40, 144, 9)
    check_swiglu(triton_device, 32, 144, True)
    check_route(triton_device, 12, 24, 3, 4, 2, 2)
    check_norm(triton_device, 16, 144)
    check_rope(triton_device, 2, 3, 16, 16, 16, torch.bfloat16)

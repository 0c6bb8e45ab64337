"""Every op again and again on equal input, on any device: what `test_triton_hardware` runs at production sizes."""

import torch

from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.embedding import embedding_wgrad
from fp8moe.kernels.gemm import gemm, wgrad
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.kernels.norm import rms_norm, rms_norm_backward, rms_norm_columns
from fp8moe.kernels.permute import permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows, quantize_rows_and_columns
from fp8moe.kernels.quantize import requantize_columns as requantize
from fp8moe.kernels.rope import rope_keys, rope_keys_backward, rope_queries, rope_queries_backward
from fp8moe.kernels.route import route, route_backward
from fp8moe.kernels.silu_mul import silu_mul, silu_mul_backward
from fp8moe.kernels.swiglu import swiglu, swiglu_backward, swiglu_columns
from tests.kernels.device_cases import data, offsets_of
from tests.kernels.hardware_fused import (
    losses_and_gradients,
)
from tests.kernels.hardware_products import (
    tensors,
)
from tests.kernels.row_maps import random_ids
from tests.kernels.test_route import options, scoring

REPEATS = 20


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
    offsets = offsets_of([max(m // 2 // 128, 1) * 128, 0, m // 4 // 128 * 128], device)
    anywhere = offsets_of([m // 3, 0, m // 2], device)
    experts, _ = quantize_blocks(w.unflatten(0, (1, n)).repeat(3, 1, 1))
    ids = random_ids(m, 4, 16, 0.3).to(device)
    row_map = plan_rows(ids, 16, align=16)
    copies = permute(x, row_map)
    quarter = m // 4
    tokens, weight = torch.randint(n, (quarter,), device=device), torch.tensor(1e-8, device=device)
    gate_up, half, factor = x[:, : k // 32 * 32], x[:, : k // 32 * 16], torch.rand(m, device=device)
    cached = quantize_rows(gate_up)
    gain, inverse = torch.randn(k, device=device).bfloat16(), torch.rand(m, device=device)
    few = x[: m // 8]
    heads, angles = few.view(-1, 1, k).expand(-1, 3, -1), torch.rand(m // 8, 8, device=device)
    logits, given = dy[:, : n // 16 * 16].float(), options(topk=6, num_groups=4, top_groups=2, num_sequences=2)
    bias = torch.zeros(logits.shape[1], device=device)
    chosen, weights, loss, f = route(logits, bias, None, **given)
    for run in (
        lambda: losses_and_gradients(dy[:quarter], tokens, weight),
        lambda: from_zero(lambda total: embedding_wgrad(x[:quarter], tokens % 7, total), n, k, device=device),
        lambda: route(logits, bias, torch.zeros_like(bias, dtype=torch.int64), **given),
        lambda: route_backward(logits, chosen, f, weights, loss, **scoring(given)),
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
        lambda: swiglu(gate_up, factor),
        lambda: swiglu_columns(cached, factor),
        lambda: swiglu_backward(half, cached, factor),
        lambda: silu_mul(gate_up, factor),
        lambda: silu_mul_backward(half, gate_up, factor),
        lambda: gemm(rows, b),
        lambda: gemm(dy_columns, columns, out_dtype=torch.float32),
        lambda: from_zero(lambda total: wgrad(dy, x, total), n, k, device=device),
        lambda: grouped_gemm(rows, experts, offsets),
        lambda: from_zero(lambda total: grouped_wgrad(dy_columns, columns, offsets, total), 3, n, k, device=device),
        lambda: grouped_mm(x, w.expand(3, n, k).contiguous(), anywhere),
        lambda: from_zero(lambda total: grouped_mm_wgrad(dy, x, anywhere, total), 3, n, k, device=device),
    ):
        assert_repeatable(run, repeats)

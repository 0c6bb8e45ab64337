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
from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.embedding import embedding_wgrad
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.gemm import gemm, wgrad
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.kernels.norm import rms_norm, rms_norm_backward, rms_norm_columns
from fp8moe.kernels.permute import RowMap, permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows, quantize_rows_and_columns
from fp8moe.kernels.quantize import requantize_columns as requantize
from fp8moe.kernels.reference import embedding as embedding_twin
from fp8moe.kernels.reference import permute as permutation
from fp8moe.kernels.reference import quantize as twin
from fp8moe.kernels.reference import route as routing
from fp8moe.kernels.rope import rope_keys, rope_keys_backward, rope_queries, rope_queries_backward
from fp8moe.kernels.route import SCORES, route, route_backward
from fp8moe.kernels.segments import Segments
from fp8moe.kernels.silu_mul import silu_mul, silu_mul_backward
from fp8moe.kernels.squared_norm import squared_norm
from fp8moe.kernels.swiglu import swiglu, swiglu_backward, swiglu_columns
from tests.distance import calc_diff
from tests.kernels.activation_bounds import activate, assert_cast, differentiate
from tests.kernels.device_cases import assert_same, data, offsets_of, product_bound
from tests.kernels.loss_rows import STORAGE, assert_within_bounds, logits_and_labels
from tests.kernels.row_maps import PARTS, random_ids
from tests.kernels.test_route import options, scoring
from tests.kernels.test_triton_norm import check_backward, check_forward
from tests.kernels.test_triton_rope import check as check_rope
from tests.kernels.updates import SETTINGS, state

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
    return [] if result is None else [result.data, result.scale]


def assert_repeatable(run, repeats=REPEATS):
    first = [t.clone() for t in tensors(run())]
    for _ in range(repeats - 1):
        for once, again in zip(first, tensors(run()), strict=True):
            assert torch.equal(once.reshape(-1).view(torch.uint8), again.reshape(-1).view(torch.uint8))


def from_zero(run, *shape, device):
    total = torch.zeros(*shape, device=device)
    run(total)
    return total


def losses_and_gradients(logits, labels, weight):
    """Both, for logits that are left as they are."""
    losses, gradients = torch.empty(len(labels), device=logits.device), logits.clone()
    cross_entropy_with_gradient(gradients, labels, weight, losses)
    return torch.cat([losses[:, None], gradients], 1)


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


def check_update(device, shape, repeats):
    """Weights with blocks: the one pass is the flat update and the cast of what it wrote, and repeats itself."""
    tensors = state(*shape, device=device)
    blocks = quantize_blocks(torch.zeros(shape, device=device, dtype=torch.bfloat16))
    n = tensors[0].numel()
    flat, segments = [tensor.flatten() for tensor in tensors], Segments.of([(0, n, True)], device)
    scale = squared_norm(tensors[1].flatten()).rsqrt().float()
    rounded = torch.empty(n, dtype=torch.bfloat16, device=device)
    adamw_step(*(tensor.clone() for tensor in flat), segments, rounded, **SETTINGS, grad_scale=scale)
    for _ in range(repeats):
        mine, weight = [tensor.clone() for tensor in tensors], torch.empty(shape, dtype=torch.bfloat16, device=device)
        adamw_step_quantize(*mine, weight, *blocks, **SETTINGS, grad_scale=scale)
        assert torch.equal(weight.flatten(), rounded)
        for got, wanted in zip(blocks, twin.quantize_blocks(weight), strict=True):
            assert_same(got, wanted)
    again = [tensor.clone() for tensor in flat]
    adamw_step(*again, segments, **SETTINGS, grad_scale=scale)
    for got, wanted in zip(mine, again, strict=True):
        assert torch.equal(got.flatten(), wanted)


def check_squared_norm(device, n, repeats):
    flat = torch.randn(n, device=device)
    first = squared_norm(flat)
    exact = sum(chunk.double().square().sum() for chunk in flat.split(1 << 24))
    assert float(first) == pytest.approx(float(exact), rel=1e-12)
    for _ in range(repeats - 1):
        assert torch.equal(first, squared_norm(flat))


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


def check_losses(device, rows, size, dtype):
    """Losses and gradients within their bounds; some rows of them at a time, since FP64 takes memory."""
    logits, labels = logits_and_labels(rows, size, device=device, dtype=dtype)
    both = losses_and_gradients(logits, labels, torch.tensor(1e-8, device=device))
    for part in torch.arange(rows, device=device).split(32):
        losses, gradients = both[part, 0], both[part, 1:]
        assert_within_bounds(losses, gradients, logits[part], labels[part], 1e-8, storage=STORAGE[dtype])


def check_embedding(device, tokens, dim, vocab_size):
    """Bit for bit the specification on a CPU, with one id in every second token and rows that nobody asks for."""
    dy, ids = data("normal", tokens, dim, device=device), torch.randint(vocab_size, (tokens,), device=device)
    ids[::2] = vocab_size // 2
    total = torch.randn(vocab_size, dim, device=device)
    expected = total.cpu()
    embedding_twin.embedding_wgrad(dy.cpu(), ids.cpu(), expected)
    embedding_wgrad(dy, ids, total)
    assert torch.equal(total.cpu(), expected)


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


def check_swiglu(device, r, f, weighted):
    """SwiGLU and its gradients, with casts and without, each within its bound of FP64."""
    gate_up, dy = data("normal", r, 2 * f, device=device), data("normal", r, f, device=device) * 2.0**-20
    weights = torch.rand(r, device=device) if weighted else None
    hidden, cached = swiglu(gate_up, weights)
    assert_same(cached, twin.quantize_rows(gate_up))
    values = cached.dequantize()
    for q, bound, floor, power_of_two in (
        (hidden, activate(gate_up, weights), ACTIVATION_AMAX_FLOOR, False),
        (swiglu_columns(cached, weights), activate(values, weights).t(), ACTIVATION_AMAX_FLOOR, True),
    ):
        assert_cast(q, bound, floor, power_of_two)
    rows, columns, d_weights = swiglu_backward(dy, cached, weights)
    grads, whole = differentiate(values, dy, weights)
    assert_cast(rows, grads, GRADIENT_AMAX_FLOOR, False)
    assert_cast(columns, grads.t(), GRADIENT_AMAX_FLOOR, False)
    activate(gate_up, weights).assert_contains(silu_mul(gate_up, weights))
    d_gate_up, unquantized = silu_mul_backward(dy, gate_up, weights)
    grads, unquantized_whole = differentiate(gate_up, dy, weights)
    grads.assert_contains(d_gate_up)
    if weighted:
        whole.assert_contains(d_weights)
        unquantized_whole.assert_contains(unquantized)


@pytest.mark.gpu
@pytest.mark.parametrize(("r", "f", "weighted"), [(4096, 2048, True), (992, 1408, True), (528, 10944, False)])
def test_swiglu_of_production(triton_device, r, f, weighted):
    check_swiglu(triton_device, r, f, weighted)


def check_route(device, tokens, num_experts, topk, num_groups, top_groups, sequences):
    """Every score beside the reference on the same device: ids and loads to the bit, the rest in its last places.

    Logits lie on a grid, so that scores are equal or far apart and ties decide; in groups, where sums of two might be
    near each other, the choice is made by the logits themselves.
    """
    logits = torch.randn(tokens, num_experts, device=device).mul_(64).round_().div_(64)
    bias, d_loss = torch.zeros(num_experts, device=device), torch.tensor(0.1, device=device)
    for score in SCORES:
        groups = {"num_groups": num_groups, "top_groups": top_groups} if score == "softmax_topk" else {}
        given = options(topk=topk, score=score, num_sequences=sequences, route_scale=2.5, **groups)
        ours, theirs = (torch.ones(num_experts, dtype=torch.int64, device=device) for _ in range(2))
        got, expected = route(logits, bias, ours, **given), routing.route(logits, bias, theirs, **given)
        assert torch.equal(got[0], expected[0]) and torch.equal(ours, theirs)
        for one, other in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=5e-6, atol=1e-7)
        d_weights = torch.randn(tokens, topk, device=device)
        back = logits, got[0], got[3], d_weights, d_loss
        wanted = routing.route_backward(*back, **scoring(given))
        torch.testing.assert_close(route_backward(*back, **scoring(given)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(256, 8, 8, 4), (160, 6, 8, 3), (512, 16, 16, 4), (64, 6, 1, 1), (72, 3, 9, 2)])
def test_routing_of_production(triton_device, sizes):
    check_route(triton_device, 4096, *sizes, 2)
    check_route(triton_device, 3 * 1001, *sizes, 3)


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
    repeat_everything(triton_device, 272, 48, 144, 2)
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

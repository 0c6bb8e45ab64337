"""AdamW against torch's, in FP32 and with BF16 moments: on flat buffers, and with FP8 blocks written beside."""

import itertools
import math

import pytest
import torch

from fp8moe.kernels.adamw import adamw_step, adamw_step_quantize
from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.kernels.segments import PART, Segments
from tests.kernels.device_cases import assert_same
from tests.kernels.updates import assert_near, state, update_exactly

CONSTANTS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def whole(n, decays=True):
    return Segments.of([(0, n, decays)], "cpu")


@pytest.mark.parametrize("n", [70000, 105, 0])
def test_equals_torch_in_fp32(n):
    master = torch.randn(n)
    oracle = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([oracle], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    exp_avg, exp_avg_sq = torch.zeros(n), torch.zeros(n)
    for step in range(1, 6):
        grad = torch.randn(n) * 10.0**-step
        kept = grad.clone()
        adamw_step(master, grad, exp_avg, exp_avg_sq, whole(n), step=step, **CONSTANTS)
        assert torch.equal(grad, kept)
        oracle.grad = grad
        optimizer.step()
        torch.testing.assert_close(master, oracle.data, rtol=1e-6, atol=1e-7)
    if n:
        torch.testing.assert_close(exp_avg, optimizer.state[oracle]["exp_avg"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(exp_avg_sq, optimizer.state[oracle]["exp_avg_sq"], rtol=1e-6, atol=1e-12)


def test_bf16_moments_are_rounded_after_the_update_used_them():
    master, grad = torch.zeros(1000), torch.randn(1000)
    exp_avg, exp_avg_sq = torch.randn(1000).bfloat16(), torch.rand(1000).bfloat16()
    m = 0.9 * exp_avg.double() + 0.1 * grad.double()
    v = 0.95 * exp_avg_sq.double() + 0.05 * grad.double() ** 2
    step = 7
    update = m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    adamw_step(master, grad, exp_avg, exp_avg_sq, whole(1000), step=step, **CONSTANTS)
    torch.testing.assert_close(master, (-3e-3 * update).float(), rtol=1e-5, atol=1e-9)
    assert exp_avg.dtype is exp_avg_sq.dtype is torch.bfloat16
    torch.testing.assert_close(exp_avg.double(), m, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(exp_avg_sq.double(), v, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.3, 0.0])
def test_an_update_is_that_of_ieee_arithmetic_but_for_a_rounding(beta1):
    settings = {**CONSTANTS, "beta1": beta1, "step": 3}
    tensors = state(5000, moments=torch.float32)
    before = [tensors[i].clone() for i in (0, 2, 3)]
    expected = update_exactly(*tensors, **settings)
    adamw_step(*tensors, whole(5000), **settings)
    assert_near([tensors[i] for i in (0, 2, 3)], expected, before, tensors[1])


def test_segments_decide_what_is_updated_and_what_decays_at_any_range_of_a_buffer():
    n = 3 * PART
    spans = [(5, 700, True), (700, 703, False), (703, PART + 9, True), (2 * PART - 1, n - 3, False)]
    expected = [tensor.clone() for tensor in state(n)]
    weight = torch.full((n,), 7.0).bfloat16()
    for start, stop, decays in spans:
        part = [tensor[start:stop] for tensor in expected]
        adamw_step(*part, whole(stop - start, decays), weight[start:stop], step=2, **CONSTANTS)
    segments = Segments.of(spans, "cpu")
    for cuts in ((0, n), (0, 701, 2 * PART + 11, n)):
        tensors, mine = [tensor.clone() for tensor in state(n)], torch.full((n,), 7.0).bfloat16()
        for a, b in itertools.pairwise(cuts):
            shard = [tensor[a:b] for tensor in tensors]
            adamw_step(*shard, segments.within(a, b), mine[a:b], step=2, **CONSTANTS)
        for one, other in zip((*tensors, mine), (*expected, weight), strict=True):
            assert torch.equal(one, other)
    inside = torch.zeros(n, dtype=torch.bool)
    for start, stop, _ in spans:
        inside[start:stop] = True
    assert torch.equal(mine[inside], tensors[0][inside].bfloat16()) and bool((mine[~inside] == 7).all())
    assert torch.equal(tensors[0][~inside], state(n)[0][~inside])


def test_parts_are_within_one_aligned_run_and_one_decay():
    spans = [(5, 700, True), (700, 700, False), (700, PART + 9, True), (PART + 9, 3 * PART, False)]
    segments = Segments.of(spans, "cpu")
    assert segments.end == 3 * PART and len(segments.spans) == 3
    starts = (5, PART, PART + 9, 2 * PART)
    assert segments.parts.tolist() == [
        [a, b, d] for a, b, d in zip(starts, (PART, PART + 9, 2 * PART, 3 * PART), (1, 1, 0, 0), strict=True)
    ]
    assert Segments.of([], "cpu").parts.shape == (0, 3) and Segments.of([], "cpu").end == 0
    shard = segments.within(600, PART + 10)
    assert shard.spans == ((0, 100, True), (100, PART - 591, True), (PART - 591, PART - 590, False))


def test_grad_scale_multiplies_the_gradient():
    grad = torch.randn(100)
    results = []
    for gradient, grad_scale in ((grad * 0.25, None), (grad, torch.tensor(0.25))):
        made = [torch.ones(100), torch.zeros(100), torch.zeros(100)]
        adamw_step(made[0], gradient, *made[1:], whole(100), step=1, grad_scale=grad_scale, **CONSTANTS)
        results.append(made)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_decay_is_decoupled():
    for decays, kept in ((True, 2.0 * (1 - 3e-3 * 0.1)), (False, 2.0)):
        master = torch.full((10,), 2.0)
        zeros = (torch.zeros(10) for _ in range(3))
        adamw_step(master, *zeros, whole(10, decays), step=1, **CONSTANTS)
        torch.testing.assert_close(master, torch.full((10,), kept))


def test_first_step_is_the_sign_of_the_gradient():
    master, grad = torch.zeros(4), torch.tensor([1e-3, -1e-3, 5.0, -5.0])
    adamw_step(master, grad, torch.zeros(4), torch.zeros(4), whole(4, False), step=1, **CONSTANTS)
    torch.testing.assert_close(master, -3e-3 * grad.sign(), rtol=1e-4, atol=0)
    assert math.isfinite(float(master.sum()))


@pytest.mark.parametrize("shape", [(2, 144, 272), (128, 128), (0, 16, 16)])
def test_blocks_are_those_of_the_new_weight(shape):
    tensors, flat = state(*shape), [tensor.flatten() for tensor in state(*shape)]
    weight = torch.empty(shape, dtype=torch.bfloat16)
    blocks, transposed = quantize_blocks(torch.randn(shape))
    scale = torch.tensor(0.3)
    adamw_step_quantize(*tensors, weight, blocks, transposed, step=2, grad_scale=scale, **CONSTANTS)
    adamw_step(*flat, whole(flat[0].numel()), step=2, grad_scale=scale, **CONSTANTS)
    for one, other in zip(tensors, flat, strict=True):
        assert torch.equal(one.flatten(), other)
    assert torch.equal(weight, tensors[0].bfloat16())
    for q, expected in zip((blocks, transposed), quantize_blocks(weight), strict=True):
        assert_same(q, expected)


def test_wrong_arguments():
    one, half, scalar = torch.zeros(4), torch.zeros(4).bfloat16(), torch.zeros(())
    strided = torch.zeros(4, 2)[:, 0]
    cases = (
        ((half, one, one, one), 4, {}, "master and gradient must be FP32, got torch.bfloat16"),
        ((one, half, one, one), 4, {}, "and torch.bfloat16"),
        ((one, one, one.half(), one), 4, {}, "moments must be BF16 or FP32, got torch.float16"),
        ((one, one, one, half), 4, {}, "moments must have one dtype"),
        ((one, one, torch.zeros(5), one), 4, {}, "of one shape"),
        ((strided, one, one, one), 4, {}, "contiguous"),
        ((one, one, one, one), 5, {}, r"segments that end at 5 need flat buffers .* \[4\]"),
        ((torch.zeros(2, 2),) * 4, 4, {}, "flatten it"),
        ((one, one, one, one), 4, {"weight": one}, "weight must be BF16, got torch.float32"),
        ((one, one, one, one), 4, {"weight": half[:3]}, "of one shape"),
        ((one, one, one, one), 4, {"step": 0}, "step must be at least 1, got 0"),
        ((one, one, one, one), 4, {"grad_scale": scalar.double()}, "grad_scale must be FP32"),
        ((one, one, one, one), 4, {"grad_scale": one}, "grad_scale must be FP32"),
    )
    for tensors, n, other, message in cases:
        with pytest.raises(ValueError, match=message):
            adamw_step(*tensors, whole(n), **{"step": 1, **CONSTANTS, **other})
    for spans in ([(4, 8, True), (0, 4, True)], [(0, 5, True), (4, 8, False)], [(3, 1, True)], [(-1, 4, True)]):
        with pytest.raises(ValueError, match="ascend without overlap"):
            Segments.of(spans, "cpu")


def test_wrong_blocks():
    shape = (32, 48)
    q, t = quantize_blocks(torch.zeros(shape))
    rows = type(q)(q.data, torch.zeros(32, 1))
    cases = (
        (shape, q, q, r"transposed of a weight \[32, 48\] must be contiguous \[48, 32\]"),
        (shape, t, t, "blocks of a weight"),
        (shape, rows, t, r"\(1, 128\): make them by quantize_blocks"),
        (shape, type(t)(t.data.t(), t.scale.t(), t.tile), t, "blocks of a weight"),
        ((32, 24), q, t, "K=24 must be a multiple of 16"),
        ((32,), q, t, r"master is \[32\]: use adamw_step"),
    )
    for size, blocks, transposed, message in cases:
        tensors, weight = state(*size), torch.zeros(size, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=message):
            adamw_step_quantize(*tensors, weight, blocks, transposed, step=1, **CONSTANTS)

"""Checks of the fused ops on any device: what `test_triton_hardware` runs at production sizes."""

import pytest
import torch

from fp8moe.kernels.adamw import adamw_step, adamw_step_quantize
from fp8moe.kernels.cross_entropy import cross_entropy_with_gradient
from fp8moe.kernels.embedding import embedding_wgrad
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR
from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.kernels.reference import embedding as embedding_twin
from fp8moe.kernels.reference import quantize as twin
from fp8moe.kernels.reference import route as routing
from fp8moe.kernels.route import SCORES, route, route_backward
from fp8moe.kernels.segments import Segments
from fp8moe.kernels.silu_mul import silu_mul, silu_mul_backward
from fp8moe.kernels.squared_norm import squared_norm
from fp8moe.kernels.swiglu import swiglu, swiglu_backward, swiglu_columns
from tests.kernels.activation_bounds import activate, assert_cast, differentiate
from tests.kernels.device_cases import assert_same, data
from tests.kernels.loss_rows import STORAGE, assert_within_bounds, logits_and_labels
from tests.kernels.test_route import options, scoring
from tests.kernels.test_triton_norm import check_backward, check_forward
from tests.kernels.updates import SETTINGS, state


def losses_and_gradients(logits, labels, weight):
    """Both, for logits that are left as they are."""
    losses, gradients = torch.empty(len(labels), device=logits.device), logits.clone()
    cross_entropy_with_gradient(gradients, labels, weight, losses)
    return torch.cat([losses[:, None], gradients], 1)


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


def check_norm(device, t, d, dtype=torch.bfloat16):
    """Of a latent, or with a residual, at a production width."""
    latent = data("normal", t, d + 64, device=device, dtype=dtype)[:, 32 : 32 + d]
    weight, delta = torch.randn(d, device=device).to(dtype), data("outliers", t, d, device=device, dtype=dtype)
    for added, asked in ((None, {"tensor": False}), (delta, {"power_of_two": True})):
        source, inverse = check_forward(latent, weight, added, rows=True, **asked)
        check_backward(source, weight, inverse, delta, added)

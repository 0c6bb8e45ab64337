"""SwiGLU of GPT-OSS, clamped and with biases of experts, on a CPU and in Triton: within FP32's bounds of FP64."""

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.kernels.silu_mul import silu_mul, silu_mul_backward
from fp8moe.kernels.swiglu import swiglu, swiglu_backward, swiglu_columns
from tests.kernels.activation_bounds import activate, assert_cast, differentiate
from tests.kernels.device_cases import assert_same, data, offsets_of

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # e^-x beyond FP32: a sigmoid of zero
LIMIT = 2.5  # below it, above it and on it there are many values
# F, weighted, limit, power of two: a tile of 80 and of 144 holds gate and up, of 128 none
CASES = [(80, True, LIMIT, False), (128, True, LIMIT, True), (144, False, LIMIT, True), (80, False, None, False)]
SIZES = [0, 128, 0]  # rows of each expert; 16 more belong to none


@pytest.fixture(params=["specification", "triton"])
def device(request, triton_device):
    """Where Triton runs here, by it and by the specification."""
    if request.param == "specification":
        backend.set_backend("reference")
    return triton_device


def operands(device, f, weighted, dtype=torch.bfloat16):
    gate_up = data("normal", sum(SIZES) + 16, 2 * f, device=device, dtype=dtype) * 2
    gate_up[3, :4] = torch.tensor([-3e4, 3e4, LIMIT, -90.0])
    gate_up[3, f : f + 3] = torch.tensor([LIMIT, -LIMIT, 5.0])
    bias = torch.randn(len(SIZES), 2 * f, device=device).to(dtype)
    weights = torch.rand(len(gate_up), device=device) * 2 if weighted else None
    return gate_up, weights, bias, offsets_of(SIZES, device)


def biased(gate_up, bias):
    rows = [bias[e].float().expand(size, -1) for e, size in enumerate(SIZES)]
    rest = gate_up.new_zeros(len(gate_up) - sum(SIZES), gate_up.shape[1], dtype=torch.float32)
    return gate_up.float() + torch.cat([*rows, rest])


@pytest.mark.parametrize("case", CASES)
def test_with_casts(device, case):
    f, weighted, limit, power_of_two = case
    gate_up, weights, bias, offsets = operands(device, f, weighted)
    hidden, cached = swiglu(gate_up, weights, bias, offsets, limit=limit, power_of_two=power_of_two)
    expected = biased(gate_up, bias)
    assert_same(cached, quantize_rows(expected, power_of_two=power_of_two))
    assert_cast(hidden, activate(expected, weights, limit), ACTIVATION_AMAX_FLOOR, power_of_two)
    seen = cached.dequantize()
    columns = swiglu_columns(cached, weights, limit=limit)
    assert_cast(columns, activate(seen, weights, limit).t(), ACTIVATION_AMAX_FLOOR, True)
    dy = data("normal", len(gate_up), f, device=device) * 2.0**-20
    rows, by_columns, d_weights = swiglu_backward(dy, cached, weights, limit=limit, power_of_two=power_of_two)
    grads, whole = differentiate(seen, dy, weights, limit)
    assert_cast(rows, grads, GRADIENT_AMAX_FLOOR, power_of_two)
    assert_cast(by_columns, grads.t(), GRADIENT_AMAX_FLOOR, power_of_two)
    if weighted:
        whole.assert_contains(d_weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("f", [80, 33])
def test_without_casts(device, f, dtype):
    gate_up, weights, _, _ = operands(device, f, True, dtype)
    dy = data("normal", len(gate_up), f, device=device, dtype=dtype)
    activate(gate_up, weights, LIMIT).assert_contains(silu_mul(gate_up, weights, limit=LIMIT))
    bound, whole = differentiate(gate_up, dy, weights, LIMIT)
    grads, d_weights = silu_mul_backward(dy, gate_up, weights, limit=LIMIT)
    bound.assert_contains(grads)
    whole.assert_contains(d_weights)
    alone, _ = silu_mul_backward(dy, gate_up, limit=LIMIT)
    differentiate(gate_up, dy, None, LIMIT)[0].assert_contains(alone)


def test_fp64_is_what_autograd_says_of_the_released_formula():
    gate_up, dy = torch.randn(24, 80).double() * 3, torch.randn(24, 40).double()
    gate_up[0, 0], gate_up[1, 41] = LIMIT, -LIMIT
    leaf, weights = gate_up.clone().requires_grad_(), torch.rand(24).double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    gate, up = gate.clamp(min=None, max=LIMIT), up.clamp(min=-LIMIT, max=LIMIT)
    product = (up + 1) * (gate * torch.sigmoid(gate * 1.702)) * weights[:, None]
    product.backward(dy)
    bound, whole = differentiate(gate_up, dy, weights.detach(), LIMIT)
    torch.testing.assert_close(activate(gate_up, weights.detach(), LIMIT).value, product.detach())
    torch.testing.assert_close(bound.value, leaf.grad)
    torch.testing.assert_close(whole.value, weights.grad)


def test_what_is_not_a_number_stays_so(device):
    gate_up, weights, bias, offsets = operands(device, 128, True)
    gate_up[5, 7], gate_up[6, 130] = float("nan"), float("nan")
    hidden, cached = swiglu(gate_up, weights, bias, offsets, limit=LIMIT)
    assert [int(row) for row in (~hidden.scale.isfinite()).any(1).nonzero()] == [5, 6]
    assert [int(row) for row in (~cached.scale.isfinite()).any(1).nonzero()] == [5, 6]


def test_wrong_arguments():
    x, offsets = torch.randn(128, 96), torch.tensor([0, 128], dtype=torch.int32)
    cases = (
        (lambda: swiglu(x, limit=0.0), "limit=0.0 must be above 0"),
        (lambda: silu_mul(x, limit=float("inf")), "limit=inf must be above 0 and finite"),
        (lambda: swiglu(x, None, torch.randn(1, 96)), "takes bias and group_offsets together"),
        (lambda: swiglu(x, None, torch.randn(1, 48), offsets), r"bias must be \[E, 96\]"),
        (lambda: swiglu(x, None, torch.randn(2, 96), offsets), r"int32 \[3\]"),
        (lambda: swiglu(x, None, torch.randn(1, 96), offsets - torch.tensor([0, 1]).int()), "multiples of 128"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

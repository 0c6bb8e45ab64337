"""SwiGLU in Triton against FP64 and the specification: casts to the bit where no sigmoid enters, else to a boundary."""

import numpy as np
import pytest
import torch

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.reference import swiglu as twin
from fp8moe.kernels.swiglu import swiglu, swiglu_backward, swiglu_columns
from tests.kernels.activation_bounds import activate, assert_cast, assert_close_to, differentiate
from tests.kernels.device_cases import assert_same, data

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # e^-x beyond FP32; NaN

# kind, rows, F, weighted, power of two: tiles that are short, hold the end of gate and the start of up, or are whole
CASES = [
    ("normal", 144, 80, True, False),
    ("positive", 48, 256, True, True),
    ("outliers", 144, 128, False, False),
    ("normal", 16, 16, False, True),
    ("normal", 32, 192, True, True),
]

IDS = [f"{kind} R{r} F{f}" for kind, r, f, *_ in CASES]


def operands(kind, r, f, weighted, device, dtype=torch.bfloat16):
    gate_up = data(kind, r, 2 * f, device=device, dtype=dtype)
    return gate_up, torch.rand(r, device=device) * 2 if weighted else None


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward(triton_device, case):
    *sizes, power_of_two = case
    gate_up, weights = operands(*sizes, triton_device)
    hidden, cached = swiglu(gate_up, weights, power_of_two=power_of_two)
    expected, expected_cached = twin.swiglu(gate_up, weights, power_of_two=power_of_two)
    assert_same(cached, expected_cached)
    assert_cast(hidden, activate(gate_up, weights), ACTIVATION_AMAX_FLOOR, power_of_two)
    if power_of_two and case[1] > 16:
        assert_close_to(hidden, expected)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_columns(triton_device, case):
    *sizes, power_of_two = case
    gate_up, weights = operands(*sizes, triton_device)
    cached = twin.swiglu(gate_up, weights, power_of_two=power_of_two)[1]
    columns = swiglu_columns(cached, weights)
    assert_cast(columns, activate(cached.dequantize(), weights).t(), ACTIVATION_AMAX_FLOOR, True)
    assert_close_to(columns, twin.swiglu_columns(cached, weights))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_backward(triton_device, case):
    *sizes, power_of_two = case
    gate_up, weights = operands(*sizes, triton_device)
    _, cached = swiglu(gate_up, weights)
    dy = data("normal", case[1], case[2], device=triton_device) * 2.0**-20
    rows, columns, d_weights = swiglu_backward(dy, cached, weights, power_of_two=power_of_two)
    grads, whole = differentiate(cached.dequantize(), dy, weights)
    assert_cast(rows, grads, GRADIENT_AMAX_FLOOR, power_of_two)
    assert_cast(columns, grads.t(), GRADIENT_AMAX_FLOOR, power_of_two)
    assert (d_weights is None) is (weights is None)
    if d_weights is not None:
        whole.assert_contains(d_weights)


def test_padding_rows_and_gates_beyond_the_exponential(triton_device):
    gate_up, weights = operands("normal", 144, 128, True, triton_device)
    dy = torch.ones(144, 128, device=triton_device)
    gate_up[20:24], weights[20:24] = 0, 0
    gate_up[30, :64], gate_up[31, :64] = -3e4, 3e4
    hidden, cached = swiglu(gate_up, weights)
    columns, (rows, by_columns, d_weights) = swiglu_columns(cached, weights), swiglu_backward(dy, cached, weights)
    expected = twin.swiglu(gate_up, weights)[0], twin.swiglu_columns(cached, weights), *twin.swiglu_backward(
        dy, cached, weights
    )[:2]  # fmt: skip
    for ours, theirs in zip((hidden, columns, rows, by_columns), expected, strict=True):
        assert bool(ours.dequantize().isfinite().all())
        assert_close_to(ours, theirs)
    for q, dim in ((hidden, 0), (columns, 1), (rows, 0), (by_columns, 1)):
        assert not bool(q.dequantize().narrow(dim, 20, 4).any())
    assert torch.equal(hidden.scale[20:24], expected[0].scale[20:24])
    assert torch.equal(rows.scale[20:24], expected[2].scale[20:24]) and not bool(d_weights[20:24].any())
    assert_same(cached, twin.swiglu(gate_up, weights)[1])


def test_what_is_not_finite_stays_so(triton_device):
    gate_up, weights = operands("normal", 32, 128, True, triton_device)
    gate_up[3, 5], gate_up[7, 200], gate_up[9, 130] = float("nan"), float("inf"), -float("inf")
    for power_of_two in (False, True):
        hidden, cached = swiglu(gate_up, weights, power_of_two=power_of_two)
        expected, expected_cached = twin.swiglu(gate_up, weights, power_of_two=power_of_two)
        assert torch.equal(cached.scale.isfinite(), expected_cached.scale.isfinite())
        assert torch.equal(hidden.scale.isfinite(), expected.scale.isfinite())
        assert int((~hidden.scale.isfinite()).sum()) == 3
        columns = swiglu_columns(cached, weights)
        assert torch.equal(columns.scale.isfinite(), twin.swiglu_columns(cached, weights).scale.isfinite())


@pytest.mark.parametrize("f", [144, 128])
def test_any_layout_and_dtype_of_the_arguments(triton_device, f):
    gate_up, weights = operands("normal", 32, f, True, triton_device, torch.float32)
    wide = torch.zeros(32, 2 * f + 16, device=triton_device)
    wide[:, 16:] = gate_up
    dy = data("normal", 32, f, device=triton_device, dtype=torch.float32)
    pairs = torch.stack([weights, weights], 1)
    expected, cached = swiglu(gate_up, weights)
    for view in (wide[:, 16:], gate_up.t().contiguous().t()):
        hidden, again = swiglu(view, pairs[:, 0])
        assert_same(hidden, expected)
        assert_same(again, cached)
    token_major = Fp8Tensor(cached.data, cached.scale.contiguous())
    columns, grads = swiglu_columns(cached, weights), swiglu_backward(dy, cached, weights)
    assert_same(swiglu_columns(token_major, pairs[:, 0]), columns)
    again = swiglu_backward(dy.t().contiguous().t(), token_major, pairs[:, 1])
    assert_same(again[0], grads[0])
    assert_same(again[1], grads[1])
    assert torch.equal(again[2], grads[2])
    assert all(q.data.is_contiguous() and q.scale.stride(0) == 1 for q in (expected, columns, *grads[:2]))


@pytest.mark.parametrize(("r", "f"), [(0, 144), (32, 0)])
def test_nothing_to_do(triton_device, r, f):
    weights = torch.rand(r, device=triton_device)
    hidden, cached = swiglu(torch.empty(r, 2 * f, device=triton_device), weights)
    rows, columns, d_weights = swiglu_backward(torch.empty(r, f, device=triton_device), cached, weights)
    assert hidden.shape == (r, f) and swiglu_columns(cached, weights).shape == (f, r)
    assert rows.shape == (r, 2 * f) and columns.shape == (2 * f, r)
    assert torch.equal(d_weights, torch.zeros(r, device=triton_device))


def test_a_scale_without_a_division_is_the_quotient():
    """`encode.e4m3_scale_of`, which the interpreter does not enter, for every mantissa of an amax."""
    amax = (np.arange(1 << 23, dtype=np.uint32) | np.uint32(0x3F800000)).view(np.float32)
    expected, inverse = amax / np.float32(448), np.float32(1 / 448)
    quotient = amax * inverse
    remainder = amax - 448 * quotient.astype(np.float64)  # what an FMA gives: exact
    assert np.array_equal(remainder, remainder.astype(np.float32))
    corrected = (quotient + remainder * np.float64(inverse)).astype(np.float32)
    assert np.array_equal(corrected, expected) and not np.array_equal(quotient, expected)


@pytest.mark.parametrize(("largest", "bits"), [(448, 0x43E00000), (65024, 0x477E0000)])
def test_a_power_of_two_above_is_that_of_the_quotient(largest, bits):
    """`encode.power_of_two_above` for every mantissa of an amax, as it computes."""
    assert np.float32(largest).view(np.uint32) == bits
    amax = (np.arange(1 << 23, dtype=np.uint32) | np.uint32(0x3F800000)).view(np.float32)
    up = ((amax / np.float32(largest)).view(np.uint32) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)
    carry, down = np.uint32(0x7FFFFF - (bits & 0x7FFFFF)), np.uint32((bits & 0x7F800000) - 0x3F800000)
    assert np.array_equal(((amax.view(np.uint32) + carry) & np.uint32(0x7F800000)) - down, up)

"""SwiGLU with quantization against FP64, forward and backward, weighted and not."""

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.quantize import quantize_blocks, quantize_rows
from fp8moe.kernels.swiglu import swiglu, swiglu_backward, swiglu_columns
from tests.distance import calc_diff
from tests.kernels.device_cases import data
from tests.kernels.operands import assert_rounded, codes

# kind, rows, F, weighted: short last tiles, tiles that hold gate and up, one token tile and several
CASES = [
    ("normal", 272, 80, True),
    ("positive", 144, 256, False),
    ("outliers", 400, 576, True),
    ("normal", 16, 16, False),
]


def exact(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    h = gate * torch.sigmoid(gate) * up
    return h if weights is None else h * weights[:, None]


def operands(kind: str, r: int, f: int, weighted: bool) -> tuple[Tensor, Tensor | None]:
    return data(kind, r, 2 * f), torch.rand(r) if weighted else None


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_forward(case: tuple[str, int, int, bool], power_of_two: bool) -> None:
    gate_up, weights = operands(*case)
    h, cached = swiglu(gate_up, weights, power_of_two=power_of_two)
    expected = quantize_rows(gate_up, power_of_two=power_of_two)
    assert torch.equal(codes(cached), codes(expected)) and torch.equal(cached.scale, expected.scale)
    h64 = exact(gate_up.double(), None if weights is None else weights.double())
    assert_rounded(h, h64)
    assert calc_diff(h.dequantize(), h64) <= 1e-3
    if power_of_two:
        assert bool((torch.frexp(h.scale).mantissa == 0.5).all())


@pytest.mark.parametrize("case", CASES)
def test_columns_are_recomputed_from_the_cached_copy(case: tuple[str, int, int, bool]) -> None:
    gate_up, weights = operands(*case)
    _, cached = swiglu(gate_up, weights)
    columns = swiglu_columns(cached, weights)
    weights64 = None if weights is None else weights.double()
    assert columns.shape == (case[2], case[1])
    assert bool((torch.frexp(columns.scale).mantissa == 0.5).all())
    assert_rounded(columns, exact(cached.dequantize().double(), weights64).t())
    if case[1] > 16:  # a few hundred values scatter too much for a bound on their mean
        assert calc_diff(columns.dequantize().t(), exact(gate_up.double(), weights64)) <= 2e-3


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_backward(case: tuple[str, int, int, bool], power_of_two: bool) -> None:
    gate_up, weights = operands(*case)
    _, cached = swiglu(gate_up, weights)
    dy = data("normal", case[1], case[2]) * 2**-20
    rows, columns, dweights = swiglu_backward(dy, cached, weights, power_of_two=power_of_two)

    leaf = cached.dequantize().double().requires_grad_()
    weights64 = None if weights is None else weights.double().requires_grad_()
    exact(leaf, weights64).backward(dy.double())
    assert leaf.grad is not None
    assert_rounded(rows, leaf.grad)
    assert_rounded(columns, leaf.grad.t())
    for q, grad in ((rows, leaf.grad), (columns, leaf.grad.t())):
        assert calc_diff(q.dequantize(), grad) <= 1e-3
        assert not power_of_two or bool((torch.frexp(q.scale).mantissa == 0.5).all())
    if weights64 is None:
        assert dweights is None
    else:
        assert dweights is not None and weights64.grad is not None and dweights.dtype is torch.float32
        assert calc_diff(dweights, weights64.grad) <= 1e-11


def test_small_gradients_keep_their_codes() -> None:
    gate_up, weights = operands("normal", 144, 144, True)
    _, cached = swiglu(gate_up, weights)
    dy = data("normal", 144, 144)
    large = swiglu_backward(dy, cached, weights, power_of_two=True)
    small = swiglu_backward(dy * 2.0**-40, cached, weights, power_of_two=True)
    for one, other in zip(large[:2], small[:2], strict=True):
        assert isinstance(one, Fp8Tensor) and isinstance(other, Fp8Tensor)
        assert torch.equal(codes(one), codes(other)) and torch.equal(one.scale * 2.0**-40, other.scale)


def test_padding_rows_stay_zero() -> None:
    gate_up, weights = operands("normal", 256, 128, True)
    assert weights is not None
    gate_up[100:128], weights[100:128] = 0, 0
    h, cached = swiglu(gate_up, weights)
    rows, columns, dweights = swiglu_backward(torch.ones(256, 128).bfloat16(), cached, weights)
    assert not bool(h.dequantize()[100:128].any())
    assert not bool(swiglu_columns(cached, weights).dequantize()[:, 100:128].any())
    assert not bool(rows.dequantize()[100:128].any()) and not bool(columns.dequantize()[:, 100:128].any())
    assert dweights is not None and not bool(dweights[100:128].any())


def test_large_gates_stay_finite() -> None:
    gate_up = torch.tensor([[-3e4] * 16 + [2.0] * 16, [3e4] * 16 + [2.0] * 16] * 8).bfloat16()
    h, cached = swiglu(gate_up)
    rows, columns, _ = swiglu_backward(torch.ones(16, 16).bfloat16(), cached)
    for q in (h, swiglu_columns(cached), rows, columns):
        assert bool(q.dequantize().isfinite().all())


def test_arguments_are_left_alone() -> None:
    gate_up, dy = data("normal", 32, 96, dtype=torch.float32), data("normal", 32, 48, dtype=torch.float32)
    weights = torch.rand(32)
    before = [tensor.clone() for tensor in (gate_up, dy, weights)]
    _, cached = swiglu(gate_up, weights)
    kept = codes(cached).clone()
    swiglu_columns(cached, weights)
    swiglu_backward(dy, cached, weights)
    for tensor, copy in zip((gate_up, dy, weights, codes(cached)), (*before, kept), strict=True):
        assert torch.equal(tensor, copy)


def test_no_rows() -> None:
    h, cached = swiglu(torch.empty(0, 288, dtype=torch.bfloat16), torch.empty(0))
    rows, columns, dweights = swiglu_backward(torch.empty(0, 144, dtype=torch.bfloat16), cached, torch.empty(0))
    assert h.shape == (0, 144) and swiglu_columns(cached).shape == (144, 0)
    assert rows.shape == (0, 288) and columns.shape == (288, 0)
    assert dweights is not None and dweights.shape == (0,)


def test_wrong_arguments() -> None:
    _, cached = swiglu(torch.randn(32, 96))
    _, odd = swiglu(torch.randn(7, 96))
    cases = (
        (lambda: swiglu(torch.randn(2, 32, 96)), r"takes \[R, 2F\]"),
        (lambda: swiglu(torch.randn(32, 96).half()), "torch.float16"),
        (lambda: swiglu(torch.randn(32, 80)), "F=40 must be a multiple of 16"),
        (lambda: swiglu(torch.randn(32, 97)), "2F=97"),
        (lambda: swiglu(torch.randn(32, 96), torch.rand(31)), r"FP32 \[32\], one a row, got \[31\]"),
        (lambda: swiglu(torch.randn(32, 96), torch.rand(32).bfloat16()), "torch.bfloat16"),
        (lambda: swiglu_columns(quantize_blocks(torch.randn(32, 96))[0]), r"\(128, 128\)"),
        (lambda: swiglu_columns(odd), "R=7 must be a multiple of 16, which FP8 needs: use 16"),
        (lambda: swiglu_backward(torch.randn(32, 96), cached), r"takes dy \[32, 48\]"),
        (lambda: swiglu_backward(torch.randn(7, 48), odd), "R=7 must be a multiple"),
        (lambda: swiglu_backward(torch.randn(32, 48), cached, torch.rand(16)), r"FP32 \[32\], one a row, got \[16\]"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

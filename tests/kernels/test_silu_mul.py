"""SwiGLU without casts, on a CPU and in Triton, within the bounds of FP32 around FP64."""

import pytest
import torch

from fp8moe.kernels.silu_mul import silu_mul, silu_mul_backward
from tests.kernels.activation_bounds import activate, differentiate
from tests.kernels.device_cases import data

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # e^-x beyond FP32: a sigmoid of zero
DTYPES = [torch.bfloat16, torch.float32]
CASES = [("normal", 37, 80, True), ("outliers", 130, 33, False), ("positive", 8, 600, True), ("normal", 1, 1, True)]


def check(device, case, dtype):
    kind, r, f, weighted = case
    gate_up, dy = (data(kind, r, width, device=device, dtype=dtype) for width in (2 * f, f))
    weights = torch.rand(r, device=device) * 2 if weighted else None
    before = [x.clone() for x in (gate_up, dy)]
    product, (grads, d_weights) = silu_mul(gate_up, weights), silu_mul_backward(dy, gate_up, weights)
    assert product.dtype is grads.dtype is dtype and product.shape == (r, f) and grads.shape == (r, 2 * f)
    activate(gate_up, weights).assert_contains(product)
    bound, whole = differentiate(gate_up, dy, weights)
    bound.assert_contains(grads)
    assert (d_weights is None) is (weights is None)
    if d_weights is not None:
        assert d_weights.dtype is torch.float32 and d_weights.shape == (r,)
        whole.assert_contains(d_weights)
    assert all(torch.equal(x, copy) for x, copy in zip((gate_up, dy), before, strict=True))
    return product, grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_fp64(case, dtype):
    check("cpu", case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_in_triton(triton_device, case, dtype):
    check(triton_device, case, dtype)


def test_fp64_is_what_autograd_says():
    """The oracle of the bounds, against autograd of the plain formula."""
    gate_up, dy = (torch.randn(24, width, dtype=torch.float64) for width in (80, 40))
    leaf, weights = gate_up.clone().requires_grad_(), torch.rand(24).double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    product = torch.nn.functional.silu(gate) * up * weights[:, None]
    product.backward(dy)
    bound, whole = differentiate(gate_up, dy, weights.detach())
    torch.testing.assert_close(activate(gate_up, weights.detach()).value, product.detach())
    torch.testing.assert_close(bound.value, leaf.grad)
    torch.testing.assert_close(whole.value, weights.grad)


def test_any_layout(triton_device):
    gate_up, dy = (data("normal", 24, width, device=triton_device) for width in (96, 48))
    weights = torch.rand(24, 2, device=triton_device)
    expected = silu_mul(gate_up, weights[:, 0]), *silu_mul_backward(dy, gate_up, weights[:, 0])
    wide = torch.nn.functional.pad(gate_up, (16, 0))
    for view, gradient in ((wide[:, 16:], dy.t().contiguous().t()), (gate_up.t().contiguous().t(), dy)):
        factor = weights[:, 0].contiguous()
        found = silu_mul(view, factor), *silu_mul_backward(gradient, view, factor)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("r", "f"), [(0, 40), (24, 0)])
def test_nothing_to_do(triton_device, r, f):
    gate_up, dy, weights = (torch.empty(*shape, device=triton_device) for shape in ((r, 2 * f), (r, f), (r,)))
    assert silu_mul(gate_up, weights).shape == (r, f)
    grads, d_weights = silu_mul_backward(dy, gate_up, weights)
    assert grads.shape == (r, 2 * f) and torch.equal(d_weights, torch.zeros(r, device=triton_device))


def test_wrong_arguments():
    x, dy = torch.randn(32, 96), torch.randn(32, 48)
    cases = (
        (lambda: silu_mul(torch.randn(2, 32, 96)), r"takes gate_up \[R, 2F\]"),
        (lambda: silu_mul(x.half()), "torch.float16"),
        (lambda: silu_mul(torch.randn(32, 97)), "2F=97 is odd: use 98"),
        (lambda: silu_mul(x, torch.rand(31)), r"FP32 \[32\], one a row, got \[31\]"),
        (lambda: silu_mul_backward(dy, x, torch.rand(32).bfloat16()), "torch.bfloat16"),
        (lambda: silu_mul_backward(x, x), r"takes dy \[32, 48\] in BF16 or FP32, not \[32, 96\]"),
        (lambda: silu_mul_backward(dy.double(), x), "torch.float64"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

"""RMSNorm in Triton: y, rows and columns are exactly those of its 1/rms, which is the specification's within 1e-6."""

import pytest
import torch

from fp8moe.kernels.norm import rms_norm, rms_norm_backward, rms_norm_columns
from fp8moe.kernels.reference import norm as twin
from fp8moe.kernels.reference import quantize as casts
from tests.kernels.device_cases import KINDS, assert_same, data

EPS = 1e-6


def operands(t, d, dtype, device, kind="normal"):
    wide = data(kind, t, d + 48, device=device, dtype=dtype)
    return (
        wide[:, 16 : 16 + d],
        torch.randn(d, device=device).to(dtype),
        data("normal", t, d, device=device, dtype=dtype),
    )


def check_forward(x, weight, delta, **asked):
    """Against the specification; returns h (or x) and 1/rms."""
    h, y, rows, inverse = rms_norm(x, weight, delta, eps=EPS, **asked)
    expected_h, _, _, expected = twin.rms_norm(x, weight, delta, eps=EPS)
    assert torch.equal(h, expected_h)
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=0)
    source = x if delta is None else h
    normed = (source.float() * inverse[:, None]).mul_(weight).to(x.dtype)
    assert torch.equal(y, normed if asked.get("tensor", True) else normed[:0])
    power_of_two = asked.get("power_of_two", False)
    if asked.get("rows"):
        assert_same(rows, casts.quantize_rows(normed, power_of_two=power_of_two))
        assert rows.scale.stride(0) == 1
    if len(x) % 16 == 0:
        columns = rms_norm_columns(source, weight, inverse, power_of_two=power_of_two)
        assert_same(columns, casts.quantize_columns(normed, power_of_two=power_of_two))
        assert columns.data.is_contiguous()
    return source, inverse


def check_backward(x, weight, inverse, dy, residual):
    """Against FP64 of the same 1/rms: one rounding of dx beside FP32's own errors, the gain's gradient within 1e-5."""
    main_grad = torch.ones(x.shape[1], device=x.device)
    got = rms_norm_backward(dy, x, weight, inverse, main_grad, residual)
    r, wide = inverse.double()[:, None], x.double()
    grad, normed = dy.double() * weight.double(), wide * r
    along = (grad * normed).mean(-1, keepdim=True)
    exact = (grad - normed * along) * r + (0 if residual is None else residual.double())
    terms = (grad.abs() + (normed * along).abs()) * r + (0 if residual is None else residual.double().abs())
    rounding = 2.0**-8 if x.dtype is torch.bfloat16 else 2.0**-23
    excess = ((got.double() - exact).abs() - rounding * exact.abs()) / terms.amax(-1, keepdim=True).clamp(min=1e-30)
    worst = float(excess.max())
    assert worst <= 2e-6, f"dx of {list(x.shape)} {x.dtype} is off by {worst:.2e} of its row's terms, rounding apart"
    share = (dy.double() * normed).sum(0)
    error = float((main_grad.double() - 1 - share).abs().max() / share.abs().max())
    assert error <= 1e-5, f"the gain's gradient of {list(x.shape)} {x.dtype} is off by {error:.2e} of its largest"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_the_specification(triton_device, kind, dtype):
    for (t, d), asked in (
        ((48, 304), {"rows": True}),
        ((19, 208), {"rows": True, "tensor": False, "power_of_two": True}),
        ((16, 2112), {"rows": True, "power_of_two": True}),
        ((33, 41), {}),
    ):
        x, weight, delta = operands(t, d, dtype, triton_device, kind)
        for added in (None, delta):
            check_forward(x, weight, added, **asked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_normal_sizes_are_the_specification(triton_device, kind, dtype):
    for t, d in ((48, 304), (5, 2112), (300, 16)):
        x, weight, residual = operands(t, d, dtype, triton_device, kind)
        dy = data("normal", t, d, device=triton_device, dtype=dtype)
        inverse = twin.rms_norm(x, weight, eps=EPS)[3]
        for other in (None, residual):
            check_backward(x, weight, inverse, dy, other)


def test_more_rows_than_programs(triton_device, monkeypatch):
    """Each program then has several blocks of rows, the last of them short or missing."""
    monkeypatch.setattr("fp8moe.kernels.triton.norm.PROGRAMS", 3)
    for t, d in ((41, 1040), (70, 208)):
        for dtype in (torch.bfloat16, torch.float32):
            x, weight, dy = operands(t, d, dtype, triton_device)
            check_backward(x, weight, twin.rms_norm(x, weight, eps=EPS)[3], dy, dy.flip(0))


@pytest.mark.parametrize("d", [7168, 16384])
def test_wide_rows(triton_device, d):
    x, weight, delta = operands(3, d, torch.bfloat16, triton_device)
    source, inverse = check_forward(x, weight, delta, rows=True, power_of_two=True)
    check_backward(source, weight, inverse, delta, None)


def test_a_transposed_input_and_gradients_anyhow(triton_device):
    x, weight, dy = operands(32, 48, torch.bfloat16, triton_device)
    inverse = twin.rms_norm(x, weight, eps=EPS)[3]
    turned = x.t().contiguous().t()
    check_forward(turned, weight, dy.t().contiguous().t(), rows=True)
    check_backward(turned, weight, inverse, dy[:, :1].expand(-1, 48), dy.t().contiguous().t())


def test_the_constant_under_the_root_counts(triton_device):
    x, weight, _ = operands(16, 48, torch.float32, triton_device)
    x[3] = 0
    inverse, expected = (norm(x, weight, eps=0.25)[3] for norm in (rms_norm, twin.rms_norm))
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=0)
    assert float(inverse[3]) == 2.0


def test_nothing_to_norm(triton_device):
    x, weight, _ = operands(0, 48, torch.bfloat16, triton_device)
    _, y, rows, inverse = rms_norm(x, weight, x, eps=EPS, rows=True)
    grad = torch.ones(48, device=triton_device)
    assert rms_norm_backward(y, x, weight, inverse, grad).shape == rows.shape == (0, 48) and bool((grad == 1).all())
    assert rms_norm_columns(x, weight, inverse).shape == (48, 0)

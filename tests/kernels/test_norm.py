"""RMSNorm by the specification: torch's bits forward, FP64 autograd of the formula backward, the quantizers' casts."""

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.kernels.norm import rms_norm, rms_norm_backward, rms_norm_columns
from fp8moe.kernels.quantize import quantize_columns, quantize_rows
from fp8moe.kernels.statistics import observe_casts
from tests.kernels.device_cases import KINDS, assert_same, data

EPS = 1e-6
SIZES = [(48, 304), (16, 16), (304, 512), (1, 7168), (33, 2112)]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def specification():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns with NaN
    backend.set_backend("reference")
    yield
    backend.set_backend(None)
    torch.use_deterministic_algorithms(False)


def operands(t, d, dtype, kind="normal"):
    """x as a column slice of a wider matrix, gain, delta."""
    wide = data(kind, t, d + 48, dtype=dtype)
    return wide[:, 16 : 16 + d], torch.randn(d).to(dtype), data("normal", t, d, dtype=dtype)


def exact(h, weight, dy, residual=None, eps=EPS):
    """(y, dx, gain's gradient) in FP64, by autograd of the formula."""
    h, weight = h.double().requires_grad_(), weight.double().requires_grad_()
    y = h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    total = (y * dy.double()).sum() + (0 if residual is None else (h * residual.double()).sum())
    return y.detach(), *torch.autograd.grad(total, (h, weight))


def error(ours, theirs):
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "d"), SIZES)
def test_the_norm_has_torchs_bits_and_its_casts_are_the_quantizers(t, d, dtype):
    x, weight, delta = operands(t, d, dtype)
    for added in (None, delta):
        source = x if added is None else x + added
        expected = torch.nn.functional.rms_norm(source, (d,), weight, EPS)
        for power_of_two in (False, True):
            h, y, rows, inverse = rms_norm(x, weight, added, eps=EPS, rows=True, power_of_two=power_of_two)
            assert torch.equal(y, expected) and torch.equal(h, source if added is not None else x[:0])
            assert_same(rows, quantize_rows(expected, power_of_two=power_of_two))
            if t % 16 == 0:
                columns = rms_norm_columns(source, weight, inverse, power_of_two=power_of_two)
                assert_same(columns, quantize_columns(expected, power_of_two=power_of_two))
        assert inverse.dtype is torch.float32
        torch.testing.assert_close(inverse, (source.double().square().mean(-1) + EPS).rsqrt().float())


def test_only_what_is_asked_for_is_written():
    x, weight, _ = operands(32, 48, torch.bfloat16)
    _, y, rows, _ = rms_norm(x, weight, eps=EPS)
    assert y.shape == (32, 48) and rows.shape == (0, 48)
    _, none, alone, _ = rms_norm(x, weight, eps=EPS, tensor=False, rows=True)
    assert none.shape == (0, 48)
    assert_same(alone, quantize_rows(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("t", "d"), SIZES)
def test_gradients_are_those_of_fp64(t, d, kind, dtype):
    x, weight, residual = operands(t, d, dtype, kind)
    dy = data("normal", t, d, dtype=dtype)
    inverse = rms_norm(x, weight, eps=EPS)[3]
    for other in (None, residual):
        _, dx, gain = exact(x, weight, dy, other)
        main_grad = torch.zeros(d)
        ours = rms_norm_backward(dy, x, weight, inverse, main_grad, other)
        assert ours.dtype is dtype and error(ours, dx) <= (2e-3 if dtype is torch.bfloat16 else 2e-7)
        assert error(main_grad, gain) <= 1e-6
        rms_norm_backward(dy, x, weight, inverse, main_grad, other)
        torch.testing.assert_close(main_grad.double(), 2 * gain, rtol=1e-5, atol=1e-5 * float(gain.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "d"), SIZES)
def test_dx_has_the_bits_of_torchs_autograd(t, d, dtype):
    x, weight, dy = operands(t, d, dtype)
    source = x.clone().requires_grad_()
    torch.nn.functional.rms_norm(source, (d,), weight, EPS).backward(dy)
    inverse = rms_norm(x, weight, eps=EPS)[3]
    assert torch.equal(rms_norm_backward(dy, x, weight, inverse, torch.zeros(d)), source.grad)


def test_the_residuals_gradient_is_added_before_dx_is_rounded():
    x, weight, dy = operands(64, 256, torch.bfloat16)
    residual = data("normal", 64, 256) * 2.0**-7
    inverse, grad = rms_norm(x, weight, eps=EPS)[3], torch.zeros(256)
    _, dx, _ = exact(x, weight, dy, residual)
    at_once = rms_norm_backward(dy, x, weight, inverse, grad, residual)
    twice = rms_norm_backward(dy, x, weight, inverse, grad) + residual
    assert error(at_once, dx) < 0.9 * error(twice, dx)


def test_the_gain_is_not_rounded_on_its_way():
    """A BF16 parameter's `.grad`, which autograd gives, is off by 1.7e-3: the bound must not hold for it."""
    x, weight, dy = operands(512, 256, torch.bfloat16)
    inverse, grad = rms_norm(x, weight, eps=EPS)[3], torch.zeros(256)
    rms_norm_backward(dy, x, weight, inverse, grad)
    _, _, gain = exact(x, weight, dy)
    assert error(grad, gain) <= 1e-5
    parameter = weight.clone().requires_grad_()
    torch.nn.functional.rms_norm(x, (256,), parameter, EPS).backward(dy)
    assert error(parameter.grad, gain) > 1e-3


def test_gradients_that_are_views_and_nothing_at_all():
    x, weight, _ = operands(16, 48, torch.float32)
    inverse = rms_norm(x, weight, eps=EPS)[3]
    one = torch.ones((), dtype=torch.float32)
    got = [
        rms_norm_backward(dy, x, weight, inverse, torch.zeros(48)) for dy in (one.expand(16, 48), torch.ones(16, 48))
    ]
    assert torch.equal(*got)
    h, y, rows, inverse = rms_norm(x[:0], weight, x[:0], eps=EPS, rows=True)
    grad = torch.ones(48)
    dx = rms_norm_backward(x[:0], x[:0], weight, inverse, grad)
    assert h.shape == y.shape == rows.shape == dx.shape == (0, 48) and bool((grad == 1).all())
    assert rms_norm_columns(x[:0], weight, inverse).shape == (48, 0)


def test_a_row_of_zeros_and_one_that_is_not_finite():
    x = torch.randn(32, 256)
    x[1], x[2, 5] = 0, float("nan")
    _, y, rows, inverse = rms_norm(x, torch.ones(256), eps=0.25, rows=True)
    assert not bool(y[1].any()) and float(inverse[1]) == 2.0
    assert not bool(rows.scale[2].isfinite().any()) and bool(rows.scale[[0, 1, 3]].isfinite().all())


@pytest.mark.parametrize("tensor", [False, True])
def test_casts_are_observed_as_the_quantizers(tensor):
    x, weight, _ = operands(32, 256, torch.bfloat16)
    y, inverse = rms_norm(x, weight, eps=EPS)[1::2]
    with observe_casts() as expected:
        quantize_rows(y)
        quantize_columns(y)
    with observe_casts() as ours:
        _, given, _, _ = rms_norm(x, weight, eps=EPS, tensor=tensor, rows=True)
        rms_norm_columns(x, weight, inverse)
    assert len(given) == 32 * tensor
    assert vars(ours) == vars(expected)


def test_what_does_not_fit_is_refused():
    x, weight, inverse = torch.zeros(16, 48), torch.ones(48), torch.ones(16)
    for call, words in (
        (lambda: rms_norm(x[None], weight, eps=EPS), r"\[T, D\].*\[1, 16, 48\]"),
        (lambda: rms_norm(x.half(), weight, eps=EPS), "float16"),
        (lambda: rms_norm(x, weight[1:], eps=EPS), r"weight \[48\].*got \[47\]"),
        (lambda: rms_norm(x, weight.bfloat16(), eps=EPS), "float32.*bfloat16"),
        (lambda: rms_norm(x, weight, x[1:], eps=EPS), r"delta must be \[16, 48\].*\[15, 48\]"),
        (lambda: rms_norm(x, weight, eps=EPS, tensor=False), "neither tensor nor rows"),
        (lambda: rms_norm(x[:, :40], weight[:40], eps=EPS, rows=True), "D=40"),
        (lambda: rms_norm_columns(x[:8], weight, inverse[:8]), "T=8"),
        (lambda: rms_norm_columns(x, weight, inverse[1:]), r"1/rms must be FP32 \[16\].*\[15\]"),
        (lambda: rms_norm_backward(x.bfloat16(), x, weight, inverse, weight), "dy must be.*bfloat16"),
        (lambda: rms_norm_backward(x, x, weight, inverse.double(), weight), "float64"),
        (lambda: rms_norm_backward(x, x, weight, inverse, weight[1:]), r"added into FP32.*\[47\]"),
        (lambda: rms_norm_backward(x, x, weight, inverse, weight, x[1:]), "residual must be"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert rms_norm(x[:, :41], weight[:41], eps=EPS)[1].shape == (16, 41)  # without FP8 any width

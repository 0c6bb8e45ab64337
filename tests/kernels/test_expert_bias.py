"""Biases of experts, on a CPU and in Triton, against FP64: ragged and empty groups, rows past the last."""

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.kernels.expert_bias import add_expert_bias, expert_bias_dgrad, expert_bias_wgrad
from fp8moe.kernels.quantize import quantize_columns, quantize_rows
from tests.kernels.device_cases import data, offsets_of

DTYPES = [torch.bfloat16, torch.float32]
RAGGED, ALIGNED = [3, 0, 40, 1], [128, 0, 256, 0]
N = [80, 200]


@pytest.fixture(params=["specification", "triton"])
def device(request, triton_device):
    """Where Triton runs here, by it and by the specification."""
    if request.param == "specification":
        backend.set_backend("reference")
    return triton_device


def expert_of(sizes, device):
    return torch.repeat_interleave(torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", N)
def test_adding(device, n, dtype, weighted):
    r, of_row = sum(RAGGED) + 5, expert_of(RAGGED, device)
    y, bias = data("normal", r, n, device=device, dtype=dtype), torch.randn(4, n, device=device).to(dtype)
    bias[1] = float("nan")  # no row is its
    weights = torch.rand(r, device=device) if weighted else None
    expected = y.double()
    added = bias.double()[of_row] * (1 if weights is None else weights.double()[: len(of_row), None])
    expected[: len(of_row)] += added
    rest = y[len(of_row) :].clone()
    add_expert_bias(y, bias, offsets_of(RAGGED, device), weights)
    step = 2.0**-8 if dtype is torch.bfloat16 else 0.0
    bound = expected.abs() * step + 2.0**-22 * (expected.abs() + 1 + 4 * bias.double().nan_to_num().abs().max())
    assert bool(((y.double() - expected).abs() <= bound).all())
    assert torch.equal(y[len(of_row) :], rest)


@pytest.mark.parametrize("kind", ["bf16", "fp32", "fp8", "fp8 m-major"])
@pytest.mark.parametrize("n", N)
def test_gradient_of_the_routing_weights(device, n, kind):
    sizes = ALIGNED if kind.startswith("fp8") else RAGGED
    r, of_row = sum(sizes) + 16, expert_of(sizes, device)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    dy, bias = data("normal", r, n // 16 * 16, device=device, dtype=dtype), torch.randn(4, n // 16 * 16, device=device)
    rows = quantize_rows(dy) if kind.startswith("fp8") else dy
    if kind == "fp8 m-major":
        rows = rows.to_m_major()
    seen = rows.dequantize() if kind.startswith("fp8") else dy
    before = torch.randn(r, device=device)
    expected = before.double()
    expected[: len(of_row)] += (seen.double()[: len(of_row)] * bias.double()[of_row]).sum(1)
    d_weights = before.clone()
    expert_bias_dgrad(rows, bias, offsets_of(sizes, device), d_weights)
    assert bool(((d_weights - expected).abs() <= 1e-5 * (1 + expected.abs())).all())
    assert torch.equal(d_weights[len(of_row) :], before[len(of_row) :])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "fp32", "fp8"])
@pytest.mark.parametrize("n", N)
def test_gradient_of_the_bias(device, n, kind, weighted):
    n, sizes = n // 16 * 16, ALIGNED if kind == "fp8" else RAGGED
    r, of_row = sum(sizes) + 16, expert_of(sizes, device)
    dy = data("normal", r, n, device=device, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    columns = quantize_columns(dy) if kind == "fp8" else dy
    seen = (columns.dequantize().t() if kind == "fp8" else dy).double()[: len(of_row)]
    weights = torch.rand(r, device=device) if weighted else None
    seen = seen if weights is None else seen * weights.double()[: len(of_row), None]
    before = torch.randn(4, n, device=device)
    main_grad = before.clone()
    expert_bias_wgrad(columns, offsets_of(sizes, device), main_grad, weights)
    expected = before.double().index_add(0, of_row, seen)
    assert bool(((main_grad - expected).abs() <= 3e-5 * (1 + expected.abs())).all())
    assert torch.equal(main_grad[1], before[1])


def test_wide_models_and_no_rows(device):
    """2880 columns, GPT-OSS's, are 22 tiles and a half; nothing to add to is nothing to do."""
    y, bias = torch.zeros(4, 2880, device=device), torch.randn(2, 2880, device=device)
    add_expert_bias(y, bias, offsets_of([1, 3], device))
    assert torch.equal(y, bias[[0, 1, 1, 1]])
    main_grad = torch.zeros(2, 2880, device=device)
    expert_bias_wgrad(y, offsets_of([1, 3], device), main_grad)
    torch.testing.assert_close(main_grad, bias * torch.tensor([[1.0], [3.0]], device=device))
    none = torch.empty(0, 2880, device=device)
    add_expert_bias(none, bias, offsets_of([0, 0], device))
    expert_bias_dgrad(none, bias, offsets_of([0, 0], device), torch.empty(0, device=device))
    expert_bias_wgrad(none, offsets_of([0, 0], device), main_grad)


def test_wrong_arguments():
    y, bias, offsets = torch.randn(8, 48), torch.randn(2, 48), torch.tensor([0, 3, 8], dtype=torch.int32)
    cases = (
        (lambda: add_expert_bias(y.half(), bias, offsets), "torch.float16"),
        (lambda: add_expert_bias(y, bias[:, :40], offsets), r"bias must be \[E, 48\]"),
        (lambda: add_expert_bias(y.t().contiguous().t(), bias, offsets), "contiguous y"),
        (lambda: add_expert_bias(y, bias, offsets[:2]), r"int32 \[3\]"),
        (lambda: add_expert_bias(y, bias, offsets, torch.rand(7)), r"FP32 \[8\]"),
        (lambda: expert_bias_dgrad(y, bias, offsets, torch.rand(7)), r"\[7\]"),
        (lambda: expert_bias_wgrad(y, offsets, torch.zeros(2, 40)), r"\[2, 40\]"),
        (lambda: expert_bias_wgrad(y.half(), offsets, torch.zeros(2, 48)), "torch.float16"),
        (lambda: expert_bias_wgrad(quantize_columns(y.repeat(2, 1)), offsets, torch.zeros(2, 48)), "multiples of 128"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

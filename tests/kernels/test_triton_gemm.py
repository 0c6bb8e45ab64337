"""The Triton GEMM against FP64 and against the specification, and the proof that it promotes."""

import pytest
import torch
import triton
import triton.language as tl

from fp8moe.kernels.fp8 import E4M3, Fp8Tensor
from fp8moe.kernels.gemm import gemm, wgrad
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows
from fp8moe.kernels.reference import gemm as twin
from fp8moe.kernels.reference import quantize as reference_quantize
from fp8moe.kernels.triton.gemm import descriptor
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data, product_bound
from tests.kernels.tensor_core import tensor_core_dot

# M, N, K with short last tiles in each, one tile, less than one; 576 and 2112 are sizes of DeepSeek-V3.
SHAPES = [(130, 144, 576), (48, 80, 2112), (17, 128, 128), (33, 16, 48)]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("kind", "shape"), [*((kind, SHAPES[0]) for kind in KINDS), *(("normal", shape) for shape in SHAPES[1:])]
)
def test_rows_by_blocks(triton_device, kind, shape):
    m, n, k = shape
    x, w = data(kind, m, k, device=triton_device), data("normal", n, k, device=triton_device)
    a, (b, transposed) = quantize_rows(x), quantize_blocks(w)
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    for dtype in DTYPES:
        out = gemm(a, b, out_dtype=dtype)
        assert out.dtype is dtype and out.is_contiguous()
        assert calc_diff(out, a64 @ b64.T, a64, b64) <= product_bound(dtype, kind, triton_device)
    assert calc_diff(gemm(a, b), twin.gemm(a, b), a64, b64) <= 5e-6
    assert calc_diff(gemm(a, b), x.double() @ w.double().T, x.double(), w.double()) <= 1e-3
    dy = data(kind, m, n, device=triton_device) * 2**-20
    dx = gemm(quantize_rows(dy, amax_floor=1e-30), transposed)
    assert calc_diff(dx, dy.double() @ w.double(), dy.double(), w.double().T) <= 1e-3


@pytest.mark.parametrize("tokens", [16, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_by_columns_are_added(triton_device, kind, tokens):
    dy, x = (data(kind, tokens, size, device=triton_device) for size in (144, 272))
    a, b = quantize_columns(dy, power_of_two=True), quantize_columns(x)
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    start = torch.randn(144, 272, device=triton_device)
    total = start.clone()
    assert gemm(a, b, out_dtype=torch.bfloat16, accumulate=total) is total
    bound = product_bound(torch.float32, kind, triton_device)
    assert calc_diff(total.double() - start.double(), a64 @ b64.T, a64, b64) <= max(bound, 1e-11)
    out = gemm(a, b, out_dtype=torch.float32)
    assert calc_diff(out, a64 @ b64.T, a64, b64) <= bound
    assert calc_diff(out, dy.double().T @ x.double(), dy.double().T, x.double().T) <= 1e-3
    inside = torch.full((272, 200), 7.0, device=triton_device)
    gemm(a, b, accumulate=inside.t()[:144])  # a transposed view: no stride of the output is assumed
    assert calc_diff(inside[:, :144].t() - 7, a64 @ b64.T, a64, b64) <= max(bound, 1e-11)
    assert bool((inside[:, 144:] == 7).all())


def test_operands_may_lie_anyhow(triton_device):
    """Token-major scales, transposed codes, rows inside a wider tensor, an address TMA cannot start at."""
    x, w = data("normal", 130, 272, device=triton_device), data("normal", 144, 272, device=triton_device)
    a, (b, _) = quantize_rows(x), quantize_blocks(w)
    expected = gemm(a, b, out_dtype=torch.float32)
    wide = torch.zeros(130, 480, device=triton_device).to(E4M3)
    wide[:, 16:288] = a.data
    odd = torch.zeros(130 * 272 + 3, device=triton_device).to(E4M3)[3:].view(130, 272).copy_(a.data)
    for codes in (wide[:, 16:288], odd, a.data.t().contiguous().t()):
        for scale in (a.scale, a.scale.contiguous(), a.scale.repeat_interleave(3, 0)[::3]):
            assert torch.equal(gemm(Fp8Tensor(codes, scale), b, out_dtype=torch.float32), expected)
    columns = reference_quantize.quantize_columns(w.t().contiguous())  # codes [144, 272] as a transposed view
    assert not columns.data.is_contiguous()
    both = gemm(a, columns, out_dtype=torch.float32)
    a64, b64 = a.dequantize().double(), columns.dequantize().double()
    assert calc_diff(both, a64 @ b64.T, a64, b64) <= product_bound(torch.float32, "normal", triton_device)


def test_nothing_to_multiply(triton_device):
    b, _ = quantize_blocks(data("normal", 32, 144, device=triton_device))
    assert gemm(quantize_rows(torch.empty(0, 144, device=triton_device)), b).shape == (0, 32)
    a, b = (quantize_columns(torch.empty(0, size, device=triton_device)) for size in (32, 16))
    assert torch.equal(gemm(a, b), torch.zeros(32, 16, dtype=torch.bfloat16, device=triton_device))
    total = torch.ones(32, 16, device=triton_device)
    assert torch.equal(gemm(a, b, accumulate=total), torch.ones(32, 16, device=triton_device))


def test_nan_stays_in_its_row(triton_device):
    x = data("normal", 130, 272, device=triton_device)
    x[129, 271] = float("nan")
    b, _ = quantize_blocks(data("normal", 144, 272, device=triton_device))
    out = gemm(quantize_rows(x), b)
    assert bool(out[129].isnan().all()) and not bool(out[:129].isnan().any())


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("kind", KINDS)
def test_unquantized_wgrad(triton_device, kind, dtypes):
    for tokens, n, k in ((70, 24, 136), (7, 129, 5)):
        dy = data(kind, tokens, n, device=triton_device, dtype=dtypes[0])
        x = data(kind, tokens, k, device=triton_device, dtype=dtypes[1])
        start = torch.randn(n, k, device=triton_device)
        for left, right in ((dy, x), (dy.t().contiguous().t(), x)):
            total = start.clone()
            wgrad(left, right, total)
            exact = dy.double().T @ x.double()
            bound = 1e-11 if triton_device == "cpu" else 1e-10
            assert calc_diff(total.double() - start.double(), exact, dy.double().T, x.double().T) <= bound
    wgrad(dy[:0], x[:0], total)


# Positive numbers and scales constant along K: the data on which 14 bits of accumulator show, and zero-mean data hides.
PROMOTED, UNPROMOTED = 5e-6, 1e-4


def positive_operands(size, k, device):
    operands = []
    for _ in range(2):
        codes = (torch.randn(size, k).abs() * 100).clamp(max=448).to(E4M3)
        operands.append(Fp8Tensor(codes.to(device), torch.full((size, k // 128), 0.3, device=device)))
    a64, b64 = (operand.dequantize().double() for operand in operands)
    return *operands, a64, b64


@triton.jit
def unpromoted_kernel(a, b, out, K, SIZE: tl.constexpr):
    """The same product with the sum left in the tensor core: what the GEMM must not be."""
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, tl.cdiv(K, 128)):
        acc = tl.dot(a.load([0, k * 128]), tl.trans(b.load([0, k * 128])), acc)
    index = tl.arange(0, SIZE)
    tl.store(out + index[:, None] * SIZE + index[None, :], acc * 0.09)


def emulate_the_tensor_core(monkeypatch):
    """Make the interpreter's `tl.dot` keep as many bits as Hopper's FP8 tensor core does."""
    import numpy
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = (
            interpreter._convert_float(side.data, side.dtype, tl.float16, None).view(numpy.float16) for side in (a, b)
        )
        total = tensor_core_dot(torch.from_numpy(left), torch.from_numpy(right).T, torch.from_numpy(d.data))
        return interpreter.TensorHandle(total.float().numpy(), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("b_blocks", [True, False])
def test_the_gemm_promotes(triton_device, b_blocks, monkeypatch):
    """On the CPU through an emulated tensor core, on a GPU through its own: the kernel itself keeps the bound."""
    if triton_device == "cpu":
        emulate_the_tensor_core(monkeypatch)
    a, b, a64, b64 = positive_operands(64, 4096, triton_device)
    if b_blocks:
        b = Fp8Tensor(b.data, b.scale[:1], (128, 128))
    exact = a64 @ b64.T
    assert calc_diff(gemm(a, b, out_dtype=torch.float32), exact, a64, b64) <= PROMOTED
    if b_blocks:
        return
    total = torch.zeros(64, 64, device=triton_device)
    gemm(a, b, accumulate=total)
    assert calc_diff(total, exact, a64, b64) <= PROMOTED
    out = torch.empty(64, 64, device=triton_device)
    unpromoted_kernel[(1,)](descriptor(a.data, 64), descriptor(b.data, 64), out, 4096, SIZE=64)
    assert calc_diff(out, exact, a64, b64) >= UNPROMOTED

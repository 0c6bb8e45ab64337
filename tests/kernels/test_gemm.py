"""FP8 GEMM against FP64 of the dequantized and of the unquantized operands; the unquantized weight gradient."""

import pytest
import torch

from fp8moe.kernels.fp8 import BLOCK_TILE, E4M3, GRADIENT_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.gemm import gemm, wgrad
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows
from fp8moe.kernels.reference import _arithmetic
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data

BOUND = {torch.bfloat16: 5e-6, torch.float32: 1e-12}
# (rows, columns, contraction): short last tiles of N and K, one tile and less than one, many chunks of rows
SHAPES = [(130, 320, 576), (48, 80, 2112), (17, 128, 128), (33, 16, 48), (2600, 144, 256)]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_by_blocks(kind: str, shape: tuple[int, int, int], power_of_two: bool) -> None:
    m, n, k = shape
    x, w = data(kind, m, k), data("normal", n, k)
    a = quantize_rows(x, power_of_two=power_of_two)
    b, transposed = quantize_blocks(w, power_of_two=power_of_two)
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    for dtype, bound in BOUND.items():
        out = gemm(a, b, out_dtype=dtype)
        assert out.dtype is dtype and calc_diff(out, a64 @ b64.T, a64, b64) <= bound
    x64, w64 = x.double(), w.double()
    assert calc_diff(gemm(a, b), x64 @ w64.T, x64, w64) <= 1e-3

    dy = data(kind, m, n) * 2**-20
    g = quantize_rows(dy, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=power_of_two)
    assert calc_diff(gemm(g, transposed), dy.double() @ w64, dy.double(), w64.T) <= 1e-3


@pytest.mark.parametrize("power_of_two", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("tokens", [16, 400, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_by_columns_accumulate(kind: str, tokens: int, power_of_two: tuple[bool, bool]) -> None:
    dy, x = data(kind, tokens, 144), data(kind, tokens, 576)
    a = quantize_columns(dy, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=power_of_two[0])
    b = quantize_columns(x, power_of_two=power_of_two[1])
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    main_grad = torch.zeros(144, 576)
    assert gemm(a, b, accumulate=main_grad) is main_grad
    assert calc_diff(main_grad, a64 @ b64.T, a64, b64) <= BOUND[torch.float32]
    assert calc_diff(main_grad, dy.double().T @ x.double(), dy.double().T, x.double().T) <= 1e-3
    first = main_grad.clone()
    gemm(a, b, accumulate=main_grad)
    torch.testing.assert_close(main_grad, 2 * first, rtol=1e-6, atol=1e-6 * float(first.abs().max()))
    assert calc_diff(gemm(a, b, out_dtype=torch.float32), a64 @ b64.T, a64, b64) <= BOUND[torch.float32]


def test_sums_stay_exact_over_a_long_contraction_of_positive_numbers() -> None:
    """Every product positive, scales constant along K: where an accumulator of few bits would show most."""
    a, b = (Fp8Tensor((torch.randn(64, 4096).abs() * 100).to(E4M3), torch.full((64, 32), 0.3)) for _ in range(2))
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    assert calc_diff(gemm(a, b, out_dtype=torch.float32), a64 @ b64.T, a64, b64) <= BOUND[torch.float32]
    assert calc_diff(gemm(a, b), a64 @ b64.T, a64, b64) <= BOUND[torch.bfloat16]


def test_each_tile_of_k_is_scaled_on_its_own() -> None:
    """Equal codes, scales that differ by tile and row: a scale of the wrong tile or side changes the result."""
    ones = torch.ones(3, 320).to(E4M3)
    a = Fp8Tensor(ones, torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0], [3.0, 30.0, 300.0]]))
    b = Fp8Tensor(torch.ones(144, 320).to(E4M3), torch.tensor([[1.0, 0.1, 0.01], [0.7, 0.0, 0.0]]), BLOCK_TILE)
    out = gemm(a, b, out_dtype=torch.float32)
    torch.testing.assert_close(out[:, :128], torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 128) * (128 + 128 + 64))
    torch.testing.assert_close(out[:, 128:], torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 16) * 128 * 0.7)


def test_the_short_way_and_promotion_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    a = quantize_rows(data("outliers", 300, 576), power_of_two=True)
    b, _ = quantize_blocks(data("normal", 320, 576), power_of_two=True)
    c = quantize_rows(data("normal", 320, 576), power_of_two=True)
    for right in (b, c):
        short = gemm(a, right, out_dtype=torch.float32), gemm(a, right, accumulate=torch.ones(300, 320))
        with monkeypatch.context() as patch:
            patch.setattr(_arithmetic, "_powers_of_two", lambda *operands: False)
            promoted = gemm(a, right, out_dtype=torch.float32), gemm(a, right, accumulate=torch.ones(300, 320))
        for one, other in zip(short, promoted, strict=True):
            assert calc_diff(one, other, a.dequantize(), right.dequantize()) <= BOUND[torch.float32]


@pytest.mark.parametrize("power_of_two", [(False, True), (True, False)])
def test_powers_of_two_on_one_side_only(power_of_two: tuple[bool, bool]) -> None:
    a = quantize_rows(data("positive", 64, 256), power_of_two=power_of_two[0])
    b, _ = quantize_blocks(data("positive", 144, 256), power_of_two=power_of_two[1])
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    for dtype, bound in BOUND.items():
        assert calc_diff(gemm(a, b, out_dtype=dtype), a64 @ b64.T, a64, b64) <= bound


def test_without_fast_bf16_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a = quantize_rows(data("normal", 64, 256), power_of_two=True)
    b, _ = quantize_blocks(data("normal", 144, 256), power_of_two=True)
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    for fast in (False, True):
        monkeypatch.setattr(_arithmetic, "FAST_BF16", fast)
        assert calc_diff(gemm(a, b), a64 @ b64.T, a64, b64) <= BOUND[torch.bfloat16]


def test_nothing_to_multiply() -> None:
    b, _ = quantize_blocks(torch.randn(32, 144))
    assert gemm(quantize_rows(torch.empty(0, 144)), b).shape == (0, 32)
    total = torch.ones(32, 16)
    gemm(quantize_columns(torch.empty(0, 32)), quantize_columns(torch.empty(0, 16)), accumulate=total)
    assert torch.equal(total, torch.ones(32, 16))


def test_nan_reaches_its_row_only() -> None:
    x = data("normal", 16, 256)
    x[3, 200] = float("nan")
    for power_of_two in (False, True):
        b, _ = quantize_blocks(torch.randn(32, 256), power_of_two=power_of_two)
        out = gemm(quantize_rows(x, power_of_two=power_of_two), b)
        assert bool(out[3].isnan().all()) and int(out.isnan().any(dim=1).sum()) == 1


def test_the_precision_of_other_products_is_untouched() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    expected = a @ b
    q, (w, _) = quantize_rows(a), quantize_blocks(b)
    gemm(q, w)
    wgrad(a.bfloat16(), b.bfloat16(), torch.zeros(64, 64))
    with pytest.raises(RuntimeError), _arithmetic.ExactBf16Products():
        torch.mm(a, torch.zeros(3, 3))
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    assert torch.equal(a @ b, expected)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("kind", KINDS)
def test_wgrad(kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dy, x = data(kind, 333, 40, dtype=dtypes[0]), data(kind, 333, 24, dtype=dtypes[1])
    start = torch.randn(40, 24)
    main_grad = start.clone()
    wgrad(dy, x, main_grad)
    exact = dy.double().T @ x.double()
    assert calc_diff(main_grad.double() - start.double(), exact, dy.double().T, x.double().T) <= 1e-11
    untouched = start.clone()
    wgrad(dy[:0], x[:0], untouched)
    assert torch.equal(untouched, start)


def test_wrong_arguments() -> None:
    rows, (blocks, transposed) = quantize_rows(torch.randn(16, 144)), quantize_blocks(torch.randn(32, 144))
    cases = (
        (lambda: gemm(blocks, blocks), r"not \(128, 128\) and \(128, 128\)"),
        (lambda: gemm(rows, transposed), r"of one K, not \[16, 144\] and \[144, 32\]"),
        (lambda: gemm(rows, blocks, out_dtype=torch.float16), "not torch.float16"),
        (lambda: gemm(rows, blocks, accumulate=torch.zeros(16, 32).bfloat16()), r"torch.bfloat16 \[16, 32\]"),
        (lambda: gemm(rows, blocks, accumulate=torch.zeros(32, 16)), r"\[16, 32\] is added into FP32 of its shape"),
        (
            lambda: gemm(rows, quantize_rows(torch.randn(8, 144))),
            "N=8 must be a multiple of 16, which FP8 needs: use 16",
        ),
        (lambda: wgrad(torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(4, 5)), "of one T"),
        (lambda: wgrad(torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(5, 4)), r"\[4, 5\] is added"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_chunks_of_a_weight_gradient_are_those_of_one_product(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dy, x, before = torch.randn(80, 300).to(dtype), torch.randn(80, 48).to(dtype), torch.randn(300, 48)
    whole, chunked = before.clone(), before.clone()
    wgrad(dy, x, whole)
    monkeypatch.setattr("fp8moe.kernels.reference.gemm._TOKENS", 32)
    monkeypatch.setattr("fp8moe.kernels.reference.gemm._OUTPUTS", 128)
    wgrad(dy, x, chunked)
    assert calc_diff(whole - before, dy.double().T @ x.double(), dy.T, x.T) < 1e-12
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-5)

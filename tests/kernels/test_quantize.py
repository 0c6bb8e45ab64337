"""Codes and scales bit-equal to the formula in NumPy; the error bounds; ends, floors, and non-finite values."""

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR, BLOCK_TILE, GRADIENT_AMAX_FLOOR, ROW_TILE, Fp8Tensor
from fp8moe.kernels.quantize import (
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    requantize_columns,
)
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data
from tests.kernels.operands import assert_rounded, codes, quantize_matrix

FLOOR = ACTIVATION_AMAX_FLOOR


def assert_equals(q: Fp8Tensor, expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(q.scale, expected[1])
    assert torch.equal(codes(q), expected[0])


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_columns_equal_the_formula(kind: str, dtype: torch.dtype, power_of_two: bool) -> None:
    x = data(kind, 176, 576, dtype=dtype)
    by_rows = quantize_matrix(x, ROW_TILE, FLOOR, power_of_two)
    by_columns = quantize_matrix(x.t().contiguous(), ROW_TILE, FLOOR, power_of_two)
    assert_equals(quantize_rows(x, power_of_two=power_of_two), by_rows)
    assert_equals(quantize_columns(x, power_of_two=power_of_two), by_columns)
    rows, columns = quantize_rows_and_columns(x, power_of_two=power_of_two)
    assert_equals(rows, by_rows)
    assert_equals(columns, by_columns)
    assert_rounded(rows, x)
    assert calc_diff(rows.dequantize(), x) <= 1e-3


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(144, 2112), (48, 64), (256, 128)])
def test_blocks_equal_the_formula_and_are_transposed_physically(shape: tuple[int, int], power_of_two: bool) -> None:
    w = data("outliers", *shape, dtype=torch.float32)
    q, transposed = quantize_blocks(w, power_of_two=power_of_two)
    assert_equals(q, quantize_matrix(w, BLOCK_TILE, FLOOR, power_of_two))
    assert q.tile == transposed.tile == BLOCK_TILE
    assert transposed.data.is_contiguous() and transposed.shape == (shape[1], shape[0])
    assert torch.equal(transposed.dequantize(), q.dequantize().t())


def test_leading_dims_are_kept() -> None:
    x = data("normal", 2, 3, 144)
    assert torch.equal(codes(quantize_rows(x)), codes(quantize_rows(x.view(6, 144))).view(2, 3, 144))
    assert quantize_rows(x).scale.shape == (2, 3, 2)
    w = data("normal", 3, 144, 80)
    q, transposed = quantize_blocks(w)
    for e in range(3):
        one, one_transposed = quantize_blocks(w[e])
        assert torch.equal(codes(q)[e], codes(one)) and torch.equal(q.scale[e], one.scale)
        assert torch.equal(codes(transposed)[e], codes(one_transposed))
        assert torch.equal(transposed.scale[e], one_transposed.scale)


def test_strided_input() -> None:
    wide = data("normal", 32, 400)
    assert torch.equal(codes(quantize_rows(wide[:, 100:244])), codes(quantize_rows(wide[:, 100:244].contiguous())))
    columns = quantize_columns(wide[:, 100:244])
    assert torch.equal(codes(columns), codes(quantize_columns(wide[:, 100:244].contiguous())))


@pytest.mark.parametrize("k", [16, 128, 400])
def test_no_tokens(k: int) -> None:
    x = torch.empty(0, k, dtype=torch.bfloat16)
    rows, columns = quantize_rows_and_columns(x)
    assert rows.shape == (0, k) and columns.shape == (k, 0)
    assert rows.scale.shape == (0, -(-k // 128)) and columns.scale.shape == (k, 0)
    assert requantize_columns(rows).shape == (k, 0)


def test_many_chunks_equal_one_by_one() -> None:
    x = data("outliers", 2048, 176)
    rows, columns = quantize_rows_and_columns(x)
    for start in range(0, 2048, 128):
        part_rows, part_columns = quantize_rows_and_columns(x[start : start + 128])
        assert torch.equal(codes(rows)[start : start + 128], codes(part_rows))
        assert torch.equal(codes(columns)[:, start : start + 128], codes(part_columns))
        assert torch.equal(columns.scale[:, start // 128], part_columns.scale[:, 0])


def test_input_is_left_alone() -> None:
    x = data("normal", 64, 144, dtype=torch.float32)
    before = x.clone()
    quantize_rows_and_columns(x)
    quantize_rows(x)
    quantize_columns(x)
    quantize_blocks(x)
    assert torch.equal(x, before)


def test_power_of_two_scales_round_up_exactly() -> None:
    amax = torch.cat([448 * 2.0 ** torch.arange(-12, 12), torch.rand(500) * 1000 + 1e-3]).float()
    amax = torch.cat([amax, amax.nextafter(torch.tensor(0.0)), amax.nextafter(torch.tensor(1e9))])
    x = amax[:, None] * torch.ones(1, 16)
    exact, rounded = quantize_rows(x).scale, quantize_rows(x, power_of_two=True).scale
    assert bool((torch.frexp(rounded).mantissa == 0.5).all())
    assert bool((rounded >= exact).all()) and bool((rounded < 2 * exact).all())
    assert torch.equal(rounded[:24, 0], 2.0 ** torch.arange(-12, 12))


def test_nothing_saturates_to_nan_at_the_largest_value() -> None:
    x = (torch.rand(4096, 16) * 100 + 1e-3).float()
    data = quantize_rows(x).data.float()
    assert not bool(data.isnan().any())
    assert torch.equal(data.abs().amax(dim=1), torch.full((4096,), 448.0))


def test_small_gradients_keep_their_codes() -> None:
    dy = data("outliers", 256, 144) * 0.02
    small = dy * 2.0**-40  # exact in BF16
    for reference, shrunk in zip(
        quantize_rows_and_columns(dy, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=True),
        quantize_rows_and_columns(small, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=True),
        strict=True,
    ):
        assert torch.equal(codes(reference), codes(shrunk))
        assert torch.equal(reference.scale * 2.0**-40, shrunk.scale)
    assert float((codes(quantize_rows(small)) & 0x7F == 0).float().mean()) > 0.97  # what the activation floor would do


def test_requantized_gradients_keep_their_codes() -> None:
    dy = data("normal", 256, 144)
    results = []
    for scale in (1.0, 2.0**-40):
        rows = quantize_rows(dy * scale, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=True)
        results.append(requantize_columns(rows, amax_floor=GRADIENT_AMAX_FLOOR))
    assert torch.equal(codes(results[0]), codes(results[1]))
    assert torch.equal(results[0].scale * 2.0**-40, results[1].scale)


@pytest.mark.parametrize("floor", [ACTIVATION_AMAX_FLOOR, GRADIENT_AMAX_FLOOR])
def test_the_floor_bounds_the_scale_of_zeros(floor: float) -> None:
    q = quantize_rows(torch.zeros(2, 16), amax_floor=floor)
    assert torch.equal(q.scale, torch.full((2, 1), floor) / torch.tensor(448.0))
    assert not bool(codes(q).any())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_non_finite_value_poisons_its_tile_and_no_other(bad: float, power_of_two: bool) -> None:
    x = data("normal", 256, 256)
    x[3, 5] = bad
    rows, columns = quantize_rows_and_columns(x, power_of_two=power_of_two)
    blocks, _ = quantize_blocks(x, power_of_two=power_of_two)
    for q, where in ((rows, (3, 0)), (columns, (5, 0)), (blocks, (0, 0))):
        finite = q.scale.isfinite()
        assert not bool(finite[where]) and int((~finite).sum()) == 1
    assert not bool(rows.dequantize()[3, :128].isfinite().any())


@pytest.mark.parametrize("kind", KINDS)
def test_requantize_columns(kind: str) -> None:
    x = data(kind, 400, 208)
    rows = quantize_rows(x, power_of_two=True)
    columns = requantize_columns(rows)
    expected = quantize_matrix(rows.dequantize().t().contiguous(), ROW_TILE, FLOOR, True)
    assert_equals(columns, expected)
    assert calc_diff(columns.dequantize().t(), x) <= 2e-3
    if kind != "outliers":  # where neighbouring tokens differ little, powers of two survive almost untouched
        assert calc_diff(columns.dequantize().t(), rows.dequantize()) <= 1e-5


def test_wrong_arguments() -> None:
    for x, message in (
        (torch.zeros(4, 16, dtype=torch.float16), "got torch.float16"),
        (torch.zeros(16), "at least 2 dims, got 1"),
        (torch.zeros(4, 100), "K=100 must be a multiple of 16, which FP8 needs: use 96"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_rows(x)
    with pytest.raises(ValueError, match="M=24 must be a multiple of 16, which FP8 needs: use 32"):
        quantize_columns(torch.zeros(24, 16))
    with pytest.raises(ValueError, match="got 3 dims"):
        quantize_rows_and_columns(torch.zeros(2, 16, 16))
    with pytest.raises(ValueError, match="N=8 must be a multiple of 16, which FP8 needs: use 16"):
        quantize_blocks(torch.zeros(8, 16))
    with pytest.raises(ValueError, match=r"\(128, 128\)"):
        requantize_columns(quantize_blocks(torch.zeros(16, 16))[0])


def test_a_floor_below_what_a_scale_can_hold_is_refused() -> None:
    x = torch.zeros(16, 16)
    for cast in (quantize_rows, quantize_columns, quantize_rows_and_columns, quantize_blocks):
        with pytest.raises(ValueError, match="amax_floor=1e-31 must be at least 1e-30 for E4M3"):
            cast(x, amax_floor=1e-31)
    with pytest.raises(ValueError, match="amax_floor=nan"):
        requantize_columns(quantize_rows(x), amax_floor=float("nan"))

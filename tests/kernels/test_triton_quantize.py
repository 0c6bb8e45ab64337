"""The Triton casts, bit for bit against the specification: every tile short or full, every rounding, every layout."""

import pytest
import torch

from fp8moe.kernels.fp8 import GRADIENT_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.quantize import (
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    requantize_columns,
)
from fp8moe.kernels.reference import quantize as twin
from tests.kernels.device_cases import assert_same, data

SHAPES = [(144, 272), (16, 16), (16, 576), (256, 128)]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape"), [("outliers", SHAPES[0]), *(("normal", shape) for shape in SHAPES[1:])])
def test_casts_are_the_specification(triton_device, kind, shape, dtype, power_of_two):
    x = data(kind, *shape, device=triton_device, dtype=dtype)
    rows, columns = quantize_rows_and_columns(x, power_of_two=power_of_two)
    expected_rows, expected_columns = twin.quantize_rows_and_columns(x, power_of_two=power_of_two)
    assert_same(rows, expected_rows)
    assert_same(columns, expected_columns)
    assert_same(quantize_rows(x, power_of_two=power_of_two), expected_rows)
    assert_same(quantize_columns(x, power_of_two=power_of_two), expected_columns)
    for block, expected in zip(
        quantize_blocks(x, power_of_two=power_of_two), twin.quantize_blocks(x, power_of_two=power_of_two), strict=True
    ):
        assert_same(block, expected)
    assert_same(requantize_columns(rows), twin.requantize_columns(expected_rows))


def test_layouts_are_what_a_tensor_core_reads(triton_device):
    x = data("normal", 144, 272, device=triton_device)
    rows, columns = quantize_rows_and_columns(x)
    for q in (rows, columns, quantize_rows(x), quantize_columns(x), requantize_columns(rows)):
        assert q.data.is_contiguous() and q.scale.stride(0) == 1 and q.scale_layout == "m_major"
    blocks, transposed = quantize_blocks(x)
    assert blocks.data.is_contiguous() and transposed.data.is_contiguous() and transposed.scale.is_contiguous()
    assert torch.equal(transposed.data.view(torch.uint8), blocks.data.view(torch.uint8).t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_leading_shape_and_stride(triton_device, dtype):
    x = data("normal", 2, 3, 40, 144, device=triton_device, dtype=dtype)
    rows, expected = quantize_rows(x), twin.quantize_rows(x)
    assert rows.shape == x.shape and rows.scale.shape == (2, 3, 40, 2)
    assert_same(rows, expected)
    experts = x[:, :, :32]
    for block, wanted in zip(quantize_blocks(experts), twin.quantize_blocks(experts), strict=True):
        assert block.shape[:2] == (2, 3)
        assert_same(block, wanted)
    wide = data("normal", 48, 288, device=triton_device, dtype=dtype)
    odd = data("normal", 48, 290, device=triton_device, dtype=dtype)[:, :144]
    for view in (wide[:, 16:160], wide.t(), wide[::3][:, ::2], wide[:1].expand(32, 288), odd):
        assert_same(quantize_rows(view), twin.quantize_rows(view.contiguous()))
        assert_same(quantize_columns(view), twin.quantize_columns(view.contiguous()))
        for block, wanted in zip(quantize_blocks(view), twin.quantize_blocks(view.contiguous()), strict=True):
            assert_same(block, wanted)


def test_rows_in_either_scale_layout_and_orientation_are_requantized(triton_device):
    x = data("outliers", 144, 272, device=triton_device)
    expected = twin.requantize_columns(twin.quantize_rows(x))
    rows = quantize_rows(x)
    token_major = Fp8Tensor(rows.data, rows.scale.contiguous())
    transposed = Fp8Tensor(rows.data.t().contiguous().t(), rows.scale)
    for source in (rows, token_major, transposed):
        assert_same(requantize_columns(source), expected)
    tiny = data("normal", 128, 128, device=triton_device) * 2.0**-60
    rows = quantize_rows(tiny, amax_floor=GRADIENT_AMAX_FLOOR)
    columns = requantize_columns(rows, amax_floor=GRADIENT_AMAX_FLOOR)
    assert_same(columns, twin.requantize_columns(rows, amax_floor=GRADIENT_AMAX_FLOOR))
    assert bool((columns.data.view(torch.uint8) & 0x7F).any())


def test_a_row_that_is_not_finite_leaves_others_alone_where_a_block_of_tokens_is_short(triton_device):
    """The places of a block beyond M hold zeros, whatever the scale of a token before them."""
    x = data("normal", 144, 64, device=triton_device)
    rows = twin.quantize_rows(x)
    rows.scale[140] = float("inf")
    rows.data.view(torch.uint8)[140, 32:] = 0x3A
    expected, columns = twin.requantize_columns(rows), requantize_columns(rows)
    assert bool(expected.scale[32:, 1].isinf().all())
    assert torch.equal(columns.scale.nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))


@pytest.mark.parametrize("shape", [(0, 144), (32, 0)])
def test_nothing_to_cast(triton_device, shape):
    x = torch.empty(*shape, device=triton_device)
    rows, columns = quantize_rows_and_columns(x)
    assert rows.shape == shape and columns.shape == shape[::-1]
    assert quantize_rows(x).scale.shape == rows.scale.shape
    assert [q.shape for q in quantize_blocks(x)] == [shape, shape[::-1]]
    assert requantize_columns(rows).shape == shape[::-1]


def test_every_rounding(triton_device):
    """Each E4M3 number, each midpoint of two, and their neighbours in FP32, of both signs, at scale one."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    midpoints = ((codes[1:] + codes[:-1]) / 2).float()
    centres = torch.cat([codes.float(), midpoints])
    around = [centres, *(centres.nextafter(torch.tensor(limit)) for limit in (-1e9, 1e9))]
    values = torch.cat([sign * value for value in around for sign in (1, -1)]).clamp(-448, 448)
    run = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    x = torch.cat([run, torch.full((len(run), 1), 448.0)], dim=1).to(triton_device)
    rows = quantize_rows(x)
    assert bool((rows.scale == 1).all())
    assert_same(rows, twin.quantize_rows(x))
    step = torch.exp2(x.abs().double().clamp(min=2.0**-6).log2().floor() - 3)
    assert bool(((rows.data.double() - x.double()).abs() <= step / 2 * (1 + 1e-6)).all())
    wide = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16))
    assert_same(quantize_columns(wide.t().contiguous()), twin.quantize_columns(wide.t().contiguous()))


def test_zeros_and_what_is_not_finite(triton_device):
    x = data("normal", 144, 272, device=triton_device)
    x[3], x[5, 7], x[20, 200], x[30, 9], x[40, 130] = 0, float("nan"), float("inf"), -float("inf"), -float("nan")
    for power_of_two in (False, True):
        for ours, theirs in (
            (quantize_rows(x, power_of_two=power_of_two), twin.quantize_rows(x, power_of_two=power_of_two)),
            (quantize_columns(x, power_of_two=power_of_two), twin.quantize_columns(x, power_of_two=power_of_two)),
        ):
            finite = theirs.scale.isfinite()
            assert torch.equal(ours.scale.isfinite(), finite) and not bool(finite.all())
            assert torch.equal(ours.scale[finite], theirs.scale[finite])
            kept = finite.repeat_interleave(128, dim=1)[:, : theirs.shape[1]]
            for q in (ours, theirs):
                assert bool(q.dequantize()[kept].isfinite().all())
            assert torch.equal(ours.dequantize()[kept], theirs.dequantize()[kept])


def test_a_gradient_of_any_size_has_the_same_codes(triton_device):
    dy = data("normal", 144, 128, device=triton_device)
    ours = [quantize_rows_and_columns(dy * s, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=True) for s in (1, 2.0**-20)]
    for one, other in zip(*ours, strict=True):
        assert torch.equal(one.data.view(torch.uint8), other.data.view(torch.uint8))
        assert torch.equal(one.scale * 2.0**-20, other.scale)

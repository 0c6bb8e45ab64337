"""Grouped BF16 and FP32 products on a device: every group against FP64, groups that start anywhere, rows of nobody."""

import itertools

import pytest
import torch

from fp8moe.kernels.gemm import wgrad
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.kernels.reference import grouped_mm as twin
from fp8moe.kernels.tiles import production_tiles
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data, offsets_of
from tests.kernels.sm90_cases import chosen

DTYPES = (torch.bfloat16, torch.float32)
TILES = production_tiles("triton", "grouped_mm_wgrad")
SIZES = [3, 0, 64, 0, 87]  # tokens: fewer than a step has, one step, a step and a part; 16 more rows are nobody's


def bound(dtype, device):
    """Of outputs in a dtype; a GPU's tensor core doesn't round each FP32 sum to nearest."""
    return 5e-6 if dtype is torch.bfloat16 else 1e-12 if device == "cpu" else 1e-11


def operands(kind, device, dtype, n=72, k=136):
    """x, w and dy of SIZES, NaN in the rows of nobody."""
    rows = sum(SIZES) + 16
    x, dy = (data(kind, rows, size, device=device, dtype=dtype) for size in (k, n))
    x[sum(SIZES) :], dy[sum(SIZES) :] = float("nan"), float("nan")
    return x, data("normal", len(SIZES), n, k, device=device, dtype=dtype), dy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_group_has_its_weight(triton_device, kind, dtype):
    x, w, dy = operands(kind, triton_device, dtype)
    offsets = offsets_of(SIZES, triton_device)
    for a, b in ((x, w), (dy, w.mT)):  # Fprop, and Dgrad by a transposed view
        out = grouped_mm(a, b, offsets)
        assert out.dtype is dtype and out.is_contiguous() and out.shape == (len(a), b.shape[1])
        assert torch.equal(out[sum(SIZES) :], torch.zeros_like(out[sum(SIZES) :]))
        for e, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
            a64, b64 = a[start:stop].double(), b[e].double()
            assert start == stop or calc_diff(out[start:stop], a64 @ b64.T, a64, b64) <= bound(dtype, triton_device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_that_lie_anyhow(triton_device, dtype):
    """Sizes that are no multiple of 16 bytes, rows inside a wider tensor, an odd address, weights spread out."""
    offsets = offsets_of(SIZES, triton_device)
    for n, k in ((72, 136), (13, 21), (13, 24)):
        x, w, dy = operands("normal", triton_device, dtype, n, k)
        expected, total = twin.grouped_mm(x, w, offsets), torch.zeros(len(SIZES), n, k, device=triton_device)
        back = twin.grouped_mm(dy, w.mT, offsets)
        twin.grouped_mm_wgrad(dy, x, offsets, total)
        wide = torch.full((len(x), 2 * k + 3), float("nan"), dtype=dtype, device=triton_device)
        wide[:, 3 : 3 + k] = x
        spread = torch.stack([w, w], 1)[:, 0]
        columns = x.t().contiguous().t()
        odd = torch.empty(x.numel() + 1, dtype=dtype, device=triton_device)[1:].view(x.shape).copy_(x)
        for a, b in ((x, spread), (wide[:, 3 : 3 + k], w), (columns, w.mT.contiguous().mT), (odd, w)):
            assert calc_diff(grouped_mm(a, b, offsets), expected) <= 2 * bound(dtype, triton_device)
            ours = torch.zeros_like(total)
            grouped_mm_wgrad(dy, a, offsets, ours)
            assert calc_diff(ours, total) <= 1e-11
        assert calc_diff(grouped_mm(dy, spread.mT, offsets), back) <= 2 * bound(dtype, triton_device)


def test_without_rows_or_groups(triton_device):
    for dtype in DTYPES:
        w = data("normal", 2, 24, 40, device=triton_device, dtype=dtype)
        x = torch.full((5, 40), float("nan"), dtype=dtype, device=triton_device)
        none = offsets_of([0, 0], triton_device)
        assert grouped_mm(x[:0], w, none).shape == (0, 24)
        assert torch.equal(grouped_mm(x, w, none), torch.zeros(5, 24, dtype=dtype, device=triton_device))
        assert not bool(grouped_mm(x, w[:0], none[:1]).any())
        grouped_mm_wgrad(x[:0, :24], x[:0], none, torch.zeros(2, 24, 40, device=triton_device))


def test_more_groups_than_a_tile_of_them(triton_device):
    """The search for a tile's group runs over every group, however many are empty."""
    sizes = [0] * 33
    sizes[5], sizes[31] = 70, 3
    x = data("normal", 75, 24, device=triton_device, dtype=torch.float32)
    w = data("normal", 33, 16, 24, device=triton_device, dtype=torch.float32)
    out = grouped_mm(x, w, offsets_of(sizes, triton_device))
    exact = torch.cat([x[:70].double() @ w[5].double().T, x[70:73].double() @ w[31].double().T])
    assert calc_diff(out[:73], exact) <= bound(torch.float32, triton_device) and not bool(out[73:].any())


@pytest.mark.parametrize(("kind", "tile"), [("normal", TILES[0]), ("positive", TILES[-1]), ("outliers", TILES[-1])])
def test_each_group_contracts_over_its_tokens(triton_device, kind, tile):
    x, _, dy = operands(kind, triton_device, torch.bfloat16, n=136, k=144)
    offsets, total = offsets_of(SIZES, triton_device), torch.zeros(len(SIZES), 136, 144, device=triton_device)
    with chosen(tile):
        grouped_mm_wgrad(dy, x, offsets, total)
        once = total.clone()
        grouped_mm_wgrad(dy, x, offsets, total)
    assert torch.equal(total, 2 * once)
    for e, (first, last) in enumerate(itertools.pairwise(offsets.tolist())):
        left, right = dy[first:last].double().T, x[first:last].double().T
        if first == last:
            assert not bool(once[e].any())
        else:
            assert calc_diff(once[e], left @ right.T, left, right) <= bound(torch.float32, triton_device)


def test_mixed_precisions_multiply_in_fp32(triton_device):
    x, _, dy = operands("normal", triton_device, torch.float32)
    offsets = offsets_of(SIZES, triton_device)
    for left, right in ((dy, x), (dy.bfloat16(), x), (dy, x.bfloat16())):
        total = torch.zeros(len(SIZES), 72, 136, device=triton_device)
        grouped_mm_wgrad(left, right, offsets, total)
        for e, (first, last) in enumerate(itertools.pairwise(offsets.tolist())):
            exact = left[first:last].double().T @ right[first:last].double()
            assert first == last or calc_diff(total[e], exact) <= 1e-11


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_group_is_not_even_touched(triton_device, dtype):
    """Not even read and written back: a signalling NaN lies there, which no addition leaves as it is."""
    odd = torch.full((2, 16, 16), 0x7F80BEEF, dtype=torch.int32, device=triton_device).view(torch.float32)
    x = data("normal", 30, 16, device=triton_device, dtype=dtype)
    total = odd.clone()
    total[1] = 0
    grouped_mm_wgrad(x, x, offsets_of([0, 30], triton_device), total)
    assert torch.equal(total[0].view(torch.int32), odd[0].view(torch.int32)) and bool(total[1].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_lie_anyhow(triton_device, dtype):
    x, _, dy = operands("normal", triton_device, dtype)
    offsets = offsets_of(SIZES, triton_device)
    expected = torch.zeros(len(SIZES), 72, 136, device=triton_device)
    grouped_mm_wgrad(dy, x, offsets, expected)
    inside = torch.full((len(SIZES), 150, 90), 3.0, device=triton_device)
    total = inside.transpose(1, 2)[:, :72, :136]
    total.zero_()
    grouped_mm_wgrad(dy, x, offsets, total)
    assert torch.equal(total, expected)
    assert bool((inside[:, 136:] == 3).all() and (inside[:, :, 72:] == 3).all())


@pytest.mark.parametrize("tokens", [1, 64, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_weight_gradient_has_one_group(triton_device, dtype, tokens):
    dy, x = (data("normal", tokens, size, device=triton_device, dtype=dtype) for size in (72, 136))
    total, grouped = torch.ones(72, 136, device=triton_device), torch.ones(1, 72, 136, device=triton_device)
    wgrad(dy, x, total)
    grouped_mm_wgrad(dy, x, offsets_of([tokens], triton_device), grouped)
    assert torch.equal(total, grouped[0])
    assert calc_diff(total.double() - 1, dy.double().T @ x.double(), dy.double().T, x.double().T) <= 1e-10

"""The grouped Triton weight gradient: each expert contracts over its own tokens and is added into FP32."""

import itertools

import pytest
import torch

from fp8moe.kernels.fp8 import GRADIENT_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.grouped_gemm import grouped_wgrad
from fp8moe.kernels.quantize import quantize_columns, quantize_rows, requantize_columns
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data, offsets_of, product_bound


@pytest.mark.parametrize(
    ("kind", "sizes", "extra"),
    [
        *((kind, [128, 0, 256], 0) for kind in KINDS),
        *(("normal", *groups) for groups in (([0, 128], 32), ([0, 0], 48), ([256], 0))),
    ],
)
def test_each_group_contracts_over_its_tokens(triton_device, kind, sizes, extra):
    offsets, rows = offsets_of(sizes, triton_device), sum(sizes) + extra
    dy, x = data(kind, rows, 144, device=triton_device), data(kind, rows, 272, device=triton_device)
    dy[sum(sizes) :] = float("nan")  # tokens past the last group are not read
    dy_columns = quantize_columns(dy, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=True)
    received = quantize_rows(x, power_of_two=True)
    x_columns = requantize_columns(received)
    start = torch.randn(len(sizes), 144, 272, device=triton_device)
    total = start.clone()
    grouped_wgrad(dy_columns, x_columns, offsets, total)
    a64, b64 = dy_columns.dequantize().double(), x_columns.dequantize().double()
    bound = max(product_bound(torch.float32, kind, triton_device), 1e-11)
    for e, (first, last) in enumerate(itertools.pairwise(offsets.tolist())):
        if first == last:
            assert torch.equal(total[e], start[e])
            continue
        a, b = a64[:, first:last], b64[:, first:last]
        added = total[e].double() - start[e].double()
        assert calc_diff(added, a @ b.T, a, b) <= bound
        left, right = dy[first:last].double().T, x[first:last].double().T
        assert calc_diff(added, left @ right.T, left, right) <= 2e-3


def test_an_empty_group_is_not_even_touched(triton_device):
    """Not even read and written back: a signalling NaN lies there, which no addition leaves as it is."""
    odd = torch.full((2, 16, 16), 0x7F80BEEF, dtype=torch.int32, device=triton_device).view(torch.float32)
    columns = quantize_columns(data("normal", 128, 16, device=triton_device))
    total = odd.clone()
    total[1] = 0
    grouped_wgrad(columns, columns, offsets_of([0, 128], triton_device), total)
    assert torch.equal(total[0].view(torch.int32), odd[0].view(torch.int32)) and bool(total[1].isfinite().all())
    grouped_wgrad(columns, columns, offsets_of([0, 0], triton_device), total)
    nothing = quantize_columns(torch.empty(0, 16, device=triton_device))
    grouped_wgrad(nothing, nothing, offsets_of([0, 0], triton_device), total)
    assert torch.equal(total[0].view(torch.int32), odd[0].view(torch.int32))


def test_operands_and_sums_that_lie_anyhow(triton_device):
    dy, x = (data("normal", 256, size, device=triton_device) for size in (144, 80))
    offsets = offsets_of([128, 128], triton_device)
    a, b = quantize_columns(dy), quantize_columns(x)
    expected = torch.zeros(2, 144, 80, device=triton_device)
    grouped_wgrad(a, b, offsets, expected)
    views = [Fp8Tensor(q.data.t().contiguous().t(), q.scale.contiguous()) for q in (a, b)]
    inside = torch.full((2, 100, 160), 3.0, device=triton_device)
    total = inside.transpose(1, 2)[:, :144, :80]
    total.zero_()
    grouped_wgrad(*views, offsets, total)
    assert torch.equal(total, expected)
    assert bool((inside[:, 80:] == 3).all() and (inside[:, :, 144:] == 3).all())

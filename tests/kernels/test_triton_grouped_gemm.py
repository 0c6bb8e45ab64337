"""The grouped Triton GEMM: every expert's rows against FP64, empty groups, rows that belong to nobody."""

import itertools

import pytest
import torch

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.grouped_gemm import grouped_gemm
from fp8moe.kernels.quantize import quantize_blocks, quantize_rows
from fp8moe.kernels.reference import grouped_gemm as twin
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data, offsets_of, product_bound

# Sizes of the groups, and rows after the last one.
GROUPS = [([128, 0, 256], 0), ([0, 0, 384], 32), ([0, 0], 48), ([256], 0), ([0, 128, 0], 0)]


@pytest.mark.parametrize(
    ("kind", "sizes", "extra"),
    [*((kind, *GROUPS[0]) for kind in KINDS), *(("normal", *groups) for groups in GROUPS[1:])],
)
def test_each_group_has_its_weight(triton_device, kind, sizes, extra):
    offsets, rows, n, k = offsets_of(sizes, triton_device), sum(sizes) + extra, 144, 272
    x, w = data(kind, rows, k, device=triton_device), data("normal", len(sizes), n, k, device=triton_device)
    x[sum(sizes) :] = float("nan")  # whatever stands there must not show
    a, (b, _) = quantize_rows(x), quantize_blocks(w)
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    for dtype in (torch.bfloat16, torch.float32):
        out = grouped_gemm(a, b, offsets, out_dtype=dtype)
        assert out.dtype is dtype and out.shape == (rows, n)
        for e, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
            exact = a64[start:stop] @ b64[e].T
            bound = product_bound(dtype, kind, triton_device)
            assert calc_diff(out[start:stop], exact, a64[start:stop], b64[e]) <= bound
            against = x[start:stop].double() @ w[e].double().T
            assert calc_diff(out[start:stop], against, x[start:stop].double(), w[e].double()) <= 1e-3
        assert not bool(out[sum(sizes) :].any())
        expected = twin.grouped_gemm(a, b, offsets, out_dtype=dtype)
        assert calc_diff(out[: sum(sizes)], expected[: sum(sizes)]) <= 5e-6


def test_dgrad_and_operands_that_lie_anyhow(triton_device):
    offsets = offsets_of([128, 128], triton_device)
    dy, w = data("normal", 256, 176, device=triton_device), data("normal", 2, 176, 272, device=triton_device)
    a, (_, transposed) = quantize_rows(dy), quantize_blocks(w)
    expected = grouped_gemm(a, transposed, offsets, out_dtype=torch.float32)
    exact = torch.cat([dy[:128].double() @ w[0].double(), dy[128:].double() @ w[1].double()])
    assert calc_diff(expected, exact) <= 1e-3
    token_major = Fp8Tensor(a.data.t().contiguous().t(), a.scale.contiguous())
    experts = [torch.stack([part, part], 1)[:, 0] for part in (transposed.data.view(torch.uint8), transposed.scale)]
    spread = Fp8Tensor(experts[0].view(torch.float8_e4m3fn), experts[1], transposed.tile)
    assert not spread.data.is_contiguous()
    assert torch.equal(grouped_gemm(token_major, spread, offsets, out_dtype=torch.float32), expected)


def test_more_groups_than_a_tile_of_them(triton_device):
    """The search for a row's group runs over every group, however many are empty."""
    sizes = [0] * 33
    sizes[5], sizes[31] = 128, 128
    w = data("normal", 33, 16, 128, device=triton_device)
    x = data("normal", 256, 128, device=triton_device)
    out = grouped_gemm(quantize_rows(x), quantize_blocks(w)[0], offsets_of(sizes, triton_device))
    exact = torch.cat([x[:128].double() @ w[5].double().T, x[128:].double() @ w[31].double().T])
    assert calc_diff(out, exact) <= 1e-3


def test_no_rows(triton_device):
    b, _ = quantize_blocks(data("normal", 2, 16, 128, device=triton_device))
    a = quantize_rows(torch.empty(0, 128, device=triton_device))
    assert grouped_gemm(a, b, offsets_of([0, 0], triton_device)).shape == (0, 16)

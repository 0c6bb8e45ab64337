"""cuBLASLt's operands: the layouts it demands, everywhere; its product, on a Hopper GPU."""

import pytest
import torch

from fp8moe.kernels.fp8 import E4M3
from fp8moe.kernels.quantize import quantize_blocks, quantize_rows
from tests.distance import calc_diff


def test_rows_are_padded_to_four_and_scales_lie_m_major():
    from fp8moe.kernels.cublas.gemm import padded_rows

    q = quantize_rows(torch.randn(6, 400))
    codes, scale = padded_rows(q)
    assert codes.shape == (8, 400) and codes.dtype is E4M3 and codes.is_contiguous()
    assert scale.shape == (8, 4) and scale.stride() == (1, 8)
    assert torch.equal(codes[:6].view(torch.uint8), q.data.view(torch.uint8)) and torch.equal(scale[:6], q.scale)
    assert not codes[6:].view(torch.uint8).any() and not scale[6:].any()


def test_block_scales_are_padded_to_four_along_k():
    from fp8moe.kernels.cublas.gemm import block_scales

    blocks, _ = quantize_blocks(torch.randn(272, 640))
    scale = block_scales(blocks.scale)
    assert scale.shape == (8, 3) and scale.stride() == (1, 8)
    assert torch.equal(scale[:5], blocks.scale.t()) and not scale[5:].any()


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(256, 512, 1024), (130, 576, 2112)])
def test_the_product_is_that_of_the_dequantized_operands(m, n, k):
    from fp8moe.kernels import backend
    from fp8moe.kernels.gemm import gemm

    if reason := backend.why_not("cublas"):
        pytest.skip(reason)
    a, b = quantize_rows(torch.randn(m, k, device="cuda")), quantize_blocks(torch.randn(n, k, device="cuda"))[0]
    exact = a.dequantize().double() @ b.dequantize().double().t()
    backend.set_backend("cublas")
    try:
        total = torch.ones(m, n, device="cuda")
        assert calc_diff(gemm(a, b), exact, a.dequantize(), b.dequantize()) <= 5e-6
        assert calc_diff(gemm(a, b, accumulate=total), exact + 1) <= 1e-5
    finally:
        backend.set_backend(None)

"""The Hopper kernels on a Hopper GPU: values against FP64 and against Triton, ragged groups, and bit-equal repetition.

Gluon has no interpreter: without a GPU only the compile gate (`test_sm90`) and the launchers' refusals are tested.
"""

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.gemm import gemm
from fp8moe.kernels.grouped_gemm import grouped_gemm
from fp8moe.kernels.grouped_wgrad import grouped_wgrad
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data, offsets_of, product_bound

SIZES = [(256, 256, 512), (4096, 2112, 7168), (4096, 7168, 2112), (4096, 576, 512), (130, 1536, 16), (1, 272, 4096)]
GROUPS = [[128, 0, 384, 1024], [0, 0, 0], [4096, 2048, 8192, 0, 128], [128] * 16]
REPEATS = 20


@pytest.fixture
def hopper():
    """The device, with the Gluon back end in force and unwritten memory full of NaN; skips where it can't run."""
    if reason := backend.why_not("gluon"):
        pytest.skip(reason)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    backend.set_backend("gluon")
    yield "cuda"
    backend.set_backend(None)
    torch.use_deterministic_algorithms(False)


def exact(a: Fp8Tensor, b: Fp8Tensor) -> torch.Tensor:
    return a.dequantize().double() @ b.dequantize().double().mT


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_rows_by_blocks(hopper, m, n, k, kind):
    a = quantize_rows(data(kind, m, k, device=hopper))
    b = quantize_blocks(data("normal", n, k, device=hopper))[0]
    expected = exact(a, b)
    scale = a.dequantize(), b.dequantize()
    for dtype in (torch.bfloat16, torch.float32):
        assert calc_diff(gemm(a, b, out_dtype=dtype), expected, *scale) <= product_bound(dtype, kind, hopper)
    total = torch.randn(m, n, device=hopper)
    expected += total
    assert gemm(a, b, accumulate=total) is total
    assert calc_diff(total, expected, *scale) <= product_bound(torch.float32, kind, hopper)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k", "t"), [(2112, 7168, 4096), (576, 512, 1040), (256, 16, 128), (7168, 2048, 16384)])
def test_columns_by_columns(hopper, n, k, t, kind):
    a, b = (quantize_columns(data(kind, t, size, device=hopper)) for size in (n, k))
    expected = exact(a, b)
    scale = a.dequantize(), b.dequantize()
    bound = product_bound(torch.float32, kind, hopper)
    assert calc_diff(gemm(a, b, out_dtype=torch.float32), expected, *scale) <= bound
    total = torch.zeros(n, k, device=hopper)
    assert calc_diff(gemm(a, b, accumulate=total), expected, *scale) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", GROUPS)
@pytest.mark.parametrize(("n", "k"), [(4096, 7168), (7168, 2048), (576, 272)])
def test_grouped(hopper, sizes, n, k):
    offsets, rest = offsets_of(sizes, hopper), 200  # rows that belong to nobody
    r = int(offsets[-1]) + rest
    x, dy = data("normal", r, k, device=hopper), data("normal", r - rest, n, device=hopper)
    a, b = quantize_rows(x), quantize_blocks(data("normal", len(sizes), n, k, device=hopper))[0]
    y = grouped_gemm(a, b, offsets)
    assert not y[r - rest :].any()
    before = torch.randn(len(sizes), n, k, device=hopper)
    total = before.clone()
    if r > rest:
        grouped_wgrad(quantize_columns(dy), quantize_columns(x[: r - rest].contiguous()), offsets, total)
    for e, size in enumerate(sizes):
        rows = slice(int(offsets[e]), int(offsets[e]) + size)
        if size == 0:
            assert torch.equal(total[e], before[e])
            continue
        own = quantize_rows(x[rows])
        weight = Fp8Tensor(b.data[e], b.scale[e], b.tile)
        assert calc_diff(y[rows], exact(own, weight), own.dequantize(), weight.dequantize()) <= 5e-6
        left, right = quantize_columns(dy[rows].contiguous()), quantize_columns(x[rows].contiguous())
        change = total[e].double() - before[e].double()
        assert calc_diff(change, exact(left, right), left.dequantize(), right.dequantize()) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("sms", [None, 112, 1])
def test_repetition_and_the_number_of_sms_change_no_bit(hopper, sms):
    from fp8moe.kernels.gluon.launch import limit_sms

    m, n, k = (512, 512, 1024) if sms == 1 else (4096, 7168, 2048)
    a, b = quantize_rows(torch.randn(m, k, device=hopper)), quantize_blocks(torch.randn(n, k, device=hopper))[0]
    left, right = quantize_columns(torch.randn(m, n, device=hopper)), quantize_columns(torch.randn(m, k, device=hopper))
    first = gemm(a, b), gemm(left, right, out_dtype=torch.float32)
    limit_sms(sms)
    try:
        for _ in range(REPEATS):
            assert torch.equal(gemm(a, b), first[0])
            assert torch.equal(gemm(left, right, out_dtype=torch.float32), first[1])
    finally:
        limit_sms(None)


def test_a_limit_of_no_sms_is_refused():
    pytest.importorskip("triton")
    from fp8moe.kernels.gluon.launch import limit_sms, num_sms

    with pytest.raises(ValueError, match=r"at least 1 SM, limit_sms got 0"):
        limit_sms(0)
    limit_sms(112)
    try:
        assert num_sms(torch.device("cpu")) == 112
    finally:
        limit_sms(None)
    assert num_sms(torch.device("cpu")) == 132

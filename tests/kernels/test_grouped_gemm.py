"""Grouped FP8 GEMM: ragged and empty groups, rows past the last group, against FP64."""

import itertools

import pytest
import torch

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.gemm import gemm
from fp8moe.kernels.grouped_gemm import grouped_gemm
from fp8moe.kernels.quantize import quantize_blocks, quantize_rows
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data

OFFSETS = [0, 128, 128, 512, 896, 896]  # five experts, two without rows


def int32(offsets: list[int]) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_against_fp64(kind: str, power_of_two: bool) -> None:
    x, w = data(kind, 1024, 576), data("normal", 5, 144, 576)
    x[896:] = float("nan")  # past the last group: never read
    a = quantize_rows(x, power_of_two=power_of_two)
    b, transposed = quantize_blocks(w, power_of_two=power_of_two)
    out = grouped_gemm(a, b, int32(OFFSETS))
    exact = grouped_gemm(a, b, int32(OFFSETS), out_dtype=torch.float32)
    assert not bool(out[896:].any()) and not bool(exact[896:].any())
    for e, (start, stop) in enumerate(itertools.pairwise(OFFSETS)):
        if start == stop:
            continue
        rows = slice(start, stop)
        a64, b64 = a.dequantize()[rows].double(), b.dequantize()[e].double()
        assert calc_diff(out[rows], a64 @ b64.T, a64, b64) <= 5e-6
        assert calc_diff(exact[rows], a64 @ b64.T, a64, b64) <= 1e-12
        x64, w64 = x[rows].double(), w[e].double()
        assert calc_diff(out[rows], x64 @ w64.T, x64, w64) <= 1e-3
        part = Fp8Tensor(a.data[rows], a.scale[rows])
        assert torch.equal(out[rows], gemm(part, Fp8Tensor(b.data[e], b.scale[e], b.tile)))

    dy = data(kind, 896, 144)
    dx = grouped_gemm(quantize_rows(dy, power_of_two=power_of_two), transposed, int32(OFFSETS))
    dy64, w64 = dy[128:512].double(), w[2].double()
    assert calc_diff(dx[128:512], dy64 @ w64, dy64, w64.T) <= 1e-3


def test_without_rows() -> None:
    b, _ = quantize_blocks(torch.randn(2, 32, 144))
    assert grouped_gemm(quantize_rows(torch.empty(0, 144)), b, int32([0, 0, 0])).shape == (0, 32)
    assert not bool(grouped_gemm(quantize_rows(torch.randn(128, 144)), b, int32([0, 0, 0])).any())


def test_wrong_arguments() -> None:
    a, (b, transposed) = quantize_rows(torch.randn(256, 144)), quantize_blocks(torch.randn(2, 32, 144))
    offsets = int32([0, 128, 256])
    cases = (
        (lambda: grouped_gemm(a, a, offsets), r"b by \(128, 128\) tiles"),
        (lambda: grouped_gemm(a, transposed, offsets), r"\[256, 144\] and \[2, 144, 32\]"),
        (lambda: grouped_gemm(a, b, offsets, out_dtype=torch.float64), "not torch.float64"),
        (lambda: grouped_gemm(a, b, int32([0, 100, 256])), "multiples of 128"),
        (lambda: grouped_gemm(a, b, int32([0, 256])), "2 groups"),
        (lambda: grouped_gemm(a, b, int32([0, 128, 384])), "at most 256"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

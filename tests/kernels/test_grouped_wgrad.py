"""Grouped FP8 weight gradient: each group contracts over its own tokens, accumulated, against FP64."""

import itertools

import pytest
import torch

from fp8moe.kernels.fp8 import GRADIENT_AMAX_FLOOR
from fp8moe.kernels.grouped_gemm import grouped_wgrad
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data

OFFSETS = [0, 128, 128, 512, 896, 896]


def int32(offsets: list[int]) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_against_fp64(kind: str, power_of_two: bool, contiguous: bool) -> None:
    dy, x = data(kind, 1024, 144), data(kind, 1024, 208)
    dy[896:] = float("nan")  # past the last group: never read
    a = quantize_columns(dy, amax_floor=GRADIENT_AMAX_FLOOR, power_of_two=power_of_two)
    b = quantize_columns(x, power_of_two=power_of_two)
    if contiguous:  # as a back end with K-major operands hands them over
        a, b = (type(q)(q.data.contiguous(), q.scale.contiguous()) for q in (a, b))
    main_grad = torch.zeros(5, 144, 208)
    main_grad[1], main_grad[4] = 7.0, -3.0
    grouped_wgrad(a, b, int32(OFFSETS), main_grad)
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    for e, (start, stop) in enumerate(itertools.pairwise(OFFSETS)):
        if start == stop:
            assert torch.equal(main_grad[e], torch.full((144, 208), 7.0 if e == 1 else -3.0))
            continue
        left, right = a64[:, start:stop], b64[:, start:stop]
        assert calc_diff(main_grad[e], left @ right.T, left, right) <= 1e-12
        dy64, x64 = dy[start:stop].double(), x[start:stop].double()
        assert calc_diff(main_grad[e], dy64.T @ x64, dy64.T, x64.T) <= 1e-3
    once = main_grad.clone()
    grouped_wgrad(a, b, int32(OFFSETS), main_grad)
    torch.testing.assert_close(main_grad[2], 2 * once[2], rtol=1e-6, atol=1e-6 * float(once[2].abs().max()))


def test_without_rows() -> None:
    main_grad = torch.ones(2, 32, 16)
    a, b = quantize_columns(torch.empty(0, 32)), quantize_columns(torch.empty(0, 16))
    grouped_wgrad(a, b, int32([0, 0, 0]), main_grad)
    assert torch.equal(main_grad, torch.ones(2, 32, 16))


def test_wrong_arguments() -> None:
    a, b = quantize_columns(torch.randn(256, 32)), quantize_columns(torch.randn(256, 16))
    offsets, main_grad = int32([0, 128, 256]), torch.zeros(2, 32, 16)
    blocks, _ = quantize_blocks(torch.randn(32, 256))
    cases = (
        (lambda: grouped_wgrad(blocks, b, offsets, main_grad), r"not \(128, 128\)"),
        (lambda: grouped_wgrad(a, quantize_columns(torch.randn(128, 16)), offsets, main_grad), "of one R"),
        (lambda: grouped_wgrad(a, b, int32([0, 64, 256]), main_grad), "multiples of 128"),
        (lambda: grouped_wgrad(a, b, int32([0, 256]), main_grad), "2 groups"),
        (lambda: grouped_wgrad(a, b, offsets, torch.zeros(2, 16, 32)), r"\[2, 32, 16\] is added"),
        (lambda: grouped_wgrad(a, b, offsets, main_grad.bfloat16()), "torch.bfloat16"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

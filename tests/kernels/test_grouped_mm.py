"""Grouped products of unquantized rows: groups that start anywhere, against FP64."""

import itertools

import pytest
import torch

from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data

OFFSETS = [0, 3, 3, 90, 91, 91]
BOUND = {torch.bfloat16: 5e-6, torch.float32: 1e-12}


def int32(offsets: list[int]) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("kind", KINDS)
def test_against_fp64(kind: str, dtype: torch.dtype) -> None:
    x, w, dy = data(kind, 100, 40, dtype=dtype), data("normal", 5, 24, 40, dtype=dtype), data(kind, 100, 24)
    x[91:] = float("nan")
    dy = dy.to(dtype)
    out = grouped_mm(x, w, int32(OFFSETS))
    main_grad = torch.full((5, 24, 40), 2.0)
    grouped_mm_wgrad(dy, x, int32(OFFSETS), main_grad)
    assert out.dtype is dtype and not bool(out[91:].any())
    for e, (start, stop) in enumerate(itertools.pairwise(OFFSETS)):
        if start == stop:
            assert torch.equal(main_grad[e], torch.full((24, 40), 2.0))
            continue
        x64, w64, dy64 = x[start:stop].double(), w[e].double(), dy[start:stop].double()
        assert calc_diff(out[start:stop], x64 @ w64.T, x64, w64) <= BOUND[dtype]
        assert calc_diff(main_grad[e].double() - 2.0, dy64.T @ x64, dy64.T, x64.T) <= 1e-11


def test_without_rows() -> None:
    w, none = torch.randn(2, 24, 40), int32([0, 0, 0])
    assert grouped_mm(torch.empty(0, 40), w, none).shape == (0, 24)
    assert not bool(grouped_mm(torch.randn(5, 40), w, none).any())


def test_wrong_arguments() -> None:
    x, w, offsets = torch.randn(8, 40), torch.randn(2, 24, 40), int32([0, 4, 8])
    cases = (
        (lambda: grouped_mm(x.bfloat16(), w, offsets), "one for both, not torch.bfloat16 and torch.float32"),
        (lambda: grouped_mm(x, w.mT, offsets), r"\[8, 40\] and \[2, 40, 24\]"),
        (lambda: grouped_mm(x, w, int32([0, 4, 9])), "at most 8"),
        (lambda: grouped_mm_wgrad(x[:4], x, offsets, w), "of one R"),
        (lambda: grouped_mm_wgrad(x[:, :24], x, offsets, w.bfloat16()), "torch.bfloat16"),
        (lambda: grouped_mm_wgrad(x[:, :24], x, int32([0, 8]), w), "2 groups"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

"""The sum of squares against exact arithmetic, and what its order may depend on."""

from fractions import Fraction

import pytest
import torch

from fp8moe.kernels.reference import squared_norm as specification
from fp8moe.kernels.squared_norm import squared_norm


def values(n):
    return torch.randn(n) * 10 ** torch.empty(n).uniform_(-6, 3)


@pytest.mark.parametrize("n", [0, 1, 4097])
def test_equals_exact_arithmetic(n):
    flat = values(n)
    total = squared_norm(flat)
    assert total.dtype is torch.float64 and total.shape == ()
    exact = float(sum(Fraction(x) ** 2 for x in flat.tolist()))
    assert float(total) == pytest.approx(exact, rel=1e-14, abs=0)


def test_one_chunk_is_torchs_norm_to_the_bit_and_several_are_its_sum(monkeypatch):
    flat = values(10000)
    whole = torch.linalg.vector_norm(flat, dtype=torch.float64).square()
    assert torch.equal(squared_norm(flat), whole)
    monkeypatch.setattr(specification, "_CHUNK", 999)
    assert float(squared_norm(flat)) == pytest.approx(float(whole), rel=1e-14)


def test_wrong_arguments():
    for flat in (torch.zeros(4).bfloat16(), torch.zeros(2, 2), torch.zeros(4, 2)[:, 0]):
        with pytest.raises(ValueError, match="squared_norm takes a contiguous FP32"):
            squared_norm(flat)

"""The sum of squares in Triton against FP64: sizes around whole runs, views that start anywhere, one result."""

import pytest
import torch

from fp8moe.kernels.squared_norm import squared_norm
from fp8moe.kernels.triton import squared_norm as ours


def check(device, n, start=0):
    generator = torch.Generator().manual_seed(n)
    flat = torch.randn(start + n, generator=generator) * 10 ** torch.empty(start + n).uniform_(-6, 3)
    placed = flat.to(device)[start:]
    total = squared_norm(placed)
    assert total.dtype is torch.float64 and total.shape == () and total.device == placed.device
    assert float(total) == pytest.approx(float(flat[start:].double().square().sum()), rel=1e-13, abs=0)
    assert torch.equal(total, squared_norm(placed))


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 3 * 4096 + 17])
def test_equals_fp64(triton_device, n):
    check(triton_device, n)


def test_a_view_may_start_anywhere(triton_device):
    check(triton_device, 5000, start=3)


@pytest.mark.parametrize("n", [4 * 4096, 11 * 4096 + 1, 15 * 4096 - 1])
def test_programs_take_several_runs(triton_device, monkeypatch, n):
    monkeypatch.setattr(ours, "PROGRAMS", 4)
    check(triton_device, n)

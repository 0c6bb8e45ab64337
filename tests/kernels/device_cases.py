"""Data and bounds that the tests of kernels share, on any device."""

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor

KINDS = ("normal", "positive", "outliers")


def data(kind: str, *shape: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random normal data, its absolute value, or with 1 % of the rows (at least one) a thousand times larger."""
    x = torch.randn(*shape, device=device)
    if kind == "positive":
        x = x.abs()
    if kind == "outliers":
        rows = x.flatten(0, -2)
        rows[torch.randperm(len(rows), device=device)[: max(1, len(rows) // 100)]] *= 1000
    return x.to(dtype)


def product_bound(out_dtype: torch.dtype, kind: str, device: str) -> float:
    """How far a product may be from FP64 of the same operands: a GPU's tensor core truncates inside each 128."""
    if out_dtype is torch.bfloat16:
        return 5e-6
    if device == "cpu":
        return 1e-12
    return 2e-6 if kind == "positive" else 3e-7


def assert_same(q: Fp8Tensor, expected: Fp8Tensor) -> None:
    """Codes and scales equal bit for bit, wherever they lie in memory."""
    assert q.tile == expected.tile and q.shape == expected.shape
    assert torch.equal(q.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(q.scale.view(torch.int32), expected.scale.view(torch.int32))


def offsets_of(sizes: list[int], device: str) -> Tensor:
    """Group offsets of groups of these sizes."""
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32).to(device)

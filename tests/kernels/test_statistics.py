"""Counting what casts lose: crafted tensors with known shares."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8moe.kernels.fp8 import BLOCK_TILE, E4M3, Fp8Tensor
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows, quantize_rows_and_columns
from fp8moe.kernels.statistics import CastStatistics, observe_casts


def test_underflow_is_counted_by_every_quantizer() -> None:
    x = torch.zeros(16, 16)
    x[:, 0] = 1.0  # the scale of each row is 1/448, so 2^-10/448 is half of the smallest code
    x[:4, 1] = 2.0**-21  # becomes zero
    x[4:8, 1] = 2.0**-11  # does not
    for quantize, source, casts in (
        (quantize_rows, x, 1),
        (quantize_columns, x.t().contiguous(), 1),
        (quantize_blocks, x, 1),
    ):
        with observe_casts() as s:
            quantize(source)
        assert (s.values, s.underflow_share, s.saturated_share) == (256 * casts, 4 / 256, 0.0)


def test_rows_and_columns_are_two_casts() -> None:
    with observe_casts() as s:
        quantize_rows_and_columns(torch.randn(32, 48))
        quantize_rows(torch.randn(32, 48))
    assert s.values == 3 * 32 * 48


def test_zeros_and_no_values_lose_nothing() -> None:
    with observe_casts() as s:
        assert (s.values, s.underflow_share, s.saturated_share) == (0, 0.0, 0.0)
        quantize_rows(torch.zeros(4, 16))
        quantize_rows(torch.zeros(0, 16))
    assert (s.values, s.underflow_share, s.saturated_share) == (64, 0.0, 0.0)


def test_saturation_counts_what_is_beyond_the_format() -> None:
    s = CastStatistics()
    x = torch.tensor([[400.0, 448.0, 463.0, 465.0, -1000.0, float("nan")] + [1.0] * 10])
    q = Fp8Tensor(x.clamp(-448, 448).to(E4M3), torch.ones(1, 1))
    s.add(x, q)
    assert s.saturated_share == 3 / 16
    block = CastStatistics()
    block.add(x, Fp8Tensor(q.data, q.scale, BLOCK_TILE))
    assert block.saturated_share == 3 / 16


def test_observers_nest_and_end() -> None:
    with observe_casts() as outer:
        quantize_rows(torch.randn(2, 16))
        with observe_casts() as inner:
            quantize_rows(torch.randn(3, 16))
    quantize_rows(torch.randn(4, 16))
    assert (outer.values, inner.values) == (32, 48)


class _Reads(TorchDispatchMode):
    """Counts the numbers that the host reads, for each of which a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_reading_waits_twice_however_many_casts_there_were() -> None:
    with _Reads() as reads, observe_casts() as counted:
        for _ in range(20):
            quantize_rows(torch.randn(4, 32))
        assert reads.count == 0
        assert counted.of_kind("activations") == (20 * 4 * 32, 0, 0)
    assert reads.count == 2

"""Bytes of a message: rows come back bit by bit, scales as exponents, whatever they are."""

from __future__ import annotations

import pytest
import torch

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.parallel.dispatch.payload import as_bytes, exponents, from_bytes, pack, row_bytes, scales, unpack


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("width", [16, 128, 576])
def test_fp8_rows_travel_exactly(rows: int, width: int) -> None:
    x = torch.randn(rows, width) * torch.logspace(-30, 30, rows)[:, None]
    sent = quantize_rows(x, amax_floor=1e-30, power_of_two=True)
    packed = pack(sent)
    assert packed.shape == (rows, row_bytes(sent)) == (rows, width + -(-width // 128))
    got = unpack(packed, sent)
    assert isinstance(got, Fp8Tensor)
    assert torch.equal(got.data.view(torch.uint8), sent.data.view(torch.uint8))
    assert torch.equal(got.scale, sent.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_rows_travel_exactly(dtype: torch.dtype) -> None:
    x = torch.randn(5, 16).to(dtype)
    assert torch.equal(unpack(pack(x), x), x)  # type: ignore[arg-type]
    assert pack(x).shape[1] == row_bytes(x)


def test_every_power_of_two_and_what_is_not_finite() -> None:
    powers = torch.ldexp(torch.ones(254), torch.arange(-126, 128))
    assert torch.equal(scales(exponents(powers)), powers)
    odd = torch.tensor([float("inf"), float("nan")])
    assert scales(exponents(odd)).tolist()[0] == float("inf")
    assert scales(exponents(odd)).isnan().tolist() == [False, True]


@pytest.mark.parametrize("scale", [3.0, -2.0, 1.5])
def test_other_scales_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="quantize with power_of_two=True"):
        exponents(torch.tensor([1.0, scale]))


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_slice_may_begin_on_any_byte(rows: int, behind: int) -> None:
    x = torch.randn(rows, 4)
    empty = torch.zeros(rows, 3, dtype=torch.uint8)
    message = torch.cat([empty, as_bytes(x), empty[:, :behind]], dim=1)
    assert torch.equal(from_bytes(message[:, 3:19], torch.float32), x)


def test_a_slice_that_lies_well_is_not_copied() -> None:
    x = torch.randn(3, 4)
    message = torch.cat([torch.zeros(3, 4, dtype=torch.uint8), as_bytes(x)], dim=1)
    values = from_bytes(message[:, 4:], torch.float32)
    assert torch.equal(values, x) and values.data_ptr() == message[:, 4:].data_ptr()
    assert from_bytes(message[:, 1:], torch.uint8).data_ptr() == message[:, 1:].data_ptr()

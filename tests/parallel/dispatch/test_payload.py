"""Rows as bytes: what a row is, and what lies beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.message_layout import as_bytes, scales
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.operand import Rows
from fp8moe.parallel.dispatch.payload import Columns, from_bytes, pack, row_bytes, split_rows


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("width", [16, 128, 576])
def test_fp8_rows_are_codes_and_a_byte_a_scale(rows: int, width: int) -> None:
    x = torch.randn(rows, width) * torch.logspace(-30, 30, rows)[:, None]
    sent = quantize_rows(x, amax_floor=1e-30, power_of_two=True)
    packed = pack(sent)
    assert packed.shape == (rows, row_bytes(sent)) == (rows, width + -(-width // 128))
    assert torch.equal(packed[:, :width], sent.data.view(torch.uint8))
    assert torch.equal(scales(packed[:, width:]), sent.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_rows_are_their_own_bytes(dtype: torch.dtype) -> None:
    x = torch.randn(5, 16).to(dtype)
    assert torch.equal(from_bytes(pack(x), dtype), x)
    assert pack(x).shape[1] == row_bytes(x)


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_are_split_as_views(fp8: bool) -> None:
    x = torch.randn(7, 144)
    rows = quantize_rows(x) if fp8 else x
    pieces = split_rows(rows, [3, 0, 4])
    for piece, start, stop in zip(pieces, (0, 3, 3), (3, 3, 7), strict=True):
        for ours, whole in zip(parts(piece), parts(rows), strict=True):
            assert torch.equal(ours, whole[start:stop]) and ours.data_ptr() == whole[start:stop].data_ptr()


def parts(rows: Rows) -> list[Tensor]:
    return [rows.data.view(torch.uint8), rows.scale] if isinstance(rows, Fp8Tensor) else [rows]


def test_columns_lie_side_by_side_on_multiples_of_16_bytes() -> None:
    columns = Columns(((torch.bfloat16, 9), (torch.float32, 3)))
    message = columns.empty(5, torch.device("cpu")).fill_(7)
    first, second = columns.of(message)
    assert message.shape == (5, 32 + 16)
    a, b = torch.randn(5, 9).bfloat16(), torch.randn(5, 3)
    first.copy_(a)
    second.copy_(b)
    assert torch.equal(message[:, :18], as_bytes(a)) and torch.equal(message[:, 32:44], as_bytes(b))
    assert (message[:, 18:32] == 7).all() and (message[:, 44:] == 7).all()


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

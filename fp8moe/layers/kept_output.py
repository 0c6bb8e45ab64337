"""Attention's output, kept once, in E5M6: for the weight gradient of `o` and for attention's own backward.

Two backwards read the output of attention. The Linear after it (`o`) makes its columns of it, attention's own a sum of
dO x O a row. 12 bits suffice for both (DeepSeek-V3 report, section 3.3.3), but memory is saved only if neither keeps
the BF16 tensor. So attention runs boxed (`saved`), and the box that turns out to hold the output is filled with the
packed copy instead, unpacked when backward asks. The output is known by its address, whichever view of it was saved; a
kernel that saves no output, as PyTorch's unfused attention on a CPU, changes nothing.

Refused: attention run again in backward, which costs a forward.

Legend: T tokens, B sequences, S tokens of a sequence, H heads, V features of a head's value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.fp8 import E5m6Tensor
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.operand import Activation, Operand
from fp8moe.layers.saved import Box


def kept_in_e5m6(out: Tensor, boxes: Sequence[Box]) -> Activation:
    """Attention's output, BF16 [B, S, H, V], as an operand [T, H V] whose backward has 12 bits a value.

    `boxes` hold what attention saved. Rows have power-of-two scales. ValueError if H V, or at the weight gradient T, is
    no multiple of 16.
    """
    out_TN = out.flatten(0, 1).flatten(1)
    rows = quantize_rows(out_TN.detach(), power_of_two=True)
    if not torch.is_grad_enabled():
        return Activation(out_TN, Operand(rows, _nothing_was_kept))
    packed = pack_e5m6(out_TN.detach())
    for box in boxes:
        saved = box.saved
        if saved is None or saved.data_ptr() != out.data_ptr():
            continue
        if saved.numel() == out.numel() and saved.dtype == out.dtype:
            box.replace(partial(_unpack, packed, out.shape, out.stride(), saved.shape, saved.stride()))
    return Activation(out_TN, Operand(rows, lambda: e5m6_to_columns(packed)))


def _unpack(
    packed: E5m6Tensor,
    shape: torch.Size,
    stride: tuple[int, ...],
    saved_shape: torch.Size,
    saved_stride: tuple[int, ...],
) -> Tensor:
    """The values in memory laid out as the output's was, seen as what was saved of it."""
    values = unpack_e5m6(packed).view(shape)
    if values.stride() != stride:
        values = torch.empty_strided(shape, stride, dtype=values.dtype, device=values.device).copy_(values)
    return values.as_strided(saved_shape, saved_stride)


def _nothing_was_kept() -> Tensor:
    raise AssertionError("a weight gradient was asked of a forward that ran without gradients")

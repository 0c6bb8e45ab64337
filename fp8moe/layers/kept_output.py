"""Attention's output, kept once, in E5M6: for the weight gradient of `o` and for attention's own backward.

Two backwards read the output of attention. The Linear after it (`o`) makes its columns of it, attention's own a sum of
dO x O a row. 12 bits suffice for both (DeepSeek-V3 report, section 3.3.3), but memory is saved only if neither keeps
the BF16 tensor. So attention runs under `saved_tensors_hooks`: what autograd saves of it is kept in
boxes, and the box that turns out to hold the output is filled with the packed copy instead, unpacked when backward
asks. The output is known by its address, whichever view of it was saved; a kernel that saves no output, as PyTorch's
unfused attention on a CPU, changes nothing.

Refused: an autograd function around attention, which would have to name each back end's private backward; and attention
run again in backward, which costs a forward.

Legend: T tokens, B sequences, S tokens of a sequence, H heads, V features of a head's value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.fp8 import E5m6Tensor
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.operand import Activation, Operand


def attention_kept_in_e5m6(attend: Callable[[], Tensor]) -> Activation:
    """The output of `attend`, BF16 [B, S, H, V], as an operand [T, H V] whose backward has 12 bits a value.

    Rows have power-of-two scales. ValueError if H V, or at the weight gradient T, is no multiple of 16.
    """
    if not torch.is_grad_enabled():
        out_TN = attend().flatten(0, 1).flatten(1)
        return Activation(out_TN, Operand(quantize_rows(out_TN, power_of_two=True), _nothing_was_kept))
    boxes: list[_Box] = []

    def box(saved: Tensor) -> _Box:
        boxes.append(_Box(saved.detach()))
        return boxes[-1]

    with torch.autograd.graph.saved_tensors_hooks(box, _Box.open):
        out = attend()
    out_TN = out.flatten(0, 1).flatten(1)
    packed = pack_e5m6(out_TN.detach())
    for kept in boxes:
        kept.replace(out, packed)
    rows = quantize_rows(out_TN.detach(), power_of_two=True)
    return Activation(out_TN, Operand(rows, lambda: e5m6_to_columns(packed)))


class _Box:
    """What autograd holds in the place of a tensor that it saved: the tensor, or the way to make it again."""

    def __init__(self, saved: Tensor) -> None:
        self._remake: Callable[[], Tensor] = lambda: saved

    def open(self) -> Tensor:
        return self._remake()

    def replace(self, out: Tensor, packed: E5m6Tensor) -> None:
        """Let go of the tensor if it is a view of all of `out` [B, S, H, V], whose values `packed` [T, H V] has."""
        saved = self.open()
        if saved.data_ptr() == out.data_ptr() and saved.numel() == out.numel() and saved.dtype == out.dtype:
            self._remake = partial(_unpack, packed, out.shape, out.stride(), saved.shape, saved.stride())


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

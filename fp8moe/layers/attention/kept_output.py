"""Attention's output kept in 12 bits for the two backwards that read it.

The Linear after attention (`o`) makes its columns of it, attention's own backward a sum of dO x O a row. 12 bits are
enough for both (DeepSeek-V3 report, section 3.3.3), but memory is saved only if neither keeps the BF16 tensor. So
attention runs under `capture_saved`, and the saved tensor that turns out to be the output is replaced by the packed
copy, unpacked when backward asks. The output is known by its address, whichever view of it was
saved; a kernel that saves no output, as the one for unequal heads on a CPU, changes nothing, and one that is known to
save it and did not is an error. Refused: attention run again in backward, which costs a forward; and an autograd
function around each kernel's private forward and backward (`aten::_scaled_dot_product_cudnn_attention` and the like),
whose signatures change between releases, whereas a wrong address can only cost memory and is noticed at once.

Legend: T = B x S tokens, B sequences, S tokens of a sequence, H heads, V features of a head's value.
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
from fp8moe.layers.recompute import SavedTensor


def keep_in_e5m6(
    outputs: Sequence[Tensor],
    captured: Sequence[SavedTensor],
    *,
    saves_output: bool = False,
    power_of_two: bool = True,
) -> Activation:
    """Attention's output, BF16 [B, S, H, V], as an activation [T, H V] whose backward has 12 bits a value.

    outputs: those of one or more groups of heads, each of a call of attention. `captured` is what attention saved for
    its backward; saves_output: its outputs must be among it. power_of_two: of the rows' scales, those of the columns
    always are. ValueError if H V, or at the weight gradient T, is no multiple of 16; RuntimeError if an output was to
    be found and is not, when the BF16 tensor would live on beside the packed one.
    """
    out_TN = joined_heads(outputs)
    rows = quantize_rows(out_TN.detach(), power_of_two=power_of_two)
    if not torch.is_grad_enabled():
        return Activation(out_TN, Operand(rows, _nothing_was_kept))
    packed, first = pack_e5m6(out_TN.detach()), 0
    for out in outputs:
        features = slice(first, first + out.shape[2] * out.shape[3])
        first, found = features.stop, False
        for saved in captured:
            tensor = saved.tensor
            if tensor is None or tensor.data_ptr() != out.data_ptr():
                continue
            if tensor.numel() == out.numel() and tensor.dtype == out.dtype:
                like = out.shape, out.stride(), tensor.shape, tensor.stride()
                saved.replace(partial(_unpack, packed, features, *like))
                found = True
        if saves_output and captured and not found:
            raise RuntimeError(
                f"attention's kernel saved {len(captured)} tensors and none is its output {list(out.shape)}: FP8 would"
                " keep the output twice; use model.attention.backend=sdpa and report this"
            )
    return Activation(out_TN, Operand(rows, lambda: e5m6_to_columns(packed)))


def joined_heads(outputs: Sequence[Tensor]) -> Tensor:
    """[B, S, H, V] of each group of heads -> [T, H V] of all."""
    out = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=2)
    return out.flatten(0, 1).flatten(1)


def _unpack(
    packed: E5m6Tensor,
    features: slice,
    shape: torch.Size,
    stride: tuple[int, ...],
    saved_shape: torch.Size,
    saved_stride: tuple[int, ...],
) -> Tensor:
    """The values in memory laid out as the output's was, seen as what was saved of it."""
    values = unpack_e5m6(packed)[:, features].reshape(shape)
    if values.stride() != stride:
        values = torch.empty_strided(shape, stride, dtype=values.dtype, device=values.device).copy_(values)
    return values.as_strided(saved_shape, saved_stride)


def _nothing_was_kept() -> Tensor:
    raise AssertionError("a weight gradient was asked of a forward that ran without gradients")

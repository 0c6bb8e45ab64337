"""Core attention, for every family: softmax(q k^T) v by a chosen kernel, and its output kept in 12 bits.

Two backwards read the output of attention. The Linear after it (`o`) makes its columns of it, attention's own a sum of
dO x O a row. 12 bits suffice for both (DeepSeek-V3 report, section 3.3.3), but memory is saved only if neither keeps
the BF16 tensor. So attention runs under `capture_saved`, and the saved tensor that turns out to be the output is
replaced by the packed copy, unpacked when backward asks. The output is known by its address, whichever view of it was
saved; a kernel that saves no output, as PyTorch's unfused attention on a CPU, changes nothing. Refused: attention run
again in backward, which costs a forward.

Legend: T = B x S tokens, B sequences, S tokens of a sequence, H heads, V features of a head's value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.fp8 import E5m6Tensor
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.operand import Activation, Operand
from fp8moe.layers.recompute import SavedTensor


@dataclass(frozen=True)
class Positions:
    """Where tokens stand: rotations [T, rope_dim/2], and the mask of documents, if one is on.

    `mask_BSS` is True where a query may look at a key, causality included; None means causal.
    """

    num_sequences: int
    cos: Tensor
    sin: Tensor
    mask_BSS: Tensor | None = None


def document_mask(documents_BS: Tensor) -> Tensor:
    """Bool [B, S, S]: a token sees itself and what came before it in the same document."""
    seq_len = documents_BS.shape[1]
    same = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same & torch.ones(seq_len, seq_len, dtype=torch.bool, device=documents_BS.device).tril()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask_BSS: Tensor | None) -> Tensor:
    """[B, S, H, d] -> [B, S, H, V] by torch."""
    mask = None if mask_BSS is None else mask_BSS[:, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, mask_BSS: Tensor | None) -> Tensor:
    """[B, S, H, d] -> [B, S, H, V] by flash-attn 4, whose Hopper kernels take 192/128 heads."""
    if mask_BSS is not None:
        raise ValueError(
            "model.attention.backend=flash supports no document mask: use model.attention.backend=sdpa, or "
            "data.document_mask=false"
        )
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise ValueError(
            f"model.attention.backend=flash needs flash-attn 4 with its CuTe kernels, which can't be imported here "
            f"({error}): install the extra `flash-attn`, or use model.attention.backend=sdpa"
        ) from error
    out = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    return out[0] if isinstance(out, tuple) else out


# (q, k, v [B, S, H, d], softmax scale, mask [B, S, S] | None) -> [B, S, H, V]
BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]] = {
    "sdpa": _sdpa,
    "flash": _flash,
}


def keep_in_e5m6(out: Tensor, captured: Sequence[SavedTensor]) -> Activation:
    """Attention's output, BF16 [B, S, H, V], as an activation [T, H V] whose backward has 12 bits a value.

    `captured` is what attention saved for its backward. Rows have power-of-two scales. ValueError if H V, or at the
    weight gradient T, is no multiple of 16.
    """
    out_TN = out.flatten(0, 1).flatten(1)
    rows = quantize_rows(out_TN.detach(), power_of_two=True)
    if not torch.is_grad_enabled():
        return Activation(out_TN, Operand(rows, _nothing_was_kept))
    packed = pack_e5m6(out_TN.detach())
    for saved in captured:
        tensor = saved.tensor
        if tensor is None or tensor.data_ptr() != out.data_ptr():
            continue
        if tensor.numel() == out.numel() and tensor.dtype == out.dtype:
            saved.replace(partial(_unpack, packed, out.shape, out.stride(), tensor.shape, tensor.stride()))
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

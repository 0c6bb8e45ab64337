"""Core attention, for every family: rotary positions, softmax(q k^T) v by a chosen kernel, its output kept in 12 bits.

Rotary embedding: features (2i, 2i+1) are rotated by position x frequency_i. The rotated pairs are stored apart, all
first members before all second ones, as the released checkpoints' reference does: queries and keys are permuted alike,
so scores don't change. YaRN (arXiv 2309.00071, section 3.2) leaves frequencies with many rotations inside the original
context alone, interpolates those with few by 1/s, and ramps between.

Two backwards read the output of attention. The Linear after it (`o`) makes its columns of it, attention's own a sum of
dO x O a row. 12 bits suffice for both (DeepSeek-V3 report, section 3.3.3), but memory is saved only if neither keeps
the BF16 tensor. So attention runs under `capture_saved`, and the saved tensor that turns out to be the output is
replaced by the packed copy, unpacked when backward asks. The output is known by its address, whichever view of it was
saved; a kernel that saves no output, as PyTorch's unfused attention on a CPU, changes nothing. Refused: attention run
again in backward, which costs a forward.

Legend: T = B x S tokens, B sequences, S tokens of a sequence, H heads, V features of a head's value.
"""

from __future__ import annotations

import math
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
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071) of a rotary part.

    `factor` is s = new length / original length; `beta_slow`, `beta_fast` (the paper's alpha and beta) bound the ramp
    between interpolated and untouched frequencies. The softmax scale is multiplied by (0.1 * mscale_all * ln s + 1)^2,
    the rotation's amplitude by the ratio of that term for `mscale` and for `mscale_all`.
    """

    factor: float = 40.0
    original_max_seq_len: int = 4096
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    mscale: float = 1.0
    mscale_all: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"model.attention.yarn.factor={self.factor} would shorten the context: use 1 or more")

    @staticmethod
    def _attention_scale(factor: float, mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    @property
    def softmax_factor(self) -> float:
        """Factor of the softmax scale."""
        return self._attention_scale(self.factor, self.mscale_all) ** 2 if self.mscale_all else 1.0

    @property
    def amplitude(self) -> float:
        """Factor of the rotary cosines and sines."""
        if self.mscale and self.mscale_all:
            return self._attention_scale(self.factor, self.mscale) / self._attention_scale(self.factor, self.mscale_all)
        return self._attention_scale(self.factor, 1.0)


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


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/dim) for each of the dim/2 pairs, FP32 [dim/2]."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def yarn_frequencies(dim: int, theta: float, yarn: YarnConfig) -> Tensor:
    """Inverse frequencies for a context `yarn.factor` times the original length, FP32 [dim/2].

    A pair that turns `beta_fast` times or more within the original context keeps its frequency, one that turns
    `beta_slow` times or less is slowed by `factor`; between, a linear ramp over the pair's index.
    """

    def pair_that_turns(rotations: float) -> float:
        return dim * math.log(yarn.original_max_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    width = max(last - first, 1e-3)  # both ends on one pair: a step instead of a ramp
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    kept = inverse_frequencies(dim, theta)
    return kept / yarn.factor * slowed + kept * (1 - slowed)


def rotation(positions_T: Tensor, dim: int, theta: float, yarn: YarnConfig | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, dim/2] in FP32 of the angles at `positions_T` (int64), by YaRN where it is given."""
    with positions_T.device:  # made there: the host would wait for a copy, every micro-batch
        frequencies = inverse_frequencies(dim, theta) if yarn is None else yarn_frequencies(dim, theta, yarn)
    amplitude = 1.0 if yarn is None else yarn.amplitude
    angles = positions_T.float()[:, None] * frequencies
    return angles.cos() * amplitude, angles.sin() * amplitude


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

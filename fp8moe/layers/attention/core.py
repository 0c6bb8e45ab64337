"""Core attention, for every family: rotary positions, softmax(q k^T) v by a chosen kernel.

Rotary embedding: features (2i, 2i+1) are rotated by position x frequency_i. The rotated pairs are stored apart, all
first members before all second ones, as the released checkpoints' reference does: queries and keys are permuted alike,
so scores don't change. YaRN (arXiv 2309.00071, section 3.2) leaves frequencies with many rotations inside the original
context alone, interpolates those with few by 1/s, and ramps between.

Legend: T = B x S tokens, B sequences, S tokens of a sequence, H heads, V features of a head's value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fp8moe.layers.attention.blocked import blocked_attention
from fp8moe.layers.attention.cache import CachedForward
from fp8moe.layers.attention.context import Context
from fp8moe.layers.attention.documents import Documents, by_document
from fp8moe.layers.attention.masks import causal_blocks, causal_mask
from fp8moe.layers.attention.sinks import with_sinks
from fp8moe.limits import Range, check_fields

if TYPE_CHECKING:  # FlexAttention takes a second to import
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071) of a rotary part.

    The softmax scale is multiplied by (0.1 * mscale_all * ln factor + 1)^2, the rotation's amplitude by the ratio of
    that term for `mscale` and for `mscale_all`.
    """

    factor: float = 40.0  # new length / original length
    original_max_seq_len: int = 4096  # tokens of a sequence before the extension
    beta_slow: float = 1.0  # rotations below which a frequency is interpolated; the paper's alpha
    beta_fast: float = 32.0  # rotations above which a frequency stays; the paper's beta
    mscale: float = 1.0  # of the rotation's amplitude
    mscale_all: float = 1.0  # of the softmax scale, and below the amplitude's
    truncate: bool = True  # the ramp begins and ends at whole pairs; false (GPT-OSS): where the rotations say

    def __post_init__(self) -> None:
        check_fields(
            self,
            "model.attention.yarn",
            factor=Range(least=1, most=2**24, use="use 1 or more, less would shorten the context"),
            original_max_seq_len=Range(least=1, most=2**24),
            beta_slow=Range(above=0, most=1e6),
            beta_fast=Range(above=0, most=1e6),
            mscale=Range(least=0, most=100),
            mscale_all=Range(least=0, most=100),
        )
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"model.attention.yarn.beta_fast={self.beta_fast} must not be below beta_slow={self.beta_slow}, "
                "the ramp goes from few rotations to many: use 32.0 and 1.0"
            )

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
    """Where tokens stand: rotations [T, rope_dim/2], and the documents they belong to where those are kept apart.

    cached: caches that the tokens are written to and attend to (`cache`); None in training. context: the whole
    sequences where the tokens are a part of each; documents are then its.
    """

    num_sequences: int
    cos: Tensor
    sin: Tensor
    documents: Documents | None = None
    cached: CachedForward | None = None
    context: Context | None = None

    @property
    def of_keys(self) -> tuple[Tensor, Tensor]:
        """cos, sin of the tokens whose keys are attended to."""
        return (self.cos, self.sin) if self.context is None else (self.context.cos, self.context.sin)

    @property
    def masked(self) -> bool:
        """Whether documents are kept apart."""
        return (self.documents if self.context is None else self.context.documents) is not None

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        return self.cos.shape[0] // self.num_sequences

    @functools.cached_property
    def parts(self) -> Documents:
        """The documents, or each sequence as one."""
        return self.documents or Documents((self.seq_len,) * self.num_sequences, self.cos.device)

    @functools.cached_property
    def _by_window(self) -> dict[int | None, BlockMask]:
        return {}

    def blocks(self, window: int | None) -> BlockMask:
        """FlexAttention's blocks of scores that hold anything, made once for all layers of one window."""
        if window not in self._by_window:
            documents, places, keys = self.documents, None, self.seq_len
            if self.context is not None:
                documents, places, keys = self.context.documents, self.context.places, self.context.seq_len
            numbers_BS = None if documents is None else documents.numbers_T.view(self.num_sequences, -1)
            self._by_window[window] = causal_blocks(keys, self.cos.device, window, numbers_BS, places)
        return self._by_window[window]


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

    begins, ends = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    first = max(math.floor(begins) if yarn.truncate else begins, 0)
    last = min(math.ceil(ends) if yarn.truncate else ends, dim - 1)
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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, window: int | None = None) -> Tensor:
    """[B, S, H, d] -> [B, S, H, V] by torch; a head of keys and values may serve a run of query heads."""
    queries, keys = q.shape[1], k.shape[1]
    is_masked = queries != keys or (window is not None and window < keys)
    mask = causal_mask(queries, keys, window, q.device) if is_masked else None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _pinned(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by one of torch's kernels, or an error; its backward is that kernel's too."""
    with sdpa_kernel([backend], set_priority=True):
        return _sdpa(q, k, v, scale)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    parts: Documents,
    key_parts: Documents | None = None,
    window: int | None = None,
) -> Tensor:
    """[B, S, H, d] -> [B, S, H, d] by torch's kernel of variable length, whose values are as wide as its keys."""
    from torch.nn.attention.varlen import varlen_attn

    keys = key_parts or parts
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if q.shape[2] != k.shape[2]:
        options["enable_gqa"] = True
    q_TH, k_TJ, v_TJ = (x.flatten(0, 1) for x in (q, k, v))
    ends, key_ends = parts.cumulative_N, keys.cumulative_N
    out: Any = varlen_attn(q_TH, k_TJ, v_TJ, ends, key_ends, parts.longest, keys.longest, **options)
    made: Tensor = out.unflatten(0, q.shape[:2])
    return made


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    parts: Documents | None = None,
    key_parts: Documents | None = None,
    window: int | None = None,
) -> Tensor:
    """[B, S, H, d] -> [B, S, H, V] by flash-attn 4, whose Hopper kernels take 192/128 heads."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    if parts is None:
        out = flash_attn_func(q, k, v, **options)
    else:
        keys = key_parts or parts
        options |= {"cu_seqlens_q": parts.cumulative_N, "cu_seqlens_k": keys.cumulative_N}
        options |= {"max_seqlen_q": parts.longest, "max_seqlen_k": keys.longest}
        out = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), **options)
    out = out[0] if isinstance(out, tuple) else out
    made: Tensor = out if parts is None else out.unflatten(0, q.shape[:2])
    return made


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float, *, blocks: BlockMask, sinks: Tensor | None = None) -> Tensor:
    """[B, S, H, d] -> [B, S, H, V] by FlexAttention, compiled: as it is written it would keep every score."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    flex = functools.partial(_compiled_flex_attention(), block_mask=blocks, scale=scale)
    grouped = q.shape[1] != k.shape[1]
    if sinks is None:
        return flex(q, k, v, enable_gqa=grouped).transpose(1, 2)
    from torch.nn.attention.flex_attention import AuxRequest

    out, returned = flex(q, k, v, enable_gqa=grouped, return_aux=AuxRequest(lse=True))
    return with_sinks(out.transpose(1, 2), returned.lse.transpose(1, 2), sinks)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# (q, k, v [B, S, H, d], softmax scale) -> [B, S, H, V], causal; what else each takes is a keyword
BACKENDS: dict[str, Callable[..., Tensor]] = {
    "sdpa": _sdpa,
    "cudnn": partial(_pinned, SDPBackend.CUDNN_ATTENTION),
    "efficient": partial(_pinned, SDPBackend.EFFICIENT_ATTENTION),
    "blocked": blocked_attention,
    "varlen": _varlen,
    "flash": _flash,
    "flex": _flex,
}


def attend(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    positions: Positions,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of q [B, S, H, d], k [B, S, G, d], v [B, S, G, V] -> [B, S, H, V].

    kernel: one of `BACKENDS` that takes what is asked (`choice`). G divides H: a head of keys and values serves H / G
    query heads, one after the other. window: tokens that a query sees, itself included. sinks: FP32 [H], a logit more
    in the softmax of each head, without a value. With a `context` q has the tokens of a part of each sequence.
    """
    options: dict[str, Any] = {} if sinks is None else {"sinks": sinks}
    band = None if window is None or window >= k.shape[1] else window
    if kernel == "flex":
        return _flex(q, k, v, scale, blocks=positions.blocks(band), **options)
    if band is not None:
        options["window"] = band
    if positions.context is not None:
        return attend_in_runs(kernel, q, k, v, scale, positions.context, **options)
    documents = positions.documents
    if kernel == "varlen" or (kernel == "flash" and documents is not None):
        options["parts"] = positions.parts
    elif documents is not None:
        q_TH, k_TH, v_TH = (x.flatten(0, 1) for x in (q, k, v))
        outputs = by_document(BACKENDS[kernel], q_TH, k_TH, v_TH, scale, documents, documents, **options)
        return torch.cat(outputs).unflatten(0, q.shape[:2])
    return BACKENDS[kernel](q, k, v, scale, **options)


def attend_in_runs(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float, context: Context, **options: Any
) -> Tensor:
    """The same for a part of each sequence, its chunks one after the other, by a kernel that takes both lengths."""
    q_t, k_T, v_T = (x.flatten(0, 1) for x in (q, k, v))
    outputs = []
    for run in context.runs:
        queries, keys, values = q_t[run.queries], k_T[run.keys], v_T[run.keys]
        if kernel in ("varlen", "flash"):
            options |= {"parts": run.query_parts, "key_parts": run.key_parts}
            outputs.append(BACKENDS[kernel](queries[None], keys[None], values[None], scale, **options)[0])
        else:
            parts = run.query_parts, run.key_parts
            outputs += by_document(BACKENDS[kernel], queries, keys, values, scale, *parts, **options)
    return torch.cat(outputs).unflatten(0, q.shape[:2])

"""Core attention, for every family: softmax(q k^T) v by a chosen kernel, and where its tokens stand.

Legend: T = B x S tokens, B sequences, S tokens of a sequence, H heads, V features of a head's value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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

if TYPE_CHECKING:  # FlexAttention takes a second to import
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Positions:
    """Where tokens stand: rotations [T, rope_dim/2], and the documents they belong to where those are kept apart.

    cached: caches that the tokens are written to and attend to (`cache`); None in training. context: the whole
    sequences where the tokens are a part of each; documents are then its. experts: by number of a layer, integers
    [T, K], those that its router is given for the tokens in place of its choice; nothing to attention.
    """

    num_sequences: int
    cos: Tensor
    sin: Tensor
    documents: Documents | None = None
    cached: CachedForward | None = None
    context: Context | None = None
    experts: Mapping[int, Tensor] = field(default_factory=dict)

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


VARIABLE = ("varlen", "flash")  # with a context they take the keys of each run, one after the other


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
    in the softmax of each head, without a value. With a `context` q has the tokens of a part of each sequence, k and v
    are as `keys_in_order` gives them.
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


def keys_in_order(kernel: str, x_BSH: Tensor, context: Context) -> Tensor:
    """Keys or values of whole sequences [B, S, H, d] as `attend` takes them: those of each run, for some kernels."""
    return context.by_run(x_BSH.flatten(0, 1))[None] if kernel in VARIABLE else x_BSH


def attend_in_runs(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float, context: Context, **options: Any
) -> Tensor:
    """The same for a part of each sequence, its chunks one after the other, by a kernel that takes both lengths."""
    q_t = q.flatten(0, 1)
    if kernel in VARIABLE:  # in one call, whose output is the kernel's own, as what keeps it in 12 bits must know
        options |= {"parts": context.query_parts, "key_parts": context.key_parts}
        return BACKENDS[kernel](q_t[None], k, v, scale, **options)[0].unflatten(0, q.shape[:2])
    outputs, k_T, v_T = list[Tensor](), k.flatten(0, 1), v.flatten(0, 1)
    for run in context.runs:
        queries, keys, values, parts = q_t[run.queries], k_T[run.keys], v_T[run.keys], (run.query_parts, run.key_parts)
        outputs += by_document(BACKENDS[kernel], queries, keys, values, scale, *parts, **options)
    return torch.cat(outputs).unflatten(0, q.shape[:2])

"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3 report, section 2.1.1).

Keys and values come from one small latent a token, queries from another; a rotary part, one key for all heads, carries
position. The down projections of both latents are one GEMM (`qkv_a`, 2112 outputs in V3). Scores and their softmax are
torch's `scaled_dot_product_attention`, or flash-attn when it is asked for. Attention itself is BF16 in FP8 too; its
output is then kept for backward in 12 bits (`kept_output`), and q, k and v need not be kept at all: under recomputation
(`mla_up`) attention's backward has them made again from the latents, by the two up projections and the rotation.

Legend: T = B x S tokens, B sequences, S tokens of a sequence, D model, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8moe.layers.kept_output import kept_in_e5m6
from fp8moe.layers.linear import Linear
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.operand import cast
from fp8moe.layers.precision import Precision
from fp8moe.layers.recompute import DEFAULT, Recallable, Recompute, kept
from fp8moe.layers.rope import rotate
from fp8moe.layers.saved import boxed, compute_again


@dataclass(frozen=True)
class AttentionConfig:
    """Feature counts of MLA; `q_lora_rank` 0 leaves out the query latent; `softmax_scale` multiplies the scores."""

    dim: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    softmax_scale: float
    norm_eps: float
    kind: str = "sdpa"


@dataclass(frozen=True)
class Positions:
    """What attention knows of where tokens stand: rotations [T, rope_dim/2], and the mask of documents, if one is on.

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


class LatentAttention(nn.Module):
    """x [T, D] -> [T, D]."""

    def __init__(
        self,
        config: AttentionConfig,
        *,
        precision: Precision,
        recompute: frozenset[Recompute] = DEFAULT,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        c = self.config = config
        self.precision = precision
        self.recompute = Recompute.MLA_UP in recompute
        self.attend = ATTENTION[c.kind]
        queries = c.num_heads * (c.nope_dim + c.rope_dim)
        q_a = c.q_lora_rank or queries

        def linear(n_in: int, n_out: int) -> Linear:
            return Linear(n_in, n_out, precision=precision, device=device)

        def norm(dim: int) -> RMSNorm:
            return RMSNorm(dim, eps=c.norm_eps, precision=precision, recompute=recompute, device=device)

        self.qkv_a = linear(c.dim, q_a + c.kv_lora_rank + c.rope_dim)
        self.q_norm = norm(c.q_lora_rank) if c.q_lora_rank else None
        self.q_b = linear(c.q_lora_rank, queries) if c.q_lora_rank else None
        self.kv_norm = norm(c.kv_lora_rank)
        self.kv_b = linear(c.kv_lora_rank, c.num_heads * (c.nope_dim + c.v_dim))
        self.o = linear(c.num_heads * c.v_dim, c.dim)

    def forward(self, x_TD: Tensor | Recallable, positions: Positions) -> Tensor:
        c = self.config
        q_a, kv_a, k_rope = self.qkv_a(x_TD).split(
            [self.qkv_a.weight.shape[0] - c.kv_lora_rank - c.rope_dim, c.kv_lora_rank, c.rope_dim], dim=-1
        )
        q_latent = kept(q_a) if self.q_norm is None else self.q_norm(q_a)
        kv_latent = self.kv_norm(kv_a)
        q = q_latent.tensor if self.q_b is None else self.q_b(q_latent)
        qkv = self._heads(q, self.kv_b(kv_latent), k_rope, positions)
        with boxed() as boxes:
            out = self.attend(*qkv, c.softmax_scale, positions.mask_BSS)
        if self.recompute:
            compute_again(boxes, qkv, self._heads_again(q_latent.recall, kv_latent.recall, k_rope.detach(), positions))
        if self.precision is Precision.FP8:
            return self.o(kept_in_e5m6(out, boxes))
        return self.o(out.flatten(0, 1).flatten(1))

    def _heads(self, q: Tensor, kv: Tensor, k_rope: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """What the up projections give, and the shared rotary part of keys -> q, k, v [B, S, H, d] for attention."""
        c = self.config
        q_nope, q_rope = q.unflatten(-1, (c.num_heads, -1)).split([c.nope_dim, c.rope_dim], dim=-1)
        k_nope, v = kv.unflatten(-1, (c.num_heads, -1)).split([c.nope_dim, c.v_dim], dim=-1)
        q_rope = rotate(q_rope, positions.cos, positions.sin)
        k_rope = rotate(k_rope[:, None], positions.cos, positions.sin).expand(-1, c.num_heads, -1)

        def by_sequence(t: Tensor) -> Tensor:  # [T, H, d] -> [B, S, H, d]
            return t.unflatten(0, (positions.num_sequences, -1))

        q = by_sequence(torch.cat([q_nope, q_rope], dim=-1))
        return q, by_sequence(torch.cat([k_nope, k_rope], dim=-1)), by_sequence(v)

    def _heads_again(
        self, recall_q: Callable[[], Tensor], recall_kv: Callable[[], Tensor], k_rope: Tensor, positions: Positions
    ) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """The same from the recalled latents: casts and products repeated, nothing put on the tape."""

        def up(linear: Linear, recall: Callable[[], Tensor]) -> Tensor:
            return linear.fprop(cast(recall(), self.precision))

        def again() -> tuple[Tensor, Tensor, Tensor]:
            q = recall_q() if self.q_b is None else up(self.q_b, recall_q)
            return self._heads(q, up(self.kv_b, recall_kv), k_rope, positions)

        return again


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask_BSS: Tensor | None) -> Tensor:
    """[B, S, H, d] -> [B, S, H, v_dim] by torch."""
    mask = None if mask_BSS is None else mask_BSS[:, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, mask_BSS: Tensor | None) -> Tensor:
    """[B, S, H, d] -> [B, S, H, v_dim] by flash-attn 4, whose Hopper kernels take 192/128 heads."""
    if mask_BSS is not None:
        raise ValueError("model.attention=flash knows no document mask: use model.attention=sdpa, or no mask")
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise ValueError(
            f"model.attention=flash needs flash-attn 4 with its CuTe kernels, which can't be imported here ({error}): "
            "install the extra `flash-attn`, or use model.attention=sdpa"
        ) from error
    out = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    return out[0] if isinstance(out, tuple) else out


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]] = {
    "sdpa": _sdpa,
    "flash": _flash,
}

"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3 report, section 2.1.1).

Keys and values come from one small latent a token, queries from another; a rotary part, one key for all heads, carries
position. The down projections of both latents are one GEMM (`qkv_a`, 2112 outputs in V3). Attention itself is BF16 in
FP8 too (`core`); under recomputation (`mla_up`) q, k and v are not kept: attention's backward has them made again from
the latents, by the two up projections and the rotation.

Generation keeps the kv latent and the rotated key part of a token and layer, and no keys and values. New tokens attend
to latents: the key half of the up projection is absorbed by the queries (q^T (W c) = (W^T q)^T c), the value half is
applied to the sum of latents, so that all heads read one entry a token (V2 report, section 2.1.2). Prompts take the
plain path, which multiplies less for many tokens. FP8 absorbs the weight that its blocks hold.

Legend: T = B x S tokens, B sequences, S tokens of a sequence, D model, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fp8moe.layers.attention.cache import CachedForward
from fp8moe.layers.attention.choice import Heads, choose, chosen, machine_of
from fp8moe.layers.attention.context import Arrive, Local, gathered
from fp8moe.layers.attention.core import Positions, attend
from fp8moe.layers.attention.documents import Documents
from fp8moe.layers.attention.kept_output import joined_heads, keep_in_e5m6
from fp8moe.layers.attention.latent_cache import LatentCache, by_heads
from fp8moe.layers.attention.latent_context import attend_to_whole, local_latents
from fp8moe.layers.attention.rotary import keys_and_values, rotated_queries
from fp8moe.layers.attention.yarn import YarnConfig, rotation
from fp8moe.layers.linear import Linear
from fp8moe.layers.norm import Feeds, RMSNorm
from fp8moe.layers.operand import Rows, activation, recast
from fp8moe.layers.recipe import Precision, Recipe, Recompute
from fp8moe.layers.recompute import Recallable, SavedTensor, capture_saved, kept, recompute_saved
from fp8moe.limits import SIZE, Range, check_fields


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention; sizes count features."""

    num_heads: int  # query heads
    kv_lora_rank: int  # features of the latent of keys and values
    nope_dim: int  # features of a head's query and key without position
    rope_dim: int  # rotary features of a head's query and key
    v_dim: int  # features of a head's value
    q_lora_rank: int = 0  # features of the query latent; 0: queries without one
    rope_theta: float = 10000.0  # base of the rotary frequencies
    yarn: YarnConfig | None = None  # context extension; None: plain RoPE
    norm_eps: float = 1e-6  # of the latents' norms, which released models leave at 1e-6 whatever the model's is
    # kernels of core attention (`choice`): auto (the first that takes these heads), torch's sdpa, its cudnn or its
    # varlen (of variable length), flash (flash-attn 4), flex (FlexAttention)
    backend: Literal["auto", "sdpa", "cudnn", "varlen", "flex", "flash"] = "auto"
    kind: Literal["mla"] = "mla"  # latent attention

    def __post_init__(self) -> None:
        check_fields(
            self,
            "model.attention",
            num_heads=SIZE,
            kv_lora_rank=SIZE,
            nope_dim=SIZE,
            rope_dim=SIZE,
            v_dim=SIZE,
            q_lora_rank=Range(least=0, most=2**20, use="use 0 for none"),
            rope_theta=Range(above=1, most=1e12),  # at 1 every pair turn alike
            norm_eps=Range(above=0, most=1),
        )
        if self.rope_dim % 2:
            raise ValueError(
                f"model.attention.rope_dim={self.rope_dim} must be even, to rotate pairs: use {self.rope_dim + 1}"
            )

    @property
    def qk_dim(self) -> int:
        """Features of one query or key head: the part without position and the rotary part."""
        return self.nope_dim + self.rope_dim

    @property
    def queries(self) -> int:
        """Features of all query heads."""
        return self.num_heads * self.qk_dim

    @property
    def softmax_scale(self) -> float:
        """Factor of attention scores before the softmax, YaRN's included."""
        return self.qk_dim**-0.5 * (self.yarn.softmax_factor if self.yarn else 1.0)

    def fp8_sizes(self) -> dict[str, int]:
        """Sizes that are a contraction or a row of some FP8 product, by how they are configured."""
        return {
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "kv_lora_rank + rope_dim": self.kv_lora_rank + self.rope_dim,
            "num_heads * (nope_dim + rope_dim)": self.queries,
            "num_heads * (nope_dim + v_dim)": self.num_heads * (self.nope_dim + self.v_dim),
            "num_heads * v_dim": self.num_heads * self.v_dim,
        }

    def linears(self, dim: int) -> list[tuple[int, int]]:
        """(outputs, inputs) of the layer's Linears in a model of `dim` features."""
        q_a = self.q_lora_rank or self.queries
        return [
            (q_a + self.kv_lora_rank + self.rope_dim, dim),
            *([(self.queries, self.q_lora_rank)] if self.q_lora_rank else []),
            (self.num_heads * (self.nope_dim + self.v_dim), self.kv_lora_rank),
            (dim, self.num_heads * self.v_dim),
        ]

    def num_parameters(self, dim: int) -> int:
        """Parameters of one layer, its two latent norms included."""
        return sum(n * k for n, k in self.linears(dim)) + self.q_lora_rank + self.kv_lora_rank

    def core_flops(self, seq_len: int, *, causal: bool, layer: int) -> float:
        """Forward FLOPs of a layer's score and value products, a token, at sequences of `seq_len` tokens.

        layer: its block's number; here all layers cost the same.
        """
        flops = 2.0 * seq_len * self.num_heads * (self.qk_dim + self.v_dim)
        return flops / 2 if causal else flops

    def kept_bytes(self, recipe: Recipe) -> float:
        """Bytes a token that one layer keeps for its backward, beside its input.

        Always: the latents and the 1/rms of each, attention's output (E5M6 under FP8) and its log-sum-exp. Without
        recomputation also the latents' norms; q, k and v.
        """
        wide, again = recipe.dtype.itemsize, recipe.recompute
        saved_output = 1.5 + 4 / 128 if recipe.fp8 else wide
        latents = self.kv_lora_rank + (self.q_lora_rank or self.queries)
        total = wide * (latents + self.rope_dim) + saved_output * self.num_heads * self.v_dim + 4 * self.num_heads
        total += 4 * (2 if self.q_lora_rank else 1)
        if Recompute.NORM not in again:
            total += wide * (self.kv_lora_rank + self.q_lora_rank)
        if Recompute.MLA_UP not in again:
            total += wide * self.num_heads * (2 * self.qk_dim + self.nope_dim + self.v_dim)
        return total

    def input_bytes(self, recipe: Recipe) -> float:
        """Bytes a token of what the Linears behind the first read: what weight gradients that are put off keep.

        The latents with the 1/rms of each where columns are made of it, their norms without recomputation, attention's
        output.
        """
        wide, latents = recipe.dtype.itemsize, self.kv_lora_rank + (self.q_lora_rank or self.queries)
        saved_output = 1.5 + 4 / 128 if recipe.fp8 else wide
        total = wide * (latents + self.rope_dim) + saved_output * self.num_heads * self.v_dim
        total += 4 * recipe.fp8 * (2 if self.q_lora_rank else 1)
        if Recompute.NORM not in recipe.recompute:
            total += wide * (self.kv_lora_rank + self.q_lora_rank)
        return total

    def work_bytes(self, recipe: Recipe) -> float:
        """Bytes a token that the backward of one layer takes while it runs, beside what is kept.

        Queries, keys and the product of keys and values where they are made again, their gradients, that of the output
        and, under FP8, the output itself, unpacked; and of the kernel the sum of the queries' gradient and a number a
        head, in FP32.
        """
        again = 2 * self.qk_dim + self.nope_dim + self.v_dim if Recompute.MLA_UP in recipe.recompute else 0
        a_head = again + 2 * self.qk_dim + (3 if recipe.fp8 else 2) * self.v_dim
        return self.num_heads * (recipe.dtype.itemsize * a_head + 4 * self.qk_dim + 4)

    def positions(self, positions_BS: Tensor, lengths: tuple[int, ...] | None = None) -> Positions:
        """Rotations for tokens at `positions_BS` [B, S]; documents of these lengths, if given, are kept apart."""
        cos, sin = rotation(positions_BS.flatten(), self.rope_dim, self.rope_theta, self.yarn)
        documents = None if lengths is None else Documents(lengths, cos.device)
        return Positions(len(positions_BS), cos, sin, documents)

    def heads(self, recipe: Recipe, *, masked: bool, parted: bool = False) -> Heads:
        """What attention's kernels must take; masked: documents are kept apart; parted: queries are those of a part."""
        return Heads(self.qk_dim, self.v_dim, recipe.dtype, masked, parted=parted)

    def build(self, dim: int, recipe: Recipe, *, norm_eps: float, layer: int) -> LatentAttention:
        """The layer, in a model of `dim` features: the same for every block, its norms have an eps of their own."""
        return LatentAttention(self, dim, recipe)


class LatentAttention(nn.Module):
    """x [T, D] -> [T, D]."""

    def __init__(self, config: MlaConfig, dim: int, recipe: Recipe) -> None:
        super().__init__()
        c = self.config = config
        self.recipe = recipe
        rows = (c.q_lora_rank or c.queries, c.kv_lora_rank + c.rope_dim)
        self.qkv_a = Linear(dim, sum(rows), recipe, matrix_rows=rows)
        self.q_norm = RMSNorm(c.q_lora_rank, recipe, eps=c.norm_eps, feeds=Feeds.LINEAR) if c.q_lora_rank else None
        self.q_b = Linear(c.q_lora_rank, c.queries, recipe) if c.q_lora_rank else None
        feeds = Feeds.GATHER if recipe.gathered else Feeds.LINEAR
        self.kv_norm = RMSNorm(c.kv_lora_rank, recipe, eps=c.norm_eps, feeds=feeds)
        self.kv_b = Linear(c.kv_lora_rank, c.num_heads * (c.nope_dim + c.v_dim), recipe)
        self.o = Linear(c.num_heads * c.v_dim, dim, recipe)
        if not self.o.weight.is_meta:  # a back end that can't run is refused before the first forward
            heads = c.heads(recipe, masked=False, parted=recipe.gathered)
            choose(c.backend, heads, machine_of(self.o.weight.device, heads))

    def forward(self, x_TD: Tensor | Recallable, positions: Positions) -> Tensor:
        if positions.context is not None:
            local = self.local(x_TD, positions)
            return self.finish(local.own, None, gathered(local, positions.context), positions)
        q_a, kv_a, k_rope = self.down(x_TD)
        q_latent = kept(q_a) if self.q_norm is None else self.q_norm(q_a)
        kv_latent = self.kv_norm(kv_a)
        q = q_latent.tensor if self.q_b is None else self.q_b(q_latent)
        if positions.cached is not None:
            self._keep(positions.cached, kv_latent.recall(), k_rope, positions)
            if not positions.cached.is_first:
                return self.output([self._attend_to_latents(q, positions, positions.cached)])
        kv_x = activation(kv_latent, self.recipe, power_of_two=self.kv_norm.power_of_two)
        kv, kv_rows = self.kv_b(kv_x), recast(kv_latent, self.recipe)
        return self._attend(self.heads_of(q, kv, k_rope, positions), q_latent, kv_rows, k_rope, positions)

    def local(self, x_TD: Tensor | Recallable, positions: Positions) -> Local:
        """What a rank makes of its own tokens, before the gather of `latent_context`."""
        return local_latents(self, x_TD)

    def finish(self, own: tuple[Tensor, ...], state: None, arrive: Arrive, positions: Positions) -> Tensor:
        """Attention of this rank's queries to all tokens, behind it."""
        return attend_to_whole(self, own, arrive, positions)

    def down(self, x_TD: Tensor | Recallable) -> tuple[Tensor, ...]:
        """Both latents before their norms, and the keys' rotary part."""
        c = self.config
        return self.qkv_a(x_TD).split([c.q_lora_rank or c.queries, c.kv_lora_rank, c.rope_dim], dim=-1)

    def _attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        q_latent: Recallable,
        kv_rows: Callable[[], Rows],
        k_rope: Tensor,
        positions: Positions,
    ) -> Tensor:
        """Core attention and the output's projection; the latents are for the backward."""
        c = self.config
        choice = chosen(c.backend, c.heads(self.recipe, masked=positions.masked), qkv[0].device)
        with capture_saved() as captured:
            out = attend(choice.kernel, *qkv, c.softmax_scale, positions)
        if Recompute.MLA_UP in self.recipe.recompute:
            again = self.heads_again(q_latent, kv_rows, k_rope.detach(), positions)
            recompute_saved(captured, qkv, again)
        return self.output([out], captured, saves_output=choice.saves_output)

    def output(
        self, outputs: Sequence[Tensor], captured: Sequence[SavedTensor] = (), *, saves_output: bool = False
    ) -> Tensor:
        """Attention's output [B, S, H, V] of each group of heads and what it saved -> [T, D]."""
        if self.recipe.precision is Precision.FP8:
            power_of_two = self.recipe.power_of_two(True)
            return self.o(keep_in_e5m6(outputs, captured, saves_output=saves_output, power_of_two=power_of_two))
        return self.o(joined_heads(outputs))

    def heads_of(self, q: Tensor, kv: Tensor, k_rope: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """What the up projections give, and the shared rotary part of keys -> q, k, v [B, S, H, d] for attention.

        Of all heads, or of those that both projections have.
        """
        c = self.config
        cos, sin = positions.of_keys
        q = rotated_queries(q.unflatten(-1, (-1, c.qk_dim)), positions.cos, positions.sin)
        k, v = keys_and_values(kv.unflatten(-1, (-1, c.nope_dim + c.v_dim)), k_rope, cos, sin, nope_dim=c.nope_dim)

        def by_sequence(t: Tensor) -> Tensor:  # [T, H, d] -> [B, S, H, d]
            return t.unflatten(0, (positions.num_sequences, -1))

        return by_sequence(q), by_sequence(k), by_sequence(v)

    def heads_again(
        self, q_latent: Recallable, kv_rows: Callable[[], Rows], k_rope: Tensor, positions: Positions
    ) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """The same from the latents, recast or recalled: casts and products repeated, without autograd."""
        recall_q = q_latent.recall
        q_rows: Callable[[], Rows] | None = None if self.q_b is None else recast(q_latent, self.recipe)

        def again() -> tuple[Tensor, Tensor, Tensor]:
            q = recall_q() if self.q_b is None or q_rows is None else self.q_b.fprop(q_rows())
            return self.heads_of(q, self.kv_b.fprop(kv_rows()), k_rope, positions)

        return again

    def new_cache(self, rows: int, length: int) -> LatentCache:
        """A cache of `rows` sequences of at most `length` tokens: kv_lora_rank + rope_dim values a token."""
        return LatentCache(self, rows, length)

    def _keep(self, cached: CachedForward, latent_TR: Tensor, k_rope: Tensor, positions: Positions) -> None:
        """Write the latents and rotated key parts of the new tokens."""
        rotated = rotated_queries(k_rope.unsqueeze(1), positions.cos, positions.sin).squeeze(1)
        cached.write(self, torch.cat([latent_TR, rotated], dim=-1))

    def _attend_to_latents(self, q: Tensor, positions: Positions, cached: CachedForward) -> Tensor:
        """Attention of new tokens' q [T, H d] to the cache, in latent space -> [B, S, H, V]."""
        c, cache = self.config, cached.caches[self]
        assert isinstance(cache, LatentCache)
        q = rotated_queries(q.unflatten(-1, (c.num_heads, -1)), positions.cos, positions.sin)
        q_nope, q_rope = q.split([c.nope_dim, c.rope_dim], dim=-1)
        queries = torch.cat([by_heads(q_nope, cache.key_up_HNR), q_rope], dim=-1)
        keys = cache.entries.unsqueeze(2)  # of one head
        queries = queries.unflatten(0, (positions.num_sequences, -1))
        sums = cached.attend(queries, keys, keys[..., : c.kv_lora_rank], c.softmax_scale)
        out = by_heads(sums.flatten(0, 1), cache.value_up_HRV)
        return out.unflatten(0, (positions.num_sequences, -1))

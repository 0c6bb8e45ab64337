"""Grouped-query attention (arXiv 2305.13245): several query heads share one head of keys and values.

Qwen3-MoE, GLM-4.5, OLMoE and GPT-OSS attend so; with as many key heads as query heads it is plain multi-head attention.
Queries, keys and values are one GEMM (`qkv`), with or without a bias; queries and keys may be normed, over a head's
features or over all heads', and everything may be clipped. A head is [features without position, rotary pairs], as in
`mla`: a released model that rotates the halves of a head's first features has the rows of q and k permuted on the way
in and out, which changes no bit.

Attention itself is BF16 in FP8 too, and its output is kept in 12 bits (`core`). Under recomputation (`mla_up`) q, k and
v are not kept: attention's backward has them made again from the layer's input, which the projection's weight gradient
needs anyway. Values are copied out of the product where nothing else keeps it alive.

Generation keeps the rotated keys and the values of a token and layer (`cache`).

Legend: T = B x S tokens, B sequences, S tokens of a sequence, D model, H heads of queries, G of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fp8moe.layers.attention.cache import CachedForward, LayerCache
from fp8moe.layers.attention.choice import Choice, Heads, choose, chosen, machine_of
from fp8moe.layers.attention.context import Arrive, Local, gathered
from fp8moe.layers.attention.core import Positions, attend
from fp8moe.layers.attention.documents import Documents
from fp8moe.layers.attention.grouped_context import Queries, attend_to_whole, local_heads
from fp8moe.layers.attention.kept_output import keep_in_e5m6
from fp8moe.layers.attention.rotary import rotated_queries
from fp8moe.layers.attention.sinks import make_sinks, widened
from fp8moe.layers.attention.yarn import YarnConfig, rotation
from fp8moe.layers.bias import add_bias, make_bias
from fp8moe.layers.linear import Linear
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.operand import recast
from fp8moe.layers.recipe import Precision, Recipe, Recompute
from fp8moe.layers.recompute import Recallable, SavedTensor, capture_saved, kept, recompute_saved
from fp8moe.limits import SIZE, Range, check_fields


@dataclass(frozen=True)
class GqaConfig:
    """Grouped-query attention; sizes count features."""

    num_heads: int  # query heads
    num_kv_heads: int  # heads of keys and values, each shared by num_heads / num_kv_heads query heads
    head_dim: int  # features of a head
    rope_dim: int  # rotary features of a head, the last ones
    rope_theta: float = 10000.0  # base of the rotary frequencies
    yarn: YarnConfig | None = None  # context extension; None: plain RoPE
    # RMSNorm of queries and keys: one gain for a head's features (head) or for those of all heads (full)
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False  # biases of the projections of queries, keys and values
    o_bias: bool = False  # a bias of the output projection
    clip_qkv: float | None = None  # bound of the absolute values of q, k and v; None: none
    # tokens that a query sees, itself included, in the layers of window_layers; None: all before it
    window: int | None = None
    window_layers: Literal["all", "even", "odd"] = "all"  # layers that have the window; even counts layer 0
    sinks: bool = False  # a learnt logit a head that takes part in the softmax and has no value
    # kernels of core attention (`choice`): auto (the first that takes these heads), torch's sdpa, its cudnn or its
    # varlen (of variable length), flash (flash-attn 4), flex (FlexAttention)
    backend: Literal["auto", "sdpa", "cudnn", "varlen", "flex", "flash"] = "auto"
    kind: Literal["gqa"] = "gqa"  # grouped queries

    def __post_init__(self) -> None:
        check_fields(
            self,
            "model.attention",
            num_heads=SIZE,
            num_kv_heads=SIZE,
            head_dim=Range(least=2, most=2**20),
            rope_dim=SIZE,
            rope_theta=Range(above=1, most=1e12),  # at 1 every pair turns alike
            clip_qkv=Range(above=0, most=1e6, use="use null for none"),
            window=Range(least=1, most=2**24, use="use null for none"),
        )
        if self.num_heads % self.num_kv_heads:
            legal = max(g for g in range(1, self.num_kv_heads + 1) if self.num_heads % g == 0)
            raise ValueError(
                f"model.attention.num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: "
                f"use {legal}"
            )
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise ValueError(
                f"model.attention.rope_dim={self.rope_dim} must be even, to rotate pairs, and at most "
                f"head_dim={self.head_dim}: use {min(self.rope_dim + 1, self.head_dim // 2 * 2)}"
            )

    @property
    def queries(self) -> int:
        """Features of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Features of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor of attention scores before the softmax, YaRN's included."""
        return self.head_dim**-0.5 * (self.yarn.softmax_factor if self.yarn else 1.0)

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of block number `layer` sees, None for all before it."""
        parity = {"all": layer % 2, "even": 0, "odd": 1}[self.window_layers]
        return self.window if layer % 2 == parity else None

    def fp8_sizes(self) -> dict[str, int]:
        """Sizes that are a contraction or a row of some FP8 product, by how they are configured."""
        return {
            "(num_heads + 2 * num_kv_heads) * head_dim": self.queries + 2 * self.keys,
            "num_heads * head_dim": self.queries,
        }

    def linears(self, dim: int) -> list[tuple[int, int]]:
        """(outputs, inputs) of the layer's Linears in a model of `dim` features."""
        return [(self.queries + 2 * self.keys, dim), (dim, self.queries)]

    def num_parameters(self, dim: int) -> int:
        """Parameters of one layer: Linears, biases, norms of queries and keys, sinks."""
        biases = self.qkv_bias * (self.queries + 2 * self.keys) + self.o_bias * dim
        norms = {"none": 0, "head": 2 * self.head_dim, "full": self.queries + self.keys}[self.qk_norm]
        return sum(n * k for n, k in self.linears(dim)) + biases + norms + self.sinks * self.num_heads

    def core_flops(self, seq_len: int, *, causal: bool, layer: int) -> float:
        """Forward FLOPs of block number `layer`'s score and value products, a token, at sequences of `seq_len` tokens.

        Keys that a query sees, on average: with a window w, w - w^2 / 2S of the causal S / 2.
        """
        seen = min(self.window_of(layer) or seq_len, seq_len)
        keys = seen - seen**2 / (2 * seq_len) if causal else seen
        return 2.0 * keys * self.num_heads * 2 * self.head_dim

    def kept_bytes(self, recipe: Recipe) -> float:
        """Bytes a token that one layer keeps for its backward, beside its input.

        Always attention's output (E5M6 under FP8) and its log-sum-exp. With norms also what they norm and the 1/rms of
        each row; with clipping what is clipped; with sinks what they multiply, and by what. Without recomputation also
        q, k, v; values that lie in a product which a norm over all heads keeps live on.
        """
        wide = recipe.dtype.itemsize
        saved_output = 1.5 + 4 / 128 if recipe.fp8 else wide
        total = saved_output * self.queries + 4.0 * self.num_heads
        if Recompute.MLA_UP not in recipe.recompute:
            total += wide * (self.queries + 2 * self.keys)
        elif self.qk_norm == "full" and self.clip_qkv is None:
            total += wide * self.keys
        if self.sinks:
            total += wide * self.queries + 4 * self.num_heads
        if self.qk_norm != "none":
            total += wide * (self.queries + self.keys)
            total += 4 * (self.num_heads + self.num_kv_heads if self.qk_norm == "head" else 2)
        if self.clip_qkv is not None:
            total += wide * (self.queries + 2 * self.keys)
        return total

    def input_bytes(self, recipe: Recipe) -> float:
        """Bytes a token of attention's output, which the last Linear reads and its weight gradient, put off, keeps."""
        return (1.5 + 4 / 128 if recipe.fp8 else recipe.dtype.itemsize) * self.queries

    def work_bytes(self, recipe: Recipe) -> float:
        """Bytes a token that the backward of one layer takes while it runs, beside what is kept.

        Queries, keys and values where they are made again, their gradients, the output and its gradient; and of the
        kernel the sum of the queries' gradient and a number a head, in FP32.
        """
        heads = self.queries + 2 * self.keys
        again = heads if Recompute.MLA_UP in recipe.recompute else 0
        return recipe.dtype.itemsize * (again + heads + 2 * self.queries) + 4.0 * (self.queries + self.num_heads)

    def positions(self, positions_BS: Tensor, lengths: tuple[int, ...] | None = None) -> Positions:
        """Rotations for tokens at `positions_BS` [B, S]; documents of these lengths, if given, are kept apart."""
        cos, sin = rotation(positions_BS.flatten(), self.rope_dim, self.rope_theta, self.yarn)
        documents = None if lengths is None else Documents(lengths, cos.device)
        return Positions(len(positions_BS), cos, sin, documents)

    def heads(self, recipe: Recipe, *, masked: bool, parted: bool = False, layer: int | None = None) -> Heads:
        """What attention's kernels must take in block number `layer` (None: in one of those with a window, if any are).

        masked: documents are kept apart. parted: queries are those of a part of each sequence.
        """
        window = self.window if layer is None else self.window_of(layer)
        group = self.num_heads // self.num_kv_heads
        return Heads(self.head_dim, self.head_dim, recipe.dtype, masked, group, window, self.sinks, parted)

    def build(self, dim: int, recipe: Recipe, *, norm_eps: float, layer: int) -> GroupedQueryAttention:
        """The layer of block number `layer`, in a model of `dim` features."""
        return GroupedQueryAttention(self, dim, recipe, norm_eps=norm_eps, layer=layer)


class GroupedQueryAttention(nn.Module):
    """x [T, D] -> [T, D]."""

    def __init__(self, config: GqaConfig, dim: int, recipe: Recipe, *, norm_eps: float, layer: int = 0) -> None:
        super().__init__()
        c = self.config = config
        self.recipe, self.layer, self.window = recipe, layer, config.window_of(layer)
        rows = (c.queries, c.keys, c.keys)
        self.qkv = Linear(dim, sum(rows), recipe, matrix_rows=rows)
        self.qkv_bias = make_bias(sum(rows), recipe) if c.qkv_bias else None
        widths = {"none": None, "head": (c.head_dim, c.head_dim), "full": (c.queries, c.keys)}[c.qk_norm]
        self.q_norm = RMSNorm(widths[0], recipe, eps=norm_eps) if widths else None
        self.k_norm = RMSNorm(widths[1], recipe, eps=norm_eps) if widths else None
        self.o = Linear(c.queries, dim, recipe)
        self.o_bias = make_bias(dim, recipe) if c.o_bias else None
        self.sinks = make_sinks(c.num_heads, recipe) if c.sinks else None
        if not self.o.weight.is_meta:  # a back end that can't run is refused before the first forward
            heads = c.heads(recipe, masked=False, parted=recipe.gathered, layer=layer)
            choose(c.backend, heads, machine_of(self.o.weight.device, heads))

    def forward(self, x_TD: Tensor | Recallable, positions: Positions) -> Tensor:
        x = kept(x_TD)
        if positions.context is not None:
            local = self.local(x, positions)
            return self.finish(local.own, local.state, gathered(local, positions.context), positions)
        qkv = self.heads_of(self.product_of(x), positions)
        if positions.cached is not None:
            self._keep(positions.cached, *qkv[1:])
            if not positions.cached.is_first:
                sinks = None if self.sinks is None else widened(self.sinks)
                return self._output(self._attend_to_cache(qkv[0], positions.cached, sinks))
        return self.attend(qkv, qkv, self.heads_again(x, positions), positions)

    def local(self, x_TD: Tensor | Recallable, positions: Positions) -> Local:
        """What a rank makes of its own tokens, before the gather of `grouped_context`."""
        return local_heads(self, x_TD, positions)

    def finish(self, own: tuple[Tensor, ...], state: Queries, arrive: Arrive, positions: Positions) -> Tensor:
        """Attention of this rank's queries to all tokens, behind it."""
        return attend_to_whole(self, own, state, arrive, positions)

    def product_of(self, x: Recallable) -> Tensor:
        qkv_TN = self.qkv(x)
        return qkv_TN if self.qkv_bias is None else add_bias(qkv_TN, self.qkv_bias)

    def choice(self, positions: Positions, device: torch.device) -> Choice:
        """The kernel of core attention."""
        masked, parted = positions.masked, positions.context is not None
        heads = self.config.heads(self.recipe, masked=masked, parted=parted, layer=self.layer)
        return chosen(self.config.backend, heads, device)

    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        recomputed: Sequence[Tensor],
        again: Callable[[], Sequence[Tensor]],
        positions: Positions,
    ) -> Tensor:
        """Core attention and the output's projection; under recomputation `again` makes `recomputed` once more."""
        c, sinks = self.config, None if self.sinks is None else widened(self.sinks)
        choice = self.choice(positions, qkv[0].device)
        with capture_saved() as captured:
            out = attend(choice.kernel, *qkv, c.softmax_scale, positions, window=self.window, sinks=sinks)
        if Recompute.MLA_UP in self.recipe.recompute:
            recompute_saved(captured, recomputed, again)
        return self._output(out, captured, saves_output=choice.saves_output)

    def _output(self, out: Tensor, captured: Sequence[SavedTensor] = (), *, saves_output: bool = False) -> Tensor:
        """Attention's output [B, S, H, d] and what it saved -> [T, D]."""
        if self.recipe.precision is Precision.FP8:
            power_of_two = self.recipe.power_of_two(True)
            y_TD = self.o(keep_in_e5m6([out], captured, saves_output=saves_output, power_of_two=power_of_two))
        else:
            y_TD = self.o(out.flatten(0, 1).flatten(1))
        return y_TD if self.o_bias is None else add_bias(y_TD, self.o_bias)

    def heads_of(self, qkv_TN: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """The product -> q [B, S, H, d], k and v [B, S, G, d] for attention."""
        c = self.config
        q, k, v = qkv_TN.split([c.queries, c.keys, c.keys], dim=-1)
        is_product_kept = c.qk_norm == "full" or (c.qk_norm == "none" and c.clip_qkv is not None)
        if not is_product_kept:
            v = v.contiguous()
        if c.qk_norm == "head":  # rows of heads are copies, or one key head alone would keep the whole product
            q, k = q.contiguous(), k.contiguous()
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        if c.clip_qkv is not None:
            q, k, v = (x.clamp(-c.clip_qkv, c.clip_qkv) for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (-1, c.head_dim)) for x in (q, k, v))
        q, k = (rotated_queries(x, positions.cos, positions.sin) for x in (q, k))
        q, k, v = (x.unflatten(0, (positions.num_sequences, -1)) for x in (q, k, v))
        return q, k, v

    def new_cache(self, rows: int, length: int) -> LayerCache:
        """A cache of `rows` sequences of at most `length` tokens: keys and values of every key head."""
        return LayerCache(rows, length, 2 * self.config.keys, self.o.weight.detach())

    def _keep(self, cached: CachedForward, k: Tensor, v: Tensor) -> None:
        """Write the keys and values of the new tokens."""
        cached.write(self, torch.stack([k, v], dim=2).flatten(2).flatten(0, 1))

    def _attend_to_cache(self, q: Tensor, cached: CachedForward, sinks: Tensor | None) -> Tensor:
        """Attention of new tokens' q [B, S, H, d] to the cache."""
        keys, values = cached.caches[self].entries.unflatten(-1, (2, self.config.num_kv_heads, -1)).unbind(2)
        return cached.attend(q, keys, values, self.config.softmax_scale, window=self.window, sinks_H=sinks)

    def heads_again(self, x: Recallable, positions: Positions) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """The same from the layer's input, recast or recalled: casts and products repeated, without autograd."""
        rows = recast(x, self.recipe)

        def again() -> tuple[Tensor, Tensor, Tensor]:
            qkv_TN = self.qkv.fprop(rows())
            if self.qkv_bias is not None:
                qkv_TN += self.qkv_bias
            return self.heads_of(qkv_TN, positions)

        return again


def _normed(norm: RMSNorm, x_TN: Tensor) -> Tensor:
    """x [T, N] normed in runs of the norm's width: a head's features, or all."""
    return norm(x_TN.reshape(-1, norm.weight.shape[0])).tensor.view(x_TN.shape)

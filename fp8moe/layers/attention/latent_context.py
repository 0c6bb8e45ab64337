"""Latent attention of a part's queries (`context`): latents are gathered, keys of all tokens made by groups of heads.

Keys and values of whole sequences are large: at 131,072 tokens the 128 heads of DeepSeek-V3 take 15 GB forward and 30
GB with their gradients, whatever cp is. So heads go in groups, whose keys and values stay below KEY_BYTES, one group
after the other in both directions: up projections of the group, attention, and under recomputation (`mla_up`) both
again in its backward. All products are of the same rows and weights; the latent's gradient is a sum over groups, each
rounded to the dtype of activations. The up projection's weight gradient is computed on the spot: put off, it would keep
the gradients of all tokens' keys. Refused: attention to the latents themselves, as generation does, 3.4 times the
multiplications of V3's heads.

Under FP8 the latent travels in FP8 with power-of-two scales, and columns are made of what arrives, as those of
dispatched rows.

Legend: T tokens of whole sequences, H heads, H' of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from fp8moe.kernels.fp8 import BLOCK_TILE
from fp8moe.layers.attention.choice import Heads, chosen
from fp8moe.layers.attention.context import Arrive, Local
from fp8moe.layers.attention.core import Positions, attend, keys_in_order
from fp8moe.layers.linear import Linear, LinearPart
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.operand import Activation, Rows, activation, from_rows, ready_cast, recast
from fp8moe.layers.recipe import Recipe, Recompute
from fp8moe.layers.recompute import Recallable, SavedTensor, capture_saved, kept, recompute_saved

KEY_BYTES = 2 << 30  # of the keys, and of their product with the values, of a group of heads


class LatentSizes(Protocol):
    """Heads of latent attention and their kernel; see `mla.MlaConfig`."""

    @property
    def num_heads(self) -> int: ...
    @property
    def qk_dim(self) -> int: ...
    @property
    def nope_dim(self) -> int: ...
    @property
    def v_dim(self) -> int: ...
    @property
    def softmax_scale(self) -> float: ...
    @property
    def backend(self) -> str: ...

    def heads(self, recipe: Recipe, *, masked: bool, parted: bool) -> Heads: ...


class Latent(Protocol):
    """A layer of latent attention, `mla.LatentAttention`."""

    recipe: Recipe
    q_norm: RMSNorm | None
    q_b: Linear | None
    kv_norm: RMSNorm
    kv_b: Linear

    @property
    def config(self) -> LatentSizes: ...

    def down(self, x_TD: Tensor | Recallable) -> tuple[Tensor, ...]: ...

    def heads_of(
        self, q: Tensor, kv: Tensor, k_rope: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def output(
        self, outputs: Sequence[Tensor], captured: Sequence[SavedTensor] = (), *, saves_output: bool = False
    ) -> Tensor: ...


def heads_at_once(config: LatentSizes, recipe: Recipe, tokens: int) -> int:
    """Heads of a group at `tokens` of whole sequences: the most that KEY_BYTES hold, a divisor of all.

    Under FP8 a group ends on a block of both up projections' weights.
    """
    c = config
    a_head = tokens * (c.qk_dim + c.nope_dim + c.v_dim) * recipe.dtype.itemsize
    block = BLOCK_TILE[0] if recipe.fp8 else 1
    legal = [
        heads
        for heads in range(1, c.num_heads)
        if not (c.num_heads % heads or heads * c.qk_dim % block or heads * (c.nope_dim + c.v_dim) % block)
    ]
    legal.append(c.num_heads)
    return max((heads for heads in legal if heads * a_head <= KEY_BYTES), default=legal[0])


def local_latents(attention: Latent, x_TD: Tensor | Recallable) -> Local:
    """The queries' latent, which stays here, and what is gathered: the keys' latent and their rotary part."""
    q_a, kv_a, k_rope = attention.down(x_TD)
    kv_latent = attention.kv_norm(kv_a)
    ready = ready_cast(kv_latent, attention.recipe)
    rows = kv_latent.tensor.detach() if ready is None else ready.rows
    return Local((q_a,), (kv_latent.tensor, k_rope), (rows, k_rope.detach()))


def attend_to_whole(attention: Latent, own: tuple[Tensor, ...], arrive: Arrive, positions: Positions) -> Tensor:
    """Attention of this rank's queries to all tokens -> [t, D]; the queries' projections hide the gather."""
    c, recipe, context = attention.config, attention.recipe, positions.context
    assert context is not None
    (q_a,) = own
    q_latent = kept(q_a) if attention.q_norm is None else attention.q_norm(q_a)
    size = heads_at_once(c, recipe, len(context.cos))
    groups = [_Group(attention, first, size, q_latent) for first in range(0, c.num_heads, size)]
    queries = [group.queries() for group in groups]
    whole = arrive()
    (latent, k_rope), rows = whole.handles, whole.rows[0]
    latents = Activation(latent, from_rows(rows))
    choice = chosen(c.backend, c.heads(recipe, masked=positions.masked, parted=True), q_a.device)

    def heads_of(q: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attention.heads_of(q, kv, k_rope, positions)
        return q, keys_in_order(choice.kernel, k, context), keys_in_order(choice.kernel, v, context)

    outputs, captured = list[Tensor](), list[SavedTensor]()
    for group in groups:
        qkv = heads_of(queries.pop(0), group.kv(latents), k_rope)
        with capture_saved() as saved:
            outputs.append(attend(choice.kernel, *qkv, c.softmax_scale, positions))
        if Recompute.MLA_UP in recipe.recompute:
            recompute_saved(saved, qkv, partial(_again, group, rows, k_rope.detach(), heads_of))
        captured += saved
    return attention.output(outputs, captured, saves_output=choice.saves_output)


def _again(
    group: _Group,
    rows: Rows,
    k_rope: Tensor,
    heads_of: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    return heads_of(group.queries_again(), group.kv.fprop(rows), k_rope)


class _Group:
    """The up projections of heads [first, first + count)."""

    def __init__(self, attention: Latent, first: int, count: int, q_latent: Recallable) -> None:
        c, recipe = attention.config, attention.recipe

        def of_heads(features: int) -> slice:
            return slice(first * features, (first + count) * features)

        self._features = of_heads(c.qk_dim)
        self.kv = LinearPart(attention.kv_b, of_heads(c.nope_dim + c.v_dim), at_once=True)
        self._tensor: Tensor | None = q_latent.tensor
        self._recall = q_latent.recall
        if attention.q_b is not None:
            self._q: LinearPart | None = LinearPart(attention.q_b, self._features)
            self._x: Activation | None = activation(q_latent, recipe, power_of_two=recipe.power_of_two(False))
            self._rows = recast(q_latent, recipe)
        else:
            self._q = self._x = None

    def queries(self) -> Tensor:
        """[t, H' d], once, followed by autograd; from then on the backward's parts alone are held."""
        tensor, x, self._tensor, self._x = self._tensor, self._x, None, None
        if self._q is not None and x is not None:
            return self._q(x)
        assert tensor is not None
        return tensor[:, self._features]

    def queries_again(self) -> Tensor:
        """The same for the backward."""
        return self._recall()[:, self._features] if self._q is None else self._q.fprop(self._rows())

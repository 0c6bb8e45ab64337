"""Grouped-query attention of a part's queries (`context`): keys and values of the few key heads are gathered.

They are kept as they arrive, also under recomputation, which makes the rank's own queries again and nothing of others.

Legend: T tokens of whole sequences, t of this rank, G heads of keys, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fp8moe.layers.attention.choice import Choice
from fp8moe.layers.attention.context import Arrive, Local
from fp8moe.layers.attention.core import Positions, keys_in_order
from fp8moe.layers.operand import detached_handle, revealed
from fp8moe.layers.recompute import Recallable, kept


class GroupedSizes(Protocol):
    """Key heads of grouped-query attention; see `gqa.GqaConfig`."""

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Grouped(Protocol):
    """A layer of grouped-query attention, `gqa.GroupedQueryAttention`."""

    @property
    def config(self) -> GroupedSizes: ...

    def product_of(self, x: Recallable) -> Tensor: ...

    def heads_of(self, qkv_TN: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]: ...

    def heads_again(self, x: Recallable, positions: Positions) -> Callable[[], tuple[Tensor, Tensor, Tensor]]: ...

    def choice(self, positions: Positions, device: torch.device) -> Choice: ...

    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        recomputed: Sequence[Tensor],
        again: Callable[[], Sequence[Tensor]],
        positions: Positions,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Queries:
    """A rank's queries [B, S / cp, H, d] while keys are gathered, and what makes its own q, k and v again."""

    values: Tensor
    again: Callable[[], tuple[Tensor, Tensor, Tensor]]


def local_heads(attention: Grouped, x_TD: Tensor | Recallable, positions: Positions) -> Local:
    """Queries, which stay here, and what is gathered: keys and values [t, G d]."""
    x = kept(x_TD)
    q, k, v = attention.heads_of(attention.product_of(x), positions)
    shared = k.flatten(0, 1).flatten(1), v.flatten(0, 1).flatten(1)
    state = Queries(q.detach(), attention.heads_again(x, positions))
    return Local((detached_handle(q),), shared, tuple(one.detach() for one in shared), state)


def attend_to_whole(
    attention: Grouped, own: tuple[Tensor, ...], state: Queries, arrive: Arrive, positions: Positions
) -> Tensor:
    """Attention of this rank's queries to all tokens -> [t, D]."""
    q, again, handles, context = revealed(own[0], state.values), state.again, arrive().handles, positions.context
    assert context is not None
    kernel, c = attention.choice(positions, q.device).kernel, attention.config

    def in_order(x_TN: Tensor) -> Tensor:
        return keys_in_order(kernel, x_TN.view(positions.num_sequences, -1, c.num_kv_heads, c.head_dim), context)

    values = tuple(handle.detach() for handle in handles)
    k, v = map(in_order, handles)
    return attention.attend((q, k, v), (q, k, v), lambda: (again()[0], *map(in_order, values)), positions)

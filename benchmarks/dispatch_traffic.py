"""Bytes that a dispatch and its combine send, by formula, and the naive all-to-all that they are compared with.

The formulas are computed from the routing alone and share no code with the dispatchers, whose own count of the bytes
they hand to collectives must equal them exactly. Only payload is counted, not headers and acknowledgements.

    FP8 row      D codes + D / 128 exponents + 6 K ids and weights + 2        to a rank, or to a node; a multiple of 16
    BF16 row     2 D                                                          back from it
    counts       8 (chunks (1 + L) + e + 1) bytes a pair of ranks             once a dispatch
    naive        2 D to the expert's rank and 2 D back for every copy

Legend: T tokens of a rank, K top-k, D model, E experts, e experts a rank, W ranks = M nodes x L ranks a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.kernels.permute import RowMap, permute, plan_rows, unpermute
from fp8moe.parallel.collectives import exchange, start_all_to_all


@dataclass(frozen=True)
class Setting:
    """One size: `per_node` ranks share a node; a token chooses `topk` experts of at most `top_nodes` nodes."""

    tokens: int
    hidden: int
    ranks: int
    per_node: int
    experts: int
    topk: int
    top_nodes: int | None = None
    chunks: int = 1

    @property
    def nodes(self) -> int:
        return self.ranks // self.per_node

    @property
    def shape(self) -> str:
        """The size as the record shows it."""
        return f"T{self.tokens} D{self.hidden} ep{self.nodes}x{self.per_node} E{self.experts} top{self.topk}"


def routing(setting: Setting, seed: int) -> Tensor:
    """Random expert ids [T, K] of one rank, limited to `top_nodes` nodes if that is set."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(setting.tokens, setting.experts, generator=generator)
    if setting.top_nodes is not None and setting.top_nodes < setting.nodes:
        node_scores = torch.rand(setting.tokens, setting.nodes, generator=generator)
        open_nodes = torch.zeros_like(node_scores).scatter_(1, node_scores.topk(setting.top_nodes).indices, 1.0)
        scores = scores * open_nodes.repeat_interleave(setting.experts // setting.nodes, 1)
    return scores.topk(setting.topk).indices


@dataclass(frozen=True)
class Traffic:
    """Payload bytes that one rank sends for a dispatch and returns for its combine, across nodes and inside its own."""

    across: int
    inside: int


def distinct(ids: Tensor, span: int, own: int) -> int:
    """(token, peer) pairs of a batch, a peer being `span` experts, except those of peer `own`."""
    peers = (ids // span).sort(dim=1).values
    first = torch.ones_like(peers, dtype=torch.bool)
    first[:, 1:] = peers[:, 1:] != peers[:, :-1]
    return int((first & (peers != own)).sum())


def forward_row(setting: Setting) -> int:
    parts = setting.hidden + -(-setting.hidden // 128) + 6 * setting.topk + 2
    return -(-parts // 16) * 16


def expected(kind: str, setting: Setting, all_ids: list[Tensor]) -> Traffic:
    """All ranks' bytes together, of dispatch and combine, for the ids of every rank."""
    s, e = setting, setting.experts // setting.ranks
    node_span, across, inside = e * s.per_node, 0, 0
    both_directions = forward_row(s) + 2 * s.hidden
    local = s.per_node if kind == "two hops" else 1
    counts = 8 * (s.chunks * (1 + local) + e + 1)
    for rank, ids in enumerate(all_ids):
        node = rank // s.per_node
        if kind == "naive":
            crossing = int((ids // node_span != node).sum())
            staying = int((ids // e != rank).sum()) - crossing
            across += crossing * 4 * s.hidden + 8 * (s.ranks - s.per_node)
            inside += staying * 4 * s.hidden + 8 * (s.per_node - 1)
            continue
        across += counts * (s.ranks - s.per_node)
        inside += counts * (s.per_node - 1)
        if kind == "one hop":
            everywhere = distinct(ids, e, rank)
            mine = torch.where(ids // node_span == node, ids, rank * e)  # rows for other nodes don't count
            staying = distinct(mine, e, rank)
            across += (everywhere - staying) * both_directions
            inside += staying * both_directions
        else:
            across += distinct(ids, node_span, node) * both_directions
            # In each node the peer of this rank's local index sends the token on, unless it is its own.
            for there in range(s.nodes):
                peer = there * s.per_node + rank % s.per_node
                inside += distinct(torch.where(ids // node_span == there, ids, peer * e), e, peer) * both_directions
    return Traffic(across, inside)


@dataclass(frozen=True)
class NaiveState:
    row_map: RowMap
    sent: list[int]
    received: list[int]


class Naive:
    """One copy a (token, expert), BF16 in both directions: the textbook's all-to-all, without the experts' compute."""

    def __init__(self, group: ProcessGroup, num_experts: int) -> None:
        self.group, self.span = group, num_experts // group.size()

    def dispatch(self, rows_TD: Tensor, topk_ids_TK: Tensor) -> tuple[Tensor, NaiveState]:
        """-> the copies that arrived [N, D]."""
        row_map = plan_rows(topk_ids_TK // self.span, self.group.size(), align=1)
        got = exchange(row_map.tokens_per_expert[:, None], self.group, "counts")
        state = NaiveState(row_map, row_map.tokens_per_expert.tolist(), got[:, 0].tolist())
        return self.copies(rows_TD, state), state

    def copies(self, rows_TD: Tensor, state: NaiveState) -> Tensor:
        """One copy a (token, expert) by a dispatch's state: a dispatch without counts, which is combine's backward."""
        copies_ND = permute(rows_TD, state.row_map)
        assert isinstance(copies_ND, Tensor)
        return start_all_to_all(copies_ND, state.sent, state.received, self.group, "naive").wait()

    def combine(self, y_ND: Tensor, state: NaiveState) -> Tensor:
        """-> the sum of each token's copies [T, D]; dispatch's backward too."""
        return unpermute(start_all_to_all(y_ND, state.received, state.sent, self.group, "naive").wait(), state.row_map)

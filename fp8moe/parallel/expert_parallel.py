"""Dispatch across ranks: a token goes once to each rank that holds one of its experts, and is fanned out there.

Each rank sends, for every destination, one packed message of its tokens in order: codes, scales, the ids of the
destination's experts and their routing weights, side by side in one row of bytes. The receiver then holds tokens in
global order (source rank, then token) and does what `LocalDispatcher` does, with the experts it has. What comes back is
one partial sum per (token, rank), added in FP32 in order of rank. Sending a row per expert instead was refused: at
top-8 over 8 nodes it is several times the bytes.

Legend: T tokens here, K top-k, D model, W ranks of the group, S rows sent, N rows received, R rows after the fan-out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.permute import RowMap, permute, plan_rows, unpermute
from fp8moe.layers.dispatch import Dispatched, Ready, return_weights, select_weights
from fp8moe.layers.operand import Rows
from fp8moe.parallel.collectives import all_to_all, exchange_counts


@dataclass(frozen=True)
class Way:
    """How one dispatch went, for its three sisters: which token each sent row is, the splits, the fan-out."""

    token_S: Tensor
    sent: list[int]
    received: list[int]
    num_tokens: int
    row_map: RowMap


class AllToAllDispatcher:
    """Experts spread evenly over the ranks of `group`: rank w holds experts [w e, (w + 1) e)."""

    def __init__(self, group: ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.num_ranks = group.size()
        if num_experts % self.num_ranks:
            raise ValueError(f"{num_experts} experts can't be spread evenly over {self.num_ranks} ranks")
        self.num_local_experts = num_experts // self.num_ranks

    def dispatch(self, rows_TD: Rows, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Ready[Dispatched]:
        e = self.num_local_experts
        rank_TK = topk_ids_TK // e
        visits_WT = torch.zeros(self.num_ranks, len(rank_TK), dtype=torch.bool, device=rank_TK.device)
        visits_WT.T.scatter_(1, rank_TK, True)
        destination_S, token_S = visits_WT.nonzero(as_tuple=True)
        counts = visits_WT.sum(1)
        sent, received = torch.stack([counts, exchange_counts(counts, self.group)]).tolist()

        here_SK = rank_TK[token_S] == destination_S[:, None]
        local_ids_SK = torch.where(here_SK, topk_ids_TK[token_S] % e, -1).to(torch.int32)
        parts = [*_bytes_of(rows_TD, token_S), _as_bytes(local_ids_SK), _as_bytes(topk_weights_TK[token_S])]
        arrived = self._send(torch.cat(parts, dim=1), sent, received).split([p.shape[1] for p in parts], dim=1)
        local_ids_NK = _from_bytes(arrived[-2], torch.int32).long()
        weights_NK = _from_bytes(arrived[-1], torch.float32)

        row_map = plan_rows(local_ids_NK, e)
        rows_RD = permute(_rows_from(arrived[:-2], rows_TD), row_map)
        way = Way(token_S, sent, received, len(rank_TK), row_map)
        return Ready(Dispatched(rows_RD, select_weights(weights_NK, row_map), row_map.group_offsets, way))

    def combine(self, y_RD: Tensor, layout: Way) -> Ready[Tensor]:
        return Ready(self._sum_home(unpermute(y_RD, layout.row_map), layout))

    def dispatch_backward(self, dx_RD: Tensor, dweights_R: Tensor, layout: Way) -> Ready[tuple[Tensor, Tensor]]:
        dweights_NK = return_weights(dweights_R, layout.row_map)
        dx_TD = self._sum_home(unpermute(dx_RD, layout.row_map), layout)
        return Ready((dx_TD, self._sum_home(dweights_NK, layout)))

    def combine_backward(self, dy_TD: Rows, layout: Way) -> Ready[Rows]:
        parts = _bytes_of(dy_TD, layout.token_S)
        arrived = self._send(torch.cat(parts, dim=1), layout.sent, layout.received)
        rows_ND = _rows_from(arrived.split([p.shape[1] for p in parts], dim=1), dy_TD)
        return Ready(permute(rows_ND, layout.row_map))

    def _send(self, rows_S: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return all_to_all(rows_S, sent, received, self.group)

    def _sum_home(self, partial_N: Tensor, way: Way) -> Tensor:
        """Send partial sums [N, D] back and add those of each token, in FP32 and in order of rank: [T, D]."""
        partial_S = all_to_all(partial_N, way.received, way.sent, self.group)
        total = torch.zeros(way.num_tokens, partial_S.shape[1], dtype=torch.float32, device=partial_S.device)
        return total.index_add_(0, way.token_S, partial_S.float()).to(partial_S.dtype)


def _as_bytes(rows: Tensor) -> Tensor:
    """[S, n] of any dtype -> [S, bytes] uint8."""
    return rows.reshape(-1).view(torch.uint8).view(len(rows), rows.shape[1] * rows.element_size())


def _from_bytes(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A column slice of received bytes -> [N, n] of `dtype`."""
    return part.reshape(-1).view(dtype).view(len(part), part.shape[1] // dtype.itemsize)


def _bytes_of(rows_TD: Rows, token_S: Tensor) -> list[Tensor]:
    """The chosen rows as byte columns: codes and scales, or the tensor's own bytes."""
    if isinstance(rows_TD, Fp8Tensor):
        return [_as_bytes(rows_TD.data)[token_S], _as_bytes(rows_TD.scale)[token_S]]
    return [_as_bytes(rows_TD)[token_S]]


def _rows_from(parts: tuple[Tensor, ...], like: Rows) -> Rows:
    """The inverse of `_bytes_of` for received byte columns."""
    if isinstance(like, Fp8Tensor):
        return Fp8Tensor(_from_bytes(parts[0], like.data.dtype), _from_bytes(parts[1], torch.float32))
    return _from_bytes(parts[0], like.dtype)

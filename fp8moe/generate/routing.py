"""Which experts every token of some rows went to, while they are generated: for updates that send them there again.

Hooks on the routers note their choice, for the time of one forward. The record lies beside the caches and in the
smallest integers that number the experts: of a token layers x topk bytes up to 256 experts, 464 of DeepSeek-V3, where
its cache entries are 70 thousand.

Legend: N rows, P places of a row, S new tokens of each, L layers with experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.layers.router import Router, Routing
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.collectives import all_reduce


def integers_for(num_experts: int) -> torch.dtype:
    """The smallest type that numbers so many experts from 0."""
    if num_experts <= 2**8:
        return torch.uint8
    return torch.int16 if num_experts <= 2**15 else torch.int32


class RoutingRecord:
    """Experts [N, P, L, K] of the tokens of `rows` rows of at most `length` places, by the layers that are here."""

    def __init__(self, model: Transformer, rows: int, length: int) -> None:
        config, device = model.config, next(model.parameters()).device
        self._routers: dict[int, Router] = {}
        for number, layer in enumerate(config.expert_layers):
            moe = model.block(layer).moe if str(layer) in model.blocks else None
            if moe is not None:
                self._routers[number] = moe.router
        shape = rows, length, len(config.expert_layers), config.router.topk
        self._ids_NPLK = torch.zeros(shape, dtype=integers_for(config.experts.num_experts), device=device)

    @contextmanager
    def noting(self, rows: Tensor, starts: Tensor, length: int) -> Iterator[None]:
        """While the block runs a forward of `length` tokens of each of `rows`, from places `starts` on (int64)."""
        ids_NPLK = self._ids_NPLK
        at = starts[:, None] + torch.arange(length, device=ids_NPLK.device)

        def hook(layer: int) -> Any:
            def note(router: Any, given: Any, routing: Routing) -> None:
                ids_BSK = routing.topk_ids_TK.unflatten(0, (len(rows), length))
                ids_NPLK[rows[:, None], at, layer] = ids_BSK.to(ids_NPLK.dtype)

            return note

        with ExitStack() as hooks:
            for layer, router in self._routers.items():
                hooks.enter_context(router.register_forward_hook(hook(layer)))
            yield

    def take(self, rows: Tensor) -> None:
        """Make the record that of `rows` (int64), in that order; a row may be there several times."""
        self._ids_NPLK = self._ids_NPLK[rows]

    def of_rows(self, counts: Sequence[int], pp_group: ProcessGroup | None) -> list[NDArray[Any]]:
        """Of each row its first so many tokens, [count, L, K]. Collective over the ranks that share the layers out."""
        ids_NPLK = self._ids_NPLK
        if pp_group is not None:  # what another rank has is 0 here; NCCL adds no int16
            sums = ids_NPLK if ids_NPLK.dtype is torch.uint8 else ids_NPLK.int()
            ids_NPLK = all_reduce(sums, pp_group).to(ids_NPLK.dtype)
        ids = ids_NPLK.cpu().numpy()
        return [np.ascontiguousarray(ids[row, :count]) for row, count in enumerate(counts)]


@contextmanager
def noting(record: RoutingRecord | None, rows: Tensor, starts: Tensor, length: int) -> Iterator[None]:
    """As `RoutingRecord.noting`, where there is a record."""
    if record is None:
        yield
    else:
        with record.noting(rows, starts, length):
            yield

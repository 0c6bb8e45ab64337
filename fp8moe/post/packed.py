"""Rows of samples: how a batch of rollouts lies in the micro-batches of an update.

Legend: R rows of a rank, S tokens of a row, M micro-batches of T tokens, K tokens of all completions, sample after
sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8moe.data.packing import Batch, Window, collate
from fp8moe.layers.attention.zigzag import part_of
from fp8moe.post.rollouts import Rollouts
from fp8moe.train.batch import share_of
from fp8moe.train.run import Run


@dataclass(frozen=True)
class Packed:
    """Rows of samples: micro-batches of one rank, and by label int64 [M, T] the place of its token among the K, -1
    where none is predicted. rows: of all ranks. tokens: predicted by all of them."""

    batches: list[Batch]
    places_MT: Tensor
    rows: int
    tokens: int

    def spread(self, values_K: Tensor) -> Tensor:
        """Values of tokens as FP32 [M, T], 0 where nothing is predicted."""
        if not values_K.numel():
            return torch.zeros(self.places_MT.shape)
        return values_K.float()[self.places_MT.clamp(min=0)] * (self.places_MT >= 0)

    def collected(self, values_MT: Tensor, count: int) -> Tensor:
        """FP32 [K]: the values of this rank's labels at their tokens, 0 of the others'."""
        found, at = torch.zeros(count), self.places_MT >= 0
        found[self.places_MT[at]] = values_MT[at]
        return found

    def with_own_experts(self) -> Packed:
        """The same rows, for a model whose routers choose."""
        return replace(self, batches=[replace(batch, experts_BSLK=None) for batch in self.batches])


def pack(rollouts: Rollouts, samples: Sequence[int], run: Run, *, least: int, multiple: int) -> Packed:
    """Rows of the samples with these numbers, as many on every rank; of parallel.cp ranks each has a part of a row.

    With data.document_mask several samples share a row, the longest first, each a document of its own; else each has
    one. Rows of nothing fill up the last micro-batches. least, multiple: micro-batches that the schedule needs.
    """
    config, mesh = run.config, run.mesh
    sizes = {n: len(rollouts.prompts[n // rollouts.group]) + len(rollouts.completions[n]) for n in samples}
    rows: list[list[int]] = []
    free: list[int] = []
    for n in sorted(samples, key=lambda n: -sizes[n]):
        at = next((i for i, room in enumerate(free) if room >= sizes[n]), None) if config.data.document_mask else None
        if at is None:
            at = len(rows)
            rows.append([])
            free.append(config.seq_len + 1)
        rows[at].append(n)
        free[at] -= sizes[n]
    unit = mesh.data_ranks * config.micro_batch
    count = max(least, -(-max(-(-len(rows) // unit), 1) // multiple) * multiple) * config.micro_batch
    total = count * mesh.data_ranks
    mine = [rows[i] if i < len(rows) else [] for i in range(mesh.data_rank, total, mesh.data_ranks)]
    windows, places = zip(*(_row(rollouts, row, config.seq_len) for row in mine), strict=True)
    whole = [
        collate(windows[i : i + config.micro_batch], document_mask=config.data.document_mask)
        for i in range(0, count, config.micro_batch)
    ]
    if rollouts.routing is not None:
        experts = _experts(rollouts, rollouts.routing, mine, config.seq_len).split(config.micro_batch)
        whole = [replace(batch, experts_BSLK=part) for batch, part in zip(whole, experts, strict=True)]
    batches = [share_of(batch, mesh.cp_rank, mesh.cp) for batch in whole]
    places_RS = torch.from_numpy(np.stack(places))
    places_MT = (places_RS if mesh.cp == 1 else part_of(places_RS, mesh.cp_rank, mesh.cp)).reshape(len(batches), -1)
    return Packed(batches, places_MT, total, sum(len(rollouts.completions[n]) for n in samples))


def _row(rollouts: Rollouts, samples: Sequence[int], seq_len: int) -> tuple[Window, np.ndarray[Any, Any]]:
    """(a row of these samples, the place of each label's token among the K)."""
    tokens, places = np.zeros(seq_len + 1, dtype=np.int64), np.full(seq_len + 1, -1, dtype=np.int64)
    starts, filled = [0], 0
    for n in samples:
        prompt, completion = rollouts.prompts[n // rollouts.group], rollouts.completions[n]
        starts.append(filled)
        behind = filled + len(prompt)
        end = behind + len(completion)
        tokens[filled:behind], tokens[behind:end] = prompt, completion
        places[behind:end] = rollouts.starts[n] + np.arange(len(completion))
        filled = end
    filled = max(filled, 1)  # a row of nothing is a document of one token
    window = Window(tokens, np.unique(starts), len(tokens) - filled, (places >= 0).astype(np.uint8))
    return window, places[1:]


def _experts(
    rollouts: Rollouts, routing: Sequence[NDArray[Any]], rows: Sequence[Sequence[int]], seq_len: int
) -> Tensor:
    """[rows, S, L, K]: the experts of the inputs of rows of samples, as `_row` lays them; -1 of a sample's last token,
    which the generator put through no layer, and of padding."""
    dtype = np.promote_types(routing[0].dtype, np.int16)
    experts = np.full((len(rows), seq_len, *routing[0].shape[1:]), -1, dtype=dtype)
    for row, samples in zip(experts, rows, strict=True):
        filled = 0
        for n in samples:
            row[filled : filled + len(routing[n])] = routing[n]
            filled += len(routing[n]) + 1
    return torch.from_numpy(experts)

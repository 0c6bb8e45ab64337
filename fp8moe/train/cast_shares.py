"""Shares of FP8 values that a step's casts lost, saturated or underflowed, by kind of tensor (`kernels.statistics`).

A step casts activations and gradients; the weights that it multiplies by were cast behind the update before, and are
counted where they lie. One all-reduce of nine numbers, in steps that count (`logging.fp8_every`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fp8moe.kernels.quantize import ACTIVATIONS, GRADIENTS, WEIGHTS
from fp8moe.kernels.statistics import CastStatistics, observe_casts
from fp8moe.layers.linear import QuantizedWeight
from fp8moe.parallel.collectives import all_reduce
from fp8moe.train.run import Run

KINDS = (ACTIVATIONS, GRADIENTS, WEIGHTS)


@dataclass(frozen=True)
class Shares:
    """Shares in [0, 1]: of a step's casts, activations and gradients together; by kind. None where none was counted."""

    of_step: float | None = None
    by_kind: dict[str, float] | None = None


@contextmanager
def casts_of(run: Run) -> Iterator[CastStatistics]:
    """Scope in which the casts of a step are counted, with those of the weights that it multiplies by."""
    with observe_casts() as casts:
        for module in run.model.modules():
            if isinstance(module, QuantizedWeight) and module.recipe.fp8:
                casts.add_weight(module.weight, module.blocks)
        yield casts


def cast_shares(run: Run, casts: CastStatistics | None) -> tuple[Shares, Shares]:
    """(saturated, underflowed) shares over all ranks. Collective if counted, that is, unless `casts` is None."""
    if casts is None:
        return Shares(), Shares()
    mine = torch.tensor([casts.of_kind(kind) for kind in KINDS], dtype=torch.float64)
    counts = all_reduce(mine, run.mesh.world_group)
    of_kinds, of_step = counts.tolist(), (counts[0] + counts[1]).tolist()
    saturated, underflowed = (
        Shares(
            of_step[lost] / max(of_step[0], 1.0),
            {kind: of_kind[lost] / max(of_kind[0], 1.0) for kind, of_kind in zip(KINDS, of_kinds, strict=True)},
        )
        for lost in (1, 2)
    )
    return saturated, underflowed

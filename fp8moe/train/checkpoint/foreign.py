"""Weights that no checkpoint of ours holds: what a run needs of them to begin from them.

Reading released models lives on a floor above this one (`interop`), so the command hands its opener down: `init_from`
is given to it first, and what it does not know is a run or a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from fp8moe.model.config import ModelConfig
from fp8moe.train.checkpoint.pieces import Pieces


class ForeignWeights(Protocol):
    """Weights by the names of a checkpoint: `master.NAME` of every parameter, `bias.NAME` of every router."""

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError unless they are of this model."""

    def load(self, tensors: Mapping[str, Tensor | Pieces]) -> None:
        """Fill the ranges that a rank holds, and read nothing else."""


OpenForeign = Callable[[str, ModelConfig], ForeignWeights | None]


def no_foreign(name: str, model: ModelConfig) -> None:
    """Knows no weights but those of runs and checkpoints."""

"""The held-out loss: the same samples every time, spread over the ranks, in nats a token and in bits a byte.

Every rank scores as many samples as any other, because ranks that share experts must make the same number of passes.
Bits per byte divides by the bytes that the predicted tokens stand for, so models with other tokenizers, and a model of
bytes, can be compared. The MTP module takes no part: it is a help of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.data.packing import IGNORED_LABEL, Batch, Dataset
from fp8moe.data.sampler import rank_slice
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.batch import pieces


@dataclass(frozen=True)
class ValidationConfig:
    """every: steps between validations (0: only at the end). samples: sequences scored, always the same."""

    every: int = 0
    samples: int = 64

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"validation.every={self.every} must be at least 0: 0 validates at the end only")
        if self.samples < 1:
            raise ValueError(f"validation.samples={self.samples} must be at least 1")

    def check(self, dp: int, micro_batch: int) -> None:
        """Raises ValueError unless every rank gets the same whole number of micro-batches."""
        unit = dp * micro_batch
        if self.samples % unit:
            nearest = max(1, round(self.samples / unit)) * unit
            raise ValueError(
                f"validation.samples={self.samples} is no multiple of dp x batch.micro_batch = {dp} x {micro_batch} = "
                f"{unit}: use {nearest}"
            )


@dataclass(frozen=True)
class ValidationReport:
    """loss: nats a predicted token. bits_per_byte: None where no tokenizer says how many bytes a token stands for."""

    loss: float
    bits_per_byte: float | None
    tokens: int


def validate(
    forward: Callable[[list[Batch]], Tensor],
    dataset: Dataset,
    token_bytes: Tensor | None,
    mesh: Mesh,
    *,
    samples: int,
    micro_batch: int,
) -> ValidationReport:
    """Score the first `samples` samples of `dataset`. Collective over all ranks.

    forward: micro-batches -> nats summed over what this rank scores of them (0 on a rank without the head).
    token_bytes: int64 [vocab_size], bytes of each id.
    """
    mine = rank_slice(list(range(samples)), mesh.dp_rank, mesh.dp)
    batches = [dataset.batch(ids) for ids in pieces(mine, micro_batch)]
    labels = torch.cat([batch.labels_BS[batch.labels_BS != IGNORED_LABEL] for batch in batches])
    in_bytes = 0 if token_bytes is None else int(token_bytes[labels].sum())
    nats = float(all_reduce(forward(batches).cpu(), mesh.world_group))
    tokens, num_bytes = all_reduce(torch.tensor([labels.numel(), in_bytes]), mesh.dp_group).tolist()
    return ValidationReport(
        loss=nats / max(tokens, 1),
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
        tokens=tokens,
    )

"""Validation loss: of the same held-out samples every time, split over the ranks, in nats a token and bits a byte.

Every rank scores the same number of samples, because ranks that share experts must make the same number of passes.
Bits per byte divides by the bytes of the text that the predicted tokens encode, so models with different tokenizers,
and a model of bytes, can be compared. The MTP module is left out: it only serves training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.data.packing import IGNORED_LABEL, Batch, Dataset
from fp8moe.data.sampler import rank_slice
from fp8moe.limits import COUNT, Range, check_fields
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.batch import microbatches_of, share_of


@dataclass(frozen=True)
class ValidationConfig:
    """When the model is scored on held-out text, and on how much of it."""

    every: int = 0  # steps between validations; 0: at the end only
    samples: int = 64  # sequences scored, the same each time
    ema: bool = False  # the average of the weights (`train.ema`) is scored as well
    # beginnings of held-out samples that the model continues at the end of the run, for its reader; 0: none
    completions: int = 3

    def __post_init__(self) -> None:
        check_fields(
            self, "validation", every=COUNT, samples=Range(least=1, most=2**24), completions=Range(least=0, most=32)
        )

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to validate after step number `step` (from 1) of `steps`; after the last always."""
        return step == steps or (self.every > 0 and step % self.every == 0)

    def check(self, dp: int, micro_batch: int, *, of: str = "dp") -> None:
        """Raises ValueError unless every rank gets the same whole number of micro-batches."""
        unit = dp * micro_batch
        if self.samples % unit:
            nearest = max(1, round(self.samples / unit)) * unit
            raise ValueError(
                f"validation.samples={self.samples} must be a multiple of {of} x batch.micro_batch = {dp} x "
                f"{micro_batch} = {unit}: use {nearest}"
            )


@dataclass(frozen=True)
class ValidationReport:
    """loss: nats a predicted token. bits_per_byte: None without a tokenizer, which says the bytes of a token."""

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
    """The loss of the first `samples` samples of `dataset`. Collective over all ranks.

    forward: micro-batches -> nats summed over their predicted tokens (0 on a rank without the head).
    token_bytes: int64 [vocab_size], bytes of each id.
    """
    mine = rank_slice(list(range(samples)), mesh.data_rank, mesh.data_ranks)
    whole = [dataset.batch(ids) for ids in microbatches_of(mine, micro_batch)]
    batches = [share_of(batch, mesh.cp_rank, mesh.cp) for batch in whole]
    labels = torch.cat([batch.labels_BS[batch.labels_BS != IGNORED_LABEL] for batch in batches])
    in_bytes = 0 if token_bytes is None else int(token_bytes[labels].sum())
    nats = float(all_reduce(forward(batches).cpu(), mesh.world_group))
    tokens, num_bytes = all_reduce(torch.tensor([labels.numel(), in_bytes]), mesh.dp_group).tolist()
    return ValidationReport(
        loss=nats / max(tokens, 1),
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
        tokens=tokens,
    )

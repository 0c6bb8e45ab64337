"""Log-probabilities of the labels of micro-batches, one a token: what an old policy or a reference says of samples.

They come from the forwards that validation runs, with the same chunks of logits, on any layout: the log-probabilities
of a micro-batch are taken by the rank that has the head and then shared over the pipeline. The same pass as training's
and not the generator's: attention, dispatch and casts are those of the update, so that a policy compared with itself
has the ratio 1.

Legend: M micro-batches of this rank, T tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8moe.data.packing import Batch
from fp8moe.model.head_loss import TokenLoss
from fp8moe.parallel.collectives import all_reduce
from fp8moe.train.run import Run
from fp8moe.train.step import forward_passes


class LabelLogProbs(TokenLoss):
    """A `TokenLoss` that is cross entropy and keeps what it is given: `logp_MT`, FP32, 0 where nothing is predicted."""

    def __init__(self, microbatches: int, tokens: int, device: torch.device, temperature: float = 1.0) -> None:
        self.temperature = temperature
        self.logp_MT = torch.zeros(microbatches, tokens, dtype=torch.float32, device=device)

    def __call__(self, microbatch: int, tokens: slice, logp_C: Tensor) -> tuple[Tensor, Tensor]:
        self.logp_MT[microbatch, tokens] = logp_C
        return -logp_C, torch.full_like(logp_C, -1.0)


def label_logprobs(run: Run, batches: Sequence[Batch], temperature: float = 1.0) -> Tensor:
    """FP32 [M, T] on the host: the log-probability of every label of this rank's micro-batches, in their order.

    The model is the run's with its present weights, in evaluation mode. Collective over pipeline and experts: every
    rank brings as many micro-batches.
    """
    kept = LabelLogProbs(len(batches), run.config.rank_tokens, run.device, temperature)
    forward_passes(run, batches, kept)
    return all_reduce(kept.logp_MT, run.mesh.pp_group).cpu()

"""The likeliest next tokens by a teacher and their log-probabilities, for every token of a micro-batch.

    for each chunk of tokens c:
        logits [C, V] = x_c @ W^T / temperature
        log sum [C]     over all of the vocabulary
        top k   [C, k]  ids and logits, and one id more
        log rest [C]    the same sum over the tokens outside the k, whose logits are put to -1e30 for it

A chunk's logits end with it. Both sums come from `kernels.cross_entropy`, which passes over logits once, in FP32 and
without a copy: a loss plus its label's logit is the log of the sum of exponentials. For the rest the label is token
number k + 1. Refused: the rest as 1 - sum of the k, which loses all digits of a small rest.

Kept are 8 bytes for each of k ids and 8 a token more: 8.5 MB for 16,384 tokens with k = 64.

Legend: T tokens of a micro-batch, C of a chunk, D model, V vocabulary, K the k likeliest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.data.packing import Batch
from fp8moe.kernels.cross_entropy import cross_entropy
from fp8moe.layers.linear import Linear
from fp8moe.model.head_loss import chunk_tokens
from fp8moe.model.transformer import Transformer
from fp8moe.train.batch import to_device

EXCLUDED = -1e30  # a logit whose exponential is 0 beside any other's, and finite in BF16


@dataclass(frozen=True)
class TopK:
    """A teacher's distribution over k tokens and the rest.

    ids: int32 [T, K], likeliest first. logp: FP32 [T, K]. other: int32 [T], an id outside of them; rest: FP32 [T], log
    of the probability of all ids outside; where K = V there is none and rest is minus infinity.
    """

    ids: Tensor
    logp: Tensor
    other: Tensor
    rest: Tensor

    def part(self, tokens: slice) -> TopK:
        """Those of some of the tokens, as views."""
        return TopK(self.ids[tokens], self.logp[tokens], self.other[tokens], self.rest[tokens])


@torch.no_grad()
def teacher_topk(teacher: Transformer, batch: Batch, topk: int, temperature: float = 1.0) -> TopK:
    """Of every token of `batch`, on the teacher's device. Collective over ranks that share experts."""
    assert teacher.embedding is not None and teacher.norm is not None and teacher.head is not None
    batch = to_device(batch, teacher.embedding.weight.device)
    positions = teacher.positions(batch.positions_BS, batch.document_lengths)
    hidden_TD, _ = teacher.run_blocks(teacher.embedding(batch.inputs_BS.flatten()), positions)
    x_TD = teacher.norm(hidden_TD).tensor
    del hidden_TD
    tokens = len(x_TD)
    found = TopK(
        torch.empty(tokens, topk, dtype=torch.int32, device=x_TD.device),
        torch.empty(tokens, topk, dtype=torch.float32, device=x_TD.device),
        torch.zeros(tokens, dtype=torch.int32, device=x_TD.device),
        torch.full((tokens,), -torch.inf, dtype=torch.float32, device=x_TD.device),
    )
    size = chunk_tokens(tokens, teacher.head.weight.shape[0], x_TD.dtype, x_TD.device)
    for first in range(0, tokens, size):
        chunk = slice(first, min(first + size, tokens))
        _fill(teacher.head, x_TD[chunk], temperature, found.part(chunk))
    return found


def _fill(head: Linear, x_CD: Tensor, temperature: float, found: TopK) -> None:
    """Write what is found of one chunk; a function, so that its logits end with it."""
    logits_CV = head.fprop(x_CD)
    if temperature != 1:
        logits_CV.div_(temperature)
    topk, vocab_size = found.ids.shape[1], logits_CV.shape[1]
    values, ids = logits_CV.topk(min(topk + 1, vocab_size))
    log_sum_C = log_sum_exp(logits_CV, ids[:, 0])
    found.ids.copy_(ids[:, :topk])
    found.logp.copy_(values[:, :topk].float() - log_sum_C[:, None])
    if topk < vocab_size:
        found.other.copy_(ids[:, topk])
        logits_CV.scatter_(1, ids[:, :topk], EXCLUDED)
        found.rest.copy_(log_sum_exp(logits_CV, ids[:, topk]) - log_sum_C)


def log_sum_exp(logits_CV: Tensor, ids_C: Tensor) -> Tensor:
    """Log of the sum of exponentials [C] FP32, without a copy of the logits. ids_C: int64, of a logit that counts."""
    nats_C = torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    cross_entropy(logits_CV, ids_C, nats_C)
    return nats_C + logits_CV.gather(1, ids_C[:, None])[:, 0].float()

"""Load balance without a loss that hurts: a bias moved after each step, and a faint sequence-wise loss as a guard.

DeepSeek-V3 report, section 2.1.2: an expert above the mean load loses gamma of bias, one below gains it; the loads are
those of the whole batch, over all ranks. The sequence-wise loss keeps a single sequence from collapsing on few experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sequence_loss(scores_TE: Tensor, topk_ids_TK: Tensor, num_sequences: int) -> Tensor:
    """Sum over sequences of sum_e f_e P_e, a scalar FP32 that carries gradient through the scores.

    f_e is the share of a sequence's choices that fell on expert e, times E (1 when balanced); P_e the mean over its
    tokens of the score of e, normalised over experts. A balanced sequence gives 1. Weight it with alpha outside.
    """
    num_tokens, num_experts = scores_TE.shape
    if num_tokens == 0:
        return scores_TE.sum()
    shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    p_BE = shares_TE.view(num_sequences, -1, num_experts).mean(1)
    chosen = torch.zeros_like(scores_TE, requires_grad=False).scatter_(1, topk_ids_TK, 1.0)
    f_BE = chosen.view(num_sequences, -1, num_experts).mean(1) * (num_experts / topk_ids_TK.shape[1])
    return (f_BE * p_BE).sum()


@torch.no_grad()
def update_bias(model: nn.Module, gamma: float) -> None:
    """Move every router's bias by gamma towards balance and forget the counts. Counts must be reduced over ranks."""
    for module in model.modules():
        counts, bias = getattr(module, "counts_E", None), getattr(module, "bias_E", None)
        if counts is not None and bias is not None:
            load = counts.float()
            bias += gamma * torch.sign(load.mean() - load)
            counts.zero_()


def max_violation(counts_E: Tensor) -> float:
    """MaxVio: by how much the busiest expert exceeds the mean load, relative to it; 0 when balanced or without load."""
    load = counts_E.float()
    mean = load.mean()
    return float(load.max() / mean - 1) if mean > 0 else 0.0

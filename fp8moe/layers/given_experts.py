"""Routing to experts that are given: another forward's choice in place of the router's own, at the router's own scores.

`route_as_given` makes of given ids what `kernels.route` makes of those that it chooses: weights by the same scores and
the same normalisation, loads, balance loss and f, from which `kernels.route_backward` goes back as from a choice of its
own. So gradients flow through the weights of the given experts, into scores that may have preferred others. Sums are
written in the order of the specification, `kernels/reference/route.py`: its own choice, given to it, gives equal bits.

`kernels.route` runs before it all the same: for the tokens that nothing is given to, and because a run wants to know
how far the two choices part. On a GPU this adds 25 launches and a few passes over the scores to those of a layer, in
the updates of reinforcement learning alone; a branch of the routing kernel was refused, since plain operators do there.

Legend: T tokens, E experts, K top-k, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.layers.balance import TINY, mean_shares, scores


def route_as_given(
    logits_TE: Tensor,
    own_TK: Tensor,
    given_TK: Tensor,
    counts_E: Tensor | None,
    *,
    score: str,
    normalize: bool,
    route_scale: float,
    num_sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits FP32 [T, E] -> (ids int64 [T, K], weights FP32 [T, K], balance loss, f FP32 [B, E]) as `kernels.route`.

    given: integers [T, K]; a token of which any is negative has its own. counts: int64 [E], the tokens of each expert
    are added. Nothing waits for the device.
    """
    is_given_T1 = (given_TK >= 0).all(-1, keepdim=True)
    ids_TK = torch.where(is_given_T1, given_TK.to(torch.int64), own_TK)
    of_choice_TE = logits_TE if score == "softmax_topk" else scores(logits_TE, score)
    weights_TK = of_choice_TE.gather(1, ids_TK)
    if score == "softmax_topk":
        weights_TK = weights_TK.softmax(-1)
    elif normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
    chosen_TE = torch.zeros_like(logits_TE).scatter_(1, ids_TK, 1.0)
    load_BE = chosen_TE.unflatten(0, (num_sequences, -1)).sum(1)  # exact below 2^24 tokens
    if counts_E is not None:
        counts_E += load_BE.to(torch.int64).sum(0)
    (num_tokens, num_experts), topk = logits_TE.shape, ids_TK.shape[1]
    f_BE = load_BE / (num_tokens // num_sequences) * (num_experts / topk)
    loss = (f_BE * mean_shares(logits_TE, score, num_sequences)).sum()
    return ids_TK, weights_TK * route_scale, loss, f_BE

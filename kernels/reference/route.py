"""Routing in plain PyTorch: the choice by integer keys, so that ties have one answer on every device.

A score and its index become one int64: the FP32 bits mapped to an integer of the same order, above the index counted
from the end. Keys are distinct, hence the top-k of them is unique whatever algorithm finds it; a stable sort would do
the same at four times the cost.

The backward is written out in the order in which autograd would take the forward back, sum by sum, so that both give
equal bits; it makes the scores again from the logits.
"""

import torch
from torch import Tensor

_INDEX_BITS = 20
_TINY = 1e-20  # keeps a sum of scores that is zero from dividing by zero


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    counts_E: Tensor | None,
    *,
    topk: int,
    num_groups: int,
    top_groups: int,
    score: str,
    group_score: str,
    normalize: bool,
    route_scale: float,
    num_sequences: int,
    force_balance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores_TE = _scores(logits_TE, score)
    choosing_TE = logits_TE if score == "softmax_topk" else scores_TE
    if force_balance:
        slots = torch.arange(logits_TE.shape[0] * topk, device=logits_TE.device)
        topk_ids_TK = (slots % logits_TE.shape[1]).view(-1, topk)
    else:
        topk_ids_TK = _choose(choosing_TE + bias_E, topk, num_groups, top_groups, group_score)
    weights_TK = choosing_TE.gather(1, topk_ids_TK)
    if score == "softmax_topk":
        weights_TK = weights_TK.softmax(-1)
    elif normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _TINY)
    loss, f_BE = _balance(scores_TE, topk_ids_TK, counts_E, num_sequences)
    return topk_ids_TK, weights_TK * route_scale, loss, f_BE


def route_backward(
    logits_TE: Tensor,
    topk_ids_TK: Tensor,
    f_BE: Tensor,
    d_weights_TK: Tensor,
    d_loss: Tensor,
    *,
    score: str,
    normalize: bool,
    route_scale: float,
) -> Tensor:
    scores_TE = _scores(logits_TE, score)
    d_scores_TE = _balance_backward(scores_TE, f_BE, d_loss)
    d_chosen_TK = d_weights_TK * route_scale
    if score == "softmax_topk":
        weights_TK = logits_TE.gather(1, topk_ids_TK).softmax(-1)
        d_chosen_TK = _softmax_backward(d_chosen_TK, weights_TK)
    elif normalize:
        chosen_TK = scores_TE.gather(1, topk_ids_TK)
        d_chosen_TK = _share_backward(d_chosen_TK, chosen_TK, chosen_TK.sum(-1, keepdim=True) + _TINY)
    d_gathered_TE = torch.zeros_like(scores_TE).scatter_(1, topk_ids_TK, d_chosen_TK)
    if score == "softmax_topk":
        return _softmax_backward(d_scores_TE, scores_TE).add_(d_gathered_TE)
    d_scores_TE += d_gathered_TE
    if score == "softmax":
        return _softmax_backward(d_scores_TE, scores_TE)
    d_logits_TE: Tensor = torch.ops.aten.sigmoid_backward(d_scores_TE, scores_TE)
    return d_logits_TE


def _scores(logits_TE: Tensor, score: str) -> Tensor:
    return logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(-1)


def _choose(biased_TE: Tensor, topk: int, num_groups: int, top_groups: int, group_score: str) -> Tensor:
    num_experts = biased_TE.shape[1]
    if top_groups < num_groups:
        grouped_TGe = biased_TE.unflatten(1, (num_groups, num_experts // num_groups))
        counted = 1 if group_score == "max" else min(2, grouped_TGe.shape[2])
        group_score_TG = grouped_TGe.topk(counted, dim=2).values.sum(dim=2)
        kept_Tg = _first_indices(group_score_TG, top_groups)
        dropped_TG = torch.ones_like(group_score_TG, dtype=torch.bool).scatter_(1, kept_Tg, False)
        biased_TE = grouped_TGe.masked_fill(dropped_TG[:, :, None], float("-inf")).flatten(1)
    return _first_indices(biased_TE, topk)


def _first_indices(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, largest first, ties by the lowest index; int64."""
    # Adding zero turns -0.0 into 0.0, which compares equal. Negative numbers have their magnitude bits inverted.
    bits = (score.float() + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    last = score.shape[1] - 1
    key = (ordered << _INDEX_BITS) | (last - torch.arange(score.shape[1], device=score.device))
    return last - (key.topk(count, dim=1).values & ((1 << _INDEX_BITS) - 1))


def _balance(
    scores_TE: Tensor, topk_ids_TK: Tensor, counts_E: Tensor | None, num_sequences: int
) -> tuple[Tensor, Tensor]:
    """The balance loss and f; the tokens of each expert are added into the counts."""
    num_tokens, num_experts = scores_TE.shape
    if num_tokens == 0:
        return scores_TE.sum(), scores_TE.new_zeros(num_sequences, num_experts)
    shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + _TINY)
    p_BE = shares_TE.view(num_sequences, -1, num_experts).mean(1)
    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, topk_ids_TK, 1.0)
    chosen_BE = chosen_TE.view(num_sequences, -1, num_experts).sum(1)  # exact below 2^24 tokens
    if counts_E is not None:
        counts_E += chosen_BE.to(torch.int64).sum(0)
    f_BE = chosen_BE / (num_tokens // num_sequences) * (num_experts / topk_ids_TK.shape[1])
    return (f_BE * p_BE).sum(), f_BE


def _balance_backward(scores_TE: Tensor, f_BE: Tensor, d_loss: Tensor) -> Tensor:
    """The gradient of the balance loss to the scores."""
    num_sequences, num_experts = f_BE.shape
    if scores_TE.shape[0] == 0:
        return torch.zeros_like(scores_TE)
    length = scores_TE.shape[0] // num_sequences
    d_shares_BE = d_loss * f_BE / length
    d_shares_TE = d_shares_BE[:, None].expand(-1, length, -1).reshape(-1, num_experts)
    return _share_backward(d_shares_TE, scores_TE, scores_TE.sum(-1, keepdim=True) + _TINY)


def _share_backward(dy: Tensor, x: Tensor, total: Tensor) -> Tensor:
    """The gradient of x / total to x, where total is the sum of a row of x."""
    d_total = (-dy * ((x / total) / total)).sum(-1, keepdim=True)
    return dy / total + d_total


def _softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    dx: Tensor = torch.ops.aten._softmax_backward_data(dy, y, -1, torch.float32)
    return dx

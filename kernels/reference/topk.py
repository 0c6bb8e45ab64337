"""Group-limited top-k by integer keys, so that ties have one answer on every device: the lowest index.

A score and its index become one int64: the FP32 bits mapped to an integer of the same order, above the index counted
from the end. Keys are distinct, hence the top-k of them is unique whatever algorithm finds it; a stable sort would do
the same at four times the cost.
"""

import torch
from torch import Tensor

_INDEX_BITS = 20


def group_limited_topk(scores_TE: Tensor, bias_E: Tensor, *, topk: int, num_groups: int, top_groups: int) -> Tensor:
    biased_TE = scores_TE + bias_E
    num_experts = biased_TE.shape[1]
    if top_groups < num_groups:
        grouped_TGe = biased_TE.unflatten(1, (num_groups, num_experts // num_groups))
        group_score_TG = grouped_TGe.topk(min(2, grouped_TGe.shape[2]), dim=2).values.sum(dim=2)
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

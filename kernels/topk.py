"""Which experts a token goes to: group-limited top-k of the biased scores (DeepSeek-V3 report, sections 2.1.2, 2.1.3).

Experts lie in groups of equal size (the experts of one node). A token may use `top_groups` of them: a group's score is
the sum of its two largest biased scores; experts of the other groups are masked with -inf, not with zero, because a
biased score can be negative. The bias steers this choice only; gate weights come from the unbiased scores, elsewhere.

Ties go to the lowest index, of groups and of experts, on every back end: two layouts of one model route alike.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend


def group_limited_topk(scores_TE: Tensor, bias_E: Tensor, *, topk: int, num_groups: int, top_groups: int) -> Tensor:
    """scores [T, E] and bias [E], FP32 -> int64 [T, topk], by biased score, largest first.

    A group of one expert has that expert's score. Raises ValueError for sizes that do not fit together.
    """
    num_experts = scores_TE.shape[-1]
    if scores_TE.dim() != 2 or bias_E.shape != (num_experts,):
        raise ValueError(
            f"scores must be [T, E] and the bias [E], got {list(scores_TE.shape)} and {list(bias_E.shape)}: reshape"
        )
    if scores_TE.dtype is not torch.float32 or bias_E.dtype is not torch.float32:
        raise ValueError(f"scores and bias must be FP32, got {scores_TE.dtype} and {bias_E.dtype}: cast both")
    if num_groups < 1 or num_experts % num_groups:
        legal = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        nearest = min(legal, key=lambda n: abs(n - num_groups))
        raise ValueError(f"num_groups={num_groups} does not divide num_experts={num_experts}: use {nearest}")
    if not 1 <= top_groups <= num_groups:
        nearest = min(max(top_groups, 1), num_groups)
        raise ValueError(f"top_groups={top_groups} must be between 1 and num_groups={num_groups}: use {nearest}")
    reachable = top_groups * (num_experts // num_groups)
    if not 1 <= topk <= reachable:
        nearest = min(max(topk, 1), reachable)
        raise ValueError(f"topk={topk} must be between 1 and the {reachable} experts of top_groups: use {nearest}")
    return backend.op("group_limited_topk")(scores_TE, bias_E, topk=topk, num_groups=num_groups, top_groups=top_groups)
